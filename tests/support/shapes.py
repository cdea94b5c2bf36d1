"""Small models at several widths, and recipes for them, for tests that compare a base and its targets."""

from collections.abc import Mapping
from typing import Any

import torch

from mup_megatron.architectures.hybrid import HybridFile
from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.architectures.registry import model_file
from mup_megatron.recipe import Hyperparameters, Parametrization, Recipe

HYPERPARAMETERS: dict[str, Any] = {
    "lr": 0.003,
    "min_lr": 0.0003,
    "init_method_std": 0.05,
    "embedding_multiplier": 5.0,
    "output_multiplier": 0.5,
    "attention_multiplier": 1.5,
    "residual_multiplier": 1.0,
    "weight_decay": 0.1,
    "adam_beta2": 0.95,
    "adam_eps": 1e-8,
}
"""Every value differs from its default, and every multiplier from 1."""


def gpt(width: float = 1, **changes: Any) -> ModelFile:
    """A model `width` times as wide as the base: hidden 32, 4 heads of 8, ffn 64, 2 layers; all sides grow alike."""
    plain: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": round(32 * width),
        "num_attention_heads": round(4 * width),
        "kv_channels": 8,
        "ffn_hidden_size": round(64 * width),
        "vocab_size": 48,
        "make_vocab_size_divisible_by": 16,
        "seq_length": 12,
        "transformer_impl": "local",
    }
    if changes.get("multi_latent_attention"):
        del plain["kv_channels"]
    return ModelFile(**{**plain, **changes})


def hybrid(model: ModelFile, pattern: str | None = None, **changes: Any) -> HybridFile:
    """The hybrid model with the sizes of a GPT; its own layers by default, each as attention and an MLP."""
    own = {key: value for key, value in dict(model).items() if key != "num_layers"}
    return HybridFile(**{**own, "hybrid_layer_pattern": pattern or "*-" * model.num_layers, **changes})


MAMBA = {"mamba_head_dim": 8, "mamba_state_dim": 16, "mamba_num_groups": 2}
"""The keys of small Mamba layers: two groups for two tensor-parallel ranks."""
LATENT: Mapping[str, Any] = {
    "multi_latent_attention": True,
    "q_lora_rank": 16,
    "kv_lora_rank": 12,
    "qk_head_dim": 6,
    "qk_pos_emb_head_dim": 4,
    "v_head_dim": 8,
    "position_embedding_type": "none",
}
"""The keys of small latent attention."""


def encoder(architecture: str, width: float = 1, **changes: Any) -> ModelFile:
    """The BERT or T5 with the sizes of a GPT."""
    own = {key: value for key, value in dict(gpt(width)).items() if value is not None}
    return model_file({**own, "architecture": architecture, **changes}, source="a test")


def recipe_for(base: ModelFile, *, rule: str = "mup", optimizer: str = "adam", **changes: Any) -> Recipe:
    """A recipe tuned at `base`, with HYPERPARAMETERS but for `changes`."""
    return Recipe(
        base=base,
        hyperparameters=Hyperparameters(**{**HYPERPARAMETERS, **changes}),
        parametrization=Parametrization(rule=rule, optimizer=optimizer),
    )


def batch(model: ModelFile, step: int, size: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and labels [size, seq_length] of one step: each sequence counts up from its start, mostly by one."""
    generator = torch.Generator().manual_seed(step)
    start = torch.randint(model.vocab_size, (size, 1), generator=generator)
    steps = 1 + (torch.rand(size, model.seq_length + 1, generator=generator) < 0.1).long()
    tokens = (start + steps.cumsum(1)) % model.vocab_size
    return tokens[:, :-1], tokens[:, 1:]
