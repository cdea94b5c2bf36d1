"""Mistakes about optimizers that step matrices and leave the rest to another: their rates, and which steps what."""

import math
from collections.abc import Mapping, Sequence

from mup_megatron.check.entries import is_embedding, is_hidden, is_matrix
from mup_megatron.check.measure.measurements import FROM_STEPS, Quantity
from mup_megatron.check.verdict.causes.at_width import AtWidth
from mup_megatron.check.verdict.causes.hypothesis import Hypothesis, LogFactor, absorbing, log_of, of_weights
from mup_megatron.check.verdict.causes.observed import GONE, Observation
from mup_megatron.theory import PlanEntry, optimizers


def matrices(at: Mapping[int, AtWidth]) -> list[Hypothesis]:
    """Rates that do not make up for the scale of the updates; none of an optimizer whose updates have no scale."""
    plan = next(iter(at.values())).plan
    if plan.scale_mode is None:
        return []
    at_base: Mapping[Quantity, LogFactor] = {
        Quantity.LEARNING_RATE: lambda e, w: math.log(w.plan.lr / e.lr),
        Quantity.WEIGHT_DECAY: lambda e, w: log_of(w.plan.weight_decay) - log_of(e.weight_decay),
    }

    def own(entry: PlanEntry) -> bool:
        return entry.optimizer == plan.optimizer and is_matrix(entry)

    mode = f"muon_scale_mode {plan.scale_mode}"
    return [
        of_weights(
            "matrix-rates-unscaled",
            f"matrices have the base's learning rate and weight decay, and under {mode} their updates grow otherwise "
            "than their sides want. Give them the plan's factor: native μP leaves matrices of this optimizer alone.",
            at_base,
            at,
            lambda e: own(e) and not is_embedding(e),
        ),
        of_weights(
            "table-rates-unscaled",
            f"tables that are stepped as matrices have the base's learning rate and weight decay, and under {mode} "
            "their rows move otherwise at each width. Give them the plan's factor.",
            at_base,
            at,
            lambda e: own(e) and is_embedding(e),
        ),
        of_weights(
            "matrix-rates-as-adams",
            "the learning rate of matrices is divided by r besides, as Adam's is. An orthogonalised update does not "
            "add up over fan_in as Adam's does: give them the plan's factor alone.",
            Quantity.LEARNING_RATE,
            at,
            lambda e: own(e) and is_hidden(e),
            lambda e, _: -math.log(e.width_ratio),
        ),
    ]


def routing(at: Mapping[int, AtWidth], observed: Sequence[Observation]) -> list[Hypothesis]:
    """Some tensors of one of several optimizers move otherwise than its others do, or none of its tensors moves."""
    plan = next(iter(at.values())).plan
    if len(plan.optimizers) == 1:
        return []
    found = []
    for optimizer in plan.optimizers:
        title = optimizers()[optimizer].title
        own = [o for o in observed if o.key.name in plan.by_name and plan[o.key.name].optimizer == optimizer]
        rates = [o for o in own if o.key.quantity is Quantity.LEARNING_RATE]
        still = dict.fromkeys(o.key.name for o in rates if o.deviation < GONE)
        if still and len(still) == len({o.key.name for o in rates}):
            sentence = (
                f"nothing that {title} is to step moves in training. Hand over each of the recipe's optimizers, and "
                "step each."
            )
            found.append(Hypothesis("not-trained", sentence, absorbing(still, FROM_STEPS), prior=0.985))
        of_it = [o for o in own if o.key.quantity is Quantity.UNEXPLAINED]
        off = dict.fromkeys(o.key.name for o in of_it if o.deviation != 0)
        if not off or len(off) == len({o.key.name for o in of_it}):
            continue
        first = next(iter(off))
        sentence = (
            f"{first}: the recipe has {title} for it, whose steps others have and this one has not. Look for what "
            "gives it to another optimizer, as is_embedding_or_output_parameter does in Megatron, or what takes its "
            "parts for one matrix."
        )
        found.append(Hypothesis("stepped-by-another", sentence, absorbing(off, FROM_STEPS), prior=0.985))
    return found
