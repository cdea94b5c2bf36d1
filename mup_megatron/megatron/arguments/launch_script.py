"""The Megatron flags in a bash launch script, read and never executed.

Follows assignments, arrays, `+=` (also as `A="$A …"`) and `${A:-default}` from top to bottom, and functions where they
are written; `$1` and its like where the script's arguments are given; `$(mup-megatron args FILE …)`, which is what that
file says; and the usual way to the script's own folder, `$(cd "$(dirname "$0")/…" && pwd)`. It is no shell: what comes
from a condition, a loop, the environment or another program's output stays as it is written there, and is an error
where the model depends on it. So is what another file (`source`), `eval`, `read`, arithmetic, or a function that is
called may have set, unless it is `readonly` before. Not seen is what a function or a trap of another file sets when it
is called later.

It ends on every text: `bash` bounds what is parsed, and what is looked at again is counted. Over 400 lines, because
what follows an assignment, and what a command may set, is one state.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, replace
from itertools import pairwise, takewhile
from pathlib import Path, PurePosixPath

from mup_megatron.architectures.registry import load_model_file
from mup_megatron.errors import InputError
from mup_megatron.files import read_text
from mup_megatron.megatron.arguments.bash import (
    DECLARATIONS,
    SPACE,
    Command,
    Token,
    UnreadableError,
    WordPart,
    parsed,
    within_quotes,
)
from mup_megatron.megatron.arguments.convert import flags
from mup_megatron.megatron.arguments.effects import Effect, row_of
from mup_megatron.megatron.arguments.table import TOKENIZER, every, of_models, unresolved
from mup_megatron.validation import brief, shortened


class Word(str):
    """A word of a script, the line that it comes from, and why its variable is unknown, if it is."""

    line: int
    why: str

    def __new__(cls, text: str, line: int, why: str = "") -> "Word":
        """Returns the text as a string that knows its line, counted from 1."""
        word = super().__new__(cls, text)
        word.line = line
        word.why = why
        return word


def words_of_launch(words: Sequence[str]) -> tuple[list[str], str]:
    """The flags that a user gave as such, or as a launch script's path with further flags; and what to call them.

    Raises:
        InputError: as `words_of_script`.
    """
    script = Path(words[0]) if words else Path()
    if not words or words[0].startswith("-") or script.suffix == ".py" or not _is_script(script, alone=len(words) == 1):
        return [*words], "flags"
    arguments = [*takewhile(lambda word: not word.startswith("-"), words[1:])]
    return [*words_of_script(script, arguments), *words[1:]], shortened(str(script), 100)


def _is_script(path: Path, *, alone: bool) -> bool:
    """Returns whether a word is a launch script: by its name, because it is there, or as it cannot be a command's."""
    try:
        return alone or path.suffix == ".sh" or path.is_file()
    except (OSError, ValueError):
        return False


def words_of_script(path: Path, arguments: Sequence[str] = ()) -> list[str]:
    """Returns the words after the Python script in the one command of a launch script that has flags of a model.

    Variables that the script sets are put in; others stay, as `$NAME`, and `model_from_flags` refuses them where they
    matter. Each word knows its line.

    Flags of the model that a variable gets under a condition come as `--flag=$NAME`.

    Args:
        path: of the script.
        arguments: what it would be started with, for `$1` and its like; without any, these are not known.

    Raises:
        InputError: the file cannot be read, has no such command, or several that differ.
    """
    text, named = read_text(path), shortened(str(path), 100)
    try:
        reader = _Reader(*parsed(text), path.parent, arguments)
        reader.read()
        return [*reader.launch(named)]
    except (RecursionError, UnreadableError) as error:
        line = getattr(error, "line", None)
        what = f"line {line} is no bash that can be read" if line else "too long, or nested too deeply, to be read"
        raise InputError(f"{named}: {what}. Give the flags in its place.") from None


# ---- variables -----------------------------------------------------------------------------------------------------

