"""`check` answers with an exit code, a text and files; a question that is wrong is refused before anything trains."""

import csv
import json
import re
from pathlib import Path

import pytest
from support.commands import BASE, RECIPE, TARGET, Command, contents, write

from mup_megatron.check.verdict.verdict import CheckOutcome
from mup_megatron.cli.check import EXIT_CODES
from mup_megatron.megatron import cpu
from mup_megatron.yaml_io import dump_yaml

SMALL = ("--widths", "32,64,128", "--seeds", "2")


@pytest.fixture(autouse=True)
def on_cpu() -> None:
    # Other tests of this process need the runtime, and must not find Megatron imported without it.
    cpu.enable()


def test_without_a_verdict_a_script_learns_that_something_has_to_be_changed_first() -> None:
    assert {CheckOutcome(name): code for name, code in EXIT_CODES.items()} == {
        CheckOutcome.PASS: 0,
        CheckOutcome.FAIL: 1,
        CheckOutcome.NO_VERDICT: 2,
    }


def test_a_target_that_is_right_passes(run: Command, here: Path) -> None:
    answer = run("check", "target.yaml", "--recipe", "r.yaml", "--json", "v.json", *SMALL)
    assert answer.code == 0, answer.out
    assert answer.out.startswith("PASS target.yaml with r.yaml\n")
    assert json.loads((here / "v.json").read_text())["outcome"] == "pass"
    (folder,) = [path for path in (here / "results" / "check").iterdir() if path.name.startswith("target-")]
    assert set(contents(folder)) == {"check.png", "comparison.csv", "measurements.csv", "verdict.json"}
    assert "results/check/target-" in answer.out
    # Progress is no part of the answer.
    assert "subject: 6 of 6 models" in answer.err
    assert re.match(r"6 \+ 18 models of 1 of 1 layers, .*: about \d+ s on this machine\n", answer.err), answer.err
    assert "models" not in answer.out.partition("\n")[0]


def test_a_mistake_fails_and_is_named(run: Command, here: Path) -> None:
    words = ("check", "target.yaml", "--recipe", "r.yaml", "--output", "out", "--fresh", *SMALL)
    answer = run(*words, "--mutant", "learning-rate-collapsed")
    assert answer.code == 1
    head, *_ = answer.out.splitlines()
    assert head.startswith("FAIL target.yaml with r.yaml: decoder.layers.0.")
    assert "1. 100%" in answer.out
    assert "all groups have one learning rate" in answer.out
    assert "With a deliberate mistake" in answer.out
    rows = list(csv.DictReader((here / "out" / "comparison.csv").open()))
    off = {row["name"] for row in rows if row["quantity"] == "learning rate" and row["off"]}
    hidden = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
    assert off == {f"decoder.layers.0.{name}.weight" for name in hidden}
    assert not (here / "results").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--widths", "32,many"), "'32,many' is no list of hidden sizes"),
        (("--widths", "64,32"), "64,32: a slope needs three or more hidden sizes that rise"),
        (("--widths", "32"), "32: a slope needs three or more hidden sizes"),
        (("--widths", "40,96,192"), "multiple of 16"),
        (("--seeds", "1"), "seeds"),
        (("--mutant", "no-such"), "there is no such mistake. Choose one of"),
        (("--mutant", "attention-sqrt-d"), "changes nothing for this target and recipe"),
        (("--deepspeed", "ds.json"), "--deepspeed is for a Hugging Face configuration"),
        (("--output", "r.yaml"), "r.yaml: not a folder to write to"),
        (("--tensor-model-parallel-size", "3"), "--tensor-model-parallel-size 3"),
    ],
)
def test_a_question_that_has_no_answer_is_refused_with_the_remedy(
    run: Command, here: Path, words: tuple[str, ...], said: str
) -> None:
    answer = run("check", "target.yaml", "--recipe", "r.yaml", *words)
    assert (answer.code, answer.out) == (2, "")
    assert said in answer.err
    assert "models" not in answer.err


def test_a_recipe_that_does_not_fit_is_refused(run: Command, here: Path) -> None:
    write(here / "target.yaml", {**TARGET, "num_layers": 2, "normalization": "RMSNorm"})
    answer = run("check", "target.yaml", "--recipe", "r.yaml")
    assert (answer.code, answer.out) == (2, "")
    assert "r.yaml for target.yaml" in answer.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--mutant", "init-linear"), "--mutant is for a model file"),
        (("--sequence-parallel",), "--sequence-parallel is for a model file"),
        (("--fresh",), "--fresh is of no use here"),
    ],
)
def test_options_of_megatron_are_refused_for_a_hugging_face_configuration(
    run: Command, here: Path, words: tuple[str, ...], said: str
) -> None:
    pytest.importorskip("transformers")
    base = {"model_type": "gpt2", "n_embd": 32, "n_head": 2, "n_layer": 1, "vocab_size": 64, "n_positions": 32}
    base["architectures"] = ["GPT2LMHeadModel"]
    (here / "config.json").write_text(json.dumps({**base, "n_embd": 64, "n_head": 4}))
    (here / "hf.yaml").write_text(dump_yaml({"base": base, "hyperparameters": RECIPE["hyperparameters"]}))
    answer = run("check", "config.json", "--recipe", "hf.yaml", *words)
    assert (answer.code, answer.out) == (2, "")
    assert said in answer.err


def test_a_target_as_wide_as_the_base_is_checked_as_well(run: Command, here: Path) -> None:
    write(here / "same.yaml", BASE)
    answer = run("check", "same.yaml", "--recipe", "r.yaml", *SMALL)
    assert answer.code == 0, answer.out
