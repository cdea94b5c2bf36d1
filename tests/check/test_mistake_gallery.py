"""The gallery of mistakes: docs/mistakes.md has what its script makes, and the script makes what the page says."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mistake_gallery
import pytest
from support.processes import run_ranks

from mup_megatron.check.mutants import MUTANTS

DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / mistake_gallery.PAGE


def rows() -> dict[str, str]:
    """Name → its row, in the order of the page; a name that is there twice fails."""
    lines = re.findall(r"^\| \*\*.*", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    found = {line.split("`")[1]: line for line in lines}
    assert len(found) == len(lines)
    return found


@pytest.fixture(scope="module")
def entries() -> Sequence[Any]:
    return mistake_gallery.entries()


def test_the_page_has_each_mistake_and_no_other(entries: Sequence[Any]) -> None:
    assert list(rows()) == [entry.name for entry in entries]
    for entry in entries:
        assert entry.what in rows()[entry.name].replace(r"\|", "|"), entry.name


def test_each_mistake_of_the_library_is_shown(entries: Sequence[Any]) -> None:
    assert {entry.name for entry in entries} >= set(MUTANTS)
    assert {entry.group for entry in entries} == {group.key for group in mistake_gallery.GROUPS}


def test_the_page_has_each_group_and_picture_and_no_other() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert re.findall(r"^## (.*)", text, re.MULTILINE) == [group.title for group in mistake_gallery.GROUPS]
    assert all(group.teaches in " ".join(text.split()) for group in mistake_gallery.GROUPS)
    pictures = re.findall(rf"\({mistake_gallery.PICTURES}/([^)]+)\)", text)
    assert sorted(pictures) == sorted(path.name for path in (DOCS / mistake_gallery.PICTURES).iterdir())


def _checked(name: str, folder: Path) -> dict[str, Any]:
    mistake_gallery.SEEDS = 1
    (entry,) = [entry for entry in mistake_gallery.entries() if entry.name == name]
    check = mistake_gallery.compared(entry, folder)
    assert mistake_gallery.compared(entry, folder) == check
    return {**check, "row": mistake_gallery.row(entry, check)}


@pytest.mark.parametrize(
    "name", ["learning-rate-collapsed", pytest.param("gradients-never-zeroed", marks=pytest.mark.slow)]
)
def test_a_mistake_is_made_checked_and_told_as_on_the_page(name: str, tmp_path: Path) -> None:
    check: dict[str, Any] = run_ranks(_checked, 1, name, tmp_path)[0]
    lines = (tmp_path / "checks.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 2, "the mistake and the right run, each made once"
    assert check["outcome"] == "fail"
    first, _, cause = check["told"]
    sentence = cause.partition("%  ")[2]
    for row in (rows()[name], check["row"]):
        assert f"`{first}`" in row
        assert sentence in row
    assert check["losses"]["right"] != check["losses"]["wrong"]
    assert mistake_gallery.picture([check]).startswith(b"\x89PNG")
