"""Shapes of base and target + hyperparameters → plan. Applies the rules to each tensor; holds no rule of its own."""

import fnmatch
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from operator import attrgetter
from typing import Any

from mup_megatron.theory import branches, rules
from mup_megatron.theory.depth import CompleteP
from mup_megatron.theory.errors import PlanError
from mup_megatron.theory.folding import moved
from mup_megatron.theory.matching import counterparts, family_of
from mup_megatron.theory.optimizers import ADAM, Optimizer
from mup_megatron.theory.plan import Plan, PlanEntry
from mup_megatron.theory.rules import Rule
from mup_megatron.theory.sites import BRANCH, SOFTMAX, Place
from mup_megatron.theory.tensors import Constant, Kept, LibraryDraw, Property, Role, Tensor
from mup_megatron.theory.widths import Scaling, Sizes, Stack, scaling


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """Hyperparameters as tuned at the base, as far as the rules depend on them."""

    lr: float
    min_lr: float
    init_method_std: float
    embedding_multiplier: float
    output_multiplier: float
    attention_multiplier: float
    weight_decay: float
    adam_eps: float
    residual_multiplier: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Override:
    """A tensor's own tuned factors, relative to the rule. `match` is a shell pattern on the whole name at the base."""

    match: str
    lr_mult: float = 1.0
    init_mult: float = 1.0
    multiplier: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """The rules that apply to a plan."""

    rule: Rule = Rule.MUP
    optimizer: Optimizer = ADAM
    weight_decay_exponent: float = 1.0
    router: Role = Role.OUTPUT
    """The role of what chooses experts."""
    depth: CompleteP | None = None
    """None where depth changes nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """A model as the rules see it."""

    tensors: tuple[Tensor, ...]
    hidden_size: int
    """Size of the readout's input."""
    head_size: int
    """Of attention; 1 where there is none, which leaves every rule of attention at the identity."""
    stacks: Mapping[str, Stack] = field(default_factory=dict)
    """Stacks of layers, by the name of the module that has the `layers`."""
    readout: str | None
    """Name of the weight that computes the logits: a tied model's token embedding. None without a readout."""
    readout_norm: tuple[str, ...] = ()
    """Gain and bias of the norm before the readout: where a tied readout's multiplier can be folded."""
    query_norms: tuple[str, ...] = ()
    """Gains and biases of the norms of queries: where the scale of attention can be folded."""
    places: tuple[Place, ...] = ()
    """Where factors act, beside those of single weights."""
    architecture: str = ""
    """Its name in the registry of architectures, if it is from there."""
    stock_softmax_scale: float | None = None
    """What its attention multiplies logits by if nothing is said; None for 1/√head_size."""
    stock_readout_scale: float = 1.0
    """What it multiplies the readout's input by, if nothing is said (T5: 1/√hidden_size)."""


_but_for_names = attrgetter(*(each.name for each in fields(Tensor) if each.name not in {"name", "name_at_base"}))
"""What tensors that are alike have in common."""


