"""The folders of DeepSpeed's checkpoints. It knows names alone, and imports neither DeepSpeed nor torch."""

from pathlib import Path

from mup_megatron.errors import InputError
from mup_megatron.files import read_text
from mup_megatron.validation import brief

MODEL_STATES = "*model_states.pt"
_LATEST = ("latest", "latest_universal")


def is_at(path: Path) -> bool:
    """Returns whether checkpoints of DeepSpeed's engine may be at a path."""
    return any((path / name).is_file() for name in _LATEST) or any(path.glob(MODEL_STATES))


def chosen(path: Path) -> Path:
    """Returns the folder of the checkpoint that is meant: the last one of those at a path, or itself.

    Raises:
        InputError: the last one is not there.
    """
    for name in _LATEST:
        latest = path / name
        if latest.is_file():
            tag = read_text(latest, remedy="Write a checkpoint's tag into it.").strip()
            if Path(tag).name != tag or not (path / tag).is_dir():
                raise InputError(
                    f"{latest}: says {brief(tag, 60)}, and there is no such checkpoint beside it. Give another one."
                )
            return path / tag
    return path
