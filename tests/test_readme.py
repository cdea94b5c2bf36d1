"""What README, docs and examples tell a reader to type or open: it is there, and what they show is what comes out."""

import ast
import inspect
import re
import shlex
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from support.commands import command as in_process
from test_api import API, loaded

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
TEST_FILES = [path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("test_*.py")]


def fenced(text: str, *languages: str) -> list[str]:
    """The blocks of code, all or those in a language; "" stands for a block that names none."""
    blocks = re.findall(r"^```(\w*)(?: title=.*)?\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
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
    assert [words[0] for words in commands(ROOT / "README.md")][:7] == [
        "proxy", "data", "recipe", "sweep", "transfer", "explain", "train",
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
    # Tests also by the ends of their paths.
    tests = re.findall(r"(?<![\w/.-])(?:[\w-]+/)*test_\w+\.py\b", text)
    missing += [name for name in tests if not any(f"/{path}".endswith(f"/{name}") for path in TEST_FILES)]
    assert missing == []


@pytest.mark.parametrize("name", NAMES)
def test_every_target_of_make_that_is_named_is_there(name: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, flags=re.MULTILINE))
    text = (ROOT / name).read_text(encoding="utf-8")
    assert set(re.findall(r"(?:^|`)make ([a-z-]+)", text, flags=re.MULTILINE)) <= targets


def test_readme_says_what_each_extra_is_for() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    rows = "\n".join(line for line in README.splitlines() if line.startswith("| `'."))
    assert sorted(re.findall(r"'\.\[(\w+)\]'", rows)) == sorted(set(extras) - {"dev"})


def test_what_readme_imports_is_there() -> None:
    for block in fenced(README, "python"):
        for module, names in re.findall(r"^from (mup_megatron[\w.]*) import (.+)$", block, flags=re.MULTILINE):
            path = ROOT / module.replace(".", "/")
            source = path.with_suffix(".py") if path.with_suffix(".py").exists() else path / "__init__.py"
            body = ast.parse(source.read_text(encoding="utf-8")).body
            defined = {node.name for node in body if hasattr(node, "name")}
            defined |= {alias.name for node in body if isinstance(node, ast.ImportFrom) for alias in node.names}
            assert set(names.split(", ")) <= defined, module


def python(name: str) -> list[ast.Module]:
    """The Python that a page shows, or that an example is. All of it has to be Python."""
    text = (ROOT / name).read_text(encoding="utf-8")
    return [parsed(block) for block in (fenced(text, "python") if name.endswith(".md") else [text])]


def parsed(code: str) -> ast.Module:
    """`…` among arguments stands for those that are not shown, anywhere else for one value."""
    return ast.parse(re.sub(r"(?<=[(,])(\s*)…(?=\s*[,)])", r"\1*_", code).replace("…", "..."))


def calls(code: ast.Module) -> Iterator[tuple[ast.Call, list[Callable[..., Any]]]]:
    """Calls of what docs/api.md lists, with what may be meant: what is imported, else all that have this name."""
    imports = [node for node in ast.walk(code) if isinstance(node, ast.ImportFrom)]
    imported = {alias.asname or alias.name: (str(node.module), alias.name) for node in imports for alias in node.names}
    for node in ast.walk(code):
        if isinstance(node, ast.Call):
            meant = [getattr(loaded(module), name) for module, name in _meant(node.func, imported)]
            if meant := [each for each in meant if callable(each)]:  # a page's own MLP has the name of a constant
                yield node, meant


def _meant(function: ast.expr, imported: Mapping[str, tuple[str, str]]) -> Iterator[tuple[str, str]]:
    match function:
        case ast.Name(id=name):
            found = [imported[name]] if name in imported else [(module, name) for module in API]
        case ast.Attribute(value=ast.Name(id=module), attr=name) if module in imported:
            found = [(".".join(imported[module]), name)]
        case _:
            found = []
    yield from ((module, name) for module, name in found if name in API.get(module, ()))


def takes(function: Callable[..., Any], call: ast.Call) -> bool:
    """Whether a function can be called so; `*` and `**` stand for whatever else it needs."""
    signature = inspect.signature(function)
    shown = [each for each in call.args if not isinstance(each, ast.Starred)]
    named = {each.arg: each.value for each in call.keywords if each.arg is not None}
    is_all = len(shown) + len(named) == len(call.args) + len(call.keywords)
    try:
        (signature.bind if is_all else signature.bind_partial)(*shown, **named)
    except TypeError:
        return False
    return True


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith((".md", ".py"))])
def test_what_is_called_takes_what_it_is_called_with(name: str) -> None:
    wrong = [
        ast.unparse(call)
        for code in python(name)
        for call, meant in calls(code)
        if not any(takes(function, call) for function in meant)
    ]
    assert wrong == []


FROM_GUARD = "from mup_megatron.megatron.guard import require_as_planned\n"


@pytest.mark.parametrize(
    ("code", "is_right"),
    [
        ("require_as_planned(chunks, plan, optimizer, scheduler, weights=True)", True),
        ("require_as_planned(chunks, plan, optimizer, scheduler)", False),
        (FROM_GUARD + "require_as_planned(chunks, plan, weight=True)", False),
        ("require_as_planned(chunks, …)", True),
        ("require_as_planned(chunks, …, weight=True)", False),
        ("plan_for_module(recipe=…)", False),
        ("plan_for_module(lambda: Net(64), recipe=…)", True),
        ("from mup_megatron.megatron import cpu\ncpu.enable()", True),
        ("from mup_megatron.megatron import cpu\ncpu.enable(True)", False),
        # Only Hugging Face's and DeepSpeed's are functions of this name, with other parameters.
        ("plan_for(model, recipe, target)", True),
        ("from mup_megatron.huggingface import plan_for\nplan_for(model, recipe, target, more)", False),
    ],
)
def test_a_call_that_cannot_be_made_is_seen(code: str, is_right: bool) -> None:
    ((call, meant),) = calls(parsed(code))
    assert any(takes(function, call) for function in meant) is is_right


def test_the_calls_that_are_shown_are_found() -> None:
    found = {name: [ast.unparse(call.func) for code in python(name) for call, _ in calls(code)] for name in NAMES
             if name.endswith((".md", ".py"))}  # fmt: skip
    assert {"apply_plan", "configure", "config_overrides", "require_as_planned"} <= set(found["docs/doors.md"])
    assert {"plan_for", "require_as_planned", "check_optimizer"} <= set(found["README.md"])
    assert sum(map(len, found.values())) > 40


def test_the_lines_for_any_torch_module_run() -> None:
    (block,) = [each for each in fenced((ROOT / "docs" / "doors.md").read_text(), "python") if "module_base" in each]

    def net(width: int) -> torch.nn.Module:
        sides = [(8, width), (width, width), (width, 4)]
        return torch.nn.Sequential(*(torch.nn.Linear(*side) for side in sides))

    names: dict[str, object] = {"torch": torch, "Net": net}
    exec(block, names)
    optimizer = names["optimizer"]
    assert isinstance(optimizer, torch.optim.AdamW)
    assert sorted({group["lr"] for group in optimizer.param_groups}) == [pytest.approx(0.01 / 16), 0.01]


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
