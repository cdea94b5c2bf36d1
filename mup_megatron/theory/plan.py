"""The plan: every parameter's name → its role, shape, init std, multiplier, LR, eps and weight decay; and the sites.

A plan is made once from the shapes of base and target (`build.py`), never changes, and is all that an adapter needs.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from typing import Any

from mup_megatron.theory.depth import Deepening
from mup_megatron.theory.errors import PlanError
from mup_megatron.theory.optimizers import Optimizer, optimizers
from mup_megatron.theory.rules import stock_scale
from mup_megatron.theory.sites import BRANCH, READOUT, SOFTMAX, Acts, Heads, Place, Site
from mup_megatron.theory.tensors import Property, Role
from mup_megatron.theory.widths import Stack


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanEntry:
    """One parameter: what it is and what it gets."""

    name: str
    role: Role
    properties: frozenset[Property]
    stack: str
    """The stack of layers that it is in; empty outside of all."""
    shape: tuple[int, ...]
    """Global, not a rank's shard."""
    fan_in: int
    fan_out: int
    width_ratio: float
    """r_in; 1 where fan_in is finite."""
    init_std: float | None
    """None for what starts at a constant, and for what keeps its library's start."""
    init_value: float | None
    """The constant; None for what is drawn at random."""
    multiplier: float
    """What the forward pass multiplies this weight by."""
    optimizer: str
    """The name of the optimizer whose rules gave the following values."""
    lr: float
    """The peak."""
    min_lr: float
    """The floor."""
    eps: float | None
    """None for an optimizer without."""
    weight_decay: float
    rule: str
    """Which rule gave these values, with the override that changed them."""
    padded_to: int | None = None
    """The first dimension is a vocabulary, padded to a multiple of this times the tensor parallelism; here without."""
    library_std: float | None = None
    """The std with which its library draws it at this shape; None for a constant, and for Megatron's models."""
    folded: float = 1.0
    """The multiplier that `folding.fold` moved into the weight: stored weight = folded · weight + fold_offset."""
    fold_offset: float = 0.0
    stock_multiplier: float = 1.0
    """What the model itself multiplies it by, relative to the base: a part of `multiplier` that needs no doing."""
    depth_ratio: float = 1.0
    """m_L of its stack, where a rule of depth has factors of it in the values above."""

    @property
    def is_vector(self) -> bool:
        """True where it is a bias or gain, which has no weight decay."""
        return Property.VECTOR in self.properties

    @property
    def is_gain(self) -> bool:
        """True where it is a norm's gain."""
        return Property.GAIN in self.properties

    @property
    def is_embedding(self) -> bool:
        """True where it is a table whose rows are looked up."""
        return Property.EMBEDDING in self.properties

    @property
    def is_readout(self) -> bool:
        """True where it computes the model's output and is no embedding besides."""
        return Property.READOUT in self.properties

    @property
    def is_residual(self) -> bool:
        """True where it writes into the residual stream."""
        return Property.RESIDUAL in self.properties

    @property
    def is_expert(self) -> bool:
        """True where it belongs to one of several that share the tokens, or to all of them."""
        return Property.EXPERT in self.properties

    @property
    def rules(self) -> Optimizer:
        """The rules of the optimizer that steps it."""
        return optimizers()[self.optimizer]

    @property
    def module(self) -> str:
        """The module that it belongs to, by its global name."""
        return self.name.rpartition(".")[0]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Every parameter of the target and what it gets, and the model's own multipliers."""

    fingerprint: str
    """The recipe's."""
    architecture: str
    """The target's name in `architectures/registry.py`; empty for a model that is described by itself."""
    optimizer: str
    """The recipe's; entries may have others where it leaves some tensors to them."""
    lr: float
    """The base's peak, to which every entry's is relative."""
    min_lr: float
    weight_decay: float
    """The base's."""
    adam_eps: float
    """The base's."""
    softmax_scale: float
    head_size: int
    output_multiplier: float
    """On the readout's input; α_out/r_in, also where the readout is the embedding."""
    stacks: Mapping[str, Stack]
    """Stacks of layers, by the name of the module that has the `layers`."""
    readout: str | None
    """Name of the weight that computes the logits: a tied model's token embedding. None without a readout."""
    readout_norm: tuple[str, ...]
    query_norms: tuple[str, ...]
    places: tuple[Place, ...]
    """Where factors act, beside those of single weights."""
    entries: tuple[PlanEntry, ...]
    scale_mode: str | None = None
    """How updates follow a matrix's shape by themselves, which the rates are relative to; None without such a mode."""
    stock_softmax_scale: float | None = None
    """What attention multiplies logits by if nothing is said; None for 1/√head_size."""
    stock_readout_ratio: float = 1.0
    """What the model itself multiplies the readout's input by, relative to the base: a part of `output_multiplier` that
    needs no doing."""
    optimizer_values: Mapping[str, Any] = field(default_factory=dict)
    """Betas, momentum and the like, by their keys in a recipe, for whoever looks at a live optimizer: no rule changes
    them. Empty in a plan that an earlier release has written."""
    deepened: Mapping[str, Deepening] = field(default_factory=dict)
    """Under a rule of depth, what each stack's gives, by its name."""

    @cached_property
    def by_name(self) -> Mapping[str, PlanEntry]:
        """Entries by global name."""
        return {entry.name: entry for entry in self.entries}

    def __getitem__(self, name: str) -> PlanEntry:
        """Returns the entry of a parameter; PlanError if the plan does not know it."""
        try:
            return self.by_name[name]
        except KeyError:
            raise PlanError(
                f"{name}: the plan has no such parameter. The model does not match the model file, "
                "or it has a kind of layer that is not supported."
            ) from None

    @cached_property
    def optimizers(self) -> tuple[str, ...]:
        """The names of those that step its entries, in their order: one, unless the recipe's leaves some to others."""
        return tuple(dict.fromkeys(entry.optimizer for entry in self.entries)) or (self.optimizer,)

    @property
    def num_layers(self) -> int:
        """Layers of all stacks together."""
        return sum(stack.layers for stack in self.stacks.values())

    @property
    def depth(self) -> int:
        """Residual branches of all stacks together."""
        return sum(stack.depth for stack in self.stacks.values())

    @property
    def tied(self) -> bool:
        """True where the readout is the token embedding."""
        return self.readout is not None and self[self.readout].is_embedding

    @property
    def embedding_multiplier(self) -> float:
        """On the token embedding, in effect; another embedding can have an override of its own."""
        return next((entry.multiplier for entry in self.entries if entry.is_embedding), 1.0)

    @property
    def own_softmax_scale(self) -> float:
        """The scale that attention uses if nothing is said."""
        return stock_scale(self.head_size, self.stock_softmax_scale)

    @cached_property
    def changes_softmax_scale(self) -> bool:
        """True where an attention needs to be told another scale than the one it uses by itself."""
        return self.softmax_scale != self.own_softmax_scale or any(
            site.changes for site in map(self.site, self.places) if site.acts is Acts.SCALE
        )

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """Every place of the model at which a factor acts: those of the architecture, and those of single weights."""
        placed = {place.carries for place in self.places}
        if self.readout is not None and not self.tied and READOUT in placed:
            placed.add(self.readout)
        own = (
            Site(entry.module, Acts.INPUT, entry.multiplier, entry.stock_multiplier, f"the multiplier of {entry.name}")
            for entry in self.entries
            if entry.multiplier != entry.stock_multiplier and entry.name not in placed
        )
        return (*(self.site(place) for place in self.places), *own)

    def site(self, place: Place) -> Site:
        """Returns a place with its factor; also one that is known from the live model alone."""
        if place.carries == SOFTMAX:
            reason = "attention logits scale as 1/d in the head size"
            factor, stock = self.softmax_scale, self.own_softmax_scale
            if place.heads is not None and place.scale is not None:
                factor, stock = place.scale, stock_scale(place.heads.size, place.heads.stock_scale)
            return Site(place.module, place.acts, factor, stock, reason)
        if place.carries == BRANCH:
            reason = "the residual branch's multiplier, residual_multiplier times what the rule of depth says"
            assert place.scale is not None
            return Site(place.module, place.acts, place.scale, 1.0 if place.stock is None else place.stock, reason)
        if place.carries == READOUT:
            reason = "the readout's multiplier, α_out over its width ratio"
            return Site(place.module, place.acts, self.output_multiplier, self.stock_readout_ratio, reason)
        own = self[place.carries]
        return Site(place.module, place.acts, own.multiplier, own.stock_multiplier, f"the multiplier of {own.name}")

    def attention(self, module: str) -> Site:
        """Returns the scale of an attention: its own where it has heads of its own, else the model's."""
        places = (place for place in self.places if (place.module, place.carries) == (module, SOFTMAX))
        return self.site(next(places, Place(module, Acts.SCALE, SOFTMAX)))

    def to_json(self) -> dict[str, Any]:
        """Returns plain values; `from_json` gives the same plan back, bit by bit."""
        inside = {"entries", "deepened", *_MODEL_KEYS}
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in inside}
        if self.scale_mode is None:
            del own["scale_mode"]
        model = {key: getattr(self, key) for key in _MODEL_KEYS}
        model["stacks"] = {name: asdict(stack) for name, stack in self.stacks.items()}
        model["places"] = [_place_to_json(place) for place in self.places]
        if self.deepened:
            model["deepened"] = {name: asdict(each) for name, each in self.deepened.items()}
        return {**own, "model": model, "parameters": [_entry_to_json(entry) for entry in self.entries]}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Plan":
        """Returns the plan that `to_json` wrote.

        Raises:
            PlanError: keys are missing or unknown, or a role, property or optimizer is none.
        """
        try:
            rest = {key: value for key, value in content.items() if key not in {"model", "parameters"}}
            entries = tuple(_entry_from_json(entry) for entry in content["parameters"])
            for name in (rest["optimizer"], *(entry.optimizer for entry in entries)):
                if name not in optimizers():
                    raise ValueError(f"{name!r} is no optimizer")
            known = {key for each in optimizers().values() for key in each.hyperparameters}
            if others := rest.get("optimizer_values", {}).keys() - known:
                raise ValueError(f"no optimizer has a value {min(others)!r}")
            model: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in content["model"].items()}
            for key in _FOLLOWS:
                del model[key]
            model["stacks"] = {name: Stack(**stack) for name, stack in model["stacks"].items()}
            model["places"] = tuple(map(_place_from_json, model["places"]))
            model["deepened"] = {name: Deepening(**each) for name, each in model.get("deepened", {}).items()}
            return cls(**rest, **model, entries=entries)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise PlanError(f"Not a plan: {error}. Write it anew with `mup-megatron explain --format json`.") from None


