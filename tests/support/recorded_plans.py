"""Plans of many models, as they were recorded: what a change of the inside must not change.

`python tests/support/recorded_plans.py` records them anew, after a change that is meant; the difference is for review.
"""

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "tests" / "recorded" / "plans.json"

VALUES = {
    "lr": 0.003,
    "min_lr": 0.0003,
    "init_method_std": 0.05,
    "embedding_multiplier": 5.0,
    "output_multiplier": 0.5,
    "attention_multiplier": 1.5,
    "weight_decay": 0.1,
    "adam_eps": 1e-8,
}
BASE = {
    "num_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "seq_length": 16,
    "transformer_impl": "local",
}
WIDE = {**BASE, "num_layers": 3, "hidden_size": 256, "num_attention_heads": 16}
GROUPED = {"group_query_attention": True}
OVERRIDES = [
    {"match": "embedding.*", "lr_mult": 2.0, "multiplier": 3.0},
    {"match": "*.linear_fc2.weight", "init_mult": 0.5, "lr_mult": 0.25},
    {"match": "*", "lr_mult": 1.5},
]

GPT: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any], Mapping[str, Any]]] = {
    # What differs from BASE and from WIDE, and what a recipe says beside VALUES.
    "plain": ({}, {}, {}),
    "transformer engine": ({"transformer_impl": "transformer_engine"}, {"transformer_impl": "transformer_engine"}, {}),
    "untied": (
        {"untie_embeddings_and_output_weights": True},
        {"untie_embeddings_and_output_weights": True},
        {},
    ),
    "gated": ({"swiglu": True}, {"swiglu": True}, {}),
    "no biases": ({"add_bias_linear": False}, {"add_bias_linear": False}, {}),
    "query biases": (
        {"add_bias_linear": False, "add_qkv_bias": True},
        {"add_bias_linear": False, "add_qkv_bias": True},
        {},
    ),
    "rms norm": ({"normalization": "RMSNorm"}, {"normalization": "RMSNorm"}, {}),
    "zero-centred gains": ({"apply_layernorm_1p": True}, {"apply_layernorm_1p": True}, {}),
    "query norms": ({"qk_layernorm": True}, {"qk_layernorm": True}, {}),
    "rotary": ({"position_embedding_type": "rope"}, {"position_embedding_type": "rope"}, {}),
    "no positions": ({"position_embedding_type": "none"}, {"position_embedding_type": "none"}, {}),
    "groups grow": ({**GROUPED, "num_query_groups": 2}, {**GROUPED, "num_query_groups": 8}, {}),
    "groups stay": ({**GROUPED, "num_query_groups": 2}, {**GROUPED, "num_query_groups": 2}, {}),
    "ffn stays": ({"ffn_hidden_size": 512}, {"ffn_hidden_size": 512}, {}),
    "ffn grows faster": ({"ffn_hidden_size": 128}, {"ffn_hidden_size": 2048}, {}),
    "heads of another size": ({}, {"num_attention_heads": 4}, {}),
    "head size and query norms": ({"qk_layernorm": True}, {"num_attention_heads": 8, "qk_layernorm": True}, {}),
    "channels apart": ({"kv_channels": 32}, {"kv_channels": 64}, {}),
    "deeper": ({}, {"num_layers": 12}, {}),
    "shallower": ({"num_layers": 6}, {}, {}),
    "narrower": ({"hidden_size": 512, "num_attention_heads": 32}, {}, {}),
    "another vocabulary": ({}, {"vocab_size": 50257}, {}),
    "base is target": (
        {"num_layers": 3, "hidden_size": 256, "num_attention_heads": 16},
        {},
        {},
    ),
    "sgd": ({}, {}, {"parametrization": {"optimizer": "sgd"}}),
    "sgd, all sides apart": (
        {**GROUPED, "num_query_groups": 2, "ffn_hidden_size": 128, "untie_embeddings_and_output_weights": True},
        {**GROUPED, "num_query_groups": 2, "ffn_hidden_size": 2048, "untie_embeddings_and_output_weights": True},
        {"parametrization": {"optimizer": "sgd"}},
    ),
    "standard": ({}, {}, {"parametrization": {"rule": "standard"}}),
    "standard sgd": ({}, {}, {"parametrization": {"rule": "standard", "optimizer": "sgd"}}),
    "half an exponent": ({}, {}, {"parametrization": {"weight_decay_exponent": 0.5}}),
    "no exponent": ({}, {}, {"parametrization": {"weight_decay_exponent": 0.0}}),
    "overrides": ({}, {}, {"per_parameter": OVERRIDES}),
    "overrides of a tied readout": (
        {},
        {},
        {"per_parameter": [{"match": "embedding.word_embeddings.weight", "init_mult": 0.1, "multiplier": 2.0}]},
    ),
    "zero readout": (
        {"untie_embeddings_and_output_weights": True},
        {"untie_embeddings_and_output_weights": True},
        {"per_parameter": [{"match": "output_layer.weight", "init_mult": 0.0}]},
    ),
    "sgd with overrides": ({}, {}, {"per_parameter": OVERRIDES, "parametrization": {"optimizer": "sgd"}}),
}
WITHOUT = {
    "vit": ("embedding_multiplier",),
    "resnet": ("embedding_multiplier", "attention_multiplier"),
    "mlp": ("embedding_multiplier", "attention_multiplier"),
    "cnn": ("embedding_multiplier", "attention_multiplier"),
}
"""Values that have nothing to act on."""
YOUNGER = {
    "tiny_hybrid",
    "nemotron_h_8b",
    "qwen3_235b_a22b",
    "deepseek_v3_671b",
    "bert_base",
    "bert_large",
    "bert_proxy",
    "t5_base",
}
"""Shipped models that the record does not know."""
MODULE_WIDTHS = (2, 6)
FAMILY_WIDTHS = (32, 128)


