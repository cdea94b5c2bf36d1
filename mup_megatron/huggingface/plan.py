"""A recipe and a Hugging Face model or configuration → a plan. Models are built on the meta device alone."""

import contextlib
import copy
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from torch.distributed.fsdp import FSDPModule
from transformers import PretrainedConfig, PreTrainedModel

from mup_megatron.errors import InputError
from mup_megatron.huggingface import configs, verification
from mup_megatron.huggingface.branches import branches_of, drawn_at_own_depth, with_branches
from mup_megatron.modules.apply import require_scalable, set_attention_scale
from mup_megatron.modules.attention import attentions_of
from mup_megatron.modules.forward import Forward
from mup_megatron.modules.names import unwrapped
from mup_megatron.modules.shapes import Facts, MetaModule, base_parameters, model_shapes
from mup_megatron.recipe import HuggingFaceBase, Recipe
from mup_megatron.theory import ModelShape, Plan, Property
from mup_megatron.validation import brief

TESTED = frozenset("gpt2 gpt_neox llama mistral qwen2 qwen3 bert vit resnet opt t5".split())
"""Model types whose every parameter, draw and attention scale the tests look at."""

_log = logging.getLogger(__name__)


def plan_for(target: torch.nn.Module | PretrainedConfig, recipe: Recipe) -> Plan:
    """Returns what every parameter of a Hugging Face model gets, by the names of `model.named_parameters()`.

    Args:
        target: the model, wrapped or not, of which only class and configuration are read; or a configuration with
            `architectures`.
        recipe: its base is a configuration of the same model type.

    Raises:
        InputError: base and target are no widths of one architecture, or something about the model cannot be known.
    """
    base = recipe.base
    if not isinstance(base, HuggingFaceBase):
        raise InputError(
            "the recipe's base is not a Hugging Face configuration, and the target is. Give the recipe a base with a "
            "model_type; `mup-megatron recipe --base config.json` writes one."
        )
    if isinstance(target, torch.nn.Module):
        target = unwrapped(target)
    if not isinstance(target, PretrainedConfig | PreTrainedModel):
        raise InputError(
            f"a {type(target).__name__} is no model of Hugging Face's. Give that which it has inside, or the "
            "configuration."
        )
    config: PretrainedConfig = copy.deepcopy(target if isinstance(target, PretrainedConfig) else target.config)
    at_base = configs.config_of_base(base)
    configs.require_comparable(at_base, config)
    _warn_of_what_may_not_transfer(at_base, config)
    seen = _seen(class_of(target, at_base), at_base, config)
    plan = recipe.plan_for_shapes(*_shapes(seen, recipe))
    _require_right_softmax(seen, plan, recipe)
    return plan


def _warn_of_what_may_not_transfer(at_base: PretrainedConfig, config: PretrainedConfig) -> None:
    if config.model_type not in TESTED:
        _log.warning(
            "model type %s is not among those that were tested. Its plan follows from comparing configurations; look "
            "at it with `mup-megatron explain`, and make a coordinate check before a large run.",
            config.model_type,
        )
    for key in configs.differing_states(at_base, config):
        _log.warning(
            "%s differs between the recipe's base and the target: the learning rate was measured to transfer, and the "
            "size of what a state gives does not stay until the norm behind it. Keep it where you can.",
            key,
        )
    for before, now in configs.differing_groups(at_base, config):
        _log.warning(
            "query heads for each key/value head: %d at the base, %d here. Keys and values are read by other numbers "
            "of heads, so that their updates act otherwise. Keep heads per group as they are.",
            before,
            now,
        )


@dataclass(frozen=True)
class _Seen:
    """A model and its base, on the meta device, and what their forward passes do."""

    model_class: type[PreTrainedModel]
    base_config: PretrainedConfig
    """Of the base at its own depth."""
    base_at_depth: PretrainedConfig
    """At the model's depth, so that all names are there."""
    config: PretrainedConfig
    base: MetaModule
    """Of `base_at_depth`."""
    model: MetaModule
    fixed: frozenset[str]
    base_pass: Forward
    model_pass: Forward


