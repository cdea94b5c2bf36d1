"""The Megatron flags in a bash launch script, read and never executed.

Follows assignments, arrays, `+=` (also as `A="$A …"`) and `${A:-default}` from top to bottom, and functions where they
are written; `$1` and its like where the script's arguments are given; `$(mup-megatron args FILE …)`, which is what that
file says; and the usual way to the script's own folder, `$(cd "$(dirname "$0")/…" && pwd)`. It is no shell: what comes
from a condition, a loop, the environment or another program's output stays as it is written there, and is an error
where the model depends on it. So is what another file (`source`), `eval`, `read`, arithmetic, or a function that is
called may have set, unless it is `readonly` before. Not seen is what a function or a trap of another file sets when it
is called later.

It ends on every text: each token takes a character or more, and what is looked at again is counted.
"""

import bisect
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, replace
from itertools import pairwise, takewhile
from pathlib import Path, PurePosixPath

from mup_megatron.architectures.registry import load_model_file
from mup_megatron.errors import InputError
from mup_megatron.files import read_text
from mup_megatron.megatron.arguments.convert import flags
from mup_megatron.megatron.arguments.effects import Effect, row_of
from mup_megatron.megatron.arguments.table import TOKENIZER, every, of_models, unresolved
from mup_megatron.validation import brief, shortened


class Word(str):
    """A word of a script, the line that it comes from, and why its variable is unknown, if it is."""

    line: int
    why: str

    def __new__(cls, text: str, line: int, why: str = "") -> "Word":
        """The text as a string that knows its line, counted from 1."""
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
    """Whether a word is a launch script: by its name, because it is there, or because it cannot be a command's."""
    try:
        return alone or path.suffix == ".sh" or path.is_file()
    except (OSError, ValueError):
        return False


def words_of_script(path: Path, arguments: Sequence[str] = ()) -> list[str]:
    """The words after the Python script in the one command of a launch script that has flags of a model.

    Variables that the script sets are put in; others stay, as `$NAME`, and `model_from_flags` refuses them where they
    matter. Each word knows its line.

    Flags of the model that a variable gets under a condition come as `--flag=$NAME`.

    Args:
        path: of the script.
        arguments: what it would be started with, for `$1` and its like; without any, these are not known.

    Raises:
        InputError: the file cannot be read, has no such command, or several that differ.
    """
    text = read_text(path)
    try:
        commands = _Commands(_Lexer(text).tokens())
        reader = _Reader(commands.all(), commands.functions, path.parent, arguments)
        reader.read()
        return [*reader.launch(shortened(str(path), 100))]
    except (RecursionError, _TooMuchError):
        raise InputError(f"{path}: too long, or nested too deeply, to be read. Give the flags in its place.") from None


class _TooMuchError(Exception):
    """A script on which reading would take minutes; nobody wrote it by hand."""


# ---- words and operators -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Piece:
    """A part of a word that is quoted in one way."""

    text: str
    expands: bool
    quoted: bool


@dataclass(frozen=True, slots=True)
class _Token:
    """An operator, or a word as its pieces; a word that assigns an array has the array's words too."""

    line: int
    operator: str = ""
    pieces: tuple[_Piece, ...] = ()
    array: "tuple[_Token, ...] | None" = None

    @property
    def plain(self) -> str:
        """The text of a word in which nothing is quoted; else nothing."""
        return "" if any(piece.quoted for piece in self.pieces) else self.text

    @property
    def text(self) -> str:
        """The text of a word without its quotes."""
        return "".join(piece.text for piece in self.pieces)


_SPACE = r" \t\r\n"
"""What parts words: in bash blanks and newlines alone, whatever else Unicode has; and what Windows ends lines with."""
_BLANK = re.compile(r"(?:[ \t\r]|\\\r?\n)+|#[^\n]*")
# What they pass over they do not try again in another way (`++`): else a bracket that is never closed costs the square.
_ARITHMETIC = re.compile(r"\(\((?:[^()]++|\((?:[^()]++|\([^()]*+\))*+\))*+\)\)")
_OPERATOR = re.compile(r"\n|;;&|;;|;&|&&|\|\||\|&|&>>|&>|\d*(?:<<<|<<-?|>&|<&|>>|[<>])|[;&|()]")
"""With the descriptor that a redirection may begin with, as in `2>&1`."""
_SUBSTITUTION = r"\$\((?:[^()]++|\((?:[^()]++|\([^()]*+\))*+\))*+\)|`[^`]*`|\$\{(?:[^{}]++|\{[^{}]*+\})*+\}"
_PIECE = re.compile(
    rf"""\$?'(?P<literal>[^']*)' | "(?P<double>(?:[^"\\]|\\.)*)" | \\(?P<escaped>.)
       | (?P<bare>{_SUBSTITUTION} | \$\w* | [^{_SPACE};&|<>()'"\\`$]+ | .)""",
    re.DOTALL | re.VERBOSE,
)
_END_OF_WORD = re.compile(rf"[{_SPACE};&|<>()]|\\\r?\n|\Z")
_ARRAY = re.compile(r"[A-Za-z_]\w*\+?=")


