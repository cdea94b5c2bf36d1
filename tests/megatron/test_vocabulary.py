"""The size of a tokenizer, from its files: as Megatron's own tokenizers count, and without running anything."""

import base64
import json
import struct
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models

from mup_megatron.errors import InputError
from mup_megatron.megatron.arguments.vocabulary import vocabulary

NEWEST = (0, 19)


def size(core: tuple[int, int] | None = NEWEST, **values: Any) -> int | None:
    defaults = {"vocab_size": None, "tiktoken_num_special_tokens": 1000, "vocab_extra_ids": 0}
    return vocabulary({**defaults, **values}, core)


# ---- files ---------------------------------------------------------------------------------------------------------


def field(number: int, content: bytes) -> bytes:
    return bytes([number << 3 | 2]) + varint(len(content)) + content


def varint(value: int) -> bytes:
    head, tail = value >> 7, value & 0x7F
    return bytes([tail]) if not head else bytes([tail | 0x80]) + varint(head)


def sentencepiece(path: Path, pieces: list[str]) -> Path:
    """As sentencepiece writes it: pieces with score and kind, then the trainer's settings, of which one is a float."""
    messages = [field(1, piece.encode()) + b"\x15" + struct.pack("<f", -1.5) + b"\x18\x03" for piece in pieces]
    settings = field(2, b"corpus.txt" * 30) + b"\x55" + struct.pack("<f", 0.9995)
    path.write_bytes(b"".join(field(1, message) for message in messages) + field(2, settings) + field(3, b""))
    return path


def tiktoken(path: Path, entries: int) -> Path:
    ranks = [{"rank": i, "token_bytes": base64.b64encode(b"%d" % i).decode(), "token_str": ""} for i in range(entries)]
    path.write_text(json.dumps(ranks))
    return path


# ---- sizes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("core", "expected"), [((0, 16), 513), ((0, 17), 513), ((0, 18), 512), (NEWEST, 512)])
def test_null_counts_the_end_of_document_up_to_0_17(core: tuple[int, int], expected: int) -> None:
    assert size(core, tokenizer_type="NullTokenizer", vocab_size=512) == expected


def test_null_without_a_size_has_none() -> None:
    assert size(tokenizer_type="NullTokenizer") is None


@pytest.mark.parametrize("kind", ["GPTSentencePieceTokenizer", "Llama2Tokenizer", "SentencePieceTokenizer"])
def test_sentencepiece(tmp_path: Path, kind: str) -> None:
    path = sentencepiece(tmp_path / "t.model", [f"▁piece{i}" for i in range(321)])
    assert size(tokenizer_type=kind, tokenizer_model=str(path)) == 321


def test_0_16_adds_tokens_of_its_own_to_one_kind(tmp_path: Path) -> None:
    path = sentencepiece(tmp_path / "t.model", ["a"])
    assert size((0, 16), tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(path)) is None


def test_tiktoken_has_the_size_that_it_is_told_whatever_its_file_has(tmp_path: Path) -> None:
    path = tiktoken(tmp_path / "t.json", 300)
    told = {"tokenizer_type": "TikTokenizer", "tokenizer_model": str(path), "tiktoken_num_special_tokens": 100}
    assert size(**told, vocab_size=350) == 350
    assert size(**told, vocab_size=400) == 400
    with pytest.raises(InputError, match="has 300 entries, and TikTokenizer takes 301"):
        size(**told, vocab_size=401)
    assert size(tokenizer_type="TikTokenizer") == 131072


@pytest.mark.parametrize("kind", [None, "GPT2BPETokenizer"])
def test_gpt2(tmp_path: Path, kind: str | None) -> None:
    """Without a type it is what pretrain_gpt.py takes."""
    path = tmp_path / "vocab.json"
    path.write_text(json.dumps({"<|endoftext|>": 2, "a": 0, "b": 1}))
    assert size(tokenizer_type=kind, vocab_file=str(path)) == 3


