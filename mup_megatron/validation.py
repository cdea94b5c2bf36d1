"""Plain values from a file → checked, immutable objects; what is wrong is said in words for people.

Not the place for formats: what a model file or a recipe contains is in `architectures/model_file.py` and `recipe.py`.
"""

import difflib
import json
import reprlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, Tag, ValidationError
from pydantic.fields import FieldInfo

from mup_megatron.errors import InputError

ModelT = TypeVar("ModelT", bound=BaseModel)

LONGEST = 300
"""Characters of what is said of one thing that is wrong."""
_MOST = 3
"""Things that are wrong of which is told at a time."""
_DEEPEST = 64
_LARGEST = 200_000
"""Levels and values of a file's content, with what YAML's aliases stand for."""
_BITS = 1023
"""Of a whole number that is still a float."""


def brief(value: object, length: int = 120) -> str:
    """Returns a text, value or error as part of a sentence: one line, no full stop, and no longer than `length`."""
    text = str(value) if isinstance(value, str | BaseException) else reprlib.repr(value)
    return shortened(" ".join(text.split()).rstrip("."), length)


def quoted(value: object) -> str:
    """Returns a value as Python writes it, a text in quotes; of what is long or nested, the beginning."""
    return shortened(reprlib.repr(value), 120)


def shortened(text: str, length: int = LONGEST) -> str:
    """Returns a text that is no longer than `length`."""
    return text if len(text) <= length else f"{text[: length - 1]}…"


def listed(items: Sequence[str], most: int, *, separator: str = ", ") -> str:
    """Returns the first `most` items as one text, with the number of those that are left out."""
    left = len(items) - most
    more = f"{'' if separator == ', ' else separator.rstrip()} and {left} more" if left > 0 else ""
    return separator.join(items[:most]) + more


def require_plain(content: object, *, source: str) -> None:
    """Raises InputError unless a file's content is what every reader can do with: text, ordinary numbers, lists, keys.

    Not so are dates, sets and bytes of YAML's, whole numbers beyond every float, half characters, and content that
    holds itself or that aliases make endless.
    """
    levels: list[Iterator[tuple[object, object]]] = [iter([("", content)])]
    keys: list[object] = [""]
    """Of each level, where it stands."""
    count = 0
    while levels:
        key, value = next(levels[-1], (None, _END))
        if value is _END:
            levels.pop()
            keys.pop()
            continue
        keys[-1] = key
        count += 1
        if count > _LARGEST or len(levels) > _DEEPEST:
            raise InputError(f"{source}: nested too deeply, or too large once its aliases are resolved. Simplify it.")
        if (what := _not_plain(key) or _not_plain(value)) is not None:
            where = brief(".".join(brief(str(each), 40) for each in keys[1:]), 100)
            raise InputError(f"{source}: {f'{where}: ' if where else ''}{what}. Correct this value.")
        if isinstance(value, Mapping):
            levels.append(iter(value.items()))
            keys.append("")
        elif isinstance(value, list):
            levels.append(iter(enumerate(value)))
            keys.append("")


_END = object()


def _not_plain(value: object) -> str | None:
    """Returns why nobody can use a value, if so."""
    match value:
        case None | bool() | float() | Mapping() | list():
            return None
        case int():
            return None if value.bit_length() <= _BITS else "a whole number with hundreds of digits"
        case str():
            return None if is_text(value) else "text with half a character in it (a lone surrogate)"
        case _:
            return f"a value of type {type(value).__name__}, neither text nor number; quotes make text of it"


def is_text(content: object) -> bool:
    """Says if all strings of JSON values can be written: JSON and YAML can spell half of a surrogate pair."""
    try:
        json.dumps(content, ensure_ascii=False).encode()
    except (UnicodeEncodeError, RecursionError):
        return False
    return True


class Strict(BaseModel):
    """Base of every file's content: immutable, unknown keys refused, no silent conversions, only finite numbers.

    Where a field takes one of several models, their pydantic tags are written in parentheses.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def added(since: str, default: Any) -> Any:
    """Returns a field that release `since` adds to a file's format. Its default is what was so before, for ever."""
    return Field(default, json_schema_extra={"since": since})


