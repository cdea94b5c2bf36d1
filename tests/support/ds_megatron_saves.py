"""Megatron-Core models that DeepSpeed's engine and pipeline save: as they begin, and trained. Runs inside a rank."""

import os
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from support import exported
from support.ds_megatron_runs import BATCH, SEED, SHAPES, Case, engine_config, entry_of, model_of, plan_of, tuned

from mup_megatron.training import ranks

BEGUN, TRAINED = "begun", "trained"


def folder_of(root: Path, case: Case) -> Path:
    return root / str(case).replace(" ", ",")


def saved(cases: Sequence[Case], root: Path) -> list[dict[str, Any]]:
    """Saves each model before the first step and after three, in `folder_of` it; returns what is live then.

    By the plan's names, this rank's part of the weights; and, of a model that no pipeline divides, `logits`.
    """
    os.environ["DS_ACCELERATOR"] = "cpu"
    found = []
    for case in cases:
        with ranks.joined(tensor=case.tp, pipeline=1, virtual_stages=None, seed=SEED):
            found.append(_saved(case, root))
    return found


def _saved(case: Case, root: Path) -> dict[str, Any]:
    import deepspeed

    import mup_megatron.deepspeed  # noqa: F401
    from mup_megatron.deepspeed import megatron

    deepspeed.utils.logger.setLevel("ERROR")
    deepspeed.init_distributed("gloo", verbose=False)
    recipe, plan, (_, target) = tuned(case.shape), plan_of(case.shape), SHAPES[case.shape]
    model = model_of(case, target, plan, recipe)
    if case.tp == 1:
        drawn = exported.drawn(target, plan).weights
        with torch.no_grad():
            for name, parameter in megatron.named_parameters(model, plan):
                parameter.copy_(drawn.read(name))
    engine, *_ = deepspeed.initialize(
        model=model,
        mpu=None if case.stages else megatron.mpu(),
        config=engine_config(case, recipe) | (entry_of(recipe, root / "entry") if case.entry else {}),
    )
    folder = folder_of(root, case)
    engine.save_checkpoint(str(folder / BEGUN))
    for step in range(3):
        _step(engine, case, _batches(case, step))
    engine.save_checkpoint(str(folder / TRAINED))
    if case.zero == 3:
        weights = {}
    else:
        weights = {name: each.detach().clone() for name, each in megatron.named_parameters(engine, plan)}
    if case.stages or case.tp > 1:
        return weights
    given = exported.tokens(target)
    positions = torch.arange(given.shape[1]).expand_as(given)
    engine.eval()
    with torch.no_grad():
        weights["logits"] = engine(given, positions, None).float()[..., : target.vocab_size].clone()
    return weights


def _batches(case: Case, step: int) -> list[torch.Tensor]:
    """Every data-parallel rank has the same samples, so that any number of them learns the same."""
    _, target = SHAPES[case.shape]
    generator = torch.Generator().manual_seed(step)
    shape = (2, BATCH // case.dp // 2, target.seq_length + 1)
    return [*torch.randint(target.vocab_size, shape, generator=generator)]


def _step(engine: Any, case: Case, batches: Sequence[torch.Tensor]) -> None:
    positions = torch.arange(batches[0].shape[1] - 1).expand(len(batches[0]), -1)
    if case.stages:

        def micro_batches() -> Iterator[Any]:
            for batch in batches:
                labels = batch[:, 1:].contiguous()
                yield (batch[:, :-1].contiguous(), positions), (labels, torch.ones_like(labels, dtype=torch.float32))

        engine.train_batch(micro_batches())
        return
    for batch in batches:
        losses = engine(batch[:, :-1].contiguous(), positions, None, labels=batch[:, 1:].contiguous())
        engine.backward(losses.float().mean())
        engine.step()


def converted(folders: Sequence[Path]) -> None:
    """Makes universal checkpoints, in a rank: DeepSpeed unpickles there."""
    from deepspeed.checkpoint.ds_to_universal import main

    for folder in folders:
        settings = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False, "strict": True}
        to = f"{folder}_universal"
        main(Namespace(input_folder=str(folder), output_folder=to, inject_missing_state=True, **settings))
