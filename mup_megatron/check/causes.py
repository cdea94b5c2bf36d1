"""Which mistake explains what is off: names the culprit and ranks likely causes. Plain numbers and plans.

Initial weights, the first activations and what the optimizer's steps betray (learning rate, eps, weight decay) are
direct: each follows from one rule, in one place. So every hypothesis is a prediction of how far each of these is off at
each width, made from the right plans: "not divided by r_in" says log r_in for the learning rates of hidden weights, and
0 for everything else. Its share is how much of the observed squared deviation it takes away, less what it predicts and
is not there.

An activation is direct only where the weights and activations that it is computed from are as they should be: then
something in the forward pass itself is different. Gradients, updates, spectral norms and overlaps are consequences;
they are asked only where nothing direct is off.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean, median

from mup_megatron.check import levels
from mup_megatron.check.comparison import Compared, Comparison
from mup_megatron.check.entries import (
    is_any,
    is_bias,
    is_embedding,
    is_gain,
    is_hidden,
    is_input_role,
    is_readout,
    is_residual,
    is_vector,
)
from mup_megatron.check.measurements import FROM_STEPS, Key, Protocol, Quantity
from mup_megatron.models.model_file import ModelFile
from mup_megatron.recipe import PerParameter, Recipe
from mup_megatron.theory import Kind, Optimizer, Plan, PlanEntry, Role, family_of

TOLD = 3
LEAST_SHARE = 0.15
"""What explains less is not told."""
NEAR = 0.25
"""Nor what explains so much less than the best, of the same."""
SURE = 0.5
"""Below this no hypothesis fits, and what is off first is named before them."""
CAP = 3.0
"""Of log deviations: what is 0 and should not be, or the reverse, is not infinitely more than all the rest."""
GONE = -2.0
"""A log deviation that only a value of about 0 has."""
ARISEN = 1.0
"""A log deviation that something has which should be 0, at least."""

ANY = math.nan
"""A prediction that takes whatever is there."""


@dataclass(frozen=True, slots=True)
class Cause:
    """A likely cause."""

    name: str
    """Stable, for programs: "learning-rate-collapsed"."""
    sentence: str
    """What it is, and what to do."""
    culprit: str
    """The parameter or activation where it shows first."""
    share: float
    """Of the deviation that it explains, 0 to 1."""


def causes(
    comparison: Comparison,
    plans: Mapping[int, Plan],
    recipe: Recipe,
    models: Mapping[int, ModelFile] | None,
) -> tuple[Cause, ...]:
    """Likely causes of what is off in a comparison, best first; none if nothing is off.

    Args:
        comparison: of subject and reference.
        plans: width → the right plan.
        recipe: that they were made with.
        models: width → its shape, of a GPT; without, mistakes inside a fused weight have no name of their own.
    """
    if all(compared.off is None for compared in comparison.values()):
        return ()
    at = {width: AtWidth(plan, recipe, None if models is None else models[width]) for width, plan in plans.items()}
    observed = _observed(comparison, at)
    total = sum(o.weight * o.deviation**2 for o in observed)
    if total == 0:
        return (_indirect(comparison, at),)
    told = _told(_hypotheses(at, observed), observed, total)
    if told and told[0].share >= SURE:
        return tuple(told)
    return (_first_off(observed, total), *told[: TOLD - 1])


# ---- what is known at one width ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AtWidth:
    """The right plan at one width, in the terms of hypotheses."""

    plan: Plan
    recipe: Recipe
    model: ModelFile | None

    @cached_property
    def r(self) -> float:
        """How much wider the residual stream is than the base's."""
        for entry in self.plan.entries:
            if entry.role is Role.OUTPUT:
                return entry.width_ratio
        return next((self.r_out(entry) for entry in self.plan.entries if entry.kind is Kind.EMBEDDING), 1.0)

    def r_out(self, entry: PlanEntry) -> float:
        """The ratio of a tensor's fan_out, as its eps or, with SGD, its learning rate has it."""
        if entry.role not in (Role.INPUT, Role.HIDDEN):
            return 1.0
        if entry.eps is not None:
            return self.plan.adam_eps / entry.eps
        return entry.lr * entry.width_ratio / (self.plan.lr * self.own_rate(entry))

    def own(self, entry: PlanEntry) -> PerParameter | None:
        """What the recipe's per_parameter says of a tensor."""
        match = _OVERRIDE.search(entry.rule)
        return None if match is None else self.recipe.per_parameter[int(match[1])]

    def own_rate(self, entry: PlanEntry) -> float:
        """Its factor on the learning rate."""
        own = self.own(entry)
        return 1.0 if own is None else own.lr_mult

    @property
    def alpha(self) -> float:
        """The recipe's attention multiplier."""
        return self.recipe.hyperparameters.attention_multiplier

    @property
    def depth_at_base(self) -> int | None:
        """Layers of the base, if it is a GPT."""
        return self.recipe.base.num_layers if isinstance(self.recipe.base, ModelFile) else None


_OVERRIDE = re.compile(r"per_parameter\[(\d+)\]")
_LAYER = re.compile(r"^(?:.*\.)?layers\.(\d+)(?:\.|$)")


def _layer_of(name: str) -> int | None:
    match = _LAYER.match(name)
    return None if match is None else int(match[1])


# ---- what is observed ----------------------------------------------------------------------------------------------

DIRECT = (Quantity.INITIAL, Quantity.ACTIVATION, *FROM_STEPS)
"""In causal order."""


