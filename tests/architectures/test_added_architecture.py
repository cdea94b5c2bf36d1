"""An architecture is its own file and one registration: one that is defined here goes the whole way."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.added_architecture import BANK, BankArchitecture, BankFile
from support.processes import run_ranks
from support.shapes import recipe_for
from support.training_runs import VOCABULARY, make_text, options

from mup_megatron.architectures import registry
from mup_megatron.architectures.cost import parameter_count, training_flops
from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.architectures.registry import model_file
from mup_megatron.errors import InputError
from mup_megatron.theory import Role
from mup_megatron.training.train import run_training

SMALL = {
    "architecture": "bank",
    "num_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "make_vocab_size_divisible_by": 8,
    "seq_length": 16,
    "transformer_impl": "local",
}
WIDE = {**SMALL, "num_layers": 3, "hidden_size": 256, "num_attention_heads": 16}
VALUES = {"lr": 0.01, "init_method_std": 0.05, "adam_eps": 1e-6, "weight_decay": 0.1}


@pytest.fixture
def known() -> Iterator[None]:
    registry.register(BankArchitecture())
    yield
    del registry._ARCHITECTURES["bank"]


def file(content: dict[str, object]) -> ModelFile:
    return model_file(content, source="here")


def test_it_is_not_known_before() -> None:
    with pytest.raises(InputError, match=r"architecture: 'bank' is no architecture that is supported\. Choose"):
        file(SMALL)


@pytest.mark.usefixtures("known")
def test_a_recipe_of_it_is_explained() -> None:
    plan = recipe_for(file(SMALL), **VALUES).plan(file(WIDE))
    bank = {name: plan[f"decoder.layers.2.mlp.{name}"] for name in ("router", "down", "up")}
    router, down, up = bank.values()
    assert (router.role, down.role, up.role) == (Role.OUTPUT, Role.HIDDEN, Role.HIDDEN)
    # The router: an output whose multiplier stands in its weight.
    assert (router.init_std, router.lr, router.eps, router.weight_decay) == (0.05 / 4, 0.01 / 4, 1e-6, 0.1 * 4)
    # A bottleneck of a fixed size: hidden, with a ratio on the side that grows.
    assert (down.init_std, down.lr, down.eps, down.weight_decay) == (0.05 / 2, 0.01 / 4, 1e-6, 0.1 * 4)
    assert (up.init_std, up.lr, up.eps, up.weight_decay) == (0.05 / math.sqrt(6), 0.01, 1e-6 / 4, 0.1)
    assert {entry.multiplier for entry in bank.values()} == {1.0}
    assert json.loads(json.dumps(plan.to_json()))["model"]["architecture"] == "bank"


@pytest.mark.usefixtures("known")
def test_its_cost_is_counted() -> None:
    model = file(WIDE)
    per_layer = 4 * 256 * 256 + 4 * 256 + 2 * 2 * 256 + 4 * 256 * (1 + 2 * 8)
    assert parameter_count(model) == (VOCABULARY + 16) * 256 + 3 * per_layer + 2 * 256
    assert training_flops(model).items["bank"] == 3 * BANK.flops(model)["bank"]


@pytest.mark.usefixtures("known")
def test_the_recipe_keeps_what_it_is() -> None:
    own = recipe_for(file(SMALL))
    assert type(own.base) is BankFile
    again = type(own).model_validate(own.model_dump(mode="json"))
    assert (type(again.base), again.fingerprint) == (BankFile, own.fingerprint)


def trained(folder: Path) -> list[float]:
    """In a rank: explained, applied, guarded and trained."""
    registry.register(BankArchitecture())
    text = make_text(folder)
    recipe = recipe_for(file(SMALL), **VALUES)
    return list(run_training(file(WIDE), recipe, text, options(folder)).losses)


def test_it_trains_on_megatron_core_under_the_guard(tmp_path: Path) -> None:
    losses = run_ranks(trained, 1, tmp_path)[0]
    assert losses[0] == pytest.approx(math.log(VOCABULARY), rel=0.05)
    assert losses[-1] < losses[0] - 0.5


def checked(mistake: str | None, references: Path) -> tuple[str, list[str]]:
    """In a rank: the outcome of a check, and the causes that it names."""
    from mup_megatron.check.mutants import MUTANTS
    from mup_megatron.check.run_megatron import check_megatron

    registry.register(BankArchitecture())
    recipe = recipe_for(file(SMALL), **VALUES)
    mutant = None if mistake is None else MUTANTS[mistake]
    verdict = check_megatron(
        file(WIDE), recipe, widths=(64, 128, 256), seeds=2, mutant=mutant, references=references, processes=1
    )
    return verdict.outcome, [cause.name for cause in verdict.causes]


@pytest.mark.slow
@pytest.mark.parametrize("mistake", ["init-unscaled", "eps-unscaled"])
def test_a_mistake_in_it_is_found(mistake: str, references: Path) -> None:
    from mup_megatron.check.mutants import MUTANTS

    outcome, causes = run_ranks(checked, 1, mistake, references)[0]
    assert outcome == "fail"
    assert causes[0] in MUTANTS[mistake].cause


def test_it_passes_a_check(references: Path) -> None:
    assert run_ranks(checked, 1, None, references)[0] == ("pass", [])


@pytest.mark.usefixtures("known")
def test_what_cannot_be_told_apart_is_not_registered() -> None:
    class Same(BankArchitecture):
        name = "same"

    class Silent(BankArchitecture):
        name, file = "silent", type("SilentFile", (ModelFile,), {})

    with pytest.raises(InputError, match="bank has this name or class of model files already"):
        registry.register(Same())
    with pytest.raises(InputError, match="nothing in its model files tells it from others"):
        registry.register(Silent())
    assert list(registry.architectures())[-1] == "bank"
