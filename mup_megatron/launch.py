"""`python -m mup_megatron.launch SCRIPT ARGS…`: runs an unmodified Megatron-LM script with the plug-in's flags.

    torchrun --nproc-per-node 8 -m mup_megatron.launch pretrain_gpt.py … --mup-recipe gpt3.recipe.yaml

Without a flag of ours the script runs as it is, unless it would go on from a checkpoint of a recipe. Where there is no
GPU, Megatron runs on the CPU.
"""

import itertools
import os
import runpy
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from mup_megatron.errors import InputError

BAD_INPUT = 2
_USAGE = "usage: python -m mup_megatron.launch SCRIPT ARGS… --mup-recipe R.recipe.yaml"
_OTHERS_SPEAK_AFTER = 5.0
"""Seconds. What the first rank says ends all of them before; what only another rank knows is said by that one."""


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a script as `python SCRIPT ARGS…` would, and exits with its status, or with 2 for what a user did wrong.

    Args:
        argv: the script and its arguments; by default those of this process.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        _run(words)
    except InputError as error:
        _complain(error)
        sys.stderr.flush()
        sys.exit(BAD_INPUT)


def _run(words: list[str]) -> None:
    if not words or words[0].startswith("-"):
        if not words or words[0] not in ("-h", "--help"):
            raise InputError(f"the first argument is the script. {_USAGE}")
        from mup_megatron.megatron.lm import flags

        print(f"{_USAGE}\n\n{flags.help_text()}\nAll other flags are the script's own.")
        return
    script = Path(words[0])
    if not script.is_file():
        raise InputError(f"{script}: no such script. {_USAGE}")
    # As Python itself does for a script: its neighbours are found, a Megatron-LM checkout among them.
    sys.argv = [str(script), *words[1:]]
    sys.path[0] = str(script.resolve().parent)
    from mup_megatron.megatron.lm import checkpoints, flags, hooks

    active = hooks.install_if_asked(words[1:])
    with_recipe = any(word.split("=", 1)[0] == flags.RECIPE for word in words[1:])
    if not with_recipe:
        checkpoints.require_plain(words[1:])
    _enable_cpu(words[1:])
    runpy.run_path(str(script), run_name="__main__")
    if active and with_recipe:
        hooks.require_used()


def _enable_cpu(words: Sequence[str]) -> None:
    import torch

    if torch.cuda.is_available():
        return
    on_purpose = any(pair == ("--distributed-backend", "gloo") for pair in itertools.pairwise(words))
    if not (on_purpose or "--distributed-backend=gloo" in words or {"-h", "--help"} & set(words)):
        raise InputError(
            "no GPU was found. To run on the CPU, say so with --distributed-backend gloo; docs/cpu.md lists the other "
            "flags that a CPU run needs."
        )
    from mup_megatron.megatron import cpu

    cpu.enable()


def _complain(error: InputError) -> None:
    if os.environ.get("MUP_MEGATRON_DEBUG"):
        traceback.print_exc()
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        time.sleep(_OTHERS_SPEAK_AFTER)
    speaker = "mup-megatron" if rank == "0" else f"mup-megatron, rank {rank}"
    print(f"{speaker}: {error}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
