"""A launch line of Megatron-LM as a user has it → what it says of the model, or why a reader of flags cannot know.

Joins the parts: which program it starts (`programs`), what its flags mean (`effects`, `table`), and how large its
tokenizer's vocabulary is (`vocabulary`). Needs no Megatron; where one is installed, its release settles what differs.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from mup_megatron.architectures.flag import Flag
from mup_megatron.architectures.keys.custom import CustomTensor
from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.architectures.registry import DEFAULT, architectures
from mup_megatron.errors import InputError
from mup_megatron.megatron.arguments import fork, programs
from mup_megatron.megatron.arguments.convert import (
    architecture_named,
    model_from_values,
    naming_unread,
    not_in_model_file,
    remarks_of,
)
from mup_megatron.megatron.arguments.effects import Effect, row_of
from mup_megatron.megatron.arguments.launch_script import words_of_launch
from mup_megatron.megatron.arguments.table import (
    CHECKPOINT_ARGS,
    FIELDS,
    HYPERPARAMETERS,
    MORE_TOKENS,
    STOPPED,
    TOKENIZER,
    every,
    of_models,
    parsed,
    unresolved,
)
from mup_megatron.megatron.arguments.vocabulary import vocabulary
from mup_megatron.megatron.optimizers import unknown_remark
from mup_megatron.megatron.versions import known_release, range_remark
from mup_megatron.validation import brief

_FOR_INFERENCE = "inference_optimized"
_FLAGS = "flags"
"""What `words_of_launch` calls words that are no launch script."""


@dataclass(frozen=True, slots=True)
class Line:
    """The contents of a launch line."""

    source: str
    """What messages call it."""
    values: Mapping[str, Any]
    """Megatron's arguments, parsed: those that concern a model or a recipe."""
    vocab_size: int | None
    """Before padding, where it is known."""
    remarks: tuple[str, ...]
    """What to know beside it, in sentences."""
    flags: tuple[str, ...]
    """The words that are the program's own."""
    script: str | None = None
    """The program, if it names one."""

    def model(self, custom: Sequence[CustomTensor] = ()) -> ModelFile:
        """Returns the model file that it describes.

        Args:
            custom: the tensors of the model's own layers, for a line with a --spec of one's own.

        Raises:
            InputError: the model is impossible, is one that a model file cannot describe, or is not all there.
        """
        try:
            return model_from_values(
                self.values,
                vocab_size=self.vocab_size,
                source=self.source,
                release=known_release(),
                script=self.script,
                custom=custom,
            )
        except InputError as error:
            raise naming_unread(error, self.flags) from None


def read_line(given: Sequence[str], *, vocab_size: int | None = None, native: bool = False) -> Line:
    """Reads a launch line, or a launch script with further flags. Nothing of it is run.

    Args:
        given: the words: flags, `torchrun … SCRIPT.py FLAGS…`, or `SCRIPT.sh FLAGS…`.
        vocab_size: the tokenizer's number of entries, before padding, where the line does not say it.
        native: whether it is read for Megatron's own μP, which knows some flags that a model file refuses.

    Raises:
        InputError: it is another program's, or a value is missing, cannot be read, or is not supported; names the flag
            or the program.
    """
    words, source = words_of_launch(given)
    script, flags = _program(given, words, source)
    _require_flags(flags, source)
    if script is not None:
        programs.require_flags(script, flags, source=source)
    remarks = [*_version_remarks(), *_unknown(script, flags, source)]
    if fork.MARK in flags:
        flags = [*fork.renamed(flags)]
    values = {flag.key: flag.default for flag in (*every(), *TOKENIZER)}
    values |= _parsed(flags, source, native=native, answered=vocab_size is not None)
    impl = FIELDS["transformer_impl"]
    if values[impl.key] == _FOR_INFERENCE:
        values[impl.key] = impl.default
        remarks.append(
            f"{impl.name} {_FOR_INFERENCE}: kernels that generate text, with the parameters of {impl.default}. That is "
            "in the model file; a run with a recipe is stopped."
        )
    if fork.MARK in flags:
        fork.require_gpt(architecture_named(values, script), source)
    size, more = _vocabulary(flags, values, vocab_size, source)
    remarks += more
    if not native:
        remarks += _stopped(values)
    if CHECKPOINT_ARGS.changed(values):
        remarks.append(
            f"{CHECKPOINT_ARGS.name}: what a checkpoint says of the model takes the place of these flags. The file is "
            "what they say; see that the two agree."
        )
    remarks += [
        f"{name}: a model file has no key for it. Give it to the proxy's runs as well."
        for name in not_in_model_file(values)
    ]
    with contextlib.suppress(InputError):  # `Line.model` raises it
        remarks += remarks_of(values, known_release(), script=script)
    return Line(source, values, size, tuple(remarks), tuple(flags), script)


