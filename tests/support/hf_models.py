"""Inputs, losses and a few steps of training for the families of `support/hf_families.py`."""

from typing import Any

import torch
import transformers
from support.hf_families import FAMILIES, VOCABULARY, config
from torch.nn.functional import cross_entropy
from transformers import PretrainedConfig, PreTrainedModel

transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # remarks on token ids and torchvision

LENGTH = 9
CAUSAL = ("gpt2", "gpt_neox", "llama", "mistral", "qwen2", "qwen3", "opt")
ATTENTION = tuple(family for family in FAMILIES if family != "resnet")

# Heads that grow with width instead of their number; the families whose configuration says so in another way.
_OWN_HEAD_SIZE = {"mistral": "head_dim", "qwen3": "head_dim", "t5": "d_kv"}
_HEADS = {"gpt2": "n_head", "t5": "num_heads"}


def batch(family: str, *, seed: int = 3, size: int = 4) -> dict[str, torch.Tensor]:
    """What the model of a family is called with, labels included."""
    generator = torch.Generator().manual_seed(seed)
    if family in ("vit", "resnet"):
        side = 16 if family == "vit" else 32
        pixels = torch.randn(size, 3, side, side, generator=generator)
        return {"pixel_values": pixels, "labels": torch.randint(10, (size,), generator=generator)}
    tokens = torch.randint(1, VOCABULARY, (size, LENGTH), generator=generator)
    own = {"input_ids": tokens, "labels": tokens.clone()}
    if family == "bert":
        return {**own, "next_sentence_label": torch.randint(2, (size,), generator=generator)}
    return own


def with_heads_growing(family: str, width: int, **changes: Any) -> PretrainedConfig:
    """A family's configuration whose number of heads is that of width 64: the size of heads grows."""
    own: dict[str, Any] = {_HEADS.get(family, "num_attention_heads"): 4}
    if family in ("llama", "mistral", "qwen2", "qwen3"):
        own["num_key_value_heads"] = 2
    if family in _OWN_HEAD_SIZE:
        own[_OWN_HEAD_SIZE[family]] = width // 4
    return config(family, width, **own | changes)


def built(family: str, own: PretrainedConfig, *, seed: int = 5, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The family's model of one configuration, always with the same draw; without dropout."""
    torch.manual_seed(seed)
    model = FAMILIES[family][0](own)
    assert isinstance(model, PreTrainedModel)
    return model.to(dtype)


def with_class(family: str, own: PretrainedConfig) -> PretrainedConfig:
    """A configuration that says its model's class."""
    own.architectures = [FAMILIES[family][0].__name__]
    return own


def loss_of(model: torch.nn.Module, family: str, *, seed: int = 3) -> torch.Tensor:
    """A loss on one batch, in the model's precision: the library computes its own in single precision."""
    dtype = next(model.parameters()).dtype
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch(family, seed=seed).items()}
    labels = inputs["labels"]
    output = model(**inputs)
    if family == "bert":
        other = cross_entropy(output.seq_relationship_logits, inputs["next_sentence_label"])
        return other + cross_entropy(output.prediction_logits.flatten(0, 1), labels.flatten())
    logits = output.logits
    return cross_entropy(logits.flatten(0, -2), labels.flatten())


def trained(model: torch.nn.Module, optimizer: torch.optim.Optimizer, family: str, steps: int) -> torch.Tensor:
    """The losses of some steps, each on a batch of its own."""
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model, family, seed=step)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)
