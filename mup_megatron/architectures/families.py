"""The families of layers that stacks are made of: each states its tensors, the places of its factors, and its FLOPs.

A GPT's layer is attention and an MLP, a hybrid model's is one of them. Names are Megatron-Core's, as on one rank.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.theory import SOFTMAX, Acts, Constant, Part, Place, Property, Side, Tensor

__all__ = ["ATTENTION", "MLP", "Family", "Growth", "linear", "norm", "vector"]

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, slots=True)
class Growth:
    """The sides that grow between a base and a target, known only from both together."""

    base: ModelFile
    target: ModelFile

    def side(self, model: ModelFile, key: str) -> Side:
        """Returns a side of a model's own size that grows where base and target differ in it, as a head may."""
        return Side(getattr(model, key), grows=getattr(self.base, key) != getattr(self.target, key))


class Family(Protocol):
    """A kind of layer, with one branch that adds to the residual stream."""

    name: str

    def tensors(self, model: ModelFile, layer: str, growth: Growth) -> Iterator[Tensor]:
        """Yields the tensors of the layer of this name, its norm first."""

    def places(self, layer: str) -> Iterator[Place]:
        """Yields where factors act in the layer of this name, beside those of single weights."""

    def flops(self, model: ModelFile) -> Mapping[str, float]:
        """Returns training FLOPs for one token, by item: see `cost.Flops`."""

    def plain(self, model: ModelFile, softmax_scale: float) -> "tuple[str, str, nn.Module]":
        """Returns the names of its norm and of its branch in a layer, and the branch in plain torch: see `plain.py`."""


class Attention:
    """Self-attention with grouped queries; its queries, keys and values are one fused matrix."""

    name = "attention"

    def tensors(self, model: ModelFile, layer: str, growth: Growth) -> Iterator[Tensor]:
        """Yields norm, linear_qkv, the norms of queries and keys, and linear_proj."""
        name = f"{layer}.self_attention"
        hidden = Side(model.hidden_size, grows=True)
        queries, keys = model.num_attention_heads * model.head_size, model.query_groups * model.head_size
        # Transformer Engine fuses each norm into the linear layer that follows it.
        fused = model.transformer_impl == "transformer_engine"
        yield from norm(model, f"{name}.linear_qkv.layer_norm_" if fused else f"{layer}.input_layernorm.", hidden)
        parts = (Part("queries", queries), Part("keys", keys), Part("values", keys))
        # One fused matrix, so one fan_out: all of its rows.
        qkv = Side(queries + 2 * keys, grows=True)
        yield from linear(f"{name}.linear_qkv", hidden, qkv, bias=model.bias_on_qkv, parts=parts)
        if model.qk_layernorm:
            head = growth.side(model, "head_size")
            yield from norm(model, f"{name}.q_layernorm.", head)
            yield from norm(model, f"{name}.k_layernorm.", head)
        attended = Side(queries, grows=True)
        yield from linear(f"{name}.linear_proj", attended, hidden, bias=model.add_bias_linear, residual=True)

    def places(self, layer: str) -> Iterator[Place]:
        """Yields where the scale of attention logits is set."""
        yield Place(f"{layer}.self_attention.core_attention", Acts.SCALE, SOFTMAX)

    def flops(self, model: ModelFile) -> Mapping[str, float]:
        """Returns those of the projections and of the scores."""
        queries = model.num_attention_heads * model.head_size
        qkv = queries + 2 * model.query_groups * model.head_size
        return {
            "attention_projections": 6.0 * (model.hidden_size * qkv + queries * model.hidden_size),
            "attention_scores": 12.0 * model.seq_length * queries,
        }

    def plain(self, model: ModelFile, softmax_scale: float) -> "tuple[str, str, nn.Module]":
        """Returns causal attention."""
        from mup_megatron.architectures import plain

        return "input_layernorm", "self_attention", plain.SelfAttention(model, softmax_scale)


class Mlp:
    """Two linear layers with an activation between; with swiglu, gate and up projection are one fused matrix."""

    name = "mlp"

    def tensors(self, model: ModelFile, layer: str, growth: Growth) -> Iterator[Tensor]:
        """Yields norm, linear_fc1 and linear_fc2."""
        name = f"{layer}.mlp"
        hidden, ffn = Side(model.hidden_size, grows=True), Side(model.ffn_size, grows=True)
        fused = model.transformer_impl == "transformer_engine"
        yield from norm(model, f"{name}.linear_fc1.layer_norm_" if fused else f"{layer}.pre_mlp_layernorm.", hidden)
        parts = (Part("gate", ffn.size), Part("up", ffn.size)) if model.swiglu else ()
        rows = Side(2 * ffn.size if model.swiglu else ffn.size, grows=True)
        yield from linear(f"{name}.linear_fc1", hidden, rows, bias=model.add_bias_linear, parts=parts)
        yield from linear(f"{name}.linear_fc2", ffn, hidden, bias=model.add_bias_linear, residual=True)

    def places(self, layer: str) -> Iterator[Place]:
        """Yields nothing: no factor acts in an MLP but those of single weights."""
        yield from ()

    def flops(self, model: ModelFile) -> Mapping[str, float]:
        """Returns those of both layers."""
        fc1 = 2 * model.ffn_size if model.swiglu else model.ffn_size
        return {"mlp": 6.0 * model.hidden_size * (fc1 + model.ffn_size)}

    def plain(self, model: ModelFile, softmax_scale: float) -> "tuple[str, str, nn.Module]":
        """Returns an MLP."""
        from mup_megatron.architectures import plain

        return "pre_mlp_layernorm", "mlp", plain.PlainMlp(model)


ATTENTION = Attention()
"""The family of self-attention."""
MLP = Mlp()
"""The family of MLPs."""


def linear(
    name: str, fan_in: Side, fan_out: Side, *, bias: bool, residual: bool = False, parts: tuple[Part, ...] = ()
) -> Iterator[Tensor]:
    """Yields weight [fan_out, fan_in] and bias of a linear layer."""
    properties = frozenset({Property.RESIDUAL} if residual else ())
    yield Tensor(
        name=f"{name}.weight",
        shape=(fan_out.size, fan_in.size),
        fan_in=fan_in,
        fan_out=fan_out,
        properties=properties,
        parts=parts,
    )
    if bias:
        yield vector(f"{name}.bias", fan_out, start=0.0)


def norm(model: ModelFile, prefix: str, size: Side) -> Iterator[Tensor]:
    """Yields gain and, of a LayerNorm, bias."""
    yield vector(f"{prefix}weight", size, start=0.0 if model.apply_layernorm_1p else 1.0, gain=True)
    if model.normalization == "LayerNorm":
        yield vector(f"{prefix}bias", size, start=0.0)


def vector(name: str, size: Side, *, start: float, gain: bool = False) -> Tensor:
    """Returns a bias or gain that starts at a constant."""
    properties = frozenset({Property.VECTOR, Property.GAIN} if gain else {Property.VECTOR})
    return Tensor(
        name=name, shape=(size.size,), fan_in=Side(1), fan_out=size, properties=properties, start=Constant(start)
    )
