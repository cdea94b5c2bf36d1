"""A tokenizer's files, which go with an exported model, and the special tokens that its configuration names."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mup_megatron.errors import InputError
from mup_megatron.files import require_ordinary
from mup_megatron.readback import read_json

_WHOLE = "tokenizer.json"
_SETTINGS = "tokenizer_config.json"
_VOCABULARIES = (_WHOLE, "tokenizer.model", "vocab.json")
_OTHERS = (_SETTINGS, "special_tokens_map.json", "added_tokens.json", "merges.txt", "chat_template.jinja")
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
    ids = _numbered(files)
    if _SETTINGS in files:
        content = read_json(files[_SETTINGS])
        settings = content if isinstance(content, dict) else {}
    else:
        end = next((token for token in _ENDS if token in ids), None)
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", **({} if end is None else {"eos_token": end})}
    texts = {f"{kind}_id": _text(settings.get(kind)) for kind in _SPECIAL}
    return Tokenizer(files, settings, {key: ids[text] for key, text in texts.items() if text in ids})


def _text(token: object) -> str:
    found = token.get("content") if isinstance(token, Mapping) else token
    return found if isinstance(found, str) else ""


def _numbered(files: Mapping[str, Path]) -> Mapping[str, int]:
    """Returns the numbers of added tokens, and of a vocabulary that lies open."""
    ids: dict[str, object] = {}
    for name in ("vocab.json", "added_tokens.json"):
        content = read_json(files[name]) if name in files else {}
        ids |= content if isinstance(content, dict) else {}
    whole = read_json(files[_WHOLE]) if _WHOLE in files else {}
    added = whole.get("added_tokens") if isinstance(whole, dict) else None
    for each in added if isinstance(added, list) else ():
        if isinstance(each, dict):
            ids[str(each.get("content"))] = each.get("id")
    return {text: number for text, number in ids.items() if type(number) is int}
