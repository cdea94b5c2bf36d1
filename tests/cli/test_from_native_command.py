"""`from-native`: a launch line with Megatron-Core's own μP as a recipe, and a table of what differs."""

from pathlib import Path

import pytest
from support.commands import Command, contents

from mup_megatron.recipe import load_recipe

FLAGS = (
    "--num-layers 2 --hidden-size 128 --num-attention-heads 4 --seq-length 16 --vocab-size 300 --lr 1e-3 "
    "--use-mup --mup-base-hidden-size 32 --mup-base-head-dim 32"
).split()


def test_the_recipe_is_the_answer_and_the_table_is_beside_it(run: Command, here: Path) -> None:
    code, out, err = run("from-native", "--", *FLAGS)
    assert code == 0
    (here / "from.yaml").write_text(out)
    recipe = load_recipe(here / "from.yaml")
    assert (recipe.base.hidden_size, recipe.hyperparameters.lr) == (32, 1e-3)
    rows = [line.split() for line in err.splitlines()]
    assert ["quantity", "role", "native", "recipe", "where"] in rows
    assert ["eps", "input", "1e-08", "2.5e-09", "embedding.word_embeddings.weight"] in rows
    assert "eps: Native μP scales eps of hidden weights only" in err
    assert "Note: weight_decay_exponent is 0, as natively" in err


def test_with_a_file_for_the_recipe_the_table_is_the_answer(run: Command, here: Path) -> None:
    code, out, err = run("from-native", "-o", "from.yaml", "--", *FLAGS)
    assert (code, err) == (0, "")
    assert out.splitlines()[0] == "from.yaml"
    assert "embedding.word_embeddings.weight" in out
    assert load_recipe(here / "from.yaml").base.num_attention_heads == 1


def test_the_recipe_explains_its_own_model(run: Command, here: Path) -> None:
    assert run("from-native", "-o", "from.yaml", "--", *FLAGS).code == 0
    assert run("model", "--from-args", "-o", "m.yaml", "--", *FLAGS).code == 0
    assert run("explain", "m.yaml", "--recipe", "from.yaml").code == 0


def test_a_launch_script_is_read(run: Command, here: Path) -> None:
    (here / "run.sh").write_text(f"python pretrain_gpt.py {' '.join(FLAGS)}\n")
    assert run("from-native", "--", "run.sh").out == run("from-native", "--", *FLAGS).out


def test_flags_need_no_dashes_before_them(run: Command, here: Path) -> None:
    (here / "run.sh").write_text(f"python pretrain_gpt.py {' '.join(FLAGS)} --lr $LR\n")
    expected = run("from-native", "--", *FLAGS)
    assert expected.code == 0
    assert run("from-native", *FLAGS) == expected
    assert run("from-native", "run.sh", "--lr", "1e-3") == expected
    assert run("from-native", "run.sh", "--lr", "1e-3", "-o", "from.yaml").out.splitlines()[0] == "from.yaml"
    assert (here / "from.yaml").read_text() == expected.out


def test_nothing_differs_at_the_base(run: Command, here: Path) -> None:
    assert "On this model every number is native's." in run("from-native", "--", *FLAGS, "--hidden-size", "32",
                                                            "--num-attention-heads", "1").err  # fmt: skip


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "give Megatron's flags, or a launch script"),
        ([*FLAGS, "--forse"], "No such option '--forse'. Did you mean '--force'?"),
        (["--", *FLAGS[:12]], "flags: --use-mup is missing"),
        (
            ["--", *FLAGS, "--optimizer", "muon"],
            "flags: --optimizer muon beside --use-mup: Megatron's own μP does not scale matrices",
        ),
    ],
)
def test_bad_input_writes_nothing(run: Command, here: Path, words: list[str], said: str) -> None:
    before = contents(here)
    code, out, err = run("from-native", "-o", "from.yaml", *words)
    assert (code, out) == (2, "")
    assert said in err
    assert contents(here) == before


def test_a_short_run_of_a_long_schedule_and_a_vocabulary_that_is_answered(run: Command, here: Path) -> None:
    words = [word for word in FLAGS if word not in ("--vocab-size", "300")]
    words += "--train-iters 50 --lr-decay-iters 320000 --lr-warmup-fraction 0.01".split()
    code, out, _ = run("from-native", "--vocab-size", "300", "--", "torchrun", "pretrain_gpt.py", *words)
    assert code == 0
    (here / "from.yaml").write_text(out)
    schedule = load_recipe(here / "from.yaml").schedule
    assert (schedule.lr_warmup_fraction, schedule.lr_decay_fraction) == (64.0, 6400.0)


def test_another_programs_line_is_refused(run: Command, here: Path) -> None:
    code, out, err = run("from-native", "--", "torchrun", "pretrain_t5.py", *FLAGS)
    assert (code, out) == (2, "")
    assert "builds a T5, whose logits" in err
