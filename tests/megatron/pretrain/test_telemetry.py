"""What a run tells TensorBoard and Weights & Biases: both real, both written to the disk."""

import json
from pathlib import Path

import pytest
from support.lm_recipes import a_recipe, line, recipe_file
from support.lm_runs import SCRIPT, run_script
from support.wandb_files import read_back
from support.watching_page import names, require_same

pytest.importorskip("megatron.training", reason="megatron-core 0.16 has no megatron.training in its wheel")
LAYERS = ["embedding", "layer_000", "layer_001", "final_layernorm", "output_layer"]


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    names = [name for name in events.Tags()["scalars"] if name.startswith("mup/")]
    return {name: {event.step: event.value for event in events.Scalars(name)} for name in names}


def logged(folder: Path, ranks: int, **layout: object) -> dict[str, dict[int, float]]:
    board = folder / "board"
    words = line(train_iters=4, tensorboard_dir=board, tensorboard_log_interval=1, mup_coordinates_interval=2, **layout)
    words += ["--mup-recipe", str(recipe_file(folder, schedule={"lr_decay_style": "linear"}))]
    run_script(SCRIPT, words, ranks, folder=folder / "ranks", launcher=True).require_success()
    return scalars(board)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[int, float]]:
    return logged(tmp_path_factory.mktemp("one"), 1)


def test_each_roles_learning_rate_is_logged_at_every_step(one_process: dict[str, dict[int, float]]) -> None:
    base, hidden = one_process["mup/lr/input"], one_process["mup/lr/hidden"]
    assert base == pytest.approx({1: 0.75e-3, 2: 0.5e-3, 3: 0.25e-3, 4: 0.0})
    assert hidden == pytest.approx({step: lr / 4 for step, lr in base.items()})


def test_each_layers_size_is_logged_when_it_was_asked_for(one_process: dict[str, dict[int, float]]) -> None:
    sizes = {name.removeprefix("mup/rms/"): steps for name, steps in one_process.items() if "/rms/" in name}
    assert sorted(sizes) == sorted(LAYERS)
    assert all(list(steps) == [2, 4] for steps in sizes.values())
    assert sizes["final_layernorm"][2] == pytest.approx(1.0, abs=0.01)  # what a norm is for
    assert sizes["embedding"][2] == pytest.approx(3.0 * 0.05 * 2**0.5, rel=0.1)  # two tables, α_in · σ each


def test_the_page_on_watching_has_every_name_and_no_other(one_process: dict[str, dict[int, float]]) -> None:
    require_same(names("Megatron-LM"), set(one_process))


@pytest.mark.parametrize(
    "layout", [{"tensor_model_parallel_size": 2, "sequence_parallel": True}, {"pipeline_model_parallel_size": 2}]
)
def test_the_sizes_are_those_of_the_whole_model(
    tmp_path: Path, one_process: dict[str, dict[int, float]], layout: dict[str, object]
) -> None:
    found = logged(tmp_path, 2, **layout)
    # Pipeline stages draw other weights, so their sizes agree as samples do.
    rel = 1e-4 if "tensor_model_parallel_size" in layout else 0.1
    for name, steps in one_process.items():
        assert found[name] == pytest.approx(steps, rel=rel), name


def test_the_recipe_is_in_the_configuration_at_wandb(tmp_path: Path) -> None:
    words = line(
        wandb_project="mup", wandb_exp_name="a", wandb_save_dir=tmp_path / "wandb", tensorboard_dir=tmp_path / "t"
    )
    words += ["--mup-recipe", str(recipe_file(tmp_path)), "--tensorboard-log-interval", "1"]
    offline = {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    run_script(SCRIPT, words, 1, folder=tmp_path / "ranks", launcher=True, environment=offline).require_success()
    (found,) = tmp_path.rglob("run-*.wandb")
    config, history = read_back(found)
    assert config["mup_fingerprint"] == a_recipe().fingerprint
    assert json.loads(config["mup_recipe_content"])["hyperparameters"]["lr"] == 1e-3
    assert history["mup/lr/hidden"] == pytest.approx({1: 0.25e-3, 2: 0.25e-3})
    assert history["learning-rate"] == pytest.approx(history["mup/lr/input"])  # the base's
