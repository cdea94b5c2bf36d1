"""The tasks that models are trained for on a batch of text: the next token, masked tokens, a text that was damaged.

An architecture names its objective. All of them take the batches of `data/dataset.py` and are functions of a sample
alone, so that a run's losses do not depend on its layout. Importing it imports Megatron.
"""

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn import functional

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.architectures.registry import architecture_of
from mup_megatron.megatron.names import unwrapped

Batch = Mapping[str, torch.Tensor]
LossFunction = Callable[[Any], torch.Tensor]
"""From what the last stage of a model gives to the mean loss."""

_MASKED = 0.15
"""The part of the tokens that is replaced: Devlin et al. 2018 (arXiv 1810.04805), Raffel et al. 2019 (1910.10683)."""


@dataclass(frozen=True, slots=True)
class Objective:
    """A task: a batch as the host prepares it, and what a rank's part of the model makes of that."""

    forward: Callable[[Any, Batch], tuple[torch.Tensor, LossFunction]]
    """Calls a rank's part of the model."""
    prepared: Callable[[Batch], Batch] = lambda batch: batch
    """From tokens and labels to what the model needs."""
    on_every_stage: bool = False
    """Whether stages in the middle of a pipeline look at the batch too."""


def objective_of(model: ModelFile) -> Objective:
    """Returns the objective of a model's architecture."""
    return OBJECTIVES[architecture_of(model).objective](model)


# ---- the next token ------------------------------------------------------------------------------------------------


def _next_token(chunk: Any, batch: Batch) -> tuple[torch.Tensor, LossFunction]:
    # Multi-token prediction has a loss of its own within the model.
    config: Any = unwrapped(chunk).config
    more = {"loss_mask": batch["loss_mask"]} if config.mtp_num_layers else {}
    output = chunk(batch["tokens"], batch["position_ids"], None, labels=batch["labels"], **more)
    return output, lambda losses: _mean(losses, batch["loss_mask"])


def _mean(losses: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return (losses.float() * mask).sum() / mask.sum()


# ---- masked tokens -------------------------------------------------------------------------------------------------


def _masked(model: ModelFile, batch: Batch) -> Batch:
    """Two halves of a text, in their order or not, with some tokens replaced by others."""
    samples = [_masked_sample(model, tokens) for tokens in batch["tokens"]]
    found = {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}
    types = (torch.arange(model.seq_length) >= model.seq_length // 2).long()
    # One that is not there is not asked for: a model without a binary head has no types of tokens.
    typed = {"types": types.expand_as(batch["tokens"])} if getattr(model, "bert_binary_head", False) else {}
    return {**found, **typed}


def _masked_sample(model: ModelFile, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    generator = _generator(tokens)
    swapped = torch.randint(2, (), generator=generator)
    half = len(tokens) // 2
    text = torch.cat([tokens[half:], tokens[:half]]) if swapped else tokens
    damaged, where = _damaged(model, text, generator)
    return {"tokens": damaged, "labels": text, "loss_mask": where.float(), "swapped": swapped}


def _masked_tokens(chunk: Any, batch: Batch) -> tuple[torch.Tensor, LossFunction]:
    whole = torch.ones_like(batch["tokens"])
    output = chunk(batch["tokens"], whole, tokentype_ids=batch.get("types"), lm_labels=batch["labels"])

    def loss(result: Any) -> torch.Tensor:
        losses, order = result
        found = _mean(losses, batch["loss_mask"])
        return found if order is None else found + functional.cross_entropy(order.float(), batch["swapped"])

    return output, loss


# ---- the text before it was damaged --------------------------------------------------------------------------------


def _with_damaged_copy(model: ModelFile, batch: Batch) -> Batch:
    """A whole text with some tokens replaced by others, and the beginning of it as it was."""
    length = min(model.seq_length, getattr(model, "decoder_seq_length", model.seq_length))
    damaged = torch.stack([_damaged(model, tokens, _generator(tokens))[0] for tokens in batch["tokens"]])
    read, written = (torch.zeros(len(damaged), 1, 1, size, dtype=torch.bool) for size in (model.seq_length, length))
    across = {} if model.transformer_impl == "local" else {"written_mask": written}
    decoded = {key: batch[key][:, :length] for key in ("tokens", "labels", "loss_mask")}
    return {**decoded, **across, "damaged": damaged, "read_mask": read}


def _denoised(chunk: Any, batch: Batch) -> tuple[torch.Tensor, LossFunction]:
    # Nothing is masked but what comes later, which a decoder's own attention does. Transformer Engine wants both sides.
    read = batch["read_mask"]
    across = (batch["written_mask"], read) if "written_mask" in batch else read
    output = chunk(batch["damaged"], batch["tokens"], read, None, across, lm_labels=batch["labels"])
    return output, lambda losses: _mean(losses, batch["loss_mask"])


# ---- parts of them -------------------------------------------------------------------------------------------------


def _damaged(model: ModelFile, tokens: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens with a fixed number of them replaced by any of the vocabulary, and where.

    As many in every sample, so that a mean over micro-batches is one over tokens. Text comes without a token for masks.
    """
    count = max(1, round(_MASKED * len(tokens)))
    where = torch.zeros(len(tokens), dtype=torch.bool)
    where[torch.randperm(len(tokens), generator=generator)[:count]] = True
    others = torch.randint(model.vocab_size, (len(tokens),), generator=generator)
    return torch.where(where, others, tokens), where


def _generator(tokens: torch.Tensor) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(tokens.numpy().tobytes()))


NEXT_TOKEN = Objective(_next_token)
OBJECTIVES: Mapping[str, Callable[[ModelFile], Objective]] = {
    "next token": lambda model: NEXT_TOKEN,
    "masked tokens": lambda model: Objective(_masked_tokens, partial(_masked, model), on_every_stage=True),
    "denoising": lambda model: Objective(_denoised, partial(_with_damaged_copy, model)),
}
"""Name → the objective, for a model."""
