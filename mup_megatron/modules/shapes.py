"""Any `torch.nn.Module` in the terms of the rules: what each parameter is, which of its sides grow, how it is drawn.

Which sides grow is not guessed from sizes: it is seen by comparing the base with a wider model of the same kind. Which
side of a weight is fan_in is known from the layer that it belongs to. Nothing is allocated: models are on the meta
device.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from mup_megatron.errors import InputError
from mup_megatron.modules.attention import AttentionSettings, attention_of, attentions_of, is_mixer
from mup_megatron.modules.draws import Draw, Watch, build_on_meta
from mup_megatron.modules.experts import Memberships
from mup_megatron.modules.names import named_modules, named_parameters
from mup_megatron.modules.parameters import (
    STATES,
    Seen,
    classified,
    declared_sum,
    embeddings_of,
    linear_sides,
    start_of,
)
from mup_megatron.recipe import ModuleParameter
from mup_megatron.theory import (
    SOFTMAX,
    Acts,
    Heads,
    ModelShape,
    Place,
    Property,
    Stack,
    Tensor,
    family_of,
)
from mup_megatron.theory.matching import by_family
from mup_megatron.validation import brief


@dataclass(frozen=True)
class MetaModule:
    """A module on the meta device, and with which values and draws its tensors start."""

    module: torch.nn.Module
    watch: Watch
    """What was written into its tensors."""
    keeps: bool = False
    """Its vectors and fixed tables keep a start that is not understood: it is a library's, and no weight's."""

    @classmethod
    def of(cls, factory: Callable[[], torch.nn.Module], *, keeps: bool = False) -> "MetaModule":
        """Returns what a factory builds, allocating nothing."""
        return cls(*build_on_meta(factory), keeps)

    @cached_property
    def draws(self) -> Mapping[str, Draw]:
        """Each parameter's initial draw by name."""
        return {name: self.watch.draw_of(parameter) for name, parameter in named_parameters(self.module)}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Each parameter's shape by name."""
        return {name: tuple(parameter.shape) for name, parameter in named_parameters(self.module)}


def base_parameters(base: MetaModule, *wider: MetaModule, init_scale: float = 1.0) -> dict[str, ModuleParameter]:
    """Returns what a recipe has to know of each parameter: its shape, which sides grow, its initial draw.

    Args:
        base: the module at which every multiplier is 1.
        wider: modules of the same kind; a side grows if one of these has another size there.
        init_scale: what the tuning multiplied the library's draws by.

    Raises:
        InputError: a wider module has other parameters, or a draw is not understood; names them.
    """
    shapes, wide = base.shapes, [other.shapes for other in wider]
    for other in wide:
        _require_alike(shapes, other)
    _require_understood(base)
    found = {}
    for name, shape in shapes.items():
        draw = base.draws[name]
        found[name] = ModuleParameter(
            shape=shape,
            grows=tuple(any(other[name][d] != size for other in wide) for d, size in enumerate(shape)),
            init_std=None if draw.std is None else draw.std * init_scale,
            init_value=draw.value,
        )
    return found


def _require_understood(built: MetaModule) -> None:
    """Raises InputError for draws that are not understood: at base and target alike the std has to be known."""
    parameters, tables = dict(named_parameters(built.module)), embeddings_of(built.module)
    unknown = [
        name
        for name, draw in built.draws.items()
        if not draw.understood
        and not (built.keeps and (id(parameters[name]) in tables or _may_be_kept(name, parameters[name])))
    ]
    if unknown:
        raise InputError(
            f"{_listed(unknown)}: how it is drawn is not understood, so its std is unknown. Draw it in your own "
            "model with one of torch.nn.init's functions around 0; in place of a library's, choose another model."
        )


def _may_be_kept(name: str, parameter: torch.nn.Parameter) -> bool:
    """Returns whether a start that is not understood can be kept: nothing sums over a growing side of the parameter."""
    return not parameter.requires_grad or parameter.dim() <= 1 or name.endswith(STATES)


def _require_alike(one: Mapping[str, tuple[int, ...]], other: Mapping[str, tuple[int, ...]]) -> None:
    for name in (*one, *other):
        if name not in one or name not in other:
            raise InputError(
                f"{name}: only one of base and target has this parameter. Compare models of one architecture, which "
                "differ in width alone."
            )
        if len(one[name]) != len(other[name]):
            raise InputError(
                f"{name}: it has {len(one[name])} dimensions in one model and {len(other[name])} in the other."
            )


def _listed(names: list[str]) -> str:
    """Returns the first ones, and how many there are beside them: more would hide what is to be done."""
    shown = next(n for n in range(len(names), 0, -1) if n == 1 or len(", ".join(names[:n])) <= _LINE)
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return brief(", ".join(names[:shown]), _LINE) + more


_LINE = 90


