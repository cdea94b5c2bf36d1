"""JSON that this package wrote, read back: of checkpoints, runs and data. Not for what people write: see `json_io.py`.

What is wrong with it is damage and no slip of the pen, so each caller says what to do about it.
"""

import json
from pathlib import Path

from mup_megatron.errors import InputError
from mup_megatron.files import read_text
from mup_megatron.validation import brief, is_text

_REMEDY = "Correct the file."


def read_json(path: Path, *, remedy: str = _REMEDY) -> object:
    """Returns the content of a JSON file as plain Python values.

    Args:
        path: the file.
        remedy: what to do about it, as a sentence.

    Raises:
        InputError: the file is missing, unreadable, not UTF-8 or not JSON, or nested too deep.
    """
    content = _parsed(read_text(path, remedy=remedy), f"{path}: truncated or not JSON", remedy)
    if not is_text(content):
        raise InputError(f"{path}: holds half a surrogate pair, which is no character. {remedy}")
    return content


def parse_json(text: str, *, source: str, remedy: str = _REMEDY) -> object:
    """Returns the content of JSON text; `source` names it in messages.

    Raises:
        InputError: it is not JSON, or nested too deep.
    """
    return _parsed(text, f"{source} is not JSON", remedy)


def _parsed(text: str, what: str, remedy: str) -> object:
    try:
        content: object = json.loads(text)
    except RecursionError:
        raise InputError(f"{what} (nested too deep). {remedy}") from None
    except ValueError as error:
        raise InputError(f"{what} ({brief(error)}). {remedy}") from None
    return content
