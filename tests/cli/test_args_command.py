"""`args`: a model file and a recipe as Megatron-LM's flags."""

from pathlib import Path

from support.commands import BASE, RECIPE, TARGET, Command, write

from mup_megatron.architectures.registry import load_model_file
from mup_megatron.megatron.arguments.convert import model_from_flags, values_from_flags

MODEL = (
    "--num-layers 1\n--hidden-size 128\n--num-attention-heads 4\n--vocab-size 300\n--seq-length 16\n"
    "--max-position-embeddings 16\n--attention-dropout 0.0\n--hidden-dropout 0.0\n"
)


def test_the_flags_of_a_target_stand_one_on_a_line(run: Command, here: Path) -> None:
    code, out, err = run("args", "target.yaml")
    assert (code, err) == (0, "")
    # Megatron's own order of init std and dropout does not matter; a model file's order is kept.
    assert out == MODEL


def test_with_a_recipe_come_hyperparameters_and_schedule(run: Command, here: Path) -> None:
    code, out, err = run("args", "target.yaml", "--recipe", "r.yaml")
    assert (code, err) == (0, "")
    assert out.startswith(MODEL)
    values = values_from_flags(out.split(), source="out")
    assert (values["lr"], values["weight_decay"], values["lr_decay_style"]) == (0.006, 0.01, "linear")
    assert model_from_flags(out.split(), source="out") == load_model_file(here / "target.yaml")


def test_on_one_line(run: Command, here: Path) -> None:
    lines = run("args", "target.yaml", "--recipe", "r.yaml").out.splitlines()
    assert run("args", "target.yaml", "--recipe", "r.yaml", "--one-line").out == " ".join(lines) + "\n"


def test_a_schedule_in_iterations_asks_for_the_length_of_the_run(run: Command, here: Path) -> None:
    write(here / "r.yaml", {**RECIPE, "schedule": {"lr_decay_fraction": 0.9}})
    code, out, err = run("args", "target.yaml", "--recipe", "r.yaml")
    assert (code, out) == (2, "")
    assert "lr_decay_fraction 0.9 of the run is a number of iterations in Megatron. Give --train-iters." in err
    assert "--lr-decay-iters 90\n" in run("args", "target.yaml", "--recipe", "r.yaml", "--train-iters", "100").out


def test_a_recipe_that_does_not_fit_the_target_is_refused(run: Command, here: Path) -> None:
    write(here / "target.yaml", {**TARGET, "swiglu": True})
    code, out, err = run("args", "target.yaml", "--recipe", "r.yaml")
    assert (code, out) == (2, "")
    assert "r.yaml for target.yaml: swiglu is False in the recipe's base but True in the target" in err


def test_what_is_printed_is_read_back(run: Command, here: Path) -> None:
    write(here / "target.yaml", {**BASE, "add_bias_linear": False, "kv_channels": 16, "norm_epsilon": 3e-6})
    words = run("args", "target.yaml").out.split()
    assert run("model", "--from-args", "-o", "again.yaml", "--", *words).code == 0
    assert load_model_file(here / "again.yaml") == load_model_file(here / "target.yaml")


def test_a_list_is_one_word_where_a_shell_splits_the_output(run: Command, here: Path) -> None:
    write(here / "target.yaml", {**BASE, "num_layers": 3, "num_experts": 4, "moe_layer_freq": [0, 1, 1]})
    words = run("args", "target.yaml", "--one-line").out.split()
    assert "--moe-layer-freq=[0,1,1]" in words, "with `=`, for alone the list is a pattern of one-letter file names"
    assert run("model", "--from-args", "-o", "again.yaml", "--", *words).code == 0
    assert load_model_file(here / "again.yaml") == load_model_file(here / "target.yaml")
