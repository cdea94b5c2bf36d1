"""Tensors of a user's own layers (`--spec`), listed in a model file: names, sides, role and start. Runs no code."""

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from mup_megatron.errors import InputError
from mup_megatron.validation import Strict, added, brief

EVERY_LAYER = ".layers.*."
"""Within a name: the same in each layer of the stack before it."""
_NAME = re.compile(r"[A-Za-z_]\w*(?:\.layers\.\*)?(?:\.[A-Za-z_]\w*|\.\d+)+")
_ONE_LAYER = re.compile(r"\.layers\.\d")
_LARGEST = 10**12
_Text = Annotated[str, Field(min_length=1, max_length=200)]


class CustomSide(Strict):
    """A side of a tensor that says itself whether it grows with width."""

    size: _Text | int
    grows: bool


def _form(value: Any) -> str:
    if isinstance(value, str):
        return "(text)"
    return "(side)" if isinstance(value, Mapping | CustomSide) else "(number)"


_BY_FORM = Discriminator(_form)
_Size = Annotated[Annotated[int, Tag("(number)")] | Annotated[_Text, Tag("(text)")], _BY_FORM]
_Side = Annotated[
    Annotated[int, Tag("(number)")] | Annotated[_Text, Tag("(text)")] | Annotated[CustomSide, Tag("(side)")], _BY_FORM
]
_Value = Annotated[Annotated[float, Tag("(number)")] | Annotated[Literal["normal", "kept"], Tag("(text)")], _BY_FORM]


class CustomTensor(Strict):
    """A parameter that no family of layers has.

    A size is a number, a key of the model file, or a product of them: `2*hidden_size`.
    A side grows if a key of it is a width, or differs between base and target; a `CustomSide` says so itself.
    """

    name: _Text
    """Global, as in `decoder.gate`; `layers.*` for every layer: `decoder.layers.*.self_attention.gate.weight`."""
    within: _Text | None = None
    """The layers meant by `layers.*`: those with such a part, as attention, latent attention, cross attention, mlp,
    experts or mamba. Default: all."""
    fan_out: _Side
    fan_in: _Side | None = None
    """None for a vector, which adds to something or multiplies it."""
    shape: Annotated[tuple[_Size, ...], Field(strict=False, min_length=1, max_length=8)] | None = None
    """Default: [fan_out, fan_in], of a vector [fan_out]."""
    role: Literal["input", "hidden", "output", "scalar"] | None = None
    """Where the sides do not say it."""
    residual: bool = False
    """Whether it writes into the residual stream, and is drawn as Megatron draws what does."""
    start: _Value = "normal"
    """`normal`: drawn with the configuration's init method; `kept`: as the layer itself draws it; or a constant."""

    @model_validator(mode="after")
    def _possible(self) -> "CustomTensor":
        if _ONE_LAYER.search(self.name):
            raise ValueError(f"{self.name}: layers cannot be named one by one. Write layers.* for every layer.")
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"{self.name}: no name of a parameter, such as decoder.layers.*.mlp.gate.weight.")
        if self.within is not None and EVERY_LAYER not in self.name:
            raise ValueError(f"{self.name}: within {self.within} is for names with layers.*. Remove it.")
        if self.fan_in is None and self.start == "normal":
            raise ValueError(f"{self.name}: a vector is not drawn. Give start: a number, or kept; or give fan_in.")
        return self

    @property
    def sizes(self) -> Sequence[int | str]:
        """All sizes that it names."""
        sides = (self.fan_out, *(() if self.fan_in is None else (self.fan_in,)))
        return [*(each.size if isinstance(each, CustomSide) else each for each in sides), *(self.shape or ())]


class CustomList(Strict):
    """The tensors of a model's own layers."""

    custom_tensors: Annotated[tuple[CustomTensor, ...], Field(strict=False)] = added("0.2", ())


class CustomKeys(CustomList):
    """The same of a model file, whose keys their sizes name."""

    @model_validator(mode="after")
    def _sizes_are_keys(self) -> "CustomKeys":
        for tensor in self.custom_tensors:
            for size in tensor.sizes:
                size_in(self, size)
        names = [tensor.name for tensor in self.custom_tensors]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"custom_tensors: {twice} is listed twice. Remove one.")
        return self


def size_in(model: Any, size: int | str) -> int:
    """Returns what a size means in a model file.

    Raises:
        InputError: a word of it is neither a number nor a key whose value is one, or the whole is too large.
    """
    found = 1
    for word in words_of(size):
        known = word in type(model).model_fields
        value = int(word) if word.isdecimal() else model.value_of(word) if known else None
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InputError(
                f"custom_tensors: '{brief(size, 80)}' is no size: '{brief(word, 80)}' is no key with a whole number. "
                "Correct it."
            )
        found *= value
    if found > _LARGEST:
        raise InputError(f"custom_tensors: '{brief(size, 80)}': no tensor has so large a side. Correct it.")
    return found


def words_of(size: int | str) -> list[str]:
    """Returns the numbers and keys whose product a size is."""
    return [word.strip() for word in str(size).split("*")]
