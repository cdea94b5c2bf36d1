"""patches/: a few lines into a checkout of Megatron-LM and out again, and no file touched that is not the known one.

None of Megatron-LM's files is in this repository, so most of this runs on a checkout made here, with a list of what to
expect that fits it. The real ones are patched where MEGATRON_LM names them, separated by colons:

    MEGATRON_LM=~/Megatron-LM:~/Megatron-LM-0.16 make test PYTEST=tests/launch/test_patches.py
"""

import hashlib
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.processes import HANGS_AFTER_S

PATCHES = Path(__file__).parents[2] / "patches"
SERIES = ["0.16", "0.17", "0.18", "0.19"]
CHECKOUTS = [Path(name) for name in os.environ.get("MEGATRON_LM", "").split(os.pathsep) if name]


def expected() -> dict[str, tuple[str, int, str, str]]:
    """Series of Megatron-LM → tag, lines of the head, their sha256, the file's sha256."""
    rows = [line.split() for line in (PATCHES / "expected.txt").read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if row and row[0] not in {"#", "deepspeed"}]
    assert {row[2] for row in rows} == {"pretrain_gpt.py"}
    return {row[0]: (row[1], int(row[3]), row[4], row[5]) for row in rows}


def patch_of(series: str) -> Path:
    return PATCHES / f"megatron-lm-{expected()[series][0].removeprefix('core_v')}.patch"


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


# What the patches are


def test_there_is_a_patch_for_each_version() -> None:
    assert list(expected()) == SERIES
    assert sorted(PATCHES.glob("megatron-lm-*.patch")) == sorted(map(patch_of, SERIES))


@pytest.mark.parametrize("series", SERIES)
def test_a_patch_adds_a_handful_of_lines_and_carries_none_of_megatron(series: str) -> None:
    text = patch_of(series).read_text(encoding="utf-8").splitlines()
    assert text[:2] == ["--- a/pretrain_gpt.py", "+++ b/pretrain_gpt.py"]
    start = re.fullmatch(r"@@ -(\d+),0 \+(\d+),(\d+) @@", text[2])
    assert start is not None
    after, first, count = map(int, start.groups())
    added = text[3:]
    assert len(added) == count <= 5
    assert all(line.startswith("+") for line in added)
    assert [line[1:] for line in added if not line.startswith("+#") and line != "+"] == [
        "import mup_megatron.megatron  # noqa: F401"
    ]
    # The known lines reach from the first to the one after the place.
    assert (first, expected()[series][1]) == (after + 1, after + 1)


# The script, on a checkout made here


def put_version(checkout: Path, version: str) -> None:
    info = checkout / "megatron" / "core" / "package_info.py"
    info.parent.mkdir(parents=True, exist_ok=True)
    numbers = zip(("MAJOR", "MINOR", "PATCH"), version.split("."), strict=True)
    info.write_text("".join(f"{name} = {number}\n" for name, number in numbers) + "PRE_RELEASE = ''\n")


class Workplace:
    """A checkout made here, and the patches with a list of what to expect that fits it."""

    def __init__(self, folder: Path, series: str) -> None:
        _tag, head, _sum, _file = expected()[series]
        self.original = "".join(f"line_{number} = {number}\n" for number in range(1, head + 20))
        self.checkout = folder / "a checkout"
        put_version(self.checkout, f"{series}.1")
        self.file = self.checkout / "pretrain_gpt.py"
        self.file.write_text(self.original)
        self.patches = folder / "patches"
        shutil.copytree(PATCHES, self.patches)
        head_sum = sha256("".join(self.original.splitlines(keepends=True)[:head]))
        rows = [f"{series} {expected()[series][0]} pretrain_gpt.py {head} {head_sum} {sha256(self.original)}\n"]
        (self.patches / "expected.txt").write_text("# comment\n" + "".join(rows))
        self.patch = self.patches / patch_of(series).name
        self.head = head

    def apply(self, *options: str, limit: int | None = None) -> subprocess.CompletedProcess[str]:
        """Runs the script; `limit`: bytes that it may write into one file, as on a full disk."""
        preexec = None if limit is None else lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        return subprocess.run(
            [self.patches / "apply.sh", self.checkout, *options],
            capture_output=True, text=True, check=False, preexec_fn=preexec, timeout=HANGS_AFTER_S,
        )  # fmt: skip

    def files(self) -> set[str]:
        return {path.relative_to(self.checkout).as_posix() for path in self.checkout.rglob("*") if path.is_file()}