_NAME = re.compile(r"([A-Za-z_]\w*)(?:\[.*|\+?=.*)?", re.DOTALL)
_OPERATED = r"(?:[-+*/%&|^]|<<|>>)?=(?!=)|\+\+|--"
_SET_BY_ARITHMETIC = re.compile(
    rf"(?:\+\+|--)\s*(?P<before>[A-Za-z_]\w*)|(?P<name>[A-Za-z_]\w*)(?:\[[^\]]*\])?\s*(?:{_OPERATED})"
    rf"|(?P<any>\$\{{?\w+\}}?\s*(?:{_OPERATED})|(?:\+\+|--)\s*\$)"
)
_SET_BY_DEFAULT = re.compile(r"\$\{([A-Za-z_]\w*)(?:\[[^\]]*\])?:?=")
_SUBSHELL = re.compile(r"\$\((?!\()|`")
_SHELLS = frozenset({"bash", "sh", "zsh", "dash", "ksh"})
_LAUNCHERS = frozenset({"torchrun", "python", "python3", "srun", "mpirun", "eval"})
_POSITIONS = tuple("123456789")
"""The script's arguments, as variables."""
_FOLDER = re.compile(
    r"""\$\(\s*cd\s+(?:--\s+)?"?\$\(\s*dirname\s+(?:--\s+)?"?(?:\$\{BASH_SOURCE(?:\[0\])?\}|\$BASH_SOURCE|\$0)"?\s*\)
    (?P<below>[/.\w-]*)"?\s*(?:&?>\s*/dev/null(?:\s+2>&1)?\s*)?(?:&&|;)\s*pwd(?:\s+-P)?\s*\)""",
    re.VERBOSE,
)
_OWN_ARGS = re.compile(r"(?:mup-megatron|python3? -m mup_megatron) args ")
_MOST_SEEN_AGAIN = 100_000
_MOST_COMMANDS = 200
"""Variables that hold a command."""
_LONGEST = 100_000
"""Characters of a variable. `A=$A$A` doubles it, and so a short script could fill any memory."""
_ANY = "$"
"""Stands for every variable."""
_Reason = tuple[int, str]
"""The line where a variable became unknown, and why where that is not plain to see."""
_Flags = tuple[tuple[str, int], ...]
"""Flags of the model, and the line that each comes from."""


@dataclass(frozen=True, slots=True)
class _Variable:
    """Holds what is known of a variable that has been set."""

    values: tuple[Word, ...] | None
    """An array's elements, or one text; None where they are not known."""
    reason: _Reason | None = None
    """Of the first place that made it unknown."""
    flags: _Flags = ()
    """Those that it gets under a condition."""


