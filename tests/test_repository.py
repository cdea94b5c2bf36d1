"""What holds the house together: who imports whom, what is declared, what set-up and CI rely on."""

import ast
import math
import os
import re
import runpy
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from mup_megatron import __version__
from mup_megatron.architectures.registry import load_model_file, shapes_of
from mup_megatron.yaml_io import read_yaml

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mup_megatron"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CONSTRAINTS = sorted((ROOT / "constraints").glob("py*.txt"))
MODEL_FILES = sorted((ROOT / "configs" / "models").glob("*.yaml"))
NAMED_SIZES = {"m": 1e6, "b": 1e9}

GROUND = {
    *("by_optimizer", "collectives", "messages", "errors", "files", "json_io", "readback", "unpickling", "validation"),
    "yaml_io",
}
"""Errors, what raises them for files and on all ranks, and what tells them: whoever may import `errors` may import all
of these."""

IMPORT_TO_DISTRIBUTION = {"grpc": "grpcio", "megatron": "megatron-core", "ruamel": "ruamel.yaml", "yaml": "PyYAML"}


# Who imports whom


def imports(path: Path) -> Iterator[str]:
    """Full names of the modules that a file imports, wherever in the file that is."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide who imports whom"
            # `from mup_megatron import theory` imports theory.
            # Likewise `from mup_megatron.check import transfer`.
            folders = ("mup_megatron", "mup_megatron.check")
            yield from ([f"{node.module}.{alias.name}" for alias in node.names] if node.module in folders else [])
            yield str(node.module)


def part_of(name: str) -> str | None:
    """The part of the package that a module belongs to: mup_megatron.theory.rules → theory."""
    names = name.split(".")
    return names[1] if names[0] == "mup_megatron" and len(names) > 1 else None


def files_of(part: str) -> list[Path]:
    return sorted((PACKAGE / part).rglob("*.py")) or [PACKAGE / f"{part}.py"]


def import_table() -> dict[str, set[str]]:
    """The table of docs/architecture.md: part → the parts that it may import."""
    table: dict[str, set[str]] = {}
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    for part, cell in re.findall(r"^\| (\w+) \| ([^|]+) \|$", text, flags=re.MULTILINE):
        if part == "package":
            continue
        if cell == "nothing of the package":
            table[part] = set()
        elif cell in {"all of the above", "all"}:
            table[part] = set(table) | GROUND
        else:
            table[part] = set(cell.split(", "))
            table[part] |= GROUND if "errors" in table[part] else set()
    return table


PARTS = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in PACKAGE.rglob("*.py")}


@pytest.mark.parametrize("part", sorted(PARTS - GROUND - {"__init__", "__main__"}))
def test_imports_follow_the_table_of_the_architecture(part: str) -> None:
    table = import_table()
    assert part in table, f"docs/architecture.md does not say what {part} may import"
    allowed = table[part] | {part, "__version__"}
    found = {(path.relative_to(ROOT).as_posix(), part_of(name)) for path in files_of(part) for name in imports(path)}
    assert [(path, name) for path, name in sorted(found, key=str) if name is not None and name not in allowed] == []


CHECK = PACKAGE / "check"
ROOMS = {path.relative_to(CHECK).parts[0].removesuffix(".py") for path in CHECK.rglob("*.py")} - {"__init__"}


def rooms_of_check() -> dict[str, set[str]]:
    """The second table of docs/architecture.md: room of check → the rooms that it may import, in its order."""
    table: dict[str, set[str]] = {}
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    for room, cell in re.findall(r"^\| check/(\w+) \| ([^|]+) \|$", text, flags=re.MULTILINE):
        if cell == "all of the above":
            table[room] = set(table)
        else:
            table[room] = set() if cell == "nothing of check" else set(cell.split(", "))
        assert table[room] <= set(table) - {room}, f"{room} may import what comes after it"
    return table


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_imports_within_check_follow_the_table_of_its_rooms(room: str) -> None:
    table = rooms_of_check()
    assert set(table) == ROOMS
    found = {
        (path.relative_to(ROOT).as_posix(), name.split(".")[2])
        for path in sorted((CHECK / room).rglob("*.py")) or [CHECK / f"{room}.py"]
        for name in imports(path)
        if name.startswith("mup_megatron.check.")
    }
    assert [(path, name) for path, name in sorted(found) if name not in table[room] | {room}] == []


@pytest.mark.parametrize(
    ("words", "places"),
    [
        (r"import .*\b(?:Property|Role)\b", {"entries.py"}),
        (r"linear_(?:qkv|proj|fc)|_layernorm\b|(?:core|self)_attention|output_layer|word_emb|decoder\.layers", set()),
        (r"\b(?:AdamReplay|SGDReplay)\b|parametrization\.optimizer|\boptim\.(?:SGD|Adam)", {"measure/optimizers.py"}),
    ],
    ids=["roles and properties", "names of modules", "optimizers"],
)
def test_what_check_knows_of_single_ones_is_in_one_place(words: str, places: set[str]) -> None:
    files = {path.relative_to(CHECK).as_posix(): path.read_text(encoding="utf-8") for path in CHECK.rglob("*.py")}
    assert {name for name, text in files.items() if re.search(words, text)} - {"measure/replay.py"} == places


def test_the_theory_is_pure_python() -> None:
    names = {name.split(".")[0] for path in files_of("theory") for name in imports(path)}
    assert names - sys.stdlib_module_names == {"mup_megatron"}


def test_the_ground_imports_only_itself() -> None:
    parts = {part_of(name) for part in GROUND for path in files_of(part) for name in imports(path)}
    assert parts - {None} <= GROUND


def test_explaining_needs_no_torch() -> None:
    program = (
        "import sys, mup_megatron.theory, mup_megatron.architectures.gpt, mup_megatron.recipe\n"
        "import mup_megatron.cli.explain\n"
        "print(sorted({'torch', 'megatron'} & {name.split('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_test_modules_have_names_of_their_own() -> None:
    # Without __init__.py in tests/, pytest imports two files of one name as one module.
    names = [path.name for path in (ROOT / "tests").rglob("*.py") if path.name != "conftest.py"]
    assert sorted(names) == sorted(set(names))


# What is declared


def requirements(*extras: str) -> list[Requirement]:
    declared = [*PYPROJECT["dependencies"], *(r for e in extras for r in PYPROJECT["optional-dependencies"][e])]
    return [Requirement(line) for line in declared]


def pins(path: Path) -> dict[str, str]:
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}


def test_what_is_imported_is_declared() -> None:
    # mup is installed by the Makefile, without its dependencies.
    declared = {canonicalize_name(r.name) for r in requirements(*PYPROJECT["optional-dependencies"])} | {"mup"}
    tests = [*(ROOT / "tests").rglob("*.py")]
    others = [*(ROOT / "examples").rglob("*.py"), *(ROOT / "benchmarks").iterdir()]
    own = {"mup_megatron", "support", *(path.stem for path in (*tests, *others))}
    imported = {name.split(".")[0] for path in [*PACKAGE.rglob("*.py"), *tests] for name in imports(path)}
    foreign = imported - sys.stdlib_module_names - own
    assert {canonicalize_name(IMPORT_TO_DISTRIBUTION.get(name, name)) for name in foreign} - declared == set()


def test_declared_versions_are_ranges() -> None:
    for requirement in requirements(*PYPROJECT["optional-dependencies"]):
        assert {specifier.operator for specifier in requirement.specifier} == {">=", "<"}, str(requirement)


@pytest.mark.parametrize("path", CONSTRAINTS, ids=lambda path: path.stem)
def test_pins_fit_every_machine(path: Path) -> None:
    for line in path.read_text(encoding="utf-8").splitlines():
        # Neither a local version (torch's +cpu), nor a URL or a file, nor an option such as an index.
        assert line.startswith("#") or re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9a-z.]*", line), line
    # Which of these torch needs depends on the machine; it asks for them itself.
    assert [name for name in pins(path) if name.startswith(("nvidia-", "cuda-")) or name == "triton"] == []


@pytest.mark.parametrize("path", CONSTRAINTS, ids=lambda path: path.stem)
def test_pins_lie_in_the_declared_ranges(path: Path) -> None:
    pinned = pins(path)
    for requirement in requirements("megatron", "deepspeed", "hf", "wandb", "grpc", "postgresql", "dev"):
        if requirement.name != "triton":
            assert Version(pinned[canonicalize_name(requirement.name)]) in requirement.specifier, str(requirement)


def test_both_ends_of_the_supported_megatron_core_are_pinned() -> None:
    minor = {path.stem: pins(path)["megatron-core"].rsplit(".", 1)[0] for path in CONSTRAINTS}
    assert minor == {"py3.11": "0.16", "py3.12": "0.19"}


def test_no_tracked_file_names_the_machine_it_was_written_on() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    forbidden = re.compile(r"(?<![\w.])/(?:root|work|opt)/|\.\./shared|\.library/|file:///|index-url|find-links")
    offences = []
    for path in (ROOT / name for name in listed.split("\0") if name):
        if path != Path(__file__) and path.is_file():
            text = path.read_text(encoding="utf-8", errors="ignore")
            offences += [(path.relative_to(ROOT).as_posix(), match[0]) for match in forbidden.finditer(text)]
    assert offences == []


# Model files


@pytest.mark.parametrize("path", MODEL_FILES, ids=lambda path: path.stem)
def test_a_model_file_has_the_parameters_it_says(path: Path) -> None:
    model = load_model_file(path)
    count = sum(math.prod(p.shape) for p in shapes_of(model, model)[1].tensors)
    readme = (path.parent / "README.md").read_text(encoding="utf-8")
    row = f"| {model.num_layers} | {model.hidden_size} | {model.num_attention_heads} | {model.head_size} | {count:,} |"
    assert f"| `{path.name}` {row}\n" in readme
    if "parameters" in (text := path.read_text(encoding="utf-8")):
        assert f"{count:,}" in text
    if size := re.fullmatch(r"gpt3_(?:.+_)?([\d.]+)([mb])", path.stem):
        assert count == pytest.approx(float(size[1]) * NAMED_SIZES[size[2]], rel=0.05)


def test_the_proxy_differs_from_its_target_in_width_alone() -> None:
    target, proxy = (
        load_model_file(ROOT / "configs" / "models" / f"gpt3_6.7b{end}.yaml") for end in ("", "_proxy_40m")
    )
    assert target.model_copy(update={"hidden_size": 256, "num_attention_heads": 2, "kv_channels": None}) == proxy
    assert target.head_size == proxy.head_size


# Set-up and CI


def clean_environment(**changes: str) -> dict[str, str]:
    """The environment without what a surrounding make or CI run has put there."""
    ours = {"PYTHON", "VENV", "JOBS", "PYTEST", "MUP_MEGATRON_CI"}
    inherited = {
        k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS", "PYTEST_")) and k not in ours
    }
    return inherited | changes


def script(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


@pytest.fixture
def path_folder(tmp_path: Path) -> Path:
    """A folder ahead of the system's on the PATH, with a python3.12 that is found and does not run, and no pyenv."""
    folder = tmp_path / "bin"
    script(folder / "python3.12", 'echo "python3.12: not selected" >&2; exit 127')
    script(folder / "pyenv", "exit 1")
    return folder


