"""Here-documents of a bash script: where they begin, and the text without them."""

import bisect
import re
from collections.abc import Iterator

_OPENED = {'"': '"', "`": "`", "$(": "c", "((": "aa", "$((": "aa", "${": "{"}
_CLOSED_BY = {'"': '"', "`": "`", "c": ")", "a": ")", "{": "}"}
"""What is open: quotes, commands in parentheses, arithmetic by its parentheses, and `${`."""
_ENTER = r"""\\.|"|`|\$?\(\(|\$\(|\$\{|[()}]"""
_IN_QUOTES = re.compile(r"""\\.|"|`|\$\(\(?|\$\{""", re.DOTALL)
_IN_EXPANSIONS = re.compile(rf"{_ENTER}|'(?:[^'\n}}]*|\}})'", re.DOTALL)
_IN_COMMANDS = re.compile(
    rf"""{_ENTER}|\$'(?:\\.|[^'\\])*'|'[^']*'|(?<![^\s;&|(])\#[^\n]*|\n|<<<
    |<<(?P<tabs>-?)[ \t]*(?P<end>(?:'[^'\n]*'|"[^"\n]*"|\\.|[^\s;&|<>()'"\\`])+)""",
    re.DOTALL | re.VERBOSE,
)
_SETTING = re.compile(r"(?<!\\)(?:\$\{\w+(?:\[[^]\n]{0,99}\])?:?=|\$\(\([^\n]{0,999}?\)\))")


def without_heredocs(text: str) -> tuple[str, list[tuple[int, str]]]:
    """Returns a text with blanks in the place of here-documents, and which of their expansions may set a variable.

    One without an end stays.
    """
    parts, last, setting = [], 0, []
    for start, end, expands in sorted(_heredocs(text)) if "<<" in text else ():
        parts += [text[last:start], re.sub(r"[^\n]", " ", text[start:end])]
        setting += [(found.start(), found[0]) for found in _SETTING.finditer(text, start, end) if expands]
        last = end
    return "".join((*parts, text[last:])), setting


def _heredocs(text: str) -> Iterator[tuple[int, int, bool]]:
    """Yields where operators, and the lines that they take, begin and end, and whether bash expands these."""
    lines: dict[str, list[int]] = {}  # with the mark of those that may be behind tabs
    for line in re.finditer(r"^\t*(.*)$", text, re.MULTILINE):
        lines.setdefault(line[0], []).append(line.start())
        lines.setdefault(f"-\n{line[1]}", []).append(line.start())
    opened, pending, position = [""], list[re.Match[str]](), 0
    while found := _lexemes(opened[-1]).search(text, position):
        said, position = found[0], found.end()
        if said == _CLOSED_BY.get(opened[-1]):
            opened.pop()
        elif said in _OPENED:
            opened += _OPENED[said]
        elif said == "(" and opened[-1] != "{":
            opened.append("a" if opened[-1] == "a" else "c")
        elif said.startswith("#") and opened[-1] == "`":
            position = found.start() + 1
        elif found.re is _IN_COMMANDS and found["end"]:
            pending.append(found)
        elif said == "\n":
            for operator in pending:
                end = re.sub(r"['\"\\]", "", operator["end"])
                at = lines.get(f"-\n{end}" if operator["tabs"] else end, [])
                if (index := bisect.bisect_left(at, position)) < len(at):
                    behind = (text.find("\n", at[index]) + 1 or len(text) + 1) - 1
                    yield operator.start(), operator.end(), False
                    yield position, behind, end == operator["end"]
                    position = behind + 1
            pending = []


def _lexemes(opened: str) -> re.Pattern[str]:
    return {'"': _IN_QUOTES, "a": _IN_EXPANSIONS, "{": _IN_EXPANSIONS}.get(opened, _IN_COMMANDS)