@pytest.fixture(params=SERIES)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Workplace:
    return Workplace(tmp_path, request.param)


@pytest.fixture
def one(tmp_path: Path) -> Workplace:
    return Workplace(tmp_path, "0.19")


def succeeds(done: subprocess.CompletedProcess[str], saying: str) -> None:
    assert (done.returncode, done.stderr) == (0, "")
    assert saying in done.stdout


def refuses(done: subprocess.CompletedProcess[str], saying: str) -> None:
    assert (done.returncode, done.stdout) == (2, "")
    assert re.search(saying, done.stderr)


def test_the_lines_go_in_and_out_again(place: Workplace) -> None:
    place.file.chmod(0o664)
    succeeds(place.apply(), "is added")
    lines = place.file.read_text().splitlines()
    added = [line[1:] for line in place.patch.read_text().splitlines()[3:]]
    at = place.head - 1
    assert lines[at : at + len(added)] == added
    assert lines[:at] + lines[at + len(added) :] == place.original.splitlines()
    assert place.file.stat().st_mode & 0o777 == 0o664
    succeeds(place.apply("--reverse"), "taken out")
    assert place.file.read_text() == place.original
    assert place.file.stat().st_mode & 0o777 == 0o664
    assert place.files() == {"pretrain_gpt.py", "megatron/core/package_info.py"}


def test_nothing_is_done_twice(one: Workplace) -> None:
    succeeds(one.apply("--reverse"), "nothing to do")
    assert one.file.read_text() == one.original
    one.apply()
    patched = one.file.read_text()
    assert patched != one.original
    succeeds(one.apply(), "nothing to do")
    assert one.file.read_text() == patched


def test_a_check_changes_nothing(one: Workplace) -> None:
    before = one.file.stat()
    succeeds(one.apply("--check"), "the patch fits")
    succeeds(one.apply("--check", "--reverse"), "nothing to do")
    assert one.file.stat().st_mtime_ns == before.st_mtime_ns
    one.apply()
    patched = one.file.read_text()
    succeeds(one.apply("--check"), "nothing to do")
    succeeds(one.apply("--check", "--reverse"), "can be taken out")
    assert one.file.read_text() == patched


def test_the_patched_script_imports_the_plug_in(one: Workplace) -> None:
    one.apply()
    program = "import runpy, sys; runpy.run_path(sys.argv[1]); print('mup_megatron.megatron' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program, one.file], capture_output=True, text=True, check=True,
                          cwd=PATCHES.parent)  # fmt: skip
    assert done.stdout == "True\n"


def test_changes_of_ones_own_further_down_stay(one: Workplace) -> None:
    changed = one.original + "my_own = 1\n"
    one.file.write_text(changed)
    succeeds(one.apply(), f"changed after line {one.head}")
    assert one.file.read_text().endswith("my_own = 1\n")
    succeeds(one.apply("--reverse"), "taken out")
    assert one.file.read_text() == changed


@pytest.mark.parametrize("line", [1, 20, 21])
def test_a_changed_line_around_the_place_is_refused(one: Workplace, line: int) -> None:
    lines = one.original.splitlines(keepends=True)
    lines[line - 1] = "another = 1\n"
    one.file.write_text("".join(lines))
    done = one.apply()
    refuses(done, f"its first {one.head} lines differ from those of core_v0.19.0. Nothing was changed")
    assert "import mup_megatron.megatron" in done.stderr  # what to put in by hand
    assert "mup_megatron.launch" in done.stderr  # or do without
    refuses(one.apply("--check"), "Nothing was changed")
    assert one.file.read_text() == "".join(lines)


