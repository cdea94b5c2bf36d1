"""The Hugging Face families that are supported, each as a small model whose width is one number."""

from collections.abc import Callable
from typing import Any

import transformers
from transformers import PretrainedConfig, PreTrainedModel

from mup_megatron.recipe import Recipe, recipe

VOCABULARY = 64
POSITIONS = 32


def _heads(width: int) -> int:
    return width // 16


FAMILIES: dict[str, tuple[type[PreTrainedModel], Callable[..., PretrainedConfig]]] = {
    "gpt2": (
        transformers.GPT2LMHeadModel,
        lambda w, n=2, **k: transformers.GPT2Config(
            **{"vocab_size": VOCABULARY, "n_positions": POSITIONS, "n_embd": w, "n_layer": n, "n_head": _heads(w)}
            | dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
            | {"bos_token_id": 0, "eos_token_id": 0}
            | k
        ),
    ),
    "gpt_neox": (
        transformers.GPTNeoXForCausalLM,
        lambda w, n=2, **k: transformers.GPTNeoXConfig(**_common(w, n) | {"intermediate_size": 4 * w} | k),
    ),
    "llama": (
        transformers.LlamaForCausalLM,
        lambda w, n=2, **k: transformers.LlamaConfig(**_common(w, n) | _grouped(w) | k),
    ),
    "mistral": (
        transformers.MistralForCausalLM,
        lambda w, n=2, **k: transformers.MistralConfig(**_common(w, n) | _grouped(w) | {"head_dim": 16} | k),
    ),
    "qwen2": (
        transformers.Qwen2ForCausalLM,
        lambda w, n=2, **k: transformers.Qwen2Config(**_common(w, n) | _grouped(w) | k),
    ),
    # Heads that are not hidden_size / num_attention_heads, and norms of queries and keys.
    "qwen3": (
        transformers.Qwen3ForCausalLM,
        lambda w, n=2, **k: transformers.Qwen3Config(**_common(w, n) | _grouped(w) | {"head_dim": 32} | k),
    ),
    "bert": (
        transformers.BertForPreTraining,
        lambda w, n=2, **k: transformers.BertConfig(
            **_common(w, n)
            | {"intermediate_size": 4 * w, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
            | k
        ),
    ),
    "vit": (
        transformers.ViTForImageClassification,
        lambda w, n=2, **k: transformers.ViTConfig(
            **{"hidden_size": w, "num_hidden_layers": n, "num_attention_heads": _heads(w), "intermediate_size": 4 * w}
            | {"image_size": 16, "patch_size": 4, "num_labels": 10, "pooler_output_size": w}
            | k
        ),
    ),
    "resnet": (
        transformers.ResNetForImageClassification,
        lambda w, n=1, **k: transformers.ResNetConfig(
            **{"embedding_size": w, "hidden_sizes": [w, 2 * w], "depths": [n, n], "layer_type": "basic"}
            | {"num_labels": 10, "out_features": None, "out_indices": None}
            | k
        ),
    ),
    "opt": (
        transformers.OPTForCausalLM,
        lambda w, n=2, **k: transformers.OPTConfig(
            **_common(w, n) | {"ffn_dim": 4 * w, "word_embed_proj_dim": w, "dropout": 0.0} | k
        ),
    ),
    "t5": (
        transformers.T5ForConditionalGeneration,
        lambda w, n=2, **k: transformers.T5Config(
            **{
                "vocab_size": VOCABULARY,
                "d_model": w,
                "d_kv": 16,
                "d_ff": 4 * w,
                "num_layers": n,
                "num_decoder_layers": n,
            }
            | {"num_heads": _heads(w), "dropout_rate": 0.0, "decoder_start_token_id": 0}
            | k
        ),
    ),
}


def _common(width: int, layers: int) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "max_position_embeddings": POSITIONS,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": _heads(width),
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": None,
    }


def _grouped(width: int) -> dict[str, Any]:
    return {"intermediate_size": 3 * width, "num_key_value_heads": _heads(width) // 2}


def config(family: str, width: int, **changes: Any) -> PretrainedConfig:
    """A family's configuration at one width."""
    return FAMILIES[family][1](width, **changes)


def model(family: str, width: int, **changes: Any) -> PreTrainedModel:
    """A family's model at one width, as its library draws it from torch's default generator."""
    built = FAMILIES[family][0](config(family, width, **changes))
    assert isinstance(built, PreTrainedModel)
    return built


def recipe_at(base: PretrainedConfig, **content: Any) -> Recipe:
    """A recipe whose base is a configuration."""
    from mup_megatron.huggingface import base_content

    hyperparameters = {"lr": 0.01, **content.pop("hyperparameters", {})}
    return recipe({"base": base_content(base), "hyperparameters": hyperparameters, **content}, source="recipe")