# ---- the program ---------------------------------------------------------------------------------------------------


def _program(given: Sequence[str], words: Sequence[str], source: str) -> tuple[str | None, list[str]]:
    """Returns the script that the line starts, if it names one, and the words that are the script's."""
    named = None if source == _FLAGS else _program_of_script(Path(given[0]))
    if named is not None and words[0].startswith("-"):
        return named, [*words]  # a script's words begin behind the program
    for script, _ in programs.programs_of(words):
        programs.require_supported(script, source=source)
    found = programs.script_of(words)
    if found is None:
        return named, [*words]
    script, begin = found
    return script, [*words[begin:]]


def _program_of_script(path: Path) -> str | None:
    """Returns the one training program that a launch script names.

    Raises:
        InputError: it names one that builds no model that is supported.
    """
    scripts = [s for s in programs.scripts_in(path) if programs.kind_of(s) is not programs.ProgramKind.DATA]
    for script in scripts:
        programs.require_supported(script, source=str(path))
    known = [script for script in scripts if programs.kind_of(script) is programs.ProgramKind.SUPPORTED]
    return next(iter([*known, *scripts]), None)


def _version_remarks() -> Iterator[str]:
    remark = range_remark()
    if remark is not None:
        yield remark


def _unknown(script: str | None, flags: Sequence[str], source: str) -> Iterator[str]:
    """Remarks on what is not known of a line; flags that Megatron-LM's own program would refuse are an error."""
    known = script is not None and programs.kind_of(script) is programs.ProgramKind.SUPPORTED
    names = list(dict.fromkeys(w.partition("=")[0] for w in flags if w.startswith("--") and len(w) > 2))
    forks = fork.MARK in names
    unknown = [
        name for name in names if row_of(name) is None and unresolved(name) is None and not (forks and fork.known(name))
    ]
    before = [*takewhile(lambda word: not word.startswith("-"), reversed([*takewhile(_no_model_flag, flags)]))]
    launched = before[0] if before and not flags[0].startswith("-") else None
    program = script if script is not None else launched
    if program is not None and (script is None or unresolved(program) is not None):
        yield (
            f"{brief(program, 60)}: which program this is, is not known here. What it builds is taken for the model "
            "that its flags describe."
        )
    elif script is not None and not known:
        yield (
            f"{brief(script, 100)}: no program of Megatron-LM's. What it builds is taken for the model that its "
            "flags describe."
        )
    for name in names:
        row = row_of(name)
        if row is not None and row.effect is Effect.REFUSED and name not in _read_flags():
            _refuse_of_others(name, row.reason, flags, source)
        if forks and (why := fork.REFUSED.get(name, fork.OTHERWISE.get(name))) is not None:
            raise InputError(f"{source}: {name}: {why}")
    if not unknown:
        return
    if known:
        of = " or of Megatron-DeepSpeed" if forks else ""
        raise InputError(
            f"{source}: {_listed(unknown)}: no flag of {brief(script, 60)} in Megatron-LM 0.16 to 0.19{of}. Correct or "
            "drop it; a changed script of your own may have another name."
        )
    yield f"{_listed(unknown)}: no flag of Megatron-LM 0.16 to 0.19. What it changes of a model, the file lacks."


def _read_flags() -> dict[str, Flag]:
    return {flag.name: flag for flag in every()}


def _require_flags(flags: Sequence[str], source: str) -> None:
    """Raises InputError for words that Megatron's parser takes for no flag, and which would be passed over here."""
    if "--" in flags:
        raise InputError(f"{source}: --: Megatron takes no words behind a lone `--`. Drop it, or what follows it.")
    read = _read_flags()
    for before, word in zip(("", *flags), flags, strict=False):
        flag = read.get(before)
        if word.startswith("@") and (not before.startswith("-") or (flag is not None and flag.parse is None)):
            raise InputError(
                f"{source}: {brief(word, 60)}: Megatron reads no flags from a file on its line. Write them on the line."
            )


