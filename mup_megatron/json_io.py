"""JSON in, safely: whatever is wrong with a file is said in one sentence. Not validation: see `validation.py`."""

import json
from pathlib import Path

from mup_megatron.errors import InputError, shortened

_REMEDY = "Correct the file."


def read_json(path: Path, *, remedy: str = _REMEDY) -> object:
    """The content of a JSON file as plain Python values.

    Args:
        path: the file.
        remedy: what to do about it, as a sentence.

    Raises:
        InputError: the file is missing, unreadable, not UTF-8 or not JSON, or nested too deep.
    """
    return parse_json(read_text(path, remedy=remedy), source=str(path), remedy=remedy)


def parse_json(text: str, *, source: str, remedy: str = _REMEDY) -> object:
    """The content of JSON text; `source` names it in messages.

    Raises:
        InputError: it is not JSON, or nested too deep.
    """
    try:
        content: object = json.loads(text)
    except RecursionError:
        raise InputError(f"{source}: not JSON that can be read: nested too deep. {remedy}") from None
    except ValueError as error:
        raise InputError(f"{source}: truncated or not JSON ({shortened(error)}). {remedy}") from None
    return content


def read_text(path: Path, *, remedy: str = _REMEDY) -> str:
    """The content of a text file.

    Raises:
        InputError: the file is missing, unreadable or not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file. {remedy}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start}). {remedy}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}). {remedy}") from None