class _Lexer:
    """A script's text as words and operators, without comments and here-documents."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._position = 0
        self._line_ends = [match.start() for match in re.finditer("\n", text)]

    def tokens(self) -> Iterator[_Token]:
        """All of them, in order."""
        ends: list[str] = []
        heredoc = ""
        while (token := self._next()) is not None:
            yield token
            if heredoc and not token.operator:
                tabs = r"\t*" if heredoc == "<<-" else ""
                ends.append(rf"^{tabs}{re.escape(token.text)}\r?$|\Z")
            heredoc = token.operator if token.operator in ("<<", "<<-") else ""
            if token.operator == "\n":
                for pattern in ends:
                    end = re.compile(pattern, re.MULTILINE).search(self._text, self._position)
                    assert end is not None
                    self._position = end.end()
                ends = []

    def _next(self, *, in_array: bool = False) -> _Token | None:
        """The next of them, which is at least a character long; none at the end."""
        while blank := _BLANK.match(self._text, self._position):
            self._position = blank.end()
        if self._position == len(self._text):
            return None
        line = bisect.bisect_left(self._line_ends, self._position) + 1
        if arithmetic := _ARITHMETIC.match(self._text, self._position):
            self._position = arithmetic.end()
            return _Token(line, pieces=(_Piece(arithmetic[0], expands=False, quoted=False),))
        if operator := _OPERATOR.match(self._text, self._position):
            self._position = operator.end()
            return _Token(line, operator[0].lstrip("0123456789"))
        return self._word(line, in_array=in_array)

    def _word(self, line: int, *, in_array: bool) -> _Token:
        pieces: list[_Piece] = []
        # Blanks and operators were looked for before, and what begins neither is a piece: a word has one or more.
        while not (pieces and _END_OF_WORD.match(self._text, self._position)):
            found = _PIECE.match(self._text, self._position)
            assert found is not None
            assert found.end() > self._position
            self._position = found.end()
            match found.lastgroup:
                case "literal" | "escaped":
                    pieces.append(_Piece(found[found.lastgroup], expands=False, quoted=True))
                case "double":
                    pieces.append(_Piece(re.sub(r"\\\n", "", found["double"]), expands=True, quoted=True))
                case _:
                    pieces.append(_Piece(found[0], expands=True, quoted=False))
        word = _Token(line, pieces=tuple(pieces))
        if in_array or not (_ARRAY.fullmatch(word.plain) and self._text.startswith("(", self._position)):
            return word  # an array's elements are no arrays
        self._position += 1
        elements: list[_Token] = []
        while (token := self._next(in_array=True)) is not None and token.operator != ")":
            elements += [] if token.operator else [token]
        return _Token(line, pieces=word.pieces, array=tuple(elements))


# ---- commands ------------------------------------------------------------------------------------------------------

_DEEPEST = 100
"""Constructs within each other."""
_REDIRECTIONS = {"<", ">", ">>", "<<", "<<-", "<<<", "&>", "&>>", ">&", "<&"}
_OPENING = {"if": "fi", "while": "done", "until": "done", "for": "done", "select": "done", "case": "esac", "{": "}"}
_BETWEEN = {"then", "else", "elif", "do", "!", "time"}


@dataclass(frozen=True, slots=True)
class _Command:
    """The words of one simple command, and where it stands."""

    words: tuple[_Token, ...]
    conditional: bool
    """It may not run, or repeatedly, or in a shell of its own, as in `(…)` and `… | …`. In a function: once called."""
    function: int
    """The outermost function that it is in, counted from 1; 0 is none."""
    loops: tuple[int, ...]
    """The loops that it is in, counted likewise."""

    @property
    def line(self) -> int:
        """Where it begins."""
        return self.words[0].line


@dataclass(frozen=True, slots=True)
class _Open:
    """A construct that has begun: the word that ends it, and how many commands came before it."""

    end: str
    before: int
    conditional: bool
    function: int = 0
    loop: int = 0


class _Commands:
    """Simple commands in textual order. Redirections' targets are left out; functions are taken where they stand."""

    def __init__(self, tokens: Iterator[_Token]) -> None:
        self._tokens = [*tokens, _Token(0, "\n")]
        self.functions: set[str] = set()
        """The names of the script's functions."""
        self._found: list[_Command] = []
        self._open: list[_Open] = []
        self._words: list[_Token] = []
        self._chained = False
        """The command comes after `&&`, `||` or `|`."""
        self._after_subshell = False
        """What follows on the line may belong to a command that has a `<(…)`."""
        self._defines = False
        """A function's name has been read, its body comes next."""
        self._constructs = 0

    def all(self) -> list[_Command]:
        """All of them."""
        redirected = False
        named_at = -1
        for index, token in enumerate(self._tokens):
            if not token.operator:
                self._words += [] if redirected else [token]
                redirected = False
            elif token.operator in _REDIRECTIONS:
                redirected = True
            elif token.operator == "(" and self._words and self._tokens[index + 1].operator == ")":
                self._define(self._words.pop())
                named_at, redirected = index + 1, False
            elif index != named_at:
                self._separate(token.operator)
                redirected = False
        return self._found

    def _define(self, name: _Token) -> None:
        self.functions.add(name.text)
        self._defines = True

    def _separate(self, operator: str) -> None:
        words = self._words
        chained = operator in ("&&", "||", "|", "|&") or (self._chained and not words and operator == "\n")
        if operator == ")" and words and self._closes("esac") and words[0].plain not in ("case", "esac"):
            words.clear()  # a pattern
        in_own_shell = operator in ("|", "|&", "&")
        self._take_keywords(in_own_shell)
        if words:
            outermost = next((i for i, open_ in enumerate(self._open) if open_.function), 0)
            conditional = any(open_.conditional for open_ in self._open[outermost:])
            self._found.append(
                _Command(
                    tuple(words),
                    conditional or self._chained or self._after_subshell or in_own_shell,
                    self._open[outermost].function if self._open else 0,
                    tuple(open_.loop for open_ in self._open if open_.loop),
                )
            )
            words.clear()
        if operator == "(":
            self._begin("(", ")")
        self._after_subshell = operator == ")" and self._closes(")")
        if self._after_subshell:
            self._open.pop()
        self._chained = chained

    def _closes(self, end: str) -> bool:
        return bool(self._open) and self._open[-1].end == end

    def _begin(self, keyword: str, end: str) -> None:
        if len(self._open) == _DEEPEST:
            raise _TooMuchError
        self._constructs += 1
        conditional = keyword != "{"
        function = 0
        if self._defines and not any(open_.function for open_ in self._open):
            function = self._constructs
        else:
            conditional = conditional or self._chained or self._defines
        self._defines = False
        loop = self._constructs if end == "done" else 0
        self._open.append(_Open(end, len(self._found), conditional, function, loop))

    def _take_keywords(self, in_own_shell: bool) -> None:
        """Takes a command's keywords off it, and keeps account of the constructs that are open."""
        words = self._words
        while words:
            first = words[0].plain
            if first in _OPENING:
                self._begin(first, _OPENING[first])
                if first == "case":
                    words.clear()
                elif first in ("for", "select"):
                    words[:] = words[1:2]
                    if words and not words[0].plain.startswith("(("):
                        # The loop's variable is set, to what cannot be known.
                        words[0] = _Token(words[0].line, pieces=(_Piece(f"{words[0].plain}=$", True, False),))
                    return
                else:
                    del words[0]
                continue
            if first and self._closes(first):
                ended = self._open.pop()
                if in_own_shell and not ended.function:
                    self._found[ended.before :] = [
                        replace(command, conditional=True) for command in self._found[ended.before :]
                    ]
            elif first == "function" and len(words) > 1:
                self._define(words.pop(1))
            elif first not in _BETWEEN and first != "function":
                return
            del words[0]


