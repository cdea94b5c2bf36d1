"""One parameter of a module in the terms of the rules: what it is, by the layer that it belongs to and its place there.

Which side of a weight is fan_in is known from the layer, or was seen in a forward pass.
"""

import math
from dataclasses import dataclass

import torch

from mup_megatron.modules.draws import Draw
from mup_megatron.modules.experts import Membership
from mup_megatron.modules.names import named_modules
from mup_megatron.theory import Constant, Kept, LibraryDraw, Property, Role, Side, Start, Tensor

TABLES = (torch.nn.Embedding, torch.nn.EmbeddingBag)
_BETWEEN = ("project", "adapter", "lora")
_ADDED = ("embed", "token", "pos", "query", "latent", "prompt", "probe")
STATES = ".A_log"
"""A Mamba mixer's decays, one for each channel and state: a matrix that multiplies element by element."""


def declared_sum(experts: torch.nn.Module) -> int | None:
    """Returns the dimension that experts in one tensor sum over, where they say it in transformers' way."""
    transposed = getattr(experts, "is_transposed", None)
    return None if not isinstance(transposed, bool) else 1 if transposed else 2


def embeddings_of(model: torch.nn.Module) -> dict[int, tuple[torch.nn.Module, str, str]]:
    """Returns tables by the identity of their weight: one that is the readout as well counts as an embedding."""
    return {id(m.weight): (m, name, "weight") for name, m in named_modules(model) if isinstance(m, TABLES)}


@dataclass(frozen=True, slots=True)
class Seen:
    """A parameter in its place, but for its size."""

    name: str
    module: torch.nn.Module
    """The layer that it belongs to."""
    attribute: str
    grows: tuple[bool, ...]
    in_layer: bool
    """It belongs to one of several layers, and so is no model's readout or input."""
    in_mixer: bool
    """What gets narrow there is a bottleneck, and no readout."""
    draw: Draw
    experts: Membership
    counted: int | None
    """The dimension that counts experts."""
    routes: bool
    """It chooses among experts, or is the gate of one that is shared: an output that nobody reads out."""
    summed: int | None
    """The dimension over which a product with it sums, where that was seen."""
    taken_up: bool
    """Another linear layer of the same one of several layers takes its narrow output up and widens it again."""

    @property
    def is_added(self) -> bool:
        """A parameter of a module's own that is looked up or added, by its name: what else it could be, as a readout
        that is no layer, its shape does not say.
        """
        return not self.is_torchs and any(word in self.name.lower() for word in _ADDED)

    @property
    def is_between(self) -> bool:
        """By its name it goes from one part of a model to another, or beside a weight: what gets narrow there is a
        bottleneck, and no readout.
        """
        return any(word in self.name.lower() for word in _BETWEEN)

    @property
    def is_torchs(self) -> bool:
        """True where its layer is one of torch's own."""
        return type(self.module).__module__.startswith("torch.nn")


def start_of(value: float | None, std: float | None) -> Start:
    """Returns the start of a tensor from its constant or its std; kept where it has neither."""
    if std is not None:
        return LibraryDraw(std)
    return Kept() if value is None else Constant(value)


