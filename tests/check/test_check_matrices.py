"""Verdicts on models that Muon or Lion trains, and Adam the rest: right ones in several shapes and layouts, and the
mistakes that such optimizers invite.
"""

from pathlib import Path
from typing import Any

import pytest
from support.processes import run_ranks

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.check.measure.levels import Level
from mup_megatron.check.measure.measurements import Quantity
from mup_megatron.check.mutants import MUTANTS
from mup_megatron.check.run_megatron import check_megatron
from mup_megatron.errors import InputError
from mup_megatron.recipe import Hyperparameters, Parametrization, Recipe
from mup_megatron.training.options import TrainingOptions

pytest.importorskip("emerging_optimizers", reason="megatron-core 0.16 has no Muon")

WIDE: dict[str, Any] = {"hidden_size": 256, "num_attention_heads": 16}
GPT: dict[str, Any] = {
    "num_layers": 1,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "vocab_size": 256,
    "seq_length": 32,
    "transformer_impl": "local",
}
LLAMA: dict[str, Any] = {
    **GPT,
    "untie_embeddings_and_output_weights": True,
    "swiglu": True,
    "normalization": "RMSNorm",
    "position_embedding_type": "rope",
    "add_bias_linear": False,
    "ffn_hidden_size": 192,
}
GROUPS: dict[str, Any] = {"group_query_attention": True, "num_query_groups": 2}
EXPERTS: dict[str, Any] = {"num_experts": 4, "moe_ffn_hidden_size": 64}
SHAPES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "tied, fixed ffn": ("spectral", {**GPT, "ffn_hidden_size": 192}, WIDE),
    "positions": ("unit_rms_norm", GPT, WIDE),
    "fixed groups": ("unit_rms_norm", {**LLAMA, **GROUPS}, {**WIDE, "ffn_hidden_size": 1536}),
    "experts": ("spectral", {**LLAMA, **EXPERTS}, {**WIDE, "ffn_hidden_size": 768}),
    "lion": ("lion", LLAMA, {**WIDE, "ffn_hidden_size": 768}),
}
"""How the optimizer scales, the base, and what a target has that is otherwise."""


def recipe_of(how: str, base: ModelFile) -> Recipe:
    own: dict[str, Any] = {} if how == "lion" else {"muon_scale_mode": how, "muon_nesterov": True}
    own |= {"lr": 0.01, "min_lr": 0.001, "init_method_std": 0.05, "weight_decay": 0.1, "embedding_multiplier": 2.0}
    return Recipe(
        base=base,
        hyperparameters=Hyperparameters(**own),
        parametrization=Parametrization(optimizer="lion" if how == "lion" else "muon"),
    )


def verdict(
    shape: str, references: Path, mistake: str | None = None, level: Level = Level.QUICK, **layout: Any
) -> tuple[str, str | None, list[str], float]:
    """In a rank: the outcome, the culprit, names of causes, and the most that is unexplained of a step."""
    how, content, changes = SHAPES[shape]
    base = ModelFile(**content)
    found = check_megatron(
        base.model_copy(update=changes),
        recipe_of(how, base),
        level=level,
        widths=(32, 64, 128),
        seeds=2,
        layout=TrainingOptions(train_iters=1, global_batch_size=1, **layout),
        mutant=None if mistake is None else MUTANTS[mistake],
        references=references,
    )
    left = [each.largest for key, each in found.comparison.items() if key.quantity is Quantity.UNEXPLAINED]
    return found.outcome.value, found.culprit, [cause.name for cause in found.causes], max(left)


@pytest.mark.parametrize(
    "shape", [pytest.param(name, marks=() if name == "tied, fixed ffn" else pytest.mark.slow) for name in SHAPES]
)
def test_a_right_model_passes_and_its_steps_are_explained(shape: str, references: Path) -> None:
    ((outcome, culprit, causes, left),) = run_ranks(verdict, 1, shape, references)
    assert (outcome, culprit, causes) == ("pass", None, [])
    assert left < 0.004


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ("tied, fixed ffn", {"tensor_model_parallel_size": 2}),
        pytest.param("fixed groups", {"tensor_model_parallel_size": 2}, marks=pytest.mark.slow),
        pytest.param(
            "experts",
            {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 1, "sequence_parallel": True},
            marks=pytest.mark.slow,
        ),
        pytest.param("experts", {"expert_model_parallel_size": 2}, marks=pytest.mark.slow),
    ],
)
def test_ranks_that_share_matrices_see_the_same(shape: str, layout: dict[str, Any], references: Path) -> None:
    for outcome, culprit, causes, left in run_ranks(verdict, 2, shape, references, **layout):
        assert (outcome, culprit, causes) == ("pass", None, [])
        assert left < 0.004


MISTAKES: list[tuple[str, str, str]] = [
    ("tied, fixed ffn", "matrix-rates-unscaled", "linear_qkv"),
    ("positions", "table-rates-unscaled", "position_embeddings"),
    ("positions", "matrix-rates-as-adams", "linear_qkv"),
    ("tied, fixed ffn", "matrix-to-another", "linear_qkv"),
    ("tied, fixed ffn", "table-as-matrix", "word_embeddings"),
    ("lion", "matrix-to-another", "linear_qkv"),
    ("fixed groups", "standard-parametrization", ""),
]


@pytest.mark.parametrize(
    ("shape", "mistake", "culprit"),
    [
        pytest.param(*each, marks=() if each[1] in {"matrix-rates-unscaled", "table-as-matrix"} else pytest.mark.slow)
        for each in MISTAKES
    ],
)
def test_a_mistake_is_found_and_named(shape: str, mistake: str, culprit: str, references: Path) -> None:
    ((outcome, found, causes, _),) = run_ranks(verdict, 1, shape, references, mistake)
    assert outcome == "fail"
    assert causes[0] in MUTANTS[mistake].cause
    assert found is not None
    assert culprit in found


@pytest.mark.slow
def test_standard_looks_longer(references: Path) -> None:
    ((outcome, *_),) = run_ranks(verdict, 1, "positions", references, level=Level.STANDARD)
    assert outcome == "pass"


def refused(how: str, **layout: Any) -> str:
    """In a rank."""
    base = ModelFile(**LLAMA, **GROUPS)
    target = base.model_copy(update={**WIDE, "ffn_hidden_size": 768})
    values = {"muon_tp_mode": "blockwise"} if how == "blockwise" else {"muon_scale_mode": how}
    own = recipe_of("unit_rms_norm", base)
    own = own.model_copy(update={"hyperparameters": own.hyperparameters.model_copy(update=values)})
    try:
        check_megatron(
            target,
            own,
            layout=TrainingOptions(train_iters=1, global_batch_size=1, **layout),
            references=None,
        )
    except InputError as error:
        return str(error)
    return ""


def test_what_cannot_be_right_is_refused_with_the_one_thing_to_change() -> None:
    (parts,) = run_ranks(refused, 1, "spectral")
    assert "Use --muon-scale-mode unit_rms_norm (muon_scale_mode in the recipe)" in parts
    for said in run_ranks(refused, 2, "blockwise", tensor_model_parallel_size=2):
        assert "Use --muon-tp-mode duplicated (muon_tp_mode in the recipe)" in said
    for said in run_ranks(refused, 2, "unit_rms_norm", use_distributed_optimizer=True):
        assert "--use-distributed-optimizer" in said
