"""Learning-rate schedulers under a plan: which keep the ratios between groups, and how a JSON entry comes to do so.

A plan gives each group of an optimizer a peak. A schedule keeps the ratios where every group's learning rate is, at
every step, its peak times one factor that all groups share: then the whole model follows the schedule that was tuned.
What multiplies the groups' own learning rates does. A number in the unit of a learning rate, written once for all
groups (a maximum, a floor, the start of a warm-up), does not, unless it is 0. `table.py` says which parameters these
are.

    JSON entry                        `rewritten`: such a number becomes a list, one value for each group in the plan's
                                      ratio, or is refused where a list is impossible
    a scheduler that a script made    `require_proportional`: looked into if its class is known, else tried on a copy
    every step of the run             `RatioWatch`

What a number written once means: it was meant for the recipe's learning rate, and each group gets its share. So a
maximum has to be the recipe's lr; another one is refused, for which of the two is meant is not ours to choose. Nor is
the schedule's shape: steps, factors and ends are the entry's, except that a recipe's min_lr above 0 is the floor of
WarmupCosineLR, the only scheduler of DeepSpeed's with one (a min_lr of 0, the default, says nothing).

Nothing here looks at a model or an engine. Importing it imports DeepSpeed.
"""

from mup_megatron.deepspeed.schedulers.json_entry import for_one_group, made, rewritten
from mup_megatron.deepspeed.schedulers.objects import held_learning_rates, require_proportional, restore_learning_rates
from mup_megatron.deepspeed.schedulers.ratios import RatioWatch
from mup_megatron.deepspeed.schedulers.table import drives_betas

__all__ = [
    "RatioWatch",
    "drives_betas",
    "for_one_group",
    "held_learning_rates",
    "made",
    "require_proportional",
    "restore_learning_rates",
    "rewritten",
]
