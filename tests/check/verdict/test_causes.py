"""Causes, on made-up measurements: what a model would show whose plan, forward pass or training is wrong in one way.

The measurements are simulated from plans, right and wrong ones, with the noise of seeds. Nothing is trained.
"""

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
from support.shapes import MAMBA, gpt, hybrid, recipe_for

from mup_megatron.architectures.hybrid import HybridFile
from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.check.family.stress import stressed
from mup_megatron.check.measure.levels import EARLY
from mup_megatron.check.measure.measurements import Key, MeasuredRun, Measurements, Quantity
from mup_megatron.check.mutants import Context, Mutant
from mup_megatron.check.mutants.depth import DEPTH
from mup_megatron.check.verdict.causes import TOLD, causes
from mup_megatron.check.verdict.causes.at_width import AtWidth
from mup_megatron.check.verdict.causes.ranking import Cause
from mup_megatron.check.verdict.comparison import Comparison, compare
from mup_megatron.recipe import Depth, Horizon, Parametrization, PerParameter, Recipe, Training
from mup_megatron.theory import BRANCH, Plan, PlanEntry, Property, Role

WIDTHS = (32, 64, 128, 256)
UNTIED = {"untie_embeddings_and_output_weights": True}
LR, EPS, WD = Quantity.LEARNING_RATE, Quantity.EPS, Quantity.WEIGHT_DECAY
QKV, FC1, FC2 = (
    f"decoder.layers.0.{name}.weight" for name in ("self_attention.linear_qkv", "mlp.linear_fc1", "mlp.linear_fc2")
)
LOGITS = "decoder.layers.0.self_attention.core_attention.scale_mask_softmax"
WORDS = "embedding.word_embeddings"


@dataclass(frozen=True, kw_only=True)
class Case:
    """A recipe and the models of its check."""

    recipe: Recipe
    models: Mapping[int, ModelFile]

    @property
    def plans(self) -> dict[int, Plan]:
        return {width: self.recipe.plan(model) for width, model in self.models.items()}


def _case(
    per_parameter: tuple[PerParameter, ...] = (),
    *,
    base_layers: int = 2,
    depth: Depth | None = None,
    optimizer: str = "adam",
    mode: str = "spectral",
    **changes: object,
) -> Case:
    base = gpt(2, **{**UNTIED, "num_layers": base_layers, **changes})
    rules = Parametrization(depth=depth, optimizer=optimizer)
    recipe = recipe_for(base, muon_scale_mode=mode).model_copy(
        update={"per_parameter": per_parameter, "parametrization": rules}
    )
    models = {width: gpt(width / 32, **{**UNTIED, **changes}) for width in WIDTHS}
    return Case(recipe=stressed(recipe, steps=EARLY.steps, eps=1e-3), models=models)


def _moved() -> Case:
    """Four times the batch and the steps of the tuning: rates and decay halved, eps doubled."""
    tuning = Training(train_iters=100, global_batch_size=8, seq_length=16)
    horizon = Horizon(rule="steps", tokens=16 * 100 * 8 * 16, batch=32)
    given = recipe_for(gpt(2, **UNTIED)).model_copy(update={"training": tuning, "horizon": horizon})
    return Case(recipe=stressed(given, steps=EARLY.steps, eps=1e-3), models=PLAIN.models)


PLAIN = _case()
FIXED_FFN = _case(ffn_hidden_size=128)
WIDER_HEADS = Case(
    recipe=stressed(recipe_for(gpt(1, kv_channels=4, **UNTIED)), steps=EARLY.steps, eps=1e-3), models=PLAIN.models
)
MUCH_WIDER_HEADS = Case(
    recipe=stressed(recipe_for(gpt(1, kv_channels=2, **UNTIED)), steps=EARLY.steps, eps=1e-3), models=PLAIN.models
)
DEEP = _case(base_layers=3)
TIED = _case(untie_embeddings_and_output_weights=False)
OVERRIDDEN = _case((PerParameter(match="*.linear_fc2.weight", lr_mult=2.0),))
HORIZON = _moved()
KEY_NORM = _case(qk_layernorm=True)
KEYS_BIAS = "k_layernorm.bias"
LATENT = _case(
    multi_latent_attention=True,
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_head_dim=8,
    qk_pos_emb_head_dim=4,
    v_head_dim=8,
    rotary_scaling_factor=40.0,
    mscale_all_dim=1.0,
)
HYBRID = Case(
    recipe=PLAIN.recipe.model_copy(update={"base": hybrid(gpt(2, **UNTIED), "*-*-")}),
    models={width: hybrid(gpt(width / 32, **UNTIED), "*-*-") for width in WIDTHS},
)
ONE_MAMBA = Case(
    recipe=PLAIN.recipe.model_copy(update={"base": hybrid(gpt(2, **UNTIED), "M*-", **MAMBA)}),
    models={width: hybrid(gpt(width / 32, **UNTIED), "M*-", **MAMBA) for width in WIDTHS},
)
DEEPENED, DEEPENED_WHOLLY = (_case(base_layers=1, depth=Depth(alpha=alpha)) for alpha in (0.5, 1.0))
MUON = _case(optimizer="muon")
MUON_TABLES = _case(optimizer="muon", mode="unit_rms_norm", ffn_hidden_size=128)
CASES = (
    PLAIN,
    MUON,
    MUON_TABLES,
    HORIZON,
    FIXED_FFN,
    WIDER_HEADS,
    MUCH_WIDER_HEADS,
    DEEP,
    TIED,
    OVERRIDDEN,
    KEY_NORM,
    LATENT,
    HYBRID,
    ONE_MAMBA,
    DEEPENED,
    DEEPENED_WHOLLY,
)

