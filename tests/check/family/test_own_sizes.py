"""A family's own sizes in small models of it: what the family declares of them is all that a check knows."""

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

import pytest
from support.added_architecture import Bank, BankArchitecture
from support.shapes import gpt, recipe_for

from mup_megatron.architectures import registry
from mup_megatron.architectures.families import ATTENTION, Family, Size
from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.check.family.gpt import at_width, condensed, widths_for
from mup_megatron.recipe import Recipe


class SizedFile(ModelFile):
    architecture: Literal["sized"] = "sized"
    bank_rank: int = 1024
    bank_side: int | None = None
    banks: int = 8


class SizedBank(Bank):
    sizes = (
        Size(key="bank_rank", small=16),
        Size(key="bank_side", small=16),
        Size(key="banks", small=4, follows_width=False),
    )


class SizedArchitecture(BankArchitecture):
    name: ClassVar[str] = "sized"
    file: ClassVar[type[ModelFile]] = SizedFile

    def layers(self, model: ModelFile) -> Sequence[Sequence[Family]]:
        return [(ATTENTION, SizedBank())] * model.num_layers


@pytest.fixture(autouse=True)
def _known() -> Iterator[None]:
    registry.register(SizedArchitecture())
    yield
    del registry._ARCHITECTURES["sized"]


def pair(base: dict[str, Any], target: dict[str, Any]) -> tuple[ModelFile, Recipe]:
    """A target four times as wide as its recipe's base, and the recipe."""
    small, large = (
        SizedFile(**{**dict(gpt(width)), "architecture": "sized", **own}) for width, own in ((8, base), (32, target))
    )
    return large, recipe_for(small)


def small(key: str, base: dict[str, Any], target: dict[str, Any]) -> tuple[object, list[object]]:
    """A key in a check's base, and in its models at three widths."""
    model, recipe = condensed(*pair(base, target))
    widths = widths_for(model, recipe, 3)
    return getattr(recipe.base, key), [getattr(at_width(model, recipe, width), key) for width in widths]


def test_what_base_and_target_share_is_as_small_as_the_family_says() -> None:
    assert small("bank_rank", {}, {}) == (16, [16, 16, 16])
    assert small("bank_rank", {"bank_rank": 8}, {"bank_rank": 8}) == (8, [8, 8, 8])


def test_what_differs_keeps_its_ratio_to_the_width() -> None:
    base, models = small("bank_rank", {"bank_rank": 128}, {"bank_rank": 512})
    assert (base, models) == (32, [16, 32, 64])


def test_a_count_that_differs_does_so_in_the_check_and_at_all_widths() -> None:
    assert small("banks", {"banks": 8}, {"banks": 32}) == (4, [8, 8, 8])
    assert small("banks", {"banks": 32}, {"banks": 2}) == (4, [2, 2, 2])
    assert small("banks", {"banks": 3}, {"banks": 4}) == (3, [4, 4, 4])


def test_what_a_model_has_not_stays_away() -> None:
    assert small("bank_side", {}, {}) == (None, [None, None, None])


def test_tensor_parallel_ranks_can_share_what_is_cut() -> None:
    model, _ = condensed(*pair({}, {}), tensor_parallel=3)
    assert model.bank_rank == 15
