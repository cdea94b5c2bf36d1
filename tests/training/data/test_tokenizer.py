import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from mup_megatron.errors import InputError
from mup_megatron.training.data.tokenizer import EOD_TOKEN, load_tokenizer, make_tokenizer, parse_tokenizer

TEXTS = [
    "def f(x):\n    return x ** 2\r\n\n\n",
    f"a {EOD_TOKEN} in the middle",
    "μP – naïve 漢字 🙂\x00\x7f\xad",
    "  \n\t ",
]


@pytest.mark.parametrize("spec", ["byte", "bpe:300"])
def test_tokens_decode_to_the_very_text_and_never_contain_the_end_of_document(spec: str) -> None:
    tokenizer = make_tokenizer(parse_tokenizer(spec), lambda: TEXTS)
    for text, ids in zip(TEXTS, tokenizer.encode(TEXTS), strict=True):
        assert tokenizer.decode(ids) == text
        assert tokenizer.eod not in ids
        assert max(ids) < tokenizer.vocab_size


def test_byte_tokens_are_the_bytes() -> None:
    tokenizer = make_tokenizer(parse_tokenizer("byte"), list)
    everything = "".join(map(chr, range(0x800))) + "漢🙂"
    assert tokenizer.encode([everything]) == [list(everything.encode())]
    assert (tokenizer.vocab_size, tokenizer.eod) == (257, 256)


def test_a_bpe_has_the_vocabulary_asked_for_or_what_the_text_gives() -> None:
    tokenizer = make_tokenizer(parse_tokenizer("bpe:290"), lambda: TEXTS)
    assert (tokenizer.vocab_size, tokenizer.eod) == (290, 0)
    assert make_tokenizer(parse_tokenizer("bpe:5000"), lambda: ["aaaa"]).vocab_size < 270


def test_training_is_the_same_in_every_process_and_with_any_number_of_threads() -> None:
    program = (
        "import sys, tokenize; from pathlib import Path\n"
        "from mup_megatron.training.data.tokenizer import make_tokenizer, parse_tokenizer\n"
        "texts = [Path(module.__file__).read_text() for module in (tokenize, sys.modules['os'], sys.modules['re'])]\n"
        "sys.stdout.write(make_tokenizer(parse_tokenizer('bpe:700'), lambda: texts).to_json())"
    )
    path = os.pathsep.join(filter(None, sys.path))
    made = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONPATH": path, "RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": threads},
            check=True,
            capture_output=True,
        ).stdout
        for threads in ("1", "2", "7")
    }
    assert len(made) == 1
    assert len(json.loads(made.pop())["model"]["vocab"]) == 700


def _save(path: Path, special: list[str]) -> Path:
    inner = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.add_special_tokens(special)
    inner.enable_truncation(2)
    inner.enable_padding(length=8)
    inner.save(str(path))
    return path


def test_a_tokenizer_file_is_used_without_its_cutting_and_filling(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(parse_tokenizer(str(_save(tmp_path / "t.json", ["</s>"]))), list)
    assert tokenizer.encode(["a b a", "b"]) == [[0, 1, 0], [1]]
    assert (tokenizer.eod, tokenizer.vocab_size) == (3, 4)


def test_the_end_of_document_of_a_file_can_be_named_and_must_exist(tmp_path: Path) -> None:
    path = _save(tmp_path / "t.json", ["<stop>"])
    assert load_tokenizer(path, eod_token="<stop>").eod == 3
    with pytest.raises(InputError, match="--eod-token"):
        load_tokenizer(path)
    with pytest.raises(InputError, match="<halt>"):
        load_tokenizer(path, eod_token="<halt>")


@pytest.mark.parametrize(
    "spec",
    [
        "gpt2",
        "bpe:",
        "bpe:256",
        "bpe:-1",
        "bpe:1e3",
        "bpe:²",
        "",
        "bpe:1048577",
        "bpe:" + "9" * 20,
        "bpe:" + "9" * 5000,
        "a" * 5000,
        "a\0b",
    ],
)
def test_names_of_the_hub_and_impossible_vocabularies_are_refused(spec: str) -> None:
    with pytest.raises(InputError, match="names are not looked up online") as refusal:
        parse_tokenizer(spec)
    assert len(str(refusal.value)) < 400


def test_a_tokenizer_that_cannot_tokenize_the_text_is_named(tmp_path: Path) -> None:
    """The library finds out when it meets a word that the vocabulary lacks, and there is no other for it."""
    inner = Tokenizer(models.WordLevel({"a": 0}, unk_token="?"))
    inner.add_special_tokens(["</s>"])
    inner.save(str(tmp_path / "t.json"))
    with pytest.raises(InputError, match=r"t\.json: cannot tokenize the text"):
        load_tokenizer(tmp_path / "t.json").encode(["b"])


def test_an_id_for_which_the_library_would_take_all_memory_is_refused(tmp_path: Path) -> None:
    """It makes room for each one below, when the tokenizer is written beside the data."""
    inner = Tokenizer(models.WordLevel({"a": 2**20, "</s>": 0}, unk_token="a"))
    inner.save(str(tmp_path / "t.json"))
    with pytest.raises(InputError, match=r"t\.json: has the id 1048576"):
        load_tokenizer(tmp_path / "t.json")


@pytest.mark.parametrize("content", ["", "{", "{}", '{"vocab": 1}'])
def test_a_file_that_is_no_tokenizer_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "t.json"
    path.write_text(content)
    with pytest.raises(InputError, match=r"t\.json: not a tokenizer"):
        load_tokenizer(path)
