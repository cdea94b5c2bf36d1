"""A plan's multipliers in the weights of a Hugging Face model, so that the library's own code needs none of them; and
out of the weights of a model that was trained without.

What belongs to whole weights is known from the plan, whatever family it is (`theory/folding.py`). A family is named for
two things that no plan says: what makes the queries of an attention, and which norm is before a tied readout.
"""

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from mup_megatron.errors import InputError
from mup_megatron.live.folds import parts
from mup_megatron.modules.applied import require_match
from mup_megatron.modules.apply import apply_plan
from mup_megatron.modules.attention import attention_modules
from mup_megatron.modules.marker import marked
from mup_megatron.modules.names import named_parameters, unwrapped
from mup_megatron.modules.weights import Initialize, gathered_parameter, is_sharded
from mup_megatron.theory import BRANCH, READOUT, SOFTMAX, Fold, Plan, PlanError, Site, fold, fold_branches
from mup_megatron.validation import brief


@dataclass(frozen=True, slots=True)
class Carried:
    """The multipliers of a plan that a family's own configuration has keys for."""

    names: frozenset[str] = frozenset()
    """As `Place.carries` names them."""
    keys: Mapping[str, float] = field(default_factory=dict)
    """What the configuration says then."""


@dataclass(frozen=True, slots=True)
class _Family:
    queries: str
    """Pattern of the rest of a name behind an attention's: what the queries are linear in."""
    norm: str
    """The norm before the readout, within the model without its head."""
    first_of: int = 1
    """Queries are the first of so many equal parts of what it gives."""
    carried: Callable[[PreTrainedModel, Plan], Carried] = lambda model, plan: Carried()


def _granite(model: PreTrainedModel, plan: Plan) -> Carried:
    """Returns all four; of branches and attentions, where they are multiplied alike."""
    config: Any = model.config
    table = next(entry for entry in plan.entries if entry.is_embedding)
    branches = {_ratio(plan.site(place)) for place in plan.places if place.carries == BRANCH} or {1.0}
    scales = {_ratio(plan.attention(name)) for name, _, _ in attention_modules(model)}
    names = {table.name, READOUT}
    keys = {
        "embedding_multiplier": config.embedding_multiplier * table.multiplier / table.stock_multiplier,
        # Logits are divided by it.
        "logits_scaling": config.logits_scaling * plan.stock_readout_ratio / plan.output_multiplier,
    }
    for name, key, ratios in (
        (SOFTMAX, "attention_multiplier", scales),
        (BRANCH, "residual_multiplier", branches),
    ):
        if len(ratios) == 1:
            names.add(name)
            keys[key] = getattr(config, key) * ratios.pop()
    return Carried(frozenset(names), keys)


_PROJECTED = r"q_proj\.(?:weight|bias)"
FAMILIES: Mapping[str, _Family] = {
    **dict.fromkeys("llama mistral mixtral qwen2".split(), _Family(_PROJECTED, "norm")),
    "granite": _Family(_PROJECTED, "norm", carried=_granite),
    # What is behind a norm of queries forgets what is before it.
    "qwen3": _Family(r"q_norm\.weight", "norm"),
    "deepseek_v3": _Family(r"q(?:_b)?_proj\.weight", "norm"),
    "gpt2": _Family(r"c_attn\.(?:weight|bias)", "ln_f", first_of=3),
}
"""By model type."""


def carried_by(model: PreTrainedModel, plan: Plan) -> Carried:
    """Returns the multipliers that the configuration of a model has keys for, and what it says with them."""
    family = FAMILIES.get(model.config.model_type)
    return Carried() if family is None else family.carried(model, plan)


def folds_of(model: PreTrainedModel, plan: Plan, *, carried: Collection[str] = ()) -> Sequence[Fold]:
    """Returns what has to be done to a model's weights for the library's own code to compute what it does with a plan.

    Args:
        model: as the library builds it, on any device; its weights are not looked at.
        plan: that it was trained with.
        carried: the multipliers that its configuration has keys for.

    Raises:
        InputError: a multiplier cannot be folded exactly, or where to is not known of this model type; names it.
    """
    own = replace(plan, output_multiplier=plan.output_multiplier / plan.stock_readout_ratio)
    try:
        own = own if BRANCH in carried else fold_branches(own)
    except PlanError as error:
        raise InputError(str(error)) from None
    if own.tied and READOUT not in carried:
        own = _with_readout_norm(model, own)
    kept = {*carried, *([own.readout] if READOUT in carried and not own.tied else [])}
    own = fold(own, {READOUT, *own.by_name} - kept)
    whole = [Fold(e.name, e.folded, e.fold_offset) for e in own.entries if (e.folded, e.fold_offset) != (1.0, 0.0)]
    return whole if SOFTMAX in carried else [*whole, *_of_queries(model, plan)]