def plain(content: BaseModel, *, exclude: Collection[str] = ()) -> dict[str, Any]:
    """Returns a content as JSON values, defaults included, but for those of keys that were `added` later.

    So it is the same in every release: what is hashed, compared with what another release wrote, or kept for ever.
    """
    return content.model_dump(mode="json", exclude={**_added_defaults(content), **dict.fromkeys(exclude, True)})


def _added_defaults(value: object) -> dict[Any, Any]:
    """Returns what `model_dump` has to leave out at any depth, as it wants to be told."""
    match value:
        case BaseModel():
            inside: Iterable[tuple[Any, object]] = ((key, getattr(value, key)) for key in type(value).model_fields)
            own = {key for key, field in type(value).model_fields.items() if _is_added_default(field, value, key)}
        case Mapping():
            inside, own = value.items(), set()
        case list() | tuple():
            inside, own = enumerate(value), set()
        case _:
            return {}
    deeper = {key: found for key, each in inside if (found := _added_defaults(each))}
    return {**deeper, **dict.fromkeys(own, True)}


def _is_added_default(field: FieldInfo, value: BaseModel, key: str) -> bool:
    extra = field.json_schema_extra
    later = isinstance(extra, dict) and "since" in extra
    return later and getattr(value, key) == field.default


def validated(model: type[ModelT], content: object, *, source: str) -> ModelT:
    """Returns `content` as a `model`; raises an InputError that names file, key and remedy for all that is wrong."""
    if content is None:
        content = {}
    if not isinstance(content, Mapping):
        found = type(content).__name__
        raise InputError(f"{source}: expected keys and values, found {found}. Write `key: value` lines.")
    try:
        return model.model_validate(content)
    except ValidationError as error:
        # What is missing last: an unknown key beside it says more.
        wrong = sorted(error.errors(include_url=False), key=lambda item: item["type"] == "missing")
        problems = [f"{source}: {_problem(model, content, dict(item))}" for item in wrong[:_MOST]]
        if len(wrong) > _MOST:
            problems.append(f"{source}: {len(wrong) - _MOST} more like these.")
        raise InputError("\n".join(shortened(problem) for problem in problems)) from None


def _problem(model: type[BaseModel], content: object, error: dict[str, Any]) -> str:
    location = [brief(str(part), 60) for part in error["loc"] if not _is_tag(part)]
    key = brief(".".join(location), 120)
    found = error.get("input")
    prefix = f"{key}: " if key else ""
    match error["type"]:
        case "extra_forbidden":
            known = _known_keys(model, error["loc"][:-1])
            near = difflib.get_close_matches(location[-1], known, n=1)
            remedy = f"Did you mean '{near[0]}'?" if near else f"Known keys: {brief(', '.join(known), 150)}."
            return f"{prefix}unknown key. {remedy}"
        case "missing":
            return f"{prefix}missing. Add this key."
        case "finite_number":
            return f"{prefix}must be a finite number, found {quoted(found)}. Write an ordinary number."
        case "value_error":
            return f"{prefix}{error['ctx']['error']}"
        case _:
            message = error["msg"].replace("Input should", "should")
            return f"{prefix}{message}, found {quoted(found)}. Correct this value."


def _is_tag(part: int | str) -> bool:
    """Returns whether a part of a location is no key, but says which of several models the content was taken for."""
    return isinstance(part, str) and part.startswith("(") and part.endswith(")")


def _tag(annotation: Any) -> str | None:
    return next((item.tag for item in getattr(annotation, "__metadata__", ()) if isinstance(item, Tag)), None)


def _known_keys(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """Returns the keys that are allowed at a place inside a file, those first that have to be there."""
    here: Any = model
    for part in location:
        if isinstance(part, int) or _is_tag(part) or not (isinstance(here, type) and issubclass(here, BaseModel)):
            continue
        annotation: Any = here.model_fields[part].annotation if part in here.model_fields else None
        inner = [a for a in getattr(annotation, "__args__", ()) if isinstance(a, type) and issubclass(a, BaseModel)]
        tagged = [a.__origin__ for a in getattr(annotation, "__args__", ()) if _tag(a) in location]
        here = (tagged or inner or [annotation])[0]
    if not (isinstance(here, type) and issubclass(here, BaseModel)):
        return []
    return sorted(here.model_fields, key=lambda key: not here.model_fields[key].is_required())