def _seen(model_class: type[PreTrainedModel], at_base: PretrainedConfig, config: PretrainedConfig) -> _Seen:
    """Builds both; raises InputError where their code hides what a plan has to know."""
    at_depth = configs.at_depth_of(at_base, config)
    base = MetaModule.of(_factory(model_class, at_depth), keeps=True)
    model = MetaModule.of(_factory(model_class, config), keeps=True)
    _require_known_scale(at_base, config, model.module)
    fixed = verification.fixed_parts(base, model)
    base_pass, model_pass = (verification.forward_of(each, fixed=fixed) for each in (base, model))
    verification.require_no_hidden_factor(base_pass, model_pass, model.module)
    return _Seen(model_class, at_base, at_depth, config, base, model, fixed, base_pass, model_pass)


def _shapes(seen: _Seen, recipe: Recipe) -> tuple[ModelShape, ModelShape]:
    """Returns what the recipe's rules take: the base's shape and the model's."""
    scale = recipe.moved.init_method_std / configs.reference_std(seen.base_config)
    wider = MetaModule.of(_factory(seen.model_class, configs.widened(seen.base_at_depth, seen.config), drawn=False))
    parameters = base_parameters(seen.base, wider, init_scale=scale)
    base_branches = None
    if recipe.parametrization.depth is not None:
        # The base is built at the target's depth, for names; its depth and what it starts with are its own.
        at_own_depth = MetaModule.of(_factory(seen.model_class, seen.base_config), keeps=True)
        base_branches = branches_of(at_own_depth.module, seen.base_config)
        parameters = drawn_at_own_depth(parameters, at_own_depth, init_scale=scale)
    facts = Facts(
        num_layers=_num_layers(seen.config),
        readout=_readout(seen.model.module),
        base_attentions=attentions_of(seen.base.module),
        summed=seen.model_pass.summed,
        counts_may_differ=True,
    )
    base_shape, shape = model_shapes(seen.model, parameters, facts)
    if recipe.multiplies_branches:
        branches = branches_of(seen.model.module, seen.config).beside(base_branches)
        base_shape, shape = with_branches(base_shape, branches, base_branches), with_branches(shape, branches)
    return (
        _as_seen(base_shape, seen.base_pass, share=configs.share_of_tokens(seen.base_config)),
        _as_seen(shape, seen.model_pass, share=configs.share_of_tokens(seen.config)),
    )


def _require_right_softmax(seen: _Seen, plan: Plan, recipe: Recipe) -> None:
    """Raises InputError where attention does not take the plan's scale; the model seen has it afterwards."""
    final_pass = seen.model_pass
    if plan.changes_softmax_scale:
        require_scalable(seen.model.module, plan)
        set_attention_scale(seen.model.module, plan)
        final_pass = verification.forward_of(seen.model, fixed=seen.fixed)
    verification.require_right_softmax(
        seen.base_pass,
        seen.model_pass,
        final_pass,
        seen.model.module,
        alpha=recipe.moved.attention_multiplier,
        standard=recipe.parametrization.rule == "standard",
        changes=lambda name: plan.attention(name).changes,
    )


def class_of(target: PreTrainedModel | PretrainedConfig, base: PretrainedConfig) -> type[PreTrainedModel]:
    """Returns the class of a model, or that which its configuration names, and else the base's.

    Raises:
        InputError: none is named, or one that is no class of the installed transformers for such a configuration.
    """
    if isinstance(target, PreTrainedModel):
        # fully_shard puts a class of its own in the place of the model's.
        own: type[Any] = next(kind for kind in type(target).__mro__ if not issubclass(kind, FSDPModule))
        return own
    names = target.architectures or base.architectures
    if not names:
        raise InputError(
            "architectures: neither the target's configuration nor the recipe's base says which class of model it is. "
            "Add for example architectures: [GPT2LMHeadModel]."
        )
    with configs.refused(f"architectures: {brief(names[0], 60)} cannot be imported from transformers"):
        found = getattr(transformers, _spelled(names[0]), None)
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel) and found is not PreTrainedModel):
        raise InputError(
            f"architectures: {brief(names[0], 60)} is no model class of the installed transformers. Write one that is; "
            "code that comes with a checkpoint is not run."
        )
    if found.config_class is not None and not isinstance(target, found.config_class):
        raise InputError(
            f"architectures: {names[0]} is no model of model_type {target.model_type}. Correct one of them."
        )
    return found


