"""The one place for which DeepSpeed releases are supported and what differs between them."""

import importlib.metadata

from mup_megatron.errors import InputError

OLDEST = (0, 19)
"""Before 0.19 the engine's configuration and several schedulers work otherwise (DeepSpeed #7969, #8171, #8201)."""


def require_supported(installed: str | None = None) -> None:
    """Raises InputError for a DeepSpeed that is older than supported."""
    version = importlib.metadata.version("deepspeed") if installed is None else installed
    if tuple(int(part) for part in version.split("+")[0].split(".")[:2]) < OLDEST:
        raise InputError(
            f'"mup": DeepSpeed {version} is older than supported. Install {".".join(map(str, OLDEST))} or newer.'
        )
