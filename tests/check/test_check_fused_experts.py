"""A check of a Hugging Face model whose experts are one tensor of three dimensions: a batch of matrices, each of which
has its own fan_in. The number of experts is none.
"""

import math
from dataclasses import replace
from typing import Any

import pytest
import transformers
from support import small_nets
from support.hf_causal import causal
from support.hf_families import recipe_at
from torch import nn

from mup_megatron.check.run_modules import check_modules
from mup_megatron.check.subjects.scripts import Task, prepare_by_plan
from mup_megatron.check.verdict.verdict import CheckOutcome, Verdict
from mup_megatron.theory import PlanEntry


def _by_their_number(entry: PlanEntry) -> PlanEntry:
    """As if what is multiplied were the experts, as many at every width."""
    if len(entry.shape) != 3 or entry.init_std is None:
        return entry
    r = entry.width_ratio
    return replace(
        entry,
        init_std=entry.init_std * math.sqrt(r),
        lr=entry.lr * r,
        min_lr=entry.min_lr * r,
        weight_decay=entry.weight_decay / r,
    )


def _wrong(model: nn.Module, task: Task) -> Any:
    entries = tuple(map(_by_their_number, task.plan.entries))
    return prepare_by_plan(model, replace(task, plan=replace(task.plan, entries=entries)))


def _model(width: int) -> nn.Module:
    return transformers.Qwen3MoeForCausalLM(causal("qwen3_moe", width))


def _verdict(**script: Any) -> Verdict:
    return check_modules(
        _model,
        recipe_at(causal("qwen3_moe", 32), hyperparameters={"lr": 0.01, "weight_decay": 0.1}),
        widths=(32, 64, 128),
        seeds=2,
        processes=1,
        **script,
    )


@pytest.fixture(autouse=True)
def _references(monkeypatch: pytest.MonkeyPatch) -> None:
    small_nets.keep_references(monkeypatch)


@pytest.mark.slow
def test_a_right_model_passes() -> None:
    assert _verdict().outcome is CheckOutcome.PASS


@pytest.mark.slow
def test_the_number_of_experts_taken_for_their_fan_in_is_found() -> None:
    found = _verdict(prepare=_wrong)
    assert found.outcome is CheckOutcome.FAIL
    assert found.culprit is not None
    assert "mlp.experts." in found.culprit
