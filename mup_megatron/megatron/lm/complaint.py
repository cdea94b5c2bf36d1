"""How a user's mistake is told: in one sentence, by one rank."""

import os
import sys
import time
import traceback
from types import TracebackType

from mup_megatron.errors import InputError

DEBUG = "MUP_MEGATRON_DEBUG"
"""Environment variable: set, the traceback is shown as well."""

_OTHERS_SPEAK_AFTER_S = 5.0
"""What the first rank says ends all of them before; what only another rank knows is then said by that one."""


def complain(error: InputError) -> None:
    """Says on standard error what is wrong."""
    if os.environ.get(DEBUG):
        traceback.print_exception(error)
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        time.sleep(_OTHERS_SPEAK_AFTER_S)
    speaker = "mup-megatron" if rank == "0" else f"mup-megatron, rank {rank}"
    print(f"{speaker}: {error}", file=sys.stderr, flush=True)


def complain_when_uncaught() -> None:
    """Lets the interpreter tell a mistake that ends a script in the same way; everything else as before."""
    before = sys.excepthook

    def tell(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if isinstance(error, InputError):
            complain(error)
        else:
            before(kind, error, trace)

    sys.excepthook = tell
