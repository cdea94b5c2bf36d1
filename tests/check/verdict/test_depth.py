"""What is seen of a model of full depth that is not trained."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.processes import run_ranks
from support.shapes import gpt, recipe_for

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.check.family.sizes import narrowest
from mup_megatron.check.measure.measurements import Grouped
from mup_megatron.check.mutants import Context, Mutant
from mup_megatron.check.run_megatron import check_megatron
from mup_megatron.check.verdict.depth import at_depth
from mup_megatron.check.verdict.verdict import CheckOutcome, Section
from mup_megatron.recipe import Hyperparameters, Recipe
from mup_megatron.theory import Plan

MODEL = gpt(2).model_copy(update={"num_layers": 12})
PLAN = recipe_for(gpt(1)).plan(MODEL)
FC1 = "decoder.layers.7.mlp.linear_fc1.weight"

Tensors = dict[str, torch.Tensor]
Groups = dict[str, Grouped]


def _right() -> tuple[Tensors, Groups]:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        entry.name: torch.full(entry.shape, entry.init_value)
        if entry.init_value is not None
        else torch.randn(entry.shape, generator=generator) * (entry.init_std or 0.0)
        for entry in PLAN.entries
    }
    groups = {e.name: Grouped(lr=e.lr, min_lr=e.min_lr, eps=e.eps, weight_decay=e.weight_decay) for e in PLAN.entries}
    return tensors, groups


def _seen(change: Callable[[Tensors, Groups], None]) -> Section:
    tensors, groups = _right()
    change(tensors, groups)
    return at_depth(PLAN, MODEL.hidden_size, tensors.items(), groups, lambda value: [value])


def test_a_model_that_is_as_planned_passes() -> None:
    section = _seen(lambda *_: None)
    assert section.outcome is CheckOutcome.PASS
    assert "12 layers" in section.lines[0]


def _scaled(tensors: Tensors, _: Groups) -> None:
    tensors[FC1] *= 1.1


def _constant(tensors: Tensors, _: Groups) -> None:
    tensors["decoder.layers.7.input_layernorm.weight"] += 0.01


def _missing(tensors: Tensors, _: Groups) -> None:
    del tensors[FC1]


def _rate(_: Tensors, groups: Groups) -> None:
    groups[FC1] = replace(groups[FC1], lr=1.01 * groups[FC1].lr)


def _floor(_: Tensors, groups: Groups) -> None:
    groups[FC1] = replace(groups[FC1], min_lr=2.0)


def _decay(_: Tensors, groups: Groups) -> None:
    groups[FC1] = replace(groups[FC1], weight_decay=7.0)


@pytest.mark.parametrize("change", [_scaled, _constant, _missing, _rate, _floor, _decay])
def test_one_layer_that_is_off_is_named(change: Callable[[Tensors, Groups], None]) -> None:
    section = _seen(change)
    assert section.outcome is CheckOutcome.FAIL
    assert len(section.lines) == 1
    assert section.lines[0].startswith("decoder.layers.7.")


def test_shards_of_ranks_add_up() -> None:
    tensors, groups = _right()
    halves = [{n: t.flatten()[i::2] for n, t in tensors.items()} for i in range(2)]
    squares = [{n: (t.double().square().sum().item(), t.numel()) for n, t in half.items()} for half in halves]
    section = at_depth(PLAN, 64, halves[0].items(), groups, lambda _: [(of_rank, groups) for of_rank in squares])
    assert section.outcome is CheckOutcome.PASS


def test_the_narrowest_width_tells_ten_percent() -> None:
    made: list[int] = []

    def plan(width: int) -> Plan:
        made.append(width)
        return recipe_for(gpt(1)).plan(gpt(width // gpt(1).hidden_size))

    one = gpt(1).hidden_size
    width, found = narrowest([one, 2 * one, 4 * one, 8 * one], plan)
    assert made[-1] == width
    smallest = min(e.fan_in * e.fan_out for e in found.entries if e.init_std and not e.is_vector)
    assert smallest >= 4096 or width == 8 * one


# ---- in a check ----------------------------------------------------------------------------------------------------


def _one_layer_off(chunks: Any, _plan: Plan, _context: Context) -> None:
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if name.endswith("layers.9.mlp.linear_fc2.weight"):
                parameter.data.mul_(1.1)


def check_deep(references: Path, mutated: bool) -> tuple[str, str | None, list[str], set[int]]:
    """In a rank."""
    small = {"num_layers": 12, "hidden_size": 256, "num_attention_heads": 2, "vocab_size": 50257, "seq_length": 2048}
    target = ModelFile(**{**small, "hidden_size": 12288, "num_attention_heads": 96})
    recipe = Recipe(base=ModelFile(**small), hyperparameters=Hyperparameters(lr=0.006))
    mutant = Mutant(name="late", what="late", cause=(), model=_one_layer_off) if mutated else None
    found = check_megatron(target, recipe, mutant=mutant, references=references, widths=(32, 64, 128), seeds=2)
    names = {key.name for key in found.comparison if key.name.startswith("decoder.layers.")}
    layers = {int(name.split(".")[2]) for name in names}
    return str(found.outcome), found.culprit, [section.name for section in found.sections], layers


@pytest.mark.slow
def test_of_a_deep_target_few_layers_train_and_the_others_are_seen(tmp_path: Path) -> None:
    outcome, _, sections, layers = run_ranks(check_deep, 1, tmp_path, False)[0]
    assert (outcome, sections[-1], layers) == ("pass", "every layer", {0, 1, 2, 3})
    outcome, culprit, *_ = run_ranks(check_deep, 1, tmp_path, True)[0]
    assert (outcome, culprit) == ("fail", "decoder.layers.9.mlp.linear_fc2.weight")
