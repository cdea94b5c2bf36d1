"""Hugging Face models of which every multiplier is off 1: pretrained ones, and such as were trained with a plan."""

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from support.hf_causal import causal
from support.hf_families import config, recipe_at
from support.hf_models import FAMILIES
from transformers import PretrainedConfig, PreTrainedModel

from mup_megatron.recipe import Recipe

RATIO = 4
BASE = 32
_NEWER = ("granite", "mixtral", "deepseek_v3")


@dataclass(frozen=True)
class Kind:
    """A kind of model."""

    family: str
    changes: dict[str, Any] = field(default_factory=dict)
    """What its configuration says otherwise."""
    matrix: str | None = "*.k_proj.weight"
    """What has a multiplier of its own."""
    branches: bool = True
    """Whether its residual branches are known."""


KINDS = {
    "llama": Kind("llama"),
    "llama tied, with biases": Kind("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "qwen2": Kind("qwen2"),
    # What multiplies keys before their norm is of no account.
    "qwen3": Kind("qwen3", matrix="*.v_proj.weight"),
    "mistral": Kind("mistral"),
    "gpt2": Kind("gpt2", matrix="*.c_fc.weight"),
    "gpt2 untied": Kind("gpt2", {"tie_word_embeddings": False}, matrix="*.c_fc.weight"),
    "granite": Kind("granite"),
    "granite tied": Kind("granite", {"tie_word_embeddings": True}),
    "mixtral": Kind("mixtral", branches=False),
    "deepseek_v3": Kind("deepseek_v3", matrix="*.kv_b_proj.weight", branches=False),
    "deepseek_v3 without a latent of queries": Kind(
        "deepseek_v3", {"q_lora_rank": None}, matrix="*.kv_b_proj.weight", branches=False
    ),
}


def configuration(kind: Kind, width: int) -> PretrainedConfig:
    """A kind's configuration, with the name of its class."""
    if kind.family in _NEWER:
        return causal(kind.family, width, **kind.changes)
    made = config(kind.family, width, **kind.changes)
    made.architectures = [FAMILIES[kind.family][0].__name__]
    return made


def recipe_of(kind: Kind) -> Recipe:
    """A recipe with every multiplier that the kind can have."""
    branches = {"residual_multiplier": 0.8} if kind.branches else {}
    return recipe_at(
        configuration(kind, BASE),
        hyperparameters={
            "embedding_multiplier": 3.0, "output_multiplier": 1.7, "attention_multiplier": 1.6, **branches
        },
        per_parameter=[] if kind.matrix is None else [{"match": kind.matrix, "multiplier": 1.25}],
    )  # fmt: skip


def drawn(kind: Kind, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model of the target's width of which no weight, gain or bias is as the library draws it."""
    made = configuration(kind, RATIO * BASE)
    assert made.architectures is not None
    torch.manual_seed(7)
    model = getattr(transformers, made.architectures[0])(made).to(dtype).eval()
    assert isinstance(model, PreTrainedModel)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.dim() == 1 and not name.endswith("inv_freq"):
                tensor.add_(0.2 * torch.randn_like(tensor))
            elif tensor.dim() > 1:
                tensor.mul_(2.0)
    return model


def tokens() -> torch.Tensor:
    """Two sequences."""
    return torch.randint(1, 64, (2, 24), generator=torch.Generator().manual_seed(5))


def logits(model: Any) -> torch.Tensor:
    """Those of `tokens`."""
    with torch.no_grad():
        found: torch.Tensor = model(tokens()).logits
    return found
