"""Files are written whole or not at all."""

import os
import stat
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from mup_megatron.errors import InputError
from mup_megatron.files import LARGEST, read_text, write_atomically

ON_A_FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from mup_megatron.errors import InputError
from mup_megatron.files import write_atomically
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write beyond the limit fails, as on a full disk
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
try:
    write_atomically(Path(sys.argv[1]), "new" * 100_000)
except InputError as error:
    print(error)
    raise SystemExit(2)
"""


def _write_with_room_for(limit: int, path: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", ON_A_FULL_DISK, str(path), str(limit)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    environment.pop("COVERAGE_PROCESS_CONFIG", None)  # `make coverage` would write more than there is room for
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.recipe.yaml"
    path.write_text("old")
    run = _write_with_room_for(1000, path)
    assert (run.returncode, run.stderr) == (2, "")
    assert run.stdout == (
        f"{path}: cannot be written (File too large); what was there before is unchanged. "
        "Free some space or choose another place.\n"
    )
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path], "nothing half written is left behind"
    # With room, the same write succeeds.
    assert _write_with_room_for(1_000_000, path).returncode == 0
    assert path.read_text() == "new" * 100_000


def test_text_and_bytes_and_new_folders(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "file"
    write_atomically(path, "é")
    assert path.read_bytes() == "é".encode()
    write_atomically(path, b"\xff")
    assert path.read_bytes() == b"\xff"
    assert list(path.parent.iterdir()) == [path]


def test_files_get_the_permissions_of_ordinary_ones(tmp_path: Path) -> None:
    ordinary, ours = tmp_path / "ordinary", tmp_path / "ours"
    before = os.umask(0o027)
    try:
        ordinary.write_text("")
        write_atomically(ours, "")
    finally:
        os.umask(before)
    assert stat.S_IMODE(ours.stat().st_mode) == stat.S_IMODE(ordinary.stat().st_mode) == 0o640


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("old")
    with pytest.raises(InputError, match=r"file/a\.yaml: cannot be written \((Not a directory|File exists)\)"):
        write_atomically(in_the_way / "a.yaml", "new")
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(InputError, match=r"folder: cannot be written \(Is a directory\)"):
        write_atomically(folder, "new")
    assert sorted(tmp_path.iterdir()) == [in_the_way, folder]
    assert in_the_way.read_text() == "old"


def test_a_text_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    with path.open("wb") as stream:
        stream.truncate(LARGEST + 1)
    with pytest.raises(InputError, match=r"a\.yaml: larger than 16 MiB\. Check the path\."):
        read_text(path)


REMEDY = "Make it again."


def test_what_the_package_wrote_may_be_of_any_size_and_has_a_remedy_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    with pytest.raises(InputError, match=rf"a\.csv: no such file\. {REMEDY}$"):
        read_text(path, remedy=REMEDY)
    path.write_bytes(b"a" * (LARGEST + 1))
    assert len(read_text(path, remedy=REMEDY)) == LARGEST + 1
    path.write_bytes(b"\xff")
    with pytest.raises(InputError, match=rf"a\.csv: not UTF-8 text \(byte 0\)\. {REMEDY}$"):
        read_text(path, remedy=REMEDY)


@pytest.mark.parametrize("read", [read_text, partial(read_text, remedy=REMEDY)], ids=["written by people", "by us"])
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_what_is_no_ordinary_file_is_not_waited_for(tmp_path: Path, read: Callable[[Path], str], kind: str) -> None:
    path = tmp_path / "a.yaml"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/null")
    with pytest.raises(InputError, match=r"a\.yaml: no ordinary file, but a pipe or a device"):
        read(path)