# ---- variables -----------------------------------------------------------------------------------------------------

_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)(\+?)=(.*)", re.DOTALL)
_DECLARATIONS = {"export", "declare", "typeset", "local", "readonly"}
_EXPANSION = re.compile(
    r"\$(?:\{(?P<braced>[A-Za-z_]\w*|[1-9])(?P<index>\[[@*]\])?(?:(?P<operator>:?[-=])(?P<default>.*))?\}"
    rf"|(?P<plain>[A-Za-z_]\w*|[1-9]))|{_SUBSTITUTION}|\$[\d@*#?!$-]|\\(?P<escaped>[$`\"\\])",
    re.DOTALL,
)
_NAME = re.compile(r"([A-Za-z_]\w*)(?:\[.*|\+?=.*)?", re.DOTALL)
_OPERATED = r"(?:[-+*/%&|^]|<<|>>)?=(?!=)|\+\+|--"
_SET_BY_ARITHMETIC = re.compile(
    rf"(?:\+\+|--)\s*(?P<before>[A-Za-z_]\w*)|(?P<name>[A-Za-z_]\w*)(?:\[[^\]]*\])?\s*(?:{_OPERATED})"
    rf"|(?P<any>\$\{{?\w+\}}?\s*(?:{_OPERATED})|(?:\+\+|--)\s*\$)"
)
_SET_BY_DEFAULT = re.compile(r"\$\{([A-Za-z_]\w*):?=")
_SHELLS = frozenset({"bash", "sh", "zsh", "dash", "ksh"})
_LAUNCHERS = frozenset({"torchrun", "python", "python3", "srun", "mpirun", "eval"})
_POSITIONS = tuple("123456789")
"""The script's arguments, as variables."""
_FOLDER = re.compile(
    r"""\$\(\s*cd\s+(?:--\s+)?"?\$\(\s*dirname\s+(?:--\s+)?"?(?:\$\{BASH_SOURCE(?:\[0\])?\}|\$BASH_SOURCE|\$0)"?\s*\)
    (?P<below>[/.\w-]*)"?\s*(?:&?>\s*/dev/null(?:\s+2>&1)?\s*)?(?:&&|;)\s*pwd(?:\s+-P)?\s*\)""",
    re.VERBOSE,
)
_OWN_ARGS = re.compile(r"\$\(\s*(?:mup-megatron|python3?\s+-m\s+mup_megatron)\s+args\s+(?P<words>.*)\)", re.DOTALL)
_MOST_SEEN_AGAIN = 100_000
_MOST_COMMANDS = 200
"""Variables that hold a command."""
_LONGEST = 100_000
"""Characters of a variable. `A=$A$A` doubles it, and so a short script could fill any memory."""
_ANY = "$"
"""Stands for every variable."""
_Value = tuple[Word, ...] | Word
_Reason = tuple[int, str]
"""The line where a variable became unknown, and why where that is not plain to see."""
_State = tuple[dict[str, _Value], dict[str, _Reason], _Reason | None, dict[str, list[tuple[str, int]]]]


