"""The plan's names of what Megatron stores: layers that are alike are one tensor there, and so are experts.

    decoder.layers.self_attention.linear_qkv.weight [L, …]    of every layer L
    decoder.layers.3.mlp.experts.experts.linear_fc1.weight    [E, …] of every expert E of a layer
    decoder.layers.mlp.linear_fc1.layer_norm_weight           a norm, also where it is a module of its own

A plan's names follow the live modules. What is stored says nothing of them, so each name that a plan may have is given.
Imports neither torch nor Megatron.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

__all__ = ["Location", "places", "separate"]

_STACKED = re.compile(r"^(\w+\.layers)\.(?!\d+\.)(.+)$")
_GROUPED = re.compile(r"\.experts\.(linear_fc[12])\.(weight|bias)(\d+)$")
_EXPERTS = re.compile(r"\.experts\.experts\.(linear_fc[12])\.(weight|bias)$")
_NORMS = (
    ("self_attention.linear_qkv.layer_norm_", "input_layernorm."),
    ("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm."),
    ("self_attention.linear_q_up_proj.layer_norm_", "self_attention.q_layernorm."),
    ("self_attention.linear_kv_up_proj.layer_norm_", "self_attention.kv_layernorm."),
)
"""Fused into what follows → a module of its own; the first is also what such a module is stored as."""

_MOST = 10**5
"""Layers times experts that one stored tensor is of: no model has more, but a forged shape may say so."""


@dataclass(frozen=True, slots=True)
class Location:
    """A tensor that is stored, and the indices of its first dimensions at which a parameter is."""

    key: str
    at: tuple[int, ...] = ()


def places(shapes: Mapping[str, Sequence[int]]) -> Mapping[str, Location]:
    """Returns where each parameter is, by every name that a plan may have for it.

    Args:
        shapes: global ones, of all stored tensors by their keys.
    """
    found: dict[str, Location] = {}
    for key, shape in shapes.items():
        for name, at in _single(key, shape):
            for own in _also(name):
                found.setdefault(own, Location(key, at))
    return found


def separate(name: str) -> str:
    """Returns what a parameter is called where each norm and each expert is a module of its own."""
    for fused, own in _NORMS:
        name = name.replace(f".{fused}", f".{own}")
    return _GROUPED.sub(r".experts.local_experts.\3.\1.\2", name)


def _single(key: str, shape: Sequence[int]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yields what a stored tensor holds, one of each layer and of each expert."""
    layers, experts = _STACKED.match(key), _EXPERTS.search(key)
    cut = (layers is not None) + (experts is not None)
    if len(shape) < cut or prod(max(1, length) for length in shape[:cut]) > _MOST:
        return
    for at in product(*map(range, shape[:cut])):
        name = key if layers is None else f"{layers[1]}.{at[0]}.{layers[2]}"
        if experts is not None:
            one = f".experts.local_experts.{at[-1]}.{experts[1]}.{experts[2]}"
            name = _EXPERTS.sub(one, name)
        yield name, at


def _also(name: str) -> Iterator[str]:
    """Yields a parameter's name, and those that it has with other modules."""
    yield name
    for fused, own in _NORMS:
        if f".{fused}" in name:
            yield name.replace(fused, own)
    grouped = re.sub(r"\.local_experts\.(\d+)\.(linear_fc[12])\.(weight|bias)$", r".\2.\3\1", name)
    if grouped != name:
        yield grouped
