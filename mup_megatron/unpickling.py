"""Files in the pickle format, read without running what they ask for. Nothing else in the package unpickles a file.

A pickle names classes and functions, and calls them while it is read. Here they are looked up in a list of what the
format needs; anything else ends the reading by its name, before it is imported or called. A hash in a manifest beside a
file is no substitute: whoever can write the one can write the other.
"""

import contextlib
import pickle
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from mup_megatron.errors import InputError
from mup_megatron.validation import brief

_NAMED = re.compile(r"GLOBAL\s+([\w.]+)")
"""How torch's own reader names what it refuses."""


class _UnexpectedClassError(pickle.UnpicklingError):
    """A pickle names something that is not on the list."""


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: IO[bytes], allowed: Mapping[str, Collection[str]]) -> None:
        super().__init__(stream)
        self._allowed = allowed

    def find_class(self, module: str, name: str) -> Any:
        if name not in self._allowed.get(module, ()):
            raise _UnexpectedClassError(f"GLOBAL {module}.{name}")
        return super().find_class(module, name)


def read_pickle(stream: IO[bytes], allowed: Mapping[str, Collection[str]], *, source: str, remedy: str) -> object:
    """The object that a pickle holds.

    Args:
        stream: the pickle.
        allowed: module → names of the classes and functions in it that may be called.
        source: what the pickle is called in messages.
        remedy: what to do about it, as a sentence.

    Raises:
        InputError: it names something else, is truncated or no pickle.
    """
    try:
        return _Unpickler(stream, allowed).load()
    except Exception as error:  # besides its own errors, whatever the classes raise when they are given something odd
        raise not_read(error, source=source, remedy=remedy) from None


def read_torch(file: IO[bytes] | Path, *, source: str, remedy: str, **more: Any) -> Any:
    """What `torch.save` wrote: tensors and plain values, and what `torch.serialization.add_safe_globals` names.

    Args:
        file: a stream, or a file's path.
        source: what it is called in messages.
        remedy: what to do about it, as a sentence.
        more: arguments of `torch.load`.

    Raises:
        InputError: it holds something else, is truncated or not torch's.
    """
    import torch

    try:
        return torch.load(file, map_location="cpu", weights_only=True, **more)
    except Exception as error:  # torch, zipfile and pickle raise whatever they like
        raise not_read(error, source=source, remedy=remedy) from None


def not_read(error: BaseException, *, source: str, remedy: str) -> InputError:
    """The sentence for what ended the reading of a pickle, by whatever library; names an unexpected class."""
    found = _NAMED.search(str(error))
    if found is not None:
        return InputError(
            f"{source}: holds {brief(found[1], 80)}, which is not part of such a file and may run code. "
            f"Nothing of it was run. {remedy}"
        )
    # What torch says at length about `weights_only` is advice to run the file after all.
    what = "" if "weights_only" in str(error) else brief(error, 80)
    return InputError(f"{source}: damaged ({type(error).__name__}{': ' if what else ''}{what}). {remedy}")


@contextlib.contextmanager
def torch_loads_only_tensors() -> Iterator[None]:
    """For the time of a library's call, every `torch.load` within it reads tensors and plain values alone.

    Libraries that load checkpoints ask for more than they need: torch's own planner does, for whatever is no tensor.
    """
    import torch

    before = torch.load

    def load(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop("pickle_module", None)
        return before(*args[:2], **{**kwargs, "weights_only": True})

    torch.load = load
    try:
        yield
    finally:
        torch.load = before
