"""The residual branches of Hugging Face models: what writes them, and what the library's own code multiplies them by.

They are known for families whose layers norm before each branch, by name; of others nothing is assumed. To support a
family, add its line: what stands behind the layer's number in the name of each layer that writes into the stream.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from transformers import PretrainedConfig

from mup_megatron.errors import InputError
from mup_megatron.modules.names import named_modules, named_parameters
from mup_megatron.modules.shapes import MetaModule
from mup_megatron.recipe import ModuleParameter
from mup_megatron.theory import BRANCH, Acts, ModelShape, Place, Stack, family_of

_LEAST = 2
"""Branches of a layer: of an attention and an MLP."""


@dataclass(frozen=True, slots=True)
class _Family:
    writers: str
    """Pattern of the rest of a name behind the number of a layer."""
    stock: Callable[[PretrainedConfig], float] = lambda _: 1.0
    """What its code multiplies each branch by."""
    norms_before: Callable[[PretrainedConfig], bool] = lambda _: True


_LLAMA = r"self_attn\.o_proj|mlp\.down_proj"
FAMILIES: Mapping[str, _Family] = {
    **dict.fromkeys("llama mistral qwen2 qwen3 phi3 olmo gemma smollm3".split(), _Family(_LLAMA)),
    "granite": _Family(_LLAMA, stock=lambda c: float(c.residual_multiplier)),
    "minicpm3": _Family(_LLAMA, stock=lambda c: float(c.scale_depth) / math.sqrt(c.num_hidden_layers)),
    "gpt2": _Family(r"attn\.c_proj|crossattention\.c_proj|mlp\.c_proj"),
    "gpt_neox": _Family(r"attention\.dense|mlp\.dense_4h_to_h"),
    "opt": _Family(r"self_attn\.out_proj|fc2", norms_before=lambda c: bool(c.do_layer_norm_before)),
    "vit": _Family(r"attention\.o_proj|mlp\.fc2"),
    "t5": _Family(r"layer\.\d\.(?:SelfAttention\.o|EncDecAttention\.o|DenseReluDense\.wo)"),
}
"""By model type."""


@dataclass(frozen=True, slots=True)
class Branches:
    """The branches of a model."""

    stacks: Mapping[str, Stack]
    """By the name of the list of its layers."""
    writers: Mapping[str, str]
    """Name of what writes a branch → its stack."""
    stock: float
    apart: frozenset[str]
    """What not every layer has, such as T5's table of relative positions, by the names that all layers share."""

    def beside(self, other: "Branches | None") -> "Branches":
        """Returns them with what another depth of the model shows to be apart: in a stack of one layer nothing does."""
        return self if other is None else replace(self, apart=self.apart | other.apart)


def branches_of(model: torch.nn.Module, config: PretrainedConfig) -> Branches:
    """Returns the residual branches of a model.

    Raises:
        InputError: they are not known, or its layers norm behind them.
    """
    family = FAMILIES.get(config.model_type)
    remedy = "Take residual_multiplier and parametrization.depth out of the recipe, and keep the base's depth."
    if family is None:
        raise InputError(
            f"model type {config.model_type}: its residual branches are not known, so that they cannot be multiplied. "
            f"{remedy}"
        )
    if not family.norms_before(config):
        raise InputError(
            f"model type {config.model_type}: in this configuration layers norm behind each branch, which the rule of "
            f"depth is not for. {remedy}"
        )
    pattern = re.compile(rf"(.+)\.(\d+)\.(?:{family.writers})")
    found = {name: match for name, _ in named_modules(model) if (match := pattern.fullmatch(name)) is not None}
    of_layers = Counter((match[1], int(match[2])) for match in found.values())
    stacks: dict[str, Stack] = {}
    for name, module in named_modules(model):
        if isinstance(module, torch.nn.ModuleList) and any(stack == name for stack, _ in of_layers):
            counts = {of_layers[name, index] for index in range(len(module))}
            if len(counts) != 1 or min(counts) < _LEAST:
                raise InputError(
                    f"{name}: {type(model).__name__} has layers without the branches that are known of model type "
                    f"{config.model_type}. {remedy}"
                )
            stacks[name] = Stack(len(module), counts.pop())
    names = [(stack, name) for name, _ in named_parameters(model) if (stack := _stack_of(name, stacks))]
    counts_of = Counter((stack, family_of(name)) for stack, name in names)
    apart = frozenset(name for (stack, name), count in counts_of.items() if count % stacks[stack].layers)
    return Branches(stacks, {name: match[1] for name, match in found.items()}, family.stock(config), apart)


def with_branches(shape: ModelShape, own: Branches, depths: Branches | None = None) -> ModelShape:
    """Returns a model's shape with its branches, and each tensor in its stack.

    Args:
        shape: without.
        own: of the model that names and tensors are of.
        depths: of the model whose depth and factor the shape is to have, where that is another: the base's own.
    """
    depths = depths or own
    tensors = []
    for tensor in shape.tensors:
        stack = _stack_of(tensor.name, own.stacks)
        # What not every layer has is as much at any depth.
        deepens = bool(stack) and family_of(tensor.name) not in own.apart
        tensors.append(replace(tensor, stack=stack, deepens=deepens))
    places = [
        Place(name, Acts.OUTPUT, BRANCH, stack=stack, stock=depths.stock if depths.stock != 1.0 else None)
        for name, stack in own.writers.items()
    ]
    return replace(shape, tensors=tuple(tensors), stacks=dict(depths.stacks), places=(*shape.places, *places))


def drawn_at_own_depth(
    parameters: Mapping[str, ModuleParameter], base: MetaModule, *, init_scale: float
) -> dict[str, ModuleParameter]:
    """Returns a base's parameters at the target's depth, each with the std that it starts with at the base's own.

    Raises:
        InputError: the library draws the base's layers with several stds.
    """
    stds: dict[str, set[float]] = {}
    for name, draw in base.draws.items():
        if draw.std is not None:
            stds.setdefault(family_of(name), set()).add(draw.std)
    found = {}
    for name, parameter in parameters.items():
        own = stds.get(family_of(name), set()) if parameter.init_std is not None else set()
        if len(own) > 1:
            raise InputError(
                f"{name}: the library draws the layers of the recipe's base with several stds, so which one is this "
                "layer's at another depth is not known. Take parametrization.depth out of the recipe."
            )
        found[name] = parameter.model_copy(update={"init_std": next(iter(own)) * init_scale}) if own else parameter
    return found


def _stack_of(name: str, stacks: Iterable[str]) -> str:
    return next((stack for stack in stacks if name.startswith(f"{stack}.")), "")