def _with_readout_norm(model: PreTrainedModel, plan: Plan) -> Plan:
    """Returns a tied model's plan with the norm that the readout's multiplier goes into, if any is left for it."""
    assert plan.readout is not None
    table = plan[plan.readout]
    if plan.output_multiplier == table.multiplier / table.stock_multiplier:
        return plan
    family = _family(model, f"{plan.readout} is tied, and the norm before the readout", "output_multiplier")
    norm = f"{model.base_model_prefix}.{family.norm}"
    names = tuple(entry.name for entry in plan.entries if entry.module == norm)
    assert names, f"{type(model).__name__} has no {norm}"
    return replace(plan, readout_norm=names)


def _of_queries(model: PreTrainedModel, plan: Plan) -> Iterator[Fold]:
    """Yields a fold of what the queries of each attention are linear in."""
    for name, _, _ in attention_modules(model):
        site = plan.attention(name)
        if not site.changes:
            continue
        family = _family(model, "what makes its queries", "the scale of attention")
        pattern = re.compile(rf"{re.escape(name)}\.{family.queries}")
        made = [entry for entry in plan.entries if pattern.fullmatch(entry.name)]
        if not made:
            raise InputError(
                f"{brief(name, 60)}: what makes its queries is not known, so that its scale cannot be folded. Load the "
                f"model with its plan instead."
            )
        for entry in made:
            side = len(entry.shape) - 1 if family.first_of > 1 else 0
            rows = None if family.first_of == 1 else (range(entry.shape[side] // family.first_of),)
            yield Fold(entry.name, _ratio(site), rows=rows, side=side)


def _family(model: PreTrainedModel, unknown: str, multiplier: str) -> _Family:
    found = FAMILIES.get(model.config.model_type)
    if found is None:
        raise InputError(
            f"model type {model.config.model_type}: {unknown} is not known, so that {multiplier} cannot be folded into "
            f"weights. Known are {', '.join(FAMILIES)}; load others with their plan instead."
        )
    return found


def _ratio(site: Site) -> float:
    """Returns what a site adds to what the library's own code does."""
    return site.factor / site.stock


# ---- the start of a run --------------------------------------------------------------------------------------------


def start_from(model: torch.nn.Module, plan: Plan) -> None:
    """Applies a plan to a pretrained model, whose weights give up what its multipliers add: the function stays.

    Under ZeRO-3 every rank has to call it. What this means for learning rates is in docs/export.md.

    Args:
        model: as `from_pretrained` gives it, wrapped or not; before it is sharded.
        plan: of the run to come.

    Raises:
        InputError: the model was trained with multipliers, has a plan already or does not fit it, or they cannot be
            taken out of its weights; before anything is changed.
    """
    inner = unwrapped(model)
    if not isinstance(inner, PreTrainedModel):
        raise InputError(f"a {type(inner).__name__} is no model of Hugging Face's. Give that which it has inside.")
    if (mark := marked(inner)) is not None:
        raise InputError(
            f"the model was trained with the recipe {mark.fingerprint[:12]}, whose multipliers are not in its weights. "
            'Call apply_plan(model, plan, initialize="keep").'
        )
    require_match(inner, plan)
    todo = folds_of(inner, plan)
    held = dict(named_parameters(inner))
    for name, parameter in held.items():
        if parameter.is_meta or is_sharded(parameter):
            raise InputError(
                f"{brief(name, 60)} is not whole on this rank. Call start_from on the loaded model, before fully_shard."
            )
    apply_plan(model, plan, initialize=Initialize.KEEP)
    for each in reversed(todo):
        with gathered_parameter(held[each.tensor]), torch.no_grad():
            for part in parts(held[each.tensor], each):
                part.sub_(each.offset).div_(each.factor)
