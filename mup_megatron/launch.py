"""`python -m mup_megatron.launch SCRIPT ARGS…`: runs an unmodified Megatron-LM script with the plug-in's flags.

    torchrun --nproc-per-node 8 -m mup_megatron.launch pretrain_gpt.py … --mup-recipe gpt3.recipe.yaml

Without a flag of ours the script runs as it is, unless it would go on from a checkpoint of a recipe. Where there is no
GPU, Megatron runs on the CPU.
"""

import itertools
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from mup_megatron.errors import InputError

BAD_INPUT = 2
_USAGE = "usage: python -m mup_megatron.launch SCRIPT ARGS… --mup-recipe R.recipe.yaml"


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a script as `python SCRIPT ARGS…` would, and exits with its status, or with 2 for what a user did wrong.

    Args:
        argv: the script and its arguments; by default those of this process.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        _run(words)
    except InputError as error:
        from mup_megatron.megatron.lm.complaint import complain

        complain(error)
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

    hooks.install_if_asked(words[1:])
    with_recipe = any(word.split("=", 1)[0] == flags.RECIPE for word in words[1:])
    if not with_recipe:
        checkpoints.require_plain(words[1:])
    _enable_cpu(words[1:])
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
    if with_recipe and not flags.wants_help(words[1:]):
        hooks.require_used()


def _enable_cpu(words: Sequence[str]) -> None:
    import torch

    from mup_megatron.megatron.lm import flags

    if torch.cuda.is_available():
        return
    on_purpose = any(pair == ("--distributed-backend", "gloo") for pair in itertools.pairwise(words))
    if not (on_purpose or "--distributed-backend=gloo" in words or flags.wants_help(words)):
        raise InputError(
            "no GPU was found. To run on the CPU, say so with --distributed-backend gloo; docs/cpu.md lists the other "
            "flags that a CPU run needs."
        )
    from mup_megatron.megatron import cpu

    cpu.enable()


if __name__ == "__main__":
    main()
