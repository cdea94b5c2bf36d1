"""Every sentence of the quickstart comes from its data."""

import csv
import io
import json
import math

import pytest
from rich.console import Console

from mup_megatron.errors import InputError
from mup_megatron.quickstart.experiment import Cell, Experiment, ExperimentSettings, Result, grid, with_best_lr
from mup_megatron.quickstart.picture import png
from mup_megatron.quickstart.report import caption, compare, grid_csv, optimum, summary, table
from mup_megatron.recipe import recipe

SETTINGS = ExperimentSettings()
TUNED = 2.0**-7
RECIPE = recipe({"base": SETTINGS.model(64).model_dump(), "hyperparameters": {"lr": TUNED}}, source="test")


def valley(octaves: float) -> dict[float, float]:
    """A parabola over log2(lr) with its floor, 4, so many octaves from the tuned learning rate."""
    return {lr: 4.0 + 0.1 * (math.log2(lr / TUNED) - octaves) ** 2 for lr in SETTINGS.learning_rates}


def experiment(*, proxy: dict, mup: dict, standard: dict) -> Experiment:
    losses = {(64, "mup"): proxy, (256, "mup"): mup, (256, "standard"): standard}
    results = tuple(
        Result(cell=cell, loss=curve.get(cell.lr), reason=None if cell.lr in curve else "too hot")
        for (width, rule), curve in losses.items()
        for cell in grid(SETTINGS, width, rule)
    )
    return Experiment(settings=SETTINGS, recipe=RECIPE, results=results)


@pytest.mark.parametrize("octaves", [-1.4, 0.0, 0.3, 2.2])
def test_the_optimum_is_the_vertex_of_the_lowest_points(octaves):
    found = optimum(valley(octaves), SETTINGS.learning_rates)
    assert found is not None
    assert math.log2(found.lr / TUNED) == pytest.approx(octaves, abs=1e-9)
    assert not found.at_edge


def test_an_optimum_at_the_edge_is_called_so():
    found = optimum({lr: 5.0 + lr for lr in SETTINGS.learning_rates}, SETTINGS.learning_rates)
    assert found is not None
    assert (found.lr, found.at_edge) == (min(SETTINGS.learning_rates), True)
    text = caption(experiment(proxy=valley(0), mup=valley(0), standard=valley(-9)))
    assert "Standard parametrization: the best learning rate moved by -4.0 octaves, to the edge of the grid" in text
    text = caption(experiment(proxy=valley(-9), mup=valley(-9), standard=valley(-9)))
    assert "(learning rate 0.0078, at the edge of the grid)" in text


@pytest.mark.parametrize("octaves", [-0.3, 0.3])
def test_beside_a_diverged_run_the_optimum_is_the_lowest_point_itself(octaves):
    curve = {lr: loss for lr, loss in valley(octaves).items() if lr <= TUNED}
    found = optimum(curve, SETTINGS.learning_rates)
    assert found is not None
    assert (found.lr, found.at_edge) == (TUNED, False)


def test_a_level_curve_has_its_optimum_on_the_grid():
    found = optimum({1.0: 5.0, 2.0: 4.0, 4.0: 4.0, 8.0: 4.0}, (1.0, 2.0, 4.0, 8.0))
    assert found is not None
    assert found.loss == 4.0
    found = optimum(dict.fromkeys((2.0, 4.0, 8.0), 4.0), (1.0, 2.0, 4.0, 8.0))
    assert found is not None
    assert (found.lr, found.at_edge) == (2.0, False)


def test_transfer_that_worked_is_told_as_such():
    text = caption(experiment(proxy=valley(0), mup=valley(0.1), standard=valley(-2)))
    assert "μP: the best learning rate stayed where it was (+0.1 octaves), and the transferred one is the best" in text
    assert "Standard parametrization: the best learning rate moved by -2.0 octaves" in text
    assert "loses 0.400 to the best of the grid" in text


def test_transfer_that_failed_is_told_as_well():
    text = caption(experiment(proxy=valley(0), mup=valley(-1.5), standard=valley(0)))
    assert "μP: the best learning rate moved by -1.5 octaves" in text
    assert "Standard parametrization: the best learning rate stayed where it was" in text


