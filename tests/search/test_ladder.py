"""Which trials of a search over fidelities are run: the ladder for a budget, and who goes on to the next rung. Pure."""

import itertools
import math
import random
from collections.abc import Mapping, Sequence

import pytest

from mup_megatron.errors import InputError
from mup_megatron.search import Fidelity, Ladder, Rung, choose_ladder
from mup_megatron.search.ladder import LEAST_CANDIDATES

COSTS = (1.0, 5.0, 25.0)


def ladder(*trials: int) -> Ladder:
    rungs = tuple(Rung(Fidelity({"rung": number}, 4.0**number), count) for number, count in enumerate(trials))
    return Ladder(1e9, rungs)


def loss(slot: int, seed: int = 0) -> float:
    """Of a trial: other on every rung; every sixth diverges."""
    draw = random.Random(f"{seed}/{slot}")
    return math.inf if draw.random() < 1 / 6 else round(draw.random(), 1)  # rounded: some are equal


def halved(steps: Ladder, seed: int) -> list[set[int]]:
    """Plain halving, rung after rung: the slots of each."""
    candidates, found = list(range(steps.candidates)), []
    for number, rung in enumerate(steps.rungs):
        chosen = candidates[: rung.trials]
        slots = [number * steps.candidates + candidate for candidate in chosen]
        found.append(set(slots))
        losses = {slot % steps.candidates: loss(slot, seed) for slot in slots}
        candidates = sorted((c for c in losses if math.isfinite(losses[c])), key=lambda c: (losses[c], c))
    return found


def run(steps: Ladder, workers: int, seed: int) -> tuple[list[int], int]:
    """Runs a search in which trials take random times. Returns its slots as they began, and the moments of idleness."""
    order = random.Random(f"{workers}/{seed}")
    results: dict[int, float] = {}
    running: list[int] = []
    begun: list[int] = []
    idle = 0
    while True:
        wanted = steps.wanted(results, begun)
        for slot in [slot for slot in wanted if slot not in begun][: workers - len(running)]:
            begun.append(slot)
            running.append(slot)
        if not running:
            assert set(wanted) == set(results)
            return begun, idle
        idle += workers - len(running)
        ended = running.pop(order.randrange(len(running)))
        results[ended] = loss(ended, seed)


@pytest.mark.parametrize("counts", [(30, 10, 3), (30, 3), (12, 12, 12), (7,), (40, 20, 10, 5), (5, 5, 2)])
def test_any_number_of_workers_in_any_order_runs_what_plain_halving_runs(counts: tuple[int, ...]) -> None:
    for workers, seed in itertools.product((1, 2, 7, 100), range(10)):
        begun, _ = run(ladder(*counts), workers, seed)
        assert len(begun) == len(set(begun))
        assert set(begun) == set().union(*halved(ladder(*counts), seed))


def test_workers_wait_only_at_the_ends_of_short_rungs() -> None:
    """As many at a time as the next rung has trials, less one: only the last rungs leave workers without work."""
    _, idle = run(ladder(60, 12), 4, seed=1)
    assert idle <= sum(range(4)) + 4


@pytest.mark.parametrize("budget", [1e9, 1e300, 1.7e308])
@pytest.mark.parametrize("costs", [COSTS, (1e-300, 1.0), (1.0,)])
def test_a_budget_for_more_trials_than_a_study_can_have_is_refused(budget: float, costs: Sequence[float]) -> None:
    with pytest.raises(InputError, match=r"^--budget \S+: enough for more than the 1000000 trials .* Lower it\.$"):
        choose_ladder([Fidelity({}, cost) for cost in costs], budget)


def test_the_largest_study_there_can_be_is_allowed() -> None:
    assert choose_ladder([Fidelity({}, 1.0)], 1e6).trials == 1_000_000
    with pytest.raises(InputError, match="Lower it"):
        choose_ladder([Fidelity({}, 1.0)], 1e6 + 1)


def test_a_candidate_goes_on_when_no_other_can_displace_it() -> None:
    steps = ladder(5, 2)
    assert steps.wanted({}, []) == [0, 1, 2, 3, 4]
    results = {0: 0.5, 1: 0.1, 2: 0.3}
    assert steps.wanted(results, range(5)) == [0, 1, 2, 3, 4], "the two that run may be the best two"
    assert steps.wanted({**results, 3: 0.9}, range(5)) == [0, 1, 2, 3, 4, 6], "the best of all, or the second"
    assert steps.wanted({**results, 3: 0.9, 4: 0.2}, range(5)) == [0, 1, 2, 3, 4, 6, 9]
    assert steps.wanted({**results, 3: 0.9, 4: math.inf}, range(5)) == [0, 1, 2, 3, 4, 6, 7]


def test_what_has_begun_is_never_taken_back() -> None:
    """A trial that was given up and then succeeds may be better than one that went on in its place."""
    steps = ladder(3, 1)
    assert steps.wanted({0: 0.5, 1: 0.4, 2: math.inf}, range(3)) == [0, 1, 2, 4]
    assert steps.wanted({0: 0.5, 1: 0.4, 2: 0.1}, [0, 1, 2, 4]) == [0, 1, 2, 4]


def test_where_all_diverge_the_search_is_over() -> None:
    assert ladder(4, 2, 1).wanted(dict.fromkeys(range(4), math.inf), range(4)) == [0, 1, 2, 3]


def fidelities(costs: Sequence[float] = COSTS) -> list[Fidelity]:
    return [Fidelity({"steps": cost}, cost) for cost in costs]


def counts(made: Ladder) -> Mapping[float, int]:
    return {rung.fidelity.cost: rung.trials for rung in made.rungs}


@pytest.mark.parametrize("costs", [COSTS, (3.0, 4.0), (2.0,), (1.0, 2.0, 4.0, 8.0)])
@pytest.mark.parametrize("budget", [200.0, 500.0, 1234.5, 1e5])
def test_a_ladder_costs_at_most_its_budget_and_one_candidate_more_would_cost_more(
    costs: tuple[float, ...], budget: float
) -> None:
    made = choose_ladder(fidelities(costs), budget)
    assert made.cost <= budget < made.cost + sum(costs)
    assert made.budget == budget
    trials = [rung.trials for rung in made.rungs]
    assert trials == sorted(trials, reverse=True)
    assert made.candidates >= LEAST_CANDIDATES


def test_most_of_the_candidates_are_on_the_cheapest_rung() -> None:
    made = choose_ladder(fidelities(), 1e5)
    assert made.rungs[0].trials > 7 * made.rungs[1].trials > 7 * 2 * made.rungs[2].trials


def test_too_small_a_budget_is_refused_with_what_is_needed() -> None:
    with pytest.raises(InputError, match=r"--budget 50: too small, the least ladder .* costs (\S+) and") as error:
        choose_ladder(fidelities(), 50.0)
    needed = float(str(error.value).split(" costs ")[1].split()[0])
    assert 0 <= choose_ladder(fidelities(), needed).candidates - LEAST_CANDIDATES <= 1


def test_it_is_the_same_read_back() -> None:
    made = choose_ladder(fidelities(), 1e4)
    assert Ladder.from_json(made.to_json()) == made
