"""A bash script as its simple commands: tree-sitter parses it, nothing of it is run.

The grammar reads a copy of the text in which each character stands where it stood: what it does not know of bash is
masked there, and every character beyond ASCII is a letter, as it is in bash. What a word says is taken from the text.
"""

import bisect
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise, takewhile
from typing import TYPE_CHECKING

from mup_megatron.megatron.arguments.heredocs import without_heredocs

if TYPE_CHECKING:
    from tree_sitter import Node, Parser

SPACE = r" \t\r\n"
"""What parts words: in bash blanks and newlines alone, whatever else Unicode has; and what Windows ends lines with."""
_LONGEST = 200_000
_MOST_OPERATORS = 3_000
"""Characters of a script, and operators among them; the largest of 1400 public ones has 38,000 and 1,200. The parser's
time and memory can grow with the square of the operators: 4 s and 1 GB for 10,000 bars. So does ours, with those of
here-documents."""
_MOST_TRIES = 20
DECLARATIONS = {"export", "declare", "typeset", "local", "readonly"}


class UnreadableError(Exception):
    """A script that is too long or too deeply nested to be read; or the line at which it is not understood."""

    def __init__(self, line: int | None = None) -> None:
        super().__init__(line)
        self.line = line


@dataclass(frozen=True, slots=True)
class WordPart:
    """A stretch of a word: a literal without its quotes, or an expansion as it is written."""

    text: str
    quoted: bool = False
    expands: bool = False
    name: str = ""
    """The variable of an expansion that is its value or a default; of others nothing."""
    whole: bool = False
    """All elements of the array, as `${A[@]}`."""
    operator: str = ""
    default: "tuple[WordPart, ...]" = ()
    words: "tuple[Token, ...]" = ()
    """Of the command that `$(…)` consists of."""


@dataclass(frozen=True, slots=True)
class Token:
    """A word of a command, or an assignment with what the variable gets: the parts, or an array's words."""

    line: int
    parts: tuple[WordPart, ...]
    name: str = ""
    """The variable that an assignment sets."""
    appends: bool = False
    array: "tuple[Token, ...] | None" = None

    @property
    def text(self) -> str:
        """The word without its quotes."""
        said = "".join(part.text for part in self.parts)
        return f"{self.name}{'+' if self.appends else ''}={said}" if self.name else said

    @property
    def plain(self) -> str:
        """The text of a word in which nothing is quoted; else nothing."""
        return "" if any(part.quoted for part in self.parts) else self.text


@dataclass(frozen=True, slots=True)
class Command:
    """The words of one simple command without its redirections, and where it stands."""

    words: tuple[Token, ...]
    conditional: bool = False
    """It may not run, or repeatedly, or in a shell of its own, as in `(…)` and `… | …`. In a function: once called."""
    function: int = 0
    """The outermost function that it is in, counted from 1; 0 is none."""
    loops: tuple[int, ...] = ()
    """The loops that it is in, counted likewise."""

    @property
    def line(self) -> int:
        """The line where it begins."""
        return self.words[0].line


def parsed(text: str) -> tuple[list[Command], set[str]]:
    """Returns a script's simple commands in textual order, and the names of its functions.

    Raises:
        UnreadableError: it is too long, nested too deeply, or not understood.
    """
    text = text.replace("\r\n", "\n").replace("\r", " ")
    if len(text) > _LONGEST or len(re.findall(r"[|&;<>(){}\[\]]", text)) > _MOST_OPERATORS:
        raise UnreadableError
    reader = _Reader(text)
    without, setting = without_heredocs(text)
    root = _tree(_masked(without))
    if errors := _errors(root):
        raise UnreadableError(reader.line(min(errors)))
    try:
        reader.take(root, Command(()))
    except RecursionError:
        raise UnreadableError from None
    expanded = [_expanding((WordPart(said),), reader.line(position), Command((), True)) for position, said in setting]
    return sorted([*reader.commands, *expanded], key=lambda command: command.line), reader.functions


def within_quotes(text: str, line: int) -> Token:
    """Returns a text as one word that bash expands as it does between double quotes; as it is, where it cannot."""
    try:
        ((token,),) = [command.words for command in parsed(f'"{text}"')[0]]
    except (UnreadableError, ValueError):
        return Token(line, (WordPart(text, quoted=True),))
    return replace(token, line=line)


def _expanding(parts: Sequence[WordPart], line: int, place: Command) -> Command:
    """Returns what is expanded elsewhere than in a command, as that of a command that does nothing else."""
    return replace(place, words=(Token(line, (WordPart(":"),)), Token(line, tuple(parts))))


