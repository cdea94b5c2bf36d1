"""Right set-ups, which a check has to let pass: models of Megatron's, torch's and Hugging Face's, and their recipes.

Every model is checked with three recipes, which take turns, so that each value is met in many models. Twenty more have
values that are odd, and right all the same.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle, islice
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

from exam import models
from exam.setups import Configuration, Megatron, Modules, Setup
from exam.subjects import classifier, convnet, gpt2_config, llama_config, lm, megatron, towers
from mup_megatron.huggingface import base_content
from mup_megatron.recipe import recipe


@dataclass(frozen=True)
class Right:
    """One set-up."""

    kind: str
    make: Callable[[], Setup]


ODD = "odd values"

# ---- recipes -------------------------------------------------------------------------------------------------------

_Values = Mapping[str, Any]

_RECIPES: Mapping[str, tuple[_Values, _Values]] = {
    "plain": ({"embedding_multiplier": 1.0, "output_multiplier": 1.0}, {}),
    "multipliers": ({"embedding_multiplier": 6.0, "output_multiplier": 0.3}, {}),
    "decay to the half": ({"weight_decay": 0.3}, {"parametrization": {"weight_decay_exponent": 0.5}}),
    "decay left alone": ({"weight_decay": 0.2}, {"parametrization": {"weight_decay_exponent": 0.0}}),
    "no decay": ({"weight_decay": 0.0}, {}),
    "other betas": ({"adam_beta1": 0.8, "adam_beta2": 0.99}, {}),
    "clipped": ({"clip_grad": 0.1}, {}),
    "small rate": ({"lr": 0.001, "min_lr": 0.0001}, {}),
    "large draw": ({"init_method_std": 0.04}, {}),
    "eps of a kind": ({"adam_eps": 1e-5}, {}),
}
"""Name → hyperparameters, and what else the recipe says."""


def _with_recipes(count: int, kinds: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Each kind with three recipes, in turn; so many in all."""
    turn = cycle(_RECIPES)
    return islice(((kind, next(turn)) for _ in range(3) for kind in kinds), count)


# ---- Megatron ------------------------------------------------------------------------------------------------------

_LLAMA = {
    "swiglu": True,
    "normalization": "RMSNorm",
    "position_embedding_type": "rope",
    "add_bias_linear": False,
    "ffn_hidden_size": 64,
}
_GROUPED = {**_LLAMA, "group_query_attention": True, "num_query_groups": 2}
_WIDE_FFN = {"ffn_hidden_size": 512}
_MEGATRON: Mapping[str, tuple[_Values, _Values]] = {
    "gpt": ({}, {}),
    "gpt, tied": ({"untie_embeddings_and_output_weights": False}, {}),
    "llama": (_LLAMA, _WIDE_FFN),
    "groups held": (_GROUPED, _WIDE_FFN),
    "groups growing": (
        {**_GROUPED, "num_attention_heads": 4, "kv_channels": 8},
        {**_WIDE_FFN, "num_attention_heads": 32, "num_query_groups": 16},
    ),
    "ffn held": ({"ffn_hidden_size": 96}, {"ffn_hidden_size": 96}),
    "ffn growing faster": ({"ffn_hidden_size": 64}, {"ffn_hidden_size": 1024}),
    "heads growing": ({}, {"num_attention_heads": 2}),
    "norms of queries and keys": ({"qk_layernorm": True}, {}),
    "no biases": ({"add_bias_linear": False}, {}),
    "biases of queries alone": ({"add_bias_linear": False, "add_qkv_bias": True}, {}),
    "rotary in part": ({"position_embedding_type": "rope", "rotary_percent": 0.5}, {}),
    "no positions": ({"position_embedding_type": "none"}, {}),
    "deep and narrow": ({"num_layers": 5}, {"num_layers": 5}),
    "deeper than the base": ({"num_layers": 1}, {"num_layers": 3}),
    "gated, tied, with biases": (
        {"swiglu": True, "ffn_hidden_size": 64, "untie_embeddings_and_output_weights": False},
        _WIDE_FFN,
    ),
}


def _megatron(kind: str, recipe_name: str) -> Setup:
    base, target = _MEGATRON[kind]
    values, content = _RECIPES[recipe_name]
    setup = megatron({**base}, {**base, **target}, **values)
    return replace(setup, recipe=setup.recipe.model_validate({**setup.recipe.model_dump(), **content}))


# ---- torch ---------------------------------------------------------------------------------------------------------


