"""Reading text files, and writing files so that nothing is ever half written or lost."""

import os
import stat
import tempfile
from pathlib import Path

from mup_megatron.errors import InputError
from mup_megatron.validation import shortened

LARGEST = 16 * 2**20
"""Bytes of a text file: no configuration, recipe or script is as large, and one that is would take minutes to read."""


def read_text(path: Path, *, remedy: str | None = None) -> str:
    """Returns the text of a file.

    Args:
        path: the file.
        remedy: of a file that the package wrote itself, of any size: what to do about damage, as a sentence. None for
            what people write.

    Raises:
        InputError: the file is missing, unreadable, not UTF-8, too large, or a pipe or device.
    """
    try:
        require_ordinary(path)
        if remedy is None and path.stat().st_size > LARGEST:
            raise InputError(f"{_name(path)}: larger than {LARGEST >> 20} MiB. Check the path.")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        wrong, usual = "no such file", "Check the path."
    except UnicodeDecodeError as error:
        wrong, usual = f"not UTF-8 text (byte {error.start})", "Save it as UTF-8."
    except OSError as error:
        wrong, usual = f"cannot be read ({error.strerror})", "Check the path and its permissions."
    except InputError:
        raise
    except ValueError:
        raise InputError(f"{shortened(repr(str(path)), 120)}: not the name of a file. Check the path.") from None
    raise InputError(f"{_name(path)}: {wrong}. {remedy or usual}")


def require_ordinary(path: Path) -> None:
    """Raises InputError for a pipe, a socket or a device: reading these may wait for ever, or never end.

    A folder passes: whoever opens it is told so.

    Raises:
        OSError: there is no such file, or its folder may not be looked into.
    """
    mode = path.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise InputError(f"{_name(path)}: no ordinary file, but a pipe or a device. Save its content in a file.")


def _name(path: Path) -> str:
    return shortened(str(path), 180)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a file whole or not at all: what was there before stays until the new content is safe on disk.

    Raises:
        InputError: the folder cannot be written or the disk is full; the old file is untouched.
    """
    data = content.encode() if isinstance(content, str) else content
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        temporary = Path(name)
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
        sync(path.parent)  # the rename itself has to survive a power cut
    except OSError as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise InputError(
            f"{path}: cannot be written ({error.strerror}); what was there before is unchanged. "
            "Free some space or choose another place."
        ) from None


def sync(path: Path) -> None:
    """Brings a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
