"""The right set-ups in which mistakes are made, by name."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import transformers
from rates.architectures import architecture
from torch import Tensor, nn

from exam import models
from exam.setups import HYPERPARAMETERS, Megatron, Modules, Setup
from mup_megatron.huggingface import base_content
from mup_megatron.recipe import HuggingFaceBase


def lm(key: str = "lm", *, hyperparameters: dict[str, Any] | None = None, content: Any = None, **parts: Any) -> Modules:
    """The language model, of some parts."""
    return Modules(
        key=key,
        factory=lambda width: models.Lm(width, **parts),
        hyperparameters={**HYPERPARAMETERS, **(hyperparameters or {})},
        content=content or {},
    )


def classifier(key: str = "classifier", *, hyperparameters: dict[str, Any] | None = None, **parts: Any) -> Modules:
    """The deep MLP."""
    return Modules(
        key=key,
        factory=lambda width: models.Classifier(width, **parts),
        hyperparameters={**_WITHOUT_TABLE, **(hyperparameters or {})},
        batch=models.points,
        loss=models.label_loss,
    )


def convnet(key: str = "convnet", *, hyperparameters: dict[str, Any] | None = None, **parts: Any) -> Modules:
    """The conv net."""
    return Modules(
        key=key,
        factory=lambda width: models.ConvNet(width, **parts),
        hyperparameters={**_WITHOUT_TABLE, **(hyperparameters or {})},
        batch=models.pictures,
        loss=models.label_loss,
    )


def towers(key: str = "towers") -> Modules:
    """Two towers."""
    return Modules(
        key=key,
        factory=models.Towers,
        hyperparameters={**HYPERPARAMETERS, "output_multiplier": 1.0},
        batch=models.pairs,
        loss=models.pair_loss,
    )


_WITHOUT_TABLE = {**HYPERPARAMETERS, "embedding_multiplier": 1.0}


def _sentences(step: int, width: int) -> dict[str, Tensor]:
    ids = models.texts(step, width)
    return {"input_ids": ids, "labels": ids.clone()}


def _own_loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    result: Tensor = model(**batch).loss
    return result


def hugging_face(key: str, model: Any, config: Callable[[int], Any], **hyperparameters: Any) -> Modules:
    """A model of Hugging Face's in its user's own script."""

    def factory(width: int) -> nn.Module:
        built: nn.Module = model(config(width))
        return built

    base = HuggingFaceBase.model_validate(base_content(config(models.BASE)))
    return Modules(
        key=key,
        factory=factory,
        base=base,
        hyperparameters={**HYPERPARAMETERS, "init_method_std": 0.05, **hyperparameters},
        batch=_sentences,
        loss=_own_loss,
    )


def gpt2_config(width: int, **changes: Any) -> Any:
    """GPT-2's at a width, with heads of 16."""
    sizes = {"n_embd": width, "n_head": width // 16, "n_layer": 2, "vocab_size": models.VOCABULARY, "n_positions": 32}
    still = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return transformers.GPT2Config(
        **{**sizes, **still, "bos_token_id": 0, "eos_token_id": 0, "architectures": ["GPT2LMHeadModel"], **changes}
    )


def llama_config(width: int, **changes: Any) -> Any:
    """Llama's at a width, with heads of 16."""
    sizes = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": width // 16,
        "num_key_value_heads": width // 16,
        "vocab_size": models.VOCABULARY,
        "max_position_embeddings": 32,
    }
    return transformers.LlamaConfig(
        **{**sizes, "bos_token_id": 0, "eos_token_id": 0, "architectures": ["LlamaForCausalLM"], **changes}
    )


def gpt2() -> Modules:
    """GPT-2."""
    return hugging_face("gpt2", transformers.GPT2LMHeadModel, gpt2_config)


def llama() -> Modules:
    """Llama."""
    return hugging_face("llama", transformers.LlamaForCausalLM, llama_config)


def llama_with_wide_heads() -> Modules:
    """Llama with two heads that grow."""

    def config(width: int) -> Any:
        return llama_config(width, num_attention_heads=2, num_key_value_heads=2, head_dim=width // 2)

    return hugging_face("llama-wide-heads", transformers.LlamaForCausalLM, config)


GPT = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "vocab_size": 256,
    "seq_length": 32,
    "make_vocab_size_divisible_by": 32,
}
UNTIED = {"untie_embeddings_and_output_weights": True}
WIDE = {"hidden_size": 256, "num_attention_heads": 16}


def megatron(
    base: dict[str, Any] | None = None, target: dict[str, Any] | None = None, overrides: Any = (), **values: Any
) -> Megatron:
    """A GPT of Megatron-Core: what base and target have of their own."""
    built = architecture({**GPT, **UNTIED, **(base or {})}, {**WIDE, **(target or {})}, overrides, **values)
    return Megatron(target=built.target, recipe=built.recipe)


SUBJECTS: dict[str, Callable[[], Setup]] = {
    "lm": lm,
    "lm-tied": lambda: lm("lm-tied", tied=True),
    "lm-gated": lambda: lm("lm-gated", mlp=models.GatedMlp),
    "lm-post": lambda: lm("lm-post", place="post", norm=models.RmsNorm),
    "lm-clipped": lambda: lm("lm-clipped", hyperparameters={"clip_grad": 0.05}),
    "lm-eps": lambda: lm("lm-eps", hyperparameters={"adam_eps": 1e-3}),
    "lm-overrides": lambda: lm("lm-overrides", content={"per_parameter": [{"match": "blocks.0.*", "lr_mult": 2.0}]}),
    "lm-sgd": lambda: replace(
        lm("lm-sgd", hyperparameters={"lr": 0.1, "weight_decay": 0.0}),
        content={"parametrization": {"optimizer": "sgd"}},
    ),
    "classifier": classifier,
    "convnet": convnet,
    "towers": towers,
    "gpt2": gpt2,
    "llama": llama,
    "llama-wide-heads": llama_with_wide_heads,
    "megatron": megatron,
    "megatron-tied": partial(megatron, {"untie_embeddings_and_output_weights": False}),
    "megatron-fixed-ffn": partial(megatron, {"ffn_hidden_size": 96}, {"ffn_hidden_size": 96}),
    "megatron-grouped": partial(
        megatron,
        {
            "group_query_attention": True,
            "num_query_groups": 2,
            "swiglu": True,
            "normalization": "RMSNorm",
            "position_embedding_type": "rope",
            "add_bias_linear": False,
            "ffn_hidden_size": 64,
        },
        {"ffn_hidden_size": 512},
    ),
    "megatron-overrides": partial(
        megatron,
        None,
        None,
        [{"match": "*.linear_fc2.weight", "lr_mult": 2.0}, {"match": "embedding.*", "lr_mult": 0.5}],
    ),
}
