"""Messages of the plug-in to a user: remarks of the first rank, and a mistake in one sentence, by one rank."""

import functools
import hashlib
import os
import sys
import time
import traceback
from datetime import timedelta
from types import TracebackType

from mup_megatron.errors import InputError

DEBUG = "MUP_MEGATRON_DEBUG"
"""Environment variable: set, the traceback is shown as well."""

BAD_INPUT = 2
"""Status of a process that ends with a user's mistake."""

_PATIENCE_S = 1.0
"""torchrun ends all ranks as soon as one has left: the one that speaks has to have spoken by then."""


def is_first() -> bool:
    """Says if this is the first rank; known before the ranks have joined."""
    return os.environ.get("RANK", "0") == "0"


def say(text: str) -> None:
    """Prints a remark on standard output, by the first rank."""
    if is_first():
        print(f"> mup-megatron: {text}", flush=True)


def complain(error: InputError) -> None:
    """Says on standard error what is wrong, on one rank; two ranks with different things to say both speak."""
    if os.environ.get(DEBUG):
        traceback.print_exception(error)
    if _has_the_word(str(error)):
        rank = os.environ.get("RANK", "0")
        print(f"mup-megatron{'' if rank == '0' else f', rank {rank}'}: {error}", file=sys.stderr, flush=True)
    time.sleep(0.0 if _alone() else _PATIENCE_S)


def _alone() -> bool:
    return os.environ.get("WORLD_SIZE", "1") == "1"


def _has_the_word(text: str) -> bool:
    """Says if this rank is the one to tell it."""
    from torch import distributed

    if _alone():
        return True
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank() == 0  # after the ranks have met, all of them raise the same
    # Before, who comes first to the store where torchrun's ranks meet. It need not be the first rank: torchrun may end
    # that one while it still starts, or what is wrong may be wrong on one machine alone.
    said = hashlib.sha256(text.encode()).hexdigest()
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        store = distributed.TCPStore(  # type: ignore[attr-defined]
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=timedelta(seconds=5),
        )
        return bool(store.add(f"mup-megatron/{attempt}/{said}", 1) == 1)
    except (KeyError, ValueError, RuntimeError):  # no store yet: twice is better than never
        return True


@functools.cache  # once is enough
def complain_when_uncaught(*, leave: bool = False) -> None:
    """Lets the interpreter tell a mistake that ends a script in the same way; everything else as before.

    Args:
        leave: with BAD_INPUT; else with the interpreter's own status.
    """
    before = sys.excepthook

    def tell(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not isinstance(error, InputError):
            before(kind, error, trace)
            return
        complain(error)
        if leave and not hasattr(sys, "ps1"):  # a session at the prompt goes on
            sys.exit(BAD_INPUT)

    sys.excepthook = tell
