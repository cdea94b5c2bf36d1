"""The tasks that models are trained for: what a live model is called with, and the loss of what it gives.

An architecture names its objective; `samples.py` makes its batches. Importing it imports Megatron.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn import functional

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.architectures.registry import architecture_of
from mup_megatron.megatron.names import unwrapped
from mup_megatron.training.samples import Batch, prepared

LossFunction = Callable[[Any], torch.Tensor]
"""From what the last stage of a model gives to the mean loss."""


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


def _masked_tokens(chunk: Any, batch: Batch) -> tuple[torch.Tensor, LossFunction]:
    whole = torch.ones_like(batch["tokens"])
    output = chunk(batch["tokens"], whole, tokentype_ids=batch.get("types"), lm_labels=batch["labels"])

    def loss(result: Any) -> torch.Tensor:
        losses, order = result
        found = _mean(losses, batch["loss_mask"])
        return found if order is None else found + functional.cross_entropy(order.float(), batch["swapped"])

    return output, loss


# ---- the text before it was damaged --------------------------------------------------------------------------------


def _denoised(chunk: Any, batch: Batch) -> tuple[torch.Tensor, LossFunction]:
    # Nothing is masked but what comes later, which a decoder's own attention does. Transformer Engine wants both sides.
    read = batch["read_mask"]
    across = (batch["written_mask"], read) if "written_mask" in batch else read
    output = chunk(batch["damaged"], batch["tokens"], read, None, across, lm_labels=batch["labels"])
    return output, lambda losses: _mean(losses, batch["loss_mask"])


NEXT_TOKEN = Objective(_next_token)
OBJECTIVES: Mapping[str, Callable[[ModelFile], Objective]] = {
    "next token": lambda model: NEXT_TOKEN,
    "masked tokens": lambda model: Objective(_masked_tokens, partial(prepared, model), on_every_stage=True),
    "denoising": lambda model: Objective(_denoised, partial(prepared, model)),
}
"""Name → the objective, for a model."""
