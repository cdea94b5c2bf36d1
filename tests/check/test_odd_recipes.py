"""Right set-ups with odd values get a verdict, and it is a pass; mistakes that hide behind them do not."""

from pathlib import Path
from typing import Any

import pytest
from support.processes import run_ranks

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.check.mutants import Mutant
from mup_megatron.check.run_megatron import check_megatron
from mup_megatron.check.verdict.verdict import Verdict
from mup_megatron.recipe import Recipe, recipe

GPT: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "vocab_size": 512,
    "seq_length": 64,
    "untie_embeddings_and_output_weights": True,
}
VALUES = {"lr": 0.004, "min_lr": 0.0004, "init_method_std": 0.05, "weight_decay": 0.1}
WIDE = {"hidden_size": 512, "num_attention_heads": 32}
SGD = {"optimizer": "sgd"}


def setup(
    target: dict[str, Any] | None = None,
    base: dict[str, Any] | None = None,
    own: Any = (),
    rules: Any = None,
    **values: float,
) -> tuple[ModelFile, Recipe]:
    of_base = {**GPT, **(base or {})}
    content = {
        "base": of_base,
        "hyperparameters": {**VALUES, **values},
        "per_parameter": own,
        "parametrization": rules or {},
    }
    return ModelFile(**{**of_base, **(WIDE if target is None else target)}), recipe(content, source="test")


ODD = {
    "output multiplier 0.01": setup(output_multiplier=0.01),
    "embedding multiplier 0.01": setup(embedding_multiplier=0.01),
    "embedding multiplier 100": setup(embedding_multiplier=100.0),
    "rate ten times as high": setup(lr=0.04),
    "no rate to speak of": setup(lr=1e-8, min_lr=0.0),
    "SGD, far too fast": setup(lr=10.0, rules=SGD),
    "SGD, far too slow": setup(lr=1e-4, min_lr=0.0, rules=SGD),
    "base equal to target": setup(target={}),
    "base and target wide": setup(
        target={"hidden_size": 8192, "num_attention_heads": 64}, base={"hidden_size": 2048, "num_attention_heads": 16}
    ),
    "apply_layernorm_1p": setup(base={"apply_layernorm_1p": True}),
    "dropout": setup(base={"hidden_dropout": 0.1, "attention_dropout": 0.1}),
    "no clipping": setup(clip_grad=0.0),
    "clipping at 1e-6": setup(clip_grad=1e-6),
    "weight decay 0": setup(weight_decay=0.0),
    "eps 1": setup(adam_eps=1.0),
    "readout from zero": setup(own=[{"match": "output_layer.weight", "init_mult": 0}]),
    "extreme overrides": setup(
        own=[
            {"match": "*.linear_fc1.weight", "lr_mult": 1000, "init_mult": 1000},
            {"match": "embedding.*", "lr_mult": 1e-4, "multiplier": 1e-4},
        ]
    ),
    "vocabulary of 2, sequences of 1": setup(base={"vocab_size": 2, "seq_length": 1}),
    "one layer, one head": setup(target={"hidden_size": 512}, base={"num_layers": 1, "num_attention_heads": 1}),
    "init std 1e-4": setup(init_method_std=1e-4),
    "init std 1": setup(init_method_std=1.0),
}
FEW = {"widths": (32, 64, 128), "seeds": 2}


def outcomes(names: list[str], folder: Path) -> dict[str, str]:
    """In a rank."""
    return {name: str(check_megatron(*ODD[name], references=folder, **FEW).outcome) for name in names}


SAMPLE = ["output multiplier 0.01", "no clipping"]


@pytest.mark.slow  # three checks; benchmarks/check_exam.py has many more
def test_odd_values_pass(tmp_path: Path) -> None:
    assert run_ranks(outcomes, 1, SAMPLE, tmp_path)[0] == dict.fromkeys(SAMPLE, "pass")


@pytest.mark.slow
def test_all_odd_values_pass(tmp_path: Path) -> None:
    rest = [name for name in ODD if name not in SAMPLE]
    assert run_ranks(outcomes, 1, rest, tmp_path)[0] == dict.fromkeys(rest, "pass")


def _summed(optimizer: Any, chunks: Any, _plan: Any, _context: Any) -> None:
    """Micro-batches that nobody divides by their number."""
    original = optimizer.step

    def step(*args: Any, **kwargs: Any) -> Any:
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.main_grad.mul_(4.0)
        return original(*args, **kwargs)

    optimizer.step = step


def with_summed_gradients(clip: float) -> tuple[str, str]:
    """In a rank."""
    mutant = Mutant(name="summed", what="summed", cause=(), optimizer=_summed)
    found: Verdict = check_megatron(*setup(clip_grad=clip), mutant=mutant, references=None, **FEW)
    return str(found.outcome), found.causes[0].name


@pytest.mark.parametrize("clip", [1.0, pytest.param(0.0, marks=pytest.mark.slow)])
def test_gradients_that_are_summed_and_not_averaged_are_seen(clip: float) -> None:
    assert run_ranks(with_summed_gradients, 1, clip)[0] == ("fail", "gradients-scaled")