@dataclass(frozen=True, slots=True)
class Observation:
    """How far one direct measurement is off at one width."""

    key: Key
    width: int
    deviation: float
    """0 for what seeds and tolerance allow."""
    weight: float
    """So that what is measured at many steps counts once."""


def _observed(comparison: Comparison, at: Mapping[int, AtWidth]) -> list[Observation]:
    """Everything direct, in causal order, without what only follows from something else that is off."""
    plan = next(iter(at.values())).plan
    keys = [key for key in comparison if key.quantity in DIRECT and not _follows(key, comparison, plan)]
    steps: dict[tuple[Quantity, str], int] = {}
    for key in keys:
        steps[key.quantity, key.name] = steps.get((key.quantity, key.name), 0) + 1
    order = {entry.name: index for index, entry in enumerate(plan.entries)}

    def causal(key: Key) -> tuple[int, tuple[int, ...], str, int]:
        place = _forward_place(key.name) if key.quantity is Quantity.ACTIVATION else (order.get(key.name, len(order)),)
        return DIRECT.index(key.quantity), place, key.name, key.step

    return [
        Observation(key, width, _deviation(comparison[key], width), 1 / steps[key.quantity, key.name])
        for key in sorted(keys, key=causal)
        for width in at
        if width in comparison[key].deviations
    ]


def _deviation(compared: Compared, width: int) -> float:
    return 0.0 if compared.off is None else _capped(compared.deviations[width])


def _capped(deviation: float) -> float:
    return max(-CAP, min(CAP, deviation))


def _follows(key: Key, comparison: Comparison, plan: Plan) -> bool:
    """Whether an activation that is off may be so because of what it is computed from."""
    if key.quantity is not Quantity.ACTIVATION:
        return False
    if key.step != 0:
        return True
    if comparison[key].off is None:
        return False
    inputs = [Key(Quantity.ACTIVATION, name, 0) for name in _computed_from(key.name, plan)]
    weights = [Key(Quantity.INITIAL, name, 0) for name in _weights_of(key.name, plan)]
    before = [comparison[k] for k in (*inputs, *weights) if k in comparison and comparison[k].off is not None]
    if _is_gone(comparison[key]):
        # A nothing needs a nothing to follow from.
        return any(_is_gone(compared) for compared in before)
    return bool(before)


def _is_gone(compared: Compared) -> bool:
    return compared.off is not None and max(compared.deviations.values()) < GONE


_PLACES = (
    "input_layernorm",
    "linear_qkv",
    "q_layernorm",
    "k_layernorm",
    "scale_mask_softmax",
    "linear_proj",
    "pre_mlp_layernorm",
    "linear_fc1",
    "linear_fc2",
)
"""Of a layer's modules, in the order in which they are computed."""


def _forward_place(name: str) -> tuple[int, ...]:
    layer = _layer_of(name)
    if layer is not None:
        last = name.rpartition(".")[2]
        return (1, layer, _PLACES.index(last) if last in _PLACES else len(_PLACES))
    if "embedding" in name:
        return (0, "word" not in name)
    return (2, "final" not in name)


def _computed_from(name: str, plan: Plan) -> list[str]:
    """The activations that a GPT's activation is computed from, as far as they are measured."""
    layer, last = _layer_of(name), name.rpartition(".")[2]
    if layer is None:
        if last == "final_layernorm":
            return [f"decoder.layers.{plan.num_layers - 1}"]
        return ["decoder.final_layernorm"] if last == "output_layer" else []
    here = f"decoder.layers.{layer}"
    stream = [f"decoder.layers.{layer - 1}"] if layer else [f"embedding.{kind}_embeddings" for kind in _TABLES]
    attention, mlp = f"{here}.self_attention", f"{here}.mlp"
    qkv, proj = f"{attention}.linear_qkv", f"{attention}.linear_proj"
    return {
        "input_layernorm": stream,
        "linear_qkv": [f"{here}.input_layernorm"],
        "q_layernorm": [qkv],
        "k_layernorm": [qkv],
        "scale_mask_softmax": [qkv, f"{attention}.q_layernorm", f"{attention}.k_layernorm"],
        "linear_proj": [qkv, f"{attention}.core_attention.scale_mask_softmax"],
        "pre_mlp_layernorm": [*stream, proj],
        "linear_fc1": [f"{here}.pre_mlp_layernorm"],
        "linear_fc2": [f"{mlp}.linear_fc1"],
    }.get(last, [*stream, proj, f"{mlp}.linear_fc2"])


_TABLES = ("word", "position")


def _weights_of(name: str, plan: Plan) -> list[str]:
    own = [entry.name for entry in plan.entries if entry.name.rpartition(".")[0] == name]
    if name.rpartition(".")[2] == "output_layer" and not own and plan.readout is not None:
        return [plan.readout]
    return own


# ---- hypotheses ----------------------------------------------------------------------------------------------------