Value = Callable[[Key, int, float], float]
"""(key, width, right value) → what is measured instead."""
Wrong = Callable[[PlanEntry, Plan], dict[str, float]]


# ---- a model that is not there -------------------------------------------------------------------------------------


def _as_is(_key: Key, _width: int, value: float) -> float:
    return value


def _measured(
    case: Case, plans: Mapping[int, Plan], value: Value, *, first_seed: int, noise: float = 0.003
) -> Measurements:
    runs = []
    for width, plan in plans.items():
        right = _values(case.models[width], plan, case.recipe)
        for seed in range(first_seed, first_seed + 3):
            rng = random.Random(f"{width} {seed}")
            values = {k: value(k, width, v) * math.exp(noise * rng.gauss(0, 1)) for k, v in right.items()}
            runs.append(MeasuredRun(width, seed, values, ()))
    return Measurements(tuple(runs))


def _values(model: ModelFile, plan: Plan, recipe: Recipe) -> dict[Key, float]:
    values: dict[Key, float] = {}
    for entry in plan.entries:
        values[Key(Quantity.INITIAL, entry.name, 0)] = _initial(entry)
        for step in (1, 2, 3, 5, 8):
            rate = _rate(step, entry, recipe)
            values[Key(LR, entry.name, step)] = rate
            values[Key(Quantity.UNEXPLAINED, entry.name, step)] = 1e-5
            if rate > 0:
                if entry.eps is not None:
                    values[Key(EPS, entry.name, step)] = entry.eps
                values[Key(WD, entry.name, step)] = entry.weight_decay
        for step in EARLY.recorded:
            gradient = 1e-3 * (_branches(plan) if entry.stack else 1.0)
            values[Key(Quantity.GRADIENT, entry.name, step)] = 1e-10 if entry.name.endswith(KEYS_BIAS) else gradient
            values[Key(Quantity.OVERLAP, entry.name, step)] = 0.9
    return {**values, **_activations(model, plan)}


def _initial(entry: PlanEntry) -> float:
    return abs(entry.init_value or 0.0) if entry.init_std is None else entry.init_std


def _rate(step: int, entry: PlanEntry, recipe: Recipe) -> float:
    warm, done = recipe.schedule.lr_warmup_fraction * EARLY.steps, step - 1
    if done <= warm:
        return entry.lr * done / warm
    return entry.lr + (entry.min_lr - entry.lr) * (done - warm) / (EARLY.steps - warm)


def _activations(model: ModelFile, plan: Plan) -> dict[Key, float]:
    def out(name: str, x: float) -> float:
        return x * _initial(plan[f"{name}.weight"]) * math.sqrt(plan[f"{name}.weight"].fan_in)

    if model.multi_latent_attention or isinstance(model, HybridFile):
        return {Key(Quantity.ACTIVATION, LOGITS, 0): plan.softmax_scale}
    found = {f"embedding.{kind}_embeddings": _embedded(plan, kind) for kind in ("word", "position")}
    stream = math.hypot(*found.values())
    factor = _branches(plan)
    for layer in range(model.num_layers):
        here = f"decoder.layers.{layer}"
        found[f"{here}.input_layernorm"] = found[f"{here}.pre_mlp_layernorm"] = 1.0
        qkv = found[f"{here}.self_attention.linear_qkv"] = out(f"{here}.self_attention.linear_qkv", 1.0)
        if model.qk_layernorm:
            found[f"{here}.self_attention.q_layernorm"] = found[f"{here}.self_attention.k_layernorm"] = 1.0
        logits = plan.softmax_scale * qkv**2 * math.sqrt(plan.head_size)
        found[f"{here}.self_attention.core_attention.scale_mask_softmax"] = logits
        proj = found[f"{here}.self_attention.linear_proj"] = out(f"{here}.self_attention.linear_proj", qkv / 3)
        fc1 = found[f"{here}.mlp.linear_fc1"] = out(f"{here}.mlp.linear_fc1", 1.0)
        fc2 = found[f"{here}.mlp.linear_fc2"] = out(f"{here}.mlp.linear_fc2", fc1 / 2)
        stream = found[here] = math.hypot(stream, factor * proj, factor * fc2)
    found["decoder.final_layernorm"] = 1.0
    assert plan.readout is not None
    readout = out(plan.readout.removesuffix(".weight"), plan.output_multiplier)
    found["output_layer"] = readout
    return {Key(Quantity.ACTIVATION, name, 0): value for name, value in found.items()}


