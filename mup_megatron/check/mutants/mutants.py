"""Deliberate mistakes: what a check has to find, each as somebody might make it.

Most change a live run after it was built: its weights, its hooks, its optimizer's groups, its schedule. Those that are
a wrong rule are a wrong plan. `benchmarks/check_rates.py` counts how many are caught, and how many are named rightly.

Importing this module imports neither torch nor Megatron: the CPU runtime has to come before both.
"""

import fnmatch
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.architectures.registry import shapes_of
from mup_megatron.check.entries import (
    is_any,
    is_bias,
    is_embedding,
    is_gain,
    is_hidden,
    is_input_role,
    is_linear_bias,
    is_readout,
    is_residual,
    is_vector,
)
from mup_megatron.recipe import Recipe
from mup_megatron.theory import Plan, PlanEntry, family_of
from mup_megatron.theory.widths import Scaling, Sizes, scaling


@dataclass(frozen=True)
class Context:
    """Of which run a mistake is made."""

    base: ModelFile
    target: ModelFile
    """At this width."""
    recipe: Recipe
    """Of the check: under stress."""
    width: int

    @property
    def r(self) -> float:
        """How much wider the residual stream is than the base's."""
        return self.target.hidden_size / self.base.hidden_size

    @cached_property
    def ratios(self) -> Mapping[str, Scaling]:
        """Of each tensor, by global name."""
        base, target = shapes_of(self.base, self.target)
        by_family = {family_of(parameter.name): parameter for parameter in base.tensors}
        return {p.name: scaling(by_family[family_of(p.name)], p, Sizes(1, 1)) for p in target.tensors}


PlanChange = Callable[[Plan, Context], Plan]
ModelChange = Callable[[Sequence[Any], Plan, Context], None]
OptimizerChange = Callable[[Any, Sequence[Any], Plan, Context], None]
SchedulerChange = Callable[[Any, Any, Plan, Context], None]


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """One mistake."""

    name: str
    what: str
    """In one sentence."""
    cause: tuple[str, ...]
    """Names in `causes/` that count as right."""
    plan: PlanChange | None = None
    """Gives the plan that is built; the reference keeps the right one."""
    model: ModelChange | None = None
    """(chunks, plan, context): after the run was built."""
    optimizer: OptimizerChange | None = None
    """(optimizer, chunks, plan, context): likewise."""
    scheduler: SchedulerChange | None = None
    """(scheduler, optimizer, plan, context): likewise."""
    when: Callable[[Context], bool] = lambda _: True
    """Whether it can be made with this architecture, and changes anything."""
    trains_alike: bool = False
    """Whether the first steps of a run may be what they are without it."""

    def tamper(self, plan: Plan, context: Context) -> Callable[[Any], None]:
        """What is done to a run after it was built, before its first step.

        Args:
            plan: that it was built with.
            context: of which run.
        """

        def tampered(built: Any) -> None:
            if self.model is not None:
                self.model(built.chunks, plan, context)
            if self.optimizer is not None:
                self.optimizer(built.optimizer, built.chunks, plan, context)
            if self.scheduler is not None:
                self.scheduler(built.scheduler, built.optimizer, plan, context)
            if self.optimizer is not None or self.scheduler is not None:
                # So that the first step has the rates of its groups as they are now.
                built.scheduler.step(increment=0)

        return tampered


# ---- which tensors -------------------------------------------------------------------------------------------------

Select = Callable[[PlanEntry], bool]
Factor = Callable[[PlanEntry, Scaling, Context], float]


def _word_embedding(entry: PlanEntry) -> bool:
    return entry.name == "embedding.word_embeddings.weight"


def _qkv(entry: PlanEntry) -> bool:
    return entry.name.endswith("linear_qkv.weight")


def _in_last_layer(plan: Plan, entry: PlanEntry) -> bool:
    return entry.name.startswith(f"decoder.layers.{plan.num_layers - 1}.")


# ---- what is done to them ------------------------------------------------------------------------------------------


def _weights(select: Select, factor: Factor) -> ModelChange:
    """Multiplies initial weights."""

    def change(chunks: Sequence[Any], plan: Plan, context: Context) -> None:
        for entry, parameter in _live(chunks, plan):
            if select(entry):
                parameter.data.mul_(factor(entry, context.ratios[entry.name], context))

    return change