class _Reader:
    """Holds what is known of a script's variables so far, and its commands that have flags of a model."""

    def __init__(
        self, commands: Sequence[Command], functions: Set[str], folder: Path, arguments: Sequence[str]
    ) -> None:
        self._commands = commands
        self._folder = folder
        self._functions = functions
        self._in_functions = [command for command in commands if command.function]
        given = zip(_POSITIONS, arguments, strict=False)
        self._variables = {} if arguments else dict.fromkeys(_POSITIONS, _Variable(None, (0, "")))
        self._variables |= {position: _Variable((Word(word, 0),)) for position, word in given}
        self._others_unknown: _Reason | None = None
        """Set where any variable may have been set; then those that `_variables` lacks are unknown."""
        self._fixed: set[str] = set()
        """Variables that are `readonly`: nothing changes them any more."""
        self._special: set[str] = set()
        """Variables to which an assignment means something else: other variables' names, integers, upper case."""
        self._conditional = False
        self._seen_again = 0
        """Commands that were looked at because they may run later or repeatedly."""
        self._found: list[list[Word]] = []
        self._unread: dict[str, int] = {}
        """Where something was started without: what its flags can be in, and the line that this comes from."""

    def read(self) -> None:
        """Takes all commands. A function's see what is known where it stands and nothing else sets."""
        in_loop: defaultdict[int, list[Command]] = defaultdict(list)
        for command in self._commands:
            for loop in command.loops:
                in_loop[loop].append(command)
        inside = 0
        outside = self._variables, self._others_unknown
        for index, command in enumerate(self._commands):
            if command.function != inside:
                self._leave(inside, outside)
                inside, outside = command.function, ({**self._variables}, self._others_unknown)
                if inside:
                    self._forget_arguments(command.line)  # inside, they are the function's
                    self._may_have_run([c for i, c in enumerate(self._commands) if c.function or i > index])
            for loop in [loop for loop in command.loops if loop in in_loop]:
                self._may_have_run(in_loop.pop(loop))
            self._take(command)
        self._leave(inside, outside)

    def _leave(self, function: int, outside: tuple[dict[str, _Variable], _Reason | None]) -> None:
        if function:
            self._variables, self._others_unknown = outside
            self._may_have_run([command for command in self._commands if command.function == function])

    def _take(self, command: Command) -> None:
        """Carries out assignments, and keeps a command that has flags of a model."""
        self._conditional = command.conditional
        assignments, others = _assignments(command)
        fields: list[Word] = []
        if others and others[0].plain not in DECLARATIONS:
            fields = [expanded for word in _for_a_shell(others) for expanded in self._expanded(word)]
            self._keep(fields)
        for word in assignments:
            self._assign(word)
        self._set_otherwise(command, fields or [word.text for word in others])
        if command.words[0].plain == "readonly" and not command.conditional and not command.function:
            names = {word.name or word.text for word in command.words[1:]}
            self._fixed |= {name for name in names if self._values(name) is not None}
        called = {str(field) for field in fields} & self._functions or any("$" in field for field in fields[:1])
        if called:
            self._may_have_run(self._in_functions)

    def _may_have_run(self, commands: Sequence[Command]) -> None:
        """Notes that what these commands set is not known, in whatever order and however often they run."""
        self._conditional = True
        self._seen_again += len(commands)
        if self._seen_again > _MOST_SEEN_AGAIN:
            raise UnreadableError
        for command in commands:
            assignments, others = _assignments(command)
            for word in assignments:
                self._assign(word, once=False)
            self._set_otherwise(command, [word.text for word in others])

    def _set_otherwise(self, command: Command, words: Sequence[str]) -> None:
        texts = [token.text for word in command.words for token in (word, *(word.array or ()))]
        if words and words[0] in ("shift", "set") and not command.function:
            self._shift(words, command.line)
        why = f"line {command.line} ({' '.join(texts[:2])}) may set it"
        names = _set_by(words) | _set_by_expansion(texts)
        # What `_value` has set is known; not so in other expansions than those that it knows.
        names |= {name for name in _set_by_default(command) if self._conditional or name not in self._variables}
        if words and words[0] in DECLARATIONS and any(re.match(r"[-+].*[inluc]", word) for word in words[1:]):
            self._special |= names
        if _ANY in names:
            self._others_unknown = (command.line, why)
            names = {*names, *self._variables} - {_ANY}
        for name in sorted(names):
            self._forget(name, command.line, why)

    def _shift(self, words: Sequence[str], line: int) -> None:
        """Takes the script's arguments on as `shift` does; otherwise, and where it may not run, they are not known."""
        known = [self._values(position) for position in _POSITIONS]
        if words[0] == "set" and "--" not in words[1:]:
            return
        self._forget_arguments(line)
        if [*words] == ["shift"] and not self._conditional:
            for position, values in zip(_POSITIONS, known[1:], strict=False):
                if values is not None:
                    self._variables[position] = _Variable(values)

    def _forget_arguments(self, line: int) -> None:
        for position in _POSITIONS:
            self._forget(position, line)

    def _forget(self, name: str, line: int, why: str = "", flags: _Flags = ()) -> None:
        """Makes a variable unknown; flags of the model that it had, or gets here, it may have."""
        if name not in self._fixed:
            old = self._variables.get(name, _Variable(None))
            had = (*old.flags, *flags, *self._flags_of_the_model(old.values or (), line))
            lines = dict(reversed(had))
            kept = tuple((flag, lines[flag]) for flag in dict.fromkeys(flag for flag, _ in had))
            self._variables[name] = _Variable(None, old.reason or (line, why), kept)

    def _values(self, name: str) -> tuple[Word, ...] | None:
        return self._variables[name].values if name in self._variables else None

    def _reason(self, name: str) -> _Reason | None:
        """Returns where a variable has become unknown; None where it is known or was never set."""
        known = self._variables.get(name)
        return known.reason if known else self._others_unknown

    def _assign(self, word: Token, *, once: bool = True) -> None:
        name, line = word.name, word.line
        old = self._variables.get(name, _Variable(None))
        if name in self._fixed:
            return
        if name in self._special:
            why = f"line {line} ({word.text}) may set it"
            self._others_unknown = (line, why)
            for other in [*self._variables]:
                self._forget(other, line, why)
            return
        added = word if word.appends else _beside_itself(word)
        if added is not None and (self._conditional or self._reason(name) is not None):
            self._append_conditionally(added)
            return
        new = self._assigned(word)
        if self._conditional:
            if not (once and old.values == new):
                why = "" if once else f"line {line} ({word.text}) may set it"
                self._forget(name, line, why, self._flags_of_the_model(new, line))
            return
        if word.appends and old.values:
            first = new[:1] if word.array is None else ()
            new = (Word(old.values[0] + "".join(first), old.values[0].line), *old.values[1:], *new[len(first) :])
        if sum(len(each) + 1 for each in new) > _LONGEST:
            self._forget(name, line, f"line {line} makes it longer than {_LONGEST} characters")
            return
        self._variables[name] = _Variable(new, flags=old.flags if added is not None else ())

    def _assigned(self, word: Token) -> tuple[Word, ...]:
        """Returns what a variable gets from the part of an assignment after `=`."""
        if word.array is not None:
            return tuple(expanded for element in word.array for expanded in self._expanded(element))
        return (Word(self._text(word.parts), word.line),)

    def _append_conditionally(self, word: Token) -> None:
        """Appends what may be there or not: if it is not about the model, the rest of the variable stays known."""
        name, line, new = word.name, word.line, self._assigned(word)
        flags = self._flags_of_the_model(new, line)
        old = self._variables.get(name, _Variable(None))
        if old.values is None or not _stands_apart(new, array=word.array is not None):
            self._forget(name, line, flags=flags)
            return
        marks = tuple(Word(f"{flag}=${name}", line) for flag, _ in flags)
        marks = tuple(mark for mark in marks if mark not in _split(old.values))
        values = (*old.values, *marks)
        if word.array is None:
            values = (
                Word(" ".join((*old.values[:1], *marks)), old.values[0].line if old.values else line),
                *old.values[1:],
            )
        self._variables[name] = _Variable(
            values, old.reason, (*old.flags, *(f for f in flags if f[0] not in dict(old.flags)))
        )

    def _flags_of_the_model(self, values: Sequence[Word], line: int) -> _Flags:
        names = [said.partition("=")[0] for word in _split(values) for said in self._said(word)]
        return tuple((name, line) for name in names if name in _model_flags())

    def _text(self, parts: Sequence[WordPart]) -> str:
        """Parts of a word as one text: what an assignment gets."""
        return "".join(" ".join(self._value(part)) for part in parts)

    def _value(self, part: WordPart) -> tuple[Word, ...]:
        """Returns what a part of a word stands for; itself where that is not known."""
        values = self._values(part.name)
        unset = values is None and self._reason(part.name) is None
        if not part.expands:
            return (Word(part.text, 0),)
        if part.operator and (unset or (":" in part.operator and values is not None and not any(values))):
            default = (Word(self._text(part.default), 0),)
            if "=" in part.operator and not self._conditional:
                self._variables[part.name] = _Variable(default)
            return default
        if values is None:
            known = None if part.name else self._substituted(part)
            # Without blanks, so that it stays one word.
            return (known or Word(re.sub(rf"[{SPACE}].*", "…)", part.text, flags=re.DOTALL), 0),)
        return values if part.whole else values[:1] or (Word("", 0),)

    def _substituted(self, part: WordPart) -> Word | None:
        """The output of the two commands that are known, the way to the script's folder and `mup-megatron args`."""
        if folder := _FOLDER.fullmatch(part.text):
            return Word(str((self._folder / folder["below"].lstrip("/")).resolve()), 0)
        if not (own := _OWN_ARGS.match(" ".join(word.plain for word in part.words))):
            return None
        words = iter([field for token in part.words[len(own[0].split()) :] for field in self._expanded(token)])
        for word in words:
            if word in ("--recipe", "--train-iters"):
                next(words, None)
            elif not word.startswith("-"):
                file = Path(word)
                return Word(" ".join(flags(load_model_file(file))), 0) if file.is_file() else None
        return None

    def _expanded(self, word: Token) -> list[Word]:
        """Returns the words that a word becomes: an array's own, and those of a text that is not quoted."""
        line = word.line
        fields: list[Word] = [Word(f"{word.name}=" if word.name else "", line)]
        for part in word.parts:
            values = self._value(part)
            if part.expands and not part.quoted:
                values = _split(values)
            for index, value in enumerate(values):
                if index:
                    fields.append(Word("", value.line or line))
                at = fields[-1].line if fields[-1] or not part.expands else value.line or line
                fields[-1] = Word(fields[-1] + value, at)
        quoted = any(part.quoted for part in word.parts)
        return fields if quoted and len(fields) == 1 else [field for field in fields if field]

    # ---- the launch ------------------------------------------------------------------------------------------------

    def _keep(self, words: Sequence[Word]) -> None:
        if words and words[0] in ("echo", "printf", ":"):
            return
        # `bash -c "$COMMAND"` and `eval` have a whole command in one word.
        flat = [part for word in words for part in (_split((word,)) if re.search(r"\s--\w", word) else (word,))]
        scripts = [index for index, word in enumerate(flat) if word.endswith(".py")]
        after = flat[scripts[0] + 1 :] if scripts else flat
        after = [self._explained(said) for word in after for said in self._said(word)]
        if any(word.partition("=")[0] in _model_flags() for word in after):
            self._found.append(after)
        elif scripts or not _LAUNCHERS.isdisjoint(flat):
            for word in after:
                if unresolved(word) == word:
                    reason = self._reason(_variable(word)) if _variable(word) else None
                    self._unread.setdefault(str(word), reason[0] if reason else word.line)

    def launch(self, source: str) -> list[Word]:
        """Returns the words of the one command that has flags of a model."""
        self._found = self._found or self._in_variables(source)
        if not self._found:
            raise InputError(
                f"{source}: no command with a model's flags, such as --num-layers, was found. "
                f"{self._where_they_may_be()}"
            )
        first, *others = self._found
        said = _what_matters(first)
        for other in others:
            here = _what_matters(other)
            differ = [name for name in said | here if said.get(name) != here.get(name)]
            if differ:
                raise InputError(
                    f"{source}: two commands describe different models, with flags from lines {first[0].line} and "
                    f"{other[0].line}; they differ in {brief(differ[0], 60)}. Give the flags of one of them in the "
                    "script's place."
                )
        return first

    def _in_variables(self, source: str) -> list[list[Word]]:
        """The commands, or the flags, that variables hold: of a script that starts nothing which is seen to have them.

        What another one of them contains is a part of that.
        """
        values = {name: variable.values or () for name, variable in self._variables.items()}
        split = {name: _split(each) for name, each in values.items() if "--num-layers" in " ".join(each)}
        held = {name: words for name, words in split.items() if any(w.startswith("--num-layers") for w in words)}
        if len(held) > _MOST_COMMANDS:
            raise UnreadableError
        texts = {name: f" {' '.join(words)} " for name, words in held.items()}
        found: dict[str, list[Word]] = {}
        for name, words in held.items():
            if not any(len(texts[name]) < len(text) and texts[name] in text for text in texts.values()):
                found.setdefault(texts[name], [said for word in words for said in self._said(word)])
                self._require_used_where_known(name, source)
        return sorted(found.values(), key=lambda words: not any(word.endswith(".py") for word in words))

    def _require_used_where_known(self, name: str, source: str) -> None:
        """Raises InputError where a variable becomes a part of another one whose value is not known."""
        for word in (word for command in self._commands for word in _assignments(command)[0]):
            if self._values(word.name) is None and any(part.name == name for part in word.parts):
                raise InputError(
                    f"{source}: the flags in {brief(name, 60)} are a part of {brief(word.name, 60)} "
                    f"(line {word.line}), which cannot be read off the script. Give the flags in its place."
                )

    def _where_they_may_be(self) -> str:
        if not self._unread:
            return "Give the script that starts the training, or the flags in its place."
        places = [f"{shortened(word, 30)} (line {line})" for word, line in self._unread.items()]
        some = f"{', '.join(places[:2])}{' and others' if len(places) > 2 else ''}"
        own = "the script's own arguments behind it, or " if self._reason("1") else ""
        return f"They may be in {some}, which cannot be read off the script. Give {own}the flags in its place."

    def _explained(self, word: Word) -> Word:
        # After H=${H:-1}, H is set and its word still says ${H:-1}: there what any variable may have become is why.
        names = re.findall(r"\$\{?([A-Za-z_]\w*)", word)
        reasons = [self._reason(name) or self._others_unknown for name in names]
        return Word(word, word.line, next((reason[1] for reason in reasons if reason), word.why))

    def _said(self, word: Word) -> list[Word]:
        """The word; or, for a variable that gets flags under a condition, these, with the variable as unknown value."""
        name = _variable(word)
        flags = self._variables[name].flags if name in self._variables else ()
        if word.startswith("-"):
            # The mark of such a flag beside what else the variable has. A text's words have lost their lines.
            lines = [line for flag, line in flags if word == f"{flag}=${name}"]
            return [Word(word, lines[0])] if lines else [word]
        return [Word(f"{flag}={word}", line) for flag, line in flags] or [word]