def _branches(plan: Plan) -> float:
    """The multiplier of residual branches."""
    return next((plan.site(place).factor for place in plan.places if place.carries == BRANCH), 1.0)


def _embedded(plan: Plan, kind: str) -> float:
    entry = plan[f"embedding.{kind}_embeddings.weight"]
    return entry.multiplier * _initial(entry)


def _compared(
    case: Case, wrong: Wrong = lambda _entry, _plan: {}, value: Value = _as_is, **of_plan: Callable[[Plan], float]
) -> Comparison:
    """A model whose plan has other entries, or whose measurements are changed, against the right one."""
    plans = {
        width: replace(
            plan,
            entries=tuple(replace(entry, **wrong(entry, plan)) for entry in plan.entries),
            **{key: of(plan) for key, of in of_plan.items()},
        )
        for width, plan in case.plans.items()
    }
    return compare(_measured(case, plans, value, first_seed=1), _reference(CASES.index(case)))


@cache
def _reference(index: int) -> Measurements:
    case = CASES[index]
    return _measured(case, case.plans, _as_is, first_seed=100)


@cache
def _of_wrong_plan(what: str) -> tuple[Cause, ...]:
    case, wrong, *_ = WRONG_PLANS[what]
    return causes(_compared(case, wrong), case.plans, case.recipe, case.models)


def _best(case: Case, comparison: Comparison) -> tuple[str, str]:
    found = causes(comparison, case.plans, case.recipe, case.models)
    return found[0].name, found[0].culprit


def _lr(entry: PlanEntry, factor: float) -> dict[str, float]:
    return {"lr": entry.lr * factor, "min_lr": entry.min_lr * factor}


def _hidden(entry: PlanEntry) -> bool:
    return entry.role is Role.HIDDEN


def _r(plan: Plan) -> float:
    return plan["output_layer.weight"].width_ratio


# ---- a wrong plan --------------------------------------------------------------------------------------------------


def _hidden_only(change: Wrong) -> Wrong:
    return lambda entry, plan: change(entry, plan) if _hidden(entry) else {}


def _with(property_: Property, change: Wrong) -> Wrong:
    return lambda entry, plan: change(entry, plan) if property_ in entry.properties else {}


def _muons(change: Wrong) -> Wrong:
    return lambda entry, plan: change(entry, plan) if entry.optimizer == "muon" else {}


def _of_biases(change: Wrong) -> Wrong:
    return lambda entry, plan: change(entry, plan) if entry.is_vector and not entry.is_gain else {}


def _standard_values(entry: PlanEntry, plan: Plan) -> dict[str, float]:
    if not _hidden(entry):
        return {"eps": plan.adam_eps}
    assert entry.init_std is not None
    root = math.sqrt(entry.width_ratio)
    return {
        **_lr(entry, entry.width_ratio),
        "init_std": entry.init_std * root,
        "eps": plan.adam_eps,
        "weight_decay": plan.weight_decay,
    }


def _std(entry: PlanEntry, factor: float) -> dict[str, float]:
    assert entry.init_std is not None
    return {"init_std": entry.init_std * factor}


def _eps(entry: PlanEntry, factor: float) -> dict[str, float]:
    assert entry.eps is not None
    return {"eps": entry.eps * factor}


def _moved_again(entry: PlanEntry, lr: float, decay: float, eps: float) -> dict[str, float]:
    return {**_lr(entry, lr), **_eps(entry, eps), "weight_decay": entry.weight_decay * decay}


