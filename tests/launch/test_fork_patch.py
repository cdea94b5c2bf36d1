"""patches/megatron-deepspeed.patch: a few lines into five files of the fork, into all of them or none, and out again.

As in test_patches.py, this runs on a checkout made here. A real one is patched where MEGATRON_DEEPSPEED names it:

    MEGATRON_DEEPSPEED=~/Megatron-DeepSpeed make test PYTEST=tests/launch/test_fork_patch.py
"""

import ast
import hashlib
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from support.processes import HANGS_AFTER_S

from mup_megatron import megatron_deepspeed

PATCHES = Path(__file__).parents[2] / "patches"
PATCH = PATCHES / "megatron-deepspeed.patch"
CHECKOUT = os.environ.get("MEGATRON_DEEPSPEED")


def expected() -> dict[str, tuple[int, str, str]]:
    """File → lines of the head, their sha256, the file's sha256."""
    rows = [line.split() for line in (PATCHES / "expected.txt").read_text(encoding="utf-8").splitlines()]
    return {row[2]: (int(row[3]), row[4], row[5]) for row in rows if row and row[0] == "deepspeed"}


def parts() -> dict[str, tuple[int, list[str]]]:
    """File → the line after which the patch puts lines into it, and these lines."""
    found = re.findall(
        r"^--- a/(\S+)\n\+\+\+ b/\1\n@@ -(\d+),0 \+\d+,(\d+) @@\n((?:\+.*\n)+)", PATCH.read_text(), re.MULTILINE
    )
    for _, _, count, text in found:
        assert int(count) == text.count("\n")
    return {name: (int(after), [line[1:] for line in text.splitlines()]) for name, after, _, text in found}


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


# What the patch is


def test_the_patch_holds_added_lines_only_and_has_a_known_place_in_each_file() -> None:
    assert list(parts()) == list(expected())
    others = [line for line in PATCH.read_text().splitlines() if not line.startswith("+")]
    assert len(others) == 2 * len(parts())  # where they go
    for name, (after, lines) in parts().items():
        assert expected()[name][0] == after + 1
        assert len(lines) <= 4


@pytest.mark.parametrize("name", parts())
def test_each_file_calls_one_function_of_the_plug_in_that_exists(name: str) -> None:
    lines = [line for line in parts()[name][1] if line and not line.lstrip().startswith("#")]
    assert lines[0] == "    from mup_megatron import megatron_deepspeed"
    (call,) = [node for node in ast.walk(ast.parse(lines[1].strip())) if isinstance(node, ast.Call)]
    assert isinstance(call.func, ast.Attribute)
    function = getattr(megatron_deepspeed, call.func.attr)
    assert function.__code__.co_argcount == len(call.args)
    # What a function gives back takes the place of what it was given.
    assert (" = " in lines[1]) == (function.__annotations__["return"] is not None)


# The script, on a checkout made here


class Workplace:
    """A checkout made here, and the patches with a list of what to expect that fits it."""

    def __init__(self, folder: Path) -> None:
        self.checkout = folder / "a checkout"
        self.patches = folder / "patches"
        shutil.copytree(PATCHES, self.patches)
        self.originals: dict[str, str] = {}
        rows = []
        for name, (head, _, _) in expected().items():
            first = "import deepspeed\n" if name == "megatron/arguments.py" else ""
            text = first + "".join(f"{name.count('/')}_{number}\n" for number in range(head + 20))
            path = self.checkout / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            self.originals[name] = text
            rows.append(
                f"deepspeed 4efb479d {name} {head} {sha256(''.join(text.splitlines(True)[:head]))} {sha256(text)}"
            )
        (self.patches / "expected.txt").write_text("\n".join(rows) + "\n")
        info = self.checkout / "megatron" / "core" / "package_info.py"
        info.parent.mkdir()
        info.write_text("MAJOR = 0\nMINOR = 2\nPATCH = 0\n")

    def apply(self, *options: str, path: str = os.environ["PATH"]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.patches / "apply.sh", self.checkout, *options],
            capture_output=True, text=True, check=False, timeout=HANGS_AFTER_S, env=os.environ | {"PATH": path},
        )  # fmt: skip

    def texts(self) -> dict[str, str]:
        """What is in the checkout, but for the version."""
        files = [path for path in self.checkout.rglob("*") if path.is_file() and path.name != "package_info.py"]
        return {path.relative_to(self.checkout).as_posix(): path.read_text() for path in files}

    def patched(self) -> dict[str, str]:
        """What is to be in it with the patch."""
        found = {}
        for name, (after, added) in parts().items():
            lines = self.originals[name].splitlines()
            found[name] = "\n".join([*lines[:after], *added, *lines[after:]]) + "\n"
        return found


@pytest.fixture
def place(tmp_path: Path) -> Workplace:
    return Workplace(tmp_path)


