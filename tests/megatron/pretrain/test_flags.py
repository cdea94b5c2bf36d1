"""What the `--mup-*` flags do to the arguments of a Megatron-LM line. The parser is Megatron's own."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from support.lm_arguments import parser_of_megatron

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.errors import InputError
from mup_megatron.megatron import versions
from mup_megatron.megatron.arguments.convert import flags as flags_of
from mup_megatron.megatron.pretrain import flags
from mup_megatron.recipe import load_recipe, recipe, save_recipe

BASE = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 511, "seq_length": 64}


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    return written(tmp_path, {"lr": 0.006, "weight_decay": 0.1, "adam_beta2": 0.95})


def written(folder: Path, hyperparameters: dict[str, Any], **more: Any) -> Path:
    path = folder / "r.recipe.yaml"
    save_recipe(recipe({"base": BASE, "hyperparameters": hyperparameters, **more}, source="test"), path)
    return path


def parsed(words: Sequence[str]) -> argparse.Namespace:
    parser = flags.add_to(parser_of_megatron())
    return parser.parse_args(["--train-iters", "1000", *words])


def taken_over(words: Sequence[str]) -> argparse.Namespace:
    values = parsed(words)
    given = flags.take_given(values)
    options = flags.options_of(values)
    assert options is not None
    flags.take_over(values, given, options)
    return values


# ---- which lines are ours -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", [*flags.NAMES, "--mup-recipe=r.yaml", "--help"])
def test_a_line_with_a_flag_of_ours_asks_for_the_plug_in(word: str) -> None:
    assert flags.asked_for(["--lr", "0.1", word])


@pytest.mark.parametrize("words", [[], ["--lr", "0.1"], ["--use-mup", "--mup-base-hidden-size", "64"]])
def test_other_lines_do_not(words: list[str]) -> None:
    assert not flags.asked_for(words)


def test_the_flags_stand_in_a_group_of_their_own_in_the_help() -> None:
    groups = {group.title: group for group in flags.add_to(parser_of_megatron())._action_groups}
    own = [name for action in groups["mup-megatron"]._group_actions for name in action.option_strings]
    assert own == list(flags.NAMES)
    assert all(name in flags.help_text() for name in flags.NAMES)


def test_without_a_recipe_there_is_nothing_to_do() -> None:
    assert flags.options_of(parsed([])) is None


@pytest.mark.parametrize(
    "word", ["--mup-override", "--mup-print-plan", "--mup-no-verify", "--mup-accept-recipe-change"]
)
def test_a_flag_of_ours_without_a_recipe_is_an_error(word: str) -> None:
    with pytest.raises(InputError, match=f"{word}: does nothing without --mup-recipe"):
        flags.options_of(parsed([word]))


def test_beside_megatrons_own_mup_it_is_an_error_with_the_way_to_move_over(recipe_file: Path) -> None:
    values = parsed(["--mup-recipe", str(recipe_file)])
    values.use_mup = True
    with pytest.raises(InputError, match=r"--use-mup: .* mup-megatron from-native"):
        flags.options_of(values)


def test_a_yaml_of_arguments_would_forget_the_recipe(recipe_file: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--yaml-cfg: Megatron would take all arguments from that file"):
        parsed(["--mup-recipe", str(recipe_file), "--yaml-cfg", str(tmp_path / "a.yaml")])


def test_an_interval_is_a_number_of_iterations(recipe_file: Path) -> None:
    with pytest.raises(InputError, match="--mup-coordinates-interval 0"):
        flags.options_of(parsed(["--mup-recipe", str(recipe_file), "--mup-coordinates-interval", "0"]))


def test_coordinates_need_somewhere_to_go(recipe_file: Path) -> None:
    with pytest.raises(InputError, match="nowhere to log to"):
        flags.options_of(parsed(["--mup-recipe", str(recipe_file), "--mup-coordinates-interval", "5"]))


def test_a_scripts_own_flags_may_be_of_any_kind(recipe_file: Path) -> None:
    parser = flags.add_to(parser_of_megatron())
    parser.add_argument("--tag", action="append")
    parser.add_argument("-v", action="count", default=0)
    values = parser.parse_args(["--mup-recipe", str(recipe_file), "--tag", "a", "--tag=b", "-v", "--lr", "0.1"])
    assert (values.tag, values.v) == (["a", "b"], 1)
    assert flags.take_given(values) == {"mup_recipe", "tag", "v", "lr"}


# ---- the recipe against the line ----------------------------------------------------------------------------------


def test_what_the_line_does_not_say_comes_from_the_recipe(recipe_file: Path) -> None:
    values = taken_over(["--mup-recipe", str(recipe_file)])
    assert values.lr == 0.006
    assert values.min_lr == 0.0
    assert values.weight_decay == 0.1
    assert values.adam_beta2 == 0.95
    assert values.init_method_std == 0.02
    assert values.lr_decay_style == "linear"
    assert values.lr_warmup_fraction is None


def test_what_both_say_alike_is_no_conflict(recipe_file: Path) -> None:
    words = "--lr 6e-3 --weight-decay 0.1 --lr-decay-style linear --lr-decay-iters 1000 --clip-grad 1.0".split()
    assert taken_over(["--mup-recipe", str(recipe_file), *words]).lr == 0.006


def test_what_they_say_differently_is_listed_all_at_once(recipe_file: Path) -> None:
    words = "--lr 0.0003 --adam-beta2 0.999 --lr-warmup-iters 100 --optimizer sgd".split()
    with pytest.raises(InputError) as error:
        taken_over(["--mup-recipe", str(recipe_file), *words])
    for line in (
        "--lr 0.0003 (recipe: 0.006)",
        "--adam-beta2 0.999 (recipe: 0.95)",
        "--lr-warmup-iters 100 (recipe: lr_warmup_fraction 0 of the run)",
        "--optimizer sgd (recipe: adam)",
        "--mup-override",
    ):
        assert line in str(error.value)


@pytest.mark.parametrize(
    ("words", "dest", "value"),
    [
        ("--lr 0.0003", "lr", 0.006),
        ("--min-lr 0.0001", "min_lr", 0.0),
        ("--init-method-std 0.01", "init_method_std", 0.02),
        ("--weight-decay 0.3", "weight_decay", 0.1),
        ("--adam-beta1 0.8", "adam_beta1", 0.9),
        ("--adam-beta2 0.8", "adam_beta2", 0.95),
        ("--adam-eps 1e-5", "adam_eps", 1e-8),
        ("--clip-grad 2", "clip_grad", 1.0),
        ("--optimizer sgd", "optimizer", "adam"),
        ("--lr-decay-style cosine", "lr_decay_style", "linear"),
        ("--lr-decay-iters 500", "lr_decay_iters", 1000),
        ("--lr-warmup-iters 100", "lr_warmup_iters", 0),
        ("--lr-warmup-fraction 0.1", "lr_warmup_fraction", None),
        ("--lr-warmup-init 1e-5", "lr_warmup_init", 0.0),
        ("--decoupled-lr 0.1", "decoupled_lr", None),
        ("--init-method-xavier-uniform", "init_method_xavier_uniform", False),
        ("--embedding-init-method-std 1.0", "embedding_init_method_std", None),
        ("--weight-decay-incr-style linear --start-weight-decay 0 --end-weight-decay 1", "start_weight_decay", None),
    ],
)
def test_each_is_a_conflict_unless_the_recipe_may_win(recipe_file: Path, words: str, dest: str, value: Any) -> None:
    line = ["--mup-recipe", str(recipe_file), *words.split()]
    with pytest.raises(InputError, match=words.split()[0] + r" .*\(recipe: "):
        taken_over(line)
    assert getattr(taken_over([*line, "--mup-override"]), dest) == value


@pytest.mark.parametrize("word", ["--init-model-with-meta-device", "--fp8-param-gather", "--fp4-param-gather"])
def test_what_the_plan_cannot_reach_is_refused_even_so(recipe_file: Path, word: str) -> None:
    with pytest.raises(InputError, match=word):
        taken_over(["--mup-recipe", str(recipe_file), "--mup-override", word])


@pytest.mark.parametrize("word", ["--use-megatron-fsdp", "--use-torch-fsdp2"])
def test_weights_in_pieces_need_a_release_that_lets_a_plan_come_first(
    recipe_file: Path, word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--mup-recipe", str(recipe_file), word]
    monkeypatch.setattr(versions, "known_release", lambda: (0, 18))
    with pytest.raises(InputError, match=rf"{word}: the plan does not reach these weights in Megatron-Core 0\.18\. "):
        taken_over(words)
    monkeypatch.setattr(versions, "known_release", lambda: (0, 19))
    taken_over(words)


def test_a_changing_batch_needs_a_run_that_is_counted_in_samples(recipe_file: Path) -> None:
    """Megatron measures iterations in batches of the wrong size then, and the schedule would end early."""
    changing = ["--mup-recipe", str(recipe_file), "--step-batch-size-schedule", "0:4 24:8"]
    with pytest.raises(InputError, match=r"--step-batch-size-schedule.*--train-samples"):
        taken_over(changing)
    values = flags.add_to(parser_of_megatron()).parse_args([*changing, "--train-samples", "64"])
    given, options = flags.take_given(values), flags.options_of(values)
    assert options is not None
    flags.take_over(values, given, options)
    assert values.lr_decay_iters is None


# ---- the schedule -------------------------------------------------------------------------------------------------


def test_fractions_of_the_run_become_megatrons_iterations(tmp_path: Path) -> None:
    schedule = {"lr_decay_style": "cosine", "lr_warmup_fraction": 0.1, "lr_decay_fraction": 0.8}
    values = taken_over(["--mup-recipe", str(written(tmp_path, {"lr": 0.1}, schedule=schedule))])
    assert values.lr_decay_iters == 800
    assert values.lr_warmup_fraction * values.lr_decay_iters == pytest.approx(100, rel=1e-15)
    assert values.lr_warmup_iters == 0


def test_a_schedule_may_reach_beyond_the_run(tmp_path: Path) -> None:
    schedule = {"lr_decay_style": "cosine", "lr_warmup_fraction": 3.2, "lr_decay_fraction": 320.0}
    path = written(tmp_path, {"lr": 0.1}, schedule=schedule)
    values = taken_over(["--mup-recipe", str(path), "--lr-decay-iters", "320000", "--lr-warmup-fraction", "0.01"])
    assert (values.train_iters, values.lr_decay_iters) == (1000, 320000)
    assert values.lr_warmup_fraction == pytest.approx(0.01, rel=1e-15)


def test_a_run_counted_in_samples_has_its_schedule_in_samples(tmp_path: Path) -> None:
    path = written(tmp_path, {"lr": 0.1}, schedule={"lr_warmup_fraction": 0.1, "lr_decay_fraction": 0.5})
    parser = flags.add_to(parser_of_megatron())
    values = parser.parse_args(["--train-samples", "8000", "--mup-recipe", str(path), "--lr-warmup-samples", "800"])
    given = flags.take_given(values)
    options = flags.options_of(values)
    assert options is not None
    flags.take_over(values, given, options)
    assert (values.lr_decay_samples, values.lr_warmup_samples) == (4000, 800)
    assert values.lr_warmup_fraction is None  # Megatron takes one or the other
    assert values.lr_decay_iters is None


def test_counts_that_were_rounded_mean_the_recipes_fractions(tmp_path: Path) -> None:
    """As `mup-megatron args` prints them; the schedule itself stays unrounded."""
    schedule = {"lr_decay_style": "WSD", "lr_warmup_fraction": 0.0333, "lr_decay_fraction": 0.7777}
    path = written(tmp_path, {"lr": 0.1}, schedule={**schedule, "lr_wsd_decay_fraction": 0.1111})
    given = flags_of(ModelFile(**BASE), load_recipe(path), train_iters=1000)
    values = taken_over(["--mup-recipe", str(path), *given])
    assert values.lr_decay_iters == pytest.approx(777.7)
    assert values.lr_warmup_fraction * values.lr_decay_iters == pytest.approx(33.3)
    assert values.lr_wsd_decay_iters == pytest.approx(111.1)
    with pytest.raises(InputError, match="--lr-decay-iters 779"):
        taken_over(["--mup-recipe", str(path), *given, "--lr-decay-iters", "779"])


def test_wsd_has_a_length_of_its_own(tmp_path: Path) -> None:
    schedule = {"lr_decay_style": "WSD", "lr_wsd_decay_fraction": 0.25, "lr_wsd_decay_style": "linear"}
    values = taken_over(["--mup-recipe", str(written(tmp_path, {"lr": 0.1}, schedule=schedule))])
    assert (values.lr_wsd_decay_iters, values.lr_wsd_decay_style) == (250, "linear")


def test_the_length_of_the_run_has_to_be_known(recipe_file: Path) -> None:
    values = flags.add_to(parser_of_megatron()).parse_args(["--mup-recipe", str(recipe_file)])
    given, options = flags.take_given(values), flags.options_of(values)
    assert options is not None
    with pytest.raises(InputError, match="--train-iters: missing"):
        flags.take_over(values, given, options)


# ---- the horizon --------------------------------------------------------------------------------------------------

# The tuning: 200 steps of 8 × 64 tokens; the run: four times the batch and the steps.
MOVED: dict[str, Any] = {
    "training": {"train_iters": 250, "global_batch_size": 8, "seq_length": 64},
    "horizon": {"rule": "steps", "tokens": 1000 * 32 * 64, "batch": 32},
}
RUN = "--seq-length 64 --global-batch-size 32 --rampup-batch-size 8 8 1000"


def required(folder: Path, words: str, **more: Any) -> str:
    """What is said to a line that Megatron has validated."""
    path = written(folder, {"lr": 0.004, "weight_decay": 0.1}, **{**MOVED, **more})
    try:
        flags.require_horizon(load_recipe(path), parsed(words.split()))
    except InputError as error:
        return str(error)
    return ""


def test_the_line_gets_the_moved_values_and_may_say_them_itself(tmp_path: Path) -> None:
    path = written(tmp_path, {"lr": 0.004, "weight_decay": 0.1}, **MOVED)
    values = taken_over(["--mup-recipe", str(path), "--lr", "0.002"])
    found = (values.lr, values.weight_decay, values.adam_eps, values.adam_beta1, values.adam_beta2)
    assert found == pytest.approx((0.002, 0.05, 2e-8, 0.975, 0.99975))


@pytest.mark.parametrize("lr", ["0.001", "0.004"])
def test_a_line_whose_values_were_moved_by_hand_or_not_at_all_is_told_what_was_moved(tmp_path: Path, lr: str) -> None:
    path = written(tmp_path, {"lr": 0.004, "weight_decay": 0.1}, **MOVED)
    with pytest.raises(InputError) as error:
        taken_over(["--mup-recipe", str(path), "--lr", lr, "--weight-decay", "0.05"])
    assert f"--lr {lr} (recipe: 0.002, to which horizon's steps has moved 0.004 already)" in str(error.value)
    assert "--weight-decay" not in str(error.value)


def test_the_lines_run_is_compared_with_the_horizon(tmp_path: Path) -> None:
    right = "--seq-length 64 --global-batch-size 32"
    assert required(tmp_path, right) == ""
    assert required(tmp_path, right, horizon={**MOVED["horizon"], "rule": "none"}) == ""
    assert "batches of 32 sequences, and this run's have 16" in required(tmp_path, right.replace("32", "16"))
    assert "sequences of 64, and this run's have 128" in required(tmp_path, right.replace("64", "128"))
    assert "2048000 tokens, and this run has 1024000" in required(tmp_path, f"{right} --train-iters 500")


def test_a_run_counted_in_samples_is_compared_by_them(tmp_path: Path) -> None:
    def said(samples: int) -> str:
        values = parsed(f"--seq-length 64 --global-batch-size 32 --train-samples {samples}".split())
        values.train_iters = None
        path = written(tmp_path, {"lr": 0.004}, **MOVED)
        try:
            flags.require_horizon(load_recipe(path), values)
        except InputError as error:
            return str(error)
        return ""

    assert said(32000) == ""
    assert "this run has 1024000" in said(16000)


def test_a_batch_that_grows_has_no_rule(tmp_path: Path) -> None:
    assert "--rampup-batch-size: horizon's steps is a rule for one batch throughout the run" in required(tmp_path, RUN)
    assert required(tmp_path, RUN, horizon={**MOVED["horizon"], "rule": "none"}) == ""