def _row(entry: Any) -> list[Any]:
    return [
        entry.role.value,
        list(entry.shape),
        entry.init_std,
        entry.init_value,
        entry.multiplier,
        entry.lr,
        entry.min_lr,
        entry.eps,
        entry.weight_decay,
    ]


def _plain(plan: Any) -> dict[str, Any]:
    """A plan as the record has it: the model's own factors, and a row for each name; layers that are alike are one."""
    from mup_megatron.plan_table import _LAYER, _merged

    return {
        "fingerprint": plan.fingerprint,
        "softmax_scale": plan.softmax_scale,
        "embedding_multiplier": plan.embedding_multiplier,
        "output_multiplier": plan.output_multiplier,
        "parameters": {entry.name: _row(entry) for entry in _merged(plan.entries, _LAYER)},
    }


def _gpt(name: str) -> Any:
    from mup_megatron.architectures.registry import model_file
    from mup_megatron.recipe import recipe

    base, target, content = GPT[name]
    own = recipe({"base": {**BASE, **base}, "hyperparameters": VALUES, **content}, source=name)
    return own.plan(model_file({**WIDE, **target}, source=name))


def _shipped(path: Path) -> Any:
    from mup_megatron.recipe import load_recipe
    from mup_megatron.targets import plan_for_file

    return plan_for_file(path, load_recipe(ROOT / "configs" / "recipes" / "gpt3_6.7b.recipe.yaml"))


def _values(of: str) -> dict[str, float]:
    return {key: value for key, value in VALUES.items() if key not in WITHOUT.get(of, ())}


def _family(name: str, content: Mapping[str, Any]) -> Any:
    from support.hf_families import config, recipe_at
    from support.hf_models import with_class

    from mup_megatron.huggingface import plan_for

    base, target = FAMILY_WIDTHS
    own = recipe_at(config(name, base), hyperparameters=_values(name), **content)
    return plan_for(with_class(name, config(name, target)), own)


def _example(config: Path, recipe_path: Path) -> Any:
    from mup_megatron.recipe import load_recipe
    from mup_megatron.targets import plan_for_file

    return plan_for_file(config, load_recipe(recipe_path))


def _module(kind: str) -> Any:
    import torch
    from support.hf_plain_modules import MODULES

    from mup_megatron.modules import module_base, plan_for_module
    from mup_megatron.recipe import recipe

    def model(width: int) -> Callable[[], torch.nn.Module]:
        return lambda: MODULES[kind](width)

    narrow, wide = MODULE_WIDTHS
    base = module_base(model(narrow), model(2 * narrow)).model_dump(mode="json", exclude_none=True)
    own = recipe({"base": base, "hyperparameters": _values(kind)}, source=kind)
    return plan_for_module(model(wide), own)


def plans() -> dict[str, Callable[[], Any]]:
    """Everything that is recorded, by name: each makes its plan when it is called."""
    from support.hf_families import FAMILIES
    from support.hf_plain_modules import MODULES

    examples = ROOT / "examples"
    named: dict[str, Callable[[], Any]] = {f"gpt: {name}": lambda name=name: _gpt(name) for name in GPT}
    for path in sorted((ROOT / "configs" / "models").glob("*.yaml")):
        if f"configs/models/{path.name}" not in recorded():  # younger than the recording
            continue
        named[f"configs/models/{path.name}"] = lambda path=path: _shipped(path)
    for folder, name in (("deepspeed_gpt2", "gpt2"), ("trainer_llama", "llama")):
        named[f"examples/{folder}"] = lambda folder=folder, name=name: _example(
            examples / folder / f"{name}_256.json", examples / folder / f"{name}.recipe.yaml"
        )
    for family in FAMILIES:
        named[f"huggingface: {family}"] = lambda family=family: _family(family, {})
        named[f"huggingface: {family}, sgd"] = lambda family=family: _family(
            family, {"parametrization": {"optimizer": "sgd"}}
        )
    for kind in MODULES:
        named[f"module: {kind}"] = lambda kind=kind: _module(kind)
    return named


def recorded() -> dict[str, dict[str, Any]]:
    """The record."""
    content: dict[str, dict[str, Any]] = json.loads(RECORD.read_text())
    return content


def plain(name: str) -> dict[str, Any]:
    """A plan as it is now, in the terms of the record."""
    content: dict[str, Any] = json.loads(json.dumps(_plain(plans()[name]())))
    return content


def _text(content: Mapping[str, Mapping[str, Any]]) -> str:
    """JSON with a line for each parameter, so that a difference can be read."""
    lines = []
    for name, plan in content.items():
        head = {key: value for key, value in plan.items() if key != "parameters"}
        rows = ",\n".join(f"   {json.dumps(key)}: {json.dumps(row)}" for key, row in plan["parameters"].items())
        parts = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
        lines.append(f" {json.dumps(name)}: {{\n" + ",\n".join([*parts, f'  "parameters": {{\n{rows}}}']) + "}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    RECORD.parent.mkdir(exist_ok=True)
    RECORD.write_text(_text({name: plain(name) for name in plans()}))
