"""`ds-config`: a DeepSpeed configuration for a recipe, or whether one goes with it."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.commands import Command, write

GPT2 = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 64, "n_positions": 32}
TUNED = {"lr": 0.004, "weight_decay": 0.1, "adam_beta2": 0.95}


@pytest.fixture
def gpt2(here: Path) -> Path:
    """The current folder, with GPT-2's configurations at two widths and a recipe tuned at the narrow one."""
    for name, width in (("small", 32), ("large", 128)):
        content = {**GPT2, "n_embd": width, "n_head": width // 16, "n_layer": 2}
        (here / f"{name}.json").write_text(json.dumps(content))
    base = {**GPT2, "n_embd": 32, "n_head": 2, "n_layer": 2}
    write(here / "gpt2.yaml", {"base": base, "hyperparameters": TUNED, "schedule": {"lr_warmup_fraction": 0.1}})
    return here


def configuration(run: Command, *words: str) -> dict[str, Any]:
    code, out, err = run("ds-config", "large.json", "--recipe", "gpt2.yaml", *words)
    assert (code, err) == (0, "")
    content = json.loads(out)
    assert isinstance(content, dict)
    return content


def checked(run: Command, path: Path, content: dict[str, Any]) -> tuple[int, list[str]]:
    path.write_text(json.dumps(content))
    code, out, _ = run("ds-config", "large.json", "--recipe", "gpt2.yaml", "--check", path.name)
    return code, out.splitlines()


def test_everything_that_a_recipe_decides_is_written_out(run: Command, gpt2: Path) -> None:
    content = configuration(run, "--train-iters", "200", "--global-batch-size", "32", "--zero-stage", "2", "--bf16")
    assert content == {
        "train_batch_size": 32,
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": 0.004, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1},
        },
        "scheduler": {
            "type": "WarmupDecayLR",
            "params": {"total_num_steps": 200, "warmup_num_steps": 20, "warmup_type": "linear"},
        },
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 2},
        "bf16": {"enabled": True},
        "mup": {"recipe": "gpt2.yaml"},
    }


def test_a_schedule_may_reach_beyond_the_run(run: Command, gpt2: Path) -> None:
    base = {**GPT2, "n_embd": 32, "n_head": 2, "n_layer": 2}
    schedule = {"lr_warmup_fraction": 64.0, "lr_decay_fraction": 6400.0}
    write(gpt2 / "gpt2.yaml", {"base": base, "hyperparameters": TUNED, "schedule": schedule})
    params = {"total_num_steps": 320000, "warmup_num_steps": 3200, "warmup_type": "linear"}
    assert configuration(run, "--train-iters", "50")["scheduler"] == {"type": "WarmupDecayLR", "params": params}


def test_what_the_trainer_fills_in_is_left_to_it(run: Command, gpt2: Path) -> None:
    content = configuration(run)
    assert content["train_batch_size"] == content["gradient_accumulation_steps"] == "auto"
    assert "scheduler" not in content


def test_a_cosine_has_the_recipes_floor(run: Command, gpt2: Path) -> None:
    base = {**GPT2, "n_embd": 32, "n_head": 2, "n_layer": 2}
    tuned = {**TUNED, "min_lr": 0.001}
    write(gpt2 / "gpt2.yaml", {"base": base, "hyperparameters": tuned, "schedule": {"lr_decay_style": "cosine"}})
    assert configuration(run, "--train-iters", "50")["scheduler"]["params"]["cos_min_ratio"] == 0.25


def test_a_model_file_is_a_target_too(run: Command, here: Path) -> None:
    out = run("ds-config", "target.yaml", "--recipe", "r.yaml").out
    assert json.loads(out)["mup"] == {"recipe": "r.yaml"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--offload-parameters", "--zero-stage", "2"), "--offload-parameters: only ZeRO stage 3 can"),
        (("--offload-optimizer", "--zero-stage", "0"), "--offload-optimizer: ZeRO stage 0 cannot"),
        (("--global-batch-size", "10", "--micro-batch-size", "4"), "--micro-batch-size 4 does not divide"),
        (("--check", "none.json"), "none.json: no such file"),
        (("--check", "small.json", "-o", "a.json"), "--check writes nothing"),
    ],
)
def test_what_cannot_be_is_said_in_a_sentence(run: Command, gpt2: Path, words: tuple[str, ...], message: str) -> None:
    code, out, err = run("ds-config", "large.json", "--recipe", "gpt2.yaml", *words)
    assert (code, out) == (2, "")
    assert message in err


def test_a_schedule_that_deepspeed_lacks_is_refused_with_a_way_out(run: Command, gpt2: Path) -> None:
    base = {**GPT2, "n_embd": 32, "n_head": 2, "n_layer": 2}
    write(gpt2 / "gpt2.yaml", {"base": base, "hyperparameters": TUNED, "schedule": {"lr_decay_style": "WSD"}})
    code, _, err = run("ds-config", "large.json", "--recipe", "gpt2.yaml", "--train-iters", "50")
    assert code == 2
    assert "DeepSpeed has no scheduler for WSD. Leave out --train-iters" in err


