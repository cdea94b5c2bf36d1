"""The states of trials that were stopped: a folder for each, beside the study's results."""

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class States:
    """The states of a study's trials."""

    folder: Path | None
    """None: none is kept."""

    def of(self, number: int) -> Path:
        """Returns the folder of a trial, which need not exist."""
        assert self.folder is not None
        return self.folder / f"trial-{number:05d}"

    def forget(self, numbers: Iterable[int]) -> None:
        """Removes the states of these trials, as far as there are any."""
        if self.folder is None or not self.folder.is_dir():
            return
        for number in numbers:
            shutil.rmtree(self.of(number), ignore_errors=True)
