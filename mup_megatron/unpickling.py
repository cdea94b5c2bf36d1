"""Files in the pickle format, read without running what they ask for. Nothing else in the package unpickles a file.

A pickle names classes and functions, and calls them while it is read. Here they are looked up in a list of what the
format needs; anything else ends the reading by its name, before it is imported or called. A hash in a manifest beside a
file is no substitute: whoever can write the one can write the other.
"""

import contextlib
import enum
import pickle
import re
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, ClassVar

from mup_megatron.errors import InputError
from mup_megatron.validation import brief

_NAMED = re.compile(r"GLOBAL\s+([\w.]+)")
"""How torch's own reader names what it refuses."""


class _UnexpectedClassError(pickle.UnpicklingError):
    """A pickle names something that is not on the list."""


class _Unpickler(pickle._Unpickler):
    """Changes nothing but what it has made: what was looked up belongs to the process, and so do members of an enum.

    Python's own, because the one in C cannot be told apart by instruction.
    """

    dispatch: ClassVar[dict[int, Callable[..., None]]] = {**pickle._Unpickler.dispatch}
    stack: list[Any]
    metastack: list[list[Any]]

    def __init__(self, stream: IO[bytes]) -> None:
        super().__init__(stream)
        self._looked_up: dict[int, Any] = {}

    def looked_up(self, found: Any) -> Any:
        """Returns what a name stands for; remembers it."""
        self._looked_up[id(found)] = found
        return found

    def require_own(self, changed: Any) -> None:
        """Raises UnpicklingError unless an object may be changed."""
        if id(changed) in self._looked_up or isinstance(changed, enum.Enum):
            raise pickle.UnpicklingError(f"it would change {brief(changed, 60)} itself")


def _guarded(code: bytes, target: Callable[[_Unpickler], Any]) -> None:
    plain: Callable[[Any], None] = pickle._Unpickler.dispatch[code[0]]

    def load(unpickler: _Unpickler) -> None:
        unpickler.require_own(target(unpickler))
        plain(unpickler)

    _Unpickler.dispatch[code[0]] = load


_guarded(pickle.BUILD, lambda unpickler: unpickler.stack[-2])
_guarded(pickle.APPEND, lambda unpickler: unpickler.stack[-2])
_guarded(pickle.SETITEM, lambda unpickler: unpickler.stack[-3])
for _code in (pickle.APPENDS, pickle.SETITEMS, pickle.ADDITEMS):
    _guarded(_code, lambda unpickler: unpickler.metastack[-1][-1])


class _ListedOnly(_Unpickler):
    def __init__(self, stream: IO[bytes], allowed: Mapping[str, Collection[str]]) -> None:
        super().__init__(stream)
        self._allowed = allowed

    def find_class(self, module: str, name: str) -> Any:
        if name not in self._allowed.get(module, ()):
            raise _UnexpectedClassError(f"GLOBAL {module}.{name}")
        return self.looked_up(super().find_class(module, name))


class StandIn:
    """An object in the place of whatever is no plain value. It takes all that a pickle does to it, and is inert."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "StandIn":
        """Another one, also where a stand-in is in a class's place."""
        return object.__new__(StandIn)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Keeps nothing."""

    def __call__(self, *args: Any, **kwargs: Any) -> "StandIn":
        """Another one."""
        return StandIn()

    def _ignore(self, *args: Any) -> None: ...

    __setstate__ = __setitem__ = append = extend = add = _ignore


class _PlainOnly(_Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return self.looked_up(StandIn)

    def persistent_load(self, pid: Any) -> Any:
        return StandIn()


def read_pickle(stream: IO[bytes], allowed: Mapping[str, Collection[str]], *, source: str, remedy: str) -> object:
    """Reads the object that a pickle holds.

    Args:
        stream: the pickle.
        allowed: module → names of the classes and functions in it that may be called.
        source: what the pickle is called in messages.
        remedy: what to do about it, as a sentence.

    Raises:
        InputError: it names something else, is truncated or no pickle.
    """
    try:
        return _ListedOnly(stream, allowed).load()
    except Exception as error:  # besides its own errors, whatever the classes raise when they are given something odd
        raise not_read(error, source=source, remedy=remedy) from None


def read_torch(stream: IO[bytes] | Path, *, source: str, remedy: str) -> Any:
    """Reads what `torch.save` wrote: tensors and plain values, and what `torch.serialization.add_safe_globals` names.

    Args:
        stream: where it begins; of a file's path, tensors are read once they are used.
        source: what it is called in messages.
        remedy: what to do about it, as a sentence.

    Raises:
        InputError: it holds something else, is truncated or not torch's.
    """
    import torch

    try:
        # Torch's format before zip files cannot be mapped.
        mapped = isinstance(stream, Path) and zipfile.is_zipfile(stream)
        return torch.load(stream, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # torch, zipfile and pickle raise whatever they like
        raise not_read(error, source=source, remedy=remedy) from None


_BEFORE_ZIP = 3
"""Pickles before that of the object, in torch's format before zip files."""


def read_plain_values(path: Path, *, remedy: str) -> object:
    """Reads the plain values in a file of `torch.save`'s; all else in it, tensors too, is a `StandIn`.

    For files that anything may be in, of which one entry is looked at: no class is imported, and of weights nothing is
    read.

    Args:
        path: the file.
        remedy: what to do about a damaged one, as a sentence.

    Raises:
        InputError: it cannot be read, is truncated or not torch's.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
                with archive.open(name) as stream:
                    return _PlainOnly(stream).load()
        with path.open("rb") as stream:
            for _ in range(_BEFORE_ZIP):
                _PlainOnly(stream).load()
            return _PlainOnly(stream).load()
    except Exception as error:  # zipfile and pickle raise whatever they like
        raise not_read(error, source=str(path), remedy=remedy) from None


def not_read(error: BaseException, *, source: str, remedy: str) -> InputError:
    """Returns the error for what ended the reading of a pickle, by whatever library; names an unexpected class."""
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
