"""What users hold of an earlier release is still there, or CHANGELOG says what to write: docs/compatibility.md."""

import importlib
import math
import re
from collections.abc import Mapping, Set
from itertools import pairwise
from pathlib import Path

import pytest
from packaging.version import Version
from support.surface import method, parameters, surface
from test_api import API

ROOT = Path(__file__).parents[1]
CHANGELOG = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
UNRELEASED = "Unreleased"
RULED_FROM = (0, 3)
"""From this minor release on, what goes was deprecated before."""
RECORDS = {
    Version(path.stem.removeprefix("surface-")): path.read_text(encoding="utf-8").splitlines()
    for path in sorted((ROOT / "tests" / "recorded").glob("surface-*.txt"))
}


def sections(level: int, text: str) -> dict[str, str]:
    """Heading → what stands beneath, of headings of one level."""
    _, *parts = re.split(rf"^{'#' * level} (.+)$", text, flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2], strict=True))


def releases() -> dict[Version, str]:
    return {Version(title): text for title, text in titled(CHANGELOG).items() if title != UNRELEASED}


def titled(changelog: str) -> dict[str, str]:
    """Version, or "Unreleased" → its section. What is there now is the state of "Unreleased", section or not."""
    return {title.split()[0]: text for title, text in sections(2, changelog).items()}


def in_code(section: str, *kinds: str) -> set[str]:
    """What a release's section says in code under headings such as Removed."""
    return set(re.findall(r"`([^`]+)`", "\n".join(sections(3, section).get(kind, "") for kind in kinds)))


def minor(title: str) -> tuple[float, ...]:
    """What is not released yet counts as a minor release after all others."""
    return (math.inf,) if title == UNRELEASED else Version(title).release[:2]


def breaches(changelog: str, states: Mapping[str, Set[str]]) -> list[str]:
    """What releases took away against the rules of docs/compatibility.md. States are lines by release, oldest first."""
    said = titled(changelog)
    found = []
    for (before, had), (title, has) in pairwise(states.items()):
        own = said.get(title, "")
        earlier = [in_code(text, "Deprecated") for other, text in said.items() if minor(other) < minor(title)]
        for line in sorted(had - has):
            if minor(before) == minor(title):
                found.append(f"{title} is a patch and has no {line}")
            elif line in in_code(own, "Changed"):
                continue  # it could only do something wrong
            elif line not in in_code(own, "Removed"):
                found.append(f"{title} has no {line}, and CHANGELOG does not say so")
            elif minor(title) >= RULED_FROM and not any(line in deprecated for deprecated in earlier):
                found.append(f"{title} has no {line}, which no minor release before it deprecated")
    return found


@pytest.fixture(scope="module")
def present() -> set[str]:
    return set(surface())


def test_what_releases_had_is_there_or_went_by_the_rules(present: set[str]) -> None:
    states = {str(release): set(RECORDS[release]) for release in sorted(RECORDS)}
    assert breaches(CHANGELOG, {**states, UNRELEASED: present}) == []


BOTH, ONE = {"kept", "old"}, {"kept"}
OLD_REMOVED = "### Removed\n\n- `old`: write `kept`.\n"
OLD_CHANGED = "### Changed\n\n- `old` computed another thing, and is gone: write `kept`.\n"
OLD_DEPRECATED = "### Deprecated\n\n- `old`: write `kept`.\n"


