"""What users hold of an earlier release is still there, or CHANGELOG says what to write: docs/compatibility.md."""

import importlib
import re
from pathlib import Path

import pytest
from packaging.version import Version
from support.surface import parameters, surface

ROOT = Path(__file__).parents[1]
CHANGELOG = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
RECORDS = {
    Version(path.stem.removeprefix("surface-")): path.read_text(encoding="utf-8").splitlines()
    for path in sorted((ROOT / "tests" / "recorded").glob("surface-*.txt"))
}


def sections(level: int, text: str) -> dict[str, str]:
    """Heading → what stands beneath, of headings of one level."""
    _, *parts = re.split(rf"^{'#' * level} (.+)$", text, flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2], strict=True))


def releases() -> dict[Version, str]:
    return {Version(title.split()[0]): text for title, text in sections(2, CHANGELOG).items() if title != "Unreleased"}


def said_to_be_gone(since: Version) -> set[str]:
    """What CHANGELOG says in code under Removed and Changed, of all that came after a release."""
    later = [text for title, text in sections(2, CHANGELOG).items() if is_later(title, since)]
    changes = [sections(3, text).get(kind, "") for text in later for kind in ("Removed", "Changed")]
    return set(re.findall(r"`([^`]+)`", "\n".join(changes)))


def is_later(title: str, than: Version) -> bool:
    return title == "Unreleased" or Version(title.split()[0]) > than


@pytest.fixture(scope="module")
def present() -> set[str]:
    return set(surface())


@pytest.mark.parametrize("release", RECORDS, ids=str)
def test_what_a_release_had_is_there_or_changelog_says_what_to_write(release: Version, present: set[str]) -> None:
    gone = {line for line in RECORDS[release] if line not in present}
    assert gone - said_to_be_gone(release) == set()


@pytest.mark.parametrize("release", RECORDS, ids=str)
def test_nothing_demands_a_parameter_that_it_did_not_have(release: Version, present: set[str]) -> None:
    had = set(RECORDS[release])
    names = [line for line in sorted(had & present) if re.fullmatch(r"mup_megatron[\w.]+", line)]
    demanded = {f"{name}({each})" for name in names for each in parameters(value_of(name), required=True)}
    assert len(demanded) > 100
    assert demanded - had == set()


def value_of(name: str) -> object:
    """The value of a module's name; None for what is an attribute of one."""
    module, _, last = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), last, None)
    except ModuleNotFoundError:
        return None


def test_every_release_but_the_newest_is_recorded() -> None:
    assert set(RECORDS) == set(releases()) - {max(releases())}
    for lines in RECORDS.values():
        assert lines == sorted(set(lines))
        assert len(lines) > 1000


def test_a_release_says_first_what_has_to_be_changed() -> None:
    order = ["Removed", "Deprecated", "Changed", "Fixed", "Added"]
    for text in sections(2, CHANGELOG).values():
        kinds = list(sections(3, text))
        assert kinds == [kind for kind in order if kind in kinds]


def test_the_newest_release_comes_first() -> None:
    assert list(releases()) == sorted(releases(), reverse=True)
