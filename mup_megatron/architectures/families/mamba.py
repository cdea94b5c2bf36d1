"""Mamba-2: a state space whose input, output and step depend on the token."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from mup_megatron.architectures.families.family import Family, Growth, Size, linear, norm, vector
from mup_megatron.architectures.keys.mamba import MambaKeys, MambaSizes
from mup_megatron.architectures.measured import STREAM, Kind, Measured, inside
from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.theory import BRANCH, Acts, Kept, Part, Place, Property, Side, Tensor

if TYPE_CHECKING:
    from torch import nn

KERNEL = 4
"""Steps that the convolution looks at; Megatron has no flag for it."""
_SCAN = 7
"""Operations of a channel's state for one token, forward: the update is four of them and the output three."""


class Mamba(Family):
    """One matrix to gate, input, states and step sizes, a short convolution, the scan, a gated norm, a matrix back."""

    name: ClassVar[str] = "mamba"
    sizes: ClassVar[tuple[Size, ...]] = (
        Size(key="mamba_num_heads", small=8),
        Size(key="mamba_head_dim", small=16, follows_width=False),
        Size(
            key="mamba_num_groups",
            small=1,
            follows_width=False,
            divides="mamba_num_heads",
            fewer="B and C have fewer rows",
        ),
        Size(key="mamba_state_dim", small=16, follows_width=False),
    )

    def tensors(self, model: ModelFile, layer: str, growth: Growth) -> Iterator[Tensor]:
        """Yields norm, in_proj, conv1d, what belongs to each head, the gated norm and out_proj."""
        name, sizes = f"{layer}.mixer", sizes_of(model)
        hidden, inner, heads = (Side(n, grows=True) for n in (model.hidden_size, sizes.inner, sizes.heads))
        fused = model.transformer_impl == "transformer_engine"
        yield from norm(model, f"{name}.in_proj.layer_norm_" if fused else f"{layer}.norm.", hidden)
        parts = (
            Part("z", sizes.inner),
            Part("x", sizes.inner),
            Part("B", sizes.states),
            Part("C", sizes.states),
            Part("dt", sizes.heads),
        )
        # B and C have as many rows at every width: how much its output grows is said by z and x.
        rows = Side(sizes.projected, grows=True, leading=2 * sizes.inner)
        yield from linear(f"{name}.in_proj", hidden, rows, bias=False, parts=parts)
        # Each channel has a kernel of its own, so its input side is the kernel: finite, and drawn accordingly.
        channels = Side(sizes.convolved, grows=True, leading=sizes.inner)
        yield Tensor(
            name=f"{name}.conv1d.weight",
            shape=(sizes.convolved, 1, KERNEL),
            fan_in=Side(KERNEL),
            fan_out=channels,
            start=Kept(),
        )
        yield _kept(f"{name}.conv1d.bias", channels)
        for each in ("dt_bias", "A_log", "D"):
            yield _kept(f"{name}.{each}", heads)
        yield vector(f"{name}.norm.weight", inner, start=1.0, gain=True)
        yield from linear(f"{name}.out_proj", inner, hidden, bias=False, residual=True)

    def places(self, layer: str) -> Iterator[Place]:
        """Yields the branch."""
        yield Place(f"{layer}.mixer", Acts.BRANCH, BRANCH)

    def flops(self, model: ModelFile) -> Mapping[str, float]:
        """Returns those of the projections, of the convolution, and of the scan as Megatron counts them."""
        sizes = sizes_of(model)
        return {
            "mamba_projections": 6.0 * model.hidden_size * (sizes.projected + sizes.inner),
            "mamba_convolution": 6.0 * KERNEL * sizes.convolved,
            "mamba_scan": 3.0 * _SCAN * sizes.inner * sizes.state_dim,
        }

    def config(self, model: ModelFile) -> Mapping[str, Any]:
        """Returns its keys, which Megatron has under the same names."""
        return {key: getattr(model, key) for key in MambaKeys.model_fields}

    def measured(self, model: ModelFile, layer: str) -> Iterator[Measured]:
        """Yields the norm, in_proj, the gated norm behind the scan, and out_proj."""
        norm, mixer, panel = f"{layer}.norm", f"{layer}.mixer", "Mamba output"
        yield inside(norm, panel, STREAM)
        yield inside(f"{mixer}.in_proj", panel, norm)
        yield inside(f"{mixer}.norm", panel, f"{mixer}.in_proj")
        yield Measured(f"{mixer}.out_proj", Kind.BRANCH, panel, (f"{mixer}.norm",), leads=True)

    def remarks(self, base: ModelFile, target: ModelFile) -> Iterator[str]:
        """Yields what is known of a state that differs."""
        states = [sizes_of(model).state_dim for model in (base, target)]
        if states[0] != states[1]:
            yield (
                f"Base and target differ in mamba_state_dim {states[0]} → {states[1]}. What a state gives at the start "
                "grows with it, which the gated norm behind it hides; the best learning rate was found to transfer all "
                "the same."
            )

    def plain(self, model: ModelFile, softmax_scale: float) -> "tuple[str, str, nn.Module]":
        """Returns the recurrence, step by step."""
        from mup_megatron.architectures.plain.mamba import PlainMamba

        return "norm", "mixer", PlainMamba(model.hidden_size, sizes_of(model), KERNEL)


def sizes_of(model: ModelFile) -> MambaSizes:
    """Returns the sizes of a model's Mamba layers."""
    assert isinstance(model, MambaKeys)
    return model.mamba_sizes(model.hidden_size)


def _kept(name: str, size: Side) -> Tensor:
    """Returns a vector that starts as Megatron draws it, neither a constant nor of the tuned std."""
    return Tensor(
        name=name,
        shape=(size.size,),
        fan_in=Side(1),
        fan_out=size,
        properties=frozenset({Property.VECTOR}),
        start=Kept(),
    )


MAMBA = Mamba()
"""The family of Mamba-2 layers."""