def test_a_transferred_rate_that_diverges_is_told():
    found = experiment(proxy=valley(0), mup=valley(0), standard={k: v for k, v in valley(-2).items() if k < TUNED})
    told = "Standard parametrization: the best learning rate moved by -2.0 octaves, and the transferred one diverges."
    assert told in caption(found)
    assert compare(found, "standard").regret is None
    assert summary(found)["target"]["standard"]["transferred"] is None


@pytest.mark.parametrize(("rule", "name"), [("mup", "μP"), ("standard", "Standard parametrization")])
def test_a_rule_under_which_every_wide_run_diverges_is_told(rule, name):
    found = experiment(**{"proxy": valley(0), "mup": valley(0), "standard": valley(0), rule: {}})
    assert f"{name}: every learning rate of the grid diverges, the transferred one too." in caption(found)
    told = summary(found)["target"][rule]
    assert told == {
        "width": 256,
        "all_diverged": True,
        **dict.fromkeys(("transferred", "best", "regret", "shift_octaves", "optimum_at_edge")),
    }
    assert printed(table(found)).count("all diverged") == 1


def printed(found):
    console = Console(width=200, file=io.StringIO())
    console.print(found)
    return console.file.getvalue()


def test_summary_and_csv_hold_every_run_with_its_loss_or_why_it_has_none():
    found = experiment(proxy=valley(0), mup=valley(0), standard={k: v for k, v in valley(-2).items() if k < TUNED})
    rows = summary(found)["grid"]
    assert [(row["width"], row["rule"], row["lr"]) for row in rows] == [
        (width, rule, lr)
        for width, rule in ((64, "mup"), (256, "mup"), (256, "standard"))
        for lr in SETTINGS.learning_rates
    ]
    assert [row["reason"] for row in rows if row["loss"] is None] == ["too hot"] * 4
    from_csv = list(csv.DictReader(io.StringIO(grid_csv(found))))
    assert [float(row["loss"]) if row["loss"] else None for row in from_csv] == [row["loss"] for row in rows]
    assert [float(row["lr"]) for row in from_csv] == [row["lr"] for row in rows]
    assert list(from_csv[0]) == ["width", "rule", "lr", "loss", "reason"]


def test_the_summary_is_json_with_the_numbers_of_the_grid():
    found = summary(experiment(proxy=valley(0), mup=valley(0), standard=valley(-2)))
    assert json.loads(json.dumps(found)) == found
    assert found["fingerprint"] == RECIPE.fingerprint
    assert found["target"]["mup"]["regret"] == 0
    assert found["target"]["standard"]["transferred"] == pytest.approx(4.4)
    assert found["target"]["standard"]["shift_octaves"] == pytest.approx(-2)


def test_at_the_proxys_width_both_rules_are_the_same_runs():
    found = experiment(proxy=valley(0), mup=valley(1), standard=valley(-2))
    assert found.curve(64, "standard") == found.curve(64, "mup") == valley(0)
    assert found.curve(256, "standard") != found.curve(256, "mup")


def test_what_is_transferred_has_the_best_learning_rate_of_the_proxy_and_says_so():
    searched = RECIPE.model_copy(update={"provenance": {"study": "quickstart", "trial": 3, "loss": 4.5}})
    transferred = with_best_lr(searched, valley(-2))
    assert transferred.hyperparameters.lr == 2.0**-9
    assert transferred.provenance == {
        "search": {"study": "quickstart", "trial": 3, "loss": 4.5, "lr": TUNED},
        "lr_grid": {"lr": 2.0**-9, "loss": 4.0},
    }
    with pytest.raises(InputError, match="diverges on the proxy"):
        with_best_lr(RECIPE, {})


def test_the_grid_is_the_same_at_every_width_and_known_before_any_run():
    assert [cell.lr for cell in grid(SETTINGS, 64, "mup")] == [cell.lr for cell in grid(SETTINGS, 256, "standard")]
    assert Cell(width=256, rule="standard", lr=2.0**-9) in grid(SETTINGS, 256, "standard")


@pytest.mark.filterwarnings("error")  # matplotlib warns of a layout in which something has no place
@pytest.mark.parametrize("diverging", [{}, {lr: loss for lr, loss in valley(-2).items() if lr < 2 * TUNED}])
def test_the_picture_is_a_png_also_with_diverged_runs(diverging):
    for curves in ({"mup": valley(0), "standard": diverging}, {"mup": diverging, "standard": valley(0)}):
        assert png(experiment(proxy=valley(0), **curves)).startswith(b"\x89PNG\r\n\x1a\n")
