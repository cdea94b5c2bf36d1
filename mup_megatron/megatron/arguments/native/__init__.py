"""A launch line with Megatron-Core's own μP (`--use-mup`) → a recipe, and where the two differ on this very model.

`formulas` has what native μP does, which is in docs/native-mup.md and checked against live models in
tests/megatron/test_native_recipe.py; `conversion` makes the recipe, `schedule` its schedule, and `differences` tells
what no recipe says. Works on flags and shapes; needs no Megatron.
"""

from mup_megatron.megatron.arguments.native.conversion import NativeRecipe, recipe_from_native
from mup_megatron.megatron.arguments.native.differences import Difference
from mup_megatron.megatron.arguments.native.formulas import Native

__all__ = ["Difference", "Native", "NativeRecipe", "recipe_from_native"]
