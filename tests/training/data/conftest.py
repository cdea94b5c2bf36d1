from pathlib import Path

import pytest
from small_data import make_data

from mup_megatron.megatron import cpu
from mup_megatron.training.data.prefix import DataMeta, copy_data

# The data need no such runtime; other tests of the same process do, and must not find Megatron imported without it.
cpu.enable()


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, DataMeta]:
    """Bytes of twelve small files. Not to be changed: copy it first."""
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def copied(data: tuple[Path, DataMeta], tmp_path: Path) -> Path:
    copy_data(data[0], tmp_path / "v1.0")
    return tmp_path / "v1.0"
