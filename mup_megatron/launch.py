"""`python -m mup_megatron.launch SCRIPT ARGS…`: runs an unmodified Megatron-LM script with the plug-in's flags.

    torchrun --nproc-per-node 8 -m mup_megatron.launch pretrain_gpt.py … --mup-recipe gpt3.recipe.yaml
    python -m mup_megatron.launch pretrain_gpt.py … --mup-write-model-file target.yaml
    deepspeed --module mup_megatron.launch --deepspeed train.py … --deepspeed_config ds.json

Without a flag of ours a Megatron-LM script runs as it is, unless it would go on from a checkpoint of a recipe. Where
there is no GPU, Megatron runs on the CPU. With --deepspeed it is a script that trains with DeepSpeed, and every engine
in it that trains must have the "mup" entry in its configuration.
"""

import itertools
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from mup_megatron.errors import InputError
from mup_megatron.messages import BAD_INPUT, complain

_DEEPSPEED = "--deepspeed"
_USAGE = (
    "usage: python -m mup_megatron.launch SCRIPT ARGS… --mup-recipe R.recipe.yaml, or --mup-write-model-file PATH; for "
    f"DeepSpeed: python -m mup_megatron.launch {_DEEPSPEED} SCRIPT ARGS…"
)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a script as `python SCRIPT ARGS…` would, and exits with its status, or with 2 for what a user did wrong.

    Args:
        argv: the script and its arguments; by default those of this process.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        _run(words)
    except InputError as error:
        complain(error)
        sys.exit(BAD_INPUT)


def _run(words: list[str]) -> None:
    # The deepspeed launcher puts its own word before those of a module.
    own = [word for word in words[:1] if word.startswith(("--local_rank=", "--local-rank="))]
    if words[len(own) :][:1] == [_DEEPSPEED]:
        _run_with_deepspeed(words[len(own) + 1 :], own)
    else:
        _run_megatron_lm(words)


def _run_with_deepspeed(words: list[str], of_launcher: list[str]) -> None:
    from mup_megatron.deepspeed import hooks

    _become(words, of_launcher)
    hooks.require_entry()
    _execute(sys.argv[0])
    hooks.require_used()


def _become(words: list[str], before: Sequence[str] = ()) -> None:
    """Makes the process look as Python makes it for a script: its neighbours are found, a checkout among them."""
    if not words or words[0].startswith("-"):
        raise InputError(f"the first argument is the script. {_USAGE}")
    script = Path(words[0])
    if not script.is_file():
        raise InputError(f"{script}: no such script. {_USAGE}")
    sys.argv = [str(script), *before, *words[1:]]
    sys.path[0] = str(script.resolve().parent)


def _execute(script: str) -> None:
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise


def _run_megatron_lm(words: list[str]) -> None:
    if not words or words[0].startswith("-"):
        if not words or words[0] not in ("-h", "--help"):
            _become(words)
        from mup_megatron.megatron.pretrain import flags

        print(f"{_USAGE}\n\n{flags.help_text()}\nAll other flags are the script's own.")
        return
    _become(words)
    from mup_megatron.megatron.arguments import programs
    from mup_megatron.megatron.pretrain import checkpoints, flags, hooks, model_writer

    if flags.asked_for(words[1:]) and not flags.wants_help(words[1:]):
        programs.require_supported(words[0], source="python -m mup_megatron.launch")
        programs.require_flags(words[0], words[1:], source="python -m mup_megatron.launch")
    writes = model_writer.path_in(words[1:]) is not None
    if writes:
        # Nothing is computed: no GPU is looked for, and none is touched.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    hooks.install_if_asked(words[1:])
    if writes and not flags.wants_help(words[1:]):
        from mup_megatron.megatron import cpu

        cpu.enable()
        with model_writer.in_one_sentence("ends before it has read it"):
            _execute(sys.argv[0])
        model_writer.require_written()
    with_recipe = any(word.split("=", 1)[0] == flags.RECIPE for word in words[1:])
    if not with_recipe:
        checkpoints.require_plain(words[1:])
    _enable_cpu(words[1:])
    _execute(sys.argv[0])
    if with_recipe and not flags.wants_help(words[1:]):
        hooks.require_used()


def _enable_cpu(words: Sequence[str]) -> None:
    import torch

    from mup_megatron.megatron.pretrain import flags

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
