"""Mistakes with Megatron-Core, each made in a run after it was built, or in its plan."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from exam.mistakes.entries import mistake
from exam.setups import Megatron, Setup
from mup_megatron.check.mutants import Context, Mutant
from mup_megatron.megatron.names import named_parameters, unwrapped
from mup_megatron.recipe import Recipe
from mup_megatron.theory import Plan, PlanEntry


def _with_mutant(setup: Megatron, name: str, **changes: Any) -> Setup:
    return replace(setup, mutant=Mutant(name=name, what=name, cause=(), **changes))


def _weights(chunks: Sequence[Any], plan: Plan) -> list[tuple[PlanEntry, Any]]:
    return [(plan[name], parameter) for name, parameter in named_parameters(chunks, tied=plan.tied)]


def _groups(optimizer: Any, chunks: Sequence[Any], plan: Plan) -> list[tuple[PlanEntry, dict[str, Any]]]:
    """One for each parameter, and what it is for."""
    from mup_megatron.megatron.optimizer import parameters_with_groups, parts_of

    for part in parts_of(optimizer):
        groups = part.optimizer.param_groups
        groups[:] = [{**group, "params": [parameter]} for group in groups for parameter in group["params"]]
    return [
        (plan[name], groups[0])
        for name, _, groups in parameters_with_groups(optimizer, chunks, tied=plan.tied)
        if groups
    ]


@mistake("megatron", "model code", "decoder.layers.1.self_attention*")
def second_layers_logits_halved(setup: Megatron) -> Setup:
    """The logits of the second layer are divided by its number, and nothing multiplies them again."""

    def model(chunks: Sequence[Any], _plan: Plan, _context: Context) -> None:
        for chunk in chunks:
            part: Any = unwrapped(chunk).get_submodule("decoder.layers.1.self_attention.core_attention")
            part.softmax_scale /= 2

    return _with_mutant(setup, "second-layers-logits-halved", model=model)


@mistake("megatron", "initial weights", "decoder.layers.*.mlp.linear_fc1*")
def one_shard_drawn_as_the_base(setup: Megatron) -> Setup:
    """Of two tensor-parallel shards of linear_fc1 the first is drawn with the base's std."""

    def model(chunks: Sequence[Any], plan: Plan, context: Context) -> None:
        for entry, parameter in _weights(chunks, plan):
            if entry.name.endswith("linear_fc1.weight"):
                parameter.data[: len(parameter) // 2] *= math.sqrt(context.r)

    return _with_mutant(setup, "one-shard-drawn-as-the-base", model=model)


@mistake("megatron", "model code", "embedding.position_embeddings*")
def positions_multiplied_twice(setup: Megatron) -> Setup:
    """The embedding multiplier is applied to positions twice, alone and in the sum with tokens."""

    def model(chunks: Sequence[Any], plan: Plan, _context: Context) -> None:
        factor = plan.embedding_multiplier
        for chunk in chunks:
            table = unwrapped(chunk).get_submodule("embedding.position_embeddings")
            table.register_forward_hook(lambda _m, _a, out: factor * out)

    return _with_mutant(setup, "positions-multiplied-twice", model=model)


@mistake("megatron", "initial weights", "decoder.final_layernorm*")
def readout_folded_into_the_final_gain_too(setup: Megatron) -> Setup:
    """The readout's multiplier is folded into the final norm's gain, as for export, and applied as well."""

    def model(chunks: Sequence[Any], plan: Plan, _context: Context) -> None:
        for entry, parameter in _weights(chunks, plan):
            if entry.name == "decoder.final_layernorm.weight":
                parameter.data.mul_(plan.output_multiplier)

    return _with_mutant(setup, "readout-folded-into-the-final-gain-too", model=model)


@mistake("megatron", "initial weights", "decoder.layers.*.self_attention.linear_qkv*")
def queries_taken_for_one_block(setup: Megatron) -> Setup:
    """The first third of linear_qkv is halved as if it were all queries; Megatron has them by groups, between keys."""

    def model(chunks: Sequence[Any], plan: Plan, _context: Context) -> None:
        for entry, parameter in _weights(chunks, plan):
            if entry.name.endswith("linear_qkv.weight"):
                parameter.data[: len(parameter) // 3] *= 0.5

    return _with_mutant(setup, "queries-taken-for-one-block", model=model)


@mistake("megatron", "initial weights", "decoder.layers.0.*")
def residual_std_by_a_layers_number(setup: Megatron) -> Setup:
    """What writes into the residual stream starts with 1/√(2l) of its own layer's number instead of their count."""

    def model(chunks: Sequence[Any], plan: Plan, context: Context) -> None:
        for entry, parameter in _weights(chunks, plan):
            if entry.name.endswith(("linear_proj.weight", "linear_fc2.weight")):
                number = int(entry.name.split(".")[2]) + 1
                parameter.data.mul_(math.sqrt(context.target.num_layers / number))

    return _with_mutant(setup, "residual-std-by-a-layers-number", model=model)


@mistake("megatron", "optimizer", "decoder.layers.1.*", "decoder.final_layernorm*", "output_layer*")
def last_stage_with_the_bases_eps_and_decay(setup: Megatron) -> Setup:
    """The last pipeline stage makes its own groups: with the right learning rates, and the base's eps and decay."""

    def optimizer(built: Any, chunks: Sequence[Any], plan: Plan, _context: Context) -> None:
        for entry, group in _groups(built, chunks, plan):
            if entry.name.startswith(("decoder.layers.1.", "decoder.final_layernorm", "output_layer")):
                group["eps"] = plan.adam_eps
                group["wd_mult"] = 0.0 if entry.is_vector else 1.0

    return _with_mutant(setup, "last-stage-with-the-bases-eps-and-decay", optimizer=optimizer)


@mistake("megatron", "optimizer")
def groups_restored_by_their_number(setup: Megatron) -> Setup:
    """A resume gives each group the values of the one before it, because one group more was saved than there are."""

    def optimizer(built: Any, chunks: Sequence[Any], plan: Plan, _context: Context) -> None:
        found = [group for _, group in _groups(built, chunks, plan)]
        keys = ("max_lr", "min_lr", "eps", "wd_mult")
        values = [{key: group[key] for key in keys if key in group} for group in found]
        for group, others in zip(found[1:], values, strict=False):
            group.update(others)

    return _with_mutant(setup, "groups-restored-by-their-number", optimizer=optimizer)


@mistake("megatron", "optimizer", "embedding*")
def embeddings_without_decay(setup: Megatron) -> Setup:
    """Embeddings have no weight decay, as in many a script; the base's had."""

    def optimizer(built: Any, chunks: Sequence[Any], plan: Plan, _context: Context) -> None:
        for entry, group in _groups(built, chunks, plan):
            if entry.name.startswith("embedding"):
                group["wd_mult"] = 0.0

    return _with_mutant(setup, "embeddings-without-decay", optimizer=optimizer)


@mistake("megatron", "optimizer", "output_layer*")
def rate_of_its_own_for_the_readout(setup: Megatron) -> Setup:
    """The readout has a decoupled learning rate, a quarter of the recipe's."""

    def optimizer(built: Any, chunks: Sequence[Any], plan: Plan, _context: Context) -> None:
        for entry, group in _groups(built, chunks, plan):
            if entry.name.startswith("output_layer"):
                group["max_lr"], group["min_lr"] = entry.lr / 4, entry.min_lr / 4

    return _with_mutant(setup, "rate-of-its-own-for-the-readout", optimizer=optimizer)


@mistake("megatron", "schedule")
def decay_that_rises(setup: Megatron) -> Setup:
    """Weight decay rises from 0 to the recipe's over the run."""

    def scheduler(built: Any, _optimizer: Any, _plan: Plan, _context: Context) -> None:
        built.start_wd, built.wd_incr_style = 0.0, "linear"

    return _with_mutant(setup, "decay-that-rises", scheduler=scheduler)


@mistake("megatron", "schedule")
def cosine_for_linear(setup: Megatron) -> Setup:
    """The learning rate falls along a cosine, and the recipe says along a line."""

    def scheduler(built: Any, _optimizer: Any, _plan: Plan, _context: Context) -> None:
        built.lr_decay_style = "cosine"

    return _with_mutant(setup, "cosine-for-linear", scheduler=scheduler)


@mistake("megatron-overrides", "recipe")
def overrides_applied_twice(setup: Megatron) -> Setup:
    """The recipe's factors for single tensors are applied to a plan that has them already."""

    def plan(right: Plan, context: Context) -> Plan:
        bare = context.recipe.model_copy(update={"per_parameter": ()}).plan(context.target)
        return replace(
            right,
            entries=tuple(
                replace(e, lr=e.lr * e.lr / bare[e.name].lr, min_lr=e.min_lr * e.lr / bare[e.name].lr)
                for e in right.entries
            ),
        )

    return _with_mutant(setup, "overrides-applied-twice", plan=plan)


@mistake("megatron", "recipe")
def base_with_fewer_heads(setup: Megatron) -> Setup:
    """The plan leads from a base with half as many heads, of twice the size, as was tuned."""

    def plan(_right: Plan, context: Context) -> Plan:
        base = context.base.model_copy(update={"num_attention_heads": context.base.num_attention_heads // 2})
        return _from_base(context.recipe, base, context)

    return _with_mutant(setup, "base-with-fewer-heads", plan=plan)


@mistake("megatron-fixed-ffn", "recipe", "decoder.layers.*.mlp*")
def base_of_another_ffn(setup: Megatron) -> Setup:
    """The plan leads from a base whose ffn is in proportion, and that which was tuned has the target's."""

    def plan(_right: Plan, context: Context) -> Plan:
        base = context.base.model_copy(update={"ffn_hidden_size": 2 * context.base.hidden_size})
        return _from_base(context.recipe, base, context)

    return _with_mutant(setup, "base-of-another-ffn", plan=plan)


def _from_base(recipe: Recipe, base: Any, context: Context) -> Plan:
    return recipe.model_copy(update={"base": base}).plan(context.target)


@mistake("megatron-tied", "training loop", "embedding*")
def tied_gradients_not_summed(setup: Megatron) -> Setup:
    """The readout's share of a tied table's gradient is lost between the first pipeline stage and the last."""

    def model(chunks: Sequence[Any], _plan: Plan, _context: Context) -> None:
        def detached(_module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            return args, {**kwargs, "weight": kwargs["weight"].detach()}

        for chunk in chunks:
            unwrapped(chunk).get_submodule("output_layer").register_forward_pre_hook(detached, with_kwargs=True)

    return _with_mutant(setup, "tied-gradients-not-summed", model=model)


@mistake("megatron-grouped", "initial weights", "decoder.layers.*.self_attention.linear_qkv*")
def keys_repeated_for_each_query(setup: Megatron) -> Setup:
    """The keys and values of groups that stay as few are multiplied by √r, because more queries share each of them."""

    def model(chunks: Sequence[Any], plan: Plan, context: Context) -> None:
        for entry, parameter in _weights(chunks, plan):
            if entry.name.endswith("linear_qkv.weight"):
                m = context.target
                rows = parameter.data.view(m.query_groups, -1, m.head_size, parameter.shape[1])
                rows[:, -2:] *= math.sqrt(context.r)

    return _with_mutant(setup, "keys-repeated-for-each-query", model=model)