# ---- base and target → the shapes that the rules compare -----------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """The facts about a model that its parameters do not say."""

    num_layers: int = 1
    readout: str | None = None
    """The weight of the model's own readout; None to find it: the last weight outside of layers with a fixed output."""
    base_attention: AttentionSettings | None = None
    """Of the base. None: of the target's head size."""
    base_attentions: Mapping[str, AttentionSettings] | None = None
    """Of the base, by name, in place of the one: they may be of several kinds."""
    summed: Mapping[str, int] = field(default_factory=dict)
    """Name of a parameter, without the number of its layer → the dimension over which a product with it was seen to
    sum."""
    counts_may_differ: bool = False
    """Base and target may have other numbers of experts."""


def model_shapes(
    target: MetaModule, base: Mapping[str, ModuleParameter], facts: Facts
) -> tuple[ModelShape, ModelShape]:
    """(base, target) as `theory.build_plan` takes them.

    Args:
        target: the model that is trained.
        base: by name in the target, or by the name of the same parameter in another layer.
        facts: what else is known.

    Raises:
        InputError: parameters that cannot be classified or that the base lacks, all of them by name.
    """
    _require_understood(target)
    families = by_family(base)
    at_base = {name: found for name in target.shapes if (found := _counterpart(name, base, families)) is not None}
    missing = [name for name in target.shapes if name not in at_base]
    if missing:
        raise InputError(
            f"{_listed(missing)}: the recipe's base has no such parameter, so its width ratio is unknown. Give the "
            "base the target's architecture."
        )
    members = Memberships(target.module)
    _require_base_is_not_more(target, at_base, base, members if facts.counts_may_differ else None)
    named = _tied_readout(target.module) if facts.readout is None else _own_name(target.module, facts.readout)
    pairs = _parameters(target, at_base, named, members, facts.summed)
    if facts.base_attentions is None:
        attention, of_base = attention_of(target.module), facts.base_attention
        places: _Places = ((), ())
    else:
        of_targets = attentions_of(target.module)
        attention, of_base = (next(iter(found.values()), None) for found in (of_targets, facts.base_attentions))
        places = _attention_places(facts.base_attentions, of_targets)
    of_base = of_base or attention
    readout = named or next((p.name for p, _ in reversed(pairs) if Property.READOUT in p.properties), None)

    def shape(tensors: tuple[Tensor, ...], own: AttentionSettings | None, places: tuple[Place, ...]) -> ModelShape:
        width = next(
            (t.fan_out if Property.EMBEDDING in t.properties else t.fan_in for t in tensors if t.name == readout), None
        )
        return ModelShape(
            tensors=tensors,
            hidden_size=1 if width is None else width.size,
            head_size=1 if own is None else own.head_size,
            stacks={"layers": Stack(facts.num_layers)},
            readout=readout,
            places=places,
            stock_softmax_scale=None if own is None else own.scale,
        )

    return (
        shape(tuple(of_base for of_base, _ in pairs), of_base, places[0]),
        shape(tuple(of_target for _, of_target in pairs), attention, places[1]),
    )


_Places = tuple[tuple[Place, ...], tuple[Place, ...]]


def _attention_places(base: Mapping[str, AttentionSettings], target: Mapping[str, AttentionSettings]) -> _Places:
    """Each attention of base and target as a place with heads of its own; none where all of a model are alike."""
    if all(len({settings.head_size for settings in found.values()}) <= 1 for found in (base, target)):
        return (), ()
    one, other = (
        tuple(
            Place(name, Acts.SCALE, SOFTMAX, heads=Heads(settings.head_size, settings.scale))
            for name, settings in found.items()
        )
        for found in (base, target)
    )
    return one, other


def _own_name(model: torch.nn.Module, name: str) -> str:
    """Returns the name that a parameter has in the plan; a tied one has a name in each of its modules.

    Raises:
        InputError: the model has no such parameter.
    """
    found = dict(named_parameters(model, shared=True)).get(name)
    if found is None:
        raise InputError(f"readout {name}: the model has no such parameter. Give one of model.named_parameters().")
    return next(own for own, parameter in named_parameters(model) if parameter is found)


def _tied_readout(model: torch.nn.Module) -> str | None:
    """Returns the table that a linear layer uses as its weight, if there is one."""
    linear = {id(m.weight) for m in model.modules() if linear_sides(m, "weight") is not None}
    return next((n for n, p in named_parameters(model) if id(p) in linear and id(p) in embeddings_of(model)), None)


def _counterpart(
    name: str, base: Mapping[str, ModuleParameter], families: Mapping[str, list[str]]
) -> ModuleParameter | None:
    """Returns what the base has for a parameter: of the same name, or of other layers where these are all alike."""
    if name in base:
        return base[name]
    alike = [base[other] for other in families.get(family_of(name), [])]
    return alike[0] if alike and all(other == alike[0] for other in alike) else None


