"""The gallery of mistakes: docs/mistakes.md has what its script makes, and the script makes what the page says."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mistake_gallery
import pytest
from support.processes import run_ranks

from mup_megatron.check.measure.measurements import DRAWS, FROM_STEPS, Quantity
from mup_megatron.check.mutants import MUTANTS

DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / mistake_gallery.PAGE


def rows() -> dict[str, str]:
    """Name → its row, in the order of the page; a name that is there twice fails."""
    lines = re.findall(r"^\| \*\*.*", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    found = {line.split("`")[1]: line for line in lines}
    assert len(found) == len(lines)
    return found


def head() -> str:
    """What the page says before its first section, on one line."""
    return " ".join(PAGE.read_text(encoding="utf-8").partition("\n## ")[0].split())


def losses(row: str) -> tuple[float, float]:
    """Of a mistake that ran: with it, and without."""
    wrong, right = re.findall(r"\| loss ([\d.]+), right ([\d.]+)", row)[0]
    return float(wrong), float(right)


def unseen() -> dict[str, str]:
    """The rows of mistakes that ran and have no coordinate that is off."""
    return {name: row for name, row in rows().items() if re.search(r"\| loss [\d.]+, right [\d.]+ \|", row)}


def quantity_of(row: str) -> str:
    """Of the finding that is told, without its step."""
    return re.findall(r": ([^:`]*), (?:before training|after \d+ steps?): ", row)[0]


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


def test_those_of_the_exam_are_marked_and_no_other(entries: Sequence[Any]) -> None:
    marked = {name for name, row in rows().items() if row.startswith(f"| **`{name}`** (exam)<br>")}
    assert marked == {entry.name for entry in entries} - set(MUTANTS) == {e.name for e in entries if e.of_exam}


def test_what_the_head_counts_is_in_the_rows() -> None:
    ran = [row for row in rows().values() if "| no run: refused |" not in row]
    wrong_and_right = [losses(row) for row in ran]
    alike = sum(abs(wrong / right - 1) < mistake_gallery.ALIKE for wrong, right in wrong_and_right)
    below = sum(wrong < right for wrong, right in wrong_and_right)
    assert f"gallery of mistakes {len(rows())} mistakes" in head()
    assert f"Of the {len(ran)} that run at all, {alike} end within" in head()
    assert f"and {below} end below it" in head()
    assert f"Of {len(unseen())} no output is as much as" in head()


def test_what_no_output_shows_in_training_is_found_where_the_head_says() -> None:
    of_outputs = {name for name, row in unseen().items() if quantity_of(row) == Quantity.EVALUATION}
    direct = {Quantity.INITIAL, *DRAWS, Quantity.GRADIENT, Quantity.NORM, *FROM_STEPS}
    assert {quantity_of(row) for name, row in unseen().items() if name not in of_outputs} <= direct
    told = head().partition("weights, gradients or steps say")[2].partition("in outputs under eval()")[0]
    assert set(re.findall("`([^`]+)`", told)) == of_outputs != set()


@pytest.mark.parametrize(
    ("sentence", "words"),
    [
        ("It took the level `standard` to find", "with `--level standard`:<br>`FAIL"),
        ("It took the widths that a check has by default to find", "with widths "),
        ("Not found at all here:", "`PASS "),
    ],
)
def test_what_the_first_attempt_did_not_find_is_named(sentence: str, words: str) -> None:
    named = head().partition(sentence)[2].partition(".")[0].partition(";")[0]
    assert set(re.findall("`([^`]+)`", named)) == {name for name, row in rows().items() if words in row} != set()


def test_a_name_that_is_none_is_refused(
    entries: Sequence[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        mistake_gallery.main(["--only", entries[0].name, "misspelt", "-o", str(tmp_path / "made")])
    assert "no such mistake: misspelt. " in capsys.readouterr().err
    assert not (tmp_path / "made").exists()


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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["learning-rate-collapsed", "gradients-never-zeroed"])
def test_a_mistake_is_made_checked_and_told_as_on_the_page(name: str, tmp_path: Path) -> None:
    check: dict[str, Any] = run_ranks(_checked, 1, name, tmp_path)[0]
    lines = (tmp_path / "checks.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 2, "the mistake and the right run, each made once"
    assert check["outcome"] == "fail"
    first, _, cause = check["told"]
    sentence = cause.partition("%")[2].strip()
    assert sentence.endswith(".")
    for row in (rows()[name], check["row"]):
        assert f"`{first}`" in row
        assert sentence in row
    assert check["losses"]["right"] != check["losses"]["wrong"]
    assert mistake_gallery.picture([check]).startswith(b"\x89PNG")
