"""Small Hugging Face models, recipes for them, and training loops, for tests of DeepSpeed's engine."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from mup_megatron.huggingface import base_content
from mup_megatron.recipe import Recipe, recipe, save_recipe

VOCABULARY = 48
LENGTH = 12
BATCH = 4

HYPERPARAMETERS: dict[str, Any] = {
    "lr": 0.004,
    "init_method_std": 0.05,
    "embedding_multiplier": 2.0,
    "output_multiplier": 0.5,
    "weight_decay": 0.1,
    "adam_beta2": 0.95,
    "adam_eps": 1e-7,
    "clip_grad": 0.7,
}
"""Every value differs from its default."""


def config(family: str, width: int = 1) -> transformers.PreTrainedConfig:
    """`width` times as wide as the base."""
    hidden, heads = 32 * width, 2 * width
    match family:
        case "gpt2":
            sizes = {"n_embd": hidden, "n_head": heads, "n_layer": 2, "vocab_size": VOCABULARY, "n_positions": 16}
            quiet = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
            return transformers.GPT2Config(**sizes, **quiet, architectures=["GPT2LMHeadModel"])
        case "llama":
            return transformers.LlamaConfig(
                hidden_size=hidden,
                intermediate_size=2 * hidden,
                num_hidden_layers=2,
                num_attention_heads=heads,
                num_key_value_heads=width,
                vocab_size=VOCABULARY,
                max_position_embeddings=16,
                architectures=["LlamaForCausalLM"],
            )
        case "bert":
            return transformers.BertConfig(
                hidden_size=hidden,
                intermediate_size=2 * hidden,
                num_hidden_layers=2,
                num_attention_heads=heads,
                vocab_size=VOCABULARY,
                max_position_embeddings=16,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
                architectures=["BertForMaskedLM"],
            )
        case _:
            assert family == "resnet"
            return transformers.ResNetConfig(
                embedding_size=8 * width,
                hidden_sizes=[8 * width, 16 * width],
                depths=[1, 1],
                layer_type="basic",
                num_labels=8,
                architectures=["ResNetForImageClassification"],
            )


def build(family: str, width: int = 1) -> transformers.PreTrainedModel:
    """The model of a family, always with the same draw."""
    own = config(family, width)
    assert own.architectures is not None
    torch.manual_seed(11)
    model: transformers.PreTrainedModel = getattr(transformers, own.architectures[0])(own)
    return model


def recipe_for(family: str, *, base: int = 1, optimizer: str = "adam", **changes: Any) -> Recipe:
    """A recipe tuned at a width, with HYPERPARAMETERS but for `changes`."""
    # A ResNet has no embedding that a multiplier could act on.
    own = {"embedding_multiplier": 1.0} if family == "resnet" else {}
    content = {
        "base": base_content(config(family, base)),
        "hyperparameters": {**HYPERPARAMETERS, **own, **changes},
        "parametrization": {"optimizer": optimizer},
    }
    return recipe(content, source="test")


def write(given: Recipe, folder: Path, name: str = "test.recipe.yaml") -> str:
    """The path of a recipe's file."""
    save_recipe(given, folder / name)
    return str(folder / name)


def batch(family: str, step: int) -> dict[str, torch.Tensor]:
    """The global batch of a step, BATCH samples."""
    generator = torch.Generator().manual_seed(step)
    if family == "resnet":
        labels = torch.randint(8, (BATCH,), generator=generator)
        noise = torch.randn(BATCH, 3, 16, 16, generator=generator)
        return {"pixel_values": noise + labels.view(-1, 1, 1, 1) / 4, "labels": labels}
    start = torch.randint(VOCABULARY, (BATCH, 1), generator=generator)
    tokens = (start + torch.arange(LENGTH)) % VOCABULARY
    return {"input_ids": tokens, "labels": tokens.clone()}


def part(whole: Mapping[str, torch.Tensor], rank: int, world_size: int) -> dict[str, torch.Tensor]:
    """A rank's share of a batch; all of it for images, since batch normalisation looks at a rank's samples together."""
    if "pixel_values" in whole:
        return dict(whole)
    size = BATCH // world_size
    return {key: value[rank * size : (rank + 1) * size] for key, value in whole.items()}


def train_engine(engine: Any, family: str, steps: Sequence[int]) -> list[float]:
    """The loss of each step, averaged over ranks."""
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    dtype = next(engine.module.parameters()).dtype
    losses = []
    for step in steps:
        inputs = part(batch(family, step), rank, world_size)
        loss = engine(**{k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}).loss
        engine.backward(loss)
        engine.step()
        mean = loss.detach().float().clone()
        torch.distributed.all_reduce(mean)
        losses.append(mean.item() / world_size)
    return losses


def train_torch(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, family: str, steps: Sequence[int], clip: float
) -> list[float]:
    """The same in plain torch, in one process."""
    losses = []
    for step in steps:
        loss = model(**batch(family, step)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        losses.append(loss.item())
    return losses


def ds_config(zero: int = 0, *, world_size: int = 1, **changes: Any) -> dict[str, Any]:
    """A configuration that lets the recipe decide."""
    return {
        "train_micro_batch_size_per_gpu": BATCH // world_size,
        "train_batch_size": BATCH,
        "zero_optimization": {"stage": zero},
        "optimizer": {"type": "AdamW", "params": {"torch_adam": True}},
        "steps_per_print": 10**9,
        **changes,
    }
