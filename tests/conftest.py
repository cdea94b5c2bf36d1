"""What tests share: marks, a place for references, and why CI takes a skipped test for a failed one."""

import functools
import importlib.metadata
import os
import re
import sys
import time
from collections.abc import Generator
from pathlib import Path

import pytest
from hypothesis import settings

# No test depends on how fast the machine is.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

TESTS = Path(__file__).parent
ADAPTER_FOLDERS = {"theory", "architectures", "megatron", "training"}
_LONGEST_COMPILATION_S = 600
IN_CI = "MUP_MEGATRON_CI" in os.environ

# DeepSpeed looks for an accelerator when it is imported, and the CPU runtime of Megatron pretends that there is one.
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    of_adapters = functools.cache(_is_of_adapters)  # thousands of tests are in a few hundred files
    for item in items:
        if of_adapters(item.path):
            item.add_marker(pytest.mark.adapter)


def _is_of_adapters(path: Path) -> bool:
    return TESTS in path.parents and path.relative_to(TESTS).parts[0] in ADAPTER_FOLDERS


def pytest_configure() -> None:
    """Has extensions compiled quickly, and removes what a process left that was killed meanwhile: all others wait.

    What the tests compile is for them and their Python alone, and so lies in the checkout.
    """
    os.environ.setdefault("CXX", str(TESTS / "support" / "quick-c++"))
    own = TESTS.parent / "build" / "torch_extensions" / sys.implementation.cache_tag
    cache = os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(own))
    for lock in Path(cache).glob("**/lock"):
        if time.time() - lock.stat().st_mtime > _LONGEST_COMPILATION_S:
            lock.unlink(missing_ok=True)


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the checks of a file keep their references: what is right is measured once."""
    return tmp_path_factory.mktemp("references")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Generator[None, object, object]:
    """Ends what a test did to the path: the launcher puts a script's folder in its first place, as Python does."""
    before = sys.path.copy()
    try:
        return (yield)
    finally:
        sys.path[:] = before


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    _refuse_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _refuse_skip(report)
    return report


def _refuse_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    """In CI a test is skipped for want of a GPU, or of something that the installed megatron-core does not have.

    Every other skip means that CI lacks an interpreter or a package, and so did not test what it claims to test. An
    expected failure also comes as a "skipped" report; its reason is no triple.
    """
    if not IN_CI or not report.skipped or hasattr(report, "wasxfail") or not isinstance(report.longrepr, tuple):
        return
    path, line, reason = report.longrepr
    if "needs a GPU" in reason or _installed_megatron_core() in re.findall(r"megatron-core (\d+\.\d+)", reason):
        return
    report.outcome = "failed"
    report.longrepr = f"{path}:{line}: skipped in CI, where everything that is needed must be present. {reason}"


def _installed_megatron_core() -> str:
    return ".".join(importlib.metadata.version("megatron-core").split(".")[:2])
