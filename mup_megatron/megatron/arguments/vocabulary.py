"""The number of entries of Megatron's tokenizers, read from the tokenizer's files: before padding, as Megatron counts.

Reads JSON, lists of words, and the outline of sentencepiece's protobuf, in files that exist here; runs nothing of a
tokenizer, and asks no network. Where the size follows from more than a file says (code of the tokenizer's own, tokens
that a flag adds), there is no answer, and it has to be given.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mup_megatron.errors import InputError
from mup_megatron.validation import shortened

TIKTOKEN_DEFAULT = 2**17
"""Of Megatron's TikTokenizer without --vocab-size. The file has to have as many as it takes."""
_BERT_EXTRA = 100
"""Tokens that Megatron 0.17 and later adds to BertWordPieceCase."""
_NULL_WITHOUT_END = (0, 18)
"""The first release whose NullTokenizer counts the end of document among --vocab-size."""
_SENTENCEPIECE = ("GPTSentencePieceTokenizer", "Llama2Tokenizer", "SentencePieceTokenizer")
_LARGEST = 2**30
"""Bytes of a file that is read."""
_OF_SENTENCEPIECE = ("LlamaTokenizer", "LlamaTokenizerFast", "GemmaTokenizer", "GemmaTokenizerFast")
"""Hugging Face's classes that have no entries but those of the sentencepiece model and the listed ones."""


def vocabulary(values: Mapping[str, Any], core: tuple[int, int] | None) -> int | None:
    """Returns the number of entries of the tokenizer that Megatron's arguments name; None where it cannot be read.

    Args:
        values: Megatron's arguments, parsed.
        core: the Megatron-Core release (major, minor) that is meant, where it is known: some count otherwise.

    Raises:
        InputError: a file is there and is not what it is named as; says the flag and the file.
    """
    kind, stated = values.get("tokenizer_type"), values.get("vocab_size")
    if kind == "NullTokenizer":
        with_end = core is not None and core < _NULL_WITHOUT_END
        return None if stated is None else int(stated) + with_end
    model, vocab = _path(values, "tokenizer_model"), _path(values, "vocab_file")
    if kind == "TikTokenizer":
        return _tiktoken(values, model)
    if kind in _SENTENCEPIECE and model is not None:
        # 0.16 adds tokens of its own to one of them.
        own = kind == "SentencePieceTokenizer" and core is not None and core < (0, 17)
        return None if own else len(_sentencepiece(model, "--tokenizer-model"))
    if kind == "HuggingFaceTokenizer" and model is not None:
        return _hugging_face(model)
    if kind in (None, "GPT2BPETokenizer") and vocab is not None:
        return len(_entries(vocab, "--vocab-file") | {"<|endoftext|>": 0})
    if kind in ("BertWordPieceLowerCase", "BertWordPieceCase") and vocab is not None:
        return _bert(kind, vocab, values, core)
    return None


def _path(values: Mapping[str, Any], key: str) -> Path | None:
    """Returns the file or folder that a flag names, if it exists."""
    name = values.get(key)
    if not name:
        return None
    path = Path(name)
    try:
        return path if path.exists() else None
    except (OSError, ValueError):
        return None


def _refused(flag: str, path: Path, what: str) -> InputError:
    return InputError(f"{flag} {shortened(str(path), 120)}: {what}. Give the tokenizer's own file, or --vocab-size.")


def _bytes(path: Path, flag: str) -> bytes:
    try:
        content = path.read_bytes() if path.is_file() and path.stat().st_size <= _LARGEST else None
    except OSError as error:
        raise _refused(flag, path, f"cannot be read ({error.strerror})") from None
    if content is None:
        raise _refused(flag, path, "no file of a tokenizer")
    return content


def _json(path: Path, flag: str) -> Any:
    content = _bytes(path, flag)
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        raise _refused(flag, path, "not JSON") from None


def _entries(path: Path, flag: str) -> dict[str, Any]:
    """Returns a JSON file of entry → number."""
    content = _json(path, flag)
    if not isinstance(content, dict) or not content or not all(_is_number(value) for value in content.values()):
        raise _refused(flag, path, "no vocabulary (entry → number)")
    return content


def _is_number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _tiktoken(values: Mapping[str, Any], model: Path | None) -> int:
    """Megatron takes the first of the file's entries, behind the special ones, until it has so many."""
    size = int(values.get("vocab_size") or TIKTOKEN_DEFAULT)
    if model is not None and model.is_file():
        content = _json(model, "--tokenizer-model")
        wanted = size - int(values.get("tiktoken_num_special_tokens") or 0)
        if not isinstance(content, list) or not all(isinstance(entry, dict) and "rank" in entry for entry in content):
            raise _refused("--tokenizer-model", model, "no vocabulary of TikTokenizer (a list of ranks)")
        if len(content) < wanted:
            raise InputError(
                f"--tokenizer-model {model}: has {len(content)} entries, and TikTokenizer takes {wanted}: Megatron "
                "refuses it. Give --vocab-size on the line."
            )
    return size