def _require_base_is_not_more(
    target: MetaModule,
    at_base: Mapping[str, ModuleParameter],
    base: Mapping[str, ModuleParameter],
    members: Memberships | None,
) -> None:
    families = {family_of(name) for name in target.shapes}
    surplus = [name for name in base if family_of(name) not in families]
    if surplus:
        raise InputError(
            f"{_listed(surplus)}: the recipe's base has it and the target has not. Give the base the target's "
            f"architecture."
        )
    for name, shape in target.shapes.items():
        own = at_base[name]
        if len(own.shape) != len(shape):
            raise InputError(f"{name}: it has {len(own.shape)} dimensions in the recipe's base and {len(shape)} here.")
        counted = members and members.counted(name, shape, own.grows)
        for side, (size, base_size, grows) in enumerate(zip(shape, own.shape, own.grows, strict=True)):
            if size != base_size and not grows and side != counted:
                raise InputError(
                    f"{name}: a side that does not grow with width has size {base_size} in the recipe's base and "
                    f"{size} in the target (a vocabulary, a number of positions or classes). Give the base the "
                    "target's."
                )
    of_base, of_target = (
        sum(map(math.prod, shapes)) for shapes in ((own.shape for own in at_base.values()), target.shapes.values())
    )
    if of_base > of_target:
        raise InputError(
            f"the recipe's base has {of_base:,} parameters at the target's depth, and the target {of_target:,}. A "
            "base is the smaller of the two: were they exchanged?"
        )


# ---- one parameter -------------------------------------------------------------------------------------------------


def _parameters(
    target: MetaModule,
    at_base: Mapping[str, ModuleParameter],
    readout: str | None,
    members: Memberships,
    summed: Mapping[str, int],
) -> list[tuple[Tensor, Tensor]]:
    """(at the base, at the target) of each parameter, under the target's name."""
    modules = dict(named_modules(target.module))
    module_of = {
        id(parameter): (module, prefix, attribute)
        for prefix, module in modules.items()
        for attribute, parameter in module.named_parameters(recurse=False, remove_duplicate=False)
    } | embeddings_of(target.module)
    widened = _widened(target, at_base, modules)
    found, unclear = [], []
    for name, live in named_parameters(target.module):
        module, prefix, attribute = module_of[id(live)]
        base, draw = at_base[name], target.draws[name]
        layer = any(isinstance(modules.get(part), torch.nn.ModuleList) for part in _ancestors(prefix))
        shape, experts = tuple(live.shape), members.of(prefix)
        counted = members.counted(name, shape, base.grows)
        seen = Seen(
            name=name,
            module=module,
            attribute=attribute,
            grows=base.grows,
            in_layer=layer and name != readout,
            in_mixer=layer and any(is_mixer(modules[part]) for part in (*_ancestors(prefix), prefix)),
            draw=draw,
            experts=experts,
            counted=counted,
            routes=experts.around is not None and sum(base.grows) == 1 and (counted is not None or 1 in shape),
            summed=summed.get(family_of(name), declared_sum(module)),
            taken_up=any((_layer_of(prefix, modules), size) in widened for size in _taken_up(module, attribute, shape)),
        )
        parameters = classified(seen, base.shape), classified(seen, shape)
        if parameters[0] is None or parameters[1] is None:
            unclear.append(f"{name} {shape}")
            continue
        drawn = replace(parameters[1], start=start_of(draw.value, draw.std))
        found.append((replace(parameters[0], start=start_of(base.init_value, base.init_std)), drawn))
    if unclear:
        raise InputError(
            f"{_listed(unclear)}: which side is fan_in cannot be known from the layer. Supported are linear layers, "
            "convolutions, embeddings, norms, biases, and own parameters with embed, token or pos in the name."
        )
    return found


def _widened(
    target: MetaModule, at_base: Mapping[str, ModuleParameter], modules: Mapping[str, torch.nn.Module]
) -> set[tuple[str, int]]:
    """(layer, size) of what linear layers take up that has a fixed size, and give on in one that grows."""
    found = set()
    for name, shape in target.shapes.items():
        prefix, _, attribute = name.rpartition(".")
        order = linear_sides(modules[prefix], attribute) if prefix in modules else None
        if order is not None and (layer := _layer_of(prefix, modules)):
            fan_out, fan_in = order
            if at_base[name].grows[fan_out] and not at_base[name].grows[fan_in]:
                found.add((layer, shape[fan_in]))
    return found


def _taken_up(module: torch.nn.Module, attribute: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the sizes in which another layer may take up what a linear layer gives: gated, it is half of it."""
    order = linear_sides(module, attribute)
    return () if order is None else (shape[order[0]], shape[order[0]] // 2)


def _layer_of(name: str, modules: Mapping[str, torch.nn.Module]) -> str:
    """Returns the outermost of several layers that a module is in; empty where it is in none."""
    parts = [*_ancestors(name), name]
    return next((own for own in parts if isinstance(modules.get(own.rpartition(".")[0]), torch.nn.ModuleList)), "")


def _ancestors(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:n]) for n in range(1, len(parts))]