@cache
def _parser() -> "Parser":
    import tree_sitter_bash
    from tree_sitter import Language, Parser

    return Parser(Language(tree_sitter_bash.language()))


_MASKS = (
    (r"\\\n\s*\Z", " "),
    (r"\\(?:[ \t]|\Z)", "."),
    (r"\\[^\n]", ""),
    (r"(?<=[\w./:=,%+@-])\$(?=[A-Za-z_1-9]\w*(?!=|\w))", "_"),
    (r"(?<=[\w\]]):\$(?=[^{}\"'`\s]*\})", "%"),
    (r"\d+\#\$(?=\w)", "_"),
    (r"^[ \t]*(?:export[ \t]+)?\w+=[^\s<>|&;\"']*<\w[^<>\n|&;\"']*>[^\n|&;\\]*$", " "),
    (r"(?:(?<!\\\n)^[ \t]*|(?<=[;&|({] ))time[ \t]+(?:-p[ \t]+)?(?=\S)", " "),
    (r"[^\x01-\x08\t\n\x0e-\x7f]", "."),
)
"""What the grammar reads in another way than bash, and what it is given for each of their characters: a backslash at
the script's end, and before a blank; any other (as it is); `$A` before and behind letters; `${A:$B}`; `10#$A`;
`A=<path>`, which a user is to fill in; `time`; and characters that it takes for blanks."""
_TO_MASK = re.compile("|".join(f"({mask})" for mask, _ in _MASKS), re.MULTILINE | re.ASCII)


def _masked(text: str) -> str:
    """Returns the text for the grammar, as long as it was, in ASCII."""

    def mask(match: re.Match[str]) -> str:
        instead = _MASKS[(match.lastindex or 1) - 1][1]
        return re.sub(r"[^\n]", instead, match[0]) if instead else re.sub(r"[^\x00-\x7f]", ".", match[0])

    return _TO_MASK.sub(mask, text)


def _tree(masked: str) -> "Node":
    """Returns the tree of a text; a command ends at its line's end, also where the grammar passes that."""
    for _ in range(_MOST_TRIES):
        root = _parser().parse(masked.encode("ascii")).root_node
        found = [*_misread(root, masked)]
        if not found:
            return root
        for start, end, mark in found:
            masked = f"{masked[:start]}{mark:{end - start}}{masked[end:]}"
    raise UnreadableError


def _misread(root: "Node", text: str) -> Iterator[tuple[int, int, str]]:
    """Yields what the grammar reads otherwise with a mark and blanks in its place.

    That is the end of a line, from its last word on, which a command passes; and what is redirected behind assignments
    without a command, for which it looks on the next lines.
    """
    nodes = [root]
    while nodes:
        node = nodes.pop()
        nodes += node.children
        if node.type in _SIMPLE or node.type == "file_redirect":
            words = [child for child in node.children if child.type != "comment"]
            for before, after in pairwise(words):
                gap = re.search(r"#[^\n]*\n|(?<!\\)\n", text[before.end_byte : after.start_byte])
                if gap:
                    yield before.end_byte, before.end_byte + gap.end(), ";"
        if node.type == "command" and any(child.type == "variable_assignment" for child in node.children):
            for child in takewhile(lambda child: child.type != "command_name", node.children):
                if child.type in _REDIRECTS:
                    yield child.start_byte, child.end_byte, " "


def _errors(root: "Node") -> list[int]:
    """Returns where the grammar does not understand, or what opens there and never closes."""
    places, nodes = [], [root]
    while nodes:
        node = nodes.pop()
        nodes += [child for child in node.children if child.has_error]
        if (node.is_error and node.start_byte > root.start_byte) or node.is_missing:
            places.append(node.start_byte)
        places += [child.start_byte for child in node.children if node.is_error and child.type in _OPENING]
    return places or [root.end_byte] * root.is_error