def works(path: Path, mark: Path) -> Path:
    """A real interpreter which leaves a mark when it is asked."""
    return script(path, f'touch "{mark}"; exec "{sys.executable}" "$@"')


def find_python(path_folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    changes = {"PATH": f"{path_folder}{os.pathsep}/usr/bin{os.pathsep}/bin"} | environment
    command = [ROOT / "tools" / "find-python", *arguments]
    return subprocess.run(command, env=clean_environment(**changes), capture_output=True, text=True, check=False)


BEHIND_THIS = getattr(sys, "_base_executable", sys.executable)


def test_an_interpreter_that_does_not_run_is_passed_over(path_folder: Path, tmp_path: Path) -> None:
    works(path_folder / "python3.11", tmp_path / "asked")
    done = find_python(path_folder)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{BEHIND_THIS}\n", "")
    assert (tmp_path / "asked").exists()


def test_an_interpreter_of_pyenv_need_not_be_selected(path_folder: Path, tmp_path: Path) -> None:
    works(tmp_path / "versions" / "3.12" / "bin" / "python", tmp_path / "asked pyenv's")
    script(path_folder / "pyenv", f'[ "$*" = "prefix 3.12" ] && echo "{tmp_path}/versions/3.12"')
    works(path_folder / "python3.11", tmp_path / "asked 3.11")
    assert find_python(path_folder).returncode == 0
    assert (tmp_path / "asked pyenv's").exists()
    assert not (tmp_path / "asked 3.11").exists()


def test_the_python_asked_for_is_the_only_candidate(path_folder: Path, tmp_path: Path) -> None:
    works(path_folder / "python3.11", tmp_path / "asked 3.11")
    asked = works(tmp_path / "mine", tmp_path / "asked mine")
    assert find_python(path_folder, PYTHON=str(asked)).returncode == 0
    done = find_python(path_folder, PYTHON=str(tmp_path / "none"))
    assert (done.returncode, done.stdout) == (1, "")
    assert f"{tmp_path / 'none'}: not found" in done.stderr
    assert not (tmp_path / "asked 3.11").exists()


def test_another_version_than_the_one_asked_for_is_refused_with_its_reason(path_folder: Path, tmp_path: Path) -> None:
    works(path_folder / "python3", tmp_path / "asked")
    script(path_folder / "python3.9", "exit 1")
    done = find_python(path_folder, "3.9")
    assert (done.returncode, done.stdout) == (1, "")
    assert "python3.9: does not run" in done.stderr
    assert f"python3: is 3.{sys.version_info[1]}" in done.stderr


def test_make_and_ci_find_python_by_one_rule() -> None:
    for path in (ROOT / "Makefile", ROOT / ".ci" / "run"):
        text = path.read_text(encoding="utf-8")
        assert "tools/find-python" in text
        assert "pyenv" not in text
        assert not re.search(r"(?<![\w/.$-])python3?(?:\.\d+)? ", re.sub(r"#.*", "", text).replace("find-python ", ""))


def needs_setting_up(venv: Path, *options: str, **environment: str) -> bool:
    command = ["make", "--question", "setup", f"VENV={venv}", *options]
    done = subprocess.run(command, cwd=ROOT, env=clean_environment(**environment), capture_output=True, check=False)
    assert done.returncode in (0, 1), done.stderr
    return done.returncode == 1


def test_set_up_is_done_again_when_it_was_interrupted_or_is_out_of_date(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    assert needs_setting_up(tmp_path), "interrupted: the stamp comes last"
    (tmp_path / ".complete").write_text(f"{BEHIND_THIS}\n", encoding="utf-8")
    assert not needs_setting_up(tmp_path)
    for changed in ("pyproject.toml", *(path.relative_to(ROOT).as_posix() for path in CONSTRAINTS)):
        assert needs_setting_up(tmp_path, f"--what-if={changed}"), changed
    assert not needs_setting_up(tmp_path, PYTHON=sys.executable)
    (tmp_path / ".complete").write_text("/another/python\n", encoding="utf-8")
    assert needs_setting_up(tmp_path, PYTHON=sys.executable), "built with another interpreter"


@pytest.fixture
def stub_venv(tmp_path: Path) -> Path:
    """An environment that is out of date, whose Python and a uv beside it note what they are asked."""
    venv = tmp_path / "venv"
    script(venv / "bin" / "python", f'echo "python $*" >> "{tmp_path}/asked"; [ "$1" = -c ] && echo 3.12; exit 0')
    script(tmp_path / "uv", f'echo "uv $*" >> "{tmp_path}/asked"; [ ! -e "{tmp_path}/refuses" ]')
    (venv / ".complete").write_text(f"{BEHIND_THIS}\n", encoding="utf-8")
    return venv


def asked_in_set_up(venv: Path, uv: str) -> list[str]:
    command = ["make", "setup", f"VENV={venv}", f"UV={uv}", f"PYTHON={sys.executable}", "--what-if=pyproject.toml"]
    subprocess.run(command, cwd=ROOT, env=clean_environment(), capture_output=True, check=True)
    asked = (venv.parent / "asked").read_text(encoding="utf-8").splitlines()
    assert (venv / ".complete").exists()
    return [line for line in asked if not line.startswith("python -c")]


PIP = "python -m pip install --disable-pip-version-check -c constraints/py3.12.txt "


def test_set_up_is_done_by_uv_with_the_same_pins_and_by_pip_where_uv_cannot(stub_venv: Path, tmp_path: Path) -> None:
    by_uv = asked_in_set_up(stub_venv, str(tmp_path / "uv"))
    start = f"uv pip install --python {stub_venv}/bin/python -c constraints/py3.12.txt "
    assert [line.removeprefix(start).split()[0] for line in by_uv] == ["-e", "--no-deps"]
    (tmp_path / "asked").unlink()
    (tmp_path / "refuses").touch()
    uv, pip = asked_in_set_up(stub_venv, str(tmp_path / "uv"))[:2]
    assert (uv.removeprefix(start), by_uv[0]) == (pip.removeprefix(PIP), uv)


def test_set_up_is_done_by_pip_alone_where_that_is_asked_for(stub_venv: Path) -> None:
    assert [line.removeprefix(PIP).split()[0] for line in asked_in_set_up(stub_venv, "")] == ["-e", "--no-deps"]


SKIPS = {
    "test_kept.py": """
import importlib.metadata
import pytest

def test_passes():
    pass

@pytest.mark.xfail(reason="known")
def test_fails_as_expected():
    assert False

@pytest.mark.skipif(True, reason="needs a GPU")
def test_of_a_gpu():
    pass

def test_of_another_megatron():
    pytest.skip(f"megatron-core {importlib.metadata.version('megatron-core')} has no such thing")
""",
    "test_missing.py": """
import pytest

def test_of_a_package():
    pytest.importorskip("no_such_package")

@pytest.mark.skipif(True, reason="no python3.11")
def test_of_an_interpreter():
    pass

def test_of_a_megatron_that_is_not_installed():
    pytest.skip("megatron-core 0.1 has no such thing")
""",
    "test_missing_module.py": "import pytest; pytest.importorskip('no_such_package')",
}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"passed": 1, "xfailed": 1, "skipped": 6}),
        ({"MUP_MEGATRON_CI": "1"}, {"passed": 1, "xfailed": 1, "skipped": 2, "failed": 2, "error": 2}),
    ],
    ids=["elsewhere", "in CI"],
)
def test_in_ci_a_skip_for_something_missing_is_a_failure(
    changes: dict[str, str], expected: dict[str, int], tmp_path: Path
) -> None:
    (tmp_path / "conftest.py").write_bytes((ROOT / "tests" / "conftest.py").read_bytes())
    (tmp_path / "pytest.ini").write_text("[pytest]\n", encoding="utf-8")
    for name, text in SKIPS.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "--continue-on-collection-errors", "-p", "no:cacheprovider"]
    environment = clean_environment(PYTEST_DISABLE_PLUGIN_AUTOLOAD="1", **changes)
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    found = {
        kind: int(n) for n, kind in re.findall(r"(\d+) ([a-z]+?)s?\b", done.stdout.splitlines()[-1].split(" in ")[0])
    }
    assert found == expected, done.stdout
    assert done.returncode == (1 if changes else 0)