class _Reader:
    """What is known of a script's variables so far, and its commands that have flags of a model."""

    def __init__(
        self, commands: Sequence[_Command], functions: Set[str], folder: Path, arguments: Sequence[str]
    ) -> None:
        self._commands = commands
        self._folder = folder
        self._functions = functions
        self._in_functions = [command for command in commands if command.function]
        given = zip(_POSITIONS, arguments, strict=False)
        self._values: dict[str, _Value] = {position: Word(word, 0) for position, word in given}
        self._unknown: dict[str, _Reason] = {} if arguments else dict.fromkeys(_POSITIONS, (0, ""))
        """Variables that have been set, to what cannot be read off, and the first place where."""
        self._others_unknown: _Reason | None = None
        """Set where any variable may have been set; then those that `_values` lacks are unknown."""
        self._fixed: set[str] = set()
        """Variables that are `readonly`: nothing changes them any more."""
        self._special: set[str] = set()
        """Variables to which an assignment means something else: other variables' names, integers, upper case."""
        self._conditional_flags: dict[str, list[tuple[str, int]]] = {}
        """The flags of the model that a variable gets under a condition, and the line where."""
        self._conditional = False
        self._seen_again = 0
        """Commands that were looked at because they may run later or repeatedly."""
        self._found: list[list[Word]] = []
        self._unread: dict[str, int] = {}
        """Where something was started without: what its flags can be in, and the line that this comes from."""

    def read(self) -> None:
        """Takes all commands. A function's see what is known where it stands and nothing else sets."""
        in_loop: defaultdict[int, list[_Command]] = defaultdict(list)
        for command in self._commands:
            for loop in command.loops:
                in_loop[loop].append(command)
        loops: set[int] = set()
        inside = 0
        outside = self._state()
        for index, command in enumerate(self._commands):
            if command.function != inside:
                if inside:
                    self._leave(inside, outside)
                inside, outside = command.function, self._state()
                if inside:
                    self._forget_arguments(command.line)  # inside, they are the function's
                    self._may_have_run([c for i, c in enumerate(self._commands) if c.function or i > index])
            for loop in set(command.loops) - loops:
                loops.add(loop)
                self._may_have_run(in_loop[loop])
            self._take(command)
        if inside:
            self._leave(inside, outside)

    def _state(self) -> _State:
        flags = {name: [*flags] for name, flags in self._conditional_flags.items()}
        return {**self._values}, {**self._unknown}, self._others_unknown, flags

    def _leave(self, function: int, outside: _State) -> None:
        self._values, self._unknown, self._others_unknown, self._conditional_flags = outside
        self._may_have_run([command for command in self._commands if command.function == function])

    def _take(self, command: _Command) -> None:
        """Carries out assignments, and keeps a command that has flags of a model."""
        self._conditional = command.conditional
        assignments, others = self._parts(command)
        fields: list[Word] = []
        if others and others[0].plain not in _DECLARATIONS:
            fields = [expanded for word in _for_a_shell(others) for expanded in self._expanded(word)]
            self._keep(fields)
        for word in assignments:
            self._assign(word, conditional=command.conditional)
        self._set_otherwise(command, fields or [word.text for word in others])
        if command.words[0].plain == "readonly" and not command.conditional and not command.function:
            self._fixed |= {word.text.partition("=")[0] for word in command.words[1:]} & set(self._values)
        called = {str(field) for field in fields} & self._functions or any("$" in field for field in fields[:1])
        if called:
            self._may_have_run(self._in_functions)

    def _may_have_run(self, commands: Sequence[_Command]) -> None:
        """What these commands set is not known, in whatever order and however often they run."""
        self._conditional = True
        self._seen_again += len(commands)
        if self._seen_again > _MOST_SEEN_AGAIN:
            raise _TooMuchError
        for command in commands:
            assignments, others = self._parts(command)
            for word in assignments:
                self._assign(word, conditional=True, once=False)
            self._set_otherwise(command, [word.text for word in others])

    def _parts(self, command: _Command) -> tuple[list[_Token], list[_Token]]:
        """The assignments that a command is for, and its other words. Those before a command are for that alone."""
        words = command.words
        assignments = [word for word in words if self._assignment(word)]
        if words[0].plain in _DECLARATIONS:
            plain = not any(re.match(r"[-+].*[inluc]", word.plain) for word in words[1:])
            return assignments, [word for word in words if not (plain and self._assignment(word))]
        return (assignments, []) if len(assignments) == len(words) else ([], [*words])

    def _set_otherwise(self, command: _Command, words: Sequence[str]) -> None:
        texts = [token.text for word in command.words for token in (word, *(word.array or ()))]
        if words and words[0] in ("shift", "set") and not command.function:
            self._shift(words, command.line)
        why = f"line {command.line} ({' '.join(texts[:2])}) may set it"
        names = _set_by(words) | _set_by_expansion(texts)
        if self._conditional:  # else it is known, see _value
            names |= {name for text in texts for name in _SET_BY_DEFAULT.findall(text)}
        if words and words[0] in _DECLARATIONS and any(re.match(r"[-+].*[inluc]", word) for word in words[1:]):
            self._special |= names
        if _ANY in names:
            self._others_unknown = (command.line, why)
            names = {*names, *self._values} - {_ANY}
        for name in sorted(names):
            self._forget(name, command.line, why)

    def _shift(self, words: Sequence[str], line: int) -> None:
        """Takes the script's arguments on as `shift` does; otherwise, and where it may not run, they are not known."""
        known = [self._values.get(position) for position in _POSITIONS]
        if words[0] == "set" and "--" not in words[1:]:
            return
        self._forget_arguments(line)
        if [*words] == ["shift"] and not self._conditional:
            for position, value in zip(_POSITIONS, known[1:], strict=False):
                if value is not None:
                    self._values[position] = value

    def _forget_arguments(self, line: int) -> None:
        for position in _POSITIONS:
            self._forget(position, line)

    def _forget(self, name: str, line: int, why: str = "") -> None:
        if name in self._fixed:
            return
        old = self._values.pop(name, None)
        if old is not None:
            self._add_conditional_flags(name, self._flags_of_the_model(old, line))
        self._unknown.setdefault(name, (line, why))

    def _reason(self, name: str) -> _Reason | None:
        """Where a variable has become unknown; None where it is known or was never set."""
        return None if name in self._values else self._unknown.get(name, self._others_unknown)

    @staticmethod
    def _assignment(word: _Token) -> re.Match[str] | None:
        first = word.pieces[0]
        return None if first.quoted else _ASSIGNMENT.match("".join(_leading(word.pieces)))

    def _assign(self, word: _Token, *, conditional: bool, once: bool = True) -> None:
        match = self._assignment(word)
        assert match is not None
        name, appends = match[1], bool(match[2])
        whole = replace(word, pieces=tuple(_without_prefix(word.pieces, len(name) + len(match[2]) + 1)))
        added = whole if appends else _beside_itself(whole, name)
        if name in self._fixed:
            return
        if name in self._special:
            why = f"line {word.line} ({word.text}) may set it"
            self._others_unknown = (word.line, why)
            for other in [*self._values]:
                self._forget(other, word.line, why)
            return
        if added is not None and (conditional or self._reason(name) is not None):
            self._append_conditionally(name, self._assigned(added), word.line)
            return
        new = self._assigned(whole)
        if conditional:
            if not (once and self._values.get(name) == new):
                self._add_conditional_flags(name, self._flags_of_the_model(new, word.line))
                self._forget(name, word.line, "" if once else f"line {word.line} ({word.text}) may set it")
            return
        if added is None:
            self._conditional_flags.pop(name, None)
            self._unknown.pop(name, None)
        value = _joined(self._values.get(name), new) if appends else new
        if sum(len(each) + 1 for each in _words(value)) > _LONGEST:
            self._forget(name, word.line, f"line {word.line} makes it longer than {_LONGEST} characters")
            return
        self._values[name] = value

    def _assigned(self, word: _Token) -> _Value:
        """What a variable gets from the part of an assignment after `=`."""
        if word.array is not None:
            return tuple(expanded for element in word.array for expanded in self._expanded(element))
        return Word("".join(self._text(piece) for piece in word.pieces), word.line)

    def _append_conditionally(self, name: str, new: _Value, line: int) -> None:
        flags = self._flags_of_the_model(new, line)
        self._add_conditional_flags(name, flags)
        old = self._values.get(name)
        if old is None or not _stands_apart(new):
            self._forget(name, line)
            return
        # What is not about the model may be there or not: the rest of the variable stays known.
        marks = [f"{flag}=${name}" for flag, _ in flags]
        words = tuple(Word(mark, line) for mark in marks if mark not in _split(old))
        self._values[name] = (*old, *words) if isinstance(old, tuple) else Word(" ".join((old, *words)), old.line)

    def _add_conditional_flags(self, name: str, flags: Sequence[tuple[str, int]]) -> None:
        known = self._conditional_flags.setdefault(name, []) if flags else []
        known += [flag for flag in flags if flag[0] not in {flag_ for flag_, _ in known}]

    def _flags_of_the_model(self, value: _Value, line: int) -> list[tuple[str, int]]:
        names = [said.partition("=")[0] for word in _split(value) for said in self._said(word)]
        return [(name, line) for name in names if name in _model_flags()]

    def _text(self, piece: _Piece) -> str:
        """A piece as one text: what an assignment gets."""
        if not piece.expands:
            return piece.text
        return _EXPANSION.sub(lambda match: " ".join(_words(self._value(match))), piece.text)

    def _value(self, match: re.Match[str]) -> _Value:
        """What an expansion stands for; itself where that is not known."""
        if match["escaped"] is not None:
            return Word(match["escaped"], 0)
        name = match["braced"] or match["plain"]
        value = self._values.get(name) if name else None
        operator = match["operator"] or ""
        unset = value is None and self._reason(name or "") is None
        if operator and (unset or (":" in operator and value is not None and not any(_words(value)))):
            default = Word(self._text(_Piece(match["default"].strip("\"'"), expands=True, quoted=True)), 0)
            if "=" in operator and not self._conditional:
                self._values[name] = default
            return default
        if name is None and (known := self._substituted(match[0])) is not None:
            return known
        if value is None:
            # Without blanks, so that it stays one word.
            return Word(re.sub(rf"[{_SPACE}].*", "…)", match[0], flags=re.DOTALL), 0)
        if isinstance(value, tuple) and match["index"] is None:
            return value[0] if value else Word("", 0)
        return value

    def _substituted(self, text: str) -> Word | None:
        """The output of the two commands that are known, the way to the script's folder and `mup-megatron args`."""
        if folder := _FOLDER.fullmatch(text):
            return Word(str((self._folder / folder["below"].lstrip("/")).resolve()), 0)
        if (found := _OWN_ARGS.fullmatch(text)) is None:
            return None
        tokens = _Lexer(found["words"]).tokens()
        words = iter([field for token in tokens if not token.operator for field in self._expanded(token)])
        for word in words:
            if word in ("--recipe", "--train-iters"):
                next(words, None)
            elif not word.startswith("-"):
                file = Path(word)
                return Word(" ".join(flags(load_model_file(file))), 0) if file.is_file() else None
        return None

    def _expanded(self, word: _Token) -> list[Word]:
        """The words that a word becomes: an array's own, and those of a text that is not quoted."""
        fields: list[Word] = [Word("", word.line)]
        seen = False

        def add(text: str) -> None:
            fields[-1] = Word(fields[-1] + text, getattr(fields[-1], "line", word.line))

        for piece in word.pieces:
            seen = seen or piece.quoted
            position = 0
            for match in _EXPANSION.finditer(piece.text) if piece.expands else ():
                add(piece.text[position : match.start()])
                position = match.end()
                value = self._value(match)
                parts = value if isinstance(value, tuple) else (value,)
                if not piece.quoted:
                    parts = tuple(part for whole in parts for part in _split(whole))
                for index, part in enumerate(parts):
                    if index:
                        fields.append(Word("", part.line or word.line))
                    elif not fields[-1]:
                        fields[-1] = Word("", part.line or word.line)
                    add(part)
            add(piece.text[position:])
        return fields if seen and len(fields) == 1 else [field for field in fields if field]

    # ---- the launch ------------------------------------------------------------------------------------------------

    def _keep(self, words: Sequence[Word]) -> None:
        if words and words[0] in ("echo", "printf"):
            return
        # `bash -c "$COMMAND"` and `eval` have a whole command in one word.
        flat = [part for word in words for part in (_split(word) if re.search(r"\s--\w", word) else (word,))]
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
        """The words of the one command that has flags of a model."""
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
        split = {
            name: _split(value) for name, value in self._values.items() if "--num-layers" in " ".join(_words(value))
        }
        held = {name: words for name, words in split.items() if any(w.startswith("--num-layers") for w in words)}
        if len(held) > _MOST_COMMANDS:
            raise _TooMuchError
        texts = {name: f" {' '.join(words)} " for name, words in held.items()}
        found: dict[str, list[Word]] = {}
        for name, words in held.items():
            if not any(len(texts[name]) < len(text) and texts[name] in text for text in texts.values()):
                found.setdefault(texts[name], [said for word in words for said in self._said(word)])
                self._require_used_where_known(name, source)
        return sorted(found.values(), key=lambda words: not any(word.endswith(".py") for word in words))

    def _require_used_where_known(self, name: str, source: str) -> None:
        """Raises InputError where a variable becomes a part of another one whose value is not known."""
        for command in self._commands:
            for word in self._parts(command)[0]:
                match = self._assignment(word)
                target = match[1] if match else ""
                if target not in self._values and re.search(rf"\$\{{?{name}\b", word.text):
                    raise InputError(
                        f"{source}: the flags in {brief(name, 60)} are a part of {brief(target, 60)} "
                        f"(line {word.line}), which cannot be read off the script. Give the flags in its place."
                    )

    def _where_they_may_be(self) -> str:
        if not self._unread:
            return "Give the script that starts the training, or the flags in its place."
        places = [f"{shortened(word, 30)} (line {line})" for word, line in self._unread.items()]
        some = f"{', '.join(places[:2])}{' and others' if len(places) > 2 else ''}"
        own = "the script's own arguments behind it, or " if "1" in self._unknown else ""
        return f"They may be in {some}, which cannot be read off the script. Give {own}the flags in its place."

    def _explained(self, word: Word) -> Word:
        # After H=${H:-1}, H is set and its word still says ${H:-1}: there what any variable may have become is why.
        names = re.findall(r"\$\{?([A-Za-z_]\w*)", word)
        reasons = [self._reason(name) or self._others_unknown for name in names]
        return Word(word, word.line, next((reason[1] for reason in reasons if reason), word.why))

    def _said(self, word: Word) -> list[Word]:
        """The word; or, for a variable that gets flags under a condition, these, with the variable as unknown value."""
        name = _variable(word)
        flags = self._conditional_flags.get(name, ())
        if word.startswith("-"):
            # The mark of such a flag beside what else the variable has. A text's words have lost their lines.
            lines = [line for flag, line in flags if word == f"{flag}=${name}"]
            return [Word(word, lines[0])] if lines else [word]
        return [Word(f"{flag}={word}", line) for flag, line in flags] or [word]