WRONG_PLANS: dict[str, tuple[Case, Wrong, str, str]] = {
    "one learning rate": (PLAIN, lambda e, p: _lr(e, p.lr / e.lr), "learning-rate-collapsed", QKV),
    "all rates divided": (
        PLAIN,
        lambda e, p: {} if _hidden(e) else _lr(e, 1 / _r(p)),
        "learning-rate-all-divided",
        f"{WORDS}.weight",
    ),
    "the embedding's rate divided": (
        PLAIN,
        _with(Property.EMBEDDING, lambda e, p: _lr(e, 1 / _r(p))),
        "embedding-learning-rate",
        f"{WORDS}.weight",
    ),
    "the readout's rate divided": (
        PLAIN,
        _with(Property.READOUT, lambda e, p: _lr(e, 1 / _r(p))),
        "readout-learning-rate",
        "output_layer.weight",
    ),
    "the gains' rate divided": (
        PLAIN,
        _with(Property.GAIN, lambda e, p: _lr(e, 1 / _r(p))),
        "gain-learning-rate",
        "decoder.layers.0.input_layernorm.weight",
    ),
    "the biases' rate divided": (
        PLAIN,
        _of_biases(lambda e, p: _lr(e, 1 / _r(p))),
        "bias-learning-rate",
        "decoder.layers.0.input_layernorm.bias",
    ),
    "hidden rates by the root": (
        PLAIN,
        _hidden_only(lambda e, _: _lr(e, math.sqrt(e.width_ratio))),
        "hidden-learning-rate",
        QKV,
    ),
    "overrides lost": (
        OVERRIDDEN,
        lambda e, _: _lr(e, 0.5) if e.name.endswith("linear_fc2.weight") else {},
        "overrides-dropped",
        FC2,
    ),
    "one ratio for all": (
        FIXED_FFN,
        lambda e, p: (
            {**_lr(e, 1 / _r(p)), **_std(e, 1 / math.sqrt(_r(p))), "weight_decay": e.weight_decay * _r(p)}
            if e.name.endswith("linear_fc2.weight")
            else _eps(e, 1 / _r(p))
            if e.name.endswith("linear_fc1.weight")
            else {}
        ),
        "one-width-ratio",
        FC2,
    ),
    "fan_out for fan_in": (
        FIXED_FFN,
        lambda e, p: (
            _lr(e, 1 / _r(p))
            if e.name.endswith("fc2.weight")
            else _lr(e, _r(p))
            if e.name.endswith("fc1.weight")
            else {}
        ),
        "learning-rate-by-fan-out",
        FC1,
    ),
    "the horizon twice": (HORIZON, lambda e, _: _moved_again(e, 0.5, 0.5, 2.0), "horizon-twice", f"{WORDS}.weight"),
    "of the horizon the weight decay alone": (
        HORIZON,
        lambda e, _: _moved_again(e, 2.0, 1.0, 0.5),
        "horizon-decay-only",
        f"{WORDS}.weight",
    ),
    "the base's floor": (PLAIN, lambda _, p: {"min_lr": p.min_lr}, "learning-rate-floor", QKV),
    "no floor": (PLAIN, lambda _e, _p: {"min_lr": 0.0}, "learning-rate-floor", f"{WORDS}.weight"),
    "another peak": (PLAIN, lambda e, _: _lr(e, 1.5), "learning-rate-schedule", f"{WORDS}.weight"),
    "one layer's rates": (
        PLAIN,
        lambda e, _: _lr(e, e.width_ratio) if _hidden(e) and ".layers.1." in e.name else {},
        "one-layer-learning-rate",
        "decoder.layers.1.self_attention.linear_qkv.weight",
    ),
    "one tensor's rate": (
        PLAIN,
        lambda e, _: _lr(e, 1 / 3) if "linear_qkv.weight" in e.name else {},
        "tensor-learning-rate",
        QKV,
    ),
    "the base's eps": (PLAIN, lambda _, p: {"eps": p.adam_eps}, "eps-not-scaled", f"{WORDS}.weight"),
    "the base's eps for inputs": (
        PLAIN,
        lambda e, p: {"eps": p.adam_eps} if e.role is Role.INPUT else {},
        "eps-not-scaled-for-inputs",
        f"{WORDS}.weight",
    ),
    "eps twice": (
        PLAIN,
        lambda e, p: _eps(e, (e.eps or 1.0) / p.adam_eps),
        "eps-scaled-twice",
        f"{WORDS}.weight",
    ),
    "the base's weight decay": (
        PLAIN,
        _hidden_only(lambda _, p: {"weight_decay": p.weight_decay}),
        "weight-decay-not-compensated",
        QKV,
    ),
    "weight decay on vectors": (
        PLAIN,
        lambda e, p: {"weight_decay": p.weight_decay} if e.is_vector else {},
        "weight-decay-on-vectors",
        "decoder.layers.0.input_layernorm.weight",
    ),
    "no weight decay": (PLAIN, lambda _e, _p: {"weight_decay": 0.0}, "weight-decay-off", f"{WORDS}.weight"),
    "σ": (PLAIN, _hidden_only(lambda e, _: _std(e, math.sqrt(e.width_ratio))), "hidden-init", QKV),
    "σ/r": (PLAIN, _hidden_only(lambda e, _: _std(e, 1 / math.sqrt(e.width_ratio))), "hidden-init", QKV),
    "no 1/√(2L)": (
        PLAIN,
        _with(Property.RESIDUAL, lambda e, p: _std(e, math.sqrt(2 * p.num_layers))),
        "residual-init",
        "decoder.layers.0.self_attention.linear_proj.weight",
    ),
    "the base's depth": (
        DEEP,
        _with(Property.RESIDUAL, lambda e, p: _std(e, math.sqrt(p.num_layers / 3))),
        "residual-init",
        "decoder.layers.0.self_attention.linear_proj.weight",
    ),
    "a shard's fan_in": (
        PLAIN,
        _with(Property.RESIDUAL, lambda e, _: _std(e, math.sqrt(2))),
        "init-by-shard",
        "decoder.layers.0.self_attention.linear_proj.weight",
    ),
    "a readout drawn as hidden": (
        PLAIN,
        _with(Property.READOUT, lambda e, p: _std(e, 1 / math.sqrt(_r(p)))),
        "readout-init",
        "output_layer.weight",
    ),
    "a readout of 0": (PLAIN, _with(Property.READOUT, lambda e, _: _std(e, 0.0)), "zero-init", "output_layer.weight"),
    "a tied table drawn as a readout": (
        TIED,
        lambda e, _: _std(e, e.fan_out / 64) if e.name == f"{WORDS}.weight" else {},
        "embedding-init",
        f"{WORDS}.weight",
    ),
    "gains at 1/√r": (
        PLAIN,
        _with(Property.GAIN, lambda _, p: {"init_value": 1 / math.sqrt(_r(p))}),
        "gain-init",
        "decoder.layers.0.input_layernorm.weight",
    ),
    "up from a latent as from a wide side": (
        LATENT,
        lambda e, p: (
            {**_lr(e, 1 / _r(p)), **_std(e, 1 / math.sqrt(_r(p))), "weight_decay": e.weight_decay * _r(p)}
            if e.name.endswith("_up_proj.weight")
            else {}
        ),
        "latent-by-width",
        "decoder.layers.0.self_attention.linear_q_up_proj.weight",
    ),
    "down to a latent as an output": (
        LATENT,
        lambda e, p: _std(e, 1 / math.sqrt(_r(p))) if e.name.endswith("_down_proj.weight") else {},
        "bottleneck-init",
        "decoder.layers.0.self_attention.linear_q_down_proj.weight",
    ),
    "an ffn of a fixed size as an output": (
        FIXED_FFN,
        lambda e, p: _std(e, 1 / math.sqrt(_r(p))) if e.name.endswith("linear_fc1.weight") else {},
        "bottleneck-init",
        FC1,
    ),
    "a GPT's 1/√(2L) in a hybrid model": (
        HYBRID,
        _with(Property.RESIDUAL, lambda e, _: _std(e, 1 / math.sqrt(2))),
        "residual-init",
        "decoder.layers.0.self_attention.linear_proj.weight",
    ),
    "a convolution as a matrix": (
        ONE_MAMBA,
        lambda e, p: _lr(e, 1 / _r(p)) if e.name.endswith("conv1d.weight") else {},
        "convolution-learning-rate",
        "decoder.layers.0.mixer.conv1d.weight",
    ),
    "one tensor's rate, of which no other layer has any": (
        ONE_MAMBA,
        lambda e, _: _lr(e, 1 / 3) if "in_proj.weight" in e.name else {},
        "tensor-learning-rate",
        "decoder.layers.0.mixer.in_proj.weight",
    ),
    "Muon's matrices at the base's rates": (
        MUON,
        _muons(lambda _, p: {"lr": p.lr, "min_lr": p.min_lr, "weight_decay": p.weight_decay}),
        "matrix-rates-unscaled",
        QKV,
    ),
    "Muon's positions at the base's rates": (
        MUON_TABLES,
        _muons(lambda e, p: {"lr": p.lr, "min_lr": p.min_lr, "weight_decay": p.weight_decay} if e.is_embedding else {}),
        "table-rates-unscaled",
        "embedding.position_embeddings.weight",
    ),
    "Adam's 1/r on Muon's rates": (
        MUON,
        _muons(lambda e, _: _lr(e, 1 / e.width_ratio) if _hidden(e) else {}),
        "matrix-rates-as-adams",
        QKV,
    ),
    "one rate for Muon and Adam": (MUON, lambda e, p: _lr(e, p.lr / e.lr), "learning-rate-collapsed", QKV),
    "Muon's rates by the ratio of fan_out": (
        MUON_TABLES,
        lambda e, p: (
            _lr(e, 1 / _r(p))
            if e.name.endswith("fc2.weight")
            else _lr(e, _r(p))
            if e.name.endswith("fc1.weight")
            else {}
        ),
        "learning-rate-by-fan-out",
        FC1,
    ),
    "no compensation of Muon's decay": (
        MUON,
        _muons(lambda e, p: {"weight_decay": p.weight_decay} if _hidden(e) else {}),
        "weight-decay-not-compensated",
        QKV,
    ),
    "no embedding multiplier": (
        PLAIN,
        _with(Property.EMBEDDING, lambda _e, _p: {"multiplier": 1.0}),
        "embedding-multiplier-dropped",
        WORDS,
    ),
    "no multiplier on positions": (
        PLAIN,
        lambda e, _: {"multiplier": 1.0} if "position" in e.name else {},
        "embedding-multiplier-on-tokens-only",
        "embedding.position_embeddings",
    ),
}