# Documents


FRAGMENT = re.compile(r"(?:What|Whether|Of|Likewise|How|Why|Where|Which|As)\b")


def docstrings(path: Path) -> Iterator[tuple[str, str]]:
    """Of a module and all that is in it; commands' are help texts."""
    module = ast.parse(path.read_text(encoding="utf-8"))
    yield path.name, ast.get_docstring(module) or ""
    for node in ast.walk(module):
        if not isinstance(node, ast.ClassDef | ast.FunctionDef):
            continue
        if not any("command(" in ast.unparse(decorator) for decorator in node.decorator_list):
            yield f"{path.name}:{node.lineno} {node.name}", ast.get_docstring(node) or ""


@pytest.mark.parametrize("part", sorted(PARTS))
def test_a_docstring_is_no_fragment(part: str) -> None:
    for file in files_of(part):
        for name, text in docstrings(file):
            assert not FRAGMENT.match(text), f"{name}: {text}"


@pytest.mark.parametrize("path", sorted((ROOT / "docs").rglob("*.md")), ids=lambda path: path.name)
def test_a_row_of_a_table_has_a_cell_under_every_heading(path: Path) -> None:
    bars = 0
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("|"):
            bars = 0
            continue
        found = len(re.findall(r"(?<!\\)\|", line))
        bars = bars or found
        assert found == bars, line


