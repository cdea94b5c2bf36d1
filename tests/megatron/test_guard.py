"""The guard passes every right run in every layout and leaves no trace; each mistake is named with its cause."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from support import planned, stock
from support.processes import run_ranks
from support.shapes import gpt
from support.stock import Layout, Run

from mup_megatron.errors import InputError
from mup_megatron.recipe import Recipe
from mup_megatron.theory import Plan, folding

# Width ratio 4, and 2 in the head size: every role's values differ from the base's, and every multiplier from 1.
_BOTH: dict[str, Any] = {"num_layers": 4, "vocab_size": 64, "group_query_attention": True}
_WIDE: dict[str, Any] = {"num_attention_heads": 8, "kv_channels": 16, "num_query_groups": 4}
_GATED: dict[str, Any] = {
    "swiglu": True,
    "normalization": "RMSNorm",
    "qk_layernorm": True,
    "position_embedding_type": "rope",
    "add_bias_linear": False,
    "untie_embeddings_and_output_weights": True,
}
SHAPES = {
    "tied": (gpt(**_BOTH, num_query_groups=2), gpt(4, **_BOTH, **_WIDE)),
    "untied": (gpt(**_BOTH, **_GATED, num_query_groups=2), gpt(4, **_BOTH, **_GATED, **_WIDE)),
}
TIED = SHAPES["tied"][1]
FC1 = "decoder.layers.{}.mlp.linear_fc1.weight"


def tuned(shape: str = "tied", **changes: Any) -> Recipe:
    plain: dict[str, Any] = {
        "init_method_std": 0.05,
        "embedding_multiplier": 3.0,
        "output_multiplier": 2.0,
        "attention_multiplier": 8.0,
        "per_parameter": [{"match": "*.linear_fc1.weight", "lr_mult": 2.0, "multiplier": 0.5}],
    }
    return planned.recipe(SHAPES[shape][0], **{**plain, **changes})


PLAN = tuned().plan(TIED)


def guarded(run: Run, plan: Plan, *, weights: bool = False) -> str | None:
    """What the guard says."""
    from mup_megatron.megatron.guard import require_as_planned

    try:
        require_as_planned(run.chunks, plan, run.optimizer, run.scheduler, weights=weights)
    except InputError as error:
        return str(error)
    return None


# ---- right runs ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    shape: str = "tied"
    layout: Layout = field(default_factory=Layout)
    recipe: dict[str, Any] = field(default_factory=dict)
    prepare: dict[str, Any] = field(default_factory=dict)
    """Further arguments of `planned.prepare`."""


def _to_bf16(chunks: list[Any]) -> None:
    for chunk in chunks:
        chunk.bfloat16()


def _bf16_optimizer(config: Any) -> None:
    config.bf16 = True
    config.params_dtype = torch.bfloat16


BF16 = {
    "config_changes": {"bf16": True, "params_dtype": torch.bfloat16, "pipeline_dtype": torch.bfloat16},
    "edit": _to_bf16,
    "edit_optimizer": _bf16_optimizer,
}
BY_LAYER = {"config_changes": {"apply_query_key_layer_scaling": True, "attention_softmax_in_fp32": True}}
SGD = {"optimizer": "sgd", "lr": 0.1, "min_lr": 0.01}
EVERYTHING = Layout(tp=2, sequence_parallel=True, distributed_optimizer=True)

RIGHT = {
    "one process": Case(),
    "untied": Case("untied"),
    "SGD": Case(recipe=SGD),
    "no weight decay, no floor": Case(recipe={"weight_decay": 0.0, "min_lr": 0.0}),
    "weight decay not compensated by choice": Case(recipe={"weight_decay_exponent": 0.0}),
    "standard parametrization": Case(recipe={"rule": "standard"}),
    "bf16": Case(prepare=BF16),
    "bf16, distributed optimizer": Case(layout=Layout(distributed_optimizer=True), prepare=BF16),
    "scale divided by the layer's number": Case(prepare=BY_LAYER),
    "TP2": Case(layout=Layout(tp=2)),
    "TP2, SGD, untied": Case("untied", Layout(tp=2), SGD),
    "PP2": Case(layout=Layout(pp=2)),
    "DP2 + distributed optimizer": Case(layout=Layout(dp=2, distributed_optimizer=True)),
    "TP2 + sequence parallel + distributed optimizer": Case(layout=EVERYTHING),
    "PP2 in two virtual stages": Case(layout=Layout(pp=2, vpp=2)),
    "PP2 in two virtual stages, untied": Case("untied", Layout(pp=2, vpp=2)),
}
MOMENTS = {"warm-up": 1, "peak": 2, "decay": 4, "floor": 6}
"""Steps after which the guard looks again."""


def _right(name: str) -> dict[str, str | None]:
    case = RIGHT[name]
    recipe, target = tuned(case.shape, **case.recipe), SHAPES[case.shape][1]
    training = dataclasses.replace(planned.training_of(recipe), decay_steps=5, batch=4, micro_batch=2)
    run = planned.prepare(recipe, target, case.layout, training=training, **case.prepare)
    said = {"start": guarded(run, recipe.plan(target), weights=True)}
    for moment, step in MOMENTS.items():
        stock.train(run, step - run.done)
        said[moment] = guarded(run, recipe.plan(target))
    return said


def _all_right(names: list[str]) -> dict[str, dict[str, str | None]]:
    return {name: _right(name) for name in names}


@pytest.fixture(scope="module")
def right() -> dict[str, dict[str, str | None]]:
    found = {}
    for size in (1, 2):
        names = [name for name, case in RIGHT.items() if case.layout.world_size == size]
        of_ranks = run_ranks(_all_right, size, names)
        assert all(rank == of_ranks[0] for rank in of_ranks)
        found |= of_ranks[0]
    return found


@pytest.mark.parametrize("name", RIGHT)
def test_right_run_passes_at_every_moment(right: dict[str, dict[str, str | None]], name: str) -> None:
    assert right[name] == dict.fromkeys(["start", *MOMENTS])


# ---- no trace ------------------------------------------------------------------------------------------------------


def _state(run: Run) -> Any:
    """All that the guard could leave behind, by identity and value."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    modules = [module for chunk in run.chunks for module in chunk.modules()]
    return (
        [{key: id(value) for key, value in module.__dict__.items()} for module in modules],
        [module.training for module in modules],
        [p._version for module in modules for p in module.parameters(recurse=False)],
        [{k: v for k, v in group.items() if k != "params"} for group in run.optimizer.param_groups],
        torch.get_rng_state().tolist(),
        {name: state.tolist() for name, state in get_cuda_rng_tracker().get_states().items()},
        run.scheduler.state_dict(),
    )


