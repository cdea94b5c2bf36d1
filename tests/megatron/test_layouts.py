"""One plan, one run: every parallel layout trains alike, and what breaks a rule or one rank is noticed."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import pytest
import torch
from support import planned, stock
from support.processes import run_ranks
from support.shapes import gpt
from support.stock import Layout, Run
from support.trained import Trained

from mup_megatron.recipe import Recipe
from mup_megatron.theory import Plan

STEPS = 6
AGREE = 1e-5
"""Losses of two layouts: rounding at this learning rate, over so many steps in fp32."""

# Width ratio 4, the head size grows too; the vocabulary is padded alike at TP 1 and TP 2.
_BOTH: dict[str, Any] = {"num_layers": 4, "vocab_size": 64, "group_query_attention": True}
_GATED: dict[str, Any] = {
    "swiglu": True,
    "normalization": "RMSNorm",
    "qk_layernorm": True,
    "position_embedding_type": "rope",
    "add_bias_linear": False,
    "untie_embeddings_and_output_weights": True,
}
_WIDE: dict[str, Any] = {"num_attention_heads": 8, "kv_channels": 16, "num_query_groups": 4}
# The head of queries and keys grows, so does one of the ranks; multi-token prediction on the last stage.
_LATENT: dict[str, Any] = {
    "multi_latent_attention": True,
    "q_lora_rank": 16,
    "qk_pos_emb_head_dim": 4,
    "v_head_dim": 8,
    "qk_layernorm": True,
    "rotary_scaling_factor": 40.0,
    "mscale_all_dim": 1.0,
    "mtp_num_layers": 2,
    "mtp_loss_scaling_factor": 0.3,
    "num_layers": 4,
    "vocab_size": 64,
    "position_embedding_type": "none",
    "normalization": "RMSNorm",
    "untie_embeddings_and_output_weights": True,
}
# All layers but the first have experts, and so has the one of multi-token prediction.
_EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "moe_layer_freq": [0, 1, 1, 1],
    "moe_shared_expert_intermediate_size": 32,
    "moe_router_topk": 2,
    "add_bias_linear": False,
}
SHAPES = {
    "tied": (gpt(**_BOTH, num_query_groups=2), gpt(4, **_BOTH, **_WIDE)),
    "untied": (gpt(**_BOTH, **_GATED, num_query_groups=2), gpt(4, **_BOTH, **_GATED, **_WIDE)),
    "latent": (
        gpt(**_LATENT, kv_lora_rank=12, qk_head_dim=8),
        gpt(4, **_LATENT, kv_lora_rank=48, qk_head_dim=12),
    ),
    "latent, experts": (
        gpt(**_LATENT, **_EXPERTS, kv_lora_rank=12, qk_head_dim=8, moe_ffn_hidden_size=32),
        gpt(4, **_LATENT, **_EXPERTS, kv_lora_rank=12, qk_head_dim=8, moe_ffn_hidden_size=64),
    ),
}

LAYOUTS = {
    "TP1": Layout(),
    "TP2": Layout(tp=2),
    "PP2": Layout(pp=2),
    "DP2": Layout(dp=2),
    "TP2 + sequence parallel + distributed optimizer": Layout(tp=2, sequence_parallel=True, distributed_optimizer=True),
    "DP2 + distributed optimizer": Layout(dp=2, distributed_optimizer=True),
    "EP2 + distributed optimizer": Layout(dp=2, ep=2, distributed_optimizer=True),
    "PP2 in two virtual stages": Layout(pp=2, vpp=2),
    "TP2 × PP2": Layout(tp=2, pp=2),
}


_SPLIT = ("TP1", "PP2 in two virtual stages", "TP2 × PP2", "TP2 + sequence parallel + distributed optimizer")
_EACH = ("TP1", "TP2", "PP2", "DP2 + distributed optimizer", *_SPLIT[1:])
_EXPERT = ("TP1", "PP2", "DP2 + distributed optimizer", "EP2 + distributed optimizer", _SPLIT[-1])
PAIRS = [
    *(("tied", layout) for layout in LAYOUTS if not layout.startswith("EP2")),
    *(("untied", layout) for layout in LAYOUTS if layout in _SPLIT),
    *(("latent", layout) for layout in LAYOUTS if layout in _EACH),
    *(("latent, experts", layout) for layout in LAYOUTS if layout in _EXPERT),
]
"""The first shape on every layout; the second where most of it is split."""
_ALWAYS = {
    "tied": (*_SPLIT, "DP2 + distributed optimizer"),
    "untied": ("TP1", "TP2 × PP2"),
    "latent": ("TP1", "PP2 in two virtual stages", "TP2 + sequence parallel + distributed optimizer"),
    "latent, experts": ("TP1", "EP2 + distributed optimizer", "TP2 + sequence parallel + distributed optimizer"),
}
OFTEN = [(shape, layout) for shape, layout in PAIRS if layout in _ALWAYS[shape]]
"""Every way to split is in one of these. What is left is a part of one of them, or another shape's."""
EACH_PAIR = pytest.mark.parametrize(
    ("shape", "layout"),
    [pytest.param(*pair, marks=() if pair in OFTEN else pytest.mark.slow) for pair in PAIRS],
)


