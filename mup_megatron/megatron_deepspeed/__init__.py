"""The adapter to the fork Megatron-DeepSpeed: what `patches/megatron-deepspeed.patch` calls in it. It holds no theory.

Importing it needs neither DeepSpeed nor Megatron, and touches nothing of the fork. Without `--mup-recipe` every
function here gives back what it was given, but for one: a checkpoint of a recipe is not loaded without it. Nothing here
has been run with the fork itself (docs/megatron-deepspeed.md).
"""

from mup_megatron.megatron_deepspeed.arguments import model_from_fork_args
from mup_megatron.megatron_deepspeed.names import core_names
from mup_megatron.megatron_deepspeed.run import (
    add_arguments,
    apply_to_model,
    param_groups,
    require_same_recipe,
    scale_head_input,
)

__all__ = [
    "add_arguments",
    "apply_to_model",
    "core_names",
    "model_from_fork_args",
    "param_groups",
    "require_same_recipe",
    "scale_head_input",
]