_FOLLOWS = ("embedding_multiplier", "num_layers", "tied")
"""What a plan says of the model that follows from the rest of it."""
_MODEL_KEYS = (
    "architecture",
    "softmax_scale",
    "embedding_multiplier",
    "output_multiplier",
    "head_size",
    "num_layers",
    "stacks",
    "tied",
    "readout",
    "readout_norm",
    "query_norms",
    "places",
    "stock_softmax_scale",
    "stock_readout_ratio",
)


def _place_to_json(place: Place) -> dict[str, Any]:
    return {key: value for key, value in asdict(place).items() if value is not None}


def _place_from_json(content: Mapping[str, Any]) -> Place:
    heads = Heads(**content["heads"]) if "heads" in content else None
    return Place(**{**content, "acts": Acts(content["acts"]), "heads": heads})


def _entry_to_json(entry: PlanEntry) -> dict[str, Any]:
    content = {**asdict(entry), "properties": sorted(entry.properties)}
    if entry.depth_ratio == 1.0:
        del content["depth_ratio"]
    return content


def _entry_from_json(content: Mapping[str, Any]) -> PlanEntry:
    properties = frozenset(Property(each) for each in content["properties"])
    typed = {"role": Role(content["role"]), "properties": properties, "shape": tuple(content["shape"])}
    return PlanEntry(**{**content, **typed})