def test_the_lines_go_into_all_files_and_out_again(place: Workplace) -> None:
    done = place.apply("--check")
    assert (done.returncode, done.stderr, done.stdout.count("the patch fits")) == (0, "", 5)
    assert place.texts() == place.originals
    done = place.apply()
    assert (done.returncode, done.stderr, done.stdout.count("the patch is added")) == (0, "", 5)
    assert place.texts() == place.patched()
    done = place.apply()
    assert (done.returncode, done.stdout.count("nothing to do")) == (0, 5)
    assert place.texts() == place.patched()
    done = place.apply("--reverse")
    assert (done.returncode, done.stderr, done.stdout.count("taken out")) == (0, "", 5)
    assert place.texts() == place.originals


@pytest.mark.parametrize("name", expected())
def test_if_one_file_is_not_the_known_one_none_is_changed(place: Workplace, name: str) -> None:
    after, added = parts()[name]
    lines = place.originals[name].splitlines(keepends=True)
    lines[after] = "another = 1\n"  # the line after the place
    (place.checkout / name).write_text("".join(lines))
    changed = place.texts()
    done = place.apply()
    assert (done.returncode, done.stdout) == (2, "")
    assert re.search(
        rf"{name} \(Megatron-DeepSpeed\) is not what the patch expects: its first {after + 1} lines", done.stderr
    )
    # What to put in by hand, and where: this file's lines alone.
    assert f"between lines {after} and {after + 1} of the known file" in done.stderr
    assert [line[4:] for line in done.stderr.splitlines()[2:]] == [line for line in added if line]
    assert place.texts() == changed


def test_changes_of_ones_own_further_down_stay(place: Workplace) -> None:
    path = place.checkout / "megatron" / "training.py"
    path.write_text(place.originals["megatron/training.py"] + "my_own = 1\n")
    assert "changed after line 406" in place.apply().stdout
    assert path.read_text() == place.patched()["megatron/training.py"] + "my_own = 1\n"
    place.apply("--reverse")
    assert path.read_text() == place.originals["megatron/training.py"] + "my_own = 1\n"


def test_a_missing_file_is_refused(place: Workplace) -> None:
    (place.checkout / "megatron" / "training.py").unlink()
    before = place.texts()
    done = place.apply()
    assert (done.returncode, done.stdout) == (2, "")
    assert "has no megatron/training.py" in done.stderr
    assert place.texts() == before


@pytest.mark.parametrize("option", [(), ("--reverse",)])
def test_what_was_interrupted_in_the_middle_is_brought_to_an_end(place: Workplace, option: tuple[str, ...]) -> None:
    name = "megatron/optimizer/__init__.py"
    (place.checkout / name).write_text(place.patched()[name])
    assert place.apply(*option).returncode == 0
    assert place.texts() == (place.originals if option else place.patched())


@pytest.mark.parametrize("option", [(), ("--reverse",)])
def test_if_one_file_cannot_be_replaced_those_before_it_come_back(
    place: Workplace, option: tuple[str, ...], tmp_path: Path
) -> None:
    if option:
        place.apply()
    before = place.texts()
    # A disk that fails at the last of them: an mv that refuses this one file.
    (tmp_path / "bin").mkdir()
    broken = tmp_path / "bin" / "mv"
    target = (place.checkout / "megatron" / "training.py").resolve()
    broken.write_text(
        f'#!/bin/sh\nfor last; do :; done\n[ "$last" != "{target}" ] && exec {shutil.which("mv")} "$@"\nexit 1\n'
    )
    broken.chmod(0o755)
    done = place.apply(*option, path=f"{broken.parent}:{os.environ['PATH']}")
    assert (done.returncode, done.stdout) == (2, "")
    assert "training.py could not be written. Nothing was changed." in done.stderr
    assert place.texts() == before


def test_lines_that_were_changed_since_are_not_taken_out(place: Workplace) -> None:
    place.apply()
    path = place.checkout / "megatron" / "model" / "language_model.py"
    path.write_text(path.read_text().replace("scale_head_input(input_)", "scale_head_input(input_ * 2)"))
    before = place.texts()
    done = place.apply("--reverse")
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        "language_model.py (Megatron-DeepSpeed) is not what the patch expects: it imports mup_megatron" in done.stderr
    )
    assert place.texts() == before


# The real one

if CHECKOUT:

    def test_a_real_checkout_is_patched_compiles_and_is_as_before(tmp_path: Path) -> None:
        names = [*expected(), "megatron/core/package_info.py"]
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(Path(CHECKOUT) / name, tmp_path / name)
        before = {name: (tmp_path / name).read_bytes() for name in names}
        done = subprocess.run([PATCHES / "apply.sh", tmp_path], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr, done.stdout.count("the file of 4efb479d")) == (0, "", 5)
        for name, (_, added) in parts().items():
            compile((tmp_path / name).read_text(encoding="utf-8"), name, "exec")
            assert "\n".join(added) in (tmp_path / name).read_text(encoding="utf-8")
        subprocess.run([PATCHES / "apply.sh", tmp_path, "--reverse"], capture_output=True, check=True)
        assert {name: (tmp_path / name).read_bytes() for name in names} == before