def _live(chunks: Sequence[Any], plan: Plan) -> Iterable[tuple[PlanEntry, Any]]:
    from mup_megatron.megatron.names import named_parameters

    return [(plan[name], parameter) for name, parameter in named_parameters(chunks, tied=plan.tied)]


def _drawn_biases(chunks: Sequence[Any], plan: Plan, context: Context) -> None:
    for entry, parameter in _live(chunks, plan):
        if is_linear_bias(entry):
            parameter.data.normal_(std=context.recipe.hyperparameters.init_method_std)


def _qkv_rows(heads: slice, factor: Callable[[Context], float]) -> ModelChange:
    """Multiplies some of the rows of linear_qkv: of each group its queries, then its key, then its value."""

    def change(chunks: Sequence[Any], plan: Plan, context: Context) -> None:
        for entry, parameter in _live(chunks, plan):
            if _qkv(entry):
                per_group = context.target.num_attention_heads // context.target.query_groups + 2
                rows = parameter.data.view(-1, per_group, context.target.head_size, parameter.shape[1])
                rows[:, heads].mul_(factor(context))

    return change


def _softmax_scale(factor: Callable[[Plan, Context], float]) -> ModelChange:
    """Multiplies the scale of attention logits."""

    def change(chunks: Sequence[Any], plan: Plan, context: Context) -> None:
        from mup_megatron.megatron.model import core_attentions
        from mup_megatron.megatron.names import unwrapped

        for chunk in chunks:
            for _, attention in core_attentions(unwrapped(chunk)):
                parts: list[Any] = list(attention.modules())
                for part in parts:
                    if isinstance(getattr(part, "softmax_scale", None), float):
                        part.softmax_scale *= factor(plan, context)

    return change