Predict = Callable[[Key, int], float]


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A mistake and what it would look like."""

    name: str
    sentence: str
    predict: Predict
    """(key, width) → log deviation; ±inf for what is gone or has arisen, NaN for whatever is there."""
    prior: float = 1.0
    """Below 1 for what fits anything of its kind: a mistake that says more comes first."""


@dataclass(frozen=True, slots=True)
class _Explained:
    """A hypothesis against observations."""

    cause: Cause
    worth: float
    predicted: tuple[float, ...]


def _told(hypotheses: Sequence[Hypothesis], observed: Sequence[Observation], total: float) -> list[Cause]:
    """The best; what explains the rest, if there is enough of it; else what explains nearly as much."""
    first = _ranked(hypotheses, observed, total)
    if not first or first[0].cause.share < LEAST_SHARE:
        return []
    told, rest, best = [first[0].cause], observed, first[0]
    while len(told) < TOLD:
        rest = [o for o, p in zip(rest, best.predicted, strict=True) if p == 0]
        further = _ranked(hypotheses, rest, total)
        if not further or further[0].cause.share < LEAST_SHARE:
            break
        best = further[0]
        told.append(best.cause)
    # What fits anything of its kind adds nothing to what fits as well and says why.
    exact = [e.cause for e in first if e.worth == e.cause.share]
    near = [cause for cause in exact if cause.share > max(LEAST_SHARE, told[0].share - NEAR)]
    names = [cause.name for cause in told]
    return [*told, *(cause for cause in near if cause.name not in names)][:TOLD]


def _ranked(hypotheses: Iterable[Hypothesis], observed: Sequence[Observation], total: float) -> list[_Explained]:
    """Best first, of each name the best. `total` is the squared deviation that shares are of."""
    squares = sum(o.weight * o.deviation**2 for o in observed)
    off = [o for o in observed if o.deviation != 0]
    found: dict[str, _Explained] = {}
    seen: list[tuple[float, ...]] = []
    for hypothesis in hypotheses:
        first = next((o for o in off if hypothesis.predict(o.key, o.width) != 0), None)
        if first is None:
            continue
        predicted = tuple(_resolved(hypothesis.predict(o.key, o.width), o.deviation) for o in observed)
        left = sum(o.weight * (o.deviation - p) ** 2 for o, p in zip(observed, predicted, strict=True))
        share = (squares - left) / total
        # Of two that predict the same, the first is told: the list of hypotheses goes from likely to unlikely.
        if share <= 0 or any(_alike(predicted, other) for other in seen):
            continue
        seen.append(predicted)
        cause = Cause(hypothesis.name, hypothesis.sentence, first.key.name, share)
        explained = _Explained(cause, share * hypothesis.prior, predicted)
        if cause.name not in found or found[cause.name].worth < explained.worth:
            found[cause.name] = explained
    return sorted(found.values(), key=lambda explained: -explained.worth)


def _resolved(predicted: float, deviation: float) -> float:
    if predicted == 0:
        return 0.0
    if math.isnan(predicted):
        return deviation
    if math.isinf(predicted):
        return min(deviation, GONE) if predicted < 0 else max(deviation, ARISEN)
    return _capped(predicted)


def _alike(one: Sequence[float], other: Sequence[float]) -> bool:
    return all(abs(a - b) < 1e-6 for a, b in zip(one, other, strict=True))


def _hypotheses(at: Mapping[int, AtWidth], observed: Sequence[Observation]) -> list[Hypothesis]:
    """From those that say most to those that fit anything."""
    return [
        *_whole_plan(at),
        *_forward(at),
        *_rates(at),
        *_schedule(at),
        *_eps(at),
        *_decay(at),
        *_initial(at),
        *_powers(at),
        *_whatever(at, observed),
    ]


Select = Callable[[PlanEntry], bool]
LogFactor = Callable[[PlanEntry, AtWidth], float]


def _of_weights(
    name: str,
    sentence: str,
    quantity: Quantity | Mapping[Quantity, LogFactor],
    at: Mapping[int, AtWidth],
    select: Select = lambda _: True,
    factor: LogFactor = lambda _e, _w: 0.0,
) -> Hypothesis:
    """About parameters; the same at all steps at which there is a learning rate."""
    factors = quantity if isinstance(quantity, Mapping) else {quantity: factor}

    def predict(key: Key, width: int) -> float:
        here = at[width]
        entry = here.plan.by_name.get(key.name)
        if key.quantity not in factors or entry is None or not select(entry) or _at_rest(key, here):
            return 0.0
        return factors[key.quantity](entry, here)

    return Hypothesis(name, sentence, predict)


def _at_rest(key: Key, at: AtWidth) -> bool:
    """Whether it is a learning rate of 0: of the first step of a warm-up."""
    return key.quantity is Quantity.LEARNING_RATE and key.step == 1 and at.recipe.schedule.lr_warmup_fraction > 0


def _not_hidden(entry: PlanEntry) -> bool:
    return entry.role is not Role.HIDDEN


def _linear_bias(entry: PlanEntry) -> bool:
    return entry.kind is Kind.BIAS and "norm" not in entry.name


def _matrix(entry: PlanEntry) -> bool:
    return not entry.kind.is_vector


def _ratio_in(entry: PlanEntry, _: AtWidth) -> float:
    return math.log(entry.width_ratio)


def _log(value: float) -> float:
    return math.log(value) if value > 0 else 0.0


def _whole_plan(at: Mapping[int, AtWidth]) -> list[Hypothesis]:
    exponent = next(iter(at.values())).recipe.parametrization.weight_decay_exponent
    standard = _of_weights(
        "standard-parametrization",
        "everything has the base's values: no rule of μP is applied. Make the plan for this target and apply it.",
        {
            Quantity.INITIAL: lambda e, _: 0.5 * math.log(e.width_ratio) if is_hidden(e) else 0.0,
            Quantity.LEARNING_RATE: lambda e, w: math.log(w.plan.lr * w.own_rate(e) / e.lr),
            Quantity.EPS: lambda e, w: 0.0 if e.eps is None else math.log(w.plan.adam_eps / e.eps),
            Quantity.WEIGHT_DECAY: lambda e, w: _log(w.plan.weight_decay) - _log(e.weight_decay) if _matrix(e) else 0.0,
        },
        at,
    )
    readout, attention = _at_readout(lambda w: math.log(w.r)), _at_logits(_root_of_head)

    def standard_forward(key: Key, width: int) -> float:
        here = at[width]
        return standard.predict(key, width) + readout(key, here) + attention(key, here)

    def overrides(key: Key, width: int) -> float:
        here = at[width]
        if key.quantity is Quantity.ACTIVATION:
            module = next((e for e in here.plan.entries if e.name == f"{key.name}.weight"), None)
            own = None if module is None else here.own(module)
            return 0.0 if own is None else -math.log(own.multiplier)
        entry = here.plan.by_name.get(key.name)
        own = None if entry is None else here.own(entry)
        if own is None or _at_rest(key, here):
            return 0.0
        factor = {Quantity.LEARNING_RATE: own.lr_mult, Quantity.INITIAL: own.init_mult}.get(key.quantity, 1.0)
        return -math.log(factor) if factor > 0 else math.inf

    return [
        Hypothesis(standard.name, standard.sentence, standard_forward),
        _of_weights(
            "one-width-ratio",
            "one ratio, of hidden sizes, is used for every tensor. Give each tensor the ratios of its own fan_in and "
            "fan_out: ffn, heads and key/value groups may grow otherwise than hidden_size.",
            {
                Quantity.INITIAL: lambda e, w: 0.5 * math.log(e.width_ratio / w.r),
                Quantity.LEARNING_RATE: lambda e, w: math.log(e.width_ratio / w.r),
                Quantity.EPS: lambda e, w: math.log(w.r_out(e) / w.r),
                Quantity.WEIGHT_DECAY: lambda e, w: exponent * math.log(w.r / e.width_ratio),
            },
            at,
            is_hidden,
        ),
        Hypothesis(
            "overrides-dropped",
            "the recipe's per_parameter is not applied. Pass it on with the recipe.",
            overrides,
        ),
    ]


# ---- hypotheses: the forward pass ----------------------------------------------------------------------------------

OfActivation = Callable[[Key, AtWidth], float]


def _at(ending: str | tuple[str, ...], factor: Callable[[AtWidth], float]) -> OfActivation:
    def predict(key: Key, here: AtWidth) -> float:
        return factor(here) if key.quantity is Quantity.ACTIVATION and key.name.endswith(ending) else 0.0

    return predict


def _at_readout(factor: Callable[[AtWidth], float]) -> OfActivation:
    def predict(key: Key, here: AtWidth) -> float:
        readout = here.plan.readout
        of_weight = "output_layer" if readout is None or here.plan.tied else readout.rpartition(".")[0]
        return _at(of_weight, factor)(key, here)

    return predict


def _at_logits(factor: Callable[[AtWidth], float]) -> OfActivation:
    return _at("scale_mask_softmax", factor)


def _root_of_head(here: AtWidth) -> float:
    """From what attention should have to 1/√d."""
    return math.log(here.alpha / math.sqrt(here.plan.head_size) / here.plan.softmax_scale)


def _forward(at: Mapping[int, AtWidth]) -> list[Hypothesis]:
    def h(name: str, sentence: str, predict: OfActivation) -> Hypothesis:
        return Hypothesis(name, sentence, lambda key, width: predict(key, at[width]))

    return [
        h(
            "attention-sqrt-d",
            "attention logits are scaled by 1/√d. Set softmax_scale to α·√d_base/d, which falls as 1/d.",
            _at_logits(_root_of_head),
        ),
        h(
            "attention-no-base",
            "attention logits are scaled by 1/d alone. Set softmax_scale to α·√d_base/d, as at the base.",
            _at_logits(lambda w: math.log(w.alpha / w.plan.head_size / w.plan.softmax_scale)),
        ),
        h(
            "attention-multiplier-dropped",
            "the recipe's attention_multiplier is not applied. Multiply softmax_scale by it.",
            _at_logits(lambda w: -math.log(w.alpha)),
        ),
        h(
            "attention-multiplier-twice",
            "the recipe's attention_multiplier is applied twice. Apply it once, in softmax_scale.",
            _at_logits(lambda w: math.log(w.alpha)),
        ),
        h(
            "readout-multiplied-twice",
            "the readout's multiplier is applied twice. Leave it to the plan's hook, or take that away.",
            _at_readout(lambda w: math.log(w.plan.output_multiplier)),
        ),
        h(
            "readout-not-multiplied",
            "the readout's multiplier α_out/r is not applied. Multiply the readout's input by it.",
            _at_readout(lambda w: -math.log(w.plan.output_multiplier)),
        ),
        h(
            "readout-ratio-dropped",
            "the readout's 1/r is lost: α_out replaced it. Multiply by both.",
            _at_readout(lambda w: math.log(w.r)),
        ),
        h(
            "output-multiplier-dropped",
            "the recipe's output_multiplier is lost: 1/r replaced it. Multiply the logits by both.",
            _at_readout(lambda w: -math.log(w.recipe.hyperparameters.output_multiplier)),
        ),
        h(
            "embedding-multiplier-dropped",
            "the recipe's embedding_multiplier is not applied. Multiply token and position embeddings by it.",
            _at("_embeddings", lambda w: -math.log(w.recipe.hyperparameters.embedding_multiplier)),
        ),
        h(
            "embedding-multiplier-twice",
            "the recipe's embedding_multiplier is applied twice. Apply it once.",
            _at("_embeddings", lambda w: math.log(w.recipe.hyperparameters.embedding_multiplier)),
        ),
        h(
            "embedding-multiplier-on-tokens-only",
            "the recipe's embedding_multiplier is not applied to positions. Multiply the sum of both tables by it.",
            _at("position_embeddings", lambda w: -math.log(w.recipe.hyperparameters.embedding_multiplier)),
        ),
    ]


# ---- hypotheses: the optimizer -------------------------------------------------------------------------------------


def _rates(at: Mapping[int, AtWidth]) -> list[Hypothesis]:
    lr = Quantity.LEARNING_RATE
    return [
        _of_weights(
            "learning-rate-collapsed",
            "all groups have one learning rate, the base's. Give hidden weights η/r_in: look for what overwrites the "
            "groups' lr, as a scheduler that does not know max_lr, or a launcher that merges groups.",
            lr,
            at,
            is_any,
            lambda e, w: math.log(w.plan.lr / e.lr),
        ),
        _of_weights(
            "learning-rate-all-divided",
            "all groups have the hidden weights' learning rate. Divide by r for hidden weights alone: embeddings, "
            "gains, biases and the readout keep η.",
            lr,
            at,
            _not_hidden,
            lambda _, w: -math.log(w.r),
        ),
        _of_weights(
            "learning-rate-by-fan-out",
            "the learning rate of hidden weights follows fan_out. Divide by the ratio of fan_in.",
            lr,
            at,
            is_hidden,
            lambda e, w: math.log(e.width_ratio / w.r_out(e)),
        ),
    ]


def _protocol(step: int) -> Protocol:
    return levels.EARLY if step <= levels.EARLY.steps else levels.LATE


def _schedule(at: Mapping[int, AtWidth]) -> list[Hypothesis]:
    def start(key: Key, width: int) -> float:
        if key.quantity is not Quantity.LEARNING_RATE:
            return 0.0
        warm = at[width].recipe.schedule.lr_warmup_fraction * _protocol(key.step).steps
        if _at_rest(key, at[width]):
            return math.inf
        return ANY if key.step - 1 < warm else 0.0

    def floor(other: Callable[[PlanEntry, Plan], float]) -> Predict:
        def predict(key: Key, width: int) -> float:
            here = at[width]
            entry = here.plan.by_name.get(key.name)
            if key.quantity is not Quantity.LEARNING_RATE or entry is None or _at_rest(key, here):
                return 0.0
            down = _descended(key.step, here.recipe)
            right, wrong = ((1 - down) * entry.lr + down * f for f in (entry.min_lr, other(entry, here.plan)))
            return math.log(wrong / right) if right > 0 and wrong > 0 else 0.0

        return predict

    return [
        Hypothesis(
            "warm-up-start",
            "the warm-up does not start at 0: one starting value for all groups breaks their ratios. Start at 0, or "
            "scale the start as the peak.",
            start,
        ),
        Hypothesis(
            "learning-rate-floor",
            "all groups decay to the base's min_lr. Scale the floor of each group as its peak.",
            floor(lambda _, plan: plan.min_lr),
        ),
        Hypothesis(
            "learning-rate-floor",
            "the learning rates decay to 0 instead of the recipe's min_lr. Pass min_lr on, scaled as the peak.",
            floor(lambda _e, _p: 0.0),
        ),
    ]


def _descended(step: int, recipe: Recipe) -> float:
    """How much of the way from peak to floor a check's linear schedule has gone in a step, counted from 1."""
    steps = _protocol(step).steps
    warm, end = (f * steps for f in (recipe.schedule.lr_warmup_fraction, recipe.schedule.lr_decay_fraction))
    return max(0.0, min(1.0, (step - 1 - warm) / (end - warm)))


