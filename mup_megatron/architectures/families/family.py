"""A family of layers: its tensors, the places of its factors, its FLOPs and the same in plain torch.

And what families are made of: linear layers, norms, vectors.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

from mup_megatron.architectures.layout import Layout
from mup_megatron.architectures.measured import Measured
from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.theory import BRANCH, SOFTMAX, Acts, Constant, Part, Place, Property, Role, Side, Tensor

__all__ = ["Block", "Family", "Growth", "Size", "alike", "linear", "norm", "vector"]

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """A size in a model file that is a family's own; heads are every model's."""

    key: str
    small: int
    """As large as a small model of the kind needs it, where base and target share it."""
    spread: int = 2
    """How many times as large as the base's it is at most in such a model, where the two differ: more than 2 where the
    ratio of two sizes, as of experts and those that are chosen, has to differ too."""
    follows_width: bool = True
    """Whether it keeps its ratio to the hidden size where base and target differ in it; a count does not."""
    kept: bool = False
    """Whether models of one kind share it at several widths all the same, as the ranks of latents."""
    divides: str | None = None
    """The key of a size that has to be a multiple of it."""
    fewer: str = ""
    """What follows where a narrower model has to have less of it for that, for a remark."""

    @property
    def is_width(self) -> bool:
        """True where it is narrower in every narrower model."""
        return self.follows_width and not self.kept

    def of(self, model: ModelFile) -> int | None:
        """Returns the size in a model; None if the model has none."""
        size: int | None = model.value_of(self.key)
        return size


class Block(ABC):
    """Some of a model's tensors that stand together under one name, and what Megatron-Core makes of them."""

    name: ClassVar[str]
    shared: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """Keys of a model file, beside those of every model → what they decide, which base and target must share."""
    native_problem: ClassVar[str | None] = None
    """Why no recipe does what Megatron's own μP (`--use-mup`) does with it, and what to do."""
    expert_parallel: ClassVar[bool] = False
    """Whether ranks of expert parallelism hold different parts of it."""

    @abstractmethod
    def tensors(self, model: ModelFile, layer: str, growth: Growth) -> Iterator[Tensor]:
        """Yields the tensors of the layer of this name."""

    def places(self, layer: str) -> Iterator[Place]:
        """Yields where factors act in the layer of this name, beside those of single weights."""
        yield from ()

    @abstractmethod
    def flops(self, model: ModelFile) -> Mapping[str, float]:
        """Returns training FLOPs for one token, by item: see `cost.Flops`."""

    @abstractmethod
    def measured(self, model: ModelFile, layer: str) -> Iterator[Measured]:
        """Yields the modules of the layer of this name that a check looks at, in the order of a forward pass."""

    def config(self, model: ModelFile) -> Mapping[str, Any]:
        """Returns the fields of a TransformerConfig that its keys become, beside those of every Transformer."""
        return {}

    def problems(self, model: ModelFile, layout: Layout) -> Iterator[str]:
        """Yields why Megatron cannot train it on these ranks, by flag, and what to do."""
        yield from ()

    def local_problem(self, model: ModelFile, *, on_cpu: bool) -> str | None:
        """Returns why Megatron's local layers cannot be it, and what to do; None where they can."""
        return None


class Family(Block):
    """A kind of layer: a norm and a branch that adds to the residual stream."""

    sizes: ClassVar[tuple[Size, ...]] = ()
    """Its own, for small models of its kind."""

    @abstractmethod
    def plain(self, model: ModelFile, softmax_scale: float) -> "tuple[str, str, nn.Module]":
        """Returns the names of its norm and of its branch in a layer, and the branch in plain torch: see `plain/`.

        One that looks at other tokens is `Attending`, whose stack says at which.
        """

    def remarks(self, base: ModelFile, target: ModelFile) -> Iterator[str]:
        """Yields what is known of transfer between a base and a target that differ, in sentences."""
        yield from ()


def attention_places(attention: str) -> Iterator[Place]:
    """Yields where the scale of logits is set in the attention of this name, and the branch that it is."""
    yield Place(f"{attention}.core_attention", Acts.SCALE, SOFTMAX)
    yield Place(attention, Acts.BRANCH, BRANCH)


def alike(*keys: str) -> Mapping[str, str]:
    """Returns keys whose values base and target must share, as `Block.shared` has them."""
    return MappingProxyType({key: key for key in keys})


def linear(
    name: str,
    fan_in: Side,
    fan_out: Side,
    *,
    bias: bool,
    residual: bool = False,
    parts: tuple[Part, ...] = (),
    role: Role | None = None,
) -> Iterator[Tensor]:
    """Yields weight [fan_out, fan_in] and bias of a linear layer; `role` is said where the sides do not say it."""
    properties = frozenset({Property.RESIDUAL} if residual else ())
    yield Tensor(
        name=f"{name}.weight",
        shape=(fan_out.size, fan_in.size),
        fan_in=fan_in,
        fan_out=fan_out,
        properties=properties,
        declared_role=role,
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
