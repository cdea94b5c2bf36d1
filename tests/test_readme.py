"""What README, docs and examples tell a reader to type or open: it is there, and what they show is what comes out."""

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from support.commands import command as in_process

from mup_megatron.cli.main import COMMANDS, group
from mup_megatron.recipe import recipe
from mup_megatron.yaml_io import parse_yaml

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "configs/**/*.md", "examples/*.*")
    for path in ROOT.glob(pattern)
    if path.name != "LICENSE.md"
)
README = (ROOT / "README.md").read_text(encoding="utf-8")
NAMES = [path.relative_to(ROOT).as_posix() for path in PAGES]


def fenced(text: str, *languages: str) -> list[str]:
    """The blocks of code, all or those in a language; "" stands for a block that names none."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return [block for language, block in blocks if not languages or language in languages]


def commands(path: Path) -> Iterator[list[str]]:
    """The words of every `mup-megatron …`, in blocks of code, scripts and running text."""
    text = re.sub(r"\\\n\s*", " ", path.read_text(encoding="utf-8"))
    code = fenced(text) if path.suffix == ".md" else [text]
    for line in "\n".join(code).splitlines():
        if match := re.match(r"(?:\$ |.*\|\| )?(?:mup-megatron|torchrun .*-m mup_megatron) +(.*)", line):
            words = shlex.split(match[1], comments=True)
            yield [word for word in words if word != "…"]
    if path.suffix == ".md":
        yield from (shlex.split(words) for words in re.findall(r"`mup-megatron\s+([^`]+)`", text))


@pytest.mark.parametrize("name", NAMES)
def test_every_command_that_is_shown_can_be_typed(name: str) -> None:
    for words in commands(ROOT / name):
        if words[0].startswith("-"):
            continue
        assert words[0] in COMMANDS, words
        if len(words) > 1:  # the name alone speaks of the command
            found = group.get_command(click.Context(group), words[0])
            assert found is not None
            found.make_context(words[0], words[1:])


def test_the_commands_that_are_shown_are_found() -> None:
    assert [words[0] for words in commands(ROOT / "README.md")][:6] == [
        "proxy", "data", "sweep", "transfer", "explain", "train",
    ]  # fmt: skip
    assert len(list(commands(ROOT / "examples" / "search_and_transfer.sh"))) == 6


@pytest.mark.parametrize("name", NAMES)
def test_every_file_that_is_named_is_there(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    linked = re.findall(r"\]\((?!https?:)([^)#\s]+)", text) if name.endswith(".md") else []
    missing = [link for link in linked if not ((ROOT / name).parent / link).exists()]
    named = re.findall(r"(?<![\w/.$-])(?:configs|docs|examples|tests|tools|mup_megatron)/[\w./-]*\w", text)
    # Paths are given from the root, from the package, or from the page's own folder.
    folders = (ROOT, ROOT / "mup_megatron", (ROOT / name).parent)
    missing += [path for path in named if not any((folder / path).exists() for folder in folders)]
    assert missing == []


@pytest.mark.parametrize("name", NAMES)
def test_every_target_of_make_that_is_named_is_there(name: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, flags=re.MULTILINE))
    text = (ROOT / name).read_text(encoding="utf-8")
    assert set(re.findall(r"(?:^|`)make ([a-z-]+)", text, flags=re.MULTILINE)) <= targets


def test_what_readme_imports_is_there() -> None:
    for block in fenced(README, "python"):
        for module, names in re.findall(r"^from (mup_megatron[\w.]*) import (.+)$", block, flags=re.MULTILINE):
            path = ROOT / module.replace(".", "/")
            source = path.with_suffix(".py") if path.with_suffix(".py").exists() else path / "__init__.py"
            body = ast.parse(source.read_text(encoding="utf-8")).body
            defined = {node.name for node in body if hasattr(node, "name")}
            defined |= {alias.name for node in body if isinstance(node, ast.ImportFrom) for alias in node.names}
            assert set(names.split(", ")) <= defined, module


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith(".md")])
def test_every_recipe_that_is_shown_is_one(name: str) -> None:
    for block in fenced((ROOT / name).read_text(encoding="utf-8"), "yaml"):
        if "hyperparameters:" in block:
            recipe(parse_yaml(block, source=name), source=name)


def test_the_table_in_readme_is_what_explain_says(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    (block,) = [block for block in fenced(README, "") if "explain" in block]
    first, header, *rows = block.strip().splitlines()
    answer = in_process(capfd)(*shlex.split(first.removeprefix("$ mup-megatron ")))
    assert answer.code == 0

    def table(lines: list[str]) -> dict[str, dict[str, str]]:
        """Name → column → cell. Numbers end where their column's title ends, words begin where it begins."""
        titles = [(m[0], m.start(), m.end()) for m in re.finditer(r"\S+", lines[0])]
        found = {}
        for line in lines[1:]:
            cells = [(m[0], m.start(), m.end()) for m in re.finditer(r"\S+", line)]
            row = {
                title: next((cell for cell, start, end in cells if start == left or end == right), "")
                for title, left, right in titles
            }
            found[row["name"]] = row
        return found

    said = table(answer.out.splitlines()[1:])
    shown = table([header, *(row for row in rows if row != "…")])
    assert shown
    for name, row in shown.items():
        assert row == {title: said[name][title] for title in row}
