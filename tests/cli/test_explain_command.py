"""`explain`: every row of a small model against numbers worked out by hand from the rules, in all three forms."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.commands import TARGET, Command, write

from mup_megatron.recipe import load_recipe

HEADS = "Query heads for each key/value group: 2 at the base, 4 here. "
"""Begins the one remark on this base and target."""
ROOT = Path(__file__).parents[2]

# Every side grows by another factor: hidden by 4, heads × head size by 8, the rows of linear_qkv by 6 (128 → 768), ffn
# by 16, the head size by 2. Depth doubles. The vocabulary is padded to 128.
HAND_BASE: dict[str, Any] = {
    "num_layers": 1,
    "hidden_size": 64,
    "num_attention_heads": 2,
    "kv_channels": 32,
    "group_query_attention": True,
    "num_query_groups": 1,
    "ffn_hidden_size": 128,
    "qk_layernorm": True,
    "vocab_size": 100,
    "seq_length": 16,
    "untie_embeddings_and_output_weights": True,
}
HAND_TARGET: dict[str, Any] = {
    **HAND_BASE,
    "num_layers": 2,
    "hidden_size": 256,
    "num_attention_heads": 8,
    "kv_channels": 64,
    "num_query_groups": 2,
    "ffn_hidden_size": 2048,
}
HAND_VALUES = {
    "lr": 0.01,
    "init_method_std": 0.08,
    "embedding_multiplier": 3.0,
    "output_multiplier": 2.0,
    "attention_multiplier": 0.5,
    "weight_decay": 0.1,
    "adam_eps": 1e-8,
}

# name, role, shape, fan_in, fan_out, width_ratio, init_std, init_value, multiplier, and for Adam lr, eps, weight_decay;
# for SGD lr, weight_decay. σ = 0.08, η = 0.01, ε = 1e-8, λ = 0.1.
EMBEDDINGS = """
embedding.word_embeddings.weight      input  128x256   128  256  1  .08  -  3  .01  2.5e-9  .1  .04  .025
embedding.position_embeddings.weight  input  16x256    16   256  1  .08  -  3  .01  2.5e-9  .1  .04  .025
"""
LAYER = """
self_attention.linear_qkv.layer_norm_weight  input   256       1     256   1   -          1  1  .01      2.5e-9   0    .04    0
self_attention.linear_qkv.layer_norm_bias    input   256       1     256   1   -          0  1  .01      2.5e-9   0    .04    0
self_attention.linear_qkv.weight             hidden  768x256   256   768   4   .04        -  1  .0025    1e-8/6   .4   .015   .4/6
self_attention.linear_qkv.bias               input   768       1     768   1   -          0  1  .01      1e-8/6   0    .06    0
self_attention.q_layernorm.weight            input   64        1     64    1   -          1  1  .01      5e-9     0    .02    0
self_attention.q_layernorm.bias              input   64        1     64    1   -          0  1  .01      5e-9     0    .02    0
self_attention.k_layernorm.weight            input   64        1     64    1   -          1  1  .01      5e-9     0    .02    0
self_attention.k_layernorm.bias              input   64        1     64    1   -          0  1  .01      5e-9     0    .02    0
self_attention.linear_proj.weight            hidden  256x512   512   256   8   .08/32**.5 -  1  .00125   2.5e-9   .8   .005   .2
self_attention.linear_proj.bias              input   256       1     256   1   -          0  1  .01      2.5e-9   0    .04    0
mlp.linear_fc1.layer_norm_weight             input   256       1     256   1   -          1  1  .01      2.5e-9   0    .04    0
mlp.linear_fc1.layer_norm_bias               input   256       1     256   1   -          0  1  .01      2.5e-9   0    .04    0
mlp.linear_fc1.weight                        hidden  2048x256  256   2048  4   .04        -  1  .0025    6.25e-10 .4   .04    .025
mlp.linear_fc1.bias                          input   2048      1     2048  1   -          0  1  .01      6.25e-10 0    .16    0
mlp.linear_fc2.weight                        hidden  256x2048  2048  256   16  .01        -  1  .000625  2.5e-9   1.6  .0025  .4
mlp.linear_fc2.bias                          input   256       1     256   1   -          0  1  .01      2.5e-9   0    .04    0
"""  # noqa: E501
END = """
decoder.final_layernorm.weight  input   256      1    256  1  -    1  1   .01  2.5e-9  0   .04  0
decoder.final_layernorm.bias    input   256      1    256  1  -    0  1   .01  2.5e-9  0   .04  0
output_layer.weight             output  128x256  256  128  4  .08  -  .5  .01  2.5e-9  .1  .04  .025
"""
COLUMNS = [
    "name", "role", "shape", "fan_in", "fan_out", "width_ratio", "init_std", "init_value", "multiplier", "lr", "eps",
    "weight_decay", "rule",
]  # fmt: skip


def _number(text: str) -> float | None:
    if text == "-":
        return None
    first, _, second = text.partition("/")
    divisor, _, exponent = second.partition("**")
    return float(first) / (float(divisor) ** float(exponent or 1) if divisor else 1.0)


def by_hand(optimizer: str) -> list[dict[str, Any]]:
    """What each row must say, `rule` left out."""
    layers = "".join(f"decoder.layers.{i}.{line}\n" for i in range(2) for line in LAYER.strip().splitlines())
    rows = []
    for line in (EMBEDDINGS + layers + END).split("\n"):
        if line:
            name, role, shape, *rest = line.split()
            adam = rest[:6] + rest[6:9]
            numbers = adam if optimizer == "adam" else [*rest[:6], rest[9], "-", rest[10]]
            values = dict(zip(COLUMNS[3:-1], map(_number, numbers), strict=True))
            rows.append({"name": name, "role": role, "shape": [int(n) for n in shape.split("x")], **values})
    return rows


@pytest.fixture
def hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "target.yaml", HAND_TARGET)
    for optimizer in ("adam", "sgd"):
        content = {"base": HAND_BASE, "hyperparameters": HAND_VALUES, "parametrization": {"optimizer": optimizer}}
        write(tmp_path / f"{optimizer}.recipe.yaml", content)
    return tmp_path


def same(row: dict[str, Any], expected: dict[str, Any]) -> None:
    for key, value in expected.items():
        # Six digits are what the table shows; numbers that differ by more were worked out by another rule.
        wanted = pytest.approx(value, rel=1e-12, abs=0) if isinstance(value, float) else value
        assert row[key] == wanted, (row["name"], key)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_every_row_is_what_the_rules_say(run: Command, hand: Path, optimizer: str) -> None:
    code, out, err = run("explain", "target.yaml", "--recipe", f"{optimizer}.recipe.yaml", "--format", "json")
    assert code == 0
    [remark] = err.splitlines()
    assert remark.startswith(HEADS)
    answer = json.loads(out)
    expected = by_hand(optimizer)
    assert [row["name"] for row in answer["parameters"]] == [row["name"] for row in expected]
    for row, wanted in zip(answer["parameters"], expected, strict=True):
        same(row, wanted)
        rule = f"mup.{optimizer}.{row['role']}"
        residual = row["name"].endswith(("linear_proj.weight", "linear_fc2.weight"))
        assert row["rule"] == (f"{rule}.residual" if residual else rule)
    # √32/64 · ½, and 2/4.
    model = {key: answer["model"][key] for key in ("softmax_scale", "embedding_multiplier", "output_multiplier")}
    same({"name": "model", **model}, {"softmax_scale": 32**0.5 / 128, "embedding_multiplier": 3.0})
    assert model["output_multiplier"] == 0.5
    assert answer["fingerprint"] == load_recipe(hand / f"{optimizer}.recipe.yaml").fingerprint


def test_csv_says_the_same_in_full_precision(run: Command, hand: Path) -> None:
    words = ("explain", "target.yaml", "--recipe", "adam.recipe.yaml", "--format")
    as_json = json.loads(run(*words, "json").out)["parameters"]
    code, out, err = run(*words, "csv")
    assert code == 0
    [remark] = err.splitlines()
    assert remark.startswith(HEADS)
    header, *rows = csv.reader(out.splitlines())
    assert header == COLUMNS
    for row, expected in zip(rows, as_json, strict=True):
        cells = dict(zip(header, row, strict=True))
        assert cells.pop("shape") == "x".join(map(str, expected["shape"]))
        for key, cell in cells.items():
            value = expected[key]
            assert (cell or None) == value if isinstance(value, str | None) else float(cell) == value, key


def test_the_table_says_the_same_and_is_the_default(run: Command, hand: Path) -> None:
    words = ("explain", "target.yaml", "--recipe", "adam.recipe.yaml")
    code, out, err = run(*words)
    assert code == 0
    [remark] = err.splitlines()
    assert remark.startswith(HEADS)
    assert out == run(*words, "--format", "table").out
    fingerprint = load_recipe(hand / "adam.recipe.yaml").fingerprint
    first, header, *lines = out.splitlines()
    assert first.split() == [
        "recipe", fingerprint, "softmax_scale", "0.0441942", "embedding_multiplier", "3", "output_multiplier", "0.5",
        "stack", "decoder:", "2", "layers,", "4", "residual", "branches",
    ]  # fmt: skip
    assert header.split() == COLUMNS
    for line, row in zip(lines, by_hand("adam"), strict=True):
        cells = ["×".join(map(str, v)) if isinstance(v, list) else v for v in row.values() if v is not None]
        shown = [f"{cell:.6g}" if isinstance(cell, float) else str(cell) for cell in cells]
        assert line.split()[:-1] == shown


@pytest.mark.parametrize("columns", ["40", "200"])
def test_a_narrow_terminal_costs_no_digit(
    run: Command, hand: Path, monkeypatch: pytest.MonkeyPatch, columns: str
) -> None:
    words = ("explain", "target.yaml", "--recipe", "adam.recipe.yaml")
    piped = run(*words).out
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("TTY_COMPATIBLE", "1")  # as on a terminal
    monkeypatch.setenv("NO_COLOR", "1")
    shown = run(*words).out
    assert "…" not in shown
    assert [line.split() for line in shown.replace("\x1b[1m", "").replace("\x1b[0m", "").splitlines()] == [
        line.split() for line in piped.splitlines()
    ]


def test_brief_shows_layers_that_are_alike_as_one(run: Command, hand: Path) -> None:
    write(hand / "target.yaml", {**HAND_TARGET, "num_layers": 5})
    words = ("explain", "target.yaml", "--recipe", "adam.recipe.yaml", "--brief")
    names = [line.split()[0] for line in run(*words).out.splitlines()[2:]]
    assert names == [
        *("embedding.word_embeddings.weight", "embedding.position_embeddings.weight"),
        *(f"decoder.layers.0-4.{line.split()[0]}" for line in LAYER.strip().splitlines()),
        *("decoder.final_layernorm.weight", "decoder.final_layernorm.bias", "output_layer.weight"),
    ]
    # A layer with values of its own is not hidden behind another.
    with (hand / "adam.recipe.yaml").open("a") as recipe:
        recipe.write("per_parameter: [{match: 'decoder.layers.2.*.linear_fc2.weight', lr_mult: 2.0}]\n")
    rows = {line.split()[0]: line for line in run(*words).out.splitlines() if "linear_fc2.weight" in line}
    assert list(rows) == [f"decoder.layers.{layers}.mlp.linear_fc2.weight" for layers in ("0-1", "2", "3-4")]
    assert " 0.00125 " in rows["decoder.layers.2.mlp.linear_fc2.weight"]
    assert "per_parameter[0]" in rows["decoder.layers.2.mlp.linear_fc2.weight"]
    assert " 0.000625 " in rows["decoder.layers.3-4.mlp.linear_fc2.weight"]


@pytest.mark.parametrize(
    ("grouped", "experts"),
    [
        (False, [f"local_experts.{which}.linear_fc{n}.weight" for which in ("0-4", "5", "6-11") for n in (1, 2)]),
        (True, [f"linear_fc{n}.weight{which}" for which in ("0-4", "5", "6-11") for n in (1, 2)]),
    ],
)
def test_brief_shows_experts_that_are_alike_as_one(run: Command, hand: Path, grouped: bool, experts: list[str]) -> None:
    own = {"num_experts": 12, "moe_grouped_gemm": grouped, "add_bias_linear": False}
    write(hand / "target.yaml", {**HAND_TARGET, **own, "num_layers": 3})
    pattern = "*.experts.*fc2.weight5" if grouped else "*.local_experts.5.*fc2*"
    content = {
        "base": HAND_BASE | own,
        "hyperparameters": HAND_VALUES,
        "per_parameter": [{"match": pattern, "lr_mult": 2.0}],
    }
    write(hand / "adam.recipe.yaml", content)
    shown = run("explain", "target.yaml", "--recipe", "adam.recipe.yaml", "--brief").out.splitlines()
    names = [line.split()[0] for line in shown if ".mlp.experts." in line.split()[0]]
    assert names == [f"decoder.layers.0-2.mlp.experts.{name}" for name in experts]


def test_a_tied_readout_has_no_row_and_yet_its_multiplier(run: Command, here: Path) -> None:
    answer = json.loads(run("explain", "target.yaml", "--recipe", "r.yaml", "--format", "json").out)
    assert "output_layer.weight" not in {row["name"] for row in answer["parameters"]}
    assert answer["model"]["output_multiplier"] == 0.25


def test_names_follow_the_implementation(run: Command, here: Path) -> None:
    write(here / "target.yaml", {**TARGET, "transformer_impl": "local"})
    answer = json.loads(run("explain", "target.yaml", "--recipe", "r.yaml", "--format", "json").out)
    names = {row["name"] for row in answer["parameters"]}
    assert {"decoder.layers.0.input_layernorm.weight", "decoder.layers.0.pre_mlp_layernorm.bias"} <= names
    assert not any("layer_norm_weight" in name for name in names)


def test_the_largest_model_needs_no_torch_and_no_weights(run: Command, here: Path) -> None:
    """175B parameters are 12 rows for each of 96 layers; 350 GB would not have fitted."""
    write(here / "r.yaml", {"base": {**TARGET, "seq_length": 2048}, "hyperparameters": {"lr": 0.006}})
    rows = {}
    for size in ("125m", "175b"):
        words = ("explain", ROOT / f"configs/models/gpt3_{size}.yaml", "--recipe", "r.yaml", "--format", "csv")
        rows[size] = len(run(*words).out.splitlines()) - 1
    assert rows == {"125m": 2 + 12 * 12 + 2, "175b": 2 + 96 * 12 + 2}
    program = (
        "import resource, sys; from mup_megatron.cli.main import main\n"
        "resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))\n"
        "try: main()\n"
        "finally: assert not {'torch', 'megatron', 'numpy', 'optuna'} & set(sys.modules), 'imported'"
    )
    command = [sys.executable, "-c", program, *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert len(done.stdout.splitlines()) - 1 == rows["175b"]
    assert done.stderr == ""


# ---- Hugging Face --------------------------------------------------------------------------------------------------

GPT2 = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 64, "n_positions": 32, "n_layer": 2}


def test_a_hugging_face_configuration_is_a_target_as_file_and_as_folder(run: Command, here: Path) -> None:
    (here / "small.json").write_text(json.dumps({**GPT2, "n_embd": 32, "n_head": 2}))
    (here / "large").mkdir()
    # What a published config.json may have beside what the installed transformers knows.
    large = {**GPT2, "n_embd": 128, "n_head": 8, "n_ctx": 32, "torch_dtype": "float32"}
    (here / "large" / "config.json").write_text(json.dumps(large))
    assert run("recipe", "--base", "small.json", "--lr", 0.004, "-o", "gpt2.yaml").code == 0
    as_folder = run("explain", "large", "--recipe", "gpt2.yaml", "--format", "json")
    assert (as_folder.code, as_folder.err) == (0, "")
    rows = {row["name"]: row for row in json.loads(as_folder.out)["parameters"]}
    assert rows["transformer.h.1.mlp.c_fc.weight"]["lr"] == 0.001
    assert rows["transformer.h.1.mlp.c_fc.weight"]["fan_in"] == 128
    as_file = run("explain", "large/config.json", "--recipe", "gpt2.yaml", "--format", "json")
    assert as_file.out == as_folder.out
    assert "transformer.h.0-1.mlp.c_fc.weight" in run("explain", "large", "--recipe", "gpt2.yaml", "--brief").out


@pytest.mark.parametrize(
    ("base", "target", "message"),
    [
        (GPT2, {"num_layers": 1}, "no model_type, and the recipe's base is a Hugging Face gpt2"),
        (GPT2, {**GPT2, "vocab_size": 80}, "vocab_size is 64 in the recipe's base but 80 in the target"),
        (GPT2, {"model_type": "gpt9"}, "'gpt9' is no model type of the installed transformers"),
        ({**GPT2, "n_embed": 32}, GPT2, "base.n_embed: unknown key of model type gpt2. Did you mean 'n_embd'?"),
        ({**GPT2, "n_embd": 1536}, GPT2, "were they exchanged?"),
    ],
)
def test_what_does_not_fit_is_named(
    run: Command, here: Path, base: dict[str, Any], target: dict[str, Any], message: str
) -> None:
    write(here / "gpt2.yaml", {"base": base, "hyperparameters": {"lr": 0.004}})
    (here / "target.json").write_text(json.dumps(target))
    code, out, err = run("explain", "target.json", "--recipe", "gpt2.yaml")
    assert (code, out) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1


def test_a_horizon_is_told_from_base_to_moved_to_each_parameter(run: Command, here: Path) -> None:
    content: dict[str, Any] = {
        "base": HAND_BASE,
        "hyperparameters": {**HAND_VALUES, "adam_beta2": 0.96},
        "training": {"train_iters": 100, "global_batch_size": 8, "seq_length": 16},
        "horizon": {"rule": "steps", "tokens": 16 * 100 * 8 * 16, "batch": 32},
    }
    write(here / "r.yaml", content)
    write(here / "t.yaml", HAND_TARGET)
    code, out, _ = run("explain", "t.yaml", "--recipe", "r.yaml")
    assert code == 0
    assert out.splitlines()[1] == (
        "horizon steps: batch × 4, tokens × 16, steps × 4   lr 0.01 → 0.005   weight_decay 0.1 → 0.05   "
        "adam_beta1 0.9 → 0.975   adam_beta2 0.96 → 0.99   adam_eps 1e-08 → 2e-08"
    )
    found = json.loads(run("explain", "t.yaml", "--recipe", "r.yaml", "--format", "json").out)
    assert found["horizon"]["ratios"] == {"batch": 4.0, "tokens": 16.0, "steps": 4.0}
    assert found["horizon"]["base"]["lr"] == 0.01
    assert found["horizon"]["moved"] == pytest.approx(
        {"lr": 0.005, "weight_decay": 0.05, "adam_beta1": 0.975, "adam_beta2": 0.99, "adam_eps": 2e-8}
    )
    words = next(row for row in found["parameters"] if row["name"] == "embedding.word_embeddings.weight")
    assert (words["lr"], words["eps"], words["weight_decay"]) == pytest.approx((0.005, 5e-9, 0.05))


def test_a_rule_of_depth_is_shown_for_each_stack(run: Command, here: Path) -> None:
    for name, layers in (("base", 2), ("deep", 8)):
        shape = {"num_layers": layers, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 64, "seq_length": 16}
        write(here / f"{name}.yaml", shape)
    words = ("--lr", "0.01", "--depth-alpha", "0.5", "--residual-multiplier", "0.5", "-o", "r.recipe.yaml")
    assert run("recipe", "--base", "base.yaml", *words).code == 0
    out = run("explain", "deep.yaml", "--recipe", "r.recipe.yaml", "--brief").out
    expected = "2 → 8 layers, m_L 4   blocks: branches × 0.5, lr × 0.5, eps × 0.5, weight_decay × 2"
    assert f"depth of decoder: {expected}" in out
    assert "residual branches are multiplied by 0.25" in out
    assert "mup.adam.hidden.residual (depth × 4)" in out
    content = json.loads(run("explain", "deep.yaml", "--recipe", "r.recipe.yaml", "--format", "json").out)
    assert content["model"]["deepened"]["decoder"]["base_layers"] == 2
    assert {row.get("depth_ratio", 1.0) for row in content["parameters"]} == {1.0, 4.0}