def _spelled(name: str) -> str:
    """A class's name as the installed transformers spells it: code that came with a checkpoint before may differ."""
    if hasattr(transformers, name):
        return name
    return next((known for known in dir(transformers) if _letters(known) == _letters(name)), name)


def _letters(name: str) -> str:
    return name.replace("_", "").lower()


def _factory(
    model_class: type[PreTrainedModel], config: PretrainedConfig, *, drawn: bool = True
) -> Callable[[], torch.nn.Module]:
    """Returns what builds a model. Its weights have the library's start only if they are `drawn`."""

    def build() -> torch.nn.Module:
        constructor: Callable[[PretrainedConfig], Any] = model_class
        with configs.refused(f"{model_class.__name__} cannot be built from the configuration"):
            model = constructor(copy.deepcopy(config))
            assert isinstance(model, PreTrainedModel)
            if drawn:
                # What it skips where the default device is meta.
                with _untied(model), torch.device("cpu"):
                    model.initialize_weights()  # type: ignore[no-untyped-call]
        return model

    return build


@contextlib.contextmanager
def _untied(model: torch.nn.Module) -> Iterator[None]:
    """Within it no two modules share a weight: the library draws each module first and ties afterwards, so that a tied
    weight starts as its first owner draws it.
    """
    seen: set[int] = set()
    tied = []
    for module in model.modules():
        for attribute, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if id(parameter) in seen:
                tied.append((module, attribute, parameter))
            seen.add(id(parameter))
    for module, attribute, parameter in tied:
        setattr(module, attribute, torch.nn.Parameter(torch.empty_like(parameter)))
    yield
    for module, attribute, parameter in tied:
        setattr(module, attribute, parameter)


def _readout(model: Any) -> str | None:
    """Returns the weight behind `get_output_embeddings`, by its first name: that of a tied embedding."""
    readout = model.get_output_embeddings()
    if readout is None:
        return None
    return next((name for name, parameter in model.named_parameters() if parameter is readout.weight), None)


def _num_layers(config: PretrainedConfig) -> int:
    layers = getattr(config, "num_hidden_layers", None)
    return layers if isinstance(layers, int) else sum(getattr(config, "depths", [1]))


def _require_known_scale(base: PretrainedConfig, target: PretrainedConfig, model: torch.nn.Module) -> None:
    """Raises InputError if heads grow in size, and attention hides its scale."""
    one, other = configs.head_size(base), configs.head_size(target)
    attention = next(iter(attentions_of(model).values()), None)
    if one != other and (one is None or other is None):
        raise InputError(
            f"the size of heads is known from the {'target' if one is None else 'recipe'}'s configuration alone, and "
            f"{base.model_type} has no such key of its own. Take num_attention_heads and head_dim out of it."
        )
    if one != other and (attention is None or attention.scale is None):
        raise InputError(
            f"the size of heads is {one} in the recipe's base and {other} in the target, and the attention of "
            f"{type(model).__name__} has no scale that can be set. Let the number of heads grow, and keep their size."
        )


def _as_seen(shape: ModelShape, seen: Forward, *, share: float) -> ModelShape:
    """Returns a model's shape with what its code multiplies the readout's input and the rows of its tables by.

    Args:
        shape: without.
        seen: a forward pass.
        share: the part of the tokens that an expert sees.
    """
    tensors = (
        replace(
            tensor,
            stock_multiplier=seen.looked_up.get(tensor.name) or 1.0,
            share=share if Property.EXPERT in tensor.properties else 1.0,
        )
        for tensor in shape.tensors
    )
    return replace(shape, tensors=tuple(tensors), stock_readout_scale=seen.readout_scale or 1.0)