def _output(of: str, factor: Callable[[Plan, Context], float], *, last: bool = False) -> ModelChange:
    """Multiplies the output of the modules whose names end so, of the last layer or of all."""

    def change(chunks: Sequence[Any], plan: Plan, context: Context) -> None:
        from mup_megatron.megatron.names import unwrapped

        scale = factor(plan, context)

        def scaled(_module: Any, _args: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (output[0] * scale, *output[1:])
            return output * scale

        for chunk in chunks:
            modules = [module for name, module in unwrapped(chunk).named_modules() if name.endswith(of)]
            for module in modules[-1:] if last else modules:
                module.register_forward_hook(scaled)

    return change


def _in_evaluation(of: str, factor: Callable[[Plan, Context], float]) -> ModelChange:
    """Multiplies the output of the modules whose names end so, in evaluation mode alone."""

    def change(chunks: Sequence[Any], plan: Plan, context: Context) -> None:
        from mup_megatron.megatron.names import unwrapped

        scale = factor(plan, context)

        def scaled(module: Any, _args: Any, output: Any) -> Any:
            if module.training:
                return output
            return (output[0] * scale, *output[1:]) if isinstance(output, tuple) else output * scale

        for chunk in chunks:
            for name, module in unwrapped(chunk).named_modules():
                if name.endswith(of):
                    module.register_forward_hook(scaled)

    return change


def _drawn_alike(chunks: Sequence[Any], plan: Plan, _context: Context) -> None:
    """Every layer starts as the first one that this rank holds."""
    first: dict[str, Any] = {}
    for entry, parameter in _live(chunks, plan):
        if is_hidden(entry):
            parameter.data.copy_(first.setdefault(family_of(entry.name), parameter).data)


def _uniform(chunks: Sequence[Any], plan: Plan, _context: Context) -> None:
    for entry, parameter in _live(chunks, plan):
        if is_hidden(entry) and entry.init_std:
            parameter.data.uniform_(-math.sqrt(3) * entry.init_std, math.sqrt(3) * entry.init_std)


def _off_centre(chunks: Sequence[Any], plan: Plan, _context: Context) -> None:
    for entry, parameter in _live(chunks, plan):
        if is_residual(entry) and entry.init_std:
            parameter.data.mul_(math.sqrt(1 - 0.3**2)).add_(0.3 * entry.init_std)


def _gradients_times(factor: float) -> ModelChange:
    def change(chunks: Sequence[Any], plan: Plan, _context: Context) -> None:
        for _, parameter in _live(chunks, plan):
            parameter.register_hook(lambda gradient: factor * gradient)

    return change


def _rotary_base(chunks: Sequence[Any], _plan: Plan, context: Context) -> None:
    from mup_megatron.megatron.names import unwrapped

    for chunk in chunks:
        rotary: Any = getattr(unwrapped(chunk), "rotary_pos_emb", None)
        if rotary is not None:
            share = -math.log(rotary.inv_freq[1].item()) / math.log(context.target.rotary_base)
            rotary.inv_freq = rotary.inv_freq * context.r ** -(share * _counted(len(rotary.inv_freq), rotary.inv_freq))
            # What it computed before would be used again.
            getattr(rotary.forward, "cache_clear", lambda: None)()


def _counted(count: int, like: Any) -> Any:
    import torch

    return torch.arange(count, dtype=like.dtype, device=like.device)


def _collapsing(scheduler: Any, optimizer: Any, _plan: Plan, context: Context) -> None:
    """All groups get one learning rate after ten steps."""
    from mup_megatron.megatron.optimizer import parts_of

    step, taken = scheduler.step, [0]
    lr = context.recipe.hyperparameters.lr

    def stepped(increment: int) -> None:
        step(increment=increment)
        taken[0] += increment
        if taken[0] >= 10:
            for group in (group for part in parts_of(optimizer) for group in part.optimizer.param_groups):
                group["lr"] *= lr / group["max_lr"]

    scheduler.step = stepped


def _groups(select: Select, change: Callable[[dict[str, Any], PlanEntry, Scaling, Context], None]) -> OptimizerChange:
    """Changes the optimizer's groups of single parameters."""

    def changed(optimizer: Any, chunks: Sequence[Any], plan: Plan, context: Context) -> None:
        for entry, group in _single_groups(optimizer, chunks, plan):
            if select(entry):
                change(group, entry, context.ratios[entry.name], context)

    return changed


def _single_groups(optimizer: Any, chunks: Sequence[Any], plan: Plan) -> list[tuple[PlanEntry, dict[str, Any]]]:
    """Splits groups that several parameters share, so that one can be changed alone."""
    from mup_megatron.megatron.optimizer import parameters_with_groups, parts_of

    for part in parts_of(optimizer):
        groups = part.optimizer.param_groups
        groups[:] = [{**group, "params": [parameter]} for group in groups for parameter in group["params"]]
    found = parameters_with_groups(optimizer, chunks, tied=plan.tied)
    return [(plan[name], groups[0]) for name, _, groups in found if groups]


def _rates(select: Select, factor: Factor) -> OptimizerChange:
    """Multiplies learning rates, the floor's too."""

    def change(group: dict[str, Any], entry: PlanEntry, r: Scaling, context: Context) -> None:
        f = factor(entry, r, context)
        group["max_lr"], group["min_lr"] = entry.lr * f, entry.min_lr * f

    return _groups(select, change)


def _eps(select: Select, factor: Factor) -> OptimizerChange:
    def change(group: dict[str, Any], entry: PlanEntry, r: Scaling, context: Context) -> None:
        assert entry.eps is not None
        group["eps"] = entry.eps * factor(entry, r, context)

    return _groups(select, change)


def _decay(select: Select, wd_mult: Factor) -> OptimizerChange:
    def change(group: dict[str, Any], entry: PlanEntry, r: Scaling, context: Context) -> None:
        group["wd_mult"] = wd_mult(entry, r, context)

    return _groups(select, change)


def _floor(group: dict[str, Any], entry: PlanEntry, _: Scaling, context: Context) -> None:
    group["max_lr"], group["min_lr"] = entry.lr, context.recipe.hyperparameters.min_lr


def _other_beta2(group: dict[str, Any], _entry: PlanEntry, _r: Scaling, context: Context) -> None:
    h = context.recipe.hyperparameters
    group["betas"] = (h.adam_beta1, 0.99 if h.adam_beta2 < 0.97 else 0.9)


def _clip(factor: float) -> OptimizerChange:
    def change(optimizer: Any, _chunks: Sequence[Any], _plan: Plan, _context: Context) -> None:
        from mup_megatron.megatron.optimizer import parts_of

        for part in {id(part.config): part for part in [optimizer, *parts_of(optimizer)]}.values():
            part.config.clip_grad *= factor

    return change


def _forgotten_layer(optimizer: Any, chunks: Sequence[Any], plan: Plan, context: Context) -> None:
    of_layer = _rates(lambda e: is_hidden(e) and _in_last_layer(plan, e), lambda _e, r, _c: r.r_in)
    of_layer(optimizer, chunks, plan, context)


def _lost_tensor(optimizer: Any, chunks: Sequence[Any], plan: Plan, _context: Context) -> None:
    from mup_megatron.megatron.optimizer import parts_of

    lost = [g for e, g in _single_groups(optimizer, chunks, plan) if _qkv(e) and e.name.startswith("decoder.layers.0.")]
    for part in parts_of(optimizer):
        part.optimizer.param_groups[:] = [g for g in part.optimizer.param_groups if not any(g is x for x in lost)]


def _one_ratio(plan: Plan, context: Context) -> Plan:
    def changed(entry: PlanEntry) -> PlanEntry:
        if not is_hidden(entry):
            return entry
        own, r = context.ratios[entry.name], context.r
        exponent = context.recipe.parametrization.weight_decay_exponent
        assert entry.init_std is not None
        return replace(
            entry,
            init_std=entry.init_std * math.sqrt(own.r_in / r),
            lr=entry.lr * own.r_in / r,
            min_lr=entry.min_lr * own.r_in / r,
            eps=None if entry.eps is None else entry.eps * own.r_out / r,
            weight_decay=entry.weight_decay * (r / own.r_in) ** exponent,
        )

    return replace(plan, entries=tuple(changed(entry) for entry in plan.entries))


def _standard(_plan: Plan, context: Context) -> Plan:
    own = context.recipe.parametrization.model_copy(update={"rule": "standard"})
    wrong = context.recipe.model_copy(update={"parametrization": own})
    return wrong.plan(context.target)


def _without_overrides(_plan: Plan, context: Context) -> Plan:
    return context.recipe.model_copy(update={"per_parameter": ()}).plan(context.target)


def _unscaled_start(scheduler: Any, _optimizer: Any, _plan: Plan, context: Context) -> None:
    scheduler.init_lr = 0.1 * context.recipe.hyperparameters.lr


# ---- when ----------------------------------------------------------------------------------------------------------


def _adam(context: Context) -> bool:
    return context.recipe.parametrization.optimizer == "adam"


def _untied(context: Context) -> bool:
    return not context.target.tied


def _tied(context: Context) -> bool:
    return context.target.tied


def _turns(context: Context) -> bool:
    return context.target.position_embedding_type == "rope"


def _several_layers(context: Context) -> bool:
    return context.target.num_layers > 1


def _head_grows(context: Context) -> bool:
    return context.base.head_size != context.target.head_size


def _multiplies(key: str) -> Callable[[Context], bool]:
    return lambda context: bool(getattr(context.recipe.hyperparameters, key) != 1.0)


def _sides_differ(context: Context) -> bool:
    """Whether some hidden tensor has an r_in other than its r_out."""
    return any(r.r_in != r.r_out for r in _hidden_ratios(context))


def _several_ratios(context: Context) -> bool:
    return any(side != context.r for r in _hidden_ratios(context) for side in (r.r_in, r.r_out))


def _hidden_ratios(context: Context) -> list[Scaling]:
    return [context.ratios[e.name] for e in context.recipe.plan(context.target).entries if is_hidden(e)]


def _has_linear_biases(context: Context) -> bool:
    return context.target.bias_on_qkv


def _has_biases(context: Context) -> bool:
    return context.target.bias_on_qkv or context.target.normalization == "LayerNorm"


def _plain_gains(context: Context) -> bool:
    return not context.target.apply_layernorm_1p


def _decays(context: Context) -> bool:
    return context.recipe.hyperparameters.weight_decay > 0


def _decay_follows(context: Context) -> bool:
    return _decays(context) and context.recipe.parametrization.weight_decay_exponent > 0


def _clips(context: Context) -> bool:
    return context.recipe.hyperparameters.clip_grad > 0


def _other_depth(context: Context) -> bool:
    return context.base.num_layers != context.target.num_layers


def _own_rates(context: Context) -> bool:
    return any(own.lr_mult != 1.0 and not _elsewhere(own.match, context) for own in context.recipe.per_parameter)


def _elsewhere(match: str, context: Context) -> bool:
    return not any(fnmatch.fnmatchcase(name, match) for name in context.ratios)


# ---- the library ---------------------------------------------------------------------------------------------------

_LIBRARY = (
    # The forward pass.
    Mutant(
        name="attention-sqrt-d",
        what="Attention logits are scaled by 1/√d instead of 1/d.",
        cause=("attention-sqrt-d",),
        model=_softmax_scale(lambda _p, c: math.sqrt(c.target.head_size / c.base.head_size)),
        when=_head_grows,
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
        model=_softmax_scale(lambda _p, c: 1 / c.recipe.hyperparameters.attention_multiplier),
        when=_multiplies("attention_multiplier"),
    ),
    Mutant(
        name="readout-multiplied-twice",
        what="The logits are multiplied by α_out/r twice, by the model and by a wrapper.",
        cause=("readout-multiplied-twice",),
        model=_output("output_layer", lambda p, _: p.output_multiplier),
    ),
    Mutant(
        name="readout-not-multiplied",
        what="The logits are not multiplied at all.",
        cause=("readout-not-multiplied",),
        model=_output("output_layer", lambda p, _: 1 / p.output_multiplier),
    ),
    Mutant(
        name="readout-without-alpha",
        what="The logits are multiplied by 1/r, and the recipe's output_multiplier is lost.",
        cause=("output-multiplier-dropped",),
        model=_output("output_layer", lambda _, c: 1 / c.recipe.hyperparameters.output_multiplier),
        when=_multiplies("output_multiplier"),
    ),
    Mutant(
        name="readout-without-ratio",
        what="The logits are multiplied by the recipe's output_multiplier, which replaced 1/r.",
        cause=("readout-ratio-dropped",),
        model=_output("output_layer", lambda _, c: c.r),
    ),
    Mutant(
        name="embedding-multiplier-dropped",
        what="The recipe's embedding_multiplier is not applied.",
        cause=("embedding-multiplier-dropped",),
        model=_output("_embeddings", lambda _, c: 1 / c.recipe.hyperparameters.embedding_multiplier),
        when=_multiplies("embedding_multiplier"),
    ),
    Mutant(
        name="embedding-multiplier-on-tokens-only",
        what="The recipe's embedding_multiplier is applied to the token table and not to positions.",
        cause=("embedding-multiplier-on-tokens-only",),
        model=_output("position_embeddings", lambda _, c: 1 / c.recipe.hyperparameters.embedding_multiplier),
        when=lambda c: (
            c.target.position_embedding_type == "learned_absolute" and _multiplies("embedding_multiplier")(c)
        ),
    ),
    Mutant(
        name="stray-root-in-one-mlp",
        what="A layer that somebody edited multiplies the output of its fc1 by √r.",
        cause=("module-output",),
        model=_output("mlp.linear_fc1", lambda _, c: math.sqrt(c.r), last=True),
    ),
    Mutant(
        name="branch-scaled-by-depth",
        what="Every MLP's output is multiplied by 1/√L, on top of the initial std's 1/√(2L).",
        cause=("module-output",),
        model=_output("mlp.linear_fc2", lambda p, _: 1 / math.sqrt(p.num_layers)),
        when=lambda c: c.target.num_layers > 1,
    ),
    Mutant(
        name="evaluation-readout-twice",
        what="Under eval() the logits are multiplied by α_out/r twice.",
        cause=("evaluation-differs",),
        model=_in_evaluation("output_layer", lambda p, _: p.output_multiplier),
        trains_alike=True,
    ),
    Mutant(
        name="evaluation-branch",
        what="Under eval() every MLP's output is divided by 2.",
        cause=("evaluation-differs",),
        model=_in_evaluation("mlp.linear_fc2", lambda _p, _c: 0.5),
        trains_alike=True,
    ),
    Mutant(
        name="rotary-base-by-width",
        what="The rotary base is multiplied by r.",
        cause=("positions",),
        model=_rotary_base,
        when=_turns,
    ),
    # Several rules at once.
    Mutant(
        name="standard-parametrization",
        what="The base's values are used at every width.",
        cause=("standard-parametrization",),
        plan=_standard,
    ),
    Mutant(
        name="one-width-ratio",
        what="The ratio of hidden sizes is used for every tensor, whatever its own sides.",
        # Where key/value groups alone grow otherwise, these two are one and the same.
        cause=("one-width-ratio", "eps-by-fan-in"),
        plan=_one_ratio,
        when=_several_ratios,
    ),
    Mutant(
        name="overrides-dropped",
        what="The recipe's per_parameter is ignored.",
        cause=("overrides-dropped",),
        plan=_without_overrides,
        when=_own_rates,
    ),
    # Learning rates.
    Mutant(
        name="learning-rate-collapsed",
        what="All groups have one learning rate, the base's.",
        cause=("learning-rate-collapsed", "hidden-learning-rate"),
        optimizer=_rates(is_any, lambda e, _r, c: c.recipe.hyperparameters.lr / e.lr),
    ),
    Mutant(
        name="learning-rate-all-divided",
        what="All groups have the hidden weights' learning rate, η/r.",
        cause=("learning-rate-all-divided",),
        optimizer=_rates(lambda e: not is_hidden(e), lambda _e, _r, c: 1 / c.r),
    ),
    Mutant(
        name="embedding-learning-rate",
        what="The learning rate of the embeddings is divided by r.",
        cause=("embedding-learning-rate",),
        optimizer=_rates(is_embedding, lambda _e, _r, c: 1 / c.r),
    ),
    Mutant(
        name="readout-learning-rate",
        what="The learning rate of the readout is divided by r.",
        cause=("readout-learning-rate",),
        optimizer=_rates(is_readout, lambda _e, _r, c: 1 / c.r),
        when=_untied,
    ),
    Mutant(
        name="gain-learning-rate",
        what="The learning rate of norm gains is divided by r.",
        cause=("gain-learning-rate",),
        optimizer=_rates(is_gain, lambda _e, _r, c: 1 / c.r),
    ),
    Mutant(
        name="bias-learning-rate",
        what="The learning rate of biases is divided by r.",
        cause=("bias-learning-rate",),
        optimizer=_rates(is_bias, lambda _e, _r, c: 1 / c.r),
        when=_has_biases,
    ),
    Mutant(
        name="hidden-learning-rate-root",
        what="The learning rate of hidden weights is divided by √r instead of r.",
        cause=("hidden-learning-rate",),
        optimizer=_rates(is_hidden, lambda _e, r, _c: math.sqrt(r.r_in)),
    ),
    Mutant(
        name="hidden-learning-rate-squared",
        what="The learning rate of hidden weights is divided by r twice, by the plan and by a wrapper.",
        cause=("hidden-learning-rate",),
        optimizer=_rates(is_hidden, lambda _e, r, _c: 1 / r.r_in),
    ),
    Mutant(
        name="learning-rate-by-fan-out",
        what="The learning rate of hidden weights is divided by the ratio of fan_out instead of fan_in.",
        cause=("learning-rate-by-fan-out",),
        optimizer=_rates(is_hidden, lambda _e, r, _c: r.r_in / r.r_out),
        when=_sides_differ,
    ),
    Mutant(
        name="one-layer-forgotten",
        what="The learning rate of the last layer is not divided by r.",
        cause=("one-layer-learning-rate",),
        optimizer=_forgotten_layer,
        when=lambda c: c.target.num_layers > 1,
    ),
    Mutant(
        name="qkv-own-ratio",
        what="The learning rate of linear_qkv is divided by its rows over the base's hidden size.",
        cause=("tensor-learning-rate",),
        optimizer=_rates(_qkv, lambda e, _r, c: c.target.hidden_size / e.shape[0]),
    ),
    Mutant(
        name="tensor-not-trained",
        what="The optimizer lacks the first layer's linear_qkv.",
        cause=("not-trained",),
        optimizer=_lost_tensor,
    ),
    Mutant(
        name="warm-up-start",
        what="The warm-up starts at one learning rate for all groups instead of 0.",
        cause=("warm-up-start",),
        scheduler=_unscaled_start,
    ),
    Mutant(
        name="rates-collapse-later",
        what="After ten steps all groups have one learning rate, the base's.",
        cause=("learning-rate-collapsed", "learning-rate-schedule", "later-steps"),
        scheduler=_collapsing,
        trains_alike=True,
    ),
    Mutant(
        name="floor-unscaled",
        what="All groups decay to the base's min_lr.",
        cause=("learning-rate-floor",),
        optimizer=_groups(is_hidden, _floor),
    ),
    # Adam.
    Mutant(
        name="eps-unscaled",
        what="Adam's eps is the base's for all.",
        cause=("eps-not-scaled",),
        optimizer=_eps(is_any, lambda e, _r, c: c.recipe.hyperparameters.adam_eps / (e.eps or 1.0)),
        when=_adam,
    ),
    Mutant(
        name="eps-unscaled-for-inputs",
        what="Adam's eps is the base's for embeddings, gains and biases.",
        cause=("eps-not-scaled-for-inputs",),
        optimizer=_eps(is_input_role, lambda _e, r, _c: r.r_out),
        when=_adam,
    ),
    Mutant(
        name="eps-scaled-twice",
        what="Adam's eps is divided by the ratio of fan_out twice.",
        cause=("eps-scaled-twice",),
        optimizer=_eps(is_any, lambda e, _r, c: (e.eps or 1.0) / c.recipe.hyperparameters.adam_eps),
        when=_adam,
    ),
    Mutant(
        name="eps-by-fan-in",
        what="Adam's eps is divided by the ratio of fan_in instead of fan_out.",
        # Where key/value groups alone grow otherwise, these two are one and the same.
        cause=("eps-by-fan-in", "one-width-ratio"),
        optimizer=_eps(is_hidden, lambda _e, r, _c: r.r_out / r.r_in),
        when=lambda c: _adam(c) and _sides_differ(c),
    ),
    Mutant(
        name="other-beta2",
        what="Adam's second beta is not the recipe's.",
        cause=("optimizer-differs",),
        optimizer=_groups(is_any, _other_beta2),
        when=_adam,
    ),
    Mutant(
        name="clipping-lower",
        what="Gradients are clipped at a tenth of the recipe's clip_grad.",
        cause=("clipping",),
        optimizer=_clip(0.1),
        when=_clips,
    ),
    Mutant(
        name="clipping-dropped",
        what="Gradients are not clipped.",
        cause=("clipping",),
        optimizer=_clip(0.0),
        when=_clips,
    ),
    Mutant(
        name="gradients-summed",
        what="Gradients of four micro-batches are summed instead of averaged.",
        cause=("gradients-scaled",),
        model=_gradients_times(4.0),
        trains_alike=True,
    ),
    # Weight decay.
    Mutant(
        name="weight-decay-uncompensated",
        what="The weight decay of hidden weights is the base's: not multiplied by r where the rate was divided by it.",
        cause=("weight-decay-not-compensated",),
        optimizer=_decay(is_hidden, lambda _e, _r, _c: 1.0),
        when=_decay_follows,
    ),
    Mutant(
        name="weight-decay-on-vectors",
        what="Biases and gains have weight decay.",
        cause=("weight-decay-on-vectors",),
        optimizer=_decay(is_vector, lambda _e, _r, _c: 1.0),
        when=_decays,
    ),
    Mutant(
        name="embedding-weight-decay",
        what="The weight decay of the embeddings is multiplied by r.",
        cause=("embedding-weight-decay",),
        optimizer=_decay(is_embedding, lambda _e, _r, c: c.r),
        when=_decays,
    ),
    Mutant(
        name="weight-decay-off",
        what="There is no weight decay.",
        cause=("weight-decay-off",),
        optimizer=_decay(is_any, lambda _e, _r, _c: 0.0),
        when=_decays,
    ),
    # Initial weights.
    Mutant(
        name="init-unscaled",
        what="Hidden weights start with the base's std.",
        cause=("hidden-init",),
        model=_weights(is_hidden, lambda _e, r, _c: math.sqrt(r.r_in)),
    ),
    Mutant(
        name="init-linear",
        what="Hidden weights start with σ/r instead of σ/√r.",
        cause=("hidden-init",),
        model=_weights(is_hidden, lambda _e, r, _c: 1 / math.sqrt(r.r_in)),
    ),
    Mutant(
        name="init-by-shard",
        what="The std of row-parallel weights follows one tensor-parallel rank's share of fan_in, of two.",
        cause=("init-by-shard", "residual-init"),
        model=_weights(is_residual, lambda _e, _r, _c: math.sqrt(2)),
    ),
    Mutant(
        name="init-by-fan-out",
        what="The std of hidden weights follows fan_out instead of fan_in.",
        cause=("init-by-fan-out",),
        model=_weights(is_hidden, lambda _e, r, _c: math.sqrt(r.r_in / r.r_out)),
        when=_sides_differ,
    ),
    Mutant(
        name="residual-init-depth",
        what="What writes into the residual stream starts with 1/√(2L) of the base's depth.",
        # The check sees √2 and cannot know where it comes from.
        cause=("residual-init", "init-by-shard"),
        model=_weights(is_residual, lambda _e, _r, c: math.sqrt(c.target.num_layers / c.base.num_layers)),
        when=_other_depth,
    ),
    Mutant(
        name="residual-init-missing",
        what="What writes into the residual stream starts without 1/√(2L).",
        cause=("residual-init",),
        model=_weights(is_residual, lambda _e, _r, c: math.sqrt(2 * c.target.num_layers)),
    ),
    Mutant(
        name="residual-init-twice",
        what="What writes into the residual stream starts with 1/√(2L) twice.",
        cause=("residual-init",),
        model=_weights(is_residual, lambda _e, _r, c: 1 / math.sqrt(2 * c.target.num_layers)),
    ),
    Mutant(
        name="tied-init-linear",
        what="The tied table is drawn as a readout whose 1/r is in its weight: σ/r.",
        cause=("embedding-init",),
        model=_weights(_word_embedding, lambda _e, _r, c: 1 / c.r),
        when=_tied,
    ),
    Mutant(
        name="tied-init-root",
        what="The tied table is drawn as hidden weights are: σ/√r.",
        cause=("embedding-init",),
        model=_weights(_word_embedding, lambda _e, _r, c: 1 / math.sqrt(c.r)),
        when=_tied,
    ),
    Mutant(
        name="embedding-init",
        what="The embeddings are drawn as hidden weights are: σ/√r.",
        cause=("embedding-init",),
        model=_weights(is_embedding, lambda _e, _r, c: 1 / math.sqrt(c.r)),
        when=_untied,
    ),
    Mutant(
        name="readout-init",
        what="The readout is drawn as hidden weights are: σ/√r.",
        cause=("readout-init",),
        model=_weights(is_readout, lambda _e, _r, c: 1 / math.sqrt(c.r)),
        when=_untied,
    ),
    Mutant(
        name="readout-zeroed",
        what="The readout starts at 0, and the recipe does not say so.",
        cause=("zero-init",),
        model=_weights(is_readout, lambda _e, _r, _c: 0.0),
        when=_untied,
    ),
    Mutant(
        name="queries-zeroed",
        what="Queries start at 0, and the recipe does not say so.",
        cause=("queries-zeroed",),
        model=_qkv_rows(slice(None, -2), lambda _: 0.0),
    ),
    Mutant(
        name="key-value-rows",
        what="The rows of keys and values are drawn as if their fan_in were larger: another 1/√r.",
        cause=("qkv-rows",),
        model=_qkv_rows(slice(-2, None), lambda c: 1 / math.sqrt(c.r)),
    ),
    Mutant(
        name="gains-scaled",
        what="Norm gains start at 1/√r instead of 1.",
        cause=("gain-init",),
        model=_weights(is_gain, lambda _e, _r, c: 1 / math.sqrt(c.r)),
        when=_plain_gains,
    ),
    Mutant(
        name="biases-drawn",
        what="Biases are drawn with σ instead of starting at 0.",
        cause=("bias-init",),
        model=_drawn_biases,
        when=_has_linear_biases,
    ),
    Mutant(
        name="layers-drawn-alike",
        what="All layers start from the same draw.",
        cause=("draws-alike",),
        model=_drawn_alike,
        when=_several_layers,
    ),
    Mutant(
        name="one-tensor-init",
        what="The last layer's linear_fc1 starts with a std that is 10 % too large.",
        cause=("one-layer-init", "tensor-init"),
        model=lambda chunks, plan, context: _weights(
            lambda e: _in_last_layer(plan, e) and e.name.endswith("linear_fc1.weight"), lambda _e, _r, _c: 1.1
        )(chunks, plan, context),
    ),
    Mutant(
        name="draw-uniform",
        what="Hidden weights are drawn from a uniform distribution with the right std.",
        cause=("draw-shape",),
        model=_uniform,
    ),
    Mutant(
        name="draw-off-centre",
        what="What writes into the residual stream starts with a mean of 0.3 of its std.",
        cause=("draw-mean",),
        model=_off_centre,
    ),
)

MUTANTS: dict[str, Mutant] = {mutant.name: mutant for mutant in _LIBRARY}