def _for_a_shell(words: Sequence[_Token]) -> Iterator[_Token]:
    """The words of a command; of `bash -c '…'`, the text as that shell expands it."""
    shell = False
    for before, word in zip((None, *words), words, strict=False):
        if shell and before is not None and re.fullmatch(r"-\w*c", before.plain):
            text = re.sub(r"\\(?=\$)|[\"']", "", word.text)
            word = replace(word, pieces=(_Piece(text, expands=True, quoted=True),))
        shell = shell or PurePosixPath(word.plain).name in _SHELLS
        yield word


def _set_by(words: Sequence[str]) -> set[str]:
    """The variables that a command sets otherwise than by assignments; with `_ANY` where it can be any."""
    names = set()
    for index, word in enumerate(words):
        element = re.match(r"([A-Za-z_]\w*)\[.*\]\+?=", word, re.DOTALL)
        names |= {element[1]} if element else set()
        if not element and not _ASSIGNMENT.match(word) and word not in ("builtin", "command"):
            command, *given = words[index:]
            return names | _set_by_command(command, given)
    return names


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
    """The variable that an argument names, if it can be one."""
    name = _NAME.fullmatch(word)
    if name:
        return {name[1]}
    return {_ANY} if re.match(r"[\w-]*[$`]", word) else set()