def tuned(shape: str) -> Recipe:
    return planned.recipe(
        SHAPES[shape][0],
        init_method_std=0.05,
        embedding_multiplier=3.0,
        output_multiplier=2.0,
        attention_multiplier=8.0,
        per_parameter=[{"match": "*.linear_fc1.weight", "lr_mult": 2.0, "multiplier": 0.5}],
    )


def plan_of(shape: str) -> Plan:
    return tuned(shape).plan(SHAPES[shape][1])


TRAINING = replace(planned.training_of(tuned("tied")), decay_steps=5)
MOMENTS = {"warm-up": 1, "peak": 2, "decay": 4, "floor": STEPS}
"""Scheduler steps after which the groups are looked at."""


# ---- what can be broken by hand ------------------------------------------------------------------------------------


def _no_hooks(_model: Any, _plan: Plan) -> None: ...


def _drop_readout(run: Run) -> None:
    for chunk in run.chunks:
        chunk.module.output_layer._forward_pre_hooks.clear()


def _default_attention(run: Run) -> None:
    for chunk in run.chunks:
        for layer in chunk.module.decoder.layers:
            layer.self_attention.core_attention.softmax_scale = 1 / math.sqrt(16)


def _double_lr(run: Run) -> None:
    for group in run.optimizer.param_groups:
        group["max_lr"] *= 2


def _only(*keys: str) -> Callable[..., dict[str, float]]:
    from mup_megatron.megatron import optimizer

    original = optimizer._override
    return lambda entry, plan: {k: v for k, v in original(entry, plan).items() if k in keys}


MUTATIONS: dict[str, Callable[[], tuple[str, str, Any]]] = {
    # what is broken: (module of the adapter, name in it, what takes its place)
    "no multipliers": lambda: ("model.hooks", "attach", _no_hooks),
    "no attention scale": lambda: ("model", "_set_softmax_scale", _no_hooks),
    "no rescaling of the draw": lambda: ("model", "_initialize", lambda *_: None),
    "one learning rate": lambda: ("optimizer", "_override", _only("wd_mult", "eps")),
    "one weight decay": lambda: ("optimizer", "_override", _only("max_lr", "min_lr", "lr_mult", "eps")),
    "one eps": lambda: ("optimizer", "_override", _only("max_lr", "min_lr", "lr_mult", "wd_mult")),
    "an unscaled floor": lambda: ("optimizer", "_override", _only("max_lr", "lr_mult", "wd_mult", "eps")),
}
SABOTAGE = {"learning rate": _double_lr, "readout multiplier": _drop_readout, "attention scale": _default_attention}
"""What is broken on one rank of a healthy run."""


# ---- runs ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    shape: str = "tied"
    layout: str = "TP1"
    plug_in: bool = True
    mutation: str | None = None
    """Of the adapter, on every rank."""
    sabotage: str | None = None
    """Of rank 1 alone."""


@dataclass(frozen=True)
class Result:
    """Of one rank."""

    losses: list[float]
    start: list[planned.Piece]
    """The weights before the first step."""
    live: dict[str, dict[str, dict[str, float]]]
    """Moment → parameter → what its group holds."""
    scales: dict[str, float]


@dataclass(frozen=True)
class Outcome:
    """Of all ranks together."""

    losses: list[float]
    start: dict[str, torch.Tensor]
    live: dict[str, dict[str, dict[str, float]]]
    scales: set[float]


