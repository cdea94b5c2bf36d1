"""`--mup-write-model-file`: a line's model file as Megatron-LM itself reads it, and an end before a model is built.

Megatron parses the line, reads a YAML file or a checkpoint's arguments where it says so, validates, and builds its
tokenizer. Then the file is written and the process ends, so nothing that comes later needs to be there: no ranks, no
device, no data. Where it stands in Megatron is in `PLACES`, as in `hooks.py`.
"""

import argparse
import math
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.errors import InputError
from mup_megatron.files import write_atomically
from mup_megatron.megatron.arguments.convert import model_from_values, not_in_model_file, remarks_of, require_supported
from mup_megatron.megatron.arguments.table import NOT_SAID, STOPPED, refused
from mup_megatron.megatron.pretrain import flags
from mup_megatron.megatron.versions import core_version, core_version_text, range_remark
from mup_megatron.messages import is_first, say
from mup_megatron.yaml_io import dump_yaml, read_yaml

_SOURCE = "the command line"
_LONGEST = 200
"""Characters of what Megatron says."""
_READ_ELSEWHERE = {"use_checkpoint_args": False, "yaml_cfg": None}
"""What a reader of flags has to refuse, and Megatron has done by then."""

_target: Path | None = None
_done = False
_before: dict[str, Any] = {}
"""The arguments before Megatron validates them, which fills in some that the line leaves open."""


def path_in(words: Sequence[str]) -> Path | None:
    """Returns the path to which a line says that the model file is to be written; None if it does not.

    Raises:
        InputError: there is no path, or a recipe beside it.
    """
    given = [
        following if word == flags.WRITE else word.partition("=")[2]
        for word, following in zip(words, [*words[1:], ""], strict=True)
        if word.partition("=")[0] == flags.WRITE
    ]
    if not given:
        return None
    if not given[-1] or given[-1].startswith("--"):
        raise InputError(f"{flags.WRITE}: no path. Write it after the flag.")
    if any(word.partition("=")[0] == flags.RECIPE for word in words):
        raise InputError(f"{flags.WRITE} beside {flags.RECIPE}: nothing is trained then. Drop one of them.")
    return Path(given[-1])


def begin(path: Path) -> None:
    """Takes note of where the file goes, before Megatron is imported.

    Raises:
        InputError: something is there already.
    """
    global _target
    if path.exists():
        raise InputError(f"{flags.WRITE} {path}: exists already. Remove it, or choose another name.")
    _target = path


def require_written() -> None:
    """Raises InputError if the script came to its end, and Megatron was not asked to read the line."""
    if not _done:
        raise InputError(
            f"{flags.WRITE}: the script has ended and never read Megatron's arguments, so there is no model file. Use "
            "a script that calls megatron.training's pretrain."
        )


# ---- in Megatron's place -------------------------------------------------------------------------------------------


