"""The report of a study: what its numbers say, what a page has of any study, and that names in it stay text."""

import math
import random
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest

from mup_megatron.search import Fidelity, Ladder, Rung, StudyRecord, StudySpec, Trial
from mup_megatron.search.page import Wording, report_files
from mup_megatron.search.page.analysis import agreements, compared, importances, interval, spearman
from mup_megatron.search.page.pictures import plain
from mup_megatron.search.space import SearchRange, Space

PNG = b"\x89PNG\r\n\x1a\n"
COUNTS, COSTS = (60, 12, 5), (1.0, 5.0, 20.0)
LADDER = Ladder(400.0, tuple(Rung(Fidelity({}, c), n) for n, c in zip(COUNTS, COSTS, strict=True)))
LR, IDLE = "lr", "weight_decay"


def space(*names: str) -> Space:
    return Space({name: SearchRange(1e-4, 1e-1, log=index == 0) for index, name in enumerate(names)})


def bowl(fractions: list[float], rung: int, draw: random.Random) -> float:
    """Lowest in the middle of the first hyperparameter, which alone matters; NaN at its upper end."""
    return math.nan if fractions[0] > 0.9 else 4.0 - 0.5 * rung + (fractions[0] - 0.5) ** 2 + draw.gauss(0, 0.003)


def study(
    names: tuple[str, ...] = (LR, IDLE), *, counts: tuple[int, ...] = COUNTS, of: str = "search",
    loss: Callable[[list[float], int, random.Random], float] = bowl,
) -> StudyRecord:  # fmt: skip
    """A study that is over: random trials, the best of them on each further rung."""
    chosen, draw = space(*names), random.Random(5)
    ladder = LADDER if len(counts) > 1 else None
    spec = StudySpec(of, "sqlite:///search.db", 1, "random", chosen, {}, ladder=ladder)
    trials: list[Trial] = []
    candidates = list(range(counts[0]))
    for rung, count in enumerate(counts):
        losses = {}
        for candidate in candidates[:count]:
            parameters = chosen.sample(3, candidate)
            found = loss([chosen.ranges[name].fraction(parameters[name]) for name in names], rung, draw)
            finite = None if math.isnan(found) else found
            slot = rung * counts[0] + candidate
            state = "diverged" if finite is None else "complete"
            trials.append(Trial(len(trials), slot, state, finite, parameters, 1.0, None, {}))  # type: ignore[arg-type]
            losses |= {} if finite is None else {candidate: finite}
        candidates = sorted(losses, key=lambda candidate: losses[candidate])
    return StudyRecord(spec, tuple(trials), len(trials))


WORDING = Wording([f"{cost:g} units" for cost in COSTS], "units", first=LR)
ONE = Wording(["trials"], "units", 3.0, LR)


# What is computed


def test_rank_correlation_is_spearmans() -> None:
    draw = np.random.default_rng(1)
    first = draw.integers(0, 8, 30).astype(float)  # with equal ones
    second = first + draw.normal(size=30)
    expected = pd.DataFrame({"first": first, "second": second}).corr(method="spearman").iloc[0, 1]
    assert spearman(first, second) == pytest.approx(expected, rel=1e-12)
    assert spearman(np.ones(4), np.arange(4.0)) == 0.0


@pytest.mark.parametrize("count", [5, 8, 20])
def test_nine_of_ten_intervals_hold_the_rank_correlation(count: int) -> None:
    draw, rho = np.random.default_rng(2), 0.8
    true = 6 / math.pi * math.asin(rho / 2)  # of normal variables with this correlation
    held = []
    for _ in range(400):
        first = draw.normal(size=count)
        low, high = interval(spearman(first, rho * first + math.sqrt(1 - rho**2) * draw.normal(size=count)), count)
        held.append(low <= true <= high)
    assert 0.86 <= np.mean(held) <= 0.98
    # Perfect order among few proves little.
    assert interval(1.0, 5)[0] < 0.5