def _with_and_without() -> tuple[list[float], list[float], list[bool]]:
    """Losses with dropout, where any random draw would show, and whether each look left all as it was."""
    dropout = {"attention_dropout": 0.1, "hidden_dropout": 0.1}
    losses, same = [], []
    for looks in (True, False):
        run = planned.prepare(tuned(), TIED, Layout(), config_changes=dropout)
        of_run = []
        for _ in range(4):
            if looks:
                before = _state(run)
                assert guarded(run, PLAN, weights=run.done == 0) is None
                same.append(_state(run) == before)
            of_run += stock.train(run, 1)
        losses.append(of_run)
    return losses[0], losses[1], same


def test_guard_leaves_no_trace() -> None:
    guarded_losses, losses, same = run_ranks(_with_and_without, 1)[0]
    assert guarded_losses == losses
    assert same == [True] * 4


# ---- attention of somebody's own -----------------------------------------------------------------------------------


def _computes_by_itself(core: torch.nn.Module) -> None:
    """1/√d whatever `softmax_scale` says."""

    def forward(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> Any:
        heads_first = (x.permute(1, 2, 0, 3) for x in (q, k, v))
        mixed = torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True)
        return mixed.permute(2, 0, 1, 3).flatten(2)

    core.forward = forward  # type: ignore[method-assign]


