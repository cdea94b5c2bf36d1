"""The fork's arguments: what they say of the model, and what of them no recipe goes with. Needs no Megatron."""

import argparse
from collections.abc import Mapping
from typing import Any

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.errors import InputError
from mup_megatron.megatron.arguments.convert import architecture_named, model_from_values, not_in_model_file
from mup_megatron.megatron.arguments.fork import require_gpt
from mup_megatron.recipe import Recipe

_SOURCE = "the command line"

_REFUSED = {
    "num_experts_switch": "models with experts are not supported yet. Choose a model without",
    "create_moe_param_group": "models with experts are not supported yet. Drop it",
    "kd": "distillation builds a second model, which the plan is not for. Drop it",
    "mos": "distillation builds a second model, which the plan is not for. Drop it",
    "random_ltd": "it takes the layers apart that the plan was applied to. Drop it",
    "ds_sequence_parallel_fpdt": "it computes attention and logits where the plan's scales do not reach. Drop it",
    "retro_add_retriever": "models with a retriever are not supported. Drop it",
    "universal_checkpoint": "DeepSpeed gives its groups the values of other groups when it loads one. Drop it",
    "use_checkpoint_opt_param_scheduler": "the learning rate and its schedule are the recipe's. Drop it; to go on with "
    "a longer run, use --override-opt_param-scheduler",
    "train_tokens": "the recipe's schedule is in fractions of the run, which is counted in iterations or samples. "
    "Drop it and give --train-iters or --train-samples",
    "lr_warmup_tokens": "the warm-up is the recipe's. Drop it",
    "lr_decay_tokens": "the decay is the recipe's. Drop it",
    "mup_coordinates_interval": "not available in the fork Megatron-DeepSpeed. Drop it",
    "mup_no_verify": "nothing is compared in the fork Megatron-DeepSpeed, so there is nothing to leave out. Drop it",
}
"""Argument → why a run with a recipe cannot have it, and what to do."""

_FLAGS = {
    "use_checkpoint_opt_param_scheduler": "--use-checkpoint-opt_param-scheduler",
}
"""Those that are not written like their argument."""

_NORMS = {"layernorm": "LayerNorm", "rmsnorm": "RMSNorm"}


def refuse(args: argparse.Namespace) -> None:
    """Raises InputError, with all of them, for arguments that reach past the places where a plan is applied."""
    problems = [
        f"{_FLAGS.get(key, '--' + key.replace('_', '-'))}: {reason}."
        for key, reason in _REFUSED.items()
        if getattr(args, key, None)
    ]
    if getattr(args, "transformer_impl", "local") != "local":
        problems.append(
            f"--transformer-impl {args.transformer_impl}: only the fork's own layers are supported. Use local."
        )
    if problems:
        raise InputError("\n".join(problems))


def refuse_recipe(recipe: Recipe) -> None:
    """Raises InputError for a recipe whose schedule the fork does not have."""
    if recipe.schedule.lr_decay_style == "WSD":
        raise InputError(
            "lr_decay_style WSD: the fork Megatron-DeepSpeed does not have this schedule. Tune with one that it has: "
            "constant, linear, cosine or inverse-square-root."
        )


def model_from_fork_args(args: argparse.Namespace) -> ModelFile:
    """The model file that the fork's arguments describe, with the vocabulary as the fork padded it if it has done so.

    Raises:
        InputError: the model is impossible, or is one that a model file cannot describe; names the flag.
    """
    # One number for each of several kinds of layer; 1 is an ordinary MLP.
    if max(args.num_experts) > 1:
        raise InputError(
            f"{_SOURCE}: --num-experts: models with experts are not supported yet in the fork Megatron-DeepSpeed. "
            "Choose a model without."
        )
    values = _as_megatron_lm(args)
    require_gpt(architecture_named(values), _SOURCE)
    return model_from_values(values, source=_SOURCE)


def notes(args: argparse.Namespace) -> list[str]:
    """Flags of the model that a model file has no key for, and that leave its parameters and their scale alone."""
    return not_in_model_file(_as_megatron_lm(args))


def _as_megatron_lm(args: argparse.Namespace) -> Mapping[str, Any]:
    """The arguments as Megatron-LM would have them, where the fork says the same by another name or in other words."""
    heads = args.num_attention_heads
    key_value_heads = heads if args.num_key_value_heads is None else args.num_key_value_heads
    grouped = key_value_heads != heads
    learned = "learned_absolute" if args.add_position_embedding else "none"
    changed = {
        "group_query_attention": grouped,
        "num_query_groups": key_value_heads if grouped else 1,
        "normalization": _NORMS[args.normalization],
        "layernorm_zero_centered_gamma": args.apply_layernorm_1p,
        "position_embedding_type": "rope" if args.use_rotary_position_embeddings else learned,
        "rotary_base": args.rope_theta,
        "num_experts": None,
    }
    same = {key: value for key, value in vars(args).items() if key != "add_position_embedding"}
    return {**same, **changed, "transformer_impl": "local"}
