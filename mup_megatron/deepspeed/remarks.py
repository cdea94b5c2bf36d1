"""Remarks in a script of DeepSpeed's, whose standard output is its own."""

import sys

from torch import distributed


def say(text: str) -> None:
    """Prints a remark on standard error, by the first rank."""
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0:
        print(f"> mup-megatron: {text}", file=sys.stderr, flush=True)
