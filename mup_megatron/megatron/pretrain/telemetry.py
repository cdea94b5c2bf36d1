"""The values that a run logs to TensorBoard and Weights & Biases, through the writers that Megatron has opened.

The recipe is in wandb's configuration and TensorBoard's arguments already: it is among Megatron's own arguments.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mup_megatron.collectives import gathered
from mup_megatron.megatron.names import unwrapped
from mup_megatron.megatron.optimizer import parts_of
from mup_megatron.megatron.schedule import lr_per_role
from mup_megatron.theory import Plan


def log_lr_per_role(plan: Plan, optimizer: Any, iteration: int) -> None:
    """Logs the plan's learning rate of each role, as far from its peak as the optimizer's first group is from its own.

    Does so on the ranks that have writers. It shows a schedule, and not that another group has left it.
    """
    if not _writers():
        return
    group = parts_of(optimizer)[0].param_groups[0]
    base = group["lr"] * (plan.lr / group["max_lr"])
    _write({f"mup/lr/{role}": lr for role, lr in lr_per_role(plan, base).items()}, iteration)


def _writers() -> list[Any]:
    from megatron.training.global_vars import get_tensorboard_writer, get_wandb_writer

    return [writer for writer in (get_tensorboard_writer(), get_wandb_writer()) if writer is not None]


def _write(values: Mapping[str, float], iteration: int) -> None:
    for writer in _writers():
        if hasattr(writer, "add_scalar"):
            for name, value in values.items():
                writer.add_scalar(name, value, iteration)
        else:
            writer.log(dict(values), iteration)


class Coordinates:
    """Root mean square of what each part of the model puts out, over an iteration's micro-batches and all ranks.

    A size that grows with width between two runs, or a layer whose size runs away, shows here before the loss does.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module], plan: Plan) -> None:
        """Listens to a rank's part of the plan's model; costs nothing until `measure`."""
        self.measuring = False
        """Whether the current iteration is one that counts."""
        self._squares: dict[str, list[torch.Tensor]] = {}
        for chunk in chunks:
            model: Any = unwrapped(chunk)
            for part in ("embedding", "output_layer"):
                if (module := getattr(model, part, None)) is not None:
                    self._listen(module, part)
            for layer in model.decoder.layers:
                self._listen(layer, f"layer_{layer.layer_number - 1:03d}")
            name = plan[plan.readout_norm[0]].module.rpartition(".")[2]
            if getattr(model.decoder, name, None) is not None:
                self._listen(getattr(model.decoder, name), name)

    def measure(self, on: bool) -> None:
        """Decides whether the coming iteration is one that counts."""
        self.measuring = on
        self._squares.clear()

    def log(self, iteration: int) -> None:
        """Puts together what all ranks have seen since `measure`, and writes it. Collective."""
        own = {name: float(torch.stack(seen).mean()) for name, seen in self._squares.items()}
        # Each rank of a part sees equally much of it: its share of the batch, the sequence or the vocabulary.
        seen: dict[str, list[float]] = {}
        for of_rank in gathered(own):
            for name, square in of_rank.items():
                seen.setdefault(name, []).append(square)
        _write({f"mup/rms/{name}": math.sqrt(sum(s) / len(s)) for name, s in sorted(seen.items())}, iteration)
        self.measure(False)

    def _listen(self, module: torch.nn.Module, name: str) -> None:
        def seen(_module: torch.nn.Module, _args: Any, output: Any) -> None:
            if self.measuring and torch.is_grad_enabled():
                tensor = output[0] if isinstance(output, tuple) else output
                self._squares.setdefault(name, []).append(tensor.detach().float().square().mean())

        module.register_forward_hook(seen)
