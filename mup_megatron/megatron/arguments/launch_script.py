"""The Megatron flags in a bash launch script, read and never executed.

Follows assignments, arrays, `+=` (also as `A="$A …"`) and `${A:-default}` from top to bottom, and functions where they
are written. It is no shell: what comes from a condition, a loop, the environment, the script's own arguments or another
program's output stays as it is written there, and is an error where the model depends on it.
"""

import bisect
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mup_megatron.errors import InputError
from mup_megatron.megatron.arguments.table import MODEL, unresolved

_MODEL_FLAGS = {flag.name: flag for flag in MODEL}


class Word(str):
    """A word of a script, and the line that it comes from."""

    line: int

    def __new__(cls, text: str, line: int) -> "Word":
        """The text as a string that knows its line, counted from 1."""
        word = super().__new__(cls, text)
        word.line = line
        return word


def words_of_launch(words: Sequence[str]) -> tuple[list[str], str]:
    """The flags that a user gave as such, or as a launch script's path with further flags; and what to call them.

    Raises:
        InputError: as `words_of_script`.
    """
    script = Path(words[0]) if words else Path()
    if (
        not words
        or words[0].startswith("-")
        or script.suffix == ".py"
        or not (script.suffix == ".sh" or script.is_file())
    ):
        return [*words], "flags"
    return [*words_of_script(script), *words[1:]], str(script)


def words_of_script(path: Path) -> list[str]:
    """The words after the Python script in the one command of a launch script that has flags of a model.

    Variables that the script sets are put in; others stay, as `$NAME`, and `model_from_flags` refuses them where they
    matter. Each word knows its line.

    Flags of the model that a variable gets under a condition come as `--flag=$NAME`.

    Raises:
        InputError: the file cannot be read, has no such command, or several that differ.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise InputError(f"{path}: cannot be read ({reason}). Give the path of a launch script.") from None
    reader = _Reader()
    for command in _commands(_Lexer(text).tokens()):
        reader.take(command)
    return [*reader.launch(str(path))]


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
        return "" if any(piece.quoted for piece in self.pieces) else "".join(piece.text for piece in self.pieces)


_BLANK = re.compile(r"(?:[ \t\r]|\\\r?\n)+|#[^\n]*")
_OPERATOR = re.compile(r"\n|;;&|;;|;&|&&|\|\||\|&|&>>|&>|\d*(?:<<<|<<-?|>&|<&|>>|[<>])|[;&|()]")
"""With the descriptor that a redirection may begin with, as in `2>&1`."""
_SUBSTITUTION = r"\$\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)|`[^`]*`|\$\{(?:[^{}]|\{[^{}]*\})*\}"
_PIECE = re.compile(
    rf"""\$?'(?P<literal>[^']*)' | "(?P<double>(?:[^"\\]|\\.)*)" | \\(?P<escaped>.)
       | (?P<bare>{_SUBSTITUTION} | \$\w* | [^\s;&|<>()'"\\`$]+ | \S)""",
    re.DOTALL | re.VERBOSE,
)
_HEREDOC = re.compile(r"[ \t]*['\"\\]?(\w+)")
_ARRAY = re.compile(r"[A-Za-z_]\w*\+?=")


class _Lexer:
    """A script's text as words and operators, without comments and here-documents."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._position = 0
        self._line_ends = [match.start() for match in re.finditer("\n", text)]

    def tokens(self) -> Iterator[_Token]:
        """All of them, in order."""
        delimiters: list[str] = []
        while (token := self._next()) is not None:
            yield token
            if token.operator in ("<<", "<<-"):
                delimiter = _HEREDOC.match(self._text, self._position)
                delimiters += [delimiter[1]] if delimiter else []
            elif token.operator == "\n" and delimiters:
                for delimiter_ in delimiters:
                    end = re.compile(rf"^\t*{delimiter_}\r?$|\Z", re.MULTILINE).search(self._text, self._position)
                    assert end is not None
                    self._position = end.end()
                delimiters = []

    def _next(self) -> _Token | None:
        while blank := _BLANK.match(self._text, self._position):
            self._position = blank.end()
        if self._position == len(self._text):
            return None
        line = bisect.bisect_left(self._line_ends, self._position) + 1
        if operator := _OPERATOR.match(self._text, self._position):
            self._position = operator.end()
            return _Token(line, operator[0].lstrip("0123456789"))
        return self._word(line)

    def _word(self, line: int) -> _Token:
        pieces: list[_Piece] = []
        while not re.compile(r"[\s;&|<>()]|\\\r?\n|\Z").match(self._text, self._position):
            found = _PIECE.match(self._text, self._position)
            assert found is not None
            self._position = found.end()
            match found.lastgroup:
                case "literal" | "escaped":
                    pieces.append(_Piece(found[found.lastgroup], expands=False, quoted=True))
                case "double":
                    pieces.append(_Piece(re.sub(r"\\\n", "", found["double"]), expands=True, quoted=True))
                case _:
                    pieces.append(_Piece(found[0], expands=True, quoted=False))
        word = _Token(line, pieces=tuple(pieces))
        if not (_ARRAY.fullmatch(word.plain) and self._text.startswith("(", self._position)):
            return word
        self._position += 1
        elements: list[_Token] = []
        while (token := self._next()) is not None and token.operator != ")":
            elements += [] if token.operator else [token]
        return _Token(line, pieces=word.pieces, array=tuple(elements))


# ---- commands ------------------------------------------------------------------------------------------------------

_REDIRECTIONS = {"<", ">", ">>", "<<", "<<-", "<<<", "&>", "&>>", ">&", "<&"}
_OPENING = {"if": "fi", "while": "done", "until": "done", "for": "done", "select": "done", "case": "esac"}
_BETWEEN = {"then", "else", "elif", "do", "!", "time", "{", "}"}


@dataclass(frozen=True, slots=True)
class _Command:
    """The words of one simple command, and whether it runs under a condition or repeatedly."""

    words: tuple[_Token, ...]
    conditional: bool


def _commands(tokens: Iterator[_Token]) -> Iterator[_Command]:
    """Simple commands in textual order. Redirections' targets are left out; functions are taken where they stand."""
    open_: list[str] = []
    words: list[_Token] = []
    chained = False
    redirected = False
    for token in (*tokens, _Token(0, "\n")):
        if not token.operator:
            words += [] if redirected else [token]
            redirected = False
        elif token.operator in _REDIRECTIONS:
            redirected = True
        else:
            continued = chained and not words and token.operator == "\n"
            _take_keywords(words, open_)
            if words:
                yield _Command(tuple(words), conditional=bool(open_) or chained)
            words, redirected = [], False
            chained = continued or token.operator in ("&&", "||")


def _take_keywords(words: list[_Token], open_: list[str]) -> None:
    """Takes a command's keywords off it, and keeps account of the constructs that are open."""
    while words:
        first = words[0].plain
        if first in ("for", "select", "case"):
            open_.append(_OPENING[first])
            words[1:] = words[1:2] if first != "case" else []
            del words[:1]
            # The loop's variable is set, to what cannot be known.
            words[:] = [_Token(word.line, pieces=(_Piece(f"{word.plain}=$", True, False),)) for word in words]
            return
        if first in _OPENING:
            open_.append(_OPENING[first])
        elif open_ and first == open_[-1]:
            open_.pop()
        elif first == "function":
            del words[1:2]
        elif first not in _BETWEEN:
            return
        del words[0]


# ---- variables -----------------------------------------------------------------------------------------------------

_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)(\+?)=(.*)", re.DOTALL)
_DECLARATIONS = {"export", "declare", "typeset", "local", "readonly"}
_EXPANSION = re.compile(
    r"\$(?:\{(?P<braced>[A-Za-z_]\w*)(?P<index>\[[@*]\])?(?:(?P<operator>:?[-=])(?P<default>.*))?\}"
    rf"|(?P<plain>[A-Za-z_]\w*))|{_SUBSTITUTION}|\$[\d@*#?!$-]|\\(?P<escaped>[$`\"\\])",
    re.DOTALL,
)
_LAUNCHERS = frozenset({"torchrun", "python", "python3", "srun", "mpirun", "eval"})
_Value = tuple[Word, ...] | Word