def _of_half_the_width(width: int) -> nn.Module:
    return models.SelfAttention(width, head=width // 2)


_BARE = {"attention": partial(models.SelfAttention, bias=False), "mlp": partial(models.Mlp, bias=False)}
_LMS: Mapping[str, _Values] = {
    "pre-norm": {},
    "post-norm": {"place": "post"},
    "side by side": {"place": "parallel"},
    "RMS norms": {"norm": models.RmsNorm},
    "tied": {"tied": True},
    "rotary": {"positions": False, "attention": partial(models.SelfAttention, rotary=True)},
    "gated": {"mlp": models.GatedMlp},
    "no biases": _BARE,
    "wide heads": {"attention": _of_half_the_width},
    "ffn held": {"mlp": partial(models.Mlp, ffn=64)},
    "ReLU, four layers": {"layers": 4, "mlp": partial(models.Mlp, act=torch.relu)},
}
_OTHERS: Mapping[str, Callable[..., Modules]] = {
    "classifier": classifier,
    "classifier of tanh": partial(classifier, act=torch.tanh, hidden=3),
    "conv net": convnet,
    # Statistics of a batch are noise, which takes more widths.
    "conv net with batch norms": lambda key, **own: replace(
        convnet(key, norm=nn.BatchNorm2d, **own), widths=(*models.WIDTHS, 256)
    ),
    "towers": lambda key, **_: towers(key),
}
_WITHOUT_TABLE = {"embedding_multiplier": 1.0}


def _torch(kind: str, recipe_name: str) -> Setup:
    values, content = _RECIPES[recipe_name]
    key = f"{kind}, {recipe_name}"
    if kind in _LMS:
        setup = lm(key, hyperparameters={**values}, **_LMS[kind])
    elif kind == "towers":
        setup = towers(key)
        setup = replace(setup, hyperparameters={**setup.hyperparameters, **values, "output_multiplier": 1.0})
    else:
        setup = _OTHERS[kind](key, hyperparameters={**values, **_WITHOUT_TABLE})
    return replace(setup, content=content)


# ---- Hugging Face --------------------------------------------------------------------------------------------------


def _common(width: int) -> dict[str, Any]:
    return {
        "vocab_size": models.VOCABULARY,
        "max_position_embeddings": 32,
        "hidden_size": width,
        "num_hidden_layers": 2,
        "num_attention_heads": width // 16,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": None,
    }


def _mistral(width: int) -> Any:
    own = {"intermediate_size": 2 * width, "num_key_value_heads": width // 16, "head_dim": 16}
    return transformers.MistralConfig(**_common(width), **own, architectures=["MistralForCausalLM"])


def _qwen2(width: int) -> Any:
    own = {"intermediate_size": 3 * width, "num_key_value_heads": width // 32 or 1}
    return transformers.Qwen2Config(**_common(width), **own, architectures=["Qwen2ForCausalLM"])


def _qwen3(width: int) -> Any:
    own = {"intermediate_size": 3 * width, "num_key_value_heads": width // 16, "head_dim": 32}
    return transformers.Qwen3Config(**_common(width), **own, architectures=["Qwen3ForCausalLM"])


def _neox(width: int) -> Any:
    return transformers.GPTNeoXConfig(
        **_common(width), intermediate_size=4 * width, architectures=["GPTNeoXForCausalLM"]
    )


def _opt(width: int) -> Any:
    own = {"ffn_dim": 4 * width, "word_embed_proj_dim": width, "dropout": 0.0}
    return transformers.OPTConfig(**_common(width), **own, architectures=["OPTForCausalLM"])


def _bert(width: int) -> Any:
    own = {"intermediate_size": 4 * width, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return transformers.BertConfig(**_common(width), **own, architectures=["BertForMaskedLM"])


def _vit(width: int) -> Any:
    sizes = {"hidden_size": width, "num_hidden_layers": 2, "num_attention_heads": width // 16}
    own = {"intermediate_size": 4 * width, "image_size": 16, "patch_size": 4, "num_labels": 10}
    return transformers.ViTConfig(**sizes, **own, pooler_output_size=width, architectures=["ViTForImageClassification"])


def _groups_held(width: int) -> Any:
    return llama_config(width, num_key_value_heads=2)


def _heads_growing(width: int) -> Any:
    return llama_config(width, num_attention_heads=2, num_key_value_heads=2, head_dim=width // 2)


_CONFIGS: Mapping[str, Callable[[int], Any]] = {
    "GPT-2": gpt2_config,
    "GPT-2, ffn held": lambda width: gpt2_config(width, n_inner=128),
    "Llama": llama_config,
    "Llama, groups held": _groups_held,
    "Llama, heads growing": _heads_growing,
    "Llama, tied": lambda width: llama_config(width, tie_word_embeddings=True),
    "Mistral": _mistral,
    "Qwen2": _qwen2,
    "Qwen3": _qwen3,
    "GPT-NeoX": _neox,
    "OPT": _opt,
    "BERT": _bert,
    "ViT": _vit,
}
_HF_VALUES = {"lr": 0.008, "init_method_std": 0.05, "weight_decay": 0.1, "output_multiplier": 2.0}


def _hugging_face(kind: str, recipe_name: str) -> Setup:
    values, content = _RECIPES[recipe_name]
    if kind in ("ViT", "OPT", "BERT"):
        values = {**values, "embedding_multiplier": 1.0}
    return _configuration(_CONFIGS[kind](32), _CONFIGS[kind](256), values, **content)


def _configuration(base: Any, target: Any, values: _Values, *, widths: Any = (32, 64, 128), **content: Any) -> Setup:
    written = {"base": base_content(base), "hyperparameters": {**_HF_VALUES, **values}, **content}
    return Configuration(config=target, recipe=recipe(written, source="exam"), widths=widths)


# ---- odd values ----------------------------------------------------------------------------------------------------


def _odd_megatron(base: _Values | None = None, target: _Values | None = None, **values: Any) -> Megatron:
    return replace(megatron({**(base or {})}, {**(target or {})}, **values), widths=None)


_WIDE_BASE = {"hidden_size": 512, "num_attention_heads": 32}


def _by_sgd(setup: Megatron) -> Megatron:
    own = setup.recipe.parametrization.model_copy(update={"optimizer": "sgd"})
    return replace(setup, recipe=setup.recipe.model_copy(update={"parametrization": own}))


class _Dropping(models.Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return functional.dropout(super().forward(x), 0.1, self.training)


def _in_four_parts(model: Any, tokens: Tensor) -> Tensor:
    """The mean of four micro-batches' losses, each accumulated."""
    losses = [models.text_loss(model, part) for part in tokens.chunk(4)]
    return torch.stack(losses).mean()


_SGD = {"parametrization": {"optimizer": "sgd"}}
_ODD: Mapping[str, Callable[[], Setup]] = {
    "Megatron, base equal to target": lambda: _odd_megatron({"hidden_size": 256, "num_attention_heads": 16}),
    "Megatron, base wider than the check's models": lambda: _odd_megatron(
        _WIDE_BASE, {"hidden_size": 1024, "num_attention_heads": 64}
    ),
    "Megatron, SGD": lambda: _by_sgd(_odd_megatron(lr=0.1, min_lr=0.01, weight_decay=0.0)),
    "Megatron, output multiplier 0.01": lambda: _odd_megatron(output_multiplier=0.01),
    "Megatron, embedding multiplier 0.01": lambda: _odd_megatron(embedding_multiplier=0.01),
    "Megatron, learning rate ten times too high": lambda: _odd_megatron(lr=0.08),
    "Megatron, gains stored as their distance from 1": lambda: _odd_megatron({"apply_layernorm_1p": True}),
    "Megatron, dropout": lambda: _odd_megatron({"hidden_dropout": 0.1, "attention_dropout": 0.1}),
    "Megatron, no clipping": lambda: _odd_megatron(clip_grad=0.0),
    "torch, SGD": lambda: replace(
        classifier("odd-sgd", hyperparameters={"lr": 0.1, "weight_decay": 0.01}), content=_SGD
    ),
    "torch, base wider than the models": lambda: replace(lm("odd-wide-base"), base_width=256),
    "torch, output multiplier 0.01": lambda: lm("odd-output", hyperparameters={"output_multiplier": 0.01}),
    "torch, learning rate ten times too high": lambda: lm("odd-rate", hyperparameters={"lr": 0.04}),
    "torch, accumulated gradients, no clipping": lambda: replace(
        lm("odd-accumulated", hyperparameters={"clip_grad": 0.0}), loss=_in_four_parts
    ),
    "torch, dropout": lambda: lm("odd-dropout", mlp=_Dropping),
    "Hugging Face, base equal to target": lambda: _configuration(llama_config(128), llama_config(128), {}, widths=None),
    "Hugging Face, base wider than the check's models": lambda: _configuration(
        gpt2_config(512), gpt2_config(1024), {}, widths=None
    ),
    "Hugging Face, SGD": lambda: _configuration(
        gpt2_config(32), gpt2_config(256), {"lr": 0.1, "weight_decay": 0.0}, **_SGD
    ),
    "Hugging Face, embedding multiplier 0.01": lambda: _configuration(
        llama_config(32), llama_config(256), {"embedding_multiplier": 0.01}
    ),
    "Hugging Face, dropout": lambda: _configuration(
        gpt2_config(32, resid_pdrop=0.1, attn_pdrop=0.1), gpt2_config(256, resid_pdrop=0.1, attn_pdrop=0.1), {}
    ),
}

# ---- all of them ---------------------------------------------------------------------------------------------------

_KINDS: Mapping[str, tuple[Callable[[str, str], Setup], Sequence[str], int]] = {
    "Megatron": (_megatron, list(_MEGATRON), 47),
    "torch": (_torch, [*_LMS, *_OTHERS], 45),
    "Hugging Face": (_hugging_face, list(_CONFIGS), 38),
}

RIGHT: dict[str, Right] = {
    f"{kind}: {what}; {recipe_name}": Right(kind, partial(make, what, recipe_name))
    for kind, (make, kinds, count) in _KINDS.items()
    for what, recipe_name in _with_recipes(count, kinds)
} | {name: Right(ODD, make) for name, make in _ODD.items()}
