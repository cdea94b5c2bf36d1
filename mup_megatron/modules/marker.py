"""What the configuration of a saved model says of the plan that it was trained with.

Multipliers and the scale of attention live in the process. A model that is loaded without them is another function, so
its configuration says that it has them. Hugging Face's configurations keep keys that they do not know.
"""

from collections.abc import Mapping
from typing import Any

import torch

from mup_megatron.errors import InputError
from mup_megatron.modules.names import unwrapped

KEY = "mup_megatron"


def marker(fingerprint: str, softmax_scale: float | None, multipliers: Mapping[str, float]) -> dict[str, Any]:
    """What is written.

    Args:
        fingerprint: of the recipe.
        softmax_scale: of attention; None where it keeps the library's.
        multipliers: of weights, by their names, where they are not 1.
    """
    return {"fingerprint": fingerprint, "softmax_scale": softmax_scale, "multipliers": dict(multipliers)}


def marked(model: torch.nn.Module) -> str | None:
    """The fingerprint of the recipe that a loaded model was trained with; None where its configuration names none.

    Raises:
        InputError: what stands there was not written by this package.
    """
    found = getattr(getattr(unwrapped(model), "config", None), KEY, None)
    if found is None:
        return None
    fingerprint = found.get("fingerprint") if isinstance(found, Mapping) else None
    if not isinstance(fingerprint, str):
        raise InputError(f"{KEY} in the model's configuration has no fingerprint. Restore it, or take the key out.")
    return fingerprint
