"""The one place for what differs between Megatron-Core releases. Not a compatibility layer for Megatron as a whole.

Imports nothing of Megatron at import time, so that the CPU runtime can ask before the first `import megatron`.
"""

import contextlib
import importlib.metadata
import importlib.util
import math
import platform
import queue
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mup_megatron import __version__
from mup_megatron.errors import InputError

OLDEST_SUPPORTED = (0, 16)
"""The first Megatron-Core release (major, minor) whose optimizer takes `config_overrides`."""
NEWEST_TESTED = (0, 19)
"""The last one that this package was tested with."""


def core_version() -> tuple[int, int, int]:
    """Returns the Megatron-Core release that is imported here, as (major, minor, patch), read without importing it.

    Read from its sources, so that a checkout on the path counts as well as a wheel, and before one.
    Raises InputError if there is none.
    """
    spec = importlib.util.find_spec("megatron.core") if importlib.util.find_spec("megatron") is not None else None
    if spec is None or spec.origin is None:
        raise InputError("Megatron-Core is not installed: run `pip install 'mup-megatron[megatron]'`.")
    source = Path(spec.origin).with_name("package_info.py").read_text(encoding="utf-8")
    numbers = dict(re.findall(r"^(MAJOR|MINOR|PATCH) = (\d+)$", source, flags=re.MULTILINE))
    assert len(numbers) == 3, spec.origin
    return int(numbers["MAJOR"]), int(numbers["MINOR"]), int(numbers["PATCH"])


def known_release() -> tuple[int, int] | None:
    """Returns the release (major, minor) that is imported here; None without Megatron-Core."""
    with contextlib.suppress(InputError):
        return core_version()[:2]
    return None


def core_version_text() -> str:
    """`core_version` as people write it, "0.19.0". Raises InputError if there is no Megatron-Core."""
    return ".".join(map(str, core_version()))


