"""A whole model in plain torch, whatever its stacks and heads, and its initial weights."""

import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.architectures.registry import architecture_of


class PlainModel(nn.Module, ABC):
    """A model with Megatron's names, trained on batches as `training/samples.py` prepares them for its objective.

    Gains start at 1 (or at their distance from it, 0), biases at 0; matrices hold torch's defaults until drawn.
    """

    @abstractmethod
    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Returns the loss of a batch as Megatron tells it; its gradient is that of all that is minimised."""


def plain_model(
    model: ModelFile,
    *,
    output_multiplier: float = 1.0,
    softmax_scale: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> PlainModel:
    """Returns a model file's in plain torch.

    Args:
        model: the shape. Norms are separate modules whatever its `transformer_impl`.
        output_multiplier: on the readout's input.
        softmax_scale: on q·k; what the model uses by itself by default.
        dtype: of all parameters.
    """
    made = pkgutil.resolve_name(architecture_of(model).plain)(
        model, output_multiplier=output_multiplier, softmax_scale=softmax_scale
    )
    assert isinstance(made, PlainModel)
    return made.to(dtype)


def draw_weights(model: nn.Module, std: Mapping[str, float], seed: int) -> None:
    """Fills every matrix with a std with std·N(0, 1), the same numbers for the same names, shapes, stds and seed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and name in std:
                draw = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(std[name] * draw)
