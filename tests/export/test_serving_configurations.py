"""What servers and converters read in an export's configuration, beside transformers."""

import dataclasses
import importlib
import math
from pathlib import Path

import pytest
from support.exported import KINDS, models
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RotaryEmbedding

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.export.architectures import registry
from mup_megatron.export.architectures.deepseek_v3 import DEEPSEEK_V3
from mup_megatron.export.architectures.gpt2 import GPT2


def target(name: str, **keys: float) -> ModelFile:
    kind = KINDS[name]
    return models(dataclasses.replace(kind, keys={**kind.keys, **keys}))[1]


@pytest.mark.parametrize(("mscale", "mscale_all_dim"), [(1.0, 1.0), (0.8, 0.6), (1.0, 0.0), (0.0, 1.0), (0.0, 0.0)])
def test_yarns_factor_is_stated_only_where_it_cannot_be_computed(mscale: float, mscale_all_dim: float) -> None:
    config = DEEPSEEK_V3.config(target("deepseek_v3 with YaRN", mscale=mscale, mscale_all_dim=mscale_all_dim))
    # A server that finds a factor of 1 leaves the softmax scale as it is without YaRN.
    assert ("attention_factor" in config["rope_scaling"]) == (0.0 in (mscale, mscale_all_dim))
    stock = DeepseekV3RotaryEmbedding(DeepseekV3Config(**config))
    step = 0.1 * math.log(config["rope_scaling"]["factor"])
    assert stock.attention_scaling == pytest.approx((1 + step * mscale) / (1 + step * mscale_all_dim), rel=1e-12)


def test_gpt2_has_its_positions_under_the_name_that_converters_ask_for() -> None:
    model = target("gpt2")
    assert GPT2.config(model)["n_ctx"] == GPT2.config(model)["n_positions"] == model.positions


@pytest.mark.parametrize(
    ("name", "words", "said"),
    [
        ("llama_cpp", ["--llama-cpp", "nowhere"], "--llama-cpp nowhere: no checkout of llama.cpp"),
        ("vllm_exports", ["--cases", "all"], "argument --cases: invalid choice: 'all'"),
    ],
)
def test_what_servers_are_measured_with_can_be_exported(
    name: str, words: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    benchmark = importlib.import_module(name)
    for case, kind in benchmark.CASES.items():
        assert not list(registry.targets()[kind.architecture].problems(models(kind)[1])), case
    monkeypatch.setattr("sys.argv", [name, *words])
    with pytest.raises(SystemExit):
        benchmark.main()
    assert said in capsys.readouterr().err