def _assignments(command: Command) -> tuple[list[Token], list[Token]]:
    """Returns the assignments that a command is for, and its other words. Those before a command are for that alone."""
    words = command.words
    assignments = [word for word in words if word.name]
    if words[0].plain in DECLARATIONS:
        plain = not any(re.match(r"[-+].*[inluc]", word.plain) for word in words[1:])
        return assignments, [word for word in words if not (plain and word.name)]
    return (assignments, []) if len(assignments) == len(words) else ([], [*words])


def _for_a_shell(words: Sequence[Token]) -> Iterator[Token]:
    """Yields the words of a command; of `bash -c '…'`, the text as that shell expands it."""
    shell = False
    for before, word in zip((None, *words), words, strict=False):
        if shell and before is not None and re.fullmatch(r"-\w*c", before.plain):
            word = within_quotes(re.sub(r"\\(?=\$)|[\"']", "", word.text), word.line)
        shell = shell or PurePosixPath(word.plain).name in _SHELLS
        yield word


def _set_by(words: Sequence[str]) -> set[str]:
    """Returns the variables that a command sets otherwise than by assignments; with `_ANY` where it can be any."""
    names = set()
    for index, word in enumerate(words):
        element = re.match(r"([A-Za-z_]\w*)\[.*\]\+?=", word, re.DOTALL)
        names |= {element[1]} if element else set()
        if not element and not re.match(r"[A-Za-z_]\w*\+?=|-|(?:builtin|command|time)\Z", word):
            command, *given = words[index:]
            return names | _set_by_command(command, given)
    return names.union(*map(_target, words))


