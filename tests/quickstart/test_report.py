"""Every sentence of the quickstart comes from its data."""

import json
import math

import pytest

from mup_megatron.errors import InputError
from mup_megatron.quickstart.experiment import Cell, Experiment, Result, Settings, grid, with_best_lr
from mup_megatron.quickstart.picture import png
from mup_megatron.quickstart.report import caption, compare, optimum, summary
from mup_megatron.recipe import recipe

SETTINGS = Settings()
TUNED = 2.0**-7
RECIPE = recipe({"base": SETTINGS.model(64).model_dump(), "hyperparameters": {"lr": TUNED}}, source="test")


def valley(octaves: float) -> dict[float, float]:
    """A parabola over log2(lr) with its floor, 4, so many octaves from the tuned learning rate."""
    return {lr: 4.0 + 0.1 * (math.log2(lr / TUNED) - octaves) ** 2 for lr in SETTINGS.learning_rates}


def experiment(*, proxy: dict, mup: dict, standard: dict) -> Experiment:
    losses = {(64, "mup"): proxy, (256, "mup"): mup, (256, "standard"): standard}
    results = tuple(
        Result(cell=cell, loss=curve.get(cell.lr), reason=None)
        for (width, rule), curve in losses.items()
        for cell in grid(SETTINGS, width, rule)
    )
    return Experiment(settings=SETTINGS, recipe=RECIPE, results=results)


@pytest.mark.parametrize("octaves", [-1.4, 0.0, 0.3, 2.2])
def test_the_optimum_is_the_vertex_of_the_lowest_points(octaves):
    found = optimum(valley(octaves))
    assert math.log2(found.lr / TUNED) == pytest.approx(octaves, abs=1e-9)
    assert not found.at_edge


def test_an_optimum_at_the_edge_is_called_so():
    found = optimum({lr: 5.0 + lr for lr in SETTINGS.learning_rates})
    assert (found.lr, found.at_edge) == (min(SETTINGS.learning_rates), True)


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
    transferred = with_best_lr(RECIPE, valley(-2))
    assert transferred.hyperparameters.lr == 2.0**-9
    assert "grid on the proxy" in transferred.provenance["lr"]
    with pytest.raises(InputError, match="diverges on the proxy"):
        with_best_lr(RECIPE, {})


def test_the_grid_is_the_same_at_every_width_and_known_before_any_run():
    assert [cell.lr for cell in grid(SETTINGS, 64, "mup")] == [cell.lr for cell in grid(SETTINGS, 256, "standard")]
    assert Cell(width=256, rule="standard", lr=2.0**-9) in grid(SETTINGS, 256, "standard")


def test_the_picture_is_a_png_also_with_diverged_runs():
    diverging = {lr: loss for lr, loss in valley(-2).items() if lr < 2 * TUNED}
    picture = png(experiment(proxy=valley(0), mup=valley(0), standard=diverging))
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