class _Reader:
    """What is known of a script's variables so far, and its commands that have flags of a model."""

    def __init__(self) -> None:
        self._values: dict[str, _Value] = {}
        self._unknown: dict[str, int] = {}
        """Variables that have been set, to what cannot be read off, and the first line where."""
        self._conditional_flags: dict[str, list[tuple[str, int]]] = {}
        """The flags of the model that a variable gets under a condition, and the line where."""
        self._found: list[list[Word]] = []
        self._unread: dict[str, int] = {}
        """Where something was started without: what its flags can be in, and the line that this comes from."""

    def take(self, command: _Command) -> None:
        """Carries out assignments, and keeps a command that has flags of a model."""
        words = list(command.words)
        if words[0].plain in _DECLARATIONS:
            words = [word for word in words[1:] if not word.plain.startswith("-")]
            assignments = [word for word in words if self._assignment(word)]
        else:
            assignments = [word for word in words if self._assignment(word)]
            if len(assignments) < len(words):  # assignments before a command are for that command alone
                self._keep([expanded for word in words for expanded in self._expanded(word)])
                return
        for word in assignments:
            self._assign(word, conditional=command.conditional)

    @staticmethod
    def _assignment(word: _Token) -> re.Match[str] | None:
        first = word.pieces[0]
        return None if first.quoted else _ASSIGNMENT.match("".join(_leading(word.pieces)))

    def _assign(self, word: _Token, *, conditional: bool) -> None:
        match = self._assignment(word)
        assert match is not None
        name, appends = match[1], bool(match[2])
        whole = replace(word, pieces=tuple(_without_prefix(word.pieces, len(name) + len(match[2]) + 1)))
        added = whole if appends else _beside_itself(whole, name)
        if added is not None and (conditional or name in self._unknown):
            self._append_conditionally(name, self._assigned(added), word.line)
            return
        new = self._assigned(whole)
        if conditional:
            self._replace_conditionally(name, new, word.line)
            return
        if added is None:
            self._conditional_flags.pop(name, None)
            self._unknown.pop(name, None)
        self._values[name] = _joined(self._values.get(name), new) if appends else new

    def _assigned(self, word: _Token) -> _Value:
        """What a variable gets from the part of an assignment after `=`."""
        if word.array is not None:
            return tuple(expanded for element in word.array for expanded in self._expanded(element))
        return Word("".join(self._text(piece) for piece in word.pieces), word.line)

    def _append_conditionally(self, name: str, new: _Value, line: int) -> None:
        flags = self._flags_of_the_model(new, line)
        if not flags:
            # What is not about the model may be there or not: the rest of the variable stays known.
            return
        self._conditional_flags.setdefault(name, []).extend(flags)
        old = self._values.get(name)
        if old is None:
            self._unknown.setdefault(name, line)
            return
        words = tuple(Word(f"{flag}=${name}", line) for flag, _ in flags)
        self._values[name] = (*old, *words) if isinstance(old, tuple) else Word(" ".join((old, *words)), old.line)

    def _replace_conditionally(self, name: str, new: _Value, line: int) -> None:
        if self._values.get(name) == new:
            return
        flags = self._flags_of_the_model(new, line)
        if flags:
            self._conditional_flags.setdefault(name, []).extend(flags)
        self._values.pop(name, None)
        self._unknown.setdefault(name, line)

    def _flags_of_the_model(self, value: _Value, line: int) -> list[tuple[str, int]]:
        names = [said.partition("=")[0] for word in _split(value) for said in self._said(word)]
        return [(name, line) for name in names if name in _MODEL_FLAGS]

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
        unset = value is None and name not in self._unknown
        if operator and (unset or (":" in operator and value is not None and not any(_words(value)))):
            default = Word(self._text(_Piece(match["default"].strip("\"'"), expands=True, quoted=True)), 0)
            if "=" in operator:
                self._values[name] = default
            return default
        if value is None:
            # Without blanks, so that it stays one word.
            return Word(re.sub(r"\s.*", "…)", match[0], flags=re.DOTALL), 0)
        if isinstance(value, tuple) and match["index"] is None:
            return value[0] if value else Word("", 0)
        return value

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
        after = [said for word in after for said in self._said(word)]
        if any(word.partition("=")[0] in _MODEL_FLAGS for word in after):
            self._found.append(after)
        elif scripts or not _LAUNCHERS.isdisjoint(flat):
            for word in after:
                if unresolved(word) == word:
                    self._unread.setdefault(str(word), self._unknown.get(_variable(word), word.line))

    def launch(self, source: str) -> list[Word]:
        """The words of the one command that has flags of a model."""
        if not self._found:
            # A file for other scripts to read, which sets a variable and starts nothing.
            self._found = [
                [said for word in words for said in self._said(word)]
                for words in map(_split, self._values.values())
                if "--num-layers" in words
            ]
        if not self._found:
            raise InputError(
                f"{source}: no command with a model's flags, such as --num-layers, was found. "
                f"{self._where_they_may_be()}"
            )
        first, *others = self._found
        for other in others:
            if _about_the_model(other) != _about_the_model(first):
                raise InputError(
                    f"{source}: two commands describe different models, with flags from lines {first[0].line} and "
                    f"{other[0].line}. Give the flags of one of them in the script's place."
                )
        return first

    def _where_they_may_be(self) -> str:
        if not self._unread:
            return "Give the script that starts the training, or the flags in its place."
        places = ", ".join(f"{word} (line {line})" for word, line in self._unread.items())
        return f"They may be in {places}, which cannot be read off the script. Give the flags in its place."

    def _said(self, word: Word) -> list[Word]:
        """The word; or, for a variable that gets flags under a condition, these, with the variable as unknown value."""
        name = _variable(word)
        flags = self._conditional_flags.get(name, ())
        if word.startswith("-"):
            # The mark of such a flag beside what else the variable has. A text's words have lost their lines.
            lines = [line for flag, line in flags if word == f"{flag}=${name}"]
            return [Word(word, lines[0])] if lines else [word]
        return [Word(f"{flag}={word}", line) for flag, line in flags] or [word]


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


def _split(value: _Value) -> tuple[Word, ...]:
    return tuple(Word(part, word.line) for word in _words(value) for part in word.split())


def _joined(old: _Value | None, new: _Value) -> _Value:
    if isinstance(new, tuple):
        return (*(_words(old) if old is not None else ()), *new)
    if isinstance(old, tuple):
        return (Word(old[0] + new, new.line), *old[1:]) if old else (new,)
    return Word(old + new, old.line) if old else new


def _about_the_model(words: Sequence[Word]) -> list[tuple[str, str]]:
    """The flags of a model with their values, in order."""
    found = []
    for word, following in zip(words, (*words[1:], ""), strict=True):
        name, equals, _ = word.partition("=")
        flag = _MODEL_FLAGS.get(name)
        if flag is not None:
            found.append((str(word), "" if equals or flag.parse is None else str(following)))
    return found
