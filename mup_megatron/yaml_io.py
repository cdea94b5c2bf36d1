"""YAML 1.2 in and out, safely. Not validation: see `validation.py`."""

import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.constructor import ConstructorError, DuplicateKeyError, SafeConstructor
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, ScalarNode
from ruamel.yaml.representer import SafeRepresenter

from mup_megatron.errors import InputError
from mup_megatron.files import read_text
from mup_megatron.validation import brief, require_plain

_DIGITS = 400


class _Constructor(SafeConstructor):
    """Plain values; without merge keys, which YAML 1.2 does not have and which can stand for any number of keys."""

    def flatten_mapping(self, node: MappingNode) -> None:
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                raise ConstructorError(problem="merge keys (<<) are not of YAML 1.2", problem_mark=key.start_mark)

    def construct_yaml_int(self, node: ScalarNode) -> int:
        # Python reads no more than some thousand digits. Of one beyond every float it is enough to know that.
        return 1 << 4 * _DIGITS if len(node.value) > _DIGITS else super().construct_yaml_int(node)


_Constructor.add_constructor("tag:yaml.org,2002:int", _Constructor.construct_yaml_int)


def _yaml() -> YAML:
    # The pure parser is the one that follows YAML 1.2, where 1e-8 is a number and `no` is a word; "safe" builds
    # nothing but plain values, so a file cannot run code.
    yaml = YAML(typ="safe", pure=True)
    yaml.Constructor = _Constructor
    return yaml


def read_yaml(path: Path) -> object:
    """Returns the content of a YAML file as plain Python values.

    Raises:
        InputError: the file is missing, unreadable, not UTF-8, not YAML, repeats a key, asks for a Python object,
            or holds something else than plain values.
    """
    return parse_yaml(read_text(path), source=str(path))


def parse_yaml(text: str, *, source: str) -> object:
    """Returns the content of YAML text; `source` names it in messages.

    Raises:
        InputError: as `read_yaml`.
    """
    try:
        content = _yaml().load(text)
    except DuplicateKeyError as error:
        found = re.match(r'found duplicate key "(.*?)" with value', error.problem or "", re.DOTALL)
        key = f"{brief(found[1], 60)}: this key is" if found else "a key is"
        raise InputError(f"{source}: {_where(error)}{key} given twice. Remove one of the two.") from None
    except YAMLError as error:
        what = brief(getattr(error, "problem", None) or str(error).partition("\n")[0])
        raise InputError(f"{source}: {_where(error)}not valid YAML: {what}. Correct the file.") from None
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        # What its constructors make of values that are no dates, numbers or sets after all.
        raise InputError(f"{source}: not valid YAML: {brief(error)}. Correct the file.") from None
    require_plain(content, source=source)
    return content


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
    """Returns plain values as YAML text: block style, keys in the order given, long lines not wrapped."""
    yaml = _yaml()
    yaml.Representer = _Representer
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.width = 4096
    stream = io.StringIO()
    yaml.dump(content, stream)
    return stream.getvalue()