def _set_by_command(command: str, given: Sequence[str]) -> set[str]:
    match command:
        case "source" | "." | "eval":
            return {_ANY}
        case "let":
            return _set_by_arithmetic(" ; ".join(given))
        case "read" | "mapfile" | "readarray" | "getopts" | "unset":
            default = {"read": {"REPLY"}, "mapfile": {"MAPFILE"}, "readarray": {"MAPFILE"}}.get(command, set())
            return default.union(*map(_target, given))
        case "printf" | "wait":
            option = "-v" if command == "printf" else "-p"
            found = [after for word, after in pairwise(given) if word == option]
            found += [word[2:] for word in given if word.startswith(option)]
            return set().union(*map(_target, found))
        case "export" | "readonly":
            # A name alone keeps its value.
            return set().union(*(_target(word) for word in given if "=" in word or "$" in word or "`" in word))
        case "local" | "declare" | "typeset":
            return set().union(*map(_target, given))
    return _set_by_arithmetic(command) if command.startswith("((") else set()


def _target(word: str) -> set[str]:
    """Returns the variable that an argument names, if it can be one."""
    name = _NAME.fullmatch(word)
    if name:
        return {name[1]}
    return {_ANY} if re.match(r"[\w-]*[$`]", word) else set()


def _set_by_arithmetic(text: str) -> set[str]:
    found = _SET_BY_ARITHMETIC.finditer(text)
    return {_ANY if match["any"] else match["before"] or match["name"] for match in found}


