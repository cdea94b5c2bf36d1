"""Depth on Megatron-Core: every branch's multiplier against plain torch, on every layout, and as the guard reads it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from support import exact, planned, stock
from support.exact import megatron_gpt
from support.plan_runs import optimizer_from_plan, plain_from_plan, train
from support.processes import run_ranks
from support.shapes import LATENT as SMALL_LATENT
from support.shapes import MAMBA, encoder, gpt, hybrid, recipe_for
from support.stock import Layout
from support.trained import Trained
from torch import Tensor

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.errors import InputError
from mup_megatron.recipe import Depth, Recipe
from mup_megatron.theory import Acts, Plan

STEPS = 6
AGREE = 1e-5
"""Losses of two layouts: rounding at this learning rate, over so many steps in fp32."""


def deepened(recipe: Recipe, alpha: float = 0.5) -> Recipe:
    depth = recipe.parametrization.model_copy(update={"depth": Depth(alpha=alpha)})
    return recipe.model_copy(update={"parametrization": depth})


def tuned(base: ModelFile, alpha: float = 0.5, **changes: float) -> Recipe:
    return deepened(recipe_for(base, **{"residual_multiplier": 0.7, **changes}), alpha)


# ---- plain torch ---------------------------------------------------------------------------------------------------

LLAMA = {"swiglu": True, "normalization": "RMSNorm", "position_embedding_type": "rope", "add_bias_linear": False}
LATENT = {**SMALL_LATENT, "normalization": "RMSNorm"}
EXPERTS = {"num_experts": 4, "moe_ffn_hidden_size": 24, "add_bias_linear": False}
PAIRS: dict[str, tuple[ModelFile, ModelFile]] = {
    "tied": (gpt(1), gpt(2, num_layers=6)),
    "llama": (gpt(1, **LLAMA), gpt(2, **LLAMA, num_layers=6)),
    "latent": (gpt(1, **LATENT), gpt(2, **LATENT, num_layers=6)),
    # Without Mamba: Megatron's layer of it computes in its parameters' configured precision.
    "hybrid": (hybrid(gpt(1), "*--"), hybrid(gpt(2), "*--*--")),
}


def losses_of_both(base: ModelFile, target: ModelFile, optimizer: str, alpha: float) -> tuple[Tensor, Tensor]:
    """In a rank: ten losses of Megatron-Core with the plan, and of plain torch, in double precision."""
    lr = 0.003 if optimizer == "adam" else 0.02
    recipe = deepened(
        recipe_for(base, optimizer=optimizer, lr=lr, min_lr=lr, adam_eps=1e-4, residual_multiplier=0.7), alpha
    )
    plan = recipe.plan(target)
    plain = plain_from_plan(plan, target)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    ours = megatron_gpt(plan, target, {name: p.detach().clone() for name, p in plain.named_parameters()})
    return exact.train(ours, target), train(plain, optimizer_from_plan(plan, plain), target)


@pytest.mark.parametrize(
    ("pair", "optimizer", "alpha"),
    [
        ("tied", "adam", 1.0),
        ("tied", "sgd", 0.5),
        ("llama", "adam", 0.5),
        ("latent", "adam", 1.0),
        ("hybrid", "adam", 0.5),
    ],
)
def test_ten_steps_are_those_of_plain_torch(pair: str, optimizer: str, alpha: float) -> None:
    [(ours, plain)] = run_ranks(losses_of_both, 1, *PAIRS[pair], optimizer, alpha)
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-8)
    assert plain[0] - plain[-1] > 0.01, "a model that learns nothing shows nothing"


# ---- the base ------------------------------------------------------------------------------------------------------


def _stock_and_planned(base: ModelFile) -> list[tuple[list[float], list[Tensor]]]:
    recipe = deepened(planned.recipe(base), 1.0)
    found = []
    for plug_in in (False, True):
        run = planned.prepare(recipe, base, Layout(), plug_in=plug_in)
        losses = stock.train(run, STEPS)
        found.append((losses, [p.detach() for p in run.chunks[0].module.parameters()]))
    return found


def _at_the_base(bases: Sequence[ModelFile]) -> Any:
    return [_stock_and_planned(base) for base in bases]


def test_the_base_is_bitwise_stock() -> None:
    bases = (gpt(1), gpt(1, **LATENT, mtp_num_layers=1), gpt(1, **EXPERTS), hybrid(gpt(1), "M*-E", **MAMBA, **EXPERTS))
    for (losses, weights), (with_rule, own) in run_ranks(_at_the_base, 1, bases)[0]:
        assert losses == with_rule
        assert all(one.equal(other) for one, other in zip(weights, own, strict=True))


# ---- layouts -------------------------------------------------------------------------------------------------------

FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
_MTP = {**LATENT, "mtp_num_layers": 1, "untie_embeddings_and_output_weights": True, "vocab_size": 64}
DEEP: dict[str, tuple[ModelFile, ModelFile]] = {
    "gpt": (gpt(vocab_size=64, num_layers=1), gpt(4, vocab_size=64, num_layers=4)),
    "latent, experts, multi-token": (
        gpt(**_MTP, **EXPERTS, num_layers=1),
        gpt(4, **{**_MTP, "kv_lora_rank": 48}, **EXPERTS, num_layers=4),
    ),
    "hybrid": (
        hybrid(gpt(vocab_size=64), "M*-", **MAMBA),
        hybrid(gpt(2, vocab_size=64), "M*-M*-M*-M*-", **MAMBA),
    ),
}
LAYOUTS: dict[str, tuple[Layout, dict[str, Any]]] = {
    "TP1": (Layout(), {}),
    "TP2": (Layout(tp=2), {}),
    "PP2": (Layout(pp=2), {}),
    "PP2 in two virtual stages": (Layout(pp=2, vpp=2), {}),
    "TP2 + sequence parallel": (Layout(tp=2, sequence_parallel=True), {}),
    "TP2 + sequence parallel, recomputed": (Layout(tp=2, sequence_parallel=True), FULL),
    "EP2": (Layout(dp=2, ep=2, distributed_optimizer=True), {}),
}
CASES = [
    *(("gpt", layout) for layout in LAYOUTS if layout != "EP2"),
    *(("latent, experts, multi-token", layout) for layout in ("TP1", "PP2", "EP2", "TP2 + sequence parallel")),
    *(("hybrid", layout) for layout in ("TP1", "TP2", "PP2")),
]
OFTEN = [
    *(("gpt", layout) for layout in ("TP1", "PP2 in two virtual stages", "TP2 + sequence parallel, recomputed")),
    *(("latent, experts, multi-token", layout) for layout in ("TP1", "PP2", "EP2")),
    *(("hybrid", layout) for layout in ("TP1", "TP2")),
]
EACH_CASE = pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=", ".join(case), marks=() if case in OFTEN else pytest.mark.slow) for case in CASES],
)


@dataclass(frozen=True)
class Outcome:
    losses: list[float]
    factors: dict[str, float]
    """Of the branches that this rank adds."""
    problems: list[str]


Outcomes = Trained[tuple[str, str], list[Outcome]]


def _trained(case: tuple[str, str], breaks: Callable[[Any], None] | None = None) -> Outcome:
    from mup_megatron.megatron import branches
    from mup_megatron.megatron.guard.forward import multiplier_problems
    from mup_megatron.megatron.names import named_modules

    base, target = DEEP[case[0]]
    layout, changes = LAYOUTS[case[1]]
    recipe = tuned(base)
    run = planned.prepare(recipe, target, layout, config_changes=changes, same_weights=True)
    for chunk in run.chunks if breaks is not None else ():
        breaks(chunk.module)
    found = {
        name: factor
        for chunk in run.chunks
        for modules in [dict(named_modules(chunk.module))]
        for name in modules
        for _, factor in branches.found(modules, name)
    }
    problems = [str(problem) for problem in multiplier_problems(run.chunks, recipe.plan(target))]
    return Outcome(stock.train(run, STEPS), found, problems)


def _all_trained(cases: Sequence[tuple[str, str]]) -> list[Outcome]:
    return [_trained(case) for case in cases]


def _outcomes(cases: Sequence[tuple[str, str]]) -> dict[tuple[str, str], list[Outcome]]:
    """Of every rank, the cases of one number of ranks in one set of processes."""
    found: dict[tuple[str, str], list[Outcome]] = {}
    for size in {LAYOUTS[layout][0].world_size for _, layout in cases}:
        together = [case for case in cases if LAYOUTS[case[1]][0].world_size == size]
        of_ranks = run_ranks(_all_trained, size, together)
        found |= {case: [rank[index] for rank in of_ranks] for index, case in enumerate(together)}
    return found


@pytest.fixture(scope="module")
def outcomes() -> Outcomes:
    return Trained(_outcomes, OFTEN, [case for case in CASES if case not in OFTEN])


@EACH_CASE
def test_losses_agree_on_every_layout(outcomes: Outcomes, case: tuple[str, str]) -> None:
    one, other = outcomes[case[0], "TP1"][0], outcomes[case][0]
    assert max(abs(a - b) for a, b in zip(one.losses, other.losses, strict=True)) < AGREE


@EACH_CASE
def test_every_branch_has_the_plans_factor(outcomes: Outcomes, case: tuple[str, str]) -> None:
    base, target = DEEP[case[0]]
    expected = {site.module: site.factor for site in tuned(base).plan(target).sites if site.acts is Acts.BRANCH}
    assert set(expected.values()) <= {0.35, 0.7}
    assert {name: factor for rank in outcomes[case] for name, factor in rank.factors.items()} == expected
    assert not [problem for rank in outcomes[case] for problem in rank.problems]


def _encoders() -> dict[str, tuple[dict[str, float], dict[str, float]]]:
    """What two encoders add their branches with, and what the plan says."""
    from mup_megatron.megatron import branches
    from mup_megatron.megatron.model import apply_plan
    from mup_megatron.megatron.names import named_modules

    found = {}
    for name, own in (("bert", {}), ("t5", {"decoder_num_layers": 2})):
        base = encoder(name, **own)
        target = encoder(name, num_layers=4, **own)
        plan = tuned(base).plan(target)
        _, _, [model] = planned.built(target, Layout())
        apply_plan([model], plan)
        modules = dict(named_modules(model))
        live = {name: factor for name in modules for _, factor in branches.found(modules, name)}
        found[name] = live, {site.module: site.factor for site in plan.sites if site.acts is Acts.BRANCH}
    return found


def test_every_stack_of_an_encoder_has_its_own_factor() -> None:
    for name, (live, expected) in run_ranks(_encoders, 1)[0].items():
        assert live == expected, name
        assert len(live) == (8 if name == "bert" else 4 * 2 + 2 * 3)
        half = 0.7 * 2**-0.5
        assert sorted(set(live.values())) == pytest.approx([half] if name == "bert" else [half, 0.7])


# ---- where it acts -------------------------------------------------------------------------------------------------


def _on_outputs(chunk: Any, plan: Plan) -> None:
    """The same factors as hooks on what branches give, output and bias."""
    from mup_megatron.megatron.branches import ScaledBranch
    from mup_megatron.megatron.names import named_modules

    modules = dict(named_modules(chunk))
    for site in plan.sites:
        if site.acts is not Acts.BRANCH or site.module not in modules:
            continue
        layer = modules[site.module.rpartition(".")[0]]
        for attribute in ("self_attn_bda", "mlp_bda"):
            if isinstance(getattr(layer, attribute), ScaledBranch):
                setattr(layer, attribute, getattr(layer, attribute).makes)

        def scaled(_module: Any, _args: Any, output: Any, factor: float = site.factor) -> Any:
            return tuple(None if each is None else each * factor for each in output)

        modules[site.module].register_forward_hook(scaled)


def _two_places(changes: dict[str, Any], layout: Layout) -> tuple[list[float], list[float]]:
    base, target = DEEP["gpt"]
    losses = []
    for move in (False, True):
        recipe = tuned(base)
        run = planned.prepare(recipe, target, layout, config_changes=changes, same_weights=True)
        if move:
            for chunk in run.chunks:
                _on_outputs(chunk.module, recipe.plan(target))
        losses.append(stock.train(run, 4))
    return losses[0], losses[1]


@pytest.mark.parametrize(
    ("changes", "layout"),
    [
        ({"fp32_residual_connection": True}, Layout()),
        ({"bias_dropout_fusion": True}, Layout()),
        (FULL, Layout(tp=2, sequence_parallel=True)),
    ],
    ids=["fp32 residual", "fused", "recomputed, sequence parallel"],
)
def test_both_places_are_one_run(changes: dict[str, Any], layout: Layout) -> None:
    own, on_outputs = run_ranks(_two_places, layout.world_size, changes, layout)[0]
    assert own == on_outputs


# ---- the guard -----------------------------------------------------------------------------------------------------


def _lost(model: Any) -> None:
    layer = model.decoder.layers[2]
    layer.mlp_bda = layer.mlp_bda.makes


def _twice(model: Any) -> None:
    from mup_megatron.megatron.branches import ScaledBranch

    layer = model.decoder.layers[2]
    layer.self_attn_bda = ScaledBranch(0.35, layer.self_attn_bda)


def _another(model: Any) -> None:
    from mup_megatron.megatron.branches import ScaledBranch

    for layer in model.decoder.layers:
        layer.mlp_bda = ScaledBranch(0.5, layer.mlp_bda.makes)


def _broken() -> list[list[str]]:
    return [_trained(("gpt", "TP1"), breaks).problems for breaks in (_lost, _twice, _another)]


def test_the_guard_reads_the_live_factor() -> None:
    lost, twice, another = run_ranks(_broken, 1)[0]
    assert len(lost) == len(twice) == 1
    assert lost[0].startswith(
        "decoder.layers.2.mlp: multiplier should be 0.35 on its branch and is none. The hook is gone"
    )
    assert "self_attention: multiplier should be 0.35 on its branch and is 0.35 on its branch and 0.35" in twice[0]
    assert [problem.partition(":")[0] for problem in another] == [f"decoder.layers.{n}.mlp" for n in range(4)]


def _without_a_function() -> str:
    base, target = DEEP["gpt"]

    def edit(chunks: list[Any]) -> None:
        from megatron.core.transformer.identity_op import IdentityFuncOp

        del chunks[0].decoder.layers[1].mlp_bda
        chunks[0].decoder.layers[1].mlp_bda = IdentityFuncOp()

    with pytest.raises(InputError) as caught:
        planned.prepare(tuned(base), target, Layout(), edit=edit)
    return str(caught.value)


def test_a_layer_that_adds_otherwise_is_refused() -> None:
    message = run_ranks(_without_a_function, 1)[0]
    assert message.startswith("decoder.layers.1.mlp: TransformerLayer adds this branch by no function")