@pytest.mark.parametrize("option", [(), ("--reverse",)])
def test_a_line_of_ones_own_that_does_the_same_is_left_alone(one: Workplace, option: tuple[str, ...]) -> None:
    one.file.write_text(one.original + "import mup_megatron.megatron\n")
    text = one.file.read_text()
    refuses(one.apply(*option), rf"imports mup_megatron in line {len(text.splitlines())}")
    assert one.file.read_text() == text


def test_lines_that_were_changed_since_are_not_taken_out(one: Workplace) -> None:
    one.apply()
    changed = one.file.read_text().replace("import mup_megatron.megatron", "import mup_megatron.megatron as mup")
    one.file.write_text(changed)
    refuses(one.apply("--reverse"), "is not what the patch expects")
    assert one.file.read_text() == changed


@pytest.mark.parametrize("version", ["0.15.3", "0.20.0", "1.19.0"])
def test_another_version_is_refused(one: Workplace, version: str) -> None:
    put_version(one.checkout, version)
    refuses(one.apply(), re.escape(f"is Megatron-LM {version}, and there are patches for 0.19"))
    assert one.file.read_text() == one.original


def test_what_is_no_checkout_is_refused(one: Workplace) -> None:
    (one.checkout / "megatron" / "core" / "package_info.py").unlink()
    refuses(one.apply(), "is no checkout of Megatron-LM")


def test_a_checkout_without_the_script_is_refused(one: Workplace) -> None:
    one.file.unlink()
    refuses(one.apply(), "has no pretrain_gpt.py")


def test_an_unknown_option_is_refused(one: Workplace) -> None:
    refuses(one.apply("--revert"), "unknown option --revert")
    assert one.file.read_text() == one.original


def test_a_full_disk_leaves_the_old_file(one: Workplace) -> None:
    # The copies still fit, the patched file, longer by its lines, does not.
    done = one.apply(limit=len(one.original))
    assert done.returncode == 2
    assert "Nothing was changed" in done.stderr
    assert one.file.read_text() == one.original
    assert one.files() == {"pretrain_gpt.py", "megatron/core/package_info.py"}


def test_the_new_file_takes_the_place_of_the_old_one_at_once(one: Workplace) -> None:
    # Never written in place: what still has the old file open, or linked, keeps all of it.
    link = one.checkout.parent / "link"
    link.hardlink_to(one.file)
    one.apply()
    assert link.read_text() == one.original != one.file.read_text()


def test_settings_of_a_repository_around_the_copies_do_not_matter(one: Workplace) -> None:
    subprocess.run(["git", "init", "-q", one.checkout.parent], check=True)
    subprocess.run(["git", "-C", one.checkout.parent, "config", "core.autocrlf", "true"], check=True)
    environment = os.environ | {"TMPDIR": str(one.checkout.parent)}
    subprocess.run([one.patches / "apply.sh", one.checkout], env=environment, check=True, capture_output=True)
    assert b"import mup_megatron.megatron" in one.file.read_bytes()
    assert b"\r" not in one.file.read_bytes()


# The real ones

if CHECKOUTS:

    @pytest.mark.parametrize("checkout", CHECKOUTS, ids=str)
    def test_a_real_checkout_is_patched_and_is_as_before(checkout: Path, tmp_path: Path) -> None:
        copy = tmp_path / "checkout"
        for name in ("pretrain_gpt.py", "megatron/core/package_info.py"):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(checkout / name, copy / name)
        original = (copy / "pretrain_gpt.py").read_bytes()
        done = subprocess.run([PATCHES / "apply.sh", copy], capture_output=True, text=True, check=False)
        succeeds(done, "is added")
        patched = (copy / "pretrain_gpt.py").read_text(encoding="utf-8")
        compile(patched, "pretrain_gpt.py", "exec")
        first_of_megatron = re.search(r"^(from|import) (megatron|gpt_builders|model_provider)", patched, re.MULTILINE)
        assert first_of_megatron is not None
        assert patched.index("import mup_megatron.megatron") < first_of_megatron.start()
        done = subprocess.run([PATCHES / "apply.sh", copy, "--reverse"], capture_output=True, text=True, check=False)
        succeeds(done, "taken out")
        assert (copy / "pretrain_gpt.py").read_bytes() == original
