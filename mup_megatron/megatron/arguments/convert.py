"""Model file (and recipe) → Megatron-LM's flags, and parsed arguments or flags → model file."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from mup_megatron.architectures.architecture import Architecture
from mup_megatron.architectures.command_line import Reading, Release
from mup_megatron.architectures.flag import Flag
from mup_megatron.architectures.keys.custom import CustomTensor
from mup_megatron.architectures.keys.unread import as_read
from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.architectures.registry import DEFAULT, KEY, architecture_of, architectures, model_file
from mup_megatron.errors import InputError
from mup_megatron.megatron.arguments.programs import builds
from mup_megatron.megatron.arguments.table import (
    CHECKPOINT_ARGS,
    FIELDS,
    HYPERPARAMETERS,
    NOT_SAID,
    ROPE_SCALING,
    SOFTMAX_TYPE,
    SPEC,
    every,
    of_models,
    parsed,
    refused,
    unresolved,
)
from mup_megatron.megatron.optimizers import require_possible
from mup_megatron.megatron.versions import NEWEST_TESTED, known_release
from mup_megatron.recipe import Recipe, Schedule
from mup_megatron.theory import optimizers
from mup_megatron.validation import brief

_REQUIRED = ("num_layers", "hidden_size", "num_attention_heads", "seq_length", "vocab_size")


# ---- to flags ------------------------------------------------------------------------------------------------------


def flags(
    model: ModelFile,
    recipe: Recipe | None = None,
    *,
    train_iters: int | None = None,
    release: Release | None = None,
) -> list[str]:
    """Megatron-LM's flags of a model, and of a recipe's hyperparameters and schedule: ["--num-layers", "32", …].

    A key of the model that is at Megatron's own default is left out; a recipe is written out as a whole. They say the
    base's hyperparameters: what follows from width is the plug-in's.

    Args:
        model: the target.
        recipe: its `init_method_std` takes the place of the model's.
        train_iters: length of the run, where parts of the schedule have to be counted in iterations. Megatron counts
            them in whole ones, so they are rounded.
        release: the Megatron-Core that is to read them, by default the installed one, and without one the newest that
            was tested: some architectures are said otherwise to older ones.

    Raises:
        InputError: the schedule needs `train_iters`.
    """
    values = {key: getattr(model, key) for key in FIELDS} | {"max_position_embeddings": model.positions}
    words: list[str] = []
    for key, flag in FIELDS.items():
        if values[key] != flag.default and not (recipe is not None and key == "init_method_std"):
            words += flag.words(values[key])
    words += architecture_of(model).command_line.written(model, release or known_release() or NEWEST_TESTED)
    return words if recipe is None else [*words, *_recipe_flags(recipe, train_iters)]


def _recipe_flags(recipe: Recipe, train_iters: int | None) -> list[str]:
    values = recipe.moved.model_dump() | {"optimizer": recipe.parametrization.optimizer}
    require_possible(recipe.parametrization.optimizer, recipe.optimizers)
    others = {key for each in optimizers().values() for key in each.hyperparameters}
    words: list[str] = []
    for key, flag in HYPERPARAMETERS.items():
        said = flag.parse is not None or values[key] != flag.default
        if said and (key not in others or key in recipe.optimizer_values):
            words += flag.words(values[key])
    return words + _schedule_flags(recipe.schedule, train_iters)


def _schedule_flags(schedule: Schedule, train_iters: int | None) -> list[str]:
    words = ["--lr-decay-style", schedule.lr_decay_style]
    decay = schedule.lr_decay_fraction
    if decay != 1.0:
        run = _needed(train_iters, f"lr_decay_fraction {decay:g}")
        iterations = max(1, round(decay * run))
        words += ["--lr-decay-iters", str(iterations)]
        # Where it had to be rounded, the warm-up keeps its own length.
        decay = decay if abs(iterations - decay * run) < 1e-6 else iterations / run
    if schedule.lr_warmup_fraction:
        # Megatron takes the warm-up as a fraction of the decay, a recipe as one of the run.
        words += ["--lr-warmup-fraction", repr(schedule.lr_warmup_fraction / decay)]
    if schedule.lr_decay_style == "WSD":
        run = _needed(train_iters, f"lr_wsd_decay_fraction {schedule.lr_wsd_decay_fraction:g}")
        words += ["--lr-wsd-decay-style", schedule.lr_wsd_decay_style]
        words += ["--lr-wsd-decay-iters", str(max(1, round(schedule.lr_wsd_decay_fraction * run)))]
    return words


def _needed(train_iters: int | None, what: str) -> int:
    if train_iters is None:
        raise InputError(f"{what} of the run is a number of iterations in Megatron. Give --train-iters.")
    return train_iters


# ---- to a model file -----------------------------------------------------------------------------------------------


def model_from_values(
    values: Mapping[str, Any],
    *,
    vocab_size: int | None = None,
    source: str,
    release: Release | None = None,
    custom: Sequence[CustomTensor] = (),
    script: str | None = None,
) -> ModelFile:
    """Returns the model file that parsed Megatron arguments describe: `vars(args)`, before or after `validate_args`.

    What a model file says only once is left out: positions that are as many as the sequence is long, a bias of
    queries, keys and values where every linear layer has one, and sizes that follow from others, which Megatron fills
    in when it validates its arguments.

    Args:
        values: attributes that are missing count as Megatron's default.
        vocab_size: the tokenizer's, where the arguments do not say it.
        source: names the arguments in messages.
        release: the Megatron-Core that is meant, where it is known.
        custom: the tensors of its own layers, which the arguments cannot say; with them any --spec is right.
        script: the program, which decides what is built where it is one of Megatron-LM's.

    Raises:
        InputError: the model is impossible, or is one that a model file cannot describe; names the flag.
    """
    architecture = architecture_named(values, script)
    require_supported(values, source=source, custom=bool(custom), script=script)
    content = {key: values.get(flag.key, flag.default) for key, flag in FIELDS.items()}
    content["vocab_size"], content["make_vocab_size_divisible_by"] = _vocabulary(values, vocab_size)
    _read_other_ways(content, values, source)
    own = _own(architecture, values, source, release)
    content = as_read(architecture.file.unread, {**content, **own.content}, architecture.file.defaults())
    specs = architecture.command_line.specs
    if SPEC.changed(values) and (SPEC.found(values) in specs or not custom):
        content["transformer_impl"] = specs[SPEC.found(values)]
    content["custom_tensors"] = tuple(custom)
    if KEY in architecture.file.model_fields:
        content[KEY] = architecture.name
    content = {key: value for key, value in content.items() if value is not None or key not in own.content}
    _require_all(content, values, source)
    if content["max_position_embeddings"] == content["seq_length"]:
        content["max_position_embeddings"] = None
    if content["add_bias_linear"]:
        content["add_qkv_bias"] = False
    model = _named_by_flag(content, {**{key: flag.name for key, flag in FIELDS.items()}, **own.names}, source)
    plain = model.model_copy(update={"ffn_hidden_size": None})
    follows: dict[str, Any] = {"ffn_hidden_size": None} if plain.ffn_size == model.ffn_size else {}
    if (model.kv_channels or 0) * model.num_attention_heads == model.hidden_size:
        follows["kv_channels"] = None
    if not model.group_query_attention:
        follows["num_query_groups"] = 1
    if model.moe_ffn_hidden_size == model.ffn_hidden_size:
        follows["moe_ffn_hidden_size"] = None
    return model.model_copy(update=follows)


def architecture_named(values: Mapping[str, Any], script: str | None = None) -> Architecture:
    """Returns the architecture that a program builds, and else the one whose flags parsed arguments have.

    A GPT's are those that every model has.
    """
    by_program = None if script is None else builds(script)
    if by_program is not None and by_program is not DEFAULT:
        return by_program
    return next((each for each in architectures().values() if each.command_line.named(values) is not None), DEFAULT)


def remarks_of(values: Mapping[str, Any], release: Release | None, *, script: str | None = None) -> tuple[str, ...]:
    """Returns what to know of how a model's own flags are read, in sentences; the model is supported."""
    return architecture_named(values, script).command_line.read(values, release).remarks