def classified(seen: Seen, shape: tuple[int, ...]) -> Tensor | None:
    """Returns what a parameter is; None where it is not known. Its draw is filled in later."""
    sides = [Side(size, grows) for size, grows in zip(shape, seen.grows, strict=True)]
    one = Side(1)

    def tensor(fan_in: Side, fan_out: Side, *properties: Property, role: Role | None = None) -> Tensor:
        expert = () if seen.experts.of is None else (Property.EXPERT,)
        # Torch's optimizers of matrices take no batches of them; a table is none, wherever it is.
        is_matrix = len(shape) == 2 and not isinstance(seen.module, TABLES) and not seen.is_added
        return Tensor(
            name=seen.name,
            shape=shape,
            fan_in=fan_in,
            fan_out=fan_out,
            properties=frozenset((*properties, *expert)),
            declared_role=role,
            start=Constant(0.0),
            stepped_as_matrix=None if is_matrix else False,
        )

    if seen.counted == 0 and seen.experts.of is not None:
        # One of them is a matrix, or a vector: how many there are is no side of it.
        match sides[1:], seen.summed:
            case [side], _:
                return tensor(one, side, Property.VECTOR)
            case [first, second], 1 | 2:
                fan_in, fan_out = (first, second) if seen.summed == 1 else (second, first)
                return tensor(fan_in, fan_out, role=Role.HIDDEN)
        return None
    if seen.experts.around is not None and not any(seen.grows) and seen.counted is not None:
        return tensor(one, Side(math.prod(shape)), Property.VECTOR)
    if seen.routes:
        fan_in = next(side for side in sides if side.grows)
        router = () if seen.counted is None else (Property.ROUTER,)
        return tensor(fan_in, Side(math.prod(shape) // fan_in.size), Property.FOLDED, *router, role=Role.OUTPUT)
    if len(shape) <= 1:
        # A bias of a layer, or of a norm; a vector of a module's own could be a readout of one output.
        of_layer = (
            seen.in_mixer or "Norm" in type(seen.module).__name__ or linear_sides(seen.module, "weight") is not None
        )
        known = of_layer or seen.is_torchs or seen.is_added
        if seen.draw.std is not None and not known and any(seen.grows):
            return None
        is_gain = seen.attribute == "weight" or ("Norm" in type(seen.module).__name__ and seen.attribute != "bias")
        return tensor(one, sides[0] if sides else one, Property.VECTOR, *((Property.GAIN,) if is_gain else ()))
    if isinstance(seen.module, TABLES):
        # A table inside attention is no embedding of what comes in, and one that is fixed has no size to be tuned.
        inside = seen.in_layer or "relative" in seen.name or not seen.draw.understood
        return tensor(sides[0], sides[1], *(() if inside else (Property.EMBEDDING,)))
    if seen.name.endswith(STATES):
        return tensor(one, sides[0], Property.VECTOR)
    order = linear_sides(seen.module, seen.attribute)
    if order is not None:
        fan_out, fan_in = (sides[d] for d in order)
        narrows = fan_in.grows and not fan_out.grows
        reads_out = narrows and not seen.in_layer and not seen.is_between
        inside = seen.in_mixer or seen.experts.of is not None or (narrows and (seen.is_between or seen.taken_up))
        # One weight for each channel and step, as a state space's convolution has, multiplies and does not sum.
        role = Role.HIDDEN if inside and fan_in.size > 1 else None
        # A convolution sums over its kernel as well.
        summed = Side(fan_in.size * math.prod(shape[2:]), fan_in.grows)
        return tensor(summed, fan_out, *((Property.READOUT,) if reads_out else ()), role=role)
    if len(sides) == 2 and seen.summed is not None and (all(seen.grows) or seen.is_between):
        return tensor(sides[seen.summed], sides[1 - seen.summed], role=Role.HIDDEN)
    if not any(seen.grows[:-1]) and (seen.is_added or not seen.grows[-1]):
        return tensor(Side(math.prod(shape[:-1])), sides[-1])
    return None


def linear_sides(module: torch.nn.Module, attribute: str) -> tuple[int, int] | None:
    """Returns which dimensions of a weight are fan_out and fan_in; None where it is not known."""
    if isinstance(module, torch.nn.MultiheadAttention) and attribute.endswith("proj_weight"):
        return 0, 1
    if attribute != "weight":
        return None
    if isinstance(module, torch.nn.Linear | torch.nn.Conv1d | torch.nn.Conv2d | torch.nn.Conv3d):
        return 0, 1
    # Hugging Face's linear layer of GPT-2, whose weight is transposed; known by name: transformers may be absent.
    return (1, 0) if type(module).__name__ == "Conv1D" and {"nx", "nf"} <= vars(module).keys() else None
