"""YAML 1.2 in and out, safely. Not validation: see `validation.py`."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import ScalarNode
from ruamel.yaml.representer import SafeRepresenter

from mup_megatron.errors import InputError


def _yaml() -> YAML:
    # The pure parser is the one that follows YAML 1.2, where 1e-8 is a number and `no` is a word; "safe" builds
    # nothing but plain values, so a file cannot run code.
    return YAML(typ="safe", pure=True)


def read_yaml(path: Path) -> object:
    """The content of a YAML file as plain Python values.

    Raises:
        InputError: the file is missing, unreadable, not UTF-8, not YAML, repeats a key or asks for a Python object.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file. Check the path.") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start}). Save it as UTF-8.") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}). Check the path and its permissions.") from None
    return parse_yaml(text, source=str(path))


def parse_yaml(text: str, *, source: str) -> object:
    """The content of YAML text; `source` names it in messages.

    Raises:
        InputError: as `read_yaml`.
    """
    try:
        return _yaml().load(text)
    except DuplicateKeyError as error:
        raise InputError(f"{source}: {_where(error)}a key is given twice. Remove one of the two.") from None
    except YAMLError as error:
        what = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise InputError(f"{source}: {_where(error)}not valid YAML: {what}. Correct the file.") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{source}: not valid YAML: {error}. Correct the file.") from None


def _where(error: YAMLError) -> str:
    mark = error.problem_mark if isinstance(error, MarkedYAMLError) else None
    return f"line {mark.line + 1}: " if mark is not None else ""


class _Representer(SafeRepresenter):
    """Floats that every YAML version and JSON take for numbers."""

    def represent_float(self, number: float) -> ScalarNode:
        # "1.0e-08" is a number for YAML 1.2, YAML 1.1 and JSON alike; a YAML 1.1 reader takes "1e-08" for a word.
        mantissa, e, exponent = repr(number).partition("e")
        text = f"{mantissa if '.' in mantissa else mantissa + '.0'}e{exponent}" if e else repr(number)
        return self.represent_scalar("tag:yaml.org,2002:float", text)


_Representer.add_representer(float, _Representer.represent_float)


def dump_yaml(content: Mapping[str, Any]) -> str:
    """Plain values as YAML text: block style, keys in the order given, long lines not wrapped."""
    yaml = _yaml()
    yaml.Representer = _Representer
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.width = 4096
    stream = io.StringIO()
    yaml.dump(content, stream)
    return stream.getvalue()
