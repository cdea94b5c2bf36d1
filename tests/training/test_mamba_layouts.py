"""Hybrid models with Mamba layers and experts: one run on every layout, and nothing at the base.

One of them has latent attention and multi-token prediction too, of the releases that have them in a pattern.
"""

from typing import Any

import pytest
import torch
from support import planned, stock
from support.processes import run_ranks
from support.shapes import LATENT as SMALL_LATENT
from support.shapes import MAMBA, gpt, hybrid, recipe_for
from support.stock import Layout

from mup_megatron.architectures.hybrid import HybridFile
from mup_megatron.errors import InputError
from mup_megatron.megatron.versions import core_version

PATTERN = "*-ME"
UNTIED: dict[str, Any] = {"untie_embeddings_and_output_weights": True, "vocab_size": 64}  # padded alike at TP2
EXPERTS = {"num_experts": 8, "moe_ffn_hidden_size": 16, "moe_shared_expert_intermediate_size": 16}
BASE, TARGET = (hybrid(gpt(width, **UNTIED, add_bias_linear=False), PATTERN, **MAMBA, **EXPERTS) for width in (1, 4))
RECIPE = recipe_for(BASE, lr=0.01, clip_grad=0.5, adam_eps=1e-5)
FURTHER = "+M|-E/+E/+E"
LATENT: dict[str, Any] = {**SMALL_LATENT, "kv_lora_rank": 16, "kv_channels": None, "mtp_loss_scaling_factor": 0.3}
LATENT_BASE, LATENT_TARGET = (
    hybrid(gpt(width, **UNTIED, add_bias_linear=False), FURTHER, **MAMBA, **EXPERTS, **LATENT) for width in (1, 4)
)
MODELS = {PATTERN: (BASE, TARGET), FURTHER: (LATENT_BASE, LATENT_TARGET)}
"""Pattern → base, and a target of four times its width."""
ONE = Layout()
LAYOUTS = {
    "TP2, sequence parallel": Layout(tp=2, sequence_parallel=True),
    "PP2": Layout(pp=2),
    "EP2": Layout(dp=2, ep=2),
    "DP2, distributed optimizer": Layout(dp=2, distributed_optimizer=True),
}
STEPS = 10


def losses(pattern: str, layout: Layout, runs: tuple[bool, ...] = (True,)) -> list[list[float]]:
    """In a rank: with the plug-in, and without; and what the guard says of it all on the way."""
    from mup_megatron.megatron.guard import require_as_planned

    base, target = MODELS[pattern]
    tuned = RECIPE.model_copy(update={"base": base})
    found = []
    for plug_in in runs:
        run = planned.prepare(tuned, target, layout, same_weights=True, plug_in=plug_in)
        if plug_in:
            require_as_planned(run.chunks, tuned.plan(target), run.optimizer, run.scheduler, weights=False)
        found.append(stock.train(run, STEPS))
    return found