def _bert(kind: str, path: Path, values: Mapping[str, Any], core: tuple[int, int] | None) -> int:
    words = _lines(path, "--vocab-file")
    if core is not None and core < (0, 17):
        return len(words | {"[CLS]", "[SEP]", "[PAD]", "[MASK]", "[BOS]", "[EOS]"}) + int(
            values["vocab_extra_ids"] or 0
        )
    extra = {f"<extra_id_{index}>" for index in range(_BERT_EXTRA if kind == "BertWordPieceCase" else 0)}
    return len(words | extra)


def _lines(path: Path, flag: str) -> set[str]:
    content = _bytes(path, flag)
    try:
        # Not splitlines: a vocabulary may have separators of lines among its entries.
        words = {line.removesuffix("\r") for line in content.decode("utf-8").split("\n")}
    except UnicodeDecodeError:
        raise _refused(flag, path, "not UTF-8 text") from None
    return words - {""}


# ---- Hugging Face --------------------------------------------------------------------------------------------------


def _hugging_face(path: Path) -> int | None:
    """Returns what `len` of such a tokenizer is: its model's entries and all that are listed beside them."""
    flag = "--tokenizer-model"
    folder = path if path.is_dir() else path.parent
    config = _optional(folder / "tokenizer_config.json", flag)
    if config.get("auto_map"):
        return None  # code of its own decides
    entries = _own_entries(path, folder, config, flag)
    if entries is None:
        return None
    listed = _optional(folder / "added_tokens.json", flag)
    return len(entries | set(listed) | set(_special(config)) | set(_special(_optional(folder / _MAP, flag))))


_MAP = "special_tokens_map.json"


def _optional(path: Path, flag: str) -> dict[str, Any]:
    if not path.is_file():
        return {}
    content = _json(path, flag)
    if not isinstance(content, dict):
        raise _refused(flag, path, "no keys and values")
    return content


def _own_entries(path: Path, folder: Path, config: Mapping[str, Any], flag: str) -> set[str] | None:
    whole = path if path.is_file() else folder / "tokenizer.json"
    if path.is_file() and path.suffix != ".json":
        return None
    if whole.is_file():
        return _of_tokenizer_json(whole, flag)
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return set(_entries(folder / "vocab.json", flag))
    if (folder / "vocab.txt").is_file():
        return _lines(folder / "vocab.txt", flag)
    if (folder / "tokenizer.model").is_file() and config.get("tokenizer_class") in _OF_SENTENCEPIECE:
        return set(_sentencepiece(folder / "tokenizer.model", flag))
    return None


def _of_tokenizer_json(path: Path, flag: str) -> set[str]:
    content = _json(path, flag)
    model = content.get("model") if isinstance(content, dict) else None
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocab, list) and all(isinstance(pair, list) and pair and isinstance(pair[0], str) for pair in vocab):
        entries = {pair[0] for pair in vocab}
        if len(entries) != len(vocab):
            raise _refused(flag, path, "the same entry twice")
    elif isinstance(vocab, dict):
        entries = set(vocab)
    else:
        raise _refused(flag, path, "no vocabulary in it")
    added = content.get("added_tokens") or []
    if not isinstance(added, list):
        raise _refused(flag, path, "added_tokens is no list")
    entries |= {
        token["content"] for token in added if isinstance(token, dict) and isinstance(token.get("content"), str)
    }
    if not entries:
        raise _refused(flag, path, "no vocabulary in it")
    return entries


def _special(config: Mapping[str, Any]) -> Iterator[str]:
    """Yields the tokens that a configuration of a tokenizer lists, which are added where they are missing."""
    named = [value for key, value in config.items() if key.endswith("_token")]
    for key in ("additional_special_tokens", "extra_special_tokens", "added_tokens_decoder"):
        value = config.get(key)
        named += [*value.values()] if isinstance(value, dict) else value if isinstance(value, list) else []
    for token in named:
        content = token.get("content") if isinstance(token, dict) else token
        if isinstance(content, str):
            yield content


# ---- sentencepiece -------------------------------------------------------------------------------------------------

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def _sentencepiece(path: Path, flag: str) -> list[str]:
    """Returns the pieces of a sentencepiece model: field 1 of its `ModelProto`, each with its text in field 1."""
    content = _bytes(path, flag)
    try:
        pieces = [
            next((text.decode("utf-8") for number, text in _fields(piece) if number == 1), "")
            for number, piece in _fields(content)
            if number == 1
        ]
    except (IndexError, ValueError):
        raise _refused(flag, path, "no sentencepiece model") from None
    if not pieces:
        raise _refused(flag, path, "no sentencepiece model")
    return pieces


def _fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """Yields the fields of a protobuf message that hold bytes, with their numbers; others are stepped over.

    Raises:
        ValueError, IndexError: it is none.
    """
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        kind = key & 7
        if kind == _VARINT:
            _, at = _varint(message, at)
        elif kind == _BYTES:
            length, at = _varint(message, at)
            if at + length > len(message):
                raise ValueError("cut short")
            yield key >> 3, message[at : at + length]
            at += length
        elif kind in (_FIXED32, _FIXED64):
            at += 4 if kind == _FIXED32 else 8
        else:
            raise ValueError("unknown kind of field")
    if at > len(message):
        raise ValueError("cut short")


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise ValueError("no number")
