"""The library of mistakes: each changes the run that it is made in.

Every mutant is built as the check builds it, on real Megatron models, and trained for a few steps.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any

import pytest
from support.processes import run_ranks
from support.shapes import MAMBA, gpt, hybrid, recipe_for

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.check.family.stress import stressed
from mup_megatron.check.measure.measurements import RunProtocol
from mup_megatron.check.mutants import MUTANTS, Context
from mup_megatron.recipe import Depth, Horizon, PerParameter, Recipe, Training

PROTOCOL = RunProtocol(steps=4, recorded=(4,), batch_size=4, spectral=False)
ROUNDING = 1e-5
UNTIED = {"untie_embeddings_and_output_weights": True}
ROPE = {"position_embedding_type": "rope"}
EXPERTS: dict[str, Any] = {**UNTIED, "moe_ffn_hidden_size": 32, "moe_layer_freq": [0, 1], "add_bias_linear": False}
LATENT: dict[str, Any] = {
    **UNTIED,
    "multi_latent_attention": True,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "rotary_scaling_factor": 40.0,
    "mscale_all_dim": 1.0,
    "position_embedding_type": "rope",
    "normalization": "RMSNorm",
    "add_bias_linear": False,
}
RULES = (PerParameter(match="*.linear_fc2.weight", lr_mult=2.0),)


def _case(
    base: ModelFile,
    target: ModelFile,
    rules: tuple[PerParameter, ...] = (),
    depth: Depth | None = None,
    **changes: Any,
) -> tuple[Recipe, ModelFile]:
    # A threshold that every gradient exceeds, so that another one or none makes a difference.
    recipe = recipe_for(base, clip_grad=0.01, **changes)
    own = recipe.parametrization.model_copy(update={"depth": depth})
    recipe = recipe.model_copy(update={"per_parameter": rules, "parametrization": own})
    return stressed(recipe, steps=PROTOCOL.steps, eps=1e-4), target


def _moved_to_another_run(base: ModelFile, target: ModelFile) -> tuple[Recipe, ModelFile]:
    tuning = Training(train_iters=100, global_batch_size=8, seq_length=16)
    horizon = Horizon(rule="steps", tokens=16 * 100 * 8 * 16, batch=32)
    recipe = recipe_for(base, clip_grad=0.01).model_copy(update={"training": tuning, "horizon": horizon})
    return stressed(recipe, steps=PROTOCOL.steps, eps=1e-4), target


CASES: dict[str, tuple[Recipe, ModelFile]] = {
    "plain": _case(gpt(1, **UNTIED), gpt(4, **UNTIED)),
    "tied, fixed ffn": _case(gpt(1), gpt(4, ffn_hidden_size=64)),
    "experts of a fixed size, and more of them": _case(
        gpt(1, **EXPERTS, num_experts=4), gpt(4, **EXPERTS, num_experts=8, ffn_hidden_size=256)
    ),
    "wider heads, deeper, rotary, overrides": _case(
        gpt(1, **UNTIED, **ROPE), gpt(4, num_attention_heads=4, kv_channels=32, num_layers=3, **UNTIED, **ROPE), RULES
    ),
    "latents of a fixed rank, wider heads": _case(
        gpt(1, **LATENT, qk_head_dim=4, qk_pos_emb_head_dim=4, v_head_dim=8),
        gpt(4, **LATENT, num_attention_heads=8, qk_head_dim=8, qk_pos_emb_head_dim=8, v_head_dim=16),
    ),
    "another batch and length": _moved_to_another_run(gpt(1, **UNTIED), gpt(4, **UNTIED)),
    "deeper, by its rule": _case(gpt(1, num_layers=1), gpt(2, num_layers=3), depth=Depth(alpha=0.5)),
    "Muon": _case(gpt(1), gpt(4, ffn_hidden_size=64), optimizer="muon", muon_scale_mode="shape_scaling"),
    "Mamba": _case(hybrid(gpt(1, **UNTIED), "MM*-", **MAMBA), hybrid(gpt(4, **UNTIED), "MM*-", **MAMBA)),
}

WITHOUT_PLACE = [
    ("plain", "attention-sqrt-d"),
    ("plain", "one-width-ratio"),
    ("plain", "overrides-dropped"),
    ("plain", "learning-rate-by-fan-out"),
    ("plain", "residual-init-depth"),
    ("tied, fixed ffn", "readout-learning-rate"),
    ("plain", "rotary-base-by-width"),
    ("plain", "convolution-as-matrix"),
    ("plain", "latent-by-width"),
    ("plain", "bottleneck-as-output"),
    ("plain", "attention-own-factor-dropped"),
    ("plain", "horizon-twice"),
    ("plain", "horizon-decay-only"),
    ("plain", "matrix-to-another"),
    ("plain", "table-as-matrix"),
]
"""Case, mistake: there it is none."""


def _context(name: str) -> Context:
    recipe, model = CASES[name]
    return Context(base=recipe.megatron_base, target=model, recipe=recipe, width=model.hidden_size)


# ---- in the rank ---------------------------------------------------------------------------------------------------


def _weights_after(name: str, mutant: str | None) -> dict[str, object]:
    from mup_megatron.check.run_megatron import ONE_PROCESS
    from mup_megatron.check.subjects.megatron import build_megatron

    recipe, model = CASES[name]
    plan = recipe.plan(model)
    tamper = None
    if mutant is not None:
        own = MUTANTS[mutant]
        plan = plan if own.plan is None else own.plan(plan, _context(name))
        tamper = own.tamper(plan, _context(name))
    trainee = build_megatron(
        model, recipe, plan, seed=1, protocol=PROTOCOL, layout=ONE_PROCESS, world_size=1, tamper=tamper
    )
    for step in range(PROTOCOL.steps):
        trainee.step(step)
    return {name: parameter.detach().clone() for name, parameter in trainee.parameters()}


def _changes_in_rank(name: str) -> dict[str, float]:
    import torch

    from mup_megatron.training import ranks

    with ranks.joined(tensor=1, pipeline=1, virtual_stages=None, seed=1):
        right = _weights_after(name, None)
        found = {}
        for mutant in _tried(name):
            wrong = _weights_after(name, mutant)
            differences = []
            for key, weight in right.items():
                assert isinstance(weight, torch.Tensor)
                other = wrong[key]
                assert isinstance(other, torch.Tensor)
                differences.append(float((other - weight).abs().max() / weight.abs().max().clamp(min=1e-12)))
            found[mutant] = max(differences)
    return found


# ---- in the tests --------------------------------------------------------------------------------------------------


def _tried(case: str) -> list[str]:
    """The mistakes that can be made there, and those that are shown to have no place."""
    return [name for name, own in MUTANTS.items() if own.when(_context(case)) or (case, name) in WITHOUT_PLACE]


@cache
def _changes(name: str) -> Mapping[str, float]:
    """Mutant → the largest relative difference of a weight."""
    [found] = run_ranks(_changes_in_rank, 1, name)
    assert isinstance(found, dict)
    return found


OFTEN = {"plain", "tied, fixed ffn"}


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case in OFTEN else pytest.mark.slow) for case in CASES]
)
def test_a_mistake_changes_the_run_where_it_says_so(case: str) -> None:
    if case == "Muon":
        pytest.importorskip("emerging_optimizers", reason="megatron-core 0.16 has no Muon")
    unchanged = {mutant for mutant, difference in _changes(case).items() if difference <= ROUNDING}

    assert not {n for n in unchanged if MUTANTS[n].when(_context(case)) and not MUTANTS[n].trains_alike}


@pytest.mark.parametrize(("case", "mutant"), WITHOUT_PLACE)
def test_a_mistake_that_has_no_place_changes_nothing(case: str, mutant: str) -> None:
    assert not MUTANTS[mutant].when(_context(case))
    assert _changes(case)[mutant] <= ROUNDING


def test_every_mistake_can_be_made_somewhere() -> None:
    possible = {name for name, mutant in MUTANTS.items() if any(mutant.when(_context(case)) for case in CASES)}

    assert possible == set(MUTANTS)


def test_the_library_is_large_and_its_entries_are_told_apart() -> None:
    assert len(MUTANTS) >= 30
    assert all(name == mutant.name for name, mutant in MUTANTS.items())
    assert len({mutant.what for mutant in MUTANTS.values()}) == len(MUTANTS)
    assert all(mutant.what.endswith(".") and mutant.cause for mutant in MUTANTS.values())


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mistake_does_something_at_one_point_at_least(mutant: str) -> None:
    own = MUTANTS[mutant]

    assert any(point is not None for point in (own.plan, own.model, own.optimizer, own.scheduler))