def _result(case: Case) -> Result:
    from mup_megatron.megatron.model import softmax_scales
    from mup_megatron.megatron.optimizer import live_values

    recipe, (_, target) = tuned(case.shape), SHAPES[case.shape]
    with pytest.MonkeyPatch.context() as patch:
        if case.mutation is not None:
            module, name, broken = MUTATIONS[case.mutation]()
            patch.setattr(f"mup_megatron.megatron.{module}.{name}", broken)
        run = planned.prepare(
            recipe, target, LAYOUTS[case.layout], training=TRAINING, same_weights=True, plug_in=case.plug_in
        )
    if case.sabotage is not None and torch.distributed.get_rank() == 1:
        SABOTAGE[case.sabotage](run)
    start = planned.pieces([chunk.module for chunk in run.chunks])
    losses, live = [], {}
    for step in range(1, STEPS + 1):
        losses += stock.train(run, 1)
        for moment in (name for name, at in MOMENTS.items() if at == step):
            values = live_values(run.optimizer, run.chunks, tied=target.tied)
            live[moment] = {name: asdict(value) for name, value in values.items()}
    scales = {name: scale for chunk in run.chunks for name, scale in softmax_scales(chunk).items()}
    return Result(losses, start, live, scales)


def _results(cases: Sequence[Case]) -> list[Result]:
    return [_result(case) for case in cases]


def _outcomes(cases: Sequence[Case]) -> dict[Case, Outcome]:
    """All cases, those of one world size in one set of processes."""
    outcomes = {}
    for size in {LAYOUTS[case.layout].world_size for case in cases}:
        together = [case for case in cases if LAYOUTS[case.layout].world_size == size]
        of_ranks = run_ranks(_results, size, together)
        outcomes |= {case: _joined([rank[i] for rank in of_ranks]) for i, case in enumerate(together)}
    return outcomes


def _joined(ranks: Sequence[Result]) -> Outcome:
    assert all(rank.losses == ranks[0].losses for rank in ranks)
    live: dict[str, dict[str, dict[str, float]]] = {moment: {} for moment in MOMENTS}
    for rank in ranks:
        for moment, of_parameters in rank.live.items():
            for name, values in of_parameters.items():
                # The odd one out wins: a parameter has the right values only if it has them on every rank.
                known = live[moment].setdefault(name, values)
                live[moment][name] = known if values == known else {**values, "lr": math.nan}
    scales = {scale for rank in ranks for scale in rank.scales.values()}
    return Outcome(ranks[0].losses, planned.assembled([rank.start for rank in ranks]), live, scales)


Outcomes = Trained[Case, Outcome]


@pytest.fixture(scope="module")
def healthy() -> Outcomes:
    """All pairs, and the shapes without the plug-in."""
    without = [Case(shape, plug_in=False) for shape in SHAPES]
    seldom = [Case(*pair) for pair in PAIRS if pair not in OFTEN]
    return Trained(_outcomes, [*(Case(*pair) for pair in OFTEN), *without], seldom)


@pytest.fixture(scope="module")
def broken() -> dict[Case, Outcome]:
    mutated = [Case(mutation=mutation) for mutation in MUTATIONS]
    return _outcomes([*mutated, *(Case(layout="TP2", sabotage=what) for what in SABOTAGE)])


def _distance(a: Outcome, b: Outcome) -> float:
    return max(abs(x - y) for x, y in zip(a.losses, b.losses, strict=True))


def _require_live_values(outcome: Outcome, plan: Plan) -> None:
    """The optimizer holds what plan and schedule say, for every parameter of the model, at every moment."""
    for moment, step in MOMENTS.items():
        at_peak, at_floor = planned.lr_fraction(TRAINING, step)
        assert outcome.live[moment].keys() == plan.by_name.keys()
        for entry in plan.entries:
            values = outcome.live[moment][entry.name]
            floor = plan.min_lr * entry.lr / plan.lr
            assert values["lr"] == pytest.approx(at_peak * entry.lr + at_floor * floor, rel=1e-12), entry.name
            assert values["weight_decay"] == pytest.approx(entry.weight_decay, rel=1e-12), entry.name
            assert values["eps"] == entry.eps, entry.name


# ---- what must hold ------------------------------------------------------------------------------------------------


@EACH_PAIR
def test_losses_agree_on_every_layout(healthy: Outcomes, shape: str, layout: str) -> None:
    assert _distance(healthy[Case(shape, layout)], healthy[Case(shape)]) < AGREE


@EACH_PAIR
def test_every_layout_starts_from_the_same_weights(healthy: Outcomes, shape: str, layout: str) -> None:
    """What the layouts' losses have in common is the plug-in's doing, not the draw's."""
    one, other = healthy[Case(shape)].start, healthy[Case(shape, layout)].start
    assert one.keys() == other.keys()
    assert all(tensor.equal(other[key]) for key, tensor in one.items())


