"""A script on Megatron-LM's own training loop with the plug-in: what it trains, at every layout, across a resume."""

import csv
from pathlib import Path
from typing import Any

import pytest
from support.lm_recipes import WIDTH, line, recipe_file
from support.lm_runs import CPU_FLAGS, SCRIPT, Finished, gpt, run_script
from support.processes import run_ranks
from support.training_runs import command_line, make_text

pytest.importorskip("megatron.training", reason="megatron-core 0.16 has no megatron.training in its wheel")

ROUNDING = 1e-5
"""Absolute, of a loss of about 6 after a few steps in fp32."""


def run(folder: Path, words: list[str], ranks: int = 1, *, launcher: bool = True) -> Finished:
    return run_script(SCRIPT, words, ranks, folder=folder, launcher=launcher).require_success()


# ---- what it trains -----------------------------------------------------------------------------------------------


def test_a_recipe_whose_base_is_the_target_changes_nothing(tmp_path: Path) -> None:
    """Bitwise, with Megatron's own defaults in the recipe; without a recipe nothing is touched at all."""
    plain = {"output_multiplier": 1.0, "embedding_multiplier": 1.0, "init_method_std": 0.02, "weight_decay": 0.01}
    path = recipe_file(tmp_path, width=WIDTH, **plain)
    own = line(train_iters=4, lr=1e-3, min_lr=0, lr_decay_style="constant")
    without = run(tmp_path / "plain", own, launcher=False)
    assert run(tmp_path / "mup", [*line(train_iters=4), "--mup-recipe", str(path)]).losses == without.losses
    assert run(tmp_path / "none", own).losses == without.losses


def test_it_trains_as_our_own_loop_does_and_not_as_without(tmp_path: Path) -> None:
    corpus: Path = run_ranks(make_text, 1, tmp_path)[0]
    schedule = {"lr_decay_style": "cosine", "lr_warmup_fraction": 0.25}
    path = recipe_file(tmp_path, schedule=schedule)
    target = tmp_path / "target.yaml"
    target.write_text(
        f"num_layers: 2\nhidden_size: {WIDTH}\nnum_attention_heads: 4\nvocab_size: 512\nseq_length: 32\n"
        "transformer_impl: local\n"
    )
    train = ["--data", str(corpus), "--train-iters", "8", "--global-batch-size", "8", "--micro-batch-size", "2"]
    words = ["train", str(target), "--recipe", str(path), *train, "--split", "9,1,0", "--output", str(tmp_path / "own")]
    [trained] = run_ranks(command_line, 1, *words)
    assert trained.code == 0, trained.stderr
    with (tmp_path / "own" / "metrics.csv").open() as stream:
        expected = {int(row["iteration"]): float(row["loss"]) for row in csv.DictReader(stream)}

    data = ["--data-path", str(corpus), "--split", "9,1,0", "--tokenizer-type", "NullTokenizer"]
    data += ["--vocab-size", "511", "--data-cache-path", str(tmp_path / "cache")]
    sizes: dict[str, Any] = {"num_layers": 2, "hidden_size": WIDTH, "train_iters": 8}
    said = {"init_method_std": 0.05, "weight_decay": 0.1, "lr_decay_style": "cosine", "lr_warmup_fraction": 0.25}
    without = run(tmp_path / "plain", [*gpt(**sizes, **said), *data, *CPU_FLAGS])
    sizes |= {"lr": None, "min_lr": None, "lr_decay_style": None}
    found = run(tmp_path / "mup", [*gpt(**sizes), *data, *CPU_FLAGS, "--mup-recipe", str(path)])

    assert found.losses == pytest.approx(expected, abs=ROUNDING)
    assert abs(found.losses[8] - without.losses[8]) > 1e-2


def test_the_plan_is_printed_once_and_no_rank_repeats_it(tmp_path: Path) -> None:
    words = [*line(tensor_model_parallel_size=2), "--mup-recipe", str(recipe_file(tmp_path)), "--mup-print-plan"]
    finished = run(tmp_path / "ranks", words, ranks=2)
    assert "decoder.layers.0-1.mlp.linear_fc1.weight" in finished.out[0]
    assert "> mup-megatron: recipe" in finished.out[0]
    assert "mup-megatron" not in finished.out[1]
    assert "linear_fc1.weight  " not in finished.out[1]


# ---- layouts ------------------------------------------------------------------------------------------------------


LAYOUTS = {
    "TP2 + SP": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "DP2": (2, {}),
    "PP2": (2, {"pipeline_model_parallel_size": 2}),
    "PP2, interleaved": (2, {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1}),
    "TP2 × PP2 + SP": (
        4,
        {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "sequence_parallel": True},
    ),
}
SHAPE: dict[str, Any] = {"num_layers": 4, "train_iters": 6, "use_distributed_optimizer": True}


