"""JSON in, as strictly as YAML, and values as JSON has them. Not validation: see `validation.py`."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mup_megatron.errors import InputError
from mup_megatron.files import read_text
from mup_megatron.validation import brief, require_plain

_DIGITS = 400


def read_json(path: Path) -> object:
    """Returns the content of a JSON file as plain Python values. NaN and Infinity, which Python writes, are numbers.

    Raises:
        InputError: the file is missing, unreadable, not UTF-8, not JSON, or repeats a key.
    """
    text = read_text(path).removeprefix("\ufeff")  # as YAML's, whose reader passes over it
    try:
        content = json.loads(text, object_pairs_hook=_each_key_once, parse_int=_whole_number)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except (RecursionError, ValueError) as error:
        raise InputError(f"{path}: not JSON ({brief(error)}). Correct the file.") from None
    require_plain(content, source=str(path))
    return content


def finite(value: Any) -> Any:
    """Returns a JSON value with NaN and infinities, which JSON does not have, as text."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _whole_number(digits: str) -> int:
    # Python reads no more than some thousand digits; of fewer it is known as well that no float is as large, and then
    # the key is named.
    return int(digits[:_DIGITS])


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in found if keys.count(key) > 1)
        raise InputError(f"{brief(twice)}: this key is given twice. Remove one of the two.")
    return found
