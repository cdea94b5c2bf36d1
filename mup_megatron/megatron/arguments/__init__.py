"""Model files and recipes ↔ Megatron-LM's arguments: as flags, as parsed values, and in launch scripts. Pure.

`native` makes a recipe of a line with Megatron-Core's own μP. Needs neither Megatron nor torch. The flags are those of
core_v0.16.1 to core_v0.19.0, which agree on all of them. Not the place where arguments meet a run: that is
`megatron/lm/`.
"""

from mup_megatron.megatron.arguments.convert import (
    flags,
    model_from_flags,
    model_from_values,
    not_in_model_file,
    values_from_flags,
)
from mup_megatron.megatron.arguments.launch_script import words_of_launch, words_of_script

__all__ = [
    "flags",
    "model_from_flags",
    "model_from_values",
    "not_in_model_file",
    "values_from_flags",
    "words_of_launch",
    "words_of_script",
]
