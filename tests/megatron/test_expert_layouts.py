"""A model with experts and a shared one on every layout: one plan, one run, and what is wrong on one rank is noticed.

Names and global shapes are held against Megatron's own: what it calls a parameter, and of which part of which tensor it
takes a rank's values to be, when it saves them.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import pytest
import torch
from support import planned, stock
from support.processes import run_ranks
from support.shapes import gpt
from support.stock import Layout, Run
from support.trained import Trained

from mup_megatron.errors import InputError
from mup_megatron.megatron.versions import core_version
from mup_megatron.recipe import Recipe

STEPS = 6
AGREE = 1e-5

_BOTH: dict[str, Any] = {
    "num_layers": 4,
    "vocab_size": 64,
    "num_experts": 8,
    "moe_layer_freq": [0, 1, 1, 1],
    "moe_shared_expert_gate": True,
    "moe_router_load_balancing_type": "seq_aux_loss",
    "moe_aux_loss_coeff": 0.01,
    "moe_z_loss_coeff": 0.001,
    "swiglu": True,
    "normalization": "RMSNorm",
    "add_bias_linear": False,
    "untie_embeddings_and_output_weights": True,
}
BASE = gpt(1, **_BOTH, moe_ffn_hidden_size=16, moe_shared_expert_intermediate_size=24)
TARGET = gpt(4, **_BOTH, moe_ffn_hidden_size=32, moe_shared_expert_intermediate_size=96)

LAYOUTS = {
    "one process": Layout(),
    "TP2": Layout(tp=2, sequence_parallel=True),
    "PP2": Layout(pp=2),
    "EP2": Layout(dp=2, ep=2),
    "DP2 + distributed optimizer": Layout(dp=2, distributed_optimizer=True),
    "EP2 + distributed optimizer": Layout(dp=2, ep=2, distributed_optimizer=True),
    "TP2, EP2 of whole experts": Layout(tp=2, ep=2, etp=1, sequence_parallel=True),
    "TP2, of whole experts, distributed optimizer": Layout(
        tp=2, etp=1, sequence_parallel=True, distributed_optimizer=True
    ),
    "EP2 × PP2": Layout(dp=2, ep=2, pp=2),
    "EP2 × TP2": Layout(dp=2, ep=2, tp=2, sequence_parallel=True),
}
if core_version() < (0, 17, 0):
    # There experts that are split otherwise, and on no rank differ, are not added up: Megatron's own.
    del LAYOUTS["TP2, of whole experts, distributed optimizer"]
PLAIN = "without the plug-in"
OFTEN = ("one process", "TP2", "EP2", "EP2 + distributed optimizer", "TP2, EP2 of whole experts", "EP2 × PP2")
EACH_LAYOUT = pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=() if name in OFTEN else pytest.mark.slow) for name in LAYOUTS]
)


def tuned() -> Recipe:
    return planned.recipe(
        BASE,
        lr=4e-3,
        init_method_std=0.05,
        embedding_multiplier=3.0,
        output_multiplier=2.0,
        adam_eps=1e-7,
        per_parameter=[
            {"match": "*.experts.*.linear_fc1.weight", "lr_mult": 2.0, "multiplier": 0.5},
            {"match": "*.gate_weight", "multiplier": 2.0},
        ],
    )


TRAINING = replace(planned.training_of(tuned()), decay_steps=8)


@dataclass(frozen=True)
class Result:
    """Of one rank."""

    losses: list[float]
    start: list[planned.Piece]
    live: dict[str, dict[str, float]]
    """Parameter → what its group holds after the last step."""
    own: dict[str, tuple[tuple[int, ...], float]]
    """Parameter → its shape here, and the sum of its values before the first step."""
    problem: str | None = None
    """What the guard says of a rank's optimizer that was changed."""


def _result(name: str) -> Result:
    from mup_megatron.megatron.guard import require_as_planned
    from mup_megatron.megatron.names import named_parameters
    from mup_megatron.megatron.optimizer import live_values

    layout = LAYOUTS.get(name, LAYOUTS["one process"])
    run = planned.prepare(tuned(), TARGET, layout, training=TRAINING, same_weights=True, plug_in=name != PLAIN)
    plan = tuned().plan(TARGET)
    start = planned.pieces([chunk.module for chunk in run.chunks])
    held = dict(named_parameters(run.chunks, tied=False))
    own = {key: (tuple(p.shape), p.detach().double().sum().item()) for key, p in held.items()}
    if name != PLAIN:
        require_as_planned(run.chunks, plan, run.optimizer, run.scheduler, weights=True)
    losses = stock.train(run, STEPS)
    live = {key: asdict(value) for key, value in live_values(run.optimizer, run.chunks, tied=False).items()}
    problem = None
    if name == "EP2":
        _change_one_expert_of_the_last_rank(run)
        try:
            require_as_planned(run.chunks, plan, run.optimizer, run.scheduler, weights=False)
        except InputError as error:
            problem = str(error)
    return Result(losses, start, live, own, problem)