def test_the_page_of_versions_is_up_to_date() -> None:
    page = runpy.run_path(str(ROOT / "tools" / "versions-page"))["page"]()
    assert (ROOT / "docs" / "versions.md").read_text(encoding="utf-8") == page, "Run tools/versions-page."


def test_what_is_cited_is_this_release() -> None:
    cited = read_yaml(ROOT / "CITATION.cff")
    assert {"cff-version", "message", "title", "authors"} <= set(cited), "what the format demands"
    assert (cited["title"], cited["version"], cited["license"]) == (
        PYPROJECT["name"],
        __version__,
        PYPROJECT["license"],
    )
    newest = re.search(r"^## (\d\S*) - (\S+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert newest is not None
    assert (newest[1], newest[2]) == (__version__, str(cited["date-released"]))


def test_benchmarks_are_imported_by_names_that_no_module_of_the_tests_has() -> None:
    """Both folders are on the path while tests run, and in another order in a rank."""
    own = {path.stem: path for path in (ROOT / "benchmarks").glob("*.py")}
    readers = [*own.values(), *(ROOT / "tests").rglob("*.py")]
    imported = {name for path in readers for name in imports(path) if name in own}
    assert imported, "some share code"
    assert imported.isdisjoint(path.stem for path in (ROOT / "tests").rglob("*.py"))