_SAYS_WHICH = ("--model-provider", "--model-type")
"""Flags that say which model is built."""


def _no_model_flag(word: str) -> bool:
    return word.partition("=")[0] not in _read_flags()


def _refuse_of_others(name: str, reason: str, flags: Sequence[str], source: str) -> None:
    if name in _SAYS_WHICH:
        follows = [after for word, after in zip(flags, [*flags[1:], ""], strict=True) if word == name]
        follows += [word.partition("=")[2] for word in flags if word.startswith(f"{name}=")]
        names = {word.partition("=")[0] for word in flags}
        asked = (
            each for each in architectures().values() if names & {flag.name for flag in each.command_line.own_flags}
        )
        if follows and follows[-1].lower() in next(asked, DEFAULT).command_line.providers:
            return
        name = f"{name} {brief(''.join(follows[-1:]), 60)}"
    raise InputError(f"{source}: {name}: {reason}")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(brief(name, 40) for name in names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


# ---- values --------------------------------------------------------------------------------------------------------


def _parsed(flags: Sequence[str], source: str, *, native: bool, answered: bool) -> dict[str, Any]:
    """Returns the values of all flags that are read. What need not be known for the answer may be a variable."""
    size = FIELDS["vocab_size"]
    needed = [flag for flag in (every() if native else of_models()) if not (answered and flag is size)]
    try:
        values = parsed(flags, needed)
    except InputError as error:
        raise InputError(f"{source}: {error}") from None
    for flag in (*every(), *TOKENIZER):
        if flag not in needed:
            with contextlib.suppress(InputError):
                values |= parsed(flags, [flag])
    return values


def _stopped(values: Mapping[str, Any]) -> Iterator[str]:
    unknown = unknown_remark(values[HYPERPARAMETERS["optimizer"].key])
    if unknown is not None:
        yield unknown
    for flag in STOPPED:
        if flag.changed(values):
            yield f"{flag.name}: a run with a recipe is stopped: {flag.refusal}."
    if values["use_mup"]:
        yield "--use-mup: a run with a recipe is stopped. `mup-megatron from-native` makes a recipe of the line."


# ---- the vocabulary ------------------------------------------------------------------------------------------------


def _vocabulary(
    flags: Sequence[str], values: Mapping[str, Any], answer: int | None, source: str
) -> tuple[int | None, list[str]]:
    """Returns the size that Megatron's tokenizer has, and remarks; None where it is on the line as Megatron uses it."""
    stated = values["vocab_size"]
    if values["padded_vocab_size"] is not None:
        return None, _unasked(answer, f"--padded-vocab-size {values['padded_vocab_size']}")
    if not values["pad_vocab_size"]:
        return stated if stated is not None else answer, []
    more = any(row.partition("=")[0] in MORE_TOKENS for row in flags)
    try:
        found = None if more else vocabulary(values, known_release())
    except InputError as error:
        raise InputError(f"{source}: {error}") from None
    if found is not None:
        remarks = _unasked(answer if answer != found else None, f"{_tokenizer(values)}: {found} entries")
        if stated not in (None, found) and values["tokenizer_type"] not in ("NullTokenizer", "TikTokenizer"):
            remarks.append(
                f"--vocab-size {stated}: Megatron takes the size of its tokenizer, {found}. That is in the model file."
            )
        return found, remarks
    if stated is not None:
        remarks = _unasked(answer if answer != stated else None, f"--vocab-size {stated}")
        if values["tokenizer_type"] is not None:
            remarks.append(
                f"--vocab-size {stated}: Megatron takes the size of its tokenizer, which cannot be read here. See that "
                "they agree."
            )
        return stated, remarks
    return answer, []


def _tokenizer(values: Mapping[str, Any]) -> str:
    named = values["tokenizer_model"] or values["vocab_file"]
    return str(named) if named else f"--tokenizer-type {values['tokenizer_type']}"


def _unasked(answer: int | None, said: str) -> list[str]:
    return [] if answer is None else [f"--vocab-size {answer} is not used: the line says it ({said})."]