def _eps(at: Mapping[int, AtWidth]) -> list[Hypothesis]:
    if next(iter(at.values())).plan.optimizer is not Optimizer.ADAM:
        return []

    def unscaled(entry: PlanEntry, here: AtWidth) -> float:
        return 0.0 if entry.eps is None else math.log(here.plan.adam_eps / entry.eps)

    def h(name: str, sentence: str, select: Select, factor: LogFactor) -> Hypothesis:
        return _of_weights(name, sentence, Quantity.EPS, at, select, factor)

    rule = "Divide ε by the ratio of fan_out, the readout's by that of fan_in."
    return [
        h("eps-not-scaled", f"Adam's eps is the base's for all. {rule}", is_any, unscaled),
        h(
            "eps-not-scaled-for-inputs",
            "Adam's eps is the base's for embeddings, gains and biases, as in Megatron's own μP. Their gradients "
            f"shrink with width too. {rule}",
            is_input_role,
            unscaled,
        ),
        h(
            "eps-not-scaled-for-embeddings",
            f"Adam's eps is the base's for embeddings. {rule}",
            is_embedding,
            unscaled,
        ),
        h("hidden-eps", f"Adam's eps is the base's for hidden weights. {rule}", is_hidden, unscaled),
        h("readout-eps", f"Adam's eps is the base's for the readout. {rule}", is_readout, unscaled),
        h(
            "eps-scaled-twice",
            "Adam's eps is divided by the ratio twice. Give the plan's eps to the groups, and nothing else.",
            is_any,
            lambda e, w: -unscaled(e, w),
        ),
        h(
            "eps-by-fan-in",
            f"Adam's eps of hidden weights follows fan_in. {rule}",
            is_hidden,
            lambda e, w: math.log(w.r_out(e) / e.width_ratio),
        ),
    ]