@pytest.fixture(scope="module", params=MODELS)
def on_one_process(request: pytest.FixtureRequest) -> tuple[str, list[list[float]]]:
    """A pattern, and the losses of its model."""
    if request.param == FURTHER and core_version() < (0, 19, 0):
        pytest.skip("megatron-core 0.16 has no latent attention in a pattern")
    return request.param, run_ranks(losses, 1, request.param, ONE, (True, False))[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_are_those_of_one_process(layout: str, on_one_process: tuple[str, list[list[float]]]) -> None:
    pattern, expected = on_one_process
    how = LAYOUTS[layout]
    for [found] in run_ranks(losses, how.world_size, pattern, how):
        assert found == pytest.approx(expected[0], abs=1e-5)


def test_the_plan_acts(on_one_process: tuple[str, list[list[float]]]) -> None:
    _, (with_plan, without) = on_one_process
    assert max(abs(one - other) for one, other in zip(with_plan, without, strict=True)) > 0.01
    assert with_plan[-1] < with_plan[0] - 0.1


# ---- values ----------------------------------------------------------------------------------------------------------


def test_each_tensor_gets_what_its_own_sides_say() -> None:
    """Both widths have as many rows of B and C, and every other side of a Mamba layer is four times as large."""
    plan = RECIPE.plan(TARGET)
    h = RECIPE.hyperparameters
    layer = "decoder.layers.2"
    sigma, lr, eps, decay = h.init_method_std, h.lr, h.adam_eps, h.weight_decay
    expected = {
        "mixer.in_proj.weight": (sigma / 2, lr / 4, eps / 4, 4 * decay),
        "mixer.out_proj.weight": (sigma / 2 / 4**0.5, lr / 4, eps / 4, 4 * decay),
        "mixer.conv1d.weight": (None, lr, eps / 4, decay),
        **{
            f"mixer.{name}": (None, lr, eps / 4, 0.0)
            for name in ("conv1d.bias", "dt_bias", "A_log", "D", "norm.weight")
        },
        "norm.weight": (None, lr, eps / 4, 0.0),
    }
    for name, values in expected.items():
        entry = plan[f"{layer}.{name}"]
        assert (entry.init_std, entry.lr, entry.eps, entry.weight_decay) == pytest.approx(values), name
        assert entry.multiplier == 1.0
    assert plan[f"{layer}.mixer.norm.weight"].init_value == 1.0


# ---- what must not happen --------------------------------------------------------------------------------------------


def stock_and_planned(base: HybridFile) -> list[tuple[list[float], dict[str, torch.Tensor]]]:
    """In a rank: the base's model as Megatron draws and trains it, without and with the plug-in."""
    tuned = planned.recipe(base)
    found = []
    for plug_in in (False, True):
        run = planned.prepare(tuned, base, ONE, plug_in=plug_in)
        trained = stock.train(run, 3)
        found.append((trained, {name: p.detach() for name, p in run.chunks[0].module.named_parameters()}))
    return found


@pytest.mark.parametrize("pattern", MODELS)
def test_at_the_base_the_run_is_bitwise_the_stock_one(pattern: str) -> None:
    if pattern == FURTHER and core_version() < (0, 19, 0):
        pytest.skip("megatron-core 0.16 has no latent attention in a pattern")
    [[without, with_plan]] = run_ranks(stock_and_planned, 1, MODELS[pattern][0])
    assert without[0] == with_plan[0]
    assert all(value.equal(with_plan[1][name]) for name, value in without[1].items())


def stock_start_is_kept(other: HybridFile) -> tuple[dict[str, bool], str]:
    """In a rank: which of Megatron's draws the plug-in leaves alone, and what it says of a model of other sizes."""
    _, _, [drawn] = planned.built(TARGET, ONE)
    _, _, [planned_one] = planned.built(TARGET, ONE)
    from mup_megatron.megatron.model import apply_plan

    apply_plan([planned_one], RECIPE.plan(TARGET))
    after = dict(planned_one.named_parameters())
    equal = {name: p.equal(after[name]) for name, p in drawn.named_parameters() if ".layers.2." in name}
    _, _, [foreign] = planned.built(other, ONE)
    with pytest.raises(InputError) as raised:
        apply_plan([foreign], RECIPE.plan(TARGET))
    return equal, str(raised.value)


def test_what_megatron_draws_by_itself_stays_and_other_sizes_are_refused() -> None:
    other = TARGET.model_copy(update={"mamba_state_dim": 32})
    [(equal, said)] = run_ranks(stock_start_is_kept, 1, other)
    changed = {name.partition(".layers.2.")[2] for name, same in equal.items() if not same}
    assert changed == {"mixer.in_proj.weight", "mixer.out_proj.weight"}
    assert "decoder.layers.2.mixer.in_proj.weight" in said
    assert "decoder.layers.2.mixer.conv1d.weight" in said


def test_a_layout_that_does_not_divide_heads_or_groups_is_refused() -> None:
    with pytest.raises(InputError, match="does not divide mamba_num_groups 2"):
        replace_heads(4).require_tensor_parallel(4)


def replace_heads(count: int) -> HybridFile:
    return TARGET.model_copy(update={"num_attention_heads": 4 * count, "mamba_num_heads": 4 * count})
