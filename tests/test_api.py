"""What scripts may import is the table of docs/api.md: each module's `__all__`, and all that documents import."""

import ast
import functools
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest
import test_typing
from test_repository import FRAGMENT

from mup_megatron.megatron import cpu

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mup_megatron"
ROWS = re.findall(
    r"^\| `(mup_megatron[\w.]*)` \| ([^|]*) \| ([^|]*) \|$",
    (ROOT / "docs" / "api.md").read_text(encoding="utf-8"),
    flags=re.MULTILINE,
)
API = {module: set(re.findall(r"`(\w+)`", cell.partition(";")[0])) for module, cell, _ in ROWS}
SENTENCE = re.compile(r"[A-Z(\"`'0-9].*[.:]\Z", flags=re.DOTALL)


def loaded(name: str) -> ModuleType:
    if name.startswith(("mup_megatron.megatron.", "mup_megatron.deepspeed.megatron")):
        cpu.enable()
    return importlib.import_module(name)


def test_the_page_has_each_module_once() -> None:
    assert len(ROWS) == len(API) == 27


@pytest.mark.parametrize("name", API)
def test_the_page_says_what_a_module_offers(name: str) -> None:
    offered = getattr(loaded(name), "__all__", [])
    assert sorted(offered) == sorted(API[name])
    assert len(offered) == len(set(offered))


@functools.cache
def constants() -> dict[str, set[str]]:
    """Names that modules of the package assign → the docstrings beneath."""
    found: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        body = ast.parse(path.read_text(encoding="utf-8")).body
        for node, after in pairwise(body):
            match node, after:
                case (
                    (ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name))),
                    ast.Expr(value=ast.Constant(value=str(text))),
                ):
                    found.setdefault(name, set()).add(text)
    return found


@pytest.mark.parametrize("name", API)
def test_what_a_module_offers_is_described_in_a_sentence(name: str) -> None:
    module, described = loaded(name), constants()
    for offered in API[name]:
        value = getattr(module, offered)
        is_code = inspect.isroutine(value) or inspect.isclass(value)
        for text in {inspect.getdoc(value) or ""} if is_code else described.get(offered, {""}):
            first = text.strip().partition("\n\n")[0]
            assert SENTENCE.match(first), f"{name}.{offered}: {first!r}"
            assert not FRAGMENT.match(first), f"{name}.{offered}: {first!r}"


def imported(code: str) -> Iterator[tuple[str, str]]:
    for module, names in re.findall(r"^\s*from (mup_megatron[\w.]*) import ([\w, ]+)", code, flags=re.MULTILINE):
        yield from ((module, name.strip()) for name in names.split(","))


SHOWN = [
    *(ROOT / "docs").rglob("*.md"),
    ROOT / "README.md",
    *(path for folder in ("examples", "patches") for path in (ROOT / folder).rglob("*") if path.is_file()),
]


def test_what_documents_and_examples_import_is_on_the_page() -> None:
    code = "\n".join([test_typing.USER, *(path.read_text(encoding="utf-8", errors="ignore") for path in SHOWN)])
    shown = {(module, name) for module, name in imported(code.replace("\n+", "\n"))}
    assert len(shown) > 15
    assert {(m, n) for m, n in shown if f"{m}.{n}" not in API and n not in API.get(m, ())} == set()
    named = {name for name in re.findall(r"`(mup_megatron\.[a-z_.]+\.\w+)`", code) if not is_module(name)}
    assert {name for name in named if name.rpartition(".")[2] not in API.get(name.rpartition(".")[0], ())} == set()


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


@pytest.mark.parametrize(
    "allowed", [{"no torch", "nothing"}, {"no torch", "nothing", "torch"}], ids=["no torch", "no Megatron"]
)
def test_importing_needs_no_more_than_the_page_says(allowed: set[str]) -> None:
    modules = [module for module, _, needs in ROWS if needs in allowed]
    unwanted = {"megatron", "deepspeed"} | ({"torch"} if "torch" not in allowed else set())
    code = f"import sys, {', '.join(modules)}\nprint(sorted({unwanted} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr
