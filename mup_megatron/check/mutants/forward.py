"""Mistakes in the forward pass."""

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

from mup_megatron.check.entries import token_table
from mup_megatron.check.mutants.conditions import (
    changes_softmax_scale,
    has_multiplier,
    has_own_softmax_scale,
    heads_grow,
    is_rotary,
)
from mup_megatron.check.mutants.live import live_modules
from mup_megatron.check.mutants.mutant import Context, ModelChange, Mutant
from mup_megatron.theory import Acts, Plan


def _softmax_scale(factor: Callable[[Plan, Context], float]) -> ModelChange:
    """Multiplies the scale of attention logits."""

    def change(chunks: Sequence[Any], plan: Plan, context: Context) -> None:
        places = {site.module for site in plan.sites if site.acts is Acts.SCALE}
        for attention in live_modules(chunks, places):
            for part in attention.modules():
                if isinstance(getattr(part, "softmax_scale", None), float):
                    part.softmax_scale *= factor(plan, context)

    return change


Of = Callable[[Plan, Context], Collection[str]]
"""The names of modules."""


def _readouts(_plan: Plan, context: Context) -> Collection[str]:
    return context.readouts


def _tables(plan: Plan, _context: Context) -> Collection[str]:
    return [entry.module for entry in plan.entries if entry.is_embedding]


def _tables_beside_tokens(plan: Plan, _context: Context) -> Collection[str]:
    return [entry.module for entry in plan.entries if entry.is_embedding and entry.name != token_table(plan)]


def _branches(_plan: Plan, context: Context) -> Collection[str]:
    return context.branches.keys()


def _inside_branches(_plan: Plan, context: Context) -> Collection[str]:
    return context.branches.values()


