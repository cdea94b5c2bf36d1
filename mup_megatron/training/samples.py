"""The samples of each task, made of a batch of text: the next token, masked tokens, a text that was damaged.

An architecture names its objective. All of them take the batches of `data/dataset.py` and are functions of a sample
alone, so that a run's losses do not depend on its layout. Importing it imports torch, and no Megatron.
"""

import zlib
from collections.abc import Callable, Mapping

import torch

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.architectures.registry import architecture_of

Batch = Mapping[str, torch.Tensor]

_MASKED = 0.15
"""The part of the tokens that is replaced: Devlin et al. 2018 (arXiv 1810.04805), Raffel et al. 2019 (1910.10683)."""


def prepared(model: ModelFile, batch: Batch) -> Batch:
    """Returns what a model's objective needs, from tokens and labels."""
    return _PREPARED[architecture_of(model).objective](model, batch)


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


def _with_damaged_copy(model: ModelFile, batch: Batch) -> Batch:
    """Returns a whole text with some tokens replaced by others, and the beginning of it as it was."""
    length = min(model.seq_length, getattr(model, "decoder_seq_length", model.seq_length))
    damaged = torch.stack([_damaged(model, tokens, _generator(tokens))[0] for tokens in batch["tokens"]])
    read, written = (torch.zeros(len(damaged), 1, 1, size, dtype=torch.bool) for size in (model.seq_length, length))
    across = {} if model.transformer_impl == "local" else {"written_mask": written}
    decoded = {key: batch[key][:, :length] for key in ("tokens", "labels", "loss_mask")}
    return {**decoded, **across, "damaged": damaged, "read_mask": read}


def _damaged(model: ModelFile, tokens: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the tokens with a fixed number of them replaced by any of the vocabulary, and where.

    As many in every sample, so that a mean over micro-batches is one over tokens. Text comes without a token for masks.
    """
    count = max(1, round(_MASKED * len(tokens)))
    where = torch.zeros(len(tokens), dtype=torch.bool)
    where[torch.randperm(len(tokens), generator=generator)[:count]] = True
    others = torch.randint(model.vocab_size, (len(tokens),), generator=generator)
    return torch.where(where, others, tokens), where


def _generator(tokens: torch.Tensor) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(tokens.numpy().tobytes()))


_PREPARED: Mapping[str, Callable[[ModelFile, Batch], Batch]] = {
    "next token": lambda _, batch: batch,
    "masked tokens": _masked,
    "denoising": _with_damaged_copy,
}
"""Name of an objective → what it makes of a batch."""