def _decay(at: Mapping[int, AtWidth]) -> list[Hypothesis]:
    exponent = next(iter(at.values())).recipe.parametrization.weight_decay_exponent
    wd = Quantity.WEIGHT_DECAY
    return [
        _of_weights(
            "weight-decay-not-compensated",
            "the weight decay of hidden weights is not multiplied by r where their learning rate was divided by it, so "
            "they decay r times as slowly. Give them λ·r_in.",
            wd,
            at,
            is_hidden,
            lambda e, _: -exponent * math.log(e.width_ratio),
        ),
        _of_weights(
            "weight-decay-on-vectors",
            "biases and gains have weight decay. Put them into groups without.",
            wd,
            at,
            is_vector,
            lambda _e, _w: math.inf,
        ),
        _of_weights(
            "weight-decay-off",
            "there is no weight decay. Pass the recipe's on.",
            wd,
            at,
            _matrix,
            lambda _e, _w: -math.inf,
        ),
    ]


# ---- hypotheses: initial weights -----------------------------------------------------------------------------------


def _initial(at: Mapping[int, AtWidth]) -> list[Hypothesis]:
    some = next(iter(at.values()))

    def h(name: str, sentence: str, select: Select, factor: LogFactor) -> Hypothesis:
        return _of_weights(name, sentence, Quantity.INITIAL, at, select, factor)

    def depth(_: PlanEntry, here: AtWidth) -> float:
        return 0.5 * math.log(2 * here.plan.num_layers)

    what = "the initial std of what writes into the residual stream"
    found = [
        h(
            "residual-init",
            f"{what} lacks Megatron's 1/√(2L). Divide it.",
            is_residual,
            depth,
        ),
        h(
            "residual-init",
            f"{what} is divided by √(2L) twice. Divide it once.",
            is_residual,
            lambda e, w: -depth(e, w),
        ),
    ]
    base = some.depth_at_base
    if base is not None:
        found.append(
            h(
                "residual-init",
                f"{what} has the base's depth in its 1/√(2L). Take the target's.",
                is_residual,
                lambda _, w: 0.5 * math.log(w.plan.num_layers / base),
            )
        )
    found += [
        h(
            "init-by-shard",
            f"{what} is √{ranks} times too large: it follows one tensor-parallel rank's share of fan_in, or 1/√L "
            "stands for 1/√(2L). Use the global fan_in.",
            is_residual,
            _constant(0.5 * math.log(ranks)),
        )
        for ranks in (2, 4, 8)
    ]
    found += [
        h(
            "init-by-fan-out",
            "the initial std of hidden weights follows fan_out. Divide σ by the root of the ratio of fan_in.",
            is_hidden,
            lambda e, w: 0.5 * math.log(e.width_ratio / w.r_out(e)),
        ),
        h(
            "bias-init",
            "biases do not start at 0. Initialise them at 0.",
            _linear_bias,
            lambda _e, _w: math.inf,
        ),
        h(
            "bias-init",
            "biases do not start at 0, nor do those of norms. Initialise them at 0.",
            lambda e: e.kind is Kind.BIAS,
            lambda _e, _w: math.inf,
        ),
    ]
    zero = "starts at 0, and the recipe does not say so. Say it there, with init_mult 0, or draw it."
    found += [
        h("zero-init", f"{who} {zero}", select, lambda _e, _w: -math.inf)
        for who, select in (
            ("the readout", is_readout),
            ("what writes into the residual stream", is_residual),
            ("the embedding", is_embedding),
        )
    ]
    if all(here.model is not None for here in at.values()):
        found += _inside_qkv(at)
    return found


