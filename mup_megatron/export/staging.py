"""A folder that is whole or not there: it is written under another name, and renamed at the end."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mup_megatron.errors import InputError
from mup_megatron.files import sync


def require_free(to: Path, checkpoint: Path | None) -> None:
    """Raises InputError unless a new folder can be made of `to`, outside of the checkpoint's."""
    try:
        there = os.path.lexists(to) and not (to.is_dir() and not any(to.iterdir()))
        inside = checkpoint is not None and to.resolve().is_relative_to(checkpoint.resolve())
    except OSError as error:
        raise InputError(f"--to {to}: not a usable place ({error.strerror}). Choose another.") from None
    if there:
        raise InputError(f"--to {to}: exists already. Choose another folder, or remove it.")
    if inside:
        raise InputError(f"--to {to}: within the checkpoint {checkpoint}, which is left as it is. Choose another.")


@contextmanager
def staged(to: Path, *, unchanged: str) -> Iterator[Path]:
    """A folder that becomes `to` at the end, and is gone if there is none.

    Args:
        to: what it becomes.
        unchanged: the checkpoint that is read, for the message of a disk that is full.
    """
    folder: Path | None = None
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{to.name}.", dir=to.parent))
        yield folder
        umask = os.umask(0)
        os.umask(umask)
        folder.chmod(0o777 & ~umask)
        for each in (folder, to.parent):
            sync(each)
        folder.rename(to)
        folder = None
        sync(to.parent)
    except OSError as error:
        raise InputError(
            f"--to {to}: cannot be written ({error.strerror or error}); {unchanged} is unchanged. Free some space or "
            "choose another place."
        ) from None
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