def _output(of: Of, factor: Callable[[Plan, Context], float], *, last: bool = False) -> ModelChange:
    """Multiplies the output of modules, of the last one alone or of all."""

    def change(chunks: Sequence[Any], plan: Plan, context: Context) -> None:
        scale = factor(plan, context)

        def scaled(_module: Any, _args: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (output[0] * scale, *output[1:])
            return output * scale

        for chunk in chunks:
            modules = live_modules([chunk], of(plan, context))
            for module in modules[-1:] if last else modules:
                module.register_forward_hook(scaled)

    return change


def _in_evaluation(of: Of, factor: Callable[[Plan, Context], float]) -> ModelChange:
    """Multiplies the output of modules, in evaluation mode alone."""

    def change(chunks: Sequence[Any], plan: Plan, context: Context) -> None:
        scale = factor(plan, context)

        def scaled(module: Any, _args: Any, output: Any) -> Any:
            if module.training:
                return output
            return (output[0] * scale, *output[1:]) if isinstance(output, tuple) else output * scale

        for module in live_modules(chunks, of(plan, context)):
            module.register_forward_hook(scaled)

    return change


_FREQUENCIES = frozenset({"inv_freq", "inv_freq_extra", "inv_freq_inter"})
"""Where rotary embeddings have them; those with YaRN have two, which they mix."""


def _rotary_base(chunks: Sequence[Any], _plan: Plan, context: Context) -> None:
    for chunk in chunks:
        for rotary in chunk.modules():
            for name in _FREQUENCIES & rotary.__dict__.keys():
                frequencies = getattr(rotary, name)
                # Each is the base to the power of its share of the channels.
                power = math.log(context.r) / math.log(context.target.rotary_base)
                setattr(rotary, name, frequencies * (frequencies / frequencies[0]) ** power)
                # What it computed before would be used again.
                getattr(rotary.forward, "cache_clear", lambda: None)()


FORWARD = (
    Mutant(
        name="attention-sqrt-d",
        what="Attention logits are scaled by 1/√d instead of 1/d.",
        cause=("attention-sqrt-d",),
        model=_softmax_scale(lambda _p, c: math.sqrt(c.target.head_size / c.base.head_size)),
        when=heads_grow,
    ),
    Mutant(
        name="attention-no-base",
        what="Attention logits are scaled by 1/d without the base's √d.",
        cause=("attention-no-base",),
        model=_softmax_scale(lambda _p, c: 1 / math.sqrt(c.base.head_size)),
    ),
    Mutant(
        name="attention-multiplier-dropped",
        what="The recipe's attention_multiplier is not applied.",
        cause=("attention-multiplier-dropped",),
        model=_softmax_scale(lambda _p, c: 1 / c.recipe.moved.attention_multiplier),
        when=has_multiplier("attention_multiplier"),
    ),
    Mutant(
        name="attention-scale-stock",
        what="Attention scales its logits as it does by itself: nobody tells it the plan's scale.",
        # Without a multiplier, and where heads keep their size, these are one and the same.
        cause=("attention-scale-stock", "attention-sqrt-d", "attention-multiplier-dropped"),
        model=_softmax_scale(lambda p, _: p.own_softmax_scale / p.softmax_scale),
        when=changes_softmax_scale,
    ),
    Mutant(
        name="attention-own-factor-dropped",
        what="The scale of attention logits lacks the factor that attention has of its own, as with YaRN.",
        cause=("attention-own-factor-dropped",),
        model=_softmax_scale(lambda p, _: 1 / (p.own_softmax_scale * math.sqrt(p.head_size))),
        when=has_own_softmax_scale,
    ),
    Mutant(
        name="readout-multiplied-twice",
        what="The logits are multiplied by α_out/r twice, by the model and by a wrapper.",
        cause=("readout-multiplied-twice",),
        model=_output(_readouts, lambda p, _: p.output_multiplier),
    ),
    Mutant(
        name="readout-not-multiplied",
        what="The logits are not multiplied at all.",
        cause=("readout-not-multiplied",),
        model=_output(_readouts, lambda p, _: 1 / p.output_multiplier),
    ),
    Mutant(
        name="readout-without-alpha",
        what="The logits are multiplied by 1/r, and the recipe's output_multiplier is lost.",
        cause=("output-multiplier-dropped",),
        model=_output(_readouts, lambda _, c: 1 / c.recipe.moved.output_multiplier),
        when=has_multiplier("output_multiplier"),
    ),
    Mutant(
        name="readout-without-ratio",
        what="The logits are multiplied by the recipe's output_multiplier, which replaced 1/r.",
        cause=("readout-ratio-dropped",),
        model=_output(_readouts, lambda _, c: c.r),
    ),
    Mutant(
        name="embedding-multiplier-dropped",
        what="The recipe's embedding_multiplier is not applied.",
        cause=("embedding-multiplier-dropped",),
        model=_output(_tables, lambda _, c: 1 / c.recipe.moved.embedding_multiplier),
        when=has_multiplier("embedding_multiplier"),
    ),
    Mutant(
        name="embedding-multiplier-on-tokens-only",
        what="The recipe's embedding_multiplier is applied to the token table and not to positions.",
        cause=("embedding-multiplier-on-tokens-only",),
        model=_output(_tables_beside_tokens, lambda _, c: 1 / c.recipe.moved.embedding_multiplier),
        when=lambda c: (
            c.target.position_embedding_type == "learned_absolute" and has_multiplier("embedding_multiplier")(c)
        ),
    ),
    Mutant(
        name="stray-root-in-one-mlp",
        what="A layer that somebody edited multiplies what is inside of its last branch by √r.",
        cause=("module-output",),
        model=_output(_inside_branches, lambda _, c: math.sqrt(c.r), last=True),
    ),
    Mutant(
        name="branch-scaled-by-depth",
        what="The branches of one family are multiplied by 1/√L, on top of the initial std's 1/√(2L).",
        cause=("module-output",),
        model=_output(_branches, lambda p, _: 1 / math.sqrt(p.num_layers)),
        when=lambda c: c.target.num_layers > 1,
    ),
    Mutant(
        name="evaluation-readout-twice",
        what="Under eval() the logits are multiplied by α_out/r twice.",
        cause=("evaluation-differs",),
        model=_in_evaluation(_readouts, lambda p, _: p.output_multiplier),
        trains_alike=True,
    ),
    Mutant(
        name="evaluation-branch",
        what="Under eval() the branches of one family are divided by 2.",
        cause=("evaluation-differs",),
        model=_in_evaluation(_branches, lambda _p, _c: 0.5),
        trains_alike=True,
    ),
    Mutant(
        name="rotary-base-by-width",
        what="The rotary base is multiplied by r.",
        cause=("positions",),
        model=_rotary_base,
        when=is_rotary,
    ),
)
