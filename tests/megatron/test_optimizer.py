"""A plan in Megatron's own optimizer: every parameter's group, in every kind of optimizer, and across a checkpoint."""

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import planned, stock
from support.processes import run_ranks
from support.shapes import gpt
from support.stock import Layout, Run

from mup_megatron.recipe import Recipe

BASE = gpt(vocab_size=64)
WIDE = gpt(4, vocab_size=64)


def _live(run: Run) -> dict[str, dict[str, Any]]:
    from mup_megatron.megatron.optimizer import live_values

    return {
        name: asdict(values) for name, values in live_values(run.optimizer, run.chunks, tied=run.sizes.tied).items()
    }


# ---- SGD -----------------------------------------------------------------------------------------------------------


def _sgd(recipe: Recipe) -> tuple[list[float], dict[str, dict[str, Any]], dict[str, tuple[torch.Tensor, ...]]]:
    """Losses, groups at the peak, and (before, gradient, after) of each tensor over a step with the peak's rate."""
    training = replace(planned.training_of(recipe), warmup_steps=0, clip_grad=0.0)
    run = planned.prepare(recipe, WIDE, Layout(), training=training, same_weights=True)
    live = _live(run)
    named = dict(run.chunks[0].module.named_parameters())
    before = {name: p.detach().clone() for name, p in named.items()}
    losses = stock.train(run, 1)
    moved = {name: (before[name], p.main_grad.clone(), p.detach().clone()) for name, p in named.items()}
    return losses + stock.train(run, 9), live, moved


def _sgd_both() -> list[Any]:
    return [_sgd(planned.recipe(BASE, rule=rule, optimizer="sgd", lr=0.1, min_lr=0.01)) for rule in ("mup", "standard")]


def test_sgd_with_momentum_trains_with_the_plans_rates() -> None:
    recipe = planned.recipe(BASE, optimizer="sgd", lr=0.1, min_lr=0.01)
    plan = recipe.plan(WIDE)
    (losses, live, moved), (standard, *_) = run_ranks(_sgd_both, 1)[0]
    assert losses[-1] < losses[0] - 0.05
    assert max(abs(a - b) for a, b in zip(losses, standard, strict=True)) > 1e-2
    assert len({entry.lr for entry in plan.entries}) > 1
    assert live.keys() == plan.by_name.keys()
    for entry in plan.entries:
        assert live[entry.name]["lr"] == pytest.approx(entry.lr, rel=1e-12)
        assert live[entry.name]["weight_decay"] == pytest.approx(entry.weight_decay, rel=1e-12)
        assert live[entry.name]["eps"] is None
        # The first step of SGD with coupled weight decay, whatever the momentum.
        before, gradient, after = moved[entry.name]
        expected = before - entry.lr * (gradient + entry.weight_decay * before)
        assert torch.allclose(after, expected, rtol=1e-5, atol=1e-7), entry.name


# ---- Adam ----------------------------------------------------------------------------------------------------------


def _bf16() -> tuple[dict[str, dict[str, Any]], list[float], set[torch.dtype]]:
    """As Megatron-LM trains in bf16: weights in bf16, the optimizer's own copy in fp32."""

    def to_bf16(chunks: Sequence[Any]) -> None:
        for chunk in chunks:
            chunk.bfloat16()

    def configure(config: Any) -> None:
        config.bf16 = True
        config.params_dtype = torch.bfloat16

    changes = {"bf16": True, "params_dtype": torch.bfloat16, "pipeline_dtype": torch.bfloat16}
    run = planned.prepare(
        planned.recipe(BASE), WIDE, Layout(), config_changes=changes, edit=to_bf16, edit_optimizer=configure
    )
    losses = stock.train(run, 3)
    stored = {p.dtype for group in run.optimizer.param_groups for p in group["params"]}
    return _live(run), losses, stored


def test_values_are_found_through_the_optimizers_own_copies() -> None:
    plan = planned.recipe(BASE).plan(WIDE)
    live, losses, stored = run_ranks(_bf16, 1)[0]
    assert stored == {torch.float32}
    assert len(set(losses)) == 3
    assert live.keys() == plan.by_name.keys()
    assert all(
        live[entry.name]["max_lr"] == entry.lr and live[entry.name]["eps"] == entry.eps for entry in plan.entries
    )


def _without_weight_decay() -> tuple[list[float], set[float]]:
    run = planned.prepare(planned.recipe(BASE, weight_decay=0.0, min_lr=0.0), WIDE, Layout())
    return stock.train(run, 2), {values["weight_decay"] for values in _live(run).values()}


def test_weight_decay_can_be_zero() -> None:
    losses, decays = run_ranks(_without_weight_decay, 1)[0]
    assert decays == {0.0}
    assert all(math.isfinite(loss) for loss in losses)


# ---- resume --------------------------------------------------------------------------------------------------------

# The gains of q- and k-norm keep eps where the other norms divide it by the width ratio; their learning rate and weight
# decay are the same. So these two groups differ in eps alone, which no Megatron-Core compares when it loads.
_NORMED: dict[str, Any] = {"qk_layernorm": True, "vocab_size": 64}
EPS = 1e-4


def _resumed(layout: Layout, folder: Path, distinct: bool) -> tuple[list[float], list[float], bool, bool]:
    """Losses of the uninterrupted and of the resumed run after the save, and whether groups and moments came back."""
    recipe = planned.recipe(gpt(**_NORMED), adam_eps=EPS)
    target = gpt(4, **_NORMED)

    def fresh() -> Run:
        with pytest.MonkeyPatch.context() as patch:
            if not distinct:
                patch.setattr("mup_megatron.megatron.optimizer.distinct_lr_mults", dict)
            return planned.prepare(recipe, target, layout, same_weights=True)

    first = fresh()
    stock.train(first, 4)
    stock.save(first, folder)
    values, moments = _live(first), _moments(first)
    further = stock.train(first, 4)
    second = fresh()
    stock.load(second, folder)
    same_values = _live(second) == values
    same_moments = all(one.equal(other) for one, other in zip(moments, _moments(second), strict=True))
    return further, stock.train(second, 4), same_values, same_moments


def _moments(run: Run) -> list[torch.Tensor]:
    parts = getattr(run.optimizer, "chained_optimizers", [run.optimizer])
    return [
        part.optimizer.state[p][key].clone()
        for part in parts
        for group in part.optimizer.param_groups
        for p in group["params"]
        for key in ("exp_avg", "exp_avg_sq")
    ]


LAYOUTS = {
    "one rank": Layout(distributed_optimizer=True),
    "DP2": Layout(dp=2, distributed_optimizer=True),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_groups_that_differ_in_eps_alone_are_told_apart_on_resume(layout: str, tmp_path: Path) -> None:
    where = LAYOUTS[layout]
    for uninterrupted, resumed, same_values, same_moments in run_ranks(
        _resumed, where.world_size, where, tmp_path, True
    ):
        assert same_values
        assert same_moments
        assert resumed == uninterrupted


def test_without_a_distinct_lr_mult_one_group_takes_the_others_eps(tmp_path: Path) -> None:
    """The reason for `distinct_lr_mults`. If this fails, Megatron-Core has learnt to compare eps."""
    uninterrupted, resumed, same_values, _ = run_ranks(_resumed, 1, LAYOUTS["one rank"], tmp_path, False)[0]
    assert not same_values
    assert resumed != uninterrupted
