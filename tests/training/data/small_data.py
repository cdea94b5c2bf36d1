"""Small texts, and data made of them."""

from pathlib import Path

from mup_megatron.training.data.documents import documents, scan
from mup_megatron.training.data.prefix import SUFFIXES, DataMeta, at
from mup_megatron.training.data.tokenizer import make_tokenizer, parse_tokenizer
from mup_megatron.training.data.writing import write_data

WORDS = ("the", "width", "of", "a", "layer", "grows", "and", "its", "learning", "rate", "falls")


def text(number: int, words: int = 150) -> str:
    """Some text, another one for every number."""
    return (
        " ".join(WORDS[(number + 7 * k + k * k // 3) % len(WORDS)] + str(k * number % 13) for k in range(words)) + "\n"
    )


def make_data(folder: Path, *, files: int = 12, tokenizer: str = "byte", name: str = "data") -> tuple[Path, DataMeta]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number}.txt" for number in range(files)]
    for number, path in enumerate(paths):
        path.write_text(text(number))
    sources = scan(paths)
    made = make_tokenizer(parse_tokenizer(tokenizer), lambda: documents(sources))
    prefix = folder / name
    return prefix, write_data(prefix, documents(sources), made, sources=sources, spec=tokenizer, force=True)


def files_at(prefix: Path) -> dict[str, bytes]:
    return {suffix: at(prefix, suffix).read_bytes() for suffix in SUFFIXES if at(prefix, suffix).exists()}
