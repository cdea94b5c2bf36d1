"""Verdicts on models with latent attention: right ones at fixed and at growing ranks, and its own mistakes."""

from pathlib import Path

import pytest
from support.processes import run_ranks

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.check.measure.levels import Level
from mup_megatron.check.mutants import MUTANTS
from mup_megatron.check.run_megatron import check_megatron
from mup_megatron.recipe import Hyperparameters, Recipe
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
    "more and larger heads": LARGE_HEADS.model_copy(
        update={"num_attention_heads": 8, "qk_head_dim": 24, "qk_pos_emb_head_dim": 8, "v_head_dim": 32}
    ),
}
LOGITS = "scale_mask_softmax"
RECIPE = Recipe(base=BASE, hyperparameters=Hyperparameters(lr=2e-3, init_method_std=0.05, attention_multiplier=2.0))


MISTAKES: dict[str, tuple[str, str, str]] = {
    "latent-by-width": ("fixed ranks", "_up_proj.weight", "latent-by-width"),
    "bottleneck-as-output": ("fixed ranks", "_down_proj.weight", "bottleneck-init"),
    "one-width-ratio": ("fixed ranks", "_up_proj.weight", "one-width-ratio"),
    "attention-sqrt-d": ("more and larger heads", LOGITS, "attention-sqrt-d"),
    "attention-scale-stock": ("growing heads", LOGITS, "attention-scale-stock"),
    "attention-own-factor-dropped": ("growing ranks", LOGITS, "attention-own-factor-dropped"),
    "attention-multiplier-dropped": ("fixed ranks", LOGITS, "attention-multiplier-dropped"),
}
"""Mistake → target, what is at fault, why."""


def verdict(target: str, references: Path, mistake: str | None = None) -> tuple[str, str | None, list[str]]:
    """In a rank."""
    found = check_megatron(
        TARGETS[target],
        RECIPE,
        level=Level.QUICK,
        seeds=2,
        layout=TrainingOptions(train_iters=1, global_batch_size=1),
        mutant=None if mistake is None else MUTANTS[mistake],
        references=references,
    )
    return found.outcome.value, found.culprit, [cause.name for cause in found.causes]


@pytest.mark.parametrize(
    "target", [pytest.param(name, marks=() if name == "fixed ranks" else pytest.mark.slow) for name in TARGETS]
)
def test_a_right_model_passes(target: str, references: Path) -> None:
    assert run_ranks(verdict, 1, target, references)[0] == ("pass", None, [])


@pytest.mark.slow
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_found_and_named(mistake: str, references: Path) -> None:
    target, culprit, cause = MISTAKES[mistake]
    outcome, found, causes = run_ranks(verdict, 1, target, references, mistake)[0]
    assert outcome == "fail"
    assert found is not None
    assert culprit in found
    assert causes[0] == cause