def _constant(value: float) -> LogFactor:
    return lambda _entry, _at: value


def _inside_qkv(at: Mapping[int, AtWidth]) -> list[Hypothesis]:
    """About queries, keys and values, whose rows are in one matrix."""

    def shares(here: AtWidth) -> tuple[float, float]:
        assert here.model is not None
        queries = here.model.num_attention_heads / (here.model.num_attention_heads + 2 * here.model.query_groups)
        return queries, 1 - queries

    def rows(queries: float, others: float) -> Callable[[AtWidth], float]:
        """The whole's log factor where rows are multiplied by these powers of r."""

        def factor(here: AtWidth) -> float:
            q, kv = shares(here)
            return 0.5 * math.log(q * here.r ** (2 * queries) + kv * here.r ** (2 * others))

        return factor

    def weight(key: Key) -> bool:
        return key.quantity is Quantity.INITIAL and key.name.endswith("linear_qkv.weight")

    def zeroed(key: Key, width: int) -> float:
        here = at[width]
        if weight(key):
            return 0.5 * math.log(shares(here)[1])
        # A norm of nothing is nothing as well.
        return _at(("scale_mask_softmax", "q_layernorm"), lambda _: -math.inf)(key, here)

    def moved(factor: Callable[[AtWidth], float]) -> Predict:
        return lambda key, width: factor(at[width]) if weight(key) else 0.0

    found = [
        Hypothesis(
            "queries-zeroed",
            "queries start at 0, and the recipe does not say so. Draw their rows of linear_qkv as its other rows.",
            zeroed,
        )
    ]
    for power in (-0.5, 0.5, -1.0):
        for who, factor in (("keys and values", rows(0, power)), ("queries", rows(power, 0))):
            found.append(
                Hypothesis(
                    "qkv-rows",
                    f"the rows of {who} in linear_qkv are drawn with {_POWERS[power]} the std of the others'. Draw all "
                    "rows alike: they have one fan_in.",
                    moved(factor),
                )
            )
    return found


# ---- hypotheses: powers of r, class by class -----------------------------------------------------------------------

