"""What a space file means, and what is refused."""

import math
import statistics
from pathlib import Path

import pytest

from mup_megatron.errors import InputError
from mup_megatron.search import Space, load_space

CONFIGS = Path(__file__).parents[2] / "configs" / "spaces"
HYPERPARAMETERS = ("lr", "init_method_std", "embedding_multiplier", "attention_multiplier", "output_multiplier")


def space(tmp_path: Path, text: str) -> Space:
    file = tmp_path / "space.yaml"
    file.write_text(text)
    return load_space(file, HYPERPARAMETERS)


def bounds(tmp_path: Path, entry: str) -> dict[str, float | bool]:
    return space(tmp_path, f"lr: {entry}").to_json()["lr"]


def test_bounds_are_values_and_the_draw_is_uniform_unless_said_otherwise(tmp_path: Path) -> None:
    assert bounds(tmp_path, "{low: 1, high: 3}") == {"low": 1.0, "high": 3.0, "log": False}
    assert bounds(tmp_path, "{low: -1, high: 3, log: false}") == {"low": -1.0, "high": 3.0, "log": False}


def test_with_base_the_bounds_are_its_exponents(tmp_path: Path) -> None:
    assert bounds(tmp_path, "{low: -4, high: -1, base: 10}") == {"low": 1e-4, "high": 0.1, "log": True}
    assert bounds(tmp_path, "{low: -1, high: 1, base: 4}") == {"low": 0.25, "high": 4.0, "log": True}


def test_base_and_log_are_two_ways_to_write_one_distribution(tmp_path: Path) -> None:
    assert bounds(tmp_path, "{low: -4, high: -1, base: 10}") == bounds(tmp_path, "{low: 1e-4, high: 0.1, log: true}")


def test_draws_fill_the_bounds_evenly(tmp_path: Path) -> None:
    both = space(tmp_path, "lr: {low: -4, high: -1, base: 10}\noutput_multiplier: {low: 2, high: 6}")
    draws = [both.sample(7, trial) for trial in range(2000)]
    exponents = sorted(math.log10(draw["lr"]) for draw in draws)
    values = sorted(draw["output_multiplier"] for draw in draws)
    for drawn, low, high in ((exponents, -4, -1), (values, 2, 6)):
        assert low <= drawn[0]
        assert drawn[-1] <= high
        # Kolmogorov-Smirnov: exceeded by one in a thousand fair samples.
        fractions = [(value - low) / (high - low) for value in drawn]
        assert max(abs(f - (i + 0.5) / len(fractions)) for i, f in enumerate(fractions)) < 1.95 / math.sqrt(2000)
    assert abs(statistics.correlation([d["lr"] for d in draws], [d["output_multiplier"] for d in draws])) < 0.1


def test_a_draw_depends_on_seed_and_trial_alone(tmp_path: Path) -> None:
    lr = space(tmp_path, "lr: {low: -4, high: -1, base: 10}")
    assert lr.sample(1, 5) == lr.sample(1, 5)
    assert len({lr.sample(seed, trial)["lr"] for seed in range(10) for trial in range(10)}) == 100


def test_draws_are_the_same_on_every_machine_and_in_every_release(tmp_path: Path) -> None:
    """Written down once: a study that is continued with a newer release must not change its draws."""
    uniform = space(tmp_path, "lr: {low: 0, high: 1}")
    assert [uniform.sample(0, trial)["lr"] for trial in range(3)] == [
        0.3989582531343857,
        0.3672359278073576,
        0.07392656685771148,
    ]


def test_order_and_other_hyperparameters_do_not_matter(tmp_path: Path) -> None:
    lr, std = "lr: {low: -4, high: -1, base: 10}\n", "init_method_std: {low: 0, high: 1}\n"
    first, second, alone = space(tmp_path, lr + std), space(tmp_path, std + lr), space(tmp_path, lr)
    assert first == second
    assert first.sample(0, 0) == second.sample(0, 0)
    assert first.sample(0, 0)["lr"] == alone.sample(0, 0)["lr"]


