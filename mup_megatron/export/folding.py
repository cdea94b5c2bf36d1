"""Multipliers in the weights of a checkpoint that stays in its format, and taken out of them again.

Stock software multiplies by nothing, so the plan's multipliers go into the weights as `folds.py` says. What an
optimizer keeps goes along: the gradient of a weight that is f times as large is f times smaller, and so is its mean;
the mean of its square is f² times smaller. Both ways are exact to rounding, and to the bit for powers of two.
"""

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field

from mup_megatron.errors import InputError
from mup_megatron.export.folds import Fold, folds
from mup_megatron.readback import parse_json
from mup_megatron.theory import Plan, Tensor
from mup_megatron.validation import Strict, brief, validated

MARKER = "mup.folded.json"
"""The file beside a folded checkpoint's weights that says what was done to them."""
VERSION = 1


ORDERS: Mapping[str, int] = {
    "fp32_param": 0,
    "exp_avg": 1,
    "momentum_buffer": 1,
    "exp_avg_sq": 2,
    "max_exp_avg_sq": 2,
}
"""How often the gradient is a factor of what an optimizer keeps, by torch's names; a copy of the weight has none."""


@dataclass(frozen=True, kw_only=True)
class Folding:
    """The changes of a checkpoint's tensors, by the plan's names."""

    fingerprint: str
    """The recipe's."""
    folds: tuple[Fold, ...]
    optimizer: bool
    """Whether the checkpoint has the optimizer's state as well; left out, it cannot be had back."""

    @cached_property
    def by_name(self) -> Mapping[str, Sequence[Fold]]:
        """The folds of each tensor that has any."""
        found: dict[str, list[Fold]] = {}
        for each in self.folds:
            found.setdefault(each.tensor, []).append(each)
        return found

    def require_of(self, plan: Plan, tensors: Collection[Tensor], *, source: str) -> None:
        """Raises InputError unless it is what `folding` does to a model of this plan."""
        if self.fingerprint != plan.fingerprint:
            raise InputError(
                f"{source}: of another recipe ({self.fingerprint[:12]}…). Give the recipe of the run that was folded."
            )
        wanted = folding(plan, tensors, optimizer=self.optimizer).folds
        other = next((one for one, own in zip_longest(self.folds, wanted) if not _same(one, own)), None)
        if other is not None or len(self.folds) != len(wanted):
            name = brief(other.tensor if other is not None else wanted[len(self.folds)].tensor, 80)
            raise InputError(
                f"{source}: says of {name} what is not done to a model of this recipe and size. Restore the file, or "
                "fold again."
            )

    def to_text(self) -> str:
        """Returns it as `MARKER` has it."""
        content = {
            "version": VERSION,
            "fingerprint": self.fingerprint,
            "optimizer": self.optimizer,
            "folded": [each.to_json() for each in self.folds],
        }
        return json.dumps(content, indent=1) + "\n"

    @classmethod
    def from_text(cls, text: str, *, source: str, remedy: str) -> "Folding":
        """Reads what `to_text` made.

        Args:
            text: the file's content.
            source: what the file is called in messages.
            remedy: what to do about a damaged one, as a sentence.

        Raises:
            InputError: it is truncated, or something else.
        """
        content = parse_json(text, source=source, remedy=remedy)
        found = validated(_Marker, content, source=source)
        return cls(
            fingerprint=found.fingerprint,
            folds=tuple(each.fold() for each in found.folded),
            optimizer=found.optimizer,
        )


@dataclass(frozen=True, kw_only=True)
class Rewritten:
    """A checkpoint that was folded, or unfolded."""

    to: Path
    tensors: Sequence[str]
    """Those that were multiplied, by the plan's names."""
    optimizer: str
    """What became of the optimizer's state, as half a sentence."""


def folding(plan: Plan, tensors: Collection[Tensor], *, optimizer: bool) -> Folding:
    """Returns what makes a checkpoint right for software that multiplies by nothing but what the model itself does.

    Args:
        plan: that the model was trained with.
        tensors: the model's, with the parts of those that are fused.
        optimizer: whether the optimizer's state is kept as well.

    Raises:
        InputError: a multiplier cannot be folded exactly; names it.
    """
    if plan.stock_readout_ratio != 1.0:
        raise InputError(
            "the model itself multiplies its readout's input, beside the plan: that cannot be folded. Export it to an "
            "architecture that has such a multiplier itself."
        )
    found = folds(plan, tensors, carried=(), softmax_scale=plan.own_softmax_scale)
    return Folding(fingerprint=plan.fingerprint, folds=tuple(found), optimizer=optimizer)


def _same(one: Fold | None, other: Fold | None) -> bool:
    """Returns whether two folds are one, but for the last digits, which another release may compute otherwise."""
    if one is None or other is None:
        return False
    close = (math.isclose(a, b, rel_tol=1e-9) for a, b in ((one.factor, other.factor), (one.offset, other.offset)))
    return (one.tensor, one.rows) == (other.tensor, other.rows) and all(close)


def changed(
    tensor: torch.Tensor,
    todo: Sequence[Fold],
    *,
    order: int = 0,
    back: bool = False,
    first_row: int = 0,
) -> torch.Tensor:
    """Returns a tensor folded, or with its folds taken out, in its own type, computed at least in single precision.

    Args:
        tensor: a weight, or what an optimizer keeps of it; or some rows of it, one after the other.
        todo: its folds.
        order: how often the gradient is a factor of it, as `ORDERS` says.
        back: True to take them out.
        first_row: the number of its first row in the whole weight.

    Raises:
        InputError: its type, float16, is too narrow for what was finite before.
    """
    if not todo:
        return tensor
    found = tensor.to(torch.promote_types(tensor.dtype, torch.float32), copy=True)
    for each in reversed(todo) if back else todo:
        for part in [found] if each.rows is None else _within(found, each.rows, first_row):
            _change(part, each, order=order, back=back)
    made = found.to(tensor.dtype)
    if not made.isfinite().all() and tensor.isfinite().all():
        raise InputError(
            f"{todo[0].tensor}: has values that are too large for {str(tensor.dtype).removeprefix('torch.')} once "
            "multipliers are in them. Export it with --dtype float32."
        )
    return made


def _within(tensor: torch.Tensor, rows: Collection[range], first_row: int) -> list[torch.Tensor]:
    """Returns the parts of a tensor that are these rows of the whole."""
    clipped = ((max(each.start - first_row, 0), each.stop - first_row) for each in rows)
    return [tensor[start:stop] for start, stop in clipped if stop > start]


def _change(part: torch.Tensor, fold: Fold, *, order: int, back: bool) -> None:
    """Multiplies and shifts in place. One division takes back one multiplication: to the bit, where nothing is lost."""
    if order:
        factor = fold.factor**order
        part.mul_(factor) if back else part.div_(factor)
    elif back:
        part.sub_(fold.offset).div_(fold.factor)
    else:
        part.mul_(fold.factor).add_(fold.offset)


# ---- as it is stored -----------------------------------------------------------------------------------------------


class _Fold(Strict):
    tensor: str
    factor: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    offset: Annotated[float, Field(allow_inf_nan=False)] = 0.0
    rows: list[list[Annotated[int, Field(ge=0)]]] | None = None

    def fold(self) -> Fold:
        rows = None if self.rows is None else tuple(range(start, stop) for start, stop in self.rows)
        return Fold(self.tensor, self.factor, self.offset, rows)


class _Marker(Strict):
    version: Annotated[int, Field(ge=VERSION, le=VERSION)]
    fingerprint: str
    optimizer: bool
    folded: list[_Fold]