def _set_by_expansion(texts: Sequence[str]) -> set[str]:
    """Returns what arithmetic in a command's words sets, as `$((A = 2))` does."""
    names: set[str] = set()
    for text in texts:
        for expression in re.findall(r"\$\(\((.*?)\)\)", text, re.DOTALL):
            names |= _set_by_arithmetic(expression)
    return names


def _set_by_default(command: Command) -> set[str]:
    """Returns what `${A:=1}` in a command's words sets, other than in `$(…)` and in single quotes."""
    parts = [part for word in command.words for token in (word, *(word.array or ())) for part in token.parts]
    here = [part.text for part in parts if (part.expands or not part.quoted) and not _SUBSHELL.match(part.text)]
    return {name for text in here for name in _SET_BY_DEFAULT.findall(text)}


def _stands_apart(added: Sequence[Word], *, array: bool) -> bool:
    """Returns whether what a variable gets beside its value are flags of their own, which leave those it had alone."""
    text = " ".join(added)
    return not text.strip() or ((array or text != text.strip()) and text.strip().startswith(("-", "$")))


def _variable(word: str) -> str:
    """Returns the name of the variable that a word, or the value of its flag, is as a whole; else nothing."""
    found = re.fullmatch(r"(?:--[\w-]+=)?\$\{?(\w+)(?:\[[@*]\])?\}?", word)
    return found[1] if found else ""