@pytest.mark.parametrize("shape", SHAPES)
def test_losses_differ_without_the_plug_in(healthy: Outcomes, shape: str) -> None:
    assert _distance(healthy[Case(shape, plug_in=False)], healthy[Case(shape)]) > 1e-2


@EACH_PAIR
def test_groups_hold_the_plan_times_the_schedule(healthy: Outcomes, shape: str, layout: str) -> None:
    _require_live_values(healthy[Case(shape, layout)], plan_of(shape))


@EACH_PAIR
def test_every_layer_has_the_plans_attention_scale(healthy: Outcomes, shape: str, layout: str) -> None:
    assert healthy[Case(shape, layout)].scales == {plan_of(shape).softmax_scale}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_broken_rule_is_noticed(healthy: Outcomes, broken: dict[Case, Outcome], mutation: str) -> None:
    _require_noticed(healthy[Case()], broken[Case(mutation=mutation)])


@pytest.mark.parametrize("what", SABOTAGE)
def test_one_broken_rank_is_noticed(healthy: Outcomes, broken: dict[Case, Outcome], what: str) -> None:
    outcome = broken[Case(layout="TP2", sabotage=what)]
    assert _distance(outcome, healthy[Case()]) > 10 * AGREE
    _require_noticed(healthy[Case()], outcome)


def _require_noticed(reference: Outcome, outcome: Outcome) -> None:
    with pytest.raises(AssertionError):
        _require_the_same(reference, outcome)


def _require_the_same(reference: Outcome, outcome: Outcome) -> None:
    """All that the tests above require of a layout."""
    assert _distance(outcome, reference) < AGREE
    assert outcome.scales == reference.scales
    _require_live_values(outcome, plan_of("tied"))


def test_the_comparison_that_notices_passes_what_is_healthy(healthy: Outcomes) -> None:
    _require_the_same(healthy[Case()], healthy[Case(layout="TP2 × PP2")])


# ---- Megatron's own draw -------------------------------------------------------------------------------------------


# Experts of a layer are one tensor in a checkpoint: `test_expert_layouts.py` looks at their draws.
_GATHERED = ("tied", "untied", "latent")


def _drawn(layout: Layout) -> dict[str, list[planned.Piece]]:
    """Of each shape Megatron's own draw, whose stds are not the recipe's, made the plan's."""
    from mup_megatron.megatron.model import apply_plan

    drawn = {}
    for shape in _GATHERED:
        _, target = SHAPES[shape]
        _, _, chunks = planned.built(target, layout, config_changes={"embedding_init_method_std": 0.01})
        apply_plan(chunks, plan_of(shape))
        drawn[shape] = planned.pieces(chunks)
    return drawn


@pytest.mark.parametrize("layout", ["TP1", "TP2 × PP2", "PP2 in two virtual stages"])
def test_gathered_weights_have_the_plans_std(layout: str) -> None:
    of_ranks = run_ranks(_drawn, LAYOUTS[layout].world_size, LAYOUTS[layout])
    for shape in _GATHERED:
        _require_plans_std(planned.assembled([rank[shape] for rank in of_ranks]), plan_of(shape))


def _require_plans_std(drawn: dict[str, torch.Tensor], plan: Plan) -> None:
    checked = set()
    for key, tensor in drawn.items():
        for entry in planned.family(plan, key):
            checked.add(entry.name)
            if entry.init_std is None:
                assert tensor.eq(entry.init_value).all(), key
            else:
                standard_error = entry.init_std / math.sqrt(2 * tensor.numel())
                assert abs(float(tensor.double().std()) - entry.init_std) < 4 * standard_error, key
    assert {entry.name for entry in plan.entries if entry.init_std is not None} <= checked


def _other_padding() -> tuple[int, list[float]]:
    model = gpt(4, vocab_size=48)
    run = planned.prepare(planned.recipe(gpt(vocab_size=48)), model, Layout(tp=2))
    return run.sizes.vocab_size, stock.train(run, 2)


def test_the_padding_of_another_tensor_parallelism_is_accepted() -> None:
    vocabulary, losses = run_ranks(_other_padding, 2)[0]
    assert gpt(4, vocab_size=48).padded_vocab_size() < vocabulary == 64
    assert all(math.isfinite(loss) for loss in losses)
