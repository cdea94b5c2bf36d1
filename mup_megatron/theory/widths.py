"""The sizes of a tensor at base and target: both of each side, and both depths of its stack."""

from dataclasses import dataclass, replace

from mup_megatron.theory.tensors import Side, Tensor


@dataclass(frozen=True, slots=True)
class Sizes:
    """A size at the base and at the target."""

    base: float
    target: float
    grows: bool = True

    @property
    def ratio(self) -> float:
        """target/base; 1 for a size that does not grow."""
        return self.target / self.base if self.grows else 1.0


@dataclass(frozen=True, slots=True)
class Stack:
    """A stack of layers: its depth in layers, and how many residual branches each of them has."""

    layers: int
    branches: int = 2

    @property
    def depth(self) -> int:
        """The number of residual branches that add to the stream, one after the other."""
        return self.layers * self.branches


@dataclass(frozen=True, slots=True)
class Scaling:
    """The sizes of one tensor at base and target, which is all that a rule may depend on.

    Per tensor, never one ratio for the model: heads, ffn and hidden size may scale apart.
    Source: TP5, App. B.1 (width multipliers of each dimension); SC §3 for the per-tensor form.
    """

    fan_in: Sizes
    fan_out: Sizes
    depth: Sizes = Sizes(1, 1)
    """Residual branches of its stack. A GPT's layer has two and a hybrid model's one, so that equal models agree."""
    share: Sizes = Sizes(1, 1)
    """The part of the tokens that it sees."""

    @property
    def r_in(self) -> float:
        """The size of the input side at the target, relative to the base."""
        return self.fan_in.ratio

    @property
    def r_out(self) -> float:
        """The size of the output side at the target, relative to the base."""
        return self.fan_out.ratio

    def without_width(self) -> "Scaling":
        """The same with the target's width at the base already: every width rule is the identity."""
        return replace(self, fan_in=_still(self.fan_in), fan_out=_still(self.fan_out), share=_still(self.share))


def _still(sizes: Sizes) -> Sizes:
    return Sizes(sizes.target, sizes.target, sizes.grows)


def scaling(base: Tensor, target: Tensor, depth: Sizes) -> Scaling:
    """Returns the sizes of one tensor at base and target, given the two depths of its stack."""
    return Scaling(
        _sizes(base.fan_in, target.fan_in), _sizes(base.fan_out, target.fan_out), depth, Sizes(base.share, target.share)
    )


def _sizes(base: Side, target: Side) -> Sizes:
    assert base.grows == target.grows
    return Sizes(base.leading or base.size, target.leading or target.size, target.grows)
