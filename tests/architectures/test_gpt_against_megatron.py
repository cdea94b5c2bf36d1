"""Names, shapes, starting values and defaults against Megatron-Core itself, built on the CPU.

Transformer Engine needs a GPU, so its models are not built here. Its names are those that Megatron-Core's local spec
writes into a checkpoint (`sharded_state_dict_keys_map`), so that either kind of model can read it.
"""

import argparse
import re
from typing import Any

import pytest
from support.planned import built
from support.processes import run_ranks
from support.shapes import gpt
from support.stock import Layout

from mup_megatron.architectures.families.mlp import Mlp
from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.architectures.registry import shapes_of
from mup_megatron.megatron.versions import core_version
from mup_megatron.theory import Constant, Tensor

MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "untied": {"untie_embeddings_and_output_weights": True},
    "RMSNorm": {"normalization": "RMSNorm"},
    "gated": {"swiglu": True},
    "grouped queries": {"group_query_attention": True, "num_query_groups": 2},
    "own head size": {"kv_channels": 10, "num_attention_heads": 6},
    "own head size, grouped queries": {
        "kv_channels": 6,
        "num_attention_heads": 6,
        "group_query_attention": True,
        "num_query_groups": 3,
    },
    "query norm": {"qk_layernorm": True},
    "query norm, RMSNorm": {"qk_layernorm": True, "normalization": "RMSNorm"},
    "no biases": {"add_bias_linear": False},
    "qkv bias": {"add_bias_linear": False, "add_qkv_bias": True},
    "rotary": {"position_embedding_type": "rope"},
    "no positions": {"position_embedding_type": "none"},
    "padded vocabulary": {"vocab_size": 49, "untie_embeddings_and_output_weights": True},
    "llama": {
        "swiglu": True,
        "normalization": "RMSNorm",
        "position_embedding_type": "rope",
        "add_bias_linear": False,
        "group_query_attention": True,
        "num_query_groups": 1,
        "untie_embeddings_and_output_weights": True,
    },
}

Constants = dict[str, float | None]


def live_models(models: dict[str, ModelFile]) -> dict[str, tuple[dict[str, tuple[int, ...]], Constants, set[str]]]:
    """In a rank: each built model's shapes and constant values by name, and its names in a checkpoint."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values

    found = {}
    for case, model in models.items():
        _, _, [chunk] = built(model, Layout())
        shapes = {name: tuple(parameter.shape) for name, parameter in chunk.named_parameters()}
        constants = {
            name: p.unique().item() if p.unique().numel() == 1 else None for name, p in chunk.named_parameters()
        }
        saved = {entry.key for entry in nested_values(chunk.sharded_state_dict()) if hasattr(entry, "global_shape")}
        saved |= {entry.key for entry in nested_values(chunk.sharded_state_dict()) if hasattr(entry, "build_fn")}
        found[case] = (shapes, constants, saved)
    return found


@pytest.fixture(scope="module")
def live() -> dict[str, tuple[dict[str, tuple[int, ...]], Constants, set[str]]]:
    [found] = run_ranks(live_models, 1, {case: gpt(1, **changes) for case, changes in MODELS.items()})
    return found


def _tensors(case: str, **changes: Any) -> tuple[Tensor, ...]:
    model = gpt(1, **MODELS[case], **changes)
    return shapes_of(model, model)[1].tensors


@pytest.mark.parametrize("case", MODELS)
def test_names_shapes_and_constants_are_those_of_the_live_model(case: str, live: dict[str, Any]) -> None:
    shapes, constants, _ = live[case]
    assert {t.name: t.shape for t in _tensors(case)} == shapes
    started = {t.name: t.start.value if isinstance(t.start, Constant) else None for t in _tensors(case)}
    assert started == constants


@pytest.mark.parametrize("case", MODELS)
def test_transformer_engine_names_are_those_in_a_checkpoint(case: str, live: dict[str, Any]) -> None:
    def without_layer(name: str) -> str:
        return re.sub(r"\.layers\.\d+\.", ".layers.", name)

    ours = {without_layer(t.name) for t in _tensors(case, transformer_impl="transformer_engine")}
    saved = {without_layer(name) for name in live[case][2] if not name.endswith("_extra_state")}
    assert ours == saved


def test_the_comparison_can_fail(live: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    original = Mlp.tensors

    def without_gate(family: Mlp, model: ModelFile, *rest: Any) -> Any:
        return original(family, model.model_copy(update={"swiglu": False}), *rest)

    monkeypatch.setattr(Mlp, "tensors", without_gate)
    test_names_shapes_and_constants_are_those_of_the_live_model("plain", live)
    with pytest.raises(AssertionError):
        test_names_shapes_and_constants_are_those_of_the_live_model("gated", live)


def megatron_defaults(keys: list[str]) -> dict[str, Any]:
    """In a rank: the defaults of these of Megatron-LM's flags, written with underscores."""
    from megatron.training.arguments import add_megatron_arguments

    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_megatron_arguments(parser)
    defaults = {flag[2:].replace("-", "_"): a.default for a in parser._actions for flag in a.option_strings}
    return {key: defaults[key] for key in keys}


@pytest.mark.skipif(core_version() < (0, 17, 0), reason="megatron-core 0.16 comes without Megatron-LM's arguments")
def test_keys_and_defaults_are_megatrons_arguments() -> None:
    # Megatron has the switch that turns this one off.
    switched_off = {"add_bias_linear": "disable_bias_linear"}
    older = {"moe_use_legacy_grouped_gemm", "custom_tensors"}  # of another release, and of a model file alone
    keys = [switched_off.get(key, key) for key in ModelFile.model_fields if key not in older]
    [flags] = run_ranks(megatron_defaults, 1, keys)
    required = {"num_layers", "hidden_size", "num_attention_heads", "vocab_size", "seq_length"}
    differ = {"attention_dropout": 0.1, "hidden_dropout": 0.1}
    for key, field in ModelFile.model_fields.items():
        if key in older:
            continue
        default = flags[switched_off.get(key, key)]
        expected = differ.get(key, field.default)
        assert field.is_required() == (key in required), key
        if key not in required:
            assert default == expected, key
