"""The one place for which DeepSpeed releases are supported and what differs between them."""

import importlib.metadata
import re
from collections.abc import Sequence

from mup_megatron.errors import InputError

SUPPORTED = (0, 19)
"""Before, the engine's configuration and several schedulers work otherwise (DeepSpeed #7969, #8171, #8201); what comes
after is not known."""


def require_supported(installed: str | None = None) -> None:
    """Raises InputError for another release of DeepSpeed."""
    version = importlib.metadata.version("deepspeed") if installed is None else installed
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None or (int(numbers[1]), int(numbers[2])) != SUPPORTED:
        raise InputError(f'"mup": DeepSpeed {version} is not supported. Install {".".join(map(str, SUPPORTED))}.')


def require_complete(missing: Sequence[str]) -> None:
    """Raises InputError if the plug-in could not take all its places.

    Args:
        missing: full names of methods that the installed packages do not have.
    """
    if missing:
        packages = sorted({name.partition(".")[0] for name in missing})
        installed = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in packages)
        raise InputError(
            f'"mup": {installed} has no {", ".join(missing)}, where the plug-in stands. Install the releases that '
            "mup-megatron[deepspeed,hf] asks for."
        )