def test_an_existing_file_is_kept(run: Command, gpt2: Path) -> None:
    (gpt2 / "ds.json").write_text("mine")
    assert run("ds-config", "large.json", "--recipe", "gpt2.yaml", "-o", "ds.json").code == 2
    assert (gpt2 / "ds.json").read_text() == "mine"


def test_what_it_writes_passes_its_own_check_which_shows_the_groups(run: Command, gpt2: Path) -> None:
    code, lines = checked(run, gpt2 / "ds.json", configuration(run, "--train-iters", "200"))
    assert code == 0
    assert lines[0] == "ds.json: goes with the recipe. 3 parameter groups:"
    # r_in = 4: the learning rate of hidden weights is a quarter, and their weight decay four times as large.
    assert [line.split()[1:4:2] for line in lines[1:]] == [["0.004", "0.1"], ["0.004", "0"], ["0.001", "0.4"]]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("mup", None, '"mup": missing, so DeepSpeed would train without μP'),
        ("mup", {"recipe": "gpt2.yaml", "guards": True}, "unknown key. Did you mean 'guard'?"),
        ("optimizer", {"type": "MuAdam", "params": {"lr": 0.004}}, "μP through microsoft/mup"),
        ("optimizer", {"type": "AdamW", "params": {"lr": 0.003}}, '"optimizer.params.lr" is 0.003 and the recipe says'),
        ("gradient_clipping", 0.5, '"gradient_clipping" is 0.5 and the recipe says 1.0'),
        (
            "scheduler",
            {"type": "WarmupDecayLR", "params": {"total_num_steps": 9, "warmup_max_lr": 0.1}},
            "warmup_max_lr is 0.1, and the recipe's lr is 0.004",
        ),
        ("scheduler", {"type": "CosineAnnealingLR", "params": {"T_max": 9, "eta_min": 1e-5}}, "WarmupCosineLR"),
    ],
)
def test_what_does_not_go_with_the_recipe_is_listed_and_the_answer_is_no(
    run: Command, gpt2: Path, key: str, value: Any, message: str
) -> None:
    content = configuration(run)
    content = {k: v for k, v in {**content, key: value}.items() if v is not None}
    code, lines = checked(run, gpt2 / "ds.json", content)
    assert code == 1
    assert [message in line for line in lines] == [True]


def test_all_problems_are_listed_at_once(run: Command, gpt2: Path) -> None:
    code, lines = checked(run, gpt2 / "ds.json", {"gradient_clipping": 2.0, "optimizer": {"type": "Lamb"}})
    assert (code, len(lines)) == (1, 3)


def test_a_recipe_of_another_library_is_refused(run: Command, gpt2: Path) -> None:
    code, _, err = run("ds-config", "large.json", "--recipe", "r.yaml")
    assert code == 2
    assert "r.yaml for large.json: the recipe's base is not a Hugging Face configuration" in err


def test_the_trainer_takes_what_is_left_open_to_it(run: Command, gpt2: Path) -> None:
    from transformers import TrainingArguments

    content = configuration(run, "--zero-stage", "2")
    assert content["gradient_clipping"] == content["optimizer"]["params"]["lr"] == "auto"
    (gpt2 / "ds.json").write_text(json.dumps(content))
    # With numbers in their place it would refuse its own defaults: another learning rate, betas, eps, weight decay.
    arguments = TrainingArguments(output_dir=str(gpt2 / "out"), deepspeed=str(gpt2 / "ds.json"), use_cpu=True)
    trainer_config = arguments.hf_deepspeed_config
    trainer_config.trainer_config_finalize(arguments, None, 10)
    assert trainer_config.mismatches == []
    assert checked(run, gpt2 / "checked.json", content)[0] == 0


def test_a_horizon_moves_what_is_written_and_its_batch_is_compared(run: Command, gpt2: Path) -> None:
    base = {**GPT2, "n_embd": 32, "n_head": 2, "n_layer": 2}
    moved = {
        "training": {"train_iters": 100, "global_batch_size": 8, "seq_length": 32},
        "horizon": {"rule": "steps", "tokens": 16 * 100 * 8 * 32, "batch": 32},
    }
    write(gpt2 / "gpt2.yaml", {"base": base, "hyperparameters": TUNED, **moved})
    content = configuration(run, "--global-batch-size", "32")
    params = content["optimizer"]["params"]
    assert (params["lr"], params["eps"], params["weight_decay"]) == pytest.approx((0.002, 2e-8, 0.05))
    assert params["betas"] == pytest.approx([0.975, 0.9875])
    assert checked(run, gpt2 / "ds.json", content)[0] == 0
    code, said = checked(run, gpt2 / "ds.json", {**content, "train_batch_size": 8})
    assert code == 1
    assert "batches of 32 sequences, and this run's have 8" in said[0]
    code, said = checked(run, gpt2 / "ds.json", {**content, "optimizer": {"type": "AdamW", "params": {"lr": 0.001}}})
    assert (code, "is 0.001 and the recipe says 0.002" in said[0]) == (1, True)
    code, out, err = run("ds-config", "large.json", "--recipe", "gpt2.yaml", "--global-batch-size", "8")
    assert (code, out) == (2, "")
    assert "batches of 32 sequences, and this run's have 8" in err