def _change_one_expert_of_the_last_rank(run: Run) -> None:
    """Another group for one matrix, with twice the learning rate."""
    if torch.distributed.get_rank() != torch.distributed.get_world_size() - 1:
        return
    [model] = [chunk.module for chunk in run.chunks]
    changed = model.decoder.layers[2].mlp.experts.local_experts[1].linear_fc2.weight
    for part in run.optimizer.chained_optimizers:
        for group in list(part.optimizer.param_groups):
            if any(parameter is changed for parameter in group["params"]):
                group["params"] = [parameter for parameter in group["params"] if parameter is not changed]
                values = {key: 2 * value if key in ("lr", "max_lr") else value for key, value in group.items()}
                part.optimizer.param_groups.append({**values, "params": [changed]})


def _results(names: Sequence[str]) -> list[Result]:
    return [_result(name) for name in names]


def _of_layouts(wanted: Sequence[str]) -> dict[str, list[Result]]:
    """Of every layout the results of its ranks."""
    found: dict[str, list[Result]] = {}
    for size in (1, 2, 4):
        names = [name for name in wanted if LAYOUTS.get(name, LAYOUTS["one process"]).world_size == size]
        of_ranks = run_ranks(_results, size, names)
        found |= {name: [rank[index] for rank in of_ranks] for index, name in enumerate(names)}
    return found


Results = Trained[str, list[Result]]


@pytest.fixture(scope="module")
def results() -> Results:
    """Of every layout; and of one process without the plug-in."""
    return Trained(_of_layouts, [*OFTEN, PLAIN], [name for name in LAYOUTS if name not in OFTEN])


@EACH_LAYOUT
def test_losses_agree_on_every_layout(results: Results, layout: str) -> None:
    expected = results["one process"][0].losses
    for rank in results[layout]:
        assert rank.losses == pytest.approx(expected, abs=AGREE)


def test_losses_differ_without_the_plug_in(results: Results) -> None:
    pairs = zip(results[PLAIN][0].losses, results["one process"][0].losses, strict=True)
    assert max(abs(one - other) for one, other in pairs) > 1e-2


@EACH_LAYOUT
def test_every_layout_starts_from_the_same_weights(results: Results, layout: str) -> None:
    """As Megatron itself puts them together: which expert is where is its affair."""
    one, other = (planned.assembled([rank.start for rank in results[name]]) for name in ("one process", layout))
    assert one.keys() == other.keys()
    assert all(tensor.equal(other[key]) for key, tensor in one.items())


@EACH_LAYOUT
def test_every_parameter_has_its_global_name(results: Results, layout: str) -> None:
    """Where matrices are not cut, what is called so is the whole one of one process."""
    whole = results["one process"][0].own
    assert {name for rank in results[layout] for name in rank.own} == set(whole)
    if LAYOUTS[layout].tp > 1:
        return
    for rank in results[layout]:
        for name, (shape, total) in rank.own.items():
            assert (shape, total) == whole[name], name


@EACH_LAYOUT
def test_groups_hold_the_plan_times_the_schedule(results: Results, layout: str) -> None:
    plan = tuned().plan(TARGET)
    at_peak, at_floor = planned.lr_fraction(TRAINING, STEPS)
    seen = set()
    for rank in results[layout]:
        for name, values in rank.live.items():
            entry = plan[name]
            seen.add(name)
            floor = plan.min_lr * entry.lr / plan.lr
            assert values["lr"] == pytest.approx(at_peak * entry.lr + at_floor * floor, rel=1e-12), name
            assert values["max_lr"] == pytest.approx(entry.lr, rel=1e-12), name
            assert values["weight_decay"] == pytest.approx(entry.weight_decay, rel=1e-12), name
            assert values["eps"] == entry.eps, name
    assert seen == plan.by_name.keys()


def test_a_wrong_rate_of_one_expert_on_one_rank_stops_all(results: Results) -> None:
    for rank in results["EP2"]:
        assert rank.problem is not None
        assert "decoder.layers.2.mlp.experts.local_experts.5.linear_fc2.weight: " in rank.problem
        assert len(rank.problem.splitlines()) == 2, "one sentence of one parameter"
