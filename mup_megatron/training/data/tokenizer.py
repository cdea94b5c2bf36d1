"""Text → token ids, with the `tokenizers` library. Nothing is ever downloaded.

Three kinds, all the library's own: plain bytes, a byte-level BPE trained on the data themselves, or a `tokenizer.json`.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from mup_megatron.errors import InputError
from mup_megatron.files import read_text
from mup_megatron.validation import brief

EOD_TOKEN = "<|endoftext|>"
DEFAULT_TOKENIZER = "bpe:1024"
"""Small, because embedding and readout of a narrow model cost vocabulary × width: at width 64 more than its layers."""

_KNOWN_EODS = (EOD_TOKEN, "<|end_of_text|>", "<eod>", "<eos>", "</s>")
_BYTES = 256
_MOST_TOKENS = 1 << 20
"""Four times what the largest tokenizers of language models have; a larger one, or an id beyond, only takes memory."""
_FORMS = (
    "Use `byte`, `bpe:VOCAB` (like bpe:1024), or the path of a tokenizer.json file; names are not looked up online."
)


@dataclass(frozen=True)
class TokenizerSpec:
    """The tokenizer that a user asks for with `--tokenizer`."""

    text: str
    """As written."""
    kind: Literal["byte", "bpe", "file"]
    vocab_size: int | None = None
    """How many tokens a BPE is to have, the end of a document included. Fewer come out where the text has no more."""


@dataclass(frozen=True)
class TextTokenizer:
    """A tokenizer and the token that ends a document."""

    inner: Tokenizer
    eod: int
    vocab_size: int
    """One more than the highest id, so the smallest `vocab_size` of a model that can read the data."""
    source: str = "--tokenizer"
    """What it is called in messages."""

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the ids of every text, without the end of document. Nothing in a text is taken for a special token.

        Raises:
            InputError: the tokenizer cannot; that of a file may lack what it needs for a text.
        """
        with _library(self.source, "cannot tokenize the text"):
            return [encoding.ids for encoding in self.inner.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of some ids; special tokens are shown as they are spelled."""
        text: str = self.inner.decode(list(ids), skip_special_tokens=False)
        return text

    def to_json(self) -> str:
        """Returns the content of a `tokenizer.json`."""
        text: str = self.inner.to_str(pretty=True)
        return text


def parse_tokenizer(text: str) -> TokenizerSpec:
    """Parses `byte`, `bpe:VOCAB` or the name of a file.

    Raises:
        InputError: none of the three.
    """
    if text == "byte":
        return TokenizerSpec(text, "byte")
    if text.startswith("bpe:"):
        number = text.removeprefix("bpe:")
        short = number.isascii() and number.isdigit() and len(number) <= len(str(_MOST_TOKENS))
        if not short or not _BYTES < int(number) <= _MOST_TOKENS:
            raise InputError(
                f"--tokenizer {brief(text, 40)}: the vocabulary must be a whole number of at least {_BYTES + 1} "
                f"(every byte and the end of a document) and at most {_MOST_TOKENS}. {_FORMS}"
            )
        return TokenizerSpec(text, "bpe", int(number))
    if not _is_file(text):
        raise InputError(f"--tokenizer {brief(text)}: there is no such file. {_FORMS}")
    return TokenizerSpec(text, "file")


def make_tokenizer(
    spec: TokenizerSpec, texts: Callable[[], Iterable[str]], *, eod_token: str | None = None
) -> TextTokenizer:
    """Makes the tokenizer asked for. Equal texts give an equal tokenizer, whatever the number of threads.

    Args:
        spec: which one.
        texts: what a BPE is trained on; not called for the others.
        eod_token: the token that ends a document, for a file whose own is not among the usual ones.

    Raises:
        InputError: the file is no tokenizer, or lacks an end of document.
    """
    match spec.kind:
        case "byte":
            return _with_eod(_byte_tokenizer(), EOD_TOKEN)
        case "bpe":
            return _with_eod(_train_bpe(texts(), spec.vocab_size or 0), EOD_TOKEN)
        case "file":
            return load_tokenizer(Path(spec.text), eod_token=eod_token)


def load_tokenizer(path: Path, *, eod_token: str | None = None) -> TextTokenizer:
    """Reads a `tokenizer.json` in the format of the `tokenizers` library, such as PREFIX.tokenizer.json.

    Raises:
        InputError: the file is missing, is no tokenizer, or lacks an end of document.
    """
    text = read_text(path, remedy=_FORMS)
    with _library(str(path), "not a tokenizer in the format of the `tokenizers` library"):
        inner = Tokenizer.from_str(text)
        # A file may ask to cut or fill texts to the length of some model. Data are not for one model.
        inner.no_truncation()
        inner.no_padding()
    candidates = (eod_token,) if eod_token else _KNOWN_EODS
    for candidate in candidates:
        if inner.token_to_id(candidate) is not None:
            return _with_eod(inner, candidate, source=str(path))
    raise InputError(
        f"{path}: none of its tokens is {' or '.join(candidates)}, so a document has no end. "
        "Name the token that ends one with --eod-token."
    )


def _with_eod(inner: Tokenizer, token: str, *, source: str = "--tokenizer") -> TextTokenizer:
    # A text that spells a special token means the letters.
    inner.encode_special_tokens = True
    eod = inner.token_to_id(token)
    assert eod is not None
    vocab_size = max(inner.get_vocab().values()) + 1
    if vocab_size > _MOST_TOKENS:
        raise InputError(
            f"{source}: has the id {vocab_size - 1}; the last that is possible is {_MOST_TOKENS - 1}. Correct it."
        )
    return TextTokenizer(inner, eod, vocab_size, source)


@contextmanager
def _library(source: str, what: str) -> Iterator[None]:
    """Turns what the library raises into an InputError that says `what` is wrong with `source`."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # a plain Exception, or a panic of its Rust code, which is none
        raise InputError(f"{source}: {what} ({brief(error)}). {_FORMS}") from None


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except (OSError, ValueError):  # too long for a name, or with a NUL
        return False


def _byte_level(model: models.Model) -> Tokenizer:
    inner = Tokenizer(model)
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return inner


def _train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    inner = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOD_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    return inner


def _byte_tokenizer() -> Tokenizer:
    """Returns a BPE without merges: a token's id is the byte's value, and 256 ends a document."""
    vocabulary = {letter: value for value, letter in enumerate(_byte_letters())}
    inner = _byte_level(models.BPE(vocab=vocabulary, merges=[]))
    inner.add_special_tokens([EOD_TOKEN])
    return inner


def _byte_letters() -> list[str]:
    """The letter by which byte-level tokenizers write each byte: itself where it can be seen, else one past U+00FF."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = iter(range(_BYTES, 2 * _BYTES))
    return [chr(value if value in visible else next(hidden)) for value in range(_BYTES)]