@pytest.mark.parametrize("what", WRONG_PLANS)
def test_a_wrong_plan_is_named(what: str) -> None:
    _, _, name, culprit = WRONG_PLANS[what]
    found = _of_wrong_plan(what)

    assert (found[0].name, found[0].culprit) == (name, culprit)


def test_what_hybrid_models_count_as_layers_is_said() -> None:
    assert (
        "with the number of a hybrid model's layers for L"
        in _of_wrong_plan("a GPT's 1/√(2L) in a hybrid model")[0].sentence
    )


def test_the_bases_values_everywhere_are_standard_parametrization() -> None:
    comparison = _compared(PLAIN, _standard_values, output_multiplier=lambda plan: plan.output_multiplier * _r(plan))

    assert _best(PLAIN, comparison)[0] == "standard-parametrization"


# ---- a wrong forward pass ------------------------------------------------------------------------------------------

SCALES: dict[str, tuple[Case, Callable[[Plan], float]]] = {
    "attention-sqrt-d": (WIDER_HEADS, lambda plan: 1.5 / math.sqrt(plan.head_size)),
    "attention-scale-stock": (MUCH_WIDER_HEADS, lambda plan: 1 / math.sqrt(plan.head_size)),
    "attention-own-factor-dropped": (
        LATENT,
        lambda plan: plan.softmax_scale / (plan.own_softmax_scale * math.sqrt(plan.head_size)),
    ),
    "attention-no-base": (PLAIN, lambda plan: 1.5 / plan.head_size),
    "attention-multiplier-dropped": (PLAIN, lambda plan: plan.softmax_scale / 1.5),
    "attention-multiplier-twice": (PLAIN, lambda plan: plan.softmax_scale * 1.5),
}


