"""`proxy`: a model file that every command takes, and what the search costs beside the target's run."""

from pathlib import Path

import pytest
from support.commands import Command, contents, write

from mup_megatron.architectures.registry import load_model_file

CONFIGS = Path(__file__).parents[2] / "configs" / "models"
TARGET = CONFIGS / "gpt3_6.7b.yaml"


def table(out: str) -> dict[str, list[str]]:
    """First cell → the others."""
    lines = [line.split() for line in out.splitlines()]
    return {" ".join(words[:-2]): words[-2:] for words in lines if len(words) > 2}


def test_the_proxy_of_gpt3_and_its_cost(run: Command, here: Path) -> None:
    """As in TP5: the target's 32 layers at width 256, 350 runs of 4 B tokens for one of 300 B."""
    words = ("--trial-tokens", "4e9", "--target-tokens", "300e9", "-o", "proxy.yaml")
    code, out, err = run("proxy", TARGET, *words)
    assert (code, err) == (0, "")
    proxy, paper = load_model_file(here / "proxy.yaml"), load_model_file(CONFIGS / "gpt3_6.7b_proxy_40m.yaml")
    assert proxy.model_copy(update={"kv_channels": None, "ffn_hidden_size": None}) == paper
    assert (proxy.head_size, proxy.ffn_size) == (128, 1024)
    rows = table(out)
    assert rows["num_layers"] == ["32", "32"]
    assert rows["hidden_size"] == ["256", "4096"]
    assert rows["head_size"] == ["128", "128"]
    assert rows["parameters"] == ["3.87e+07", "6.66e+09"]
    assert rows["runs"] == ["350", "1"]
    assert rows["tokens per run"] == ["4e+09", "3e+11"]
    # 6·2·4·256²·32 … worked out in tests/architectures/test_cost.py; 350·4e9·4.296e8 / (3e11·4.314e10).
    assert "The search costs 4.65% of the target's run." in out
    # 4e9 / (32·2048), and 1000·32·2048.
    trial = "Trials of 4e+09 tokens: give `mup-megatron sweep` --train-iters 61035 and --global-batch-size 32,"
    assert trial in " ".join(out.split())
    assert out.rstrip().endswith("6.55e+07.")


@pytest.mark.parametrize("tokens", ["1", "1e300"])
def test_a_trial_that_no_flags_make_is_not_told_in_flags(run: Command, here: Path, tokens: str) -> None:
    code, out, _ = run("proxy", TARGET, "--trial-tokens", tokens)
    assert code == 0
    assert "--train-iters" not in out


def test_with_a_rule_of_depth_it_says_what_shallow_saves(run: Command, here: Path) -> None:
    code, out, err = run("proxy", TARGET, "--depth", "completep", "--trial-tokens", "4e9", "--target-tokens", "300e9")
    assert (code, err) == (0, "")
    assert table(out)["num_layers"] == ["4", "32"]
    assert "4 of the target's 32 layers, which parametrization.depth carries over" in out
    assert "of the target's run in place of 4.65%." in out


@pytest.mark.parametrize(
    ("target", "sizes"),
    [
        ("nemotron_h_8b", {"ffn_hidden_size": "1344", "mamba_num_heads": "8", "mamba_state_dim": "128"}),
        ("deepseek_v3_671b", {"moe_ffn_hidden_size": "80", "num_experts": "256", "kv_lora_rank": "512"}),
    ],
)
def test_the_sizes_of_its_own_layers_are_shown(run: Command, here: Path, target: str, sizes: dict[str, str]) -> None:
    rows = table(run("proxy", CONFIGS / f"{target}.yaml", "--target-tokens", "1e13").out)
    assert {key: rows[key][0] for key in sizes} == sizes
    assert ("parameters that a token passes" in rows) is ("num_experts" in sizes)


def test_items_add_up(run: Command, here: Path) -> None:
    rows = table(run("proxy", TARGET).out)
    for column in (0, 1):
        items = [float(rows[key][column]) for key in ("attention_projections", "attention_scores", "mlp", "readout")]
        assert sum(items) == pytest.approx(float(rows["total"][column]), rel=0.01)  # three digits are shown


def test_without_an_output_nothing_is_written(run: Command, here: Path) -> None:
    before = contents(here)
    assert run("proxy", TARGET).code == 0
    assert contents(here) == before


def test_what_exists_is_replaced_only_if_asked_for(run: Command, here: Path) -> None:
    before = contents(here)
    code, out, err = run("proxy", TARGET, "-o", "base.yaml")
    assert (code, out) == (2, "")
    assert "base.yaml: exists already. Give --force" in err
    assert contents(here) == before
    assert run("proxy", TARGET, "-o", "base.yaml", "--force").code == 0
    assert load_model_file(here / "base.yaml").hidden_size == 256


def test_what_differs_in_more_than_width_is_said(run: Command, here: Path) -> None:
    out = run("proxy", TARGET, "--hidden-size", "128", "--budget", "0.01").out
    assert "Note: 4 of the target's 32 layers" not in out
    assert "of the target's 32 layers, for the cost" in out
    assert "Note: width 128 is below the 256 at which transfer was good" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--budget", "nan"], "nan is not a finite number"),
        (["--budget", "inf"], "inf is not a finite number"),
        (["--budget", "0"], "0.0 is not in the range x>0"),
        (["--trial-tokens", "nan"], "nan is not a finite number"),
        (["--target-tokens", "-5"], "-5.0 is not in the range x>=1"),
        (["--trials", "0"], "0 is not in the range 1<=x"),
        (["--hidden-size", "0"], "0 is not in the range 1<=x"),
        (["--hidden-size", "4096"], "hidden_size 4096: the target is not wider than a proxy of width 4096 would be"),
    ],
)
def test_bad_values_write_nothing(run: Command, here: Path, words: list[str], said: str) -> None:
    before = contents(here)
    code, out, err = run("proxy", TARGET, *words, "-o", "proxy.yaml")
    assert (code, out) == (2, "")
    assert said in err
    assert contents(here) == before


def test_a_proxy_at_which_an_own_tensor_has_no_size_is_refused(run: Command, here: Path) -> None:
    own = [{"name": "decoder.gate", "fan_out": "mamba_num_heads", "start": 1.0}]
    sizes = {"hidden_size": 128, "num_attention_heads": 16, "vocab_size": 300, "seq_length": 16}
    write(here / "wide.yaml", {"hybrid_layer_pattern": "*-", **sizes, "custom_tensors": own})
    code, out, err = run("proxy", "wide.yaml", "--hidden-size", "16")
    assert (code, out) == (2, "")
    assert "custom_tensors: 'mamba_num_heads' is no size" in err
