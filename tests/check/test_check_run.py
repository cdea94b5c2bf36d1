"""Verdicts on real Megatron-Core models: one process and several layouts, right ones, wrong ones, hopeless ones."""

import math
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from support.processes import run_ranks

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.check.measure.levels import Level
from mup_megatron.check.measure.measurements import Key, Quantity
from mup_megatron.check.mutants import MUTANTS, Context, Mutant
from mup_megatron.check.run_megatron import check_megatron
from mup_megatron.check.verdict.comparison import Compared
from mup_megatron.check.verdict.verdict import Verdict
from mup_megatron.errors import InputError
from mup_megatron.recipe import Hyperparameters, Recipe
from mup_megatron.training.options import TrainingOptions

WIDTHS = (32, 64, 128)
GPT: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "vocab_size": 256,
    "seq_length": 32,
    "transformer_impl": "local",
}


class Told(NamedTuple):
    """What a rank tells of its verdict."""

    outcome: str
    culprit: str | None
    causes: list[str]
    lines: dict[str, tuple[str, ...]]
    comparison: dict[Key, Compared]


def base(**changes: Any) -> ModelFile:
    return ModelFile(**{**GPT, **changes})


def tuned(base: ModelFile, **hyperparameters: float) -> Recipe:
    values = {"lr": 0.004, "min_lr": 0.0004, "init_method_std": 0.05, "weight_decay": 0.1, "output_multiplier": 2.0}
    return Recipe(base=base, hyperparameters=Hyperparameters(**{**values, **hyperparameters}))


def verdict(references: Path, mutant: Mutant | None = None, *, level: Level = Level.QUICK, **layout: Any) -> Verdict:
    """In a rank."""
    small = base()
    target = small.model_copy(update={"hidden_size": 256, "num_attention_heads": 16})
    return check_megatron(
        target,
        tuned(small),
        level=level,
        widths=WIDTHS,
        seeds=2,
        layout=TrainingOptions(train_iters=1, global_batch_size=1, **layout),
        mutant=mutant,
        references=references,
    )


def told(found: Verdict) -> Told:
    lines = {section.name: section.lines for section in found.sections}
    causes = [cause.name for cause in found.causes]
    return Told(found.outcome.value, found.culprit, causes, lines, dict(found.comparison))


def check(references: Path, mutant: str | None = None, **more: Any) -> Told:
    """In a rank."""
    return told(verdict(references, None if mutant is None else MUTANTS[mutant], **more))


def one(function: Any, *args: Any, **more: Any) -> Any:
    return run_ranks(function, 1, *args, **more)[0]


@pytest.fixture(scope="module")
def single(references: Path) -> Told:
    found: Told = one(check, references)
    return found


def test_a_right_model_passes(single: Told) -> None:
    assert (single.outcome, single.culprit, single.causes) == ("pass", None, [])


def test_what_was_looked_at(single: Told) -> None:
    of = {quantity: {key.name for key in single.comparison if key.quantity is quantity} for quantity in Quantity}
    # Two embeddings; in both layers two norms, four matrices, attention logits and the stream; final norm, readout.
    assert len(of[Quantity.ACTIVATION]) == len(of[Quantity.UPDATE]) == 2 + 2 * 8 + 2
    # Two tables; in both layers four matrices, their biases and two norms of two vectors; the final norm.
    assert len(of[Quantity.LEARNING_RATE]) == len(of[Quantity.WEIGHT_DECAY]) == 2 + 2 * 12 + 2
    assert of[Quantity.LEARNING_RATE] == of[Quantity.EPS] == of[Quantity.GRADIENT]
    assert len(of[Quantity.SPECTRAL]) == 2 + 2 * 4


def test_what_an_optimizer_used_is_read_to_a_thousandth(single: Told) -> None:
    for key, compared in single.comparison.items():
        if key.quantity is Quantity.LEARNING_RATE:
            assert max(abs(d) for d in compared.deviations.values()) < 1e-3, key


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP2": (2, {"tensor_model_parallel_size": 2}),
    "PP2": (2, {"pipeline_model_parallel_size": 2}),
    "TP2×PP2": (
        4,
        {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "sequence_parallel": True},
    ),
}


