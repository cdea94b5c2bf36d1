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
    """A stack of layers: its depth in layers, and how many residual branches the initialisation counts in each.

    Megatron counts two in each layer of a GPT or T5, whose decoder has three, and one in a hybrid model's.
    """

    layers: int
    branches: int = 2

    @property
    def depth(self) -> int:
        """Returns the number of residual branches by which what writes into the stream is drawn."""
        return self.layers * self.branches


@dataclass(frozen=True, slots=True)
class Matrix:
    """A matrix as it is stored, for optimizers whose step depends on its shape. Sides that do not grow stay as they
    are at the target: how a step depends on them is no matter of width.
    """

    name: str
    """Of a part of a tensor; empty for a whole one."""
    fan_out: Sizes
    """What it adds to the tensor's fan_out, in full, whatever of it leads."""
    rows: Sizes
    columns: Sizes


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
    matrices: tuple[Matrix, ...] = ()
    """The matrices that an optimizer of these takes it for, if that is not one with its two sides: see `stored`."""

    @property
    def r_in(self) -> float:
        """The size of the input side at the target, relative to the base."""
        return self.fan_in.ratio

    @property
    def r_out(self) -> float:
        """The size of the output side at the target, relative to the base."""
        return self.fan_out.ratio

    @property
    def stored(self) -> tuple[Matrix, ...]:
        """The matrix that an optimizer of matrices takes it for, or one for each of its parts."""
        return self.matrices or (Matrix("", self.fan_out, rows=_in_full(self.fan_out), columns=_in_full(self.fan_in)),)

    def without_width(self) -> "Scaling":
        """Returns the same with the target's width at the base already: every width rule is the identity."""
        still = [
            replace(m, fan_out=_still(m.fan_out), rows=_still(m.rows), columns=_still(m.columns)) for m in self.matrices
        ]
        return replace(
            self,
            fan_in=_still(self.fan_in),
            fan_out=_still(self.fan_out),
            share=_still(self.share),
            matrices=tuple(still),
        )


def _still(sizes: Sizes) -> Sizes:
    return Sizes(sizes.target, sizes.target, sizes.grows)


def scaling(base: Tensor, target: Tensor, depth: Sizes) -> Scaling:
    """Returns the sizes of one tensor at base and target, given the two depths of its stack."""
    return Scaling(
        _sizes(base.fan_in, target.fan_in),
        _sizes(base.fan_out, target.fan_out),
        depth,
        Sizes(base.share, target.share),
        _matrices(base, target),
    )


def _matrices(base: Tensor, target: Tensor) -> tuple[Matrix, ...]:
    fan_in = _in_full(Sizes(base.fan_in.size, target.fan_in.size, target.fan_in.grows))
    pieces = [("", base.fan_out.size, target.fan_out.size)]
    if target.stepped_by_parts:
        at_base = {part.name: part.rows for part in base.parts}
        pieces = [(part.name, at_base[part.name], part.rows) for part in target.parts]
    # A square says nothing of what is stored first; if both are, it does not matter.
    turned = any(_is_stored_in_first(tensor) for tensor in (base, target))
    found = []
    for name, before, now in pieces:
        fan_out = _in_full(Sizes(before, now, target.fan_out.grows))
        rows, columns = (fan_in, fan_out) if turned else (fan_out, fan_in)
        found.append(Matrix(name, fan_out, rows, columns))
    return tuple(found)


def _is_stored_in_first(tensor: Tensor) -> bool:
    sides = (tensor.fan_in.size, tensor.fan_out.size)
    return tensor.shape[-2:] == sides and sides[0] != sides[1]


def _in_full(sizes: Sizes) -> Sizes:
    """Returns a side as a step sees it: one that does not grow has the target's size at the base as well."""
    return sizes if sizes.grows else _still(sizes)


def _sizes(base: Side, target: Side) -> Sizes:
    assert base.grows == target.grows
    return Sizes(base.leading or base.size, target.leading or target.size, target.grows)
