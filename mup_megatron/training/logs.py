"""The logs of a run: a progress bar on a terminal, lines elsewhere, Weights & Biases when asked.

Only the first rank has any of these. What is kept is `record.py`'s matter.
"""

import importlib.util
import os
import secrets
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from mup_megatron.errors import InputError
from mup_megatron.files import read_text, write_atomically
from mup_megatron.training.metrics import TrainingRow, ValidationRow
from mup_megatron.training.options import TrainingOptions


class Log(Protocol):
    """A log is told what happens in a run."""

    def iteration(self, row: TrainingRow, lr_per_role: Mapping[str, float]) -> None:
        """A logged iteration is over. `lr_per_role` is what each role's parameters were updated with."""

    def validation(self, row: ValidationRow) -> None:
        """A validation is over."""

    def say(self, text: str) -> None:
        """Something worth knowing happened."""

    def close(self, *, failed: bool) -> None:
        """Nothing follows."""


class Lines:
    """Lines on standard error."""

    def __init__(self, train_iters: int) -> None:
        """A run of so many iterations."""
        self._train_iters = train_iters
        self._last: tuple[int, float] | None = None

    def iteration(self, row: TrainingRow, lr_per_role: Mapping[str, float]) -> None:
        """One line, with the time that an iteration took since the last one."""
        now = time.perf_counter()
        pace = ""
        if self._last is not None and row.iteration > self._last[0]:
            pace = f" | {(now - self._last[1]) / (row.iteration - self._last[0]):.3g} s/iteration"
        self._last = (row.iteration, now)
        self.say(f"iteration {row.iteration}/{self._train_iters} | {_values(row)}{pace}")

    def validation(self, row: ValidationRow) -> None:
        """One line."""
        self.say(f"iteration {row.iteration}/{self._train_iters} | validation loss {row.loss:.4f}")

    def say(self, text: str) -> None:
        """One line."""
        print(text, file=sys.stderr, flush=True)

    def close(self, *, failed: bool) -> None:
        """Leaves what was printed."""


class Bar:
    """A progress bar on a terminal's standard error."""

    def __init__(self, train_iters: int, done: int) -> None:
        """A run of so many iterations, some of them done before."""
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, TextColumn("{task.description}"), console=Console(stderr=True))
        self._task = self._progress.add_task("", total=train_iters, completed=done)
        self._progress.start()

    def iteration(self, row: TrainingRow, lr_per_role: Mapping[str, float]) -> None:
        """Moves the bar."""
        self._progress.update(self._task, completed=row.iteration, description=_values(row))

    def validation(self, row: ValidationRow) -> None:
        """A line above the bar."""
        self.say(f"iteration {row.iteration} | validation loss {row.loss:.4f}")

    def say(self, text: str) -> None:
        """A line above the bar."""
        self._progress.console.print(text, highlight=False, markup=False)

    def close(self, *, failed: bool) -> None:
        """Leaves the bar where it is."""
        self._progress.stop()


def _values(row: TrainingRow) -> str:
    return f"loss {row.loss:.4f} | lr {row.lr:.3e} | grad norm {row.grad_norm:.3f}"


def require_wandb() -> None:
    """Raises InputError if wandb is not installed."""
    found = importlib.util.find_spec("wandb")
    if found is None or found.origin is None:  # a folder of its files is no package
        raise InputError("--wandb-project: wandb is not installed. Install it: pip install 'mup-megatron[wandb]'")


class WandB:
    """A run in Weights & Biases. A run that is gone on with goes on there too."""

    def __init__(self, options: TrainingOptions, folder: Path, config: Mapping[str, Any]) -> None:
        """Begins, or goes on.

        Args:
            options: project and name.
            folder: the run's output, where wandb keeps its files and its name for this run is noted.
            config: what identifies the run: recipe, fingerprint, model, options.

        Raises:
            InputError: wandb is not installed or refuses.
        """
        require_wandb()
        import wandb

        name = folder / "wandb_run_id"
        known = read_text(name, remedy="Remove it: the run gets a new name.").strip() if name.exists() else None
        offline = os.environ.get("WANDB_MODE") == "offline"  # where wandb cannot go on, and says so at length
        try:
            self._run: Any = wandb.init(
                project=options.wandb_project,
                name=options.wandb_exp_name,
                group=options.wandb_group,
                dir=folder,
                id=known or secrets.token_hex(4),
                resume=None if offline else "allow",
                config=dict(config),
            )
        except (wandb.Error, OSError) as error:
            raise InputError(
                f"--wandb-project {options.wandb_project}: Weights & Biases refuses: {error}. "
                "Log in with `wandb login`, or set WANDB_MODE=offline."
            ) from None
        write_atomically(name, self._run.id + "\n")

    def iteration(self, row: TrainingRow, lr_per_role: Mapping[str, float]) -> None:
        """Loss, the base's LR, gradient norm, and each role's LR as `lr/ROLE`."""
        values = {"loss": row.loss, "lr": row.lr, "grad_norm": row.grad_norm}
        self._run.log({**values, **{f"lr/{role}": lr for role, lr in lr_per_role.items()}}, step=row.iteration)

    def validation(self, row: ValidationRow) -> None:
        """The loss."""
        self._run.log({"validation_loss": row.loss}, step=row.iteration)

    def say(self, text: str) -> None:
        """Nothing: wandb keeps what is printed."""

    def close(self, *, failed: bool) -> None:
        """Waits until all is written."""
        self._run.finish(exit_code=int(failed))