def test_rungs_are_compared_by_candidate() -> None:
    made = study()
    on = [
        {trial.slot % 60: trial.loss for trial in made.trials if trial.slot // 60 == rung and trial.loss is not None}
        for rung in range(3)
    ]
    assert sorted(compared(made, 0, 2)) == sorted((on[0][candidate], loss) for candidate, loss in on[2].items())
    found = agreements(made)
    assert [(each.lower, each.upper, each.candidates) for each in found] == [(0, 1, 12), (0, 2, 5), (1, 2, 5)]
    assert all(each.interval[0] <= each.correlation <= each.interval[1] for each in found)
    assert agreements(study(counts=(60,))) == []


def test_what_matters_is_told_from_what_does_not() -> None:
    found = importances(study())
    assert list(found) == [LR, IDLE]
    assert found[LR].share > 5 * found[LR].by_chance
    assert found[IDLE].share < 0.1
    assert sum(each.share for each in found.values()) == pytest.approx(1.0)
    assert importances(study(counts=(19,))) == {}


def test_where_it_diverges_matters_too() -> None:
    def cliff(fractions: list[float], rung: int, draw: random.Random) -> float:
        return math.nan if fractions[0] > 0.15 else 3.0 + draw.gauss(0, 0.1)

    found = importances(study(counts=(200,), loss=cliff))[LR]
    assert found.share > 10 * found.by_chance


# The page


class _Tags(HTMLParser):
    """Whether tags that are opened are closed; and those of the page."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href", "data", "action")]
        assert not any(name.startswith("on") for name, _ in attrs)
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def read(files: dict[str, str | bytes]) -> tuple[str, _Tags]:
    """The text of the page, and its tags, which need nothing from anywhere."""
    page = files["index.html"]
    assert isinstance(page, str)
    tags = _Tags()
    tags.feed(page)
    assert tags.open == []
    assert set(tags.seen) <= {"html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "div", "table", "tr",
                              "th", "td", "img"}  # fmt: skip
    assert all(source.startswith("data:image/png;base64,") for source in tags.sources)
    assert len(tags.sources) == len(files) - 1
    assert all(content[:8] == PNG for name, content in files.items() if name != "index.html")
    return re.sub(r"data:[^\"]*", "", page), tags


PICTURES = {"hyperparameters", "importance", "interactions", "parallel", "cost", "history"}


def pictures(files: dict[str, str | bytes]) -> set[str]:
    return {name.removesuffix(".png") for name in files} - {"index.html"}


def test_a_search_with_rungs_has_every_picture() -> None:
    files = report_files(study(), WORDING)
    assert pictures(files) == PICTURES | {"rungs"}
    page, _ = read(files)
    assert "missing" not in page.split("</style>")[1]
    best = study().best
    assert best is not None
    assert f"Best: {best.loss:.5g} (trial {best.number})." in page
    assert "All candidates as whole trials would cost 1.2e+03 units; spent is 18.3% of that." in page
    assert report_files(study(), WORDING) == files, "the same study is the same report"


def test_random_trials_without_rungs_have_every_picture_that_goes_without() -> None:
    made = study(counts=(60,))
    files = report_files(made, ONE)
    assert pictures(files) == PICTURES
    page, _ = read(files)
    diverged = sum(trial.loss is None for trial in made.trials)
    assert diverged > 0
    assert f"60 trials have a result, {diverged} diverged, 180 units spent" in page
    assert "lowest rung" not in page
    assert "Do the rungs agree?" not in page


def test_one_hyperparameter_is_beside_no_other() -> None:
    files = report_files(study((LR,), counts=(60,)), ONE)
    assert pictures(files) == PICTURES - {"interactions"}
    read(files)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_with_few_trials_the_page_says_what_is_missing(count: int) -> None:
    made = study(counts=(60,))
    made = replace(made, trials=made.trials[:count])
    files = report_files(made, ONE)
    assert pictures(files) == {"cost"}
    page, _ = read(files)
    assert f"A fit needs 20 complete trials. There are {count}." in page
    assert f"This needs 4 complete trials. There are {count}." in page
    assert f"Importance needs 20 trials with a result, one of them complete. There are {count}." in page
    assert ("No trial is complete yet." in page) == (count == 0)


def test_a_search_under_way_on_its_lowest_rung_has_no_answer_yet() -> None:
    made = study()
    running = replace(made.trials[30], state="running", loss=None, seconds=None)
    page, _ = read(report_files(replace(made, trials=(*made.trials[:30], running)), WORDING))
    assert "1 running, 46 to come" in page
    assert "No whole trial is complete yet." in page
    assert "No two rungs have 4 candidates in common yet." in page


def test_all_diverged_or_all_alike_is_a_report_too() -> None:
    files = report_files(study(loss=lambda *_: math.nan), WORDING)
    assert pictures(files) == {"cost"}
    assert "This needs 4 complete trials on the lowest rung. There are 0." in read(files)[0]
    read(report_files(study(loss=lambda *_: 3.0), WORDING))


def test_losses_beyond_all_measure_are_a_report_too() -> None:
    def huge(fractions: list[float], rung: int, draw: random.Random) -> float:
        return (draw.random() - 0.5) * 1.7e308 if fractions[1] < 0.5 else 3.0 + fractions[0]

    page, _ = read(report_files(study(counts=(60,), loss=huge), ONE))
    assert "No fit" in page


def test_names_are_text_and_not_markup_or_formulas() -> None:
    hostile = ('<script>alert("1")</script>', r"$\frac{$", "a\nb\x1b[31m", "名前" * 40)
    made = study(hostile, counts=(60,), of='"><img src=x onerror=alert(1)>')
    page, tags = read(report_files(made, Wording(["<b>$x$</b>"], "<i>", 1.0)))
    assert "script" not in tags.seen
    assert "&lt;script&gt;alert(&quot;1&quot;)&lt;/script&gt;" in page
    assert "default-src 'none'" in page
    assert plain(hostile[1]) == r"\$\frac{\$"
    assert plain(hostile[2]) == "a?b?[31m"
    assert plain(hostile[3]) == (hostile[3])[:39] + "…"