def _own(architecture: Architecture, values: Mapping[str, Any], source: str, release: Release | None) -> Reading:
    try:
        return architecture.command_line.read(values, release)
    except InputError as error:
        raise InputError(f"{source}: {error}") from None


def require_supported(
    values: Mapping[str, Any], *, source: str, custom: bool = False, script: str | None = None
) -> None:
    """Raises InputError for parsed arguments that change the model in a way that a model file cannot say.

    Args:
        values: the arguments.
        source: names them in messages.
        custom: whether the tensors of the model's own layers are listed, so that any --spec is right.
        script: the program, which decides what is built where it is one of Megatron-LM's.
    """
    specs = architecture_named(values, script).command_line.specs
    found: dict[str, list[str]] = {}
    for flag in refused():
        if flag.changed(values) and not (flag is SPEC and (custom or flag.found(values) in specs)):
            found.setdefault(flag.refusal, []).append(flag.name)
    if found:
        raise InputError("\n".join(f"{source}: {', '.join(names)}: {why}" for why, names in found.items()))


def _vocabulary(values: Mapping[str, Any], vocab_size: int | None) -> tuple[int | None, int]:
    """Returns the vocabulary and what it is padded to a multiple of.

    `padded_vocab_size` is given by hand, and then is used as it is, or was worked out by Megatron from its tokenizer,
    which can have another size than the arguments say.
    """
    stated = vocab_size if vocab_size is not None else values.get("vocab_size")
    given = values.get("make_vocab_size_divisible_by")
    divisor = int(FIELDS["make_vocab_size_divisible_by"].default if given is None else given)
    padded = values.get("padded_vocab_size")
    if padded is None or divisor < 1:
        return stated, divisor
    if padded % divisor:
        return padded, 1
    multiple = divisor * (values.get("tensor_model_parallel_size") or 1)
    if stated is not None and (vocab_size is not None or -(-stated // multiple) * multiple == padded):
        return stated, divisor
    return padded, divisor


def _read_other_ways(content: dict[str, Any], values: Mapping[str, Any], source: str) -> None:
    for key, other in (("num_layers", "encoder_num_layers"), ("seq_length", "encoder_seq_length")):
        if content[key] is None:
            content[key] = values.get(other)
        elif values.get(other) not in (None, content[key]):
            name = "--" + other.replace("_", "-")
            raise InputError(
                f"{source}: {name} {values[other]} beside {FIELDS[key].name} {content[key]}: Megatron itself takes one "
                "of them. Drop one."
            )
    if values.get("use_rotary_position_embeddings"):
        content["position_embedding_type"] = "rope"
    if not values.get("add_position_embedding", True) and content["position_embedding_type"] != "rope":
        raise InputError(
            f"{source}: --no-position-embedding: Megatron itself refuses it unless positions are rotary. "
            "Use --position-embedding-type none."
        )
    if values.get("swiglu") and values.get("squared_relu"):
        raise InputError(f"{source}: --swiglu beside --squared-relu: Megatron itself refuses both. Drop one of them.")
    if values.get(SOFTMAX_TYPE.key) == "learnable":
        raise InputError(
            f"{source}: {SOFTMAX_TYPE.name} learnable: it adds a parameter that a model file does not know. "
            "Choose another type."
        )


_ON_THE_VOCABULARY = (
    " --vocab-size N, also before the --, is the tokenizer's size before padding; it is read from a file that is here "
    "(--tokenizer-type with --tokenizer-model or --vocab-file)."
)


def _require_all(content: Mapping[str, Any], values: Mapping[str, Any], source: str) -> None:
    missing = [key for key in _REQUIRED if key in content and content[key] is None]
    if not missing:
        return
    if CHECKPOINT_ARGS.changed(values) and missing != ["vocab_size"]:
        raise InputError(f"{source}: {CHECKPOINT_ARGS.name}: {CHECKPOINT_ARGS.refusal}")
    names = ", ".join(FIELDS[key].name for key in missing)
    text = f"{source}: missing: {names}. Give {'it' if len(missing) == 1 else 'them'}."
    if "vocab_size" in missing:
        text += _ON_THE_VOCABULARY
    raise InputError(text)


def _named_by_flag(content: Mapping[str, Any], names: Mapping[str, str], source: str) -> ModelFile:
    """Returns the checked model file; where it is wrong, the message has the names of flags instead of keys."""
    try:
        return model_file(content, source=source)
    except InputError as error:
        prefix = f"{source}: "
        lines = [line.removeprefix(prefix) for line in str(error).splitlines()]
        keys = re.compile(rf"\b(?:{'|'.join(sorted(names, key=len, reverse=True))})\b")
        named = [keys.sub(lambda match: names[match[0]], line) for line in lines]
        raise InputError("\n".join(prefix + line for line in named)) from None


def not_in_model_file(values: Mapping[str, Any]) -> list[str]:
    """Returns the flags of a model that a model file cannot say and that leave parameters and their scale as they are.

    Hyperparameters transfer all the same, from a base that was tuned with these flags as well.
    """
    scaled = values.get(ROPE_SCALING.key)
    return [
        flag.name
        for flag in NOT_SAID
        if flag.changed(values) and not (flag.key == "rope_scaling_factor" and not scaled)
    ]


def values_from_flags(words: Sequence[str], *, source: str, known: Sequence[Flag] | None = None) -> dict[str, Any]:
    """Returns what Megatron's parser would make of the flags that concern model, learning rates or native μP.

    Needs no Megatron. Others than those that are `known` (by default all) are skipped with their values. Flags that are
    not given have Megatron's default.

    Raises:
        InputError: a value is missing or cannot be read; names the flag.
    """
    known = every() if known is None else known
    try:
        given = parsed(words, known)
    except InputError as error:
        raise InputError(f"{source}: {error}") from None
    return {flag.key: flag.default for flag in known} | given


def model_from_flags(words: Sequence[str], *, source: str) -> ModelFile:
    """The model file that flags describe: `--a b` or `--a=b`, the last of a repeated one wins. Needs no Megatron.

    Only the flags of a model are looked at. `line.read_line` reads a whole line as Megatron would.

    Args:
        words: flags that do not concern the model are skipped with their values.
        source: names them in messages.

    Raises:
        InputError: as `model_from_values`, and for a value that is missing or cannot be read.
    """
    try:
        values = parsed(words, of_models())
    except InputError as error:
        raise InputError(f"{source}: {error}") from None
    try:
        return model_from_values(values, source=source)
    except InputError as error:
        raise naming_unread(error, words) from None


def naming_unread(error: InputError, words: Sequence[str]) -> InputError:
    """Returns the error; where flags are missing, with the variables among the words that may hold them."""
    if "missing: " not in str(error):
        return error
    may_hold = [word for before, word in zip(("", *words), words, strict=False) if _may_hold_flags(before, word)]
    names = sorted({brief(word, 30) for word in may_hold if "vocab" in str(error) or "DATA" not in word.upper()})
    if not names:
        return error
    more = [f"{len(names) - _NAMED} more"] if len(names) > _NAMED else []
    what = " and ".join([", ".join(names[:_NAMED]), *more])
    return InputError(f"{str(error).removesuffix(_ON_THE_VOCABULARY)} They may be in {what}, which is not known here.")


def _may_hold_flags(before: str, word: str) -> bool:
    """Returns whether a word is a variable that can stand for flags, and no flag's value, as far as its name says."""
    if unresolved(word) != word or _HOLDS_OTHERS.search(word):
        return False
    return not before.startswith("--") or _HOLDS_FLAGS.search(word) is not None


_NAMED = 2
_HOLDS_FLAGS = re.compile(r"ARG|OPT|FLAG|CONFIG|MODEL|PARAM|CMD|COMMAND", re.IGNORECASE)
_HOLDS_OTHERS = re.compile(
    r"PATH|DIR|OUTPUT|LOG|EVAL|DISTRIBUTED|TORCHRUN|LAUNCH|CHECKPOINT|CKPT|SAVE|LOAD|TENSORBOARD|WANDB|PARALLEL|RANK|"
    r"NODE|GPU|HOST|PORT|DEEPSPEED|DS_|ZERO|PROFIL",
    re.IGNORECASE,
)
