import json
import subprocess
import sys
from pathlib import Path

import pytest

from mup_megatron.cli import main as cli
from mup_megatron.megatron import cpu
from mup_megatron.training.data.reading import check_prefix, read_meta

# Other tests of this process need the runtime, and must not find Megatron imported without it.
cpu.enable()


def _run(capfd: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["data", *map(str, words)])
    out, err = capfd.readouterr()
    assert isinstance(exit_.value.code, int)
    return exit_.value.code, out, err


@pytest.fixture
def poem(tmp_path: Path) -> Path:
    path = tmp_path / "poem.txt"
    path.write_text("the width grows and the rate stays\n" * 40)
    return path


def test_files_become_data_and_the_answer_is_the_prefix(
    poem: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    prefix = tmp_path / "new" / "folder" / "poem"
    code, out, err = _run(capfd, poem, poem, "-o", prefix, "--tokenizer", "bpe:270")
    assert code == 0
    meta = check_prefix(prefix)
    assert out.splitlines() == [
        str(prefix),
        f"2 documents, {meta.tokens} tokens, vocabulary {meta.vocab_size} (bpe:270)",
    ]
    assert "tokenizing: 2 of 2" in err


def test_json_answers_are_one_object(poem: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, out, _ = _run(capfd, poem, "-o", tmp_path / "p", "--tokenizer", "byte", "--format", "json")
    answer = json.loads(out)
    assert code == 0
    assert answer["prefix"] == str(tmp_path / "p")
    assert (answer["tokens"], answer["vocab_size"], answer["eod"]) == (poem.stat().st_size + 1, 257, 256)


def test_existing_data_stay_without_force(poem: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    prefix = tmp_path / "p"
    assert _run(capfd, poem, "-o", prefix, "--tokenizer", "byte")[0] == 0
    before = read_meta(prefix)
    code, out, err = _run(capfd, poem, poem, "-o", prefix, "--tokenizer", "byte")
    assert (code, out) == (2, "")
    assert "--force" in err
    assert read_meta(prefix) == before
    assert _run(capfd, poem, poem, "-o", prefix, "--tokenizer", "byte", "--force")[0] == 0
    assert read_meta(prefix).documents == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere.txt", "-o", "p"], "nowhere.txt: no such file"),
        (["poem.txt"], "-o PREFIX is missing"),
        (["poem.txt", "-o", "p", "--tokenizer", "gpt2"], "names are not looked up online"),
        (["poem.txt", "-o", "poem.txt/p"], "cannot be written"),
        (["poem.txt", "-o", "."], "this is a folder"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing_behind(
    poem: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: list[str], said: str
) -> None:
    monkeypatch.chdir(poem.parent)
    code, out, err = _run(capfd, *words)
    assert (code, out) == (2, "")
    assert said in err
    assert "Traceback" not in err
    assert [path.name for path in poem.parent.iterdir()] == ["poem.txt"]


def test_help_waits_for_neither_torch_nor_megatron() -> None:
    program = (
        "import sys; from mup_megatron.cli.main import main\n"
        "try: main(['data', '--help'])\n"
        "finally: assert not {'torch', 'megatron', 'numpy'} & set(sys.modules), 'imported'"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "--tokenizer" in done.stdout
