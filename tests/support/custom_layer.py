"""A layer of somebody's own, as `--spec support.custom_layer layer_spec`: behind the usual branches, a gated one."""

from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.transformer_layer import TransformerLayer


class GatedLayer(TransformerLayer):  # type: ignore[misc]
    """A matrix of the stream, times a gate of it, times a number for each channel."""

    def __init__(self, config: Any, *rest: Any, **more: Any) -> None:
        super().__init__(config, *rest, **more)
        hidden = config.hidden_size
        self.gate = torch.nn.Linear(hidden, 1, bias=False)
        self.mix = torch.nn.Parameter(torch.empty(hidden, hidden))
        self.scale = torch.nn.Parameter(torch.full((hidden,), 0.5))
        config.init_method(self.gate.weight)
        config.output_layer_init_method(self.mix)

    def forward(self, *given: Any, **more: Any) -> tuple[torch.Tensor, Any]:
        """Returns the stream and the context."""
        stream, context = super().forward(*given, **more)
        return stream + self.scale * self.gate(stream).sigmoid() * (stream @ self.mix.T), context


def spec() -> Any:
    """Returns the spec of a layer with it."""
    made = get_gpt_layer_local_spec()
    made.module = GatedLayer
    return made


def layer_spec(*_: Any, **__: Any) -> Any:
    """Returns the same to Megatron-LM, which calls it with its configuration."""
    return spec()
