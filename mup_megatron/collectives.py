"""Errors that all ranks raise together: if one raised alone, the others would wait for it in their next collective."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import distributed

from mup_megatron.errors import InputError


def gathered(value: Any, group: Any = None) -> list[Any]:
    """Returns the values of all ranks, in their order; of one process group, if it is given. Collective."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return [value]
    values: list[Any] = [None] * distributed.get_world_size(group)
    distributed.all_gather_object(values, value, group=group)
    return values


def raise_together(problems: Iterable[str], *, cause: BaseException | None = None) -> None:
    """Raises one InputError with the problems of all ranks, on all ranks, if there are any. Collective.

    Args:
        problems: this rank's, in sentences.
        cause: of this rank's, shown with its traceback.
    """
    found = dict.fromkeys(problem for of_rank in gathered(list(problems)) for problem in of_rank)
    if found:
        raise InputError("\n".join(found)) from cause


@contextmanager
def raising_together() -> Iterator[None]:
    """Encloses work that may raise an InputError on some ranks, and then raises it on all of them. Collective."""
    problems, cause = [], None
    try:
        yield
    except InputError as error:
        problems, cause = [str(error)], error.__cause__
    raise_together(problems, cause=cause)