@pytest.mark.parametrize("name", SCALES)
def test_a_wrong_attention_scale_is_named_by_where_it_comes_from(name: str) -> None:
    case, scale = SCALES[name]

    assert _best(case, _compared(case, softmax_scale=scale)) == (name, LOGITS)


OUTPUTS: dict[str, Callable[[Plan], float]] = {
    "readout-multiplied-twice": lambda plan: plan.output_multiplier**2,
    "readout-not-multiplied": lambda _: 1.0,
    "readout-ratio-dropped": lambda plan: plan.output_multiplier * _r(plan),
    "output-multiplier-dropped": lambda plan: 1 / _r(plan),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_a_wrong_readout_multiplier_is_named_by_what_is_lost(name: str) -> None:
    assert _best(PLAIN, _compared(PLAIN, output_multiplier=OUTPUTS[name])) == (name, "output_layer")


def _where(quantity: Quantity, name: str, factor: Callable[[int], float]) -> Value:
    return lambda key, width, x: x * factor(width) if (key.quantity, key.name) == (quantity, name) else x


def test_a_stray_factor_on_a_modules_output_is_found_at_that_module() -> None:
    fc1 = "decoder.layers.1.mlp.linear_fc1"

    def stray(key: Key, width: int, x: float) -> float:
        behind = (fc1, "decoder.layers.1.mlp.linear_fc2", "decoder.layers.1")
        return x * math.sqrt(width / 64) if key.quantity is Quantity.ACTIVATION and key.name in behind else x

    found = causes(_compared(PLAIN, value=stray), PLAIN.plans, PLAIN.recipe, PLAIN.models)

    assert (found[0].name, found[0].culprit) == ("module-output", fc1)
    assert "Something in the model's forward pass multiplies it" in found[0].sentence
    assert "only there" in found[0].sentence


def test_activations_behind_a_wrong_weight_are_not_causes() -> None:
    def wrong(entry: PlanEntry, _: Plan) -> dict[str, float]:
        return _std(entry, 1.7) if entry.name == FC1 else {}

    found = causes(_compared(PLAIN, wrong), PLAIN.plans, PLAIN.recipe, PLAIN.models)

    assert found[0].culprit == FC1
    assert not [cause for cause in found if cause.name == "module-output"]


def test_what_experts_add_follows_from_their_weights() -> None:
    own: dict[str, Any] = {**UNTIED, "num_experts": 4, "moe_layer_freq": [0, 1], "add_bias_linear": False}
    recipe = recipe_for(gpt(2, **own))
    found = AtWidth(recipe.plan(gpt(4, **own)), recipe, gpt(4, **own)).weights_of

    mlp = "decoder.layers.1.mlp"
    assert found[f"{mlp}.router"] == [f"{mlp}.router.weight"]
    assert found[mlp] == [f"{mlp}.experts.local_experts.{e}.linear_fc{i}.weight" for e in range(4) for i in (1, 2)]
    assert found["decoder.layers.0.mlp.linear_fc1"] == [FC1]


def test_queries_of_0_are_known_behind_a_norm() -> None:
    def zeroed(key: Key, _: int, x: float) -> float:
        if "linear_qkv" in key.name and key.quantity in (Quantity.INITIAL, Quantity.ACTIVATION):
            return x * math.sqrt(2 / 3)
        gone = key.quantity is Quantity.ACTIVATION and key.name.endswith(("scale_mask_softmax", "q_layernorm"))
        return 0.0 if gone else x

    assert _best(KEY_NORM, _compared(KEY_NORM, value=zeroed)) == ("queries-zeroed", QKV)


def test_queries_of_0_are_told_from_a_smaller_draw_by_the_logits() -> None:
    def zeroed(key: Key, _: int, x: float) -> float:
        if key.quantity is Quantity.INITIAL and "linear_qkv.weight" in key.name:
            return x * math.sqrt(2 / 3)
        if key.quantity is Quantity.ACTIVATION and key.name.endswith("scale_mask_softmax"):
            return 0.0
        return x * math.sqrt(2 / 3) if key.quantity is Quantity.ACTIVATION and "linear_qkv" in key.name else x

    assert _best(PLAIN, _compared(PLAIN, value=zeroed)) == ("queries-zeroed", QKV)


# ---- what no rule is behind ----------------------------------------------------------------------------------------


def test_a_warm_up_that_starts_above_0() -> None:
    def started(key: Key, _: int, x: float) -> float:
        if key.quantity is LR and key.step <= 2:
            return x + 1e-3 * (3 - key.step) / 2
        return x

    assert _best(PLAIN, _compared(PLAIN, value=started))[0] == "warm-up-start"


def test_a_tensor_that_does_not_move() -> None:
    comparison = _compared(PLAIN, value=_where(LR, FC2, lambda _: 0.0))

    assert _best(PLAIN, comparison) == ("not-trained", FC2)


def test_a_tensor_without_a_gradient() -> None:
    comparison = _compared(PLAIN, value=_where(Quantity.OVERLAP, FC2, lambda _: 1.5))
    of_gradients = (Quantity.GRADIENT, Quantity.UNEXPLAINED, LR, EPS, WD)
    without = {key: c for key, c in comparison.items() if key.quantity not in of_gradients or key.name != FC2}

    assert _best(PLAIN, without) == ("not-trained", FC2)


def test_biases_that_do_not_start_at_0() -> None:
    def drawn(key: Key, _: int, x: float) -> float:
        return 0.05 if key.quantity is Quantity.INITIAL and ".linear_" in key.name and "bias" in key.name else x

    name, culprit = _best(PLAIN, _compared(PLAIN, value=drawn))

    assert (name, culprit) == ("bias-init", "decoder.layers.0.self_attention.linear_qkv.bias")


def test_gradients_that_are_all_off_by_one_factor_are_clipped_otherwise() -> None:
    def clipped(key: Key, _: int, x: float) -> float:
        return x / 3 if key.quantity is Quantity.GRADIENT else x

    found = causes(_compared(PLAIN, value=clipped), PLAIN.plans, PLAIN.recipe, PLAIN.models)

    assert found[0].name == "clipping"
    assert "0.33 times" in found[0].sentence


def test_a_bias_of_keys_whose_gradient_is_rounding_does_not_hide_the_cause() -> None:
    def clipped(key: Key, _: int, x: float) -> float:
        if key.name.endswith(KEYS_BIAS) and key.quantity in (LR, EPS):
            return 500 * x
        return x / 3 if key.quantity is Quantity.GRADIENT else x

    assert _best(KEY_NORM, _compared(KEY_NORM, value=clipped))[0] == "clipping"


def test_one_gradient_that_is_off_is_named() -> None:
    comparison = _compared(PLAIN, value=_where(Quantity.GRADIENT, FC2, lambda _: 2.0))

    assert _best(PLAIN, comparison) == ("gradient", FC2)


def test_steps_that_are_not_those_of_the_optimizer() -> None:
    rng = random.Random(1)
    odd = {key: math.exp(rng.uniform(-1, 1)) for key in _values(PLAIN.models[32], PLAIN.plans[32], PLAIN.recipe)}

    def other(key: Key, _: int, x: float) -> float:
        if key.quantity is Quantity.UNEXPLAINED:
            return 0.1
        return x * odd[key] if key.quantity in (LR, EPS, WD) else x

    assert _best(PLAIN, _compared(PLAIN, value=other))[0] == "optimizer-differs"


def test_steps_of_one_tensor_that_are_not_those_of_the_optimizer() -> None:
    def other(key: Key, _: int, x: float) -> float:
        if key.name == FC2:
            return {Quantity.UNEXPLAINED: 0.1, EPS: 0.0, LR: 0.9 * x}.get(key.quantity, x)
        return x

    assert _best(PLAIN, _compared(PLAIN, value=other)) == ("optimizer-differs", FC2)


def _unexplained(key: Key, x: float) -> float:
    """Of a tensor that another optimizer steps than the recipe has for it."""
    return {Quantity.UNEXPLAINED: 0.5, WD: 0.0, LR: 0.3 * x}.get(key.quantity, x)


@pytest.mark.parametrize("name", [FC2, f"{WORDS}.weight"])
def test_a_tensor_that_another_optimizer_steps(name: str) -> None:
    comparison = _compared(MUON, value=lambda key, _, x: _unexplained(key, x) if key.name == name else x)

    assert _best(MUON, comparison) == ("stepped-by-another", name)


def test_all_tensors_of_an_optimizer_that_has_other_settings() -> None:
    muons = {entry.name for entry in MUON.plans[32].entries if entry.optimizer == "muon"}
    comparison = _compared(MUON, value=lambda key, _, x: _unexplained(key, x) if key.name in muons else x)

    assert _best(MUON, comparison)[0] == "optimizer-differs"


def test_what_moves_otherwise_for_no_reason_is_named() -> None:
    comparison = _compared(PLAIN, value=_where(Quantity.OVERLAP, FC1, lambda _: 0.5))

    assert _best(PLAIN, comparison) == ("training-differs", FC1)


# ---- how causes are told -------------------------------------------------------------------------------------------


def test_nothing_off_has_no_causes() -> None:
    assert causes(_compared(PLAIN), PLAIN.plans, PLAIN.recipe, PLAIN.models) == ()


@pytest.mark.parametrize("what", WRONG_PLANS)
def test_causes_are_few_best_first_and_say_what_to_do(what: str) -> None:
    found = _of_wrong_plan(what)

    assert 1 <= len(found) <= TOLD
    assert all(0 < cause.share <= 1 for cause in found)
    assert found[0].share > 0.9
    assert len({cause.name for cause in found}) == len(found)
    assert all(cause.sentence.endswith(".") for cause in found)


def test_without_a_known_pattern_the_first_thing_that_is_off_is_the_culprit() -> None:
    def scattered(key: Key, _: int, x: float) -> float:
        if key.quantity not in (Quantity.INITIAL, LR):
            return x
        return x * math.exp(random.Random(f"{key.quantity} {key.name}").choice((-1, 1)))

    found = causes(_compared(PLAIN, value=scattered), PLAIN.plans, PLAIN.recipe, PLAIN.models)

    assert (found[0].name, found[0].culprit) == ("first-off", f"{WORDS}.weight")


def test_two_mistakes_are_both_told() -> None:
    def both(entry: PlanEntry, plan: Plan) -> dict[str, float]:
        if entry.is_embedding:
            return _lr(entry, 1 / _r(plan))
        return {"weight_decay": plan.weight_decay} if _hidden(entry) else {}

    found = causes(_compared(PLAIN, both), PLAIN.plans, PLAIN.recipe, PLAIN.models)

    assert {"embedding-learning-rate", "weight-decay-not-compensated"} <= {cause.name for cause in found}


def test_without_model_files_the_same_cause_is_found() -> None:
    case, wrong, name, culprit = WRONG_PLANS["one learning rate"]
    found = causes(_compared(case, wrong), case.plans, case.recipe, None)

    assert (found[0].name, found[0].culprit) == (name, culprit)


# ---- depth ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [DEEPENED, DEEPENED_WHOLLY], ids=["half", "whole"])
@pytest.mark.parametrize("mutant", DEPTH, ids=lambda mutant: mutant.name)
def test_mistakes_about_depth_have_their_own_names(mutant: Mutant, case: Case) -> None:
    contexts = {
        width: Context(base=case.recipe.megatron_base, target=model, recipe=case.recipe, width=width)
        for width, model in case.models.items()
    }
    if not all(map(mutant.when, contexts.values())):
        assert case is DEEPENED_WHOLLY, "whose exponent moves no learning rate"
        return
    assert mutant.plan is not None
    plans = {width: mutant.plan(plan, contexts[width]) for width, plan in case.plans.items()}
    comparison = compare(_measured(case, plans, _as_is, first_seed=1), _reference(CASES.index(case)))
    name, _ = _best(case, comparison)
    assert name in mutant.cause


@pytest.mark.parametrize("case", [DEEPENED, DEEPENED_WHOLLY], ids=["half", "whole"])
def test_a_right_deep_model_has_no_cause(case: Case) -> None:
    comparison = compare(_measured(case, case.plans, _as_is, first_seed=1), _reference(CASES.index(case)))
    assert causes(comparison, case.plans, case.recipe, case.models) == ()
