"""Initial weights against the plan: constants exactly, draws by their statistics. Reads, changes nothing."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import parallel_state

from mup_megatron.megatron.guard.problems import Problem, number
from mup_megatron.megatron.names import named_parameters
from mup_megatron.theory import Plan, PlanEntry

SURPRISE = 34.0
"""A right draw is taken for a wrong one with probability e⁻³⁴, 2·10⁻¹⁵, per tensor and rank. GPT-3 175B has 3·10³ drawn
shards, so one in 10¹¹ of its starts is stopped without reason. In units of σ of a normal variable it is 8.2."""

_PIECE = {"cpu": 1 << 16, "cuda": 1 << 24}
"""Elements that are looked at together: what stays in a processor's cache, or 128 MiB beside a model on a full GPU."""


def weight_problems(chunks: Sequence[torch.nn.Module], plan: Plan) -> list[Problem]:
    """Where this rank's initial weights are not the plan's; for a model that was just drawn.

    A drawn shard of n elements has the second moment n·σ² and the sum 0 within sampling error: the first is χ² with n
    degrees of freedom (bounds of Laurent and Massart, right also where n is small), the second normal. Both are
    widened by the rounding of the stored type. Rows that only pad the vocabulary do not count.
    """
    found = []
    for name, parameter in named_parameters(chunks, tied=plan.tied):
        if parameter.is_meta:
            continue
        entry = plan[name]
        values = _without_padding(parameter.detach(), parameter, entry)
        if values.numel():
            found += _constant(values, entry) if entry.init_std is None else _drawn(values, entry, entry.init_std)
    return found


def _without_padding(values: torch.Tensor, parameter: torch.nn.Parameter, entry: PlanEntry) -> torch.Tensor:
    if entry.padded_to is None:
        return values
    sharded = getattr(parameter, "tensor_model_parallel", False)
    first = parallel_state.get_tensor_model_parallel_rank() * len(values) if sharded else 0
    return values[: max(0, entry.shape[0] - first)]


def _constant(values: torch.Tensor, entry: PlanEntry) -> list[Problem]:
    assert entry.init_value is not None
    # Through float32, as torch fills low precision.
    stored = torch.tensor(entry.init_value, dtype=torch.float32).to(values.dtype).item()
    wrong = values[values != stored]
    if not wrong.numel():
        return []
    cause = "Something changed it after the plan was applied: a custom layer, a hook, or weights that were loaded."
    if (
        entry.folded != 1.0
        and (wrong == entry.fold_offset + (entry.init_value - entry.fold_offset) / entry.folded).all()
    ):
        cause = "A multiplier is folded into it, and it was reset afterwards. Let the plan be applied last."
    return [Problem(entry.name, "initial value", number(stored), number(wrong[0].item()), cause)]


def _drawn(values: torch.Tensor, entry: PlanEntry, std: float) -> list[Problem]:
    n = values.numel()
    total, squares = _sums(values)
    if std == 0.0:
        cause = "The recipe starts it at zero. Something drew it after the plan was applied."
        return [Problem(entry.name, "initial std", "0", number(math.sqrt(squares / n)), cause)] if squares else []
    rounding = _rounding(values.dtype)
    lowest = math.sqrt(max(0.0, 1.0 - 2.0 * math.sqrt(SURPRISE / n))) * (1.0 - rounding)
    highest = math.sqrt(1.0 + 2.0 * math.sqrt(SURPRISE / n) + 2.0 * SURPRISE / n) * (1.0 + rounding)
    found = math.sqrt(squares / n)
    # Written so that NaN is a problem.
    if not lowest * std <= found <= highest * std:
        return [Problem(entry.name, "initial std", number(std), number(found), _std_cause(entry, std, found))]
    largest = std * (math.sqrt(2.0 * SURPRISE / n) + rounding * rounding)
    if not abs(total / n) <= largest:
        cause = "The draw is not centred: drop the custom init method; the recipe says how weights start."
        return [Problem(entry.name, "initial mean", "0", number(total / n), cause)]
    return []


def _std_cause(entry: PlanEntry, std: float, found: float) -> str:
    unscaled = std * math.sqrt(entry.width_ratio)
    if unscaled != std and math.isclose(found, unscaled, rel_tol=0.1):
        return (
            f"{number(unscaled)} is what it has without μP: the plan was not applied to it, or it was drawn again "
            "afterwards. Apply the plan last, after every other hook that touches the weights."
        )
    return (
        "It was drawn by another init method (--init-method-xavier-uniform, a custom layer), or changed after the plan "
        "was applied. Use Megatron's normal initialiser; the recipe says what the std is."
    )


def _sums(values: torch.Tensor) -> tuple[float, float]:
    """(sum, sum of squares), in double precision."""
    total = squares = 0.0
    for piece in values.reshape(-1).split(_PIECE[values.device.type]):
        exact = piece.double()
        total += exact.sum().item()
        squares += exact.square().sum().item()
    return total, squares


def _rounding(dtype: Any) -> float:
    """The relative error of one rounding to a type."""
    return torch.finfo(dtype).eps / 2