def build_plan(
    base: ModelShape,
    target: ModelShape,
    tuned: Tuned,
    *,
    rules_used: Rules,
    overrides: Iterable[Override] = (),
    optimizer_values: Mapping[str, Any] | None = None,
    fingerprint: str = "",
) -> Plan:
    """Returns what every parameter of `target` gets, if `tuned` are the best values at `base`.

    Parameters are matched by name, and else by the name without layer indices, so depth may differ.

    Raises:
        PlanError: a parameter of the target has no counterpart in the base, an override matches nothing or asks for
            something that its tensor does not have. Names the parameter.
    """
    overrides = tuple(overrides)
    _require_own_names(target.tensors)
    at_base = counterparts(base.tensors)
    standard = rules_used.rule is Rule.STANDARD
    depths = {name: Sizes(base.stacks.get(name, stack).depth, stack.depth) for name, stack in target.stacks.items()}
    entries = []
    like: dict[Any, PlanEntry] = {}
    """Entries of tensors that differ in name alone, of which experts are many."""
    for tensor in target.tensors:
        counterpart = at_base.of(tensor.name)
        kind = (_but_for_names(tensor), _but_for_names(counterpart))
        if kind not in like:
            s = scaling(counterpart, tensor, depths.get(tensor.stack, Sizes(1, 1)))
            s = s.without_width() if standard else s
            if rules_used.depth is None:
                like[kind] = _entry(tensor, counterpart, s, tuned, rules_used)
            else:
                at_base_depth = replace(s, depth=Sizes(s.depth.base, s.depth.base))
                entry = _entry(tensor, counterpart, at_base_depth, tuned, rules_used)
                like[kind] = branches.deepened(entry, s.depth.ratio if tensor.deepens else 1.0, rules_used.depth)
            if not standard:
                stock = tensor.stock_multiplier / counterpart.stock_multiplier
                like[kind] = replace(like[kind], stock_multiplier=stock)
        entries.append(_overridden(replace(like[kind], name=tensor.name), tensor, overrides))
    _require_all_used(overrides, target.tensors)
    _require_same_meaning(overrides, base.tensors, target.tensors)
    _require_multiplied(tuned, target)
    # A tied readout has no row of its own; what it computes is the output role all the same.
    width = Scaling(Sizes(base.hidden_size, target.hidden_size, grows=not standard), Sizes(1, 1))
    readout = frozenset({Property.READOUT})
    tied_output = rules.multiplier(Role.OUTPUT, readout, width, output=tuned.output_multiplier)
    return Plan(
        fingerprint=fingerprint,
        architecture=target.architecture,
        optimizer=rules_used.optimizer.name,
        scale_mode=rules_used.optimizer.scale_mode,
        lr=tuned.lr,
        min_lr=tuned.min_lr,
        weight_decay=tuned.weight_decay,
        adam_eps=tuned.adam_eps,
        optimizer_values=dict(optimizer_values or {}),
        softmax_scale=rules.softmax_scale(
            base_head_size=target.head_size if standard else base.head_size,
            head_size=target.head_size,
            alpha=tuned.attention_multiplier,
            stock=(target if standard else base).stock_softmax_scale,
        ),
        head_size=target.head_size,
        output_multiplier=next(
            (each.multiplier for each in entries if each.is_readout and each.name == target.readout), tied_output
        ),
        stacks=dict(target.stacks),
        readout=target.readout,
        readout_norm=target.readout_norm,
        query_norms=target.query_norms,
        places=(
            *_scaled(base.places, target.places, alpha=tuned.attention_multiplier, standard=standard),
            *branches.placed(
                base.places,
                target.places,
                stacks=(base.stacks, target.stacks),
                tensors=target.tensors,
                multiplier=tuned.residual_multiplier,
                rule=rules_used.depth,
            ),
        ),
        entries=tuple(entries),
        stock_softmax_scale=target.stock_softmax_scale,
        stock_readout_ratio=1.0 if standard else target.stock_readout_scale / base.stock_readout_scale,
        deepened={
            name: rules_used.depth.stack(
                base.stacks.get(name, stack).layers, stack.layers, step=rules_used.optimizer.step
            )
            for name, stack in target.stacks.items()
            if rules_used.depth is not None
        },
    )


def _scaled(base: tuple[Place, ...], target: tuple[Place, ...], *, alpha: float, standard: bool) -> tuple[Place, ...]:
    """Returns the target's places, each with the scale of its attention where that has heads of its own."""
    # Layers of one model may differ, so the same name goes before the same place in another layer.
    named = {place.module: place.heads for place in base if place.carries == SOFTMAX}
    at_base = {family_of(name): heads for name, heads in named.items()} | named
    found = []
    for place in target:
        own = place.heads
        if place.carries == BRANCH:
            continue
        if own is None:
            found.append(place)
            continue
        tuned = own if standard else at_base.get(place.module, at_base.get(family_of(place.module)))
        if tuned is None:
            raise PlanError(
                f"{place.module}: the base has no such attention, so the ratio of its heads is unknown. Give the base "
                "the target's architecture."
            )
        scale = rules.softmax_scale(base_head_size=tuned.size, head_size=own.size, alpha=alpha, stock=tuned.stock_scale)
        found.append(replace(place, scale=scale))
    return tuple(found)