_POWERS = {-2.0: "1/r²", -1.0: "1/r", -0.5: "1/√r", 0.5: "√r", 1.0: "r"}
_CLASSES: tuple[tuple[str, str, Select], ...] = (
    ("hidden", "hidden weights", is_hidden),
    ("embedding", "embeddings", is_embedding),
    ("embedding", "the token embedding", lambda e: e.name == "embedding.word_embeddings.weight"),
    ("readout", "the readout", is_readout),
    ("gain", "norm gains", is_gain),
    ("bias", "biases", is_bias),
)
_QUANTITIES: tuple[tuple[Quantity, str, str, Mapping[str, str], tuple[float, ...]], ...] = (
    (
        Quantity.INITIAL,
        "init",
        "the initial std",
        {"hidden": "σ/√r_in", "embedding": "σ", "readout": "σ", "gain": "1, a constant", "bias": "0"},
        (0.5, -0.5, -1.0, 1.0),
    ),
    (
        Quantity.LEARNING_RATE,
        "learning-rate",
        "the learning rate",
        {"hidden": "η/r_in", "embedding": "η", "readout": "η", "gain": "η", "bias": "η"},
        (1.0, 0.5, -0.5, -1.0, -2.0),
    ),
    (
        Quantity.EPS,
        "eps",
        "Adam's eps",
        {"hidden": "ε/r_out", "embedding": "ε/r_out", "readout": "ε/r_in", "gain": "ε/r_out", "bias": "ε/r_out"},
        (1.0, 0.5, -0.5, -1.0),
    ),
    (
        Quantity.WEIGHT_DECAY,
        "weight-decay",
        "the weight decay",
        {"hidden": "λ·r_in", "embedding": "λ", "readout": "λ", "gain": "none", "bias": "none"},
        (1.0, 0.5, -0.5, -1.0),
    ),
)


def _power(power: float) -> LogFactor:
    return lambda entry, here: power * math.log(entry.width_ratio if is_hidden(entry) else here.r)


def _powers(at: Mapping[int, AtWidth]) -> list[Hypothesis]:
    """Something of one class of tensors is a power of the width ratio away from its rule."""
    adam = next(iter(at.values())).plan.optimizer is Optimizer.ADAM
    found = []
    for quantity, short, long, rule, powers in _QUANTITIES:
        for kind, who, select in _CLASSES:
            right = rule[kind] if adam else "the plan's"
            for power in powers:
                found.append(
                    _of_weights(
                        f"{kind}-{short}",
                        f"{long} of {who} is {_POWERS[power]} times what it should be: give them {right}.",
                        quantity,
                        at,
                        select,
                        _power(power),
                    )
                )
    return found


# ---- hypotheses that fit anything of their kind --------------------------------------------------------------------

_SHORT = {quantity: short for quantity, short, *_ in _QUANTITIES}


def _whatever(at: Mapping[int, AtWidth], observed: Sequence[Observation]) -> list[Hypothesis]:
    """One module, one layer, one kind of tensor, the schedule, the optimizer: whatever they have."""
    still = [o.key.name for o in observed if o.key.quantity is Quantity.LEARNING_RATE and o.deviation < GONE]
    sentence = "it does not move in training. Give it to the optimizer; look for requires_grad, filters on names."
    found = [
        Hypothesis("not-trained", f"{name}: {sentence}", _absorbing({name}, FROM_STEPS), prior=0.99)
        for name in dict.fromkeys(still)
    ]
    for quantity in DIRECT:
        if quantity is Quantity.UNEXPLAINED:
            continue
        of_kind = [o for o in observed if o.key.quantity is quantity]
        off = list(dict.fromkeys(o.key.name for o in of_kind if o.deviation != 0))
        if not off:
            continue
        found += _of_tensors(quantity, off, {o.key.name for o in of_kind})
    found += _common_rate(observed)
    found += _other_optimizer(observed)
    return found


def _absorbing(names: Iterable[str], quantities: Sequence[Quantity]) -> Predict:
    chosen = frozenset(names)
    return lambda key, _: ANY if key.quantity in quantities and key.name in chosen else 0.0


def _of_tensors(quantity: Quantity, off: Sequence[str], measured: set[str]) -> list[Hypothesis]:
    """By layer, where one layer is off and others are not; by tensor."""
    activation = quantity is Quantity.ACTIVATION
    what = "output" if activation else dict(zip(_SHORT.values(), _LONG, strict=True))[_SHORT[quantity]]
    found = []
    layers = {layer for name in off if (layer := _layer_of(name)) is not None}
    all_layers = {layer for name in measured if (layer := _layer_of(name)) is not None}
    if len(layers) == 1 and len(all_layers) > 1 and not activation:
        [layer] = layers
        inside = [name for name in off if _layer_of(name) == layer]
        found.append(
            Hypothesis(
                f"one-layer-{_SHORT[quantity]}",
                f"layer {layer} alone has another {what} ({_listed(inside)}). Look for what treats this layer by "
                "itself: a pattern of names, a range that ends one too early.",
                _absorbing(inside, [quantity]),
                prior=0.97,
            )
        )
    families: dict[str, list[str]] = {}
    for name in off:
        families.setdefault(family_of(name), []).append(name)
    for names in families.values():
        siblings = [name for name in measured if family_of(name) == family_of(names[0])]
        where = "in every layer" if len(names) == len(siblings) > 1 else "and only there" if len(siblings) > 1 else ""
        if activation:
            sentence = (
                f"{names[0]}: its output is not what its weights and its input give, before any step{_also(where)}. "
                "Something in the model's forward pass multiplies it: look for a scale in this module."
            )
        else:
            sentence = f"{names[0]}: its {what} is not the plan's{_also(where)}. Look for what treats it by itself."
        name = "module-output" if activation else f"tensor-{_SHORT[quantity]}"
        found.append(Hypothesis(name, sentence, _absorbing(names, [quantity]), prior=0.95))
    return found


