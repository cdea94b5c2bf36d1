"""Initial weights against the plan: constants exactly, draws by their statistics. Reads, changes nothing."""

import math

import torch

from mup_megatron.live.problems import Problem, number
from mup_megatron.theory import PlanEntry

SURPRISE = 34.0
"""A right draw is taken for a wrong one with probability e⁻³⁴, 2·10⁻¹⁵, per tensor and rank. GPT-3 175B has 3·10³ drawn
shards, so one in 10¹¹ of its starts is stopped without reason. In units of σ of a normal variable it is 8.2."""

_PIECE = {"cpu": 1 << 16, "cuda": 1 << 24}
"""Elements that are looked at together: what stays in a processor's cache, or 128 MiB beside a model on a full GPU."""


def is_drawn_with(rms: float, std: float, n: int, *, rounding: float) -> bool:
    """Returns whether n values of this root mean square can be a draw of N(0, std²), within a relative error.

    n·(rms/std)² is χ² with n degrees of freedom, of which values on the far side of n·t have a probability of at most
    exp(-n·(t - 1 - ln t)/2) (Chernoff's bound, right also where n is small). NaN is no draw.
    """
    if not math.isfinite(rms):
        return False
    # The nearest to 1 that the ratio can have been before values were rounded.
    lowest, highest = (rms / std * (1.0 - rounding)) ** 2, (rms / std * (1.0 + rounding)) ** 2
    t = min(max(lowest, 1.0), highest)
    return t > 0.0 and n / 2.0 * (t - 1.0 - math.log(t)) <= SURPRISE


def weight_problems(values: torch.Tensor, entry: PlanEntry) -> list[Problem]:
    """Returns why a parameter, or a rank's shard of it, does not start as the plan says; for one just drawn."""
    if not values.numel() or (entry.init_std is None and entry.init_value is None):
        return []  # nothing, or a start of the library's own
    return _constant(values, entry) if entry.init_std is None else _drawn(values, entry, entry.init_std)


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
    found = math.sqrt(squares / n)
    if std == 0.0:
        cause = "The recipe starts it at zero. Something drew it after the plan was applied."
        return [Problem(entry.name, "initial std", "0", number(found), cause)] if squares else []
    rounding = torch.finfo(values.dtype).eps / 2
    if not is_drawn_with(found, std, n, rounding=rounding):
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
        "It was drawn by another init method (Xavier's, a custom layer's), or changed after the plan was applied. Draw "
        "it from a normal distribution; the recipe says what the std is."
    )


def _sums(values: torch.Tensor) -> tuple[float, float]:
    """(sum, sum of squares), in double precision."""
    total = squares = 0.0
    for piece in values.reshape(-1).split(_PIECE.get(values.device.type, _PIECE["cpu"])):
        exact = piece.double()
        total += exact.sum().item()
        squares += exact.square().sum().item()
    return total, squares
