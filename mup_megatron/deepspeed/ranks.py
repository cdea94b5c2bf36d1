"""What all ranks have to agree on before one of them raises: else the others wait for it in their next collective."""

import sys
from collections.abc import Iterable
from typing import TypeVar

from torch import distributed

from mup_megatron.errors import InputError

T = TypeVar("T")


def gathered(value: T) -> list[T]:
    """The value of each rank. Collective."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return [value]
    values: list[T] = [value] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


def raise_together(problems: Iterable[str], *, cause: BaseException | None = None) -> None:
    """Raises one InputError, the same on every rank, if there is a problem on any of them. Collective.

    Args:
        problems: this rank's, in sentences.
        cause: of this rank's, shown with its traceback.
    """
    everywhere = dict.fromkeys(problem for of_rank in gathered(list(problems)) for problem in of_rank)
    if everywhere:
        raise InputError("\n".join(everywhere)) from cause


def say(text: str) -> None:
    """A remark on standard error, by the first rank."""
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0:
        print(f"> mup-megatron: {text}", file=sys.stderr, flush=True)
