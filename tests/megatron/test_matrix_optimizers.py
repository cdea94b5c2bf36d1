"""Muon and Lion as Megatron-Core has them: its own routing, its own steps, every layout, and what the guard sees."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from support import planned, stock
from support.orthogonal import orthogonal
from support.processes import run_ranks
from support.shapes import MAMBA, encoder, gpt, hybrid, recipe_for
from support.stock import Layout

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.recipe import Recipe
from mup_megatron.theory import Plan

pytest.importorskip("emerging_optimizers", reason="megatron-core 0.16 has no Muon")

STEPS = 10
ONE = Layout()
GROUPS: dict[str, Any] = {"group_query_attention": True, "num_query_groups": 2, "vocab_size": 64}
EXPERTS: dict[str, Any] = {"num_experts": 4, "moe_ffn_hidden_size": 16, "add_bias_linear": False, "vocab_size": 64}
TUNED: dict[str, Any] = {"lr": 0.02, "min_lr": 0.002, "weight_decay": 0.2}


def muon(base: ModelFile, mode: str = "unit_rms_norm", **changes: Any) -> Recipe:
    return recipe_for(base, optimizer="muon", **{**TUNED, "muon_scale_mode": mode, **changes})


DENSE = muon(gpt(**GROUPS)), gpt(2, **GROUPS)
ROUTED = muon(gpt(**EXPERTS), "spectral", muon_nesterov=True), gpt(2, **EXPERTS)
LION = recipe_for(gpt(**EXPERTS), optimizer="lion", **TUNED | {"lr": 0.002}), gpt(2, **EXPERTS)
RUNS = {"dense": DENSE, "experts": ROUTED, "lion": LION}


def prepared(own: Recipe, target: ModelFile, layout: Layout = ONE, **how: Any) -> stock.Run:
    return planned.prepare(own, target, layout, same_weights=True, **how)


def losses(name: str, layout: Layout) -> list[float]:
    """In a rank; the guard looks at it before and after."""
    from mup_megatron.megatron.guard import require_as_planned

    own, target = RUNS[name]
    run = prepared(own, target, layout)
    require_as_planned(run.chunks, own.plan(target), run.optimizer, run.scheduler, weights=False)
    found = stock.train(run, STEPS)
    require_as_planned(run.chunks, own.plan(target), run.optimizer, run.scheduler, weights=False)
    return found


# ---- on one process --------------------------------------------------------------------------------------------------


SCALES: dict[str, Callable[[int, int], float]] = {
    "spectral": lambda rows, columns: math.sqrt(max(rows, columns)),
    "unit_rms_norm": lambda rows, columns: math.sqrt(rows / columns),
    "shape_scaling": lambda rows, columns: math.sqrt(max(1, rows / columns)),
}


def _step(name: str, gradient: torch.Tensor, mode: str, groups: int) -> torch.Tensor:
    """A step of Muon's for a learning rate of 1; queries, keys and values one by one, whose rows are by groups."""
    if "linear_qkv" not in name:
        return orthogonal(gradient) * SCALES[mode](*gradient.shape)
    width = gradient.shape[1]
    grouped = gradient.view(groups, -1, width)
    parts = grouped.split([grouped.shape[1] - 16, 8, 8], dim=1)
    steps = [_step("part", part.reshape(-1, width), mode, groups).view(groups, -1, width) for part in parts]
    return torch.cat(steps, dim=1).view(gradient.shape)


def _oracle(mode: str) -> dict[str, float]:
    """The largest difference between what a step of Megatron's did to each matrix and the plan, relative to it."""
    # Other modes than the spectral condition's take no fixed number of groups.
    target = gpt(2, **GROUPS) if mode == "unit_rms_norm" else gpt(2, **{**GROUPS, "num_query_groups": 4})
    own = muon(gpt(**GROUPS), mode, muon_momentum=0.0, muon_coefficient_type="simple")
    run, plan = prepared(own, target), own.plan(target)
    stock.train(run, 3)
    before = {name: p.detach().clone() for name, p in run.chunks[0].module.named_parameters()}
    gradients: dict[str, torch.Tensor] = {}
    step = run.optimizer.step

    def noted() -> Any:
        gradients.update((name, p.main_grad.clone()) for name, p in run.chunks[0].module.named_parameters())
        return step()

    run.optimizer.step = noted
    peak, floor = planned.lr_fraction(run.training, run.done)
    stock.train(run, 1)
    found = {}
    for name, parameter in run.chunks[0].module.named_parameters():
        entry = plan[name]
        if entry.optimizer == "muon":
            rate = peak * entry.lr + floor * entry.min_lr
            step_wanted = _step(name, gradients[name], mode, target.query_groups)
            wanted = -rate * (step_wanted + entry.weight_decay * before[name].double())
            moved = parameter.detach().double() - before[name].double()
            found[name] = float((moved - wanted).norm() / wanted.norm())
    return found