def _add_megatron_arguments(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    parser: argparse.ArgumentParser = flags.add_to(wrapped(*args, **kwargs))

    def error(message: str) -> NoReturn:
        raise InputError(f"{_SOURCE}: Megatron-LM {core_version_text()} refuses it: {_short(message)}")

    parser.error = error  # type: ignore[method-assign]
    return parser


def _parse_args(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    with in_one_sentence("cannot read it"):
        values = wrapped(*args, **kwargs)
    values.async_save = False  # would start a process that writes checkpoints
    values.world_size = _ranks(values)
    _settle_environment(values)
    return values


def _settle_environment(values: Any) -> None:
    """Gives this process the variables that Megatron wants for such a line; those of the run are not the question."""
    sharded = getattr(values, "use_torch_fsdp2", False) or getattr(values, "use_megatron_fsdp", False)
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "8" if sharded else "1"
    os.environ["NCCL_ALGO"] = "Ring"  # for --deterministic-mode


def _ranks(values: Any) -> int:
    """Returns as many as the line's layout needs: how many there are must not matter."""
    layout = getattr(values, "model_parallel", values)

    def size(key: str) -> int:
        return max(1, int(getattr(layout, key, None) or getattr(values, key, None) or 1))

    pipeline = size("pipeline_model_parallel_size")
    dense = size("tensor_model_parallel_size") * pipeline * size("context_parallel_size")
    sparse = size("expert_tensor_parallel_size") * pipeline * size("expert_model_parallel_size")
    return math.lcm(dense, sparse) * size("num_distributed_optimizer_instances")


def _validate_args(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    def validate(values: Any, defaults: Mapping[str, Any] | None = None, *rest: Any, **more: Any) -> Any:
        flags.take_given(values)
        _before.update(vars(values))
        require_supported({**_before, **_READ_ELSEWHERE}, source=_SOURCE, script=sys.argv[0])
        with in_one_sentence("refuses it"):
            return wrapped(values, defaults or {}, *rest, **more)

    return validate(*args, **kwargs)


def _load_args_from_checkpoint(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    with in_one_sentence("cannot read a checkpoint's arguments"):
        try:
            return wrapped(*args, **kwargs)
        except SystemExit as end:  # is what Megatron makes of an error there, after printing it
            if isinstance(end.__context__, Exception):
                raise end.__context__ from None
            raise


def _load_yaml(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    path = Path(args[0] if args else kwargs["yaml_path"])
    if not isinstance(read_yaml(path), Mapping):
        raise InputError(f"{path}: no keys with values. --yaml-cfg wants Megatron's arguments in it.")
    return wrapped(*args, **kwargs)


def _validate_yaml(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    with in_one_sentence("refuses it"):
        return wrapped(*args, **kwargs)


def _set_global_variables(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> NoReturn:
    values = args[0] if args else kwargs["args"]
    described = {**_of_yaml(vars(values)), **_READ_ELSEWHERE}
    asked = {flag.key for flag in (*refused(), *NOT_SAID, *STOPPED)}
    described |= {key: value for key, value in _before.items() if key in asked} | _READ_ELSEWHERE
    model = model_from_values(
        described, vocab_size=_vocabulary(values), source=_SOURCE, release=core_version()[:2], script=sys.argv[0]
    )
    _write(model, described)
    raise SystemExit(0)


def _vocabulary(values: Any) -> int | None:
    """The size of the tokenizer that Megatron builds; None where the arguments say the padded one themselves."""
    if getattr(values, "padded_vocab_size", None) is not None:
        return None
    if not getattr(values, "pad_vocab_size", True):
        stated: int | None = values.vocab_size
        return stated
    from megatron.training import global_vars

    with in_one_sentence(
        f"cannot build the tokenizer of --tokenizer-type {values.tokenizer_type}. Give its files (--tokenizer-model, "
        "or --vocab-file and --merge-file), or --tokenizer-type NullTokenizer with --vocab-size. It says"
    ):
        return int(global_vars.build_tokenizer(values).vocab_size)


def _write(model: ModelFile, described: Mapping[str, Any]) -> None:
    global _done
    assert _target is not None
    _done = True
    if not is_first():
        return
    remark = range_remark()
    if remark is not None:
        say(remark)
    for name in not_in_model_file(described):
        say(f"{name}: a model file has no key for it. Give it to the proxy's runs as well.")
    for sentence in remarks_of({**described, **_before}, core_version()[:2], script=sys.argv[0]):
        say(sentence)
    for flag in STOPPED:
        if flag.changed(described):
            say(f"{flag.name}: a run with a recipe is stopped: {flag.refusal}.")
    write_atomically(_target, dump_yaml(model.model_dump(mode="json", exclude_defaults=True)))
    say(f"model file {_target}, as Megatron-LM {core_version_text()} reads the line. No model was built.")


# ---- what a YAML file calls otherwise ------------------------------------------------------------------------------


def _of_yaml(values: Mapping[str, Any]) -> dict[str, Any]:
    """Megatron's arguments; those of a YAML file are named as its configuration of a Transformer is."""
    if "language_model" not in values:
        return dict(values)
    activation = values.get("activation_func")
    groups = values.get("num_query_groups")
    return {
        **values,
        "swiglu": activation == "swiglu",
        "squared_relu": activation == "squaredrelu",
        "group_query_attention": groups not in (None, values.get("num_attention_heads")),
        "num_query_groups": groups or 1,
        "num_experts": values.get("num_moe_experts"),
        "moe_ffn_hidden_size": values.get("moe_ffn_hidden_size"),
    }


# ---- what Megatron says --------------------------------------------------------------------------------------------


@contextmanager
def in_one_sentence(what: str) -> Iterator[None]:
    """Makes what Megatron raises about a line into an error of the user's: "Megatron-LM 0.19.0 {what}: …".

    It is whatever Megatron and the libraries below it raise, assertions most of all: the set is open.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        # An assertion without words is its own text. What torch says about `weights_only` is advice to run a file.
        said = (
            _NOT_PLAIN
            if "weights_only" in str(error)
            else _short(str(error)) or _short(traceback.extract_tb(error.__traceback__)[-1].line or "")
        )
        said = said or type(error).__name__
        raise InputError(f"{_SOURCE}: Megatron-LM {core_version_text()} {what}: {said}") from error


def _short(text: str) -> str:
    line = re.sub(r"\s+", " ", text).strip()
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]}…"


_NOT_PLAIN = "a checkpoint holds more than tensors and plain values, or is damaged. Nothing of it was run"


Wrapper = Callable[[Callable[..., Any], Any, tuple[Any, ...], dict[str, Any]], Any]

_READING = {
    "parse_args": _parse_args,
    "validate_args": _validate_args,
    "validate_yaml": _validate_yaml,
    "set_global_variables": _set_global_variables,
}
PLACES: Mapping[str, Mapping[str, Wrapper]] = {
    "megatron.training.arguments": {"add_megatron_arguments": _add_megatron_arguments, **_READING},
    "megatron.training.yaml_arguments": {"load_yaml": _load_yaml, "validate_yaml": _validate_yaml},
    "megatron.training.global_vars": {"set_global_variables": _set_global_variables},
    "megatron.training.checkpointing": {"load_args_from_checkpoint": _load_args_from_checkpoint},
    "megatron.training.initialize": _READING,
}
"""Module → its functions, as in `hooks.py`. Up to 0.17 it is `initialize` that reads the line, later `arguments`."""