class OwnAttention(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        _computes_by_itself(self)


class UnknownAttention(torch.nn.Module):
    """Cannot be called as Megatron's is."""

    def __init__(self, softmax_scale: float | None = None) -> None:
        super().__init__()
        self.softmax_scale = softmax_scale

    def forward(self, everything: Any) -> Any:
        return everything


def _attention(run: Run, layer: int) -> Any:
    return run.chunks[0].module.decoder.layers[layer].self_attention


def _ignores_the_scale(run: Run) -> None:
    for layer in range(4):
        _computes_by_itself(_attention(run, layer).core_attention)


def _has_no_scale(run: Run) -> None:
    _attention(run, 1).core_attention = OwnAttention()


def _cannot_be_asked(run: Run) -> None:
    _attention(run, 1).core_attention = UnknownAttention()


def _cannot_be_measured_and_says_another(run: Run) -> None:
    _attention(run, 1).core_attention = UnknownAttention(0.5)


def _default_scale(run: Run) -> None:
    _attention(run, 2).core_attention.softmax_scale = 0.25


def _other_scale(run: Run) -> None:
    _attention(run, 2).core_attention.softmax_scale *= 1.001


def _huge_scale(run: Run) -> None:
    _attention(run, 2).core_attention.softmax_scale *= 1000


def _no_scale_for_inference(run: Run) -> None:
    del _attention(run, 3).softmax_scale


# ---- multipliers ---------------------------------------------------------------------------------------------------


def _embedding(run: Run) -> Any:
    return run.chunks[0].module.embedding.word_embeddings


def _no_embedding_multiplier(run: Run) -> None:
    _embedding(run)._forward_hooks.clear()


def _no_readout_multiplier(run: Run) -> None:
    for chunk in run.chunks:
        if hasattr(chunk.module, "output_layer"):
            chunk.module.output_layer._forward_pre_hooks.clear()


def _multiplied_twice(run: Run) -> None:
    from mup_megatron.live.hooks import ScaledOutput

    _embedding(run).register_forward_hook(ScaledOutput(3.0))


def _another_multiplier(run: Run) -> None:
    from mup_megatron.live.hooks import ScaledInput

    _no_readout_multiplier(run)
    run.chunks[0].module.output_layer.register_forward_pre_hook(ScaledInput(2.0))


def _on_the_wrong_side(run: Run) -> None:
    from mup_megatron.live.hooks import ScaledOutput

    _no_readout_multiplier(run)
    run.chunks[0].module.output_layer.register_forward_hook(ScaledOutput(0.5))


def _multiplier_too_many(run: Run) -> None:
    from mup_megatron.live.hooks import ScaledInput

    run.chunks[0].module.decoder.layers[3].mlp.linear_fc2.register_forward_pre_hook(ScaledInput(2.0))


# ---- weights -------------------------------------------------------------------------------------------------------


def _change(name: str, change: Callable[[torch.Tensor], Any]) -> Callable[[Run], None]:
    def broken(run: Run) -> None:
        with torch.no_grad():
            change(run.chunks[0].module.get_parameter(name))

    return broken


def _drawn_without_plan(run: Run) -> None:
    with torch.no_grad():
        for layer in run.chunks[0].module.decoder.layers:
            layer.mlp.linear_fc1.weight.normal_(0, 0.05)


# ---- optimizer -----------------------------------------------------------------------------------------------------


def _live(run: Run, name: str) -> dict[str, Any]:
    from mup_megatron.megatron.optimizer import parameters_with_groups

    found = parameters_with_groups(run.optimizer, run.chunks, tied=True)
    return next(groups[0] for own, _, groups in found if own == name)


def _all_groups(**values: Any) -> Callable[[Run], None]:
    def broken(run: Run) -> None:
        for group in run.optimizer.param_groups:
            group.update(values)
        run.scheduler.step(0)

    return broken


def _group_of(name: str, **factors: float) -> Callable[[Run], None]:
    def broken(run: Run) -> None:
        group = _live(run, name)
        group.update({key: group[key] * factor for key, factor in factors.items()})
        run.scheduler.step(0)

    return broken


def _without_max_lr(run: Run) -> None:
    del _live(run, FC1.format(0))["max_lr"]
    run.scheduler.step(0)


def _mixed_up(run: Run) -> None:
    fc1, qkv = _live(run, FC1.format(0)), _live(run, "decoder.layers.0.self_attention.linear_qkv.weight")
    for key in ("max_lr", "min_lr"):
        fc1[key], qkv[key] = qkv[key], fc1[key]
    run.scheduler.step(0)


def _decoupled(run: Run) -> None:
    run.optimizer.config.decoupled_lr = 0.125
    _live(run, "embedding.word_embeddings.weight")["max_lr"] = 0.125
    run.scheduler.step(0)


def _overridden(run: Run) -> None:
    run.scheduler.override_opt_param_scheduler = True
    _all_groups(max_lr=PLAN.lr, min_lr=PLAN.min_lr)(run)


def _freeze(chunks: list[Any]) -> None:
    chunks[0].get_parameter("decoder.layers.2.mlp.linear_fc2.weight").requires_grad = False


def _lose(run: Run) -> None:
    name = "decoder.layers.2.mlp.linear_fc2.weight"
    lost, group = run.chunks[0].module.get_parameter(name), _live(run, name)
    group["params"] = [p for p in group["params"] if p is not lost]


def _double(run: Run) -> None:
    name = "decoder.layers.2.mlp.linear_fc2.weight"
    doubled = run.chunks[0].module.get_parameter(name)
    _live(run, "decoder.final_layernorm.weight")["params"].append(doubled)


def _decayed_vectors(run: Run) -> None:
    _live(run, NORM)["wd_mult"] = 1.0
    run.scheduler.step(0)


def _other_betas(run: Run) -> None:
    _live(run, FC1.format(0))["betas"] = (0.9, 0.999)


# ---- schedule ------------------------------------------------------------------------------------------------------


def _schedule(run: Run, kind: Any = None, init_lr: float = 0.0, lr: float = PLAN.lr) -> Any:
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    made = (kind or OptimizerParamScheduler)(
        run.optimizer, init_lr, lr, PLAN.min_lr, 4, 20, "linear", 0.1, 0.1, 20, "constant"
    )
    made.step(2)
    return made


def _warmed_up(run: Run) -> None:
    run.scheduler = _schedule(run, init_lr=5e-4)


def _of_another_recipe(run: Run) -> None:
    run.scheduler = _schedule(run, lr=2e-3)


def _of_another_optimizer(run: Run) -> None:
    run.scheduler = planned.prepare(tuned(), TIED, Layout()).scheduler


def _flat_subclass(run: Run) -> None:
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    class Flat(OptimizerParamScheduler):
        def get_lr(self, param_group: Any) -> float:
            return float(super().get_lr({}))

    run.scheduler = _schedule(run, Flat)


def _flat_torch(run: Run) -> None:
    """Torch's own, on groups whose `lr` is the same: what they were built with."""
    for group in run.optimizer.param_groups:
        group["lr"] = PLAN.lr
    run.scheduler = torch.optim.lr_scheduler.LambdaLR(run.optimizer.optimizer, lambda step: 0.5)


def _rate_set_by_hand(run: Run) -> None:
    run.scheduler = _schedule(run)
    _live(run, FC1.format(0))["lr"] *= 1.44


# ---- mistakes ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mistake:
    """What is broken in a right run, and the only thing that the guard may say about it."""

    broken: Callable[[Run], None] | None
    quantities: set[str]
    name: str
    values: tuple[str, str]
    """Expected and found, as the message has them."""
    cause: str
    edit: Callable[[list[Any]], None] | None = None
    """Of the built model, before the plan is applied."""


def _core(layer: int) -> str:
    return f"decoder.layers.{layer}.self_attention.core_attention"


SCALE = {"softmax scale"}
FC2 = "decoder.layers.2.mlp.linear_fc2.weight"
BIAS = "decoder.layers.1.mlp.linear_fc1.bias"
NORM = "decoder.layers.0.input_layernorm.weight"
QKV = "decoder.layers.0.self_attention.linear_qkv.weight"
# 8·√8/16; η·2/4 for fc1, η/4 elsewhere.
MISTAKES = {
    "scale set and ignored": Mistake(
        _ignores_the_scale,
        SCALE,
        _core(0),
        ("1.41421", "0.25"),
        "has the right softmax_scale and computes with another",
    ),
    "attention without a scale": Mistake(
        _has_no_scale, SCALE, _core(1), ("1.41421", "0.25"), "(OwnAttention) has no softmax_scale and computes"
    ),
    "attention that cannot be asked": Mistake(
        _cannot_be_asked, SCALE, _core(1), ("1.41421", "unknown"), "(UnknownAttention) has no softmax_scale and cannot"
    ),
    "attention that only says": Mistake(
        _cannot_be_measured_and_says_another, SCALE, _core(1), ("1.41421", "0.5"), "Leave softmax_scale to the plan"
    ),
    "scale not set": Mistake(_default_scale, SCALE, _core(2), ("1.41421", "0.25"), "Megatron's own 1/√d"),
    "scale slightly off": Mistake(_other_scale, SCALE, _core(2), ("1.41421", "1.41563"), "attention_multiplier"),
    "scale far off": Mistake(_huge_scale, SCALE, _core(2), ("1.41421", "1414.21"), "attention_multiplier"),
    "no scale for inference": Mistake(
        _no_scale_for_inference,
        {"softmax scale of dynamic inference"},
        "decoder.layers.3.self_attention",
        ("1.41421", "not set"),
        "dynamic inference does",
    ),
    "hook lost at the embedding": Mistake(
        _no_embedding_multiplier,
        {"multiplier"},
        "embedding.word_embeddings",
        ("3 on its output", "none"),
        "hook is gone",
    ),
    "hook lost at the readout": Mistake(
        _no_readout_multiplier, {"multiplier"}, "output_layer", ("0.5 on its input", "none"), "The hook is gone"
    ),
    "hook twice": Mistake(
        _multiplied_twice,
        {"multiplier"},
        "embedding.word_embeddings",
        ("3 on its output", "3 on its output and 3 on its output"),
        "applied more than once",
    ),
    "hook of another factor": Mistake(
        _another_multiplier, {"multiplier"}, "output_layer", ("0.5 on its input", "2 on its input"), "Another recipe's"
    ),
    "hook on the wrong side": Mistake(
        _on_the_wrong_side,
        {"multiplier"},
        "output_layer",
        ("0.5 on its input", "0.5 on its output"),
        "Another recipe's",
    ),
    "hook too many": Mistake(
        _multiplier_too_many, {"multiplier"}, "decoder.layers.3.mlp.linear_fc2", ("none", "2 on its input"), "no multip"
    ),
    "hidden std without the plan": Mistake(
        _drawn_without_plan, {"initial std"}, FC1.format(0), ("0.025", "0.0"), "0.05 is what it has without μP"
    ),
    "Xavier's std": Mistake(
        _change(FC1.format(1), torch.nn.init.xavier_uniform_),
        {"initial std"},
        FC1.format(1),
        ("0.025", "0.07"),
        "--init-method-xavier-uniform",
    ),
    "NaN": Mistake(
        _change(FC1.format(1), lambda w: w[3].fill_(math.nan)),
        {"initial std"},
        FC1.format(1),
        ("0.025", "nan"),
        "drawn",
    ),
    "draw off its centre": Mistake(
        _change(FC1.format(1), lambda w: w.add_(0.004)), {"initial mean"}, FC1.format(1), ("0", "0.00"), "not centred"
    ),
    "bias not zero": Mistake(
        _change(BIAS, lambda b: b[5].fill_(1e-3)), {"initial value"}, BIAS, ("0", "0.001"), "after the plan was applied"
    ),
    "gain not one": Mistake(
        _change(NORM, lambda g: g.fill_(1.01)), {"initial value"}, NORM, ("1", "1.01"), "after the plan was applied"
    ),
    "one learning rate": Mistake(
        _all_groups(max_lr=PLAN.lr), {"max_lr"}, QKV, ("0.00025", "0.001"), "All groups have one learning rate"
    ),
    "a group's rate × 1.44": Mistake(
        _group_of(FC1.format(0), max_lr=1.44),
        {"max_lr"},
        FC1.format(0),
        ("0.0005", "0.00072"),
        "Something changed this group",
    ),
    "a group's own rate lost": Mistake(
        _group_of(FC1.format(0), max_lr=2.0), {"max_lr"}, FC1.format(0), ("0.0005", "0.001"), "this group's own is lost"
    ),
    "a group without a rate": Mistake(
        _without_max_lr, {"max_lr"}, FC1.format(0), ("0.0005", "not set"), "the scheduler takes the base's"
    ),
    "groups mixed up": Mistake(
        _mixed_up, {"max_lr", "min_lr"}, FC1.format(0), ("0.0005", "0.00025"), "a loaded checkpoint mixed up the groups"
    ),
    "decoupled learning rate": Mistake(
        _decoupled, {"max_lr"}, "embedding.word_embeddings.weight", ("0.001", "0.125"), "drop --decoupled-lr"
    ),
    "overridden after a load": Mistake(
        _overridden, {"max_lr", "min_lr"}, QKV, ("0.00025", "0.001"), "--override-opt-param-scheduler"
    ),
    "floor unscaled": Mistake(_all_groups(min_lr=PLAN.min_lr), {"min_lr"}, QKV, ("2.5e-05", "0.0001"), "own is lost"),
    "eps unscaled": Mistake(
        _all_groups(eps=PLAN.adam_eps),
        {"eps"},
        "embedding.word_embeddings.weight",
        ("2.5e-09", "1e-08"),
        "eps is the base's",
    ),
    "another eps": Mistake(
        _all_groups(eps=1e-5), {"eps"}, "embedding.word_embeddings.weight", ("2.5e-09", "1e-05"), "Another eps"
    ),
    "weight decay uncompensated": Mistake(
        _group_of(QKV, wd_mult=0.25), {"weight decay"}, QKV, ("0.4", "0.1"), "not compensated"
    ),
    "weight decay of vectors": Mistake(
        _decayed_vectors,
        {"weight decay"},
        NORM,
        ("0", "0.1"),
        "Biases and gains have none",
    ),
    "another weight decay": Mistake(
        _group_of(QKV, wd_mult=3.0),
        {"weight decay"},
        QKV,
        ("0.4", "1.2"),
        "Something changed this group's weight decay",
    ),
    "other betas": Mistake(_other_betas, {"betas"}, FC1.format(0), ("(0.9, 0.95)", "(0.9, 0.999)"), "to the recipe"),
    "frozen": Mistake(None, {"training"}, FC2, ("on", "off"), "Unfreeze it", _freeze),
    "lost": Mistake(_lose, {"optimizer group"}, FC2, ("one", "none"), "would stay as it is"),
    "in two groups": Mistake(_double, {"optimizer group"}, FC2, ("one", "2"), "to one group only"),
    "warm-up from a rate": Mistake(
        _warmed_up, {"lr_warmup_init"}, "schedule", ("0", "0.0005"), "drop --lr-warmup-init"
    ),
    "schedule of another recipe": Mistake(
        _of_another_recipe, {"max_lr"}, "schedule", ("0.001", "0.002"), "an old checkpoint"
    ),
    "schedule of another optimizer": Mistake(
        _of_another_optimizer, {"optimizer"}, "schedule", ("the run's", "another"), "Make it for this one"
    ),
    "schedule that flattens": Mistake(
        _flat_subclass, {"lr"}, QKV, ("0.000125", "0.0005"), "gives all groups one learning rate"
    ),
    "torch's schedule": Mistake(_flat_torch, {"lr"}, QKV, ("0.000125", "0.0005"), "gives all groups one learning rate"),
    "a rate set by hand": Mistake(
        _rate_set_by_hand, {"lr"}, FC1.format(0), ("0.00025", "0.00036"), "Leave it to the scheduler"
    ),
}


@dataclass(frozen=True)
class Said:
    message: str | None
    quantities: set[str]


def _problems(run: Run) -> set[str]:
    from mup_megatron.megatron import guard

    return {
        problem.quantity
        for problem in (
            *guard.attention_problems(run.chunks, PLAN),
            *guard.multiplier_problems(run.chunks, PLAN),
            *guard.weight_problems(run.chunks, PLAN),
            *guard.optimizer_problems(run.chunks, PLAN, run.optimizer, run.scheduler),
            *guard.schedule_problems(PLAN, run.scheduler, run.optimizer),
        )
    }


def _made(names: list[str]) -> dict[str, Said]:
    found = {}
    for name in names:
        mistake = MISTAKES[name]
        run = planned.prepare(tuned(), TIED, Layout(), edit=mistake.edit)
        if mistake.broken is not None:
            mistake.broken(run)
        found[name] = Said(guarded(run, PLAN, weights=True), _problems(run))
    return found


@pytest.fixture(scope="module")
def made() -> dict[str, Said]:
    return run_ranks(_made, 1, list(MISTAKES))[0]


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_named_with_its_cause(made: dict[str, Said], name: str) -> None:
    mistake, said = MISTAKES[name], made[name]
    assert said.message is not None, "not noticed"
    line = next(line for line in said.message.splitlines() if line.startswith(f"  {mistake.name}"))
    expected, found = mistake.values
    assert f"should be {expected} and is {found}" in line
    assert mistake.cause in line


@pytest.mark.parametrize("name", MISTAKES)
def test_nothing_but_the_mistake_is_named(made: dict[str, Said], name: str) -> None:
    assert made[name].quantities == MISTAKES[name].quantities


# ---- what is no mistake --------------------------------------------------------------------------------------------


def _folded() -> tuple[Run, Plan]:
    from mup_megatron.megatron.model import apply_plan
    from mup_megatron.megatron.optimizer import config_overrides

    plan = folding.fold(PLAN)
    sizes, config, chunks = planned.built(TIED, Layout())
    apply_plan(chunks, plan)
    training = planned.training_of(tuned())
    return stock.finish(sizes, Layout(), training, config, chunks, lambda c, o: config_overrides(c, plan, o)), plan


def _reset_gain() -> str | None:
    run, plan = _folded()
    _change("decoder.final_layernorm.weight", lambda g: g.fill_(1.0))(run)
    return guarded(run, plan, weights=True)


def test_a_gain_that_holds_a_multiplier_has_to_keep_it() -> None:
    said = run_ranks(_reset_gain, 1)[0]
    assert said is not None
    assert "decoder.final_layernorm.weight: initial value should be 0.166667 and is 1. A multiplier is folded" in said


def _welcome() -> list[str | None]:
    said = []
    # At the base's head size and attention_multiplier 1 any attention with 1/√d will do.
    recipe, target = planned.recipe(gpt(vocab_size=64)), gpt(4, vocab_size=64)
    for attention in (OwnAttention, UnknownAttention):
        run = planned.prepare(recipe, target, Layout())
        _attention(run, 1).core_attention = attention()
        said.append(guarded(run, recipe.plan(target)))
    # One that cannot be called is believed.
    run = planned.prepare(tuned(), TIED, Layout())
    _attention(run, 1).core_attention = UnknownAttention(PLAN.softmax_scale)
    said.append(guarded(run, PLAN))
    # Torch's scheduler, made to keep the ratios.
    run = planned.prepare(tuned(), TIED, Layout())
    for group in run.optimizer.param_groups:
        group["lr"] = group["max_lr"]
    run.scheduler = torch.optim.lr_scheduler.LambdaLR(run.optimizer.optimizer, lambda step: 0.5)
    said.append(guarded(run, PLAN))
    # Multipliers inside the weights.
    run, plan = _folded()
    said.append(guarded(run, plan, weights=True))
    # No scheduler yet: groups have torch's defaults.
    run = planned.prepare(tuned(), TIED, Layout())
    for group in run.optimizer.param_groups:
        group.update(lr=PLAN.lr, weight_decay=PLAN.weight_decay)
    run.scheduler = None
    said.append(guarded(run, PLAN))
    return said


def test_what_is_right_in_another_way_passes() -> None:
    assert run_ranks(_welcome, 1)[0] == [None] * 6


def _padded() -> str | None:
    model = gpt(4, vocab_size=48)
    recipe = planned.recipe(gpt(vocab_size=48))
    run = planned.prepare(recipe, model, Layout(tp=2))
    if torch.distributed.get_rank() == 1:
        with torch.no_grad():
            run.chunks[0].module.embedding.word_embeddings.weight[-16:] = 0
    return guarded(run, recipe.plan(model), weights=True)


def test_rows_that_pad_the_vocabulary_may_be_anything() -> None:
    assert run_ranks(_padded, 2) == [None, None]


def _draws() -> tuple[int, list[int]]:
    """False alarms over many draws, and how many elements it takes to notice a std that is 1.5 of what it should be."""
    from mup_megatron.live.weights import _drawn

    generator = torch.Generator().manual_seed(0)
    alarms, noticed = 0, []
    for n, times in ((1, 3000), (2, 3000), (7, 3000), (64, 2000), (1000, 1000), (100_000, 20)):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for _ in range(times // 3):
                values = (0.02 * torch.randn(n, generator=generator)).to(dtype)
                alarms += len(_drawn(values, PLAN[QKV], 0.02))
        if _drawn(0.03 * torch.randn(n, generator=generator), PLAN[QKV], 0.02):
            noticed.append(n)
    return alarms, noticed


def test_no_draw_gives_a_false_alarm() -> None:
    alarms, noticed = run_ranks(_draws, 1)[0]
    assert alarms == 0
    assert noticed == [1000, 100_000]


def _zeros() -> tuple[int, list[str]]:
    from mup_megatron.live.weights import _drawn

    wrong = _drawn(torch.full((4,), 0.5), PLAN[QKV], 0.0)
    return len(_drawn(torch.zeros(4), PLAN[QKV], 0.0)), [str(problem) for problem in wrong]


def test_what_starts_at_zero_has_to_be_zero() -> None:
    right, (wrong,) = run_ranks(_zeros, 1)[0]
    assert right == 0
    assert "initial std should be 0 and is 0.5" in wrong


# ---- several ranks -------------------------------------------------------------------------------------------------


def _lose_shards(run: Run) -> None:
    """Out of the distributed optimizer's groups, behind its back."""
    _live(run, "decoder.final_layernorm.weight")["params"].clear()


def _first_attention(run: Run) -> None:
    _attention(run, 0).core_attention.softmax_scale = 0.25


ON_ONE_RANK: dict[str, tuple[Layout, Callable[[Run], None], tuple[str, ...]]] = {
    "attention": (Layout(tp=2), _default_scale, (f"{_core(2)}: softmax scale",)),
    "attention of a later stage": (Layout(pp=2), _first_attention, (f"{_core(2)}: softmax scale",)),
    "readout": (Layout(pp=2), _no_readout_multiplier, ("output_layer: multiplier",)),
    "weights": (EVERYTHING, _change(BIAS, lambda b: b.fill_(1.0)), (f"{BIAS}: initial value",)),
    "rates": (Layout(tp=2), _all_groups(max_lr=PLAN.lr), ("max_lr", "(and 3 more layers)")),
    "groups": (
        EVERYTHING,
        _lose_shards,
        ("optimizer group should be one and is none", "Besides: 14 × optimizer group."),
    ),
    "layers of a later stage": (
        Layout(pp=2, vpp=2),
        _change("decoder.layers.0.mlp.linear_fc1.bias", lambda b: b.fill_(1.0)),
        (f"{BIAS}: initial value",),
    ),
}


def _wrong_on_rank_1() -> list[str | None]:
    said = []
    for layout, broken, _ in ON_ONE_RANK.values():
        run = planned.prepare(tuned(), TIED, layout)
        if torch.distributed.get_rank() == 1:
            broken(run)
        said.append(guarded(run, PLAN, weights=True))
    return said


@pytest.fixture(scope="module")
def wrong_on_rank_1() -> list[list[str | None]]:
    return run_ranks(_wrong_on_rank_1, 2)


@pytest.mark.parametrize("name", ON_ONE_RANK)
def test_what_is_wrong_on_one_rank_is_said_on_all(wrong_on_rank_1: list[list[str | None]], name: str) -> None:
    index = list(ON_ONE_RANK).index(name)
    first, second = (of_rank[index] for of_rank in wrong_on_rank_1)
    assert first is not None
    assert first == second
    for words in ON_ONE_RANK[name][2]:
        assert words in first
    assert len(first.splitlines()) <= 7