def _set_by_arithmetic(text: str) -> set[str]:
    found = _SET_BY_ARITHMETIC.finditer(text)
    return {_ANY if match["any"] else match["before"] or match["name"] for match in found}


def _set_by_expansion(texts: Sequence[str]) -> set[str]:
    """What arithmetic in a command's words sets, as `$((A = 2))` does."""
    names: set[str] = set()
    for text in texts:
        for expression in re.findall(r"\$\(\((.*?)\)\)", text, re.DOTALL):
            names |= _set_by_arithmetic(expression)
    return names


def _stands_apart(added: _Value) -> bool:
    """Whether what a variable gets beside its value are flags of their own, which leave those it had as they are."""
    text = " ".join(_words(added))
    apart = isinstance(added, tuple) or text != text.strip()
    return not text.strip() or (apart and text.strip().startswith(("-", "$")))


def _variable(word: str) -> str:
    """The name of the variable that a word, or the value of its flag, is as a whole; else nothing."""
    found = re.fullmatch(r"(?:--[\w-]+=)?\$\{?(\w+)(?:\[[@*]\])?\}?", word)
    return found[1] if found else ""


def _beside_itself(word: _Token, name: str) -> _Token | None:
    """What is assigned beside the variable's own value: `A="$A …"`, `A="… $A"`, `A=("${A[@]}" …)`; else None."""
    itself = rf"(?<!\\)\$(?:{name}(?!\w)|\{{{name}(?:\[[@*]\])?(?::?-)?\}})"
    if word.array is not None:
        for index, element in enumerate(word.array):
            text = element.pieces[0].text if len(element.pieces) == 1 and element.pieces[0].expands else ""
            if index in (0, len(word.array) - 1) and re.fullmatch(itself, text):
                return replace(word, array=word.array[:index] + word.array[index + 1 :])
        return None
    pieces = [piece for piece in word.pieces if piece.text]
    for index, pattern in ((0, rf"\A{itself}"), (-1, rf"{itself}\Z")) if pieces else ():
        rest, found = re.subn(pattern, "", pieces[index].text)
        if found and pieces[index].expands:
            pieces[index] = replace(pieces[index], text=rest)
            return replace(word, pieces=tuple(pieces))
    return None


