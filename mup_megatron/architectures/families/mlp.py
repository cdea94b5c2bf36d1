"""MLPs, gated or not."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from mup_megatron.architectures.families.family import Family, Growth, Size, linear, norm
from mup_megatron.architectures.measured import STREAM, Kind, Measured, inside
from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.theory import BRANCH, Acts, Part, Place, Side, Tensor

if TYPE_CHECKING:
    from torch import nn


class Mlp(Family):
    """Two linear layers with an activation between; with swiglu, gate and up projection are one fused matrix."""

    name: ClassVar[str] = "mlp"
    sizes: ClassVar[tuple[Size, ...]] = (Size(key="ffn_hidden_size", small=256),)

    def tensors(self, model: ModelFile, layer: str, growth: Growth) -> Iterator[Tensor]:
        """Yields norm, linear_fc1 and linear_fc2."""
        name, hidden = f"{layer}.mlp", Side(model.hidden_size, grows=True)
        fused = model.transformer_impl == "transformer_engine"
        yield from norm(model, f"{name}.linear_fc1.layer_norm_" if fused else f"{layer}.pre_mlp_layernorm.", hidden)
        yield from two_layers(model, name, hidden, Side(model.ffn_size, grows=True))

    def places(self, layer: str) -> Iterator[Place]:
        """Yields the branch."""
        yield Place(f"{layer}.mlp", Acts.BRANCH, BRANCH)

    def flops(self, model: ModelFile) -> Mapping[str, float]:
        """Returns those of both layers."""
        fc1 = 2 * model.ffn_size if model.swiglu else model.ffn_size
        return {"mlp": 6.0 * model.hidden_size * (fc1 + model.ffn_size)}

    def measured(self, model: ModelFile, layer: str) -> Iterator[Measured]:
        """Yields the norm, linear_fc1 and linear_fc2."""
        norm, fc1, fc2 = f"{layer}.pre_mlp_layernorm", f"{layer}.mlp.linear_fc1", f"{layer}.mlp.linear_fc2"
        yield inside(norm, "MLP output", STREAM)
        yield inside(fc1, "MLP output", norm)
        yield Measured(fc2, Kind.BRANCH, "MLP output", (fc1,), leads=True)

    def plain(self, model: ModelFile, softmax_scale: float) -> "tuple[str, str, nn.Module]":
        """Returns an MLP."""
        from mup_megatron.architectures.plain.mlp import PlainMlp

        return "pre_mlp_layernorm", "mlp", PlainMlp(model)


def two_layers(model: ModelFile, name: str, hidden: Side, ffn: Side) -> Iterator[Tensor]:
    """Yields the two linear layers of an MLP of this size."""
    parts = (Part("gate", ffn.size), Part("up", ffn.size)) if model.swiglu else ()
    rows = replace(ffn, size=2 * ffn.size) if model.swiglu else ffn
    yield from linear(f"{name}.linear_fc1", hidden, rows, bias=model.add_bias_linear, parts=parts)
    yield from linear(f"{name}.linear_fc2", ffn, hidden, bias=model.add_bias_linear, residual=True)


MLP = Mlp()
"""The family of MLPs."""