_OPENING = {"${", "$(", "`", '"', "(", "((", "$((", "{", "[", "[[", "if", "for", "while", "until", "case", "select"}
_SIMPLE = {"command", "variable_assignment", "variable_assignments", "declaration_command", "unset_command"}
_REDIRECTS = {"file_redirect", "herestring_redirect"}
_UNCONDITIONAL = {"program", "compound_statement", "negated_command", "redirected_statement"}
_LOOPS = {"for_statement", "c_style_for_statement", "while_statement"}
_CONSTRUCTS = {*_UNCONDITIONAL, *_LOOPS, "list", "pipeline", "subshell", "do_group", "case_statement"} | {
    *("case_item", "if_statement", "elif_clause", "else_clause")
}
_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)(\+?)=", re.ASCII)
_MARKED = {"simple_expansion", "expansion", "command_substitution", "arithmetic_expansion", "process_substitution"} | {
    *("string", "raw_string", "ansi_c_string")
}
_STRETCH = re.compile(r"\\(?P<escaped>.)|\$(?P<name>[A-Za-z_]\w*|[1-9])|[^\\$]+|.", re.DOTALL | re.ASCII)
_VARIABLE = re.compile(
    r"\$(?:([A-Za-z_]\w*|[1-9])|\{([A-Za-z_]\w*|[1-9])(\[[@*]\])?(?:(:?[-=])(.*))?\})", re.DOTALL | re.ASCII
)