MODELS: dict[str, tuple[ModelFile, ModelFile]] = {
    "gpt": (gpt(), gpt(2)),
    "gpt, untied": tuple(gpt(r, untie_embeddings_and_output_weights=True, swiglu=True) for r in (1, 2)),  # type: ignore[dict-item]
    "experts": tuple(  # type: ignore[dict-item]
        gpt(r, **EXPERTS, moe_shared_expert_intermediate_size=16, moe_shared_expert_gate=True) for r in (1, 2)
    ),
    "latent": tuple(  # type: ignore[dict-item]
        gpt(
            r,
            multi_latent_attention=True,
            q_lora_rank=16,
            kv_lora_rank=16,
            position_embedding_type="rope",
            qk_head_dim=8,
            qk_pos_emb_head_dim=8,
            v_head_dim=8,
            kv_channels=None,
            add_bias_linear=False,
        )
        for r in (1, 2)
    ),
    "mamba": tuple(hybrid(gpt(r, add_bias_linear=False), "M-", **MAMBA) for r in (1, 2)),  # type: ignore[dict-item]
    "bert": (encoder("bert"), encoder("bert", 2)),
    "t5": tuple(  # type: ignore[dict-item]
        encoder("t5", r, untie_embeddings_and_output_weights=True, position_embedding_type="relative") for r in (1, 2)
    ),
}


def _routed(name: str) -> tuple[set[str], set[str]]:
    """What Megatron gives to Muon of a live model, and what the plan does."""
    from megatron.core.optimizer.emerging_optimizers import _is_nonlinear_or_embedding

    from mup_megatron.megatron.names import named_parameters

    base, target = MODELS[name]
    plan = muon(base).plan(target)
    _, _, chunks = planned.built(target, ONE)
    live = named_parameters(chunks, tied=plan.tied)
    own = {name for name, parameter in live if not _is_nonlinear_or_embedding(parameter)}
    return own, {entry.name for entry in plan.entries if entry.optimizer == "muon"}


def _noop(own: Recipe, model: ModelFile) -> bool:
    """Whether base and target alike leave every weight of a run bitwise as it is without a plan."""
    one = dict.fromkeys(("embedding_multiplier", "output_multiplier", "attention_multiplier"), 1.0)
    own = own.model_copy(
        update={
            "base": own.megatron_base.model_copy(update={"init_method_std": model.init_method_std}),
            "hyperparameters": own.hyperparameters.model_copy(update={**one, "init_method_std": model.init_method_std}),
        }
    )
    ends = []
    for plug_in in (True, False):
        run = prepared(own, model, plug_in=plug_in)
        stock.train(run, 4)
        ends.append({name: p.detach().clone() for name, p in run.chunks[0].named_parameters()})
    return all(torch.equal(one, ends[1][name]) for name, one in ends[0].items())


@contextmanager
def _changed(group: dict[str, Any], **values: Any) -> Iterator[None]:
    before = {key: group.get(key) for key in values}
    group.update(values)
    yield
    group.update(before)


def _said() -> dict[str, list[str]]:
    """What the guard says of mistakes in a live run."""
    from mup_megatron.megatron.guard import optimizer_problems

    own, target = DENSE
    run, plan = prepared(own, target), own.plan(target)
    stock.train(run, 2)
    groups = [group for part in run.optimizer.chained_optimizers for group in part.param_groups]
    mine = [group for group in groups if group.get("optimizer") is None]
    (positions,) = [group for group in mine if len(group["params"]) == 1]
    hidden = next(group for group in mine if group is not positions)

    def said(now: Plan = plan) -> list[str]:
        return sorted({str(each) for each in optimizer_problems(run.chunks, now, run.optimizer, run.scheduler)})

    found = {"right": said()}
    with _changed(hidden, max_lr=2 * hidden["max_lr"]):
        found["factor"] = said()
    with _changed(positions, max_lr=plan.lr, min_lr=plan.min_lr):
        found["positions"] = said()
    with _changed(hidden, momentum=0.5):
        found["momentum"] = said()
    with _changed(positions, wd_mult=1.0, weight_decay=plan.weight_decay):
        found["decay"] = said()
    left = tuple(replace(e, optimizer="adam") if e.name.endswith("fc1.weight") else e for e in plan.entries)
    found["routing"] = said(replace(plan, entries=left))
    return found