def each_layout(often: str) -> list[Any]:
    """All of them, of which those that are not run often are slow."""
    return [
        pytest.param(*layout, id=name, marks=() if name == often else pytest.mark.slow)
        for name, layout in LAYOUTS.items()
    ]


@pytest.mark.parametrize(("ranks", "layout"), each_layout(often="TP2"))
def test_a_layouts_verdict_is_that_of_one_process(
    ranks: int, layout: dict[str, Any], single: Told, references: Path
) -> None:
    found = run_ranks(check, ranks, references, **layout)
    for of_rank in found:
        assert (of_rank.outcome, of_rank.culprit, of_rank.causes) == (single.outcome, None, [])
        assert set(of_rank.comparison) == set(single.comparison)
    for key, compared in found[0].comparison.items():
        alike = single.comparison[key]
        if "pipeline_model_parallel_size" not in layout:  # the same weights: pipeline stages draw others
            assert compared.level == pytest.approx(alike.level, abs=0.02), key
        elif key.quantity is Quantity.LEARNING_RATE:
            assert compared.level == pytest.approx(alike.level, abs=1e-3), key


def check_virtual_stages(references: Path) -> Told:
    """In a rank. Of the layers that train, a rank has two virtual stages; of all, three."""
    small = base(num_layers=6)
    target = small.model_copy(update={"hidden_size": 256, "num_attention_heads": 16})
    layout = TrainingOptions(
        train_iters=1,
        global_batch_size=1,
        micro_batch_size=2,
        pipeline_model_parallel_size=2,
        num_layers_per_virtual_pipeline_stage=1,
    )
    found = check_megatron(
        target, tuned(small), widths=WIDTHS, seeds=2, layout=layout, references=references, processes=2
    )
    assert any(remark.startswith("2 processes were asked for") for remark in found.remarks)
    return told(found)


@pytest.mark.slow
def test_a_virtual_pipeline_has_its_stages_in_the_deep_model_too(references: Path) -> None:
    for of_rank in run_ranks(check_virtual_stages, 2, references):
        assert (of_rank.outcome, of_rank.culprit) == ("pass", None)
        assert "6 layers" in of_rank.lines["every layer"][0]


@pytest.fixture(scope="module")
def collapsed(references: Path) -> Told:
    found: Told = one(check, references, COLLAPSED)
    return found


COLLAPSED = "learning-rate-collapsed"


@pytest.mark.parametrize(("ranks", "layout"), each_layout(often="TP2×PP2"))
def test_a_mistake_is_named_alike_in_every_layout(
    ranks: int, layout: dict[str, Any], collapsed: Told, references: Path
) -> None:
    assert collapsed.outcome == "fail"
    assert collapsed.causes[0] in MUTANTS[COLLAPSED].cause
    for of_rank in run_ranks(check, ranks, references, COLLAPSED, **layout):
        assert (of_rank.outcome, of_rank.culprit, of_rank.causes[0]) == ("fail", collapsed.culprit, collapsed.causes[0])


# ---- nothing to conclude -------------------------------------------------------------------------------------------


def broken(name: str) -> Mutant:
    """Something that is no mistake of scale."""
    import torch
    from torch import nn

    def not_finite(chunks: Any, _plan: Any, _context: Context) -> None:
        with torch.no_grad():
            next(p for c in chunks for n, p in c.named_parameters() if n.endswith("layers.1.mlp.linear_fc1.weight"))[
                0, 0
            ] = math.nan

    def random(chunks: Any, _plan: Any, _context: Context) -> None:
        for chunk in chunks:
            for module_name, module in chunk.named_modules():
                if module_name.endswith("layers.1.mlp.linear_fc2"):
                    module.register_forward_pre_hook(lambda _m, args: (nn.functional.dropout(args[0]), *args[1:]))

    def still(optimizer: Any, _chunks: Any, _plan: Any, _context: Context) -> None:
        for group in optimizer.param_groups:
            group["max_lr"] = group["min_lr"] = group["lr"] = 0.0

    changes: dict[str, dict[str, Any]] = {
        "not-finite": {"model": not_finite},
        "random": {"model": random},
        "still": {"optimizer": still},
    }
    return Mutant(name=name, what=name, cause=(), **changes[name])