@pytest.mark.parametrize(
    ("releases", "expected"),
    [
        ({"0.3.0": (BOTH, ""), "0.4.0": (BOTH, "")}, None),
        ({"0.3.0": (ONE, ""), "0.3.1": (BOTH, "### Added\n\n- `old`\n")}, None),
        ({"0.3.0": (BOTH, ""), "0.4.0": (ONE, "")}, "0.4.0 has no old, and CHANGELOG does not say so"),
        ({"0.3.0": (BOTH, ""), "0.4.0": (ONE, "### Fixed\n\n- `old`\n")}, "does not say so"),
        ({"0.3.0": (BOTH, OLD_DEPRECATED), "0.4.0": (ONE, "")}, "does not say so"),
        ({"0.3.0": (BOTH, ""), "0.4.0": (ONE, OLD_REMOVED)}, "0.4.0 has no old, which no minor release before it"),
        ({"0.3.0": (BOTH, ""), "0.4.0": (ONE, OLD_REMOVED + OLD_DEPRECATED)}, "no minor release before"),
        ({"0.3.0": (BOTH, OLD_DEPRECATED), "0.4.0": (ONE, OLD_REMOVED)}, None),
        ({"0.3.0": (BOTH, ""), "0.3.1": (BOTH, OLD_DEPRECATED), "0.4.0": (ONE, OLD_REMOVED)}, None),
        ({"0.3.0": (BOTH, OLD_DEPRECATED), "0.4.0": (BOTH, ""), "0.5.0": (ONE, OLD_REMOVED)}, None),
        ({"0.3.0": (BOTH, OLD_DEPRECATED), "0.3.1": (ONE, OLD_REMOVED)}, "0.3.1 is a patch and has no old"),
        ({"0.3.0": (BOTH, OLD_DEPRECATED), "0.3.1": (ONE, OLD_CHANGED)}, "0.3.1 is a patch and has no old"),
        ({"0.3.0": (BOTH, ""), "0.4.0": (ONE, OLD_CHANGED)}, None),
        ({"0.1.0": (BOTH, ""), "0.2.0": (ONE, OLD_REMOVED)}, None),
        ({"0.2.0": (BOTH, ""), "0.3.0": (ONE, OLD_REMOVED)}, "0.3.0 has no old, which no minor release before it"),
        ({"0.2.0": (BOTH, ""), "Unreleased": (ONE, OLD_REMOVED)}, "Unreleased has no old, which no minor release"),
        ({"0.2.0": (BOTH, OLD_DEPRECATED), "Unreleased": (ONE, OLD_REMOVED)}, None),
    ],
)  # fmt: skip
def test_a_name_goes_by_the_rules(releases: dict[str, tuple[set[str], str]], expected: str | None) -> None:
    changelog = "\n".join(f"## {title} - 2030-01-01\n\n{text}" for title, (_, text) in releases.items())
    found = breaches(changelog, {title: lines for title, (lines, _) in releases.items()})
    assert [expected in each for each in found] == [True] if expected else found == []


@pytest.mark.parametrize("release", RECORDS, ids=str)
def test_nothing_demands_a_parameter_that_it_did_not_have(release: Version, present: set[str]) -> None:
    had = set(RECORDS[release])
    names = [line for line in sorted(had & present) if re.fullmatch(r"mup_megatron[\w.]+", line)]
    demanded = {f"{name}({each})" for name in names for each in parameters(value_of(name), required=True)}
    assert len(demanded) > 100
    assert demanded - had == set()


def value_of(name: str) -> object:
    """The value of a module's name, or a class's method; None for what is another attribute."""
    before, _, last = name.rpartition(".")
    if before in API:
        return getattr(importlib.import_module(before), last)
    module, _, owner = before.rpartition(".")
    return method(getattr(importlib.import_module(module), owner), last)


def test_methods_are_compared_as_functions_are() -> None:
    class Own:
        attribute = 1

        def called(self, given: int, other: int = 0) -> None: ...

        @classmethod
        def made(cls, given: int) -> None: ...

        @staticmethod
        def alone(given: int) -> None: ...

        @property
        def read(self) -> int:
            raise AssertionError("a property is not run")

    found = {name: list(parameters(method(Own, name))) for name in vars(Own) if not name.startswith("_")}
    assert found == {"attribute": [], "called": ["given", "other"], "made": ["given"], "alone": ["given"], "read": []}
    assert list(parameters(method(Own, "called"), required=True)) == ["given"]
    assert "mup_megatron.recipe.Recipe.plan(target)" in surface()


def test_every_release_is_recorded() -> None:
    assert set(RECORDS) == set(releases())
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