def _refused(layout: Layout = ONE, **config: Any) -> str:
    from mup_megatron.errors import InputError

    def edit(told: Any) -> None:
        for key, value in config.items():
            setattr(told, key, value)

    try:
        prepared(*DENSE, layout, edit_optimizer=edit)
    except InputError as error:
        return str(error)
    return ""


def everything() -> dict[str, Any]:
    found: dict[str, Any] = {"losses": {name: losses(name, ONE) for name in RUNS}}
    found["oracle"] = {mode: _oracle(mode) for mode in SCALES}
    found["noop"] = {name: _noop(own, own.megatron_base) for name, (own, _) in RUNS.items()}
    found["acts"] = _noop(*DENSE)
    found["said"] = _said()
    found["routed"] = {name: _routed(name) for name in MODELS}
    found["refused"] = {
        "mode": _refused(muon_scale_mode="spectral"),
        "whole": _refused(muon_split_qkv=False),
        "scalar": _refused(muon_scalar_optimizer="lion"),
        "layer-wise": _refused(use_layer_wise_distributed_optimizer=True),
        "optimizer": _refused(optimizer="adam"),
    }
    return found


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    (found,) = run_ranks(everything, 1)
    return found


@pytest.mark.parametrize("mode", SCALES)
def test_a_step_is_the_plans_factor_times_the_orthogonalised_gradient(alone: dict[str, Any], mode: str) -> None:
    found = alone["oracle"][mode]
    assert len(found) == 9
    assert max(found.values()) < 1e-3, found


@pytest.mark.parametrize("run", RUNS)
def test_at_the_base_a_run_is_bitwise_megatrons(alone: dict[str, Any], run: str) -> None:
    assert alone["noop"][run]
    assert not alone["acts"]


@pytest.mark.parametrize("model", MODELS)
def test_the_plan_gives_muon_what_megatron_does(alone: dict[str, Any], model: str) -> None:
    live, plan = alone["routed"][model]
    assert live == plan
    assert live


def test_the_guard_finds_a_mistake_in_one_group(alone: dict[str, Any]) -> None:
    said = alone["said"]
    assert said["right"] == []
    assert any("max_lr" in each and "linear_" in each for each in said["factor"])
    assert said["positions"]
    assert all("position_embeddings" in each for each in said["positions"])
    assert any("momentum" in each for each in said["momentum"])
    assert any("position_embeddings" in each for each in said["decay"])
    assert all("linear_fc1" in each for each in said["routing"])
    assert sum("optimizer should be adam and is muon" in each for each in said["routing"]) == 2


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("mode", "muon_scale_mode: the optimizer is configured with 'spectral', the recipe says 'unit_rms_norm'"),
        ("whole", "muon_split_qkv: the optimizer is configured with False"),
        ("scalar", "muon_scalar_optimizer: the optimizer is configured with 'lion'"),
        ("layer-wise", "--use-distributed-optimizer: a plan is tested with it for Adam"),
        ("optimizer", "optimizer: configured is 'adam', the recipe was tuned with 'muon'"),
    ],
)
def test_another_configuration_is_refused(alone: dict[str, Any], what: str, words: str) -> None:
    assert words in alone["refused"][what]


# ---- on several ------------------------------------------------------------------------------------------------------

LAYOUTS: dict[str, tuple[Layout, tuple[str, ...]]] = {
    "TP2": (Layout(tp=2), ("dense",)),
    "TP2, sequence parallel": (Layout(tp=2, sequence_parallel=True), ("experts",)),
    "PP2": (Layout(pp=2), ("dense",)),
    "EP2": (Layout(dp=2, ep=2), ("experts", "lion")),
}


def several(layout: Layout, names: tuple[str, ...]) -> dict[str, Any]:
    found: dict[str, Any] = {name: losses(name, layout) for name in names}
    if layout == Layout(tp=2):
        found["blockwise"] = _refused(layout, muon_tp_mode="blockwise")
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_are_those_of_one_process(alone: dict[str, Any], layout: str) -> None:
    how, names = LAYOUTS[layout]
    for found in run_ranks(several, how.world_size, how, names):
        for name in names:
            assert found[name] == pytest.approx(alone["losses"][name], abs=1e-5)
        if "blockwise" in found:
            assert "muon_tp_mode blockwise: with a tensor parallelism of 2" in found["blockwise"]
            assert "Use --muon-tp-mode duplicated" in found["blockwise"]
