"""How a user's mistake is told: in one sentence, by one rank."""

import os
import sys
import time
import traceback
from types import TracebackType

from mup_megatron.errors import InputError

DEBUG = "MUP_MEGATRON_DEBUG"
"""Environment variable: set, the traceback is shown as well."""

_PATIENCE_S = 1.0
"""torchrun ends all ranks as soon as one has left: the first one has to have spoken by then."""
_PATIENCE_OF_A_NODE_S = 5.0


class NodeError(InputError):
    """What may be wrong on one machine alone: a file that the others can read. Every other mistake is all ranks'."""


def complain(error: InputError) -> None:
    """Says on standard error what is wrong, on the first rank. Another speaks only of its own machine."""
    if os.environ.get(DEBUG):
        traceback.print_exception(error)
    rank = os.environ.get("RANK", "0")
    if rank == "0":
        print(f"mup-megatron: {error}", file=sys.stderr, flush=True)
    elif isinstance(error, NodeError) and os.environ.get("LOCAL_RANK", "0") == "0":
        # Had the first rank the same to say, it would have ended this one by then, unless that is on another machine.
        time.sleep(_PATIENCE_OF_A_NODE_S)
        print(f"mup-megatron, rank {rank}: {error}", file=sys.stderr, flush=True)
    else:
        time.sleep(_PATIENCE_S)


def complain_when_uncaught() -> None:
    """Lets the interpreter tell a mistake that ends a script in the same way; everything else as before."""
    before = sys.excepthook

    def tell(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if isinstance(error, InputError):
            complain(error)
        else:
            before(kind, error, trace)

    sys.excepthook = tell