class _Reader:
    """Reads the tree of a text."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._line_ends = [match.start() for match in re.finditer("\n", text)]
        self._constructs = 0
        self.commands: list[Command] = []
        self.functions: set[str] = set()

    def line(self, position: int) -> int:
        """Returns the line of a position, counted from 1."""
        return bisect.bisect_left(self._line_ends, position) + 1

    def take(self, node: "Node", place: Command) -> None:
        """Adds the commands of a statement; where it stands, a command without words says."""
        kind, children = node.type, node.children
        if kind in _SIMPLE:
            self._add(self._words(children if kind != "variable_assignment" else [node]), place)
        elif kind == "test_command" or (kind == "compound_statement" and children[0].type == "(("):
            depends = children[0].type != "[" and re.search(r"&&|\|\||\?", self._said(node)) is not None
            self._expand(node, replace(place, conditional=place.conditional or depends))
            self._add([self._raw(node.start_byte, node.end_byte)], place)
        elif kind == "function_definition":
            self._constructs += 1
            self.functions.add(self._said(node.child_by_field_name("name") or node))
            inside = replace(place, conditional=bool(place.function), function=place.function or self._constructs)
            self._take_all(children, inside)
        elif kind == "redirected_statement" and children[0].type in _SIMPLE:
            first = children[0]
            words = [first] if first.type == "variable_assignment" else first.children
            self._add(self._words([*words, *children[1:]]), place)
        elif kind in _CONSTRUCTS:
            if kind in _LOOPS:
                self._constructs += 1
                place = replace(place, loops=(*place.loops, self._constructs))
            conditional = place.conditional or kind not in {*_UNCONDITIONAL, "list"}
            place = replace(place, conditional=conditional)
            if kind == "for_statement":  # its variable is set, to what cannot be known
                name = node.child_by_field_name("variable") or node
                self._add([Token(self.line(name.start_byte), (WordPart("$"),), name=self._said(name))], place)
            elif kind == "c_style_for_statement":
                opening, closing = (child for child in children if child.type in ("((", "))"))
                self._add([self._raw(opening.start_byte, closing.end_byte)], place)
            self._take_all(children, place, chained=kind == "list")
        elif kind == "heredoc_redirect":
            raise UnreadableError(self.line(node.start_byte))
        elif kind not in ("comment", "process_substitution"):
            self._expand(node, place)
        if kind in _SIMPLE or kind == "redirected_statement":
            for child in children:
                if child.type in _REDIRECTS:  # of another program, it is expanded in a shell of its own
                    self._expand(child, replace(place, conditional=True))

    def _expand(self, node: "Node", place: Command) -> None:
        """Adds what expansions in other places than a command's words may set."""
        parts = self._parts([node], node.start_byte, node.end_byte, quoted=True)
        setting = [part for part in parts if part.expands and re.search(r"=|\+\+|--", part.text)]
        if setting:
            self.commands.append(_expanding(setting, self.line(node.start_byte), place))

    def _take_all(self, nodes: Sequence["Node"], place: Command, *, chained: bool = False) -> None:
        for index, node in enumerate(nodes):
            apart = (chained and index > 0) or (index + 1 < len(nodes) and nodes[index + 1].type == "&")
            self.take(node, replace(place, conditional=True) if apart else place)

    def _add(self, words: Sequence[Token], place: Command) -> None:
        if words:
            self.commands.append(replace(place, words=tuple(words)))

    # ---- words -----------------------------------------------------------------------------------------------------

    def _words(self, nodes: Iterable["Node"], *, in_array: bool = False) -> list[Token]:
        words: list[Token] = []
        for span in self._spans(nodes):
            assigns = not in_array and all(word.name or word.plain in DECLARATIONS for word in words)
            words.append(self._token(span, assigns=assigns))
        return words

    def _spans(self, nodes: Iterable["Node"]) -> list[list["Node"]]:
        """Nodes that touch each other are a word."""
        spans: list[list[Node]] = []
        for node in nodes:
            if node.type == "heredoc_redirect":
                raise UnreadableError(self.line(node.start_byte))
            if node.type == "file_redirect":
                # What comes behind the target is the command's, though the grammar has it here.
                target = node.child_by_field_name("destination") or node
                if spans and spans[-1][-1].end_byte == node.start_byte and self._said(spans[-1][-1]).isdigit():
                    spans.pop()  # its descriptor
                spans += self._spans(child for child in node.children if child.start_byte >= target.start_byte)[1:]
            elif node.type not in ("comment", "herestring_redirect") and node.start_byte < node.end_byte:
                gap = self._text[spans[-1][-1].end_byte : node.start_byte] if spans else " "
                spans += [[]] if re.search(r"[ \t\n]", gap.replace("\\\n", "")) else []
                spans[-1].append(node)
        return spans

    def _token(self, nodes: Sequence["Node"], *, assigns: bool) -> Token:
        """Returns the word of nodes that touch each other."""
        first, start, end = nodes[0], nodes[0].start_byte, nodes[-1].end_byte
        word = Token(self.line(start), ())
        found = _ASSIGNMENT.match(self._text, start)
        if found and (assigns or first.type == "variable_assignment"):
            word, start = replace(word, name=found[1], appends=bool(found[2])), found.end()
            value = first.child_by_field_name("value")
            if value is not None and value.type == "array":
                return replace(word, array=tuple(self._words(value.children[1:-1], in_array=True)))
        return replace(word, parts=tuple(self._parts(nodes, start, end, quoted=False)))

    def _raw(self, start: int, end: int) -> Token:
        return Token(self.line(start), (WordPart(self._text[start:end]),))

    def _said(self, node: "Node") -> str:
        return self._text[node.start_byte : node.end_byte]

    def _parts(self, nodes: Iterable["Node"], start: int, end: int, *, quoted: bool) -> Iterator[WordPart]:
        """Yields the parts of a stretch of text: what is not within quotes or an expansion is literal."""
        for node in _marked(nodes):
            if node.start_byte >= start:
                yield from _literal(self._text[start : node.start_byte], quoted=quoted)
                yield from self._part(node, quoted=quoted)
                start = node.end_byte
        yield from _literal(self._text[start:end], quoted=quoted)

    def _part(self, node: "Node", *, quoted: bool) -> Iterator[WordPart]:
        text = self._said(node)
        if node.type in ("raw_string", "ansi_c_string"):
            yield WordPart(text[text.index("'") + 1 : -1], quoted=True)
        elif node.type == "string":
            if text == '""':
                yield WordPart("", quoted=True)
            yield from self._parts(node.children[1:-1], node.start_byte + 1, node.end_byte - 1, quoted=True)
        else:
            # Between quotes, the grammar counts blanks before it as its own.
            shown = re.sub(r"\A(?:\s|\\\n)+", "", text)
            yield from _literal(text[: len(text) - len(shown)], quoted=quoted)
            found = _VARIABLE.match(shown)
            if found is None:
                inside = [child for child in node.children if child.is_named]
                words = self._words(inside[0].children) if [child.type for child in inside] == ["command"] else ()
                yield WordPart(shown, quoted, expands=True, words=tuple(words))
                return
            end = node.start_byte + len(text) - len(shown) + found.end() - 1
            default = self._parts(node.children, end - len(found[5]), end, quoted=True) if found[5] else ()
            yield WordPart(found[0], quoted, True, found[1] or found[2], bool(found[3]), found[4] or "", tuple(default))
            yield from _literal(shown[found.end() :], quoted=quoted)


def _marked(nodes: Iterable["Node"]) -> Iterator["Node"]:
    for node in nodes:
        if node.type in _MARKED:
            yield node
        else:
            yield from _marked(node.children)


def _literal(text: str, *, quoted: bool) -> Iterator[WordPart]:
    for found in _STRETCH.finditer(text):
        match found.lastgroup:
            case "name":
                yield WordPart(found[0], quoted, True, found["name"])
            case "escaped" if not quoted or found["escaped"] in '$`"\\\n':
                yield WordPart(found["escaped"].strip("\n"), quoted or found["escaped"] != "\n")
            case _:
                yield WordPart(found[0], quoted)