def test_json_gives_the_same_space_back(tmp_path: Path) -> None:
    given = space(tmp_path, "lr: {low: -4, high: -1, base: 10}\noutput_multiplier: {low: 2, high: 6}")
    assert Space.from_json(given.to_json()) == given


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lrr: {low: 0, high: 1}", ["lrr", "Choose from lr"]),
        ("1: {low: 0, high: 1}", ["1: not a hyperparameter"]),
        ("lr: {low: 0, high: 1, step: 2}", ["lr: step: unknown key", "Known keys: low, high, log, base"]),
        ("lr: {low: 0, hihg: 1}", ["hihg: unknown key", "'high'"]),
        ("lr: {low: 0}", ["lr: high: missing"]),
        ("lr: 3", ["lr: expected keys and values"]),
        ("lr: {low: 1, high: 1}", ["lr: low 1 is not below high 1"]),
        ("lr: {low: 2, high: 1}", ["lr: low 2 is not below high 1"]),
        ("lr: {low: '0', high: 1}", ["lr: low: should be a valid number", "'0'"]),
        ("lr: {low: true, high: 2}", ["lr: low: should be a valid number"]),
        ("lr: {low: 0, high: .inf}", ["lr: high: must be a finite number"]),
        ("lr: {low: .nan, high: 1}", ["lr: low: must be a finite number"]),
        ("lr: {low: 1, high: 2, log: 1}", ["lr: log: should be a valid boolean"]),
        ("lr: {low: 0, high: 1, log: true}", ["lr: low 0 is not positive", "Raise it"]),
        ("lr: {low: -4, high: -1, base: 10, log: true}", ["lr: has both log and base", "Keep"]),
        ("lr: {low: -4, high: -1, base: 1}", ["lr: base: should be greater than 1"]),
        ("lr: {low: 0, high: 1.0e+300}", ["lr: has a bound beyond 1e+100", "narrower"]),
        ("lr: {low: -1.0e+300, high: 1}", ["lr: has a bound beyond 1e+100"]),
        ("lr: {low: 1, high: 300, base: 10}", ["lr: 10^1 to 10^300", "exponents"]),
        ("lr: {low: 0, high: 1000, base: 10}", ["lr: 10^0 to 10^1000", "exponents"]),
        ("lr: {low: -1000, high: 1, base: 10}", ["lr: 10^-1000 to 10^1", "exponents"]),
        ("lr: {low: 0, high: 1}\nlr: {low: 0, high: 2}", ["line 2", "given twice"]),
        ("lr: {low: 0, high: 1", ["not valid YAML"]),
        ("lr: !!python/object/apply:os.system [exit 3]", ["not valid YAML"]),
        ("", ["no hyperparameters"]),
        ("[lr]", ["no hyperparameters"]),
    ],
)
def test_a_bad_file_is_refused_by_name_with_a_remedy(tmp_path: Path, text: str, said: list[str]) -> None:
    with pytest.raises(InputError) as refusal:
        space(tmp_path, text)
    assert str(tmp_path / "space.yaml") in str(refusal.value)
    for part in said:
        assert part in str(refusal.value)


def test_a_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.yaml: no such file"):
        load_space(tmp_path / "none.yaml", HYPERPARAMETERS)


def test_the_gpt3_space_is_the_papers() -> None:
    """LR 10^U(-4,-1), init scale 10^U(-1,1) on 0.02, embedding 10^U(-1,1), attention and output 4^U(-1,1)."""
    tenfold, fourfold = {"low": 0.1, "high": 10.0, "log": True}, {"low": 0.25, "high": 4.0, "log": True}
    assert load_space(CONFIGS / "gpt3_6.7b.yaml", HYPERPARAMETERS).to_json() == {
        "lr": {"low": 1e-4, "high": 0.1, "log": True},
        "init_method_std": {"low": 0.002, "high": 0.2, "log": True},
        "embedding_multiplier": tenfold,
        "attention_multiplier": fourfold,
        "output_multiplier": fourfold,
    }


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_space_here_loads(file: Path) -> None:
    assert "lr" in load_space(file, HYPERPARAMETERS).ranges