def installed() -> dict[str, str]:
    """Returns what a result was obtained with: the version of this package, of Python, and of what computes; by name.

    Packages that are not installed are left out.
    """
    found = {"mup-megatron": __version__, "python": platform.python_version()}
    for name in ("torch", "optuna"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    with contextlib.suppress(InputError):
        found["megatron-core"] = core_version_text()
    return found


def require_supported_core() -> None:
    """Raise InputError if Megatron-Core is missing or older than what this package works with."""
    if core_version()[:2] < OLDEST_SUPPORTED:
        oldest = ".".join(map(str, OLDEST_SUPPORTED))
        raise InputError(f"Megatron-Core {core_version_text()} is too old: install megatron-core>={oldest}.")


def range_remark() -> str | None:
    """A sentence for people where the Megatron-Core here is none that this package was tested with; else None."""
    try:
        found = core_version()[:2]
    except InputError:
        return None
    if OLDEST_SUPPORTED <= found <= NEWEST_TESTED:
        return None
    oldest, newest = (".".join(map(str, version)) for version in (OLDEST_SUPPORTED, NEWEST_TESTED))
    return f"Megatron-Core {core_version_text()} is outside the tested range {oldest} to {newest}."


def native_mup(config: Any) -> bool:
    """Returns whether Megatron's own μP is on in a TransformerConfig. The field exists since 0.17."""
    return bool(getattr(config, "use_mup", False))


def fsdp_problem(values: Any) -> str | None:
    """Returns why a run cannot have its weights in FSDP's pieces, from Megatron's arguments; None where it can.

    Older releases wrap the model before a plan can be applied, and Megatron-FSDP computes with copies that it misses.
    """
    release = known_release()
    flag = next((name for name in ("use_torch_fsdp2", "use_megatron_fsdp") if getattr(values, name, False)), None)
    if flag is None or release is None or release >= _FSDP_FROM:
        return None
    here, first = (".".join(map(str, numbers)) for numbers in (release, _FSDP_FROM))
    name = flag.replace("_", "-")
    return (
        f"--{name}: the plan does not reach these weights in Megatron-Core {here}. Take {first} or later, or drop it."
    )


_FSDP_FROM = (0, 19)


def optimizer_package_problem(name: str) -> str | None:
    """Returns why Megatron-Core cannot build one of the optimizers that it has from another package; None if it can."""
    if importlib.util.find_spec("emerging_optimizers") is not None:
        return None
    return (
        f"parametrization.optimizer: the recipe's is {name}, which Megatron-Core has from the package "
        "emerging-optimizers, and that is not installed. Run `pip install 'mup-megatron[muon]'`, with Python 3.12 or "
        "later."
    )


def distinct_lr_mults(overrides: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Overrides in which every group that has to be told apart has an `lr_mult` of its own.

    A checkpoint finds a group again by its `wd_mult` and `lr_mult` (0.16 to 0.18), later also by `max_lr` and `min_lr`,
    but never by `eps`: groups that differ in what is not compared would load each other's state. Nothing else has
    read `lr_mult` since 0.16. Where two groups collide, the later one's is moved to the next floating-point number.
    """
    taken: dict[tuple[float, float], tuple[tuple[str, Any], ...]] = {}
    result = {}
    for name, override in overrides.items():
        items = tuple(sorted(override.items()))
        wd_mult, lr_mult = override.get("wd_mult", 1.0), override.get("lr_mult", 1.0)
        while taken.setdefault((wd_mult, lr_mult), items) != items:
            lr_mult = math.nextafter(lr_mult, math.inf)
        result[name] = dict(override) if lr_mult == override.get("lr_mult", 1.0) else {**override, "lr_mult": lr_mult}
    return result


@contextlib.contextmanager
def checkpoint_results_in_this_process() -> Iterator[None]:
    """Lets Megatron's writer of checkpoints pass its results on within this process, where it writes as well.

    It would start a server for them: a second Python that imports the user's script and outlives a killed run. The
    queue is a private name of `filesystem_async`, the same from 0.16 to 0.19.
    """
    filesystem_async: Any = importlib.import_module("megatron.core.dist_checkpointing.strategies.filesystem_async")
    before = filesystem_async._results_queue
    filesystem_async._results_queue = queue.Queue() if before is None else before
    try:
        yield
    finally:
        filesystem_async._results_queue = before


def let_sgd_resume(optimizer: Any) -> None:
    """Gives SGD the `init_state_fn` that Megatron calls before it loads, to know what there is to load.

    Megatron sets one for each of its other optimizers, and none for SGD, up to 0.19.
    """
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if part.init_state_fn is None:
            part.init_state_fn = _zero_momenta


def _zero_momenta(optimizer: Any, config: Any = None) -> None:
    import torch

    for group in optimizer.param_groups:
        for parameter in group["params"] if group["momentum"] else ():
            optimizer.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))


_RENAMED = {".mixer.conv1d_weight": ".mixer.conv1d.weight", ".mixer.conv1d_bias": ".mixer.conv1d.bias"}
"""End of a parameter's name in 0.19 → in releases before, and in checkpoints of all."""


def parameter_name(name: str) -> str:
    """Returns a parameter's name as every release has it in checkpoints."""
    for now, ever in _RENAMED.items():
        if name.endswith(now):
            return name.removesuffix(now) + ever
    return name


@dataclass(frozen=True, slots=True)
class HybridClasses:
    """Megatron-Core's classes of a hybrid model, and what its constructor calls them."""

    model: Any
    stack: Any
    submodules: Any
    spec_key: str
    pattern_key: str
    builds_stages: bool
    """Whether the model takes a virtual pipeline stage, and `|` in its pattern."""
    specs: str
    """The module that has the stock spec."""
    submodules_key: str | None
    """What a layer of multi-token prediction calls the kinds of layers within; None where a pattern has none."""
    latent: bool
    """Whether latent attention is one of these kinds."""

    def stock_spec(self) -> Any:
        """Returns the spec that ships, of Transformer Engine's layers."""
        specs = importlib.import_module(self.specs)
        return getattr(specs, "hybrid_stack_spec", None) or specs.mamba_stack_spec


def hybrid_classes() -> HybridClasses:
    """Returns the hybrid model of this release: `HybridModel`, and `MambaModel` before 0.18. Imports Megatron."""
    version = core_version()[:2]
    if version >= (0, 18):
        model: Any = importlib.import_module("megatron.core.models.hybrid.hybrid_model").HybridModel
        block: Any = importlib.import_module("megatron.core.models.hybrid.hybrid_block")
        return HybridClasses(
            model,
            block.HybridStack,
            block.HybridStackSubmodules,
            spec_key="hybrid_stack_spec",
            pattern_key="hybrid_layer_pattern",
            builds_stages=True,
            specs="megatron.core.models.hybrid.hybrid_layer_specs",
            submodules_key="hybrid_submodules",
            latent=version >= (0, 19),
        )
    model = importlib.import_module("megatron.core.models.mamba.mamba_model").MambaModel
    block = importlib.import_module("megatron.core.ssm.mamba_block")
    newer = version == (0, 17)
    return HybridClasses(
        model,
        block.MambaStack,
        block.MambaStackSubmodules,
        spec_key="mamba_stack_spec",
        pattern_key="hybrid_layer_pattern" if newer else "hybrid_override_pattern",
        builds_stages=newer,
        specs="megatron.core.models.mamba.mamba_layer_specs",
        submodules_key="mamba_submodules" if newer else None,
        latent=False,
    )