def _leading(pieces: Sequence[_Piece]) -> Iterator[str]:
    """The texts before the first quoted piece."""
    for piece in pieces:
        if piece.quoted:
            return
        yield piece.text


def _without_prefix(pieces: Sequence[_Piece], length: int) -> Iterator[_Piece]:
    """The pieces of a word without its first characters."""
    for piece in pieces:
        yield _Piece(piece.text[length:], piece.expands, piece.quoted)
        length = max(0, length - len(piece.text))


def _words(value: _Value) -> tuple[Word, ...]:
    return value if isinstance(value, tuple) else (value,)


_FIELD = re.compile(rf"[^{_SPACE}]+")


def _split(value: _Value) -> tuple[Word, ...]:
    return tuple(Word(part, word.line) for word in _words(value) for part in _FIELD.findall(word))


def _joined(old: _Value | None, new: _Value) -> _Value:
    if isinstance(new, tuple):
        return (*(_words(old) if old is not None else ()), *new)
    if isinstance(old, tuple):
        return (Word(old[0] + new, new.line), *old[1:]) if old else (new,)
    return Word(old + new, old.line) if old else new


def _model_flags() -> set[str]:
    return {flag.name for flag in of_models()}


def _what_matters(words: Sequence[Word]) -> dict[str, str]:
    """The flags that are read, refused or not known, with their values: what else differs is without effect."""
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