def test_bert(tmp_path: Path) -> None:
    path = tmp_path / "vocab.txt"
    # A separator of lines that is an entry.
    path.write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n\u2028\n", encoding="utf-8")
    assert size(tokenizer_type="BertWordPieceLowerCase", vocab_file=str(path)) == 7
    assert size(tokenizer_type="BertWordPieceCase", vocab_file=str(path)) == 107
    old = {"tokenizer_type": "BertWordPieceCase", "vocab_file": str(path), "vocab_extra_ids": 5}
    assert size((0, 16), **old) == 7 + 2 + 5


def word_level(folder: Path, words: int) -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(words)}, unk_token="w0"))
    tokenizer.add_special_tokens(["<s>", "w1"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer


def test_hugging_face(tmp_path: Path) -> None:
    whole = word_level(tmp_path, 50)
    assert whole.get_vocab_size(with_added_tokens=True) == 51
    told = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": str(tmp_path)}
    assert size(**told) == 51
    assert size(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(tmp_path / "tokenizer.json")) == 51
    # What the configuration lists beside it is added when the tokenizer is made.
    config: dict[str, Any] = {"pad_token": "<pad>", "eos_token": {"content": "<s>"}, "extra_special_tokens": ["<x>"]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert size(**told) == 53
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {"60": {"content": "<y>"}}}))
    assert size(**told) == 52
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["own.T", None]}}))
    assert size(**told) is None


@pytest.mark.parametrize("kind", ["Unigram", "BPE"])
def test_hugging_faces_other_models(tmp_path: Path, kind: str) -> None:
    model = models.Unigram([("<unk>", 0.0), ("a", -1.0)], 0) if kind == "Unigram" else models.BPE({"a": 0, "b": 1}, [])
    Tokenizer(model).save(str(tmp_path / "tokenizer.json"))
    assert size(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(tmp_path)) == 2


def test_hugging_faces_folders_of_older_kinds(tmp_path: Path) -> None:
    told = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": str(tmp_path)}
    assert size(**told) is None
    sentencepiece(tmp_path / "tokenizer.model", ["<unk>", "<s>", "</s>", "a"])
    assert size(**told) is None  # which tokens are added is known of few classes only
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    assert size(**told) == 4
    (tmp_path / "added_tokens.json").write_text('{"<pad>": 4}')
    assert size(**told) == 5
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 1}')
    (tmp_path / "merges.txt").write_text("#version\n")
    assert size(**told) == 3


def test_what_is_not_here_is_not_known(tmp_path: Path) -> None:
    for kind in ("HuggingFaceTokenizer", "GPTSentencePieceTokenizer", "SFTTokenizer", "MultimodalTokenizer"):
        assert size(tokenizer_type=kind, tokenizer_model="meta-llama/Llama-2-7b-hf") is None
    assert size(tokenizer_type="HuggingFaceTokenizer", tokenizer_model="x" * 5000) is None
    assert size(tokenizer_type="HuggingFaceTokenizer", tokenizer_model="a\0b") is None
    assert size() is None


DAMAGED = [
    b"",
    b"\x00\xff" * 40,
    b"{",
    b"[1, 2]",
    b'{"model": "x"}',
    b'{"a": "b"}',
    b'"' + b"[" * 9,
    b"\x0a\xff\xff",
    b"{}",
]


@pytest.mark.parametrize("content", [*DAMAGED, b"[" * 100_000], ids=range(len(DAMAGED) + 1))
@pytest.mark.parametrize(
    ("kind", "flag"),
    [
        ("HuggingFaceTokenizer", "tokenizer_model"),
        ("GPTSentencePieceTokenizer", "tokenizer_model"),
        ("TikTokenizer", "tokenizer_model"),
        ("GPT2BPETokenizer", "vocab_file"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, kind: str, flag: str, content: bytes) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"tokenizer\.json") as raised:
        size(tokenizer_type=kind, vocab_size=3000, **{flag: str(path)})
    assert len(str(raised.value)) < 300 + len(str(path))


def test_a_folder_is_no_vocabulary(tmp_path: Path) -> None:
    for kind, flag in (("GPTSentencePieceTokenizer", "tokenizer_model"), ("GPT2BPETokenizer", "vocab_file")):
        with pytest.raises(InputError, match="no file of a tokenizer"):
            size(tokenizer_type=kind, **{flag: str(tmp_path)})