_LONG = [long.removeprefix("the ") for _, _, long, *_ in _QUANTITIES]


def _also(where: str) -> str:
    return f", {where}" if where else ""


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")


def _common_rate(observed: Sequence[Observation]) -> list[Hypothesis]:
    """All learning rates are off alike, at some steps or at all."""
    groups: dict[tuple[int, int], list[float]] = {}
    for o in observed:
        if o.key.quantity is Quantity.LEARNING_RATE:
            groups.setdefault((o.key.step, o.width), []).append(o.deviation)
    means = {place: fmean(deviations) for place, deviations in groups.items()}
    if not any(means.values()):
        return []

    def predict(key: Key, width: int) -> float:
        return means.get((key.step, width), 0.0) if key.quantity is Quantity.LEARNING_RATE else 0.0

    sentence = "all learning rates are off by one factor: lr or the schedule is not the recipe's. Pass both on."
    return [Hypothesis("learning-rate-schedule", sentence, predict, prior=0.97)]


def _other_optimizer(observed: Sequence[Observation]) -> list[Hypothesis]:
    """Steps that no learning rate, eps and weight decay explain, so that what is read as these makes no sense."""
    names = dict.fromkeys(o.key.name for o in observed if o.key.quantity is Quantity.UNEXPLAINED and o.deviation != 0)
    if not names:
        return []
    sentence = (
        f"the steps of {_listed(list(names))} are not those of the recipe's optimizer: no learning rate, eps and "
        "weight decay explain them. Compare betas, momentum, and the kind of optimizer and of weight decay with the "
        "recipe's, and look for what treats parts of one tensor differently."
    )
    return [Hypothesis("optimizer-differs", sentence, _absorbing(names, FROM_STEPS), prior=0.98)]


# ---- where no hypothesis fits --------------------------------------------------------------------------------------


def _first_off(observed: Sequence[Observation], total: float) -> Cause:
    """The first direct measurement that is off, whatever the reason."""
    first = next(o for o in observed if o.deviation != 0)
    key = first.key
    share = sum(o.weight * o.deviation**2 for o in observed if (o.key.quantity, o.key.name) == (key.quantity, key.name))
    if key.quantity is Quantity.ACTIVATION:
        what = "its output is off before any step, and its weights and input are not: look for a scale in this module"
    else:
        what = f"its {key.quantity} is the first thing that is off, and no known mistake explains all of it"
    return Cause("first-off", f"{key.name}: {what}.", key.name, share / total)


def _indirect(comparison: Comparison, at: Mapping[int, AtWidth]) -> Cause:
    """Where weights, activations and the optimizer's numbers are right, and what follows from them is not."""
    off = [compared for compared in comparison.values() if compared.off is not None]
    missing = _without_rate(comparison, at)
    if missing:
        sentence = f"{missing[0]}: it has no gradient, so it is not trained. Look for requires_grad and detach."
        return Cause("not-trained", sentence, missing[0], 1.0)
    gradients = [c for c in off if c.key.quantity is Quantity.GRADIENT]
    if gradients:
        return _of_gradients(comparison, gradients)
    first = min(off, key=lambda c: (c.key.step, -abs(c.level) - abs(c.slope)))
    name = first.key.name
    if first.key.quantity is Quantity.OVERLAP:
        what = "its weights keep another share of where they started: look for weight decay outside the optimizer"
    elif first.key.quantity is Quantity.LOSS:
        what = "the loss differs and nothing that it is computed from does: look for another loss or other data"
    else:
        what = (
            "it moves otherwise than its learning rate and gradient say. Look for what changes weights or activations "
            "between the optimizer's steps, and for noise in training: raise --seeds"
        )
    return Cause("training-differs", f"{name}: {what}.", name, 1.0)


def _without_rate(comparison: Comparison, at: Mapping[int, AtWidth]) -> list[str]:
    moving = {key.name for key in comparison if key.quantity in (Quantity.LEARNING_RATE, Quantity.GRADIENT)}
    known = {key.name for key in comparison if key.quantity is Quantity.INITIAL}
    plan = next(iter(at.values())).plan
    return [e.name for e in plan.entries if e.name in known and e.name not in moving] if moving else []


def _of_gradients(comparison: Comparison, off: Sequence[Compared]) -> Cause:
    step = min(c.key.step for c in off)
    then = [c for key, c in comparison.items() if key.quantity is Quantity.GRADIENT and key.step == step]
    usual = median(c.level for c in then)
    alike = [c for c in then if abs(c.level - usual) < 0.25 * abs(usual)]
    if len(then) > 1 and len(alike) > 0.8 * len(then):
        sentence = (
            f"all gradients are {math.exp(usual):.2g} times what they should be, and what they are taken "
            "of is right. Compare clip_grad with the recipe's; else look for a loss that is averaged otherwise."
        )
        return Cause("clipping", sentence, alike[0].key.name, 1.0)
    culprit = max((c for c in off if c.key.step == step), key=lambda c: abs(c.level) + abs(c.slope)).key.name
    sentence = (
        f"{culprit}: its gradient is off, and weights, activations and the optimizer's numbers are right. Look for "
        "what acts on gradients alone: detach, a hook, a custom backward, a reduction over ranks."
    )
    return Cause("gradient", sentence, culprit, 1.0)
