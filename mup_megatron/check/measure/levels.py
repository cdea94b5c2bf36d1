"""The levels of a check: how long each trains, on how many widths and seeds, and why."""

from enum import StrEnum

from mup_megatron.check.measure.measurements import RunProtocol
from mup_megatron.theory import Rule


class Level(StrEnum):
    """The extent of a check."""

    QUICK = "quick"
    """Coordinates, gradients and updates."""
    STANDARD = "standard"
    """Late steps and wider-is-better as well."""
    FULL = "full"
    """Transfer of the learning rate as well."""


WIDTHS = 4
"""Over a range of 8: a power of width that is wrong by ½ changes a measurement by a factor of 2.8."""
SEEDS = 3
REFERENCE_SEEDS = 4
"""One more than the subject's: they are cached, and every comparison has their noise in it."""
FIRST_REFERENCE_SEED = 10_000
CONTROL_SEEDS = 2

EARLY = RunProtocol(steps=8, recorded=(3, 5, 8))
"""A warm-up of two steps, of which the first has no learning rate yet; the peak; a decay to the floor."""
LATE = RunProtocol(steps=48, recorded=(16, 32, 48), spectral=False)
"""Long enough for weight decay to have acted and for the loss to tell widths apart."""
TRANSFER_RATES = 7
TRANSFER_SEEDS = 2


def run_seed(seed: int, width_index: int) -> int:
    """Returns the seed of a run's weights and data. No two widths share theirs, so that their noise is independent."""
    return 100 * seed + width_index


def correct_seeds(rule: Rule) -> int:
    """Returns how many runs the reference has at each width, or the control."""
    return REFERENCE_SEEDS if rule is Rule.MUP else CONTROL_SEEDS
