"""A tokenizer's files, which go with an exported model, and the special tokens that its configuration names."""

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mup_megatron.errors import InputError
from mup_megatron.files import require_ordinary
from mup_megatron.readback import read_json

_WHOLE = "tokenizer.json"
_SETTINGS = "tokenizer_config.json"
_VOCABULARIES = (_WHOLE, "tokenizer.model", "vocab.json")
_SPECIAL_MAP = "special_tokens_map.json"
_OTHERS = (_SETTINGS, _SPECIAL_MAP, "added_tokens.json", "merges.txt", "chat_template.jinja")
_SPECIAL = ("bos_token", "eos_token", "pad_token")
_ENDS = ("<|endoftext|>", "<|end_of_text|>", "<eod>", "<eos>", "</s>")
"""Tokens that end a document, of a tokenizer that does not say which does."""


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """The files of a tokenizer."""

    files: Mapping[str, Path]
    """Name → where it lies."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The content of `tokenizer_config.json`; written where none lies there."""
    special_ids: Mapping[str, int] = field(default_factory=dict)
    """The numbers of special tokens, as a model's configuration calls them."""
    size: int = 0
    """One more than the highest number of a token; 0 where no file says it openly."""

    def require_within(self, vocab_size: int) -> None:
        """Raises InputError if it has tokens that a model of this vocabulary does not know."""
        if self.size > vocab_size:
            raise InputError(
                f"--tokenizer: its tokens have numbers up to {self.size - 1}, and the model's vocab_size is "
                f"{vocab_size}. Give the tokenizer that the run's data were made with."
            )

    def write(self, folder: Path) -> None:
        """Copies the files into a folder."""
        for name, path in self.files.items():
            shutil.copyfile(path, folder / name)
        if _SETTINGS not in self.files:
            (folder / _SETTINGS).write_text(json.dumps(self.settings, indent=2) + "\n", encoding="utf-8")


def read_tokenizer(path: Path) -> Tokenizer:
    """Returns the tokenizer of a folder, or of one file in the format of `tokenizer.json`.

    Raises:
        InputError: there is no vocabulary, or a file is damaged, a pipe or a device.
    """
    names = (*_VOCABULARIES, *_OTHERS)
    files = {_WHOLE: path} if path.is_file() else {name: path / name for name in names if (path / name).exists()}
    if not any(name in _VOCABULARIES for name in files):
        raise InputError(
            f"--tokenizer {path}: no {', '.join(_VOCABULARIES)} there. Give the folder of a tokenizer of transformers, "
            "or a tokenizer.json."
        )
    for each in files.values():
        require_ordinary(each)
    whole = read_json(files[_WHOLE]) if _WHOLE in files else {}
    added = _added(whole)
    ids = {**_open(whole), **_flat(files), **added}
    if _SETTINGS in files:
        settings = _mapping(read_json(files[_SETTINGS]))
    else:
        end = next((token for token in _ENDS if token in added), None)
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", **({} if end is None else {"eos_token": end})}
    said = {**_mapping(read_json(files[_SPECIAL_MAP]) if _SPECIAL_MAP in files else {}), **settings}
    texts = {f"{kind}_id": _text(said.get(kind)) for kind in _SPECIAL}
    special = {key: ids[text] for key, text in texts.items() if text in ids}
    return Tokenizer(files, settings, special, size=max(ids.values(), default=-1) + 1)


def _text(token: object) -> str:
    found = token.get("content") if isinstance(token, Mapping) else token
    return found if isinstance(found, str) else ""


def _mapping(content: object) -> Mapping[str, Any]:
    return content if isinstance(content, dict) else {}


def _flat(files: Mapping[str, Path]) -> Mapping[str, int]:
    """Returns the numbers of tokens in files of nothing else."""
    names = [name for name in ("vocab.json", "added_tokens.json") if name in files]
    return _whole_numbers([pair for name in names for pair in _mapping(read_json(files[name])).items()])


def _open(whole: object) -> Mapping[str, int]:
    """Returns the numbers of the vocabulary in a `tokenizer.json`: said of each token, or its place in a list."""
    found = _mapping(_mapping(whole).get("model")).get("vocab")
    if isinstance(found, list):
        return {str(each[0]): number for number, each in enumerate(found) if isinstance(each, list) and each}
    return _whole_numbers(_mapping(found).items())


def _added(whole: object) -> Mapping[str, int]:
    """Returns the numbers of the tokens that a `tokenizer.json` adds to its vocabulary, special ones among them."""
    found = _mapping(whole).get("added_tokens")
    given = [each for each in found if isinstance(each, dict)] if isinstance(found, list) else []
    return _whole_numbers((str(each.get("content")), each.get("id")) for each in given)


def _whole_numbers(pairs: Iterable[tuple[str, object]]) -> Mapping[str, int]:
    return {text: number for text, number in pairs if type(number) is int}
