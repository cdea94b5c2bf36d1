"""Plain values from a file → checked, immutable objects; what is wrong is said in words for people.

Not the place for formats: what a model file or a recipe contains is in `models/model_file.py` and `recipe.py`.
"""

import difflib
import reprlib
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Tag, ValidationError

from mup_megatron.errors import InputError

ModelT = TypeVar("ModelT", bound=BaseModel)


class Strict(BaseModel):
    """Base of every file's content: immutable, unknown keys refused, no silent conversions, only finite numbers.

    Where a field takes one of several models, their pydantic tags are written in parentheses.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def validated(model: type[ModelT], content: object, *, source: str) -> ModelT:
    """`content` as a `model`, or an InputError that names file, key and remedy for everything that is wrong."""
    if content is None:
        content = {}
    if not isinstance(content, Mapping):
        found = type(content).__name__
        raise InputError(f"{source}: expected keys and values, found {found}. Write `key: value` lines.")
    try:
        return model.model_validate(content)
    except ValidationError as error:
        problems = [_problem(model, content, dict(item)) for item in error.errors(include_url=False)]
        raise InputError("\n".join(f"{source}: {problem}" for problem in problems)) from None


def _problem(model: type[BaseModel], content: object, error: dict[str, Any]) -> str:
    location = [str(part) for part in error["loc"] if not _is_tag(part)]
    key = ".".join(location)
    found = error.get("input")
    prefix = f"{key}: " if key else ""
    match error["type"]:
        case "extra_forbidden":
            known = _known_keys(model, error["loc"][:-1])
            near = difflib.get_close_matches(location[-1], known, n=1)
            remedy = f"Did you mean '{near[0]}'?" if near else f"Known keys: {', '.join(known)}."
            return f"{prefix}unknown key. {remedy}"
        case "missing":
            return f"{prefix}missing. Add this key."
        case "finite_number":
            return f"{prefix}must be a finite number, found {reprlib.repr(found)}. Write an ordinary number."
        case "value_error":
            return f"{prefix}{error['ctx']['error']}"
        case _:
            message = error["msg"].replace("Input should", "should")
            return f"{prefix}{message}, found {reprlib.repr(found)}. Correct this value."


def _is_tag(part: int | str) -> bool:
    """Whether a part of a location is no key, but says which of several models the content was taken for."""
    return isinstance(part, str) and part.startswith("(") and part.endswith(")")


def _tag(annotation: Any) -> str | None:
    return next((item.tag for item in getattr(annotation, "__metadata__", ()) if isinstance(item, Tag)), None)


def _known_keys(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """The keys that are allowed at a place inside a file."""
    here: Any = model
    for part in location:
        if isinstance(part, int) or _is_tag(part) or not (isinstance(here, type) and issubclass(here, BaseModel)):
            continue
        annotation: Any = here.model_fields[part].annotation if part in here.model_fields else None
        inner = [a for a in getattr(annotation, "__args__", ()) if isinstance(a, type) and issubclass(a, BaseModel)]
        tagged = [a.__origin__ for a in getattr(annotation, "__args__", ()) if _tag(a) in location]
        here = (tagged or inner or [annotation])[0]
    return list(here.model_fields) if isinstance(here, type) and issubclass(here, BaseModel) else []