def _beside_itself(word: Token) -> Token | None:
    """Returns what stands beside the variable's own value: `A="$A …"`, `A="… $A"`, `A=("${A[@]}" …)`; else None."""

    def itself(part: WordPart) -> bool:
        return part.name == word.name and not part.default and "=" not in part.operator

    if word.array is not None:
        for index in {0, len(word.array) - 1} if word.array else ():
            if [itself(part) for part in word.array[index].parts] == [True]:
                return replace(word, array=word.array[:index] + word.array[index + 1 :])
        return None
    if word.parts and itself(word.parts[0]):
        return replace(word, parts=word.parts[1:])
    return replace(word, parts=word.parts[:-1]) if word.parts and itself(word.parts[-1]) else None


def _split(values: Sequence[Word]) -> tuple[Word, ...]:
    return tuple(Word(part, word.line) for word in values for part in re.findall(rf"[^{SPACE}]+", word))


def _model_flags() -> set[str]:
    return {flag.name for flag in of_models()}


def _what_matters(words: Sequence[Word]) -> dict[str, str]:
    """Returns the flags that are read, refused or not known, with their values: what else differs is without effect."""
    found = {}
    read = {flag.name: flag for flag in (*every(), *TOKENIZER)}
    for word, following in zip(words, (*words[1:], ""), strict=True):
        name, equals, attached = word.partition("=")
        row = row_of(name)
        if not name.startswith("--") or (row is not None and row.effect is Effect.HARMLESS):
            continue
        flag = read.get(name)
        takes = flag.parse is not None if flag else not following.startswith("-")
        found[name] = attached if equals else str(following) if takes else ""
    return found
