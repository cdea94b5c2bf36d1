"""Verdicts on models with latent attention: right ones at fixed and at growing ranks, and its own two mistakes."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
from support.processes import run_ranks

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.check.measure.levels import Level
from mup_megatron.check.mutants import MUTANTS, Context, Mutant
from mup_megatron.check.run_megatron import check_megatron
from mup_megatron.recipe import Hyperparameters, Recipe
from mup_megatron.theory import Plan
from mup_megatron.training.options import TrainingOptions

BASE = ModelFile(
    num_layers=2,
    hidden_size=64,
    num_attention_heads=4,
    vocab_size=256,
    seq_length=32,
    transformer_impl="local",
    multi_latent_attention=True,
    q_lora_rank=32,
    kv_lora_rank=32,
    qk_head_dim=12,
    qk_pos_emb_head_dim=4,
    v_head_dim=16,
    qk_layernorm=True,
    normalization="RMSNorm",
    position_embedding_type="none",
    add_bias_linear=False,
    untie_embeddings_and_output_weights=True,
    rotary_scaling_factor=40.0,
    mscale_all_dim=1.0,
)
WIDE = BASE.model_copy(update={"hidden_size": 256, "num_attention_heads": 16})
LARGE_HEADS = BASE.model_copy(
    update={"hidden_size": 256, "qk_head_dim": 48, "qk_pos_emb_head_dim": 16, "v_head_dim": 64}
)
TARGETS = {
    "fixed ranks": WIDE,
    "growing ranks": WIDE.model_copy(update={"q_lora_rank": 128, "kv_lora_rank": 128}),
    "growing heads": LARGE_HEADS,
}
RECIPE = Recipe(base=BASE, hyperparameters=Hyperparameters(lr=2e-3, init_method_std=0.05, attention_multiplier=2.0))


def _up_as_wide(plan: Plan, context: Context) -> Plan:
    """Projections up from a latent drawn and stepped as hidden matrices whose input grew."""
    r = context.r
    return replace(
        plan,
        entries=tuple(
            replace(
                entry,
                init_std=entry.init_std / math.sqrt(r),
                lr=entry.lr / r,
                min_lr=entry.min_lr / r,
                weight_decay=entry.weight_decay * r,
            )
            if "_up_proj.weight" in entry.name and entry.init_std is not None
            else entry
            for entry in plan.entries
        ),
    )


MISTAKES: dict[str, tuple[str, Mutant, str]] = {
    "up projections as wide": (
        "fixed ranks",
        Mutant(name="latent-up-as-wide", what="As if the rank had grown.", cause=(), plan=_up_as_wide),
        "_up_proj.weight",
    ),
    "one ratio for all": ("fixed ranks", MUTANTS["one-width-ratio"], "_up_proj.weight"),
    "stock softmax scale": ("growing heads", MUTANTS["attention-sqrt-d"], "scale_mask_softmax"),
    "stock softmax scale, heads of one size": (
        "fixed ranks",
        MUTANTS["attention-multiplier-dropped"],
        "scale_mask_softmax",
    ),
}


def verdict(target: str, references: Path, mistake: str | None = None) -> tuple[str, str | None, list[str]]:
    """In a rank."""
    found = check_megatron(
        TARGETS[target],
        RECIPE,
        level=Level.QUICK,
        seeds=2,
        layout=TrainingOptions(train_iters=1, global_batch_size=1),
        mutant=None if mistake is None else MISTAKES[mistake][1],
        references=references,
    )
    return found.outcome.value, found.culprit, [cause.name for cause in found.causes]


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the tests of this file keep what is right."""
    return tmp_path_factory.mktemp("references")


@pytest.mark.parametrize(
    "target", [pytest.param(name, marks=() if name == "fixed ranks" else pytest.mark.slow) for name in TARGETS]
)
def test_a_right_model_passes(target: str, references: Path) -> None:
    assert run_ranks(verdict, 1, target, references)[0] == ("pass", None, [])


@pytest.mark.slow
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_found(mistake: str, references: Path) -> None:
    target, mutant, culprit = MISTAKES[mistake]
    outcome, found, causes = run_ranks(verdict, 1, target, references, mistake)[0]
    assert outcome == "fail"
    assert found is not None
    assert culprit in found
    assert set(mutant.cause) & set(causes) or not mutant.cause