@pytest.fixture(scope="module")
def first_half(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Finished]:
    """A checkpoint of iteration 3, the recipe, and the whole run of 6 iterations on one process."""
    folder = tmp_path_factory.mktemp("first_half")
    path = recipe_file(folder)
    saving = {"save": folder / "ck", "save_interval": 3, "ckpt_format": "torch_dist"}
    words = [*line(**saving, dist_ckpt_optim_fully_reshardable=True, **SHAPE), "--mup-recipe", str(path)]
    whole = run(folder / "ranks", words)
    (folder / "ck" / "latest_checkpointed_iteration.txt").write_text("3")
    return folder / "ck", path, whole


@pytest.mark.parametrize(
    "layout",
    # Of these two TP2 × PP2 + SP is made.
    [pytest.param(name, marks=pytest.mark.slow) if name in ("TP2 + SP", "PP2") else name for name in LAYOUTS],
)
def test_every_layout_goes_on_from_one_process(
    tmp_path: Path, first_half: tuple[Path, Path, Finished], layout: str
) -> None:
    """Weights, moments and schedule, with the distributed optimizer. Stages of their own would draw other weights."""
    checkpoint, path, whole = first_half
    ranks, flags = LAYOUTS[layout]
    words = [*line(load=checkpoint, **SHAPE, **flags), "--mup-recipe", str(path)]
    found = run(tmp_path / "ranks", words, ranks)
    assert found.losses == pytest.approx({i: whole.losses[i] for i in (4, 5, 6)}, abs=ROUNDING)


@pytest.mark.parametrize("form", ["torch", "torch_dist"])
def test_a_resumed_run_is_the_run_that_was_never_stopped(tmp_path: Path, form: str) -> None:
    words = line(train_iters=4, ckpt_format=form, tensor_model_parallel_size=2, use_distributed_optimizer=True)
    words += ["--mup-recipe", str(recipe_file(tmp_path))]
    whole = run(tmp_path / "whole", [*words, "--save", str(tmp_path / "ck"), "--save-interval", "2"], ranks=2)
    (tmp_path / "ck" / "latest_checkpointed_iteration.txt").write_text("2")
    rest = run(tmp_path / "rest", [*words, "--load", str(tmp_path / "ck")], ranks=2)
    assert rest.losses == {iteration: whole.losses[iteration] for iteration in (3, 4)}


def test_a_recipe_beside_a_checkpoint_is_enough_to_go_on(tmp_path: Path) -> None:
    saving = line(save=tmp_path / "ck", load=tmp_path / "ck", ckpt_format="torch", train_iters=4, save_interval=2)
    whole = run(tmp_path / "whole", [*saving, "--mup-recipe", str(recipe_file(tmp_path))])
    (tmp_path / "ck" / "latest_checkpointed_iteration.txt").write_text("2")
    copy = tmp_path / "ck" / "iter_0000002" / "mup.recipe.yaml"
    assert run(tmp_path / "rest", [*saving, "--mup-recipe", str(copy)]).losses == {i: whole.losses[i] for i in (3, 4)}


def test_an_accepted_change_of_the_learning_rate_goes_on_with_the_saved_state(tmp_path: Path) -> None:
    """The group values are the new recipe's, the moments the old run's; Megatron finds groups by their old values."""
    words = line(ckpt_format="torch_dist", use_distributed_optimizer=True)
    saving = ["--save", str(tmp_path / "ck"), "--save-interval", "2", "--mup-recipe", str(recipe_file(tmp_path))]
    run(tmp_path / "before", [*words, *saving])
    further = [*words, "--load", str(tmp_path / "ck"), "--train-iters", "4"]
    further += ["--override-opt-param-scheduler", "--mup-accept-recipe-change"]
    here = run(tmp_path / "here", [*further, "--mup-recipe", str(recipe_file(tmp_path))])
    there = run(tmp_path / "there", [*further, "--mup-recipe", str(recipe_file(tmp_path, "b", lr=3e-3))])
    assert there.losses[3] == here.losses[3]  # computed before the first update
    assert there.losses[4] != here.losses[4]


def test_a_recipe_for_sgd_is_resumed_as_well(tmp_path: Path) -> None:
    """Megatron cannot resume SGD by itself: it has no idea what there is to load."""
    recipe = recipe_file(tmp_path, parametrization={"optimizer": "sgd"}, lr=0.01)
    words = [
        *line(save=tmp_path / "ck", load=tmp_path / "ck", train_iters=4, save_interval=2),
        "--mup-recipe",
        str(recipe),
    ]
    whole = run(tmp_path / "whole", words)
    (tmp_path / "ck" / "latest_checkpointed_iteration.txt").write_text("2")
    assert run(tmp_path / "rest", words).losses == {i: whole.losses[i] for i in (3, 4)}
