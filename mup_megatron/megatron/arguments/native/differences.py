"""Differences between native μP and the recipe that is made of a launch line, on the line's own model."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mup_megatron.architectures.names import READOUT_WEIGHT, WORD_EMBEDDINGS
from mup_megatron.megatron.arguments.native.formulas import Native
from mup_megatron.theory import Plan, PlanEntry, Role, family_of


@dataclass(frozen=True, slots=True)
class Difference:
    """A number that is one under native μP and another under the recipe."""

    quantity: str
    role: str
    """Empty where it is not about parameters."""
    where: tuple[str, ...]
    """The parameters, layers as `*`; or what it is about."""
    native: float
    recipe: float
    why: str

    def __str__(self) -> str:
        """One sentence with both numbers."""
        of = f" of {self.role} parameters" if self.role else ""
        where = ", ".join(self.where)
        return f"{self.quantity}{of} ({where}): {self.native:g} natively, {self.recipe:g} with the recipe. {self.why}"


_ONE_RATIO = "Native μP has one ratio for all widths, and this weight's own side grows by another."
_WHY = {
    "init_std": _ONE_RATIO,
    "lr": _ONE_RATIO,
    "min_lr": _ONE_RATIO,
    "eps": "Native μP scales eps of hidden weights only; the gradients of these shrink with width as well.",
    "weight_decay": "Native μP leaves λ alone where it changes the learning rate, so that their product grows.",
}
_DECOUPLED = "A decoupled learning rate has a floor of its own; a recipe's floor follows the learning rate."


def differences(native: Native, plan: Plan) -> Iterator[Difference]:
    """Yields what a plan of the line's recipe has otherwise than native μP."""
    found: dict[tuple[str, Role, float, float, str], list[str]] = {}
    for entry in plan.entries:
        values = native.of(entry)
        for quantity in _WHY:
            one, other = getattr(values, quantity), getattr(entry, quantity)
            if one is None or other is None or math.isclose(one, other, rel_tol=1e-9):
                continue
            why = _why(quantity, entry, native)
            names = found.setdefault((quantity, entry.role, one, other, why), [])
            name = family_of(entry.name)
            names += [] if name in names else [name]
    for (quantity, role, one, other, why), names in found.items():
        yield Difference(quantity, str(role), tuple(names), one, other, why)
    for quantity, one, other, why in (
        ("softmax scale", native.softmax_scale, plan.softmax_scale, "The recipe's base has other heads."),
        ("output multiplier", native.output_multiplier, plan.output_multiplier, _ONE_RATIO),
        ("embedding multiplier", native.values["mup_embedding_mult"], plan.embedding_multiplier, _ONE_RATIO),
    ):
        if not math.isclose(one, other, rel_tol=1e-9):
            yield Difference(quantity, "", ("the model",), one, other, why)
    yield from _of_run(native.values)


def _why(quantity: str, entry: PlanEntry, native: Native) -> str:
    if quantity == "eps" and entry.role is Role.HIDDEN:
        return _ONE_RATIO
    decoupled = native.values["decoupled_lr"] is not None and entry.name in (WORD_EMBEDDINGS, READOUT_WEIGHT)
    if quantity == "min_lr" and decoupled:
        return _DECOUPLED
    return _WHY[quantity]


def _of_run(values: Mapping[str, Any]) -> Iterator[Difference]:
    if values["lr_warmup_init"]:
        yield Difference(
            "first learning rate",
            "",
            ("the warm-up",),
            values["lr_warmup_init"],
            0.0,
            "One value for all parameters starts wide layers above their own peak; every group starts at 0.",
        )
    if values["weight_decay_incr_style"] != "constant":
        for key in ("start_weight_decay", "end_weight_decay"):
            if values[key] is not None and values[key] != values["weight_decay"]:
                yield Difference(
                    key.replace("_", " "),
                    "",
                    ("the run",),
                    values[key],
                    values["weight_decay"],
                    "A recipe's is constant.",
                )
