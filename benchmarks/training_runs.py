"""What benchmarks that train many models share: processes, finished runs on disk, and a sweep of learning rates."""

import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from mup_megatron.training.train import TrainingResult


def start_worker(log: Path) -> None:
    """Imports once for many runs; what Megatron has to say goes to a file."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    from mup_megatron.training import ranks

    ranks.preload()
    import torch

    torch.set_num_threads(1)


Loss = TypeVar("Loss")


class KeptLosses:
    """The final losses of runs, in a file of JSON lines: what has been trained is not trained again."""

    def __init__(self, file: Path) -> None:
        self._file = file
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        self._known = {_as_text(row["key"]): row["loss"] for row in map(json.loads, lines)}

    def loss(self, key: Sequence[Any], train: "Callable[[], TrainingResult]", **told: object) -> float:
        """Returns the mean training loss of a run's last tenth; infinite if it diverges.

        Args:
            key: what the run follows from.
            train: trains, if the file does not have the run.
            told: what else its line says.
        """
        known = _as_text(key)
        if known not in self._known:
            result = train()
            loss = result.train_loss if result.status == "complete" and math.isfinite(result.train_loss) else None
            with self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**told, "loss": loss, "seconds": round(result.seconds, 1), "key": key}) + "\n")
            self._known[known] = loss
        found = self._known[known]
        return math.inf if found is None else float(found)


def bracketed(
    train: Callable[[float], Loss], rates: Sequence[float], *, most: int, mean: Callable[[Loss], float]
) -> dict[float, Loss]:
    """Returns learning rate → loss, at as many rates as it takes for the best to have one on either side.

    Args:
        train: a learning rate → its loss, or those of its seeds.
        rates: that are tried first; further ones follow by factors of 2.
        most: no further rate follows once there are so many.
        mean: what two rates are compared by.
    """
    losses: dict[float, Loss] = {}
    todo = list(rates)
    while todo and len(losses) < most:
        losses |= {lr: train(lr) for lr in todo}
        best = min(losses, key=lambda lr: mean(losses[lr]))
        todo = [lr for lr in (best / 2, best * 2) if lr not in losses]
    return losses


def _as_text(key: Sequence[Any]) -> str:
    return json.dumps(key, sort_keys=True)
