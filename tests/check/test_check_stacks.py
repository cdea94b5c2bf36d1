"""Verdicts on models of several stacks, heads and further layers: right ones pass, and mistakes are found."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.processes import run_ranks
from support.shapes import LATENT as SMALL_LATENT
from support.shapes import MAMBA, encoder, gpt, hybrid, recipe_for

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.architectures.registry import architecture_of
from mup_megatron.check.family.gpt import at_width, condensed
from mup_megatron.check.family.layers import kept_layers
from mup_megatron.check.mutants import MUTANTS, Context, Mutant
from mup_megatron.check.run_megatron import check_megatron
from mup_megatron.check.subjects.launch_line import LaunchLine
from mup_megatron.errors import InputError
from mup_megatron.megatron.versions import core_version
from mup_megatron.recipe import PerParameter
from mup_megatron.theory import Plan, PlanEntry

FURTHER = {"mtp_num_layers": 1, "position_embedding_type": "rope"}
LATENT = {**SMALL_LATENT, "kv_lora_rank": 16, "kv_channels": None}
KINDS: dict[str, Callable[..., ModelFile]] = {
    "MTP": lambda width, **heads: gpt(width, **FURTHER, **heads),
    "a pattern": lambda width, **heads: hybrid(gpt(width, **heads), "+-M/+-", **LATENT, **MAMBA),
    "BERT": lambda width, **heads: encoder("bert", width, **heads),
    "T5": lambda width, **heads: encoder("t5", width, decoder_seq_length=8, **heads),
    "T5, relative": lambda width, **heads: encoder(
        "t5", width, position_embedding_type="relative", untie_embeddings_and_output_weights=True, **heads
    ),
}


def _as_hidden(chosen: Callable[[PlanEntry, Plan], bool]) -> Callable[[Plan, Context], Plan]:
    """Some tensors of finite width on one side, scaled as if both sides had grown."""

    def changed(plan: Plan, context: Context) -> Plan:
        r = context.r

        def entry(own: PlanEntry) -> PlanEntry:
            if not chosen(own, plan) or own.init_std is None:
                return own
            values = {"lr": own.lr / r, "min_lr": own.min_lr / r, "weight_decay": own.weight_decay * r}
            return replace(own, init_std=own.init_std / r**0.5, multiplier=1.0, **values)

        return replace(plan, entries=tuple(entry(own) for own in plan.entries))

    return changed


def _mutant(name: str, chosen: Callable[[PlanEntry, Plan], bool]) -> Mutant:
    return Mutant(name=name, what="As if both sides grew.", cause=(), plan=_as_hidden(chosen))


BINARY = _mutant("binary head", lambda entry, plan: entry.is_readout and entry.name != plan.readout)
TABLES = _mutant("relative positions", lambda entry, _: entry.name.endswith("relative_attention_bias.weight"))
MISTAKES: dict[str, tuple[str, Mutant, tuple[str, ...], str]] = {
    "joint projection's rate": ("MTP", MUTANTS["hidden-learning-rate-root"], ("hidden-learning-rate",), ".weight"),
    "attention of further layers": ("MTP", MUTANTS["attention-sqrt-d"], ("attention-sqrt-d",), "scale_mask_softmax"),
    "latents of a pattern": ("a pattern", MUTANTS["latent-by-width"], ("latent-by-width",), "_up_proj"),
    "hidden rates of a BERT": ("BERT", MUTANTS["hidden-learning-rate-root"], ("hidden-learning-rate",), ".weight"),
    "logits of a BERT": ("BERT", MUTANTS["readout-not-multiplied"], ("readout-not-multiplied",), "output_layer"),
    "binary head as hidden": ("BERT", BINARY, (), "binary_head"),
    "attention of both stacks": ("T5", MUTANTS["attention-sqrt-d"], ("attention-sqrt-d",), "scale_mask_softmax"),
    "logits of a T5": ("T5", MUTANTS["readout-not-multiplied"], ("readout-not-multiplied",), "output_layer"),
    "relative positions as a matrix": ("T5, relative", TABLES, (), "relative_attention_bias"),
}
SLOW = {"a pattern", "MTP", "T5", "T5, relative"}
QUICK = {"joint projection's rate", "hidden rates of a BERT"}


def models(kind: str, mutant: Mutant | None) -> tuple[ModelFile, ModelFile]:
    """A base and a target; where a mistake is one of heads that grow, they do."""
    base, target = KINDS[kind](2), KINDS[kind](16)
    if mutant is not MUTANTS["attention-sqrt-d"]:
        return base, target
    heads: dict[str, Any] = {"num_attention_heads": 4}
    return tuple(model.model_copy(update={**heads, "kv_channels": model.hidden_size // 4}) for model in (base, target))  # type: ignore[return-value]


def verdict(kind: str, references: Path, mistake: str | None = None) -> tuple[str, str | None, list[str], int]:
    """In a rank."""
    mutant = None if mistake is None else MISTAKES[mistake][1]
    base, target = models(kind, mutant)
    found = check_megatron(
        target, recipe_for(base, lr=0.004), widths=(32, 64, 128), seeds=2, mutant=mutant, references=references
    )
    updates = len({key.name for key in found.comparison if key.quantity == "activation update"})
    return found.outcome.value, found.culprit, [cause.name for cause in found.causes], updates


def _require_known(kind: str) -> None:
    if kind == "a pattern" and core_version() < (0, 19, 0):
        pytest.skip("megatron-core 0.16 has no latent attention in a pattern")


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=pytest.mark.slow if kind in SLOW else ()) for kind in KINDS])
def test_a_right_model_passes_and_all_of_it_is_seen(kind: str, references: Path) -> None:
    _require_known(kind)
    _, target = models(kind, None)
    measured = len(list(architecture_of(target).measured(target)))
    assert run_ranks(verdict, 1, kind, references)[0] == ("pass", None, [], measured)


@pytest.mark.parametrize(
    "mistake", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in MISTAKES]
)
def test_a_mistake_is_found(mistake: str, references: Path) -> None:
    kind, _, expected, culprit = MISTAKES[mistake]
    _require_known(kind)
    outcome, found, causes, _ = run_ranks(verdict, 1, kind, references, mistake)[0]
    assert outcome == "fail"
    assert found is not None
    assert culprit in found, (found, causes)
    assert not expected or causes[0] in expected, (found, causes)


# ---- which models stand for a target -------------------------------------------------------------------------------


def test_both_sequences_and_both_stacks_are_cut() -> None:
    base, target = (
        encoder("t5", width, num_layers=12, decoder_num_layers=6, seq_length=512, decoder_seq_length=128)
        for width in (2, 16)
    )
    small, recipe = condensed(target, recipe_for(base))
    assert {stack: len(layers) for stack, layers in architecture_of(small).stacks(small).items()} == {
        "encoder": 4,
        "decoder": 2,
    }
    assert (small.num_layers, type(small)) == (4, type(target))
    model = at_width(small, recipe, 64)
    assert (model.seq_length, model.decoder_seq_length) == (32, 8)  # type: ignore[attr-defined]


def test_overrides_follow_the_layers_that_are_left_in_each_stack() -> None:
    base, target = (encoder("t5", width, num_layers=12, decoder_num_layers=6) for width in (2, 16))
    own = (PerParameter(match="*.layers.1.*", lr_mult=2.0), PerParameter(match="encoder.layers.9.*", lr_mult=3.0))
    small, recipe = condensed(target, recipe_for(base).model_copy(update={"per_parameter": own}))
    plan = recipe.plan(small)
    rates = {entry.name: entry.lr for entry in plan.entries}
    for stack in ("encoder", "decoder"):
        norms = [rates[f"{stack}.layers.{layer}.input_layernorm.weight"] for layer in (0, 1)]
        assert norms[1] == 2 * norms[0]
    assert rates["encoder.layers.3.input_layernorm.weight"] == 3 * rates["encoder.layers.0.input_layernorm.weight"]


def test_further_layers_are_no_kind_of_the_stacks() -> None:
    base, target = (gpt(width, num_layers=8, **FURTHER) for width in (2, 16))
    own = (PerParameter(match="mtp.layers.0.*", lr_mult=2.0),)
    tuned = recipe_for(base).model_copy(update={"per_parameter": own})
    assert kept_layers(target, tuned, 1, 4) == [0, 1, 2, 3]
    small, recipe = condensed(target, tuned)
    plan = recipe.plan(small)
    assert plan["mtp.layers.0.enorm.weight"].lr == 2 * plan["decoder.layers.0.input_layernorm.weight"].lr


def test_layers_of_ones_own_are_refused_by_name() -> None:
    own = {"name": "decoder.layers.*.gate.weight", "fan_in": "hidden_size", "fan_out": "hidden_size"}
    base, target = (ModelFile(**{**dict(gpt(width)), "custom_tensors": [own]}) for width in (2, 16))
    with pytest.raises(InputError, match="custom_tensors: a check has no layers of your own to compare with"):
        check_megatron(target, recipe_for(base))


def test_further_layers_of_a_launch_line_place_none_on_stages() -> None:
    line = ["python", "pretrain_gpt.py", "--num-layers", "8", "--mtp-num-layers", "1"]
    assert LaunchLine.of(line).depth_is_free
    assert not LaunchLine.of([*line, "--decoder-num-layers", "8"]).depth_is_free
