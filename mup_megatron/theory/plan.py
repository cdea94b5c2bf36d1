"""The plan: every parameter's name → its role, shape, init std, multiplier, LR, eps and weight decay.

A plan is made once from the shapes of base and target, never changes, and is all that an adapter needs. It applies
the rules of `rules.py` to each tensor; it holds no rule of its own.
"""

import fnmatch
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from typing import Any

from mup_megatron.theory import rules
from mup_megatron.theory.errors import PlanError
from mup_megatron.theory.roles import Kind, Parameter, Ratios, Role, default_softmax_scale, ratios
from mup_megatron.theory.rules import Optimizer, Rule

_LAYER_INDEX = re.compile(r"\.\d+(?=\.|$)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Hyperparameters:
    """What is tuned at the base, as far as the rules depend on it."""

    lr: float
    min_lr: float
    init_method_std: float
    embedding_multiplier: float
    output_multiplier: float
    attention_multiplier: float
    weight_decay: float
    adam_eps: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Override:
    """A tensor's own tuned factors, relative to the rule. `match` is a shell pattern on the whole name at the base."""

    match: str
    lr_mult: float = 1.0
    init_mult: float = 1.0
    multiplier: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Parametrization:
    """Which rules apply."""

    rule: Rule = Rule.MUP
    optimizer: Optimizer = Optimizer.ADAM
    weight_decay_exponent: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """A model as the rules see it."""

    parameters: tuple[Parameter, ...]
    hidden_size: int
    """Size of the readout's input."""
    head_size: int
    """Of attention; 1 where there is none, which leaves every rule of attention at the identity."""
    num_layers: int
    readout: str | None
    """Name of the weight that computes the logits: a tied model's token embedding. None without a readout."""
    readout_norm: tuple[str, ...] = ()
    """Gain and bias of the norm before the readout: where a tied readout's multiplier can be folded."""
    query_norms: tuple[str, ...] = ()
    """Gains and biases of the norms of queries: where the scale of attention can be folded."""
    stock_softmax_scale: float | None = None
    """What its attention multiplies logits by if nothing is said; None for 1/√head_size."""
    stock_readout_scale: float = 1.0
    """What it multiplies the readout's input by, if nothing is said (T5: 1/√hidden_size)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanEntry:
    """One parameter: what it is and what it gets."""

    name: str
    role: Role
    kind: Kind
    shape: tuple[int, ...]
    """Global, not a rank's shard."""
    fan_in: int
    fan_out: int
    width_ratio: float
    """r_in; 1 where fan_in is finite."""
    init_std: float | None
    """None for what starts at a constant."""
    init_value: float | None
    """The constant; None for what is drawn at random."""
    multiplier: float
    """What the forward pass multiplies this weight by."""
    lr: float
    """The peak."""
    min_lr: float
    """The floor."""
    eps: float | None
    """None for SGD."""
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


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Every parameter of the target and what it gets, and the model's own multipliers."""

    fingerprint: str
    """The recipe's."""
    optimizer: Optimizer
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
    num_layers: int
    readout: str | None
    """Name of the weight that computes the logits: a tied model's token embedding. None without a readout."""
    readout_norm: tuple[str, ...]
    query_norms: tuple[str, ...]
    entries: tuple[PlanEntry, ...]
    stock_softmax_scale: float | None = None
    """What attention multiplies logits by if nothing is said; None for 1/√head_size."""
    stock_readout_ratio: float = 1.0
    """What the model itself multiplies the readout's input by, relative to the base: a part of `output_multiplier` that
    needs no doing."""

    @cached_property
    def by_name(self) -> Mapping[str, PlanEntry]:
        """Entries by global name."""
        return {entry.name: entry for entry in self.entries}

    def __getitem__(self, name: str) -> PlanEntry:
        """The entry of a parameter; PlanError if the plan does not know it."""
        try:
            return self.by_name[name]
        except KeyError:
            raise PlanError(
                f"{name}: the plan has no such parameter. The model does not match the model file, "
                "or it has a kind of layer that is not supported."
            ) from None

    @property
    def tied(self) -> bool:
        """Whether the readout is the token embedding."""
        return self.readout is not None and self[self.readout].kind is Kind.EMBEDDING

    @property
    def embedding_multiplier(self) -> float:
        """On the token embedding, in effect; another embedding can have an override of its own."""
        return next((entry.multiplier for entry in self.entries if entry.kind is Kind.EMBEDDING), 1.0)

    @property
    def changes_softmax_scale(self) -> bool:
        """Whether attention needs to be told another scale than the one it uses by itself."""
        stock = self.stock_softmax_scale
        return self.softmax_scale != (default_softmax_scale(self.head_size) if stock is None else stock)

    def to_json(self) -> dict[str, Any]:
        """Plain values; `from_json` gives the same plan back, bit by bit."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in {"entries", *_MODEL_KEYS}}
        model = {key: getattr(self, key) for key in _MODEL_KEYS}
        return {**own, "model": model, "parameters": [asdict(entry) for entry in self.entries]}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Plan":
        """The plan that `to_json` wrote.

        Raises:
            PlanError: keys are missing or unknown, or a role, kind or optimizer is none.
        """
        try:
            rest = {key: value for key, value in content.items() if key not in {"model", "parameters"}}
            rest["optimizer"] = Optimizer(rest["optimizer"])
            entries = tuple(_entry_from_json(entry) for entry in content["parameters"])
            model: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in content["model"].items()}
            for key in ("embedding_multiplier", "tied"):  # follow from the entries
                del model[key]
            return cls(**rest, **model, entries=entries)
        except (KeyError, TypeError, ValueError) as error:
            raise PlanError(f"Not a plan: {error}. Write it anew with `mup-megatron explain --format json`.") from None


_MODEL_KEYS = (
    "softmax_scale",
    "embedding_multiplier",
    "output_multiplier",
    "head_size",
    "num_layers",
    "tied",
    "readout",
    "readout_norm",
    "query_norms",
    "stock_softmax_scale",
    "stock_readout_ratio",
)


def build_plan(
    base: ModelShape,
    target: ModelShape,
    hyperparameters: Hyperparameters,
    *,
    parametrization: Parametrization,
    overrides: Iterable[Override] = (),
    fingerprint: str = "",
) -> Plan:
    """What every parameter of `target` gets, if `hyperparameters` were tuned at `base`.

    Parameters are matched by name, and else by the name without layer indices, so depth may differ.

    Raises:
        PlanError: a parameter of the target has no counterpart in the base, an override matches nothing or asks for
            something that its tensor does not have. Names the parameter.
    """
    overrides = tuple(overrides)
    at_base = {parameter.name: parameter for parameter in base.parameters}
    families = _by_family(base.parameters)
    standard = parametrization.rule is Rule.STANDARD
    h = hyperparameters
    entries = []
    for parameter in target.parameters:
        counterpart = at_base.get(parameter.name) or _of_family(families, parameter)
        r = Ratios(1.0, 1.0) if standard else ratios(counterpart, parameter)
        std_at_base = counterpart.init_std
        if (std_at_base is None) != (parameter.init_std is None):
            raise PlanError(
                f"{parameter.name}: it starts at a constant in one of base and target and is drawn at random in the "
                "other. Initialise both alike."
            )
        entry = _entry(parameter, r, h, parametrization, num_layers=target.num_layers, std_at_base=std_at_base)
        entries.append(_overridden(entry, parameter, overrides))
    _require_all_used(overrides, target.parameters)
    _require_multiplied(h, target)
    # A tied readout has no row of its own; what it computes is the output role all the same.
    readout = Ratios(1.0, 1.0) if standard else Ratios(target.hidden_size / base.hidden_size, 1.0)
    tied_output = rules.multiplier(Role.OUTPUT, Kind.HEAD, readout, embedding=1.0, output=h.output_multiplier)
    output = next((entry.multiplier for entry in entries if _is_own_readout(entry, target)), tied_output)
    return Plan(
        fingerprint=fingerprint,
        optimizer=parametrization.optimizer,
        lr=h.lr,
        min_lr=h.min_lr,
        weight_decay=h.weight_decay,
        adam_eps=h.adam_eps,
        softmax_scale=rules.softmax_scale(
            base_head_size=target.head_size if standard else base.head_size,
            head_size=target.head_size,
            alpha=h.attention_multiplier,
            stock=(target if standard else base).stock_softmax_scale,
        ),
        head_size=target.head_size,
        output_multiplier=output,
        num_layers=target.num_layers,
        readout=target.readout,
        readout_norm=target.readout_norm,
        query_norms=target.query_norms,
        entries=tuple(entries),
        stock_softmax_scale=target.stock_softmax_scale,
        stock_readout_ratio=1.0 if standard else target.stock_readout_scale / base.stock_readout_scale,
    )


def _is_own_readout(entry: PlanEntry, shape: ModelShape) -> bool:
    return entry.kind is Kind.HEAD and entry.name == shape.readout


def _require_multiplied(h: Hyperparameters, shape: ModelShape) -> None:
    """Raises PlanError for a multiplier of something that the model has not."""
    embeds = any(parameter.kind is Kind.EMBEDDING for parameter in shape.parameters)
    for key, value, there in (
        ("embedding_multiplier", h.embedding_multiplier, embeds),
        ("output_multiplier", h.output_multiplier, shape.readout is not None),
    ):
        if value != 1.0 and not there:
            what = "embedding" if key == "embedding_multiplier" else "readout"
            raise PlanError(f"{key} is {value:g}, and the model has no {what} that it could act on. Set it to 1.")


def _entry_from_json(content: Mapping[str, Any]) -> PlanEntry:
    typed = {"role": Role(content["role"]), "kind": Kind(content["kind"]), "shape": tuple(content["shape"])}
    return PlanEntry(**{**content, **typed})


def _entry(
    parameter: Parameter,
    r: Ratios,
    h: Hyperparameters,
    parametrization: Parametrization,
    *,
    num_layers: int,
    std_at_base: float | None,
) -> PlanEntry:
    role, kind, optimizer = parameter.role, parameter.kind, parametrization.optimizer
    if std_at_base is None:
        std = rules.init_std(role, kind, r, sigma=h.init_method_std, num_layers=num_layers)
    else:
        std = rules.carried_init_std(role, r, std_at_base=std_at_base)
    return PlanEntry(
        name=parameter.name,
        role=role,
        kind=kind,
        shape=parameter.shape,
        fan_in=parameter.fan_in.size,
        fan_out=parameter.fan_out.size,
        width_ratio=r.r_in,
        init_std=None if parameter.init_value is not None else std,
        init_value=parameter.init_value,
        multiplier=rules.multiplier(role, kind, r, embedding=h.embedding_multiplier, output=h.output_multiplier),
        lr=rules.learning_rate(role, optimizer, r, eta=h.lr),
        # The same rule, so that the whole schedule keeps its shape.
        min_lr=rules.learning_rate(role, optimizer, r, eta=h.min_lr),
        eps=rules.adam_eps(role, r, epsilon=h.adam_eps) if optimizer is Optimizer.ADAM else None,
        weight_decay=rules.weight_decay(
            role, kind, optimizer, r, lam=h.weight_decay, exponent=parametrization.weight_decay_exponent
        ),
        rule=f"{parametrization.rule}.{optimizer}.{role}" + (".residual" if kind is Kind.RESIDUAL else ""),
        padded_to=parameter.padded_to,
        library_std=parameter.init_std,
    )


def _overridden(entry: PlanEntry, parameter: Parameter, overrides: tuple[Override, ...]) -> PlanEntry:
    """The entry with the first override that matches its name."""
    index, own = next(((i, o) for i, o in enumerate(overrides) if _matches(o, parameter)), (None, None))
    if own is None:
        return entry
    if entry.kind.is_vector and (own.multiplier, own.init_mult) != (1.0, 1.0):
        raise PlanError(
            f"per_parameter[{index}] '{own.match}': {entry.name} is a bias or gain, which has no multiplier and no "
            "init std. Narrow the pattern, or put one before it that matches the vectors with lr_mult alone."
        )
    return replace(
        entry,
        init_std=None if entry.init_std is None else entry.init_std * own.init_mult,
        multiplier=entry.multiplier * own.multiplier,
        lr=entry.lr * own.lr_mult,
        min_lr=entry.min_lr * own.lr_mult,
        rule=f"{entry.rule} × per_parameter[{index}]",
    )


def _matches(override: Override, parameter: Parameter) -> bool:
    return fnmatch.fnmatchcase(parameter.name_at_base or parameter.name, override.match)


def _require_all_used(overrides: tuple[Override, ...], parameters: Iterable[Parameter]) -> None:
    parameters = tuple(parameters)
    for index, override in enumerate(overrides):
        if not any(_matches(override, parameter) for parameter in parameters):
            raise PlanError(
                f"per_parameter[{index}] '{override.match}' matches no parameter of the target. Correct the pattern; "
                "`mup-megatron explain` lists the names. A tied readout has none: use output_multiplier."
            )


def family_of(name: str) -> str:
    """A name without its layer index: what is the same at every depth."""
    return _LAYER_INDEX.sub(".*", name)


def _by_family(parameters: Iterable[Parameter]) -> dict[str, list[Parameter]]:
    families: dict[str, list[Parameter]] = {}
    for parameter in parameters:
        families.setdefault(family_of(parameter.name), []).append(parameter)
    return families


def _of_family(families: Mapping[str, list[Parameter]], parameter: Parameter) -> Parameter:
    """What the base has for a parameter of a layer that it has not."""
    alike = families.get(family_of(parameter.name))
    if not alike:
        raise PlanError(
            f"{parameter.name}: the base has no such parameter, so its width ratio is unknown. "
            "Give the base the target's architecture."
        )
    first = alike[0]
    for other in alike:
        if (first.fan_in, first.fan_out) != (other.fan_in, other.fan_out):
            raise PlanError(
                f"{other.name}: the base has layers of different sizes (compare {first.name}), so no width ratio "
                "is defined. Give the base layers of one size, or the target's depth."
            )
    return first
