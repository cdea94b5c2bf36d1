"""The tensors that a model file lists itself (`custom_tensors`), as the rules see them."""

import math
from collections.abc import Iterator, Mapping, Sequence, Set

from mup_megatron.architectures.families import Family, Growth
from mup_megatron.architectures.keys.custom import EVERY_LAYER, CustomSide, CustomTensor, size_in, words_of
from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.architectures.names import layer_of
from mup_megatron.errors import InputError
from mup_megatron.theory import Constant, Kept, Normal, Property, Role, Side, Start, Tensor


def custom_tensors(
    model: ModelFile, stacks: Mapping[str, Sequence[Sequence[Family]]], growth: Growth, widths: Set[str]
) -> Iterator[Tensor]:
    """Yields them, those of every layer once for each.

    Args:
        model: a model file.
        stacks: the families of each layer, of each of its stacks by name.
        growth: of the base and the target that it is compared with.
        widths: keys of the model file that grow at whatever base.

    Raises:
        InputError: sides and shape do not fit each other, or no layer is meant.
    """
    for own in model.custom_tensors:
        names = list(_names(own, stacks))
        if not names:
            meant = "the model has no such stack of layers" if own.within is None else f"no layer has {own.within}"
            raise InputError(
                f"custom_tensors: {own.name}: {meant}. Correct {'name' if own.within is None else 'within'}."
            )
        for name in names:
            yield _tensor(own, name, model, growth, widths)


def _names(own: CustomTensor, stacks: Mapping[str, Sequence[Sequence[Family]]]) -> Iterator[str]:
    if EVERY_LAYER not in own.name:
        yield own.name
        return
    stack, _, _ = own.name.partition(EVERY_LAYER)
    for index, families in enumerate(stacks.get(stack, ())):
        if own.within is None or own.within in {family.name for family in families}:
            yield own.name.replace(EVERY_LAYER, f".layers.{index}.")


def _tensor(own: CustomTensor, name: str, model: ModelFile, growth: Growth, widths: Set[str]) -> Tensor:
    fan_out = _side(own.fan_out, model, growth, widths)
    fan_in = Side(1) if own.fan_in is None else _side(own.fan_in, model, growth, widths)
    default = (fan_out.size,) if own.fan_in is None else (fan_out.size, fan_in.size)
    shape = default if own.shape is None else tuple(size_in(model, each) for each in own.shape)
    if math.prod(shape) % (fan_in.size * fan_out.size):
        raise InputError(
            f"custom_tensors: {own.name}: a shape of {shape} is no whole number of matrices from {fan_in.size} to "
            f"{fan_out.size}. Correct shape, fan_in or fan_out."
        )
    if own.start == "kept" and fan_in.grows:
        raise InputError(
            f"custom_tensors: {own.name}: kept, its start does not follow its fan_in, which grows with width. Let the "
            "layer draw it with the configuration's init_method, and say start: normal."
        )
    # Nothing is known of the module around it, at which a factor of it alone could act: its own is folded.
    properties = {Property.FOLDED}
    if own.fan_in is None:
        properties = {Property.VECTOR}
    if own.residual:
        properties.add(Property.RESIDUAL)
    stack = layer_of(name)
    return Tensor(
        name=name,
        shape=shape,
        fan_in=fan_in,
        fan_out=fan_out,
        properties=frozenset(properties),
        declared_role=None if own.role is None else Role(own.role),
        stack="" if stack is None else stack[0],
        start=_start(own),
    )


def _side(said: int | str | CustomSide, model: ModelFile, growth: Growth, widths: Set[str]) -> Side:
    size = said.size if isinstance(said, CustomSide) else said
    if isinstance(said, CustomSide):
        return Side(size_in(model, size), grows=said.grows)
    is_width = not widths.isdisjoint(words_of(size))
    return Side(size_in(model, size), grows=is_width or size_in(growth.base, size) != size_in(growth.target, size))


def _start(own: CustomTensor) -> Start:
    match own.start:
        case "normal":
            return Normal()
        case "kept":
            return Kept()
        case value:
            return Constant(float(value))