def _require_multiplied(tuned: Tuned, shape: ModelShape) -> None:
    """Raises PlanError for a multiplier of something that the model has not."""
    embeds = any(Property.EMBEDDING in tensor.properties for tensor in shape.tensors)
    branched = any(place.carries == BRANCH for place in shape.places)
    for key, value, there, what in (
        ("embedding_multiplier", tuned.embedding_multiplier, embeds, "embedding"),
        ("output_multiplier", tuned.output_multiplier, shape.readout is not None, "readout"),
        ("residual_multiplier", tuned.residual_multiplier, branched, "residual branch that is known"),
    ):
        if value != 1.0 and not there:
            raise PlanError(f"{key} is {value:g}, and the model has no {what} that it could act on. Set it to 1.")


def _entry(tensor: Tensor, base: Tensor, s: Scaling, tuned: Tuned, used: Rules) -> PlanEntry:
    role, properties = tensor.role, tensor.properties
    if Property.ROUTER in properties and used.router is not role:
        role, properties = used.router, properties - {Property.FOLDED}
    optimizer = used.optimizer.for_tensor(tensor)
    bottleneck = role is Role.HIDDEN and not tensor.fan_out.grows and Property.EXPERT not in properties
    if bottleneck and s.r_in != 1.0 and not optimizer.bottlenecks:
        raise PlanError(
            f"{tensor.name}: a bottleneck, whose output keeps its size {tensor.fan_out.size} while the model grows; "
            f"the rules of {optimizer.title} are not known for it. Use Adam, or let it grow with the width."
        )
    if s.share.ratio != 1.0 and optimizer.step:
        raise PlanError(
            f"{tensor.name}: an expert of the target sees {s.share.ratio:.4g} times the share of tokens, and how the "
            f"rates of {optimizer.title} follow that is not known. Use Adam, or a base with the target's share."
        )
    try:
        lr = optimizer.learning_rate(role, s, eta=tuned.lr)
    except PlanError as error:
        raise PlanError(f"{tensor.name}: {error}") from None
    vector = Property.VECTOR in properties
    entry = PlanEntry(
        name=tensor.name,
        role=role,
        properties=properties,
        stack=tensor.stack,
        shape=tensor.shape,
        fan_in=tensor.fan_in.size,
        fan_out=tensor.fan_out.size,
        width_ratio=s.r_in,
        init_std=_init_std(tensor, base, role, s, sigma=tuned.init_method_std),
        init_value=tensor.start.value if isinstance(tensor.start, Constant) else None,
        multiplier=rules.multiplier(
            role, properties, s, embedding=tuned.embedding_multiplier, output=tuned.output_multiplier
        ),
        optimizer=optimizer.name,
        lr=lr,
        # The same rule, so that the whole schedule keeps its shape.
        min_lr=optimizer.learning_rate(role, s, eta=tuned.min_lr),
        eps=optimizer.epsilon(role, s, eps=tuned.adam_eps),
        weight_decay=0.0
        if vector
        else optimizer.decayed(role, s, lam=tuned.weight_decay, exponent=used.weight_decay_exponent),
        rule=f"{used.rule}.{optimizer.name}.{role}" + _more(properties, s),
        padded_to=tensor.padded_to,
        library_std=tensor.start.std if isinstance(tensor.start, LibraryDraw) else None,
    )
    return _folded(entry) if Property.FOLDED in properties else entry


def _folded(entry: PlanEntry) -> PlanEntry:
    # The rule itself is folded: there is nothing that could be taken out again.
    return replace(moved(entry, entry.multiplier), folded=1.0, fold_offset=0.0)


def _more(properties: frozenset[Property], s: Scaling) -> str:
    """Returns what of a rule the role does not say."""
    own = "".join(f".{each}" for each in (Property.RESIDUAL, Property.EXPERT) if each in properties)
    return own if s.share.ratio == 1.0 else f"{own} (its share of the tokens × {s.share.ratio:.4g})"


