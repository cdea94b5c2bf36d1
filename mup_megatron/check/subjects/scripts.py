"""A script that is checked: what it is given and makes of it, as bare models, batches, losses, a task a run."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mup_megatron.check.family.sizes import SEQUENCE, VOCABULARY
from mup_megatron.check.family.stress import FLOOR
from mup_megatron.check.measure import batches, levels
from mup_megatron.check.measure.optimizers import torch_optimizers
from mup_megatron.check.subjects.modules import Batch
from mup_megatron.errors import InputError
from mup_megatron.modules import apply_plan, param_groups
from mup_megatron.recipe import Recipe
from mup_megatron.theory import Plan

Factory = Callable[[int], nn.Module]
"""Width → the bare model, as its library draws it."""
Schedule = Callable[[int, int], float]
"""(step, steps) → the learning rate's part of its peak."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One run, as it is told to the script that is checked."""

    plan: Plan
    """The right one."""
    recipe: Recipe
    """The one that is checked, with values at which mistakes show."""
    width: int
    seed: int
    steps: int


Prepare = Callable[[nn.Module, Task], Any]
"""What a script makes of a bare model: it applies the plan and returns an optimizer, (optimizer, scheduler), or a
DeepSpeed engine; None where there is nothing to train. In place of an optimizer and a scheduler there may be lists."""


def prepare_by_plan(model: nn.Module, task: Task) -> Any:
    """Makes of a model what `mup_megatron.modules` does, and returns its optimizer, or the list of them if there are
    several; None where there is nothing to train.
    """
    apply_plan(model, task.plan)
    made = torch_optimizers(param_groups(model.named_parameters(), task.plan), task.recipe)
    return made if len(made) > 1 else next(iter(made), None)


def is_engine(prepared: Any) -> bool:
    """Returns whether a script has returned DeepSpeed's engine."""
    return hasattr(prepared, "backward") and hasattr(prepared, "module")


def trained_by(prepared: Any) -> tuple[list[torch.optim.Optimizer], list[Any] | None]:
    """Returns the optimizers and the schedulers in what a script has returned, no engine; None without schedulers."""
    optimizers, schedulers = prepared if isinstance(prepared, tuple) else (prepared, None)
    return _listed(optimizers), None if schedulers is None else _listed(schedulers)


def _listed(given: Any) -> list[Any]:
    return list(given) if isinstance(given, list | tuple) else [] if given is None else [given]


def warm_up_and_decay(step: int, steps: int) -> float:
    """Linear from 0 over the first quarter of a run, then linear to a tenth."""
    warm = steps / 4
    return step / warm if step <= warm else 1 + (FLOOR - 1) * (step - warm) / (steps - warm)


def bare_model(factory: Factory, width: int, *, seed: int) -> nn.Module:
    """Returns a bare model, always the same for a seed.

    Raises:
        InputError: the factory failed.
    """
    torch.manual_seed(seed)
    try:
        return factory(width)
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"width {width}: the model cannot be built ({type(error).__name__}: {error}). Choose widths that fit the "
            "model, for example multiples of its head size."
        ) from error


def default_batch(models: Mapping[int, nn.Module]) -> Batch:
    """Tokens for Hugging Face's language models, pictures for its image classifiers.

    Raises:
        InputError: it is neither.
    """
    model: Any = next(iter(models.values()))
    config, name = getattr(model, "config", None), type(model).__name__
    size = levels.EARLY.batch_size
    if config is not None and any(part in name for part in ("CausalLM", "LMHead", "MaskedLM", "ConditionalGeneration")):
        positions = getattr(config, "max_position_embeddings", None) or SEQUENCE
        length = min(SEQUENCE, positions)

        def texts(step: int, _width: int) -> dict[str, Tensor]:
            ids = batches.tokens(min(VOCABULARY, config.vocab_size), length, size, seed=0, step=step)[:, 1:]
            return {"input_ids": ids, "labels": ids.clone()}

        return texts
    if config is not None and "ImageClassification" in name:
        side = getattr(config, "image_size", 32)

        def pictures(step: int, _width: int) -> dict[str, Tensor]:
            generator = torch.Generator().manual_seed(step + 1)
            # Brightness tells a few classes apart, so that there is something to learn at once.
            classes = min(config.num_labels, 4)
            labels = torch.randint(classes, (size,), generator=generator)
            noise = torch.randn(size, config.num_channels, side, side, generator=generator)
            brightness = 2.0 * labels / classes - 1.0
            return {"pixel_values": 0.3 * noise + brightness.view(-1, 1, 1, 1), "labels": labels}

        return pictures
    raise InputError(
        f"{name}: what it learns from is not known. Give `batch` (step, width) and `loss` (model, batch) to the check."
    )


def default_loss(model: Any, batch: Any) -> Tensor:
    """Returns the loss that Hugging Face's models compute."""
    loss: Tensor = model(**batch).loss
    return loss