def check_broken(references: Path, name: str) -> Told:
    return told(verdict(references, broken(name)))


def test_a_model_that_is_not_finite_fails_and_is_told_where(references: Path) -> None:
    found = one(check_broken, references, "not-finite")
    assert found.outcome == "fail"
    assert found.culprit == "decoder.layers.1.mlp.linear_fc1"


def test_a_random_layer_gets_no_verdict_and_is_named(references: Path) -> None:
    found = one(check_broken, references, "random")
    assert found.outcome == "no verdict"
    first, remedy = found.lines["training"]
    assert "decoder.layers.1.mlp.linear_fc2: not deterministic" in first
    assert remedy.startswith("Turn off what is random")


def test_a_model_that_does_not_learn_fails(references: Path) -> None:
    found = one(check_broken, references, "still")
    assert found.outcome == "fail"
    assert "does not learn" in found.lines["training"][0]


def test_widths_between_which_nothing_changes_are_no_pass() -> None:
    found = one(_too_narrow)
    assert found.outcome == "no verdict"
    assert any("cannot be told" in line for line in found.lines["coordinates"])


def _too_narrow() -> Told:
    """One seed's worth of two widths: standard parametrization is not told apart."""
    small = base()
    target = small.model_copy(update={"hidden_size": 256, "num_attention_heads": 16})
    return told(check_megatron(target, tuned(small), widths=(48, 64), seeds=2, references=None))


def test_a_width_that_cannot_be_built_is_bad_input() -> None:
    with pytest.raises(InputError, match=r"--widths 40.*multiple of 16"):
        check_megatron(base(), tuned(base()), widths=(32, 40))


def test_a_layout_that_is_not_possible_is_bad_input() -> None:
    layout = TrainingOptions(train_iters=1, global_batch_size=1, tensor_model_parallel_size=3)
    with pytest.raises(InputError, match="does not divide num_attention_heads"):
        check_megatron(base(), tuned(base()), widths=(32, 64), layout=layout)


def test_a_depth_that_the_layout_cannot_share_is_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    deep = base(num_layers=7)
    layout = TrainingOptions(train_iters=1, global_batch_size=1, pipeline_model_parallel_size=2)
    with pytest.raises(InputError, match="num_layers 7"):
        check_megatron(deep, tuned(deep), widths=(32, 64), layout=layout)


def check_standard(references: Path, level: Level) -> Told:
    return told(verdict(references, level=level))


@pytest.mark.slow
def test_a_right_model_passes_every_level(references: Path) -> None:
    found = one(check_standard, references, Level.FULL)
    assert found.outcome == "pass"
    assert set(found.lines) == {
        "coordinates",
        "gradients and updates",
        "late steps",
        "wider is better",
        "transfer",
    }


def test_references_are_kept_and_a_damaged_one_is_made_anew(tmp_path: Any) -> None:
    assert one(_twice, tmp_path) == (4, True, True)


def _twice(folder: Any) -> tuple[int, bool, bool]:
    small = base()
    target = small.model_copy(update={"hidden_size": 256, "num_attention_heads": 16})

    def again() -> Any:
        found = check_megatron(target, tuned(small), widths=(32, 64), seeds=2, references=folder)
        return found.reference.to_json()

    first = again()
    files = sorted(folder.iterdir())
    for file in files:
        file.write_text(file.read_text()[:100])
    return len(files) + 1, again() == first, again() == first