def _init_std(tensor: Tensor, base: Tensor, role: Role, s: Scaling, *, sigma: float) -> float | None:
    """Returns the std of the initial draw; None for a constant, and for what keeps its library's start."""
    match tensor.start, base.start:
        case LibraryDraw(), LibraryDraw(std):
            return rules.carried_init_std(role, s, std_at_base=std)
        case (LibraryDraw(), _) | (_, LibraryDraw()):
            raise PlanError(
                f"{tensor.name}: it starts at a constant in one of base and target and is drawn at random in the "
                "other. Initialise both alike."
            )
        case ((Constant() | Kept()), _):
            return None
        case _:
            return rules.init_std(role, tensor.properties, s, sigma=sigma)


def _overridden(entry: PlanEntry, tensor: Tensor, overrides: tuple[Override, ...]) -> PlanEntry:
    """Returns the entry with the first override that matches its name."""
    index, own = next(((i, o) for i, o in enumerate(overrides) if _matches(o, tensor)), (None, None))
    if own is None:
        return entry
    if entry.is_vector and (own.multiplier, own.init_mult) != (1.0, 1.0):
        raise PlanError(
            f"per_parameter[{index}] '{own.match}': {entry.name} is a bias or gain, which has no multiplier and no "
            "init std. Narrow the pattern, or put one before it that matches the vectors with lr_mult alone."
        )
    if entry.init_std is None and not entry.is_vector:
        start = "keeps its library's own start" if entry.init_value is None else "starts at a constant"
        # A multiplier acts at a module, or is folded into the weight's start.
        for key in ("init_mult", "multiplier"):
            if getattr(own, key) != 1.0 and (key == "init_mult" or entry.init_value is None):
                raise PlanError(
                    f"per_parameter[{index}] '{own.match}': {entry.name} {start}, so it has no {key}. Take {key} out, "
                    "or narrow the pattern."
                )
    tuned = replace(
        entry,
        init_std=None if entry.init_std is None else entry.init_std * own.init_mult,
        multiplier=entry.multiplier * own.multiplier,
        lr=entry.lr * own.lr_mult,
        min_lr=entry.min_lr * own.lr_mult,
        rule=f"{entry.rule} × per_parameter[{index}]",
    )
    return _folded(tuned) if Property.FOLDED in entry.properties else tuned


def _matches(override: Override, tensor: Tensor) -> bool:
    return fnmatch.fnmatchcase(tensor.name_at_base or tensor.name, override.match)


def _require_all_used(overrides: tuple[Override, ...], tensors: Iterable[Tensor]) -> None:
    tensors = tuple(tensors)
    for index, override in enumerate(overrides):
        if not any(_matches(override, tensor) for tensor in tensors):
            raise PlanError(
                f"per_parameter[{index}] '{override.match}' matches no parameter of the target. Correct the pattern; "
                "`mup-megatron explain` lists the names. A tied readout has none: use output_multiplier."
            )


def _require_same_meaning(
    overrides: tuple[Override, ...], base: tuple[Tensor, ...], target: tuple[Tensor, ...]
) -> None:
    """Raises PlanError for a pattern by a layer's number that means another kind of layer at the base."""
    for index, override in enumerate(overrides):
        at_base, here = (
            {family_of(tensor.name) for tensor in tensors if _matches(override, tensor)} for tensors in (base, target)
        )
        if at_base and at_base != here:
            other = min(here ^ at_base)
            raise PlanError(
                f"per_parameter[{index}] '{override.match}': it does not match the same at the base as in the target "
                f"({other} in one of them alone), whose layers of this number are of another kind. Name the kind."
            )


def _require_own_names(tensors: tuple[Tensor, ...]) -> None:
    """Raises PlanError where two tensors have one name."""
    counts = Counter(tensor.name for tensor in tensors)
    twice = [name for name, count in counts.items() if count > 1]
    if twice:
        raise PlanError(f"{twice[0]}: two tensors of the architecture have this name. Give each its own.")
