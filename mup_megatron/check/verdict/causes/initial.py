"""Mistakes in initial weights."""

import math
from collections.abc import Mapping

from mup_megatron.architectures.measured import Kind
from mup_megatron.check.entries import (
    is_embedding,
    is_hidden,
    is_linear_bias,
    is_plain_bias,
    is_readout,
    is_residual,
)
from mup_megatron.check.measure.measurements import Key, Quantity
from mup_megatron.check.verdict.causes.at_width import AtWidth
from mup_megatron.check.verdict.causes.forward import at_modules
from mup_megatron.check.verdict.causes.hypothesis import Hypothesis, LogFactor, Predict, Select, of_weights
from mup_megatron.check.verdict.causes.powers import POWERS
from mup_megatron.theory import PlanEntry


def initial_weights(at: Mapping[int, AtWidth]) -> list[Hypothesis]:
    """Depth, shards, fan_out, biases, zeros, and the rows of queries, keys and values in one matrix."""
    some = next(iter(at.values()))

    def h(name: str, sentence: str, select: Select, factor: LogFactor) -> Hypothesis:
        return of_weights(name, sentence, Quantity.INITIAL, at, select, factor)

    def depth(_: PlanEntry, here: AtWidth) -> float:
        # Under a rule of depth it has the base's.
        counted = here.depth_at_base if here.plan.deepened and here.depth_at_base is not None else here.plan.depth
        return 0.5 * math.log(counted)

    what = "the initial std of what writes into the residual stream"
    found = [
        h(
            "residual-init",
            f"{what} lacks Megatron's 1/√(2L). Divide it.",
            is_residual,
            depth,
        ),
        h(
            "residual-init",
            f"{what} is divided by √(2L) twice. Divide it once.",
            is_residual,
            lambda e, w: -depth(e, w),
        ),
    ]
    base = some.depth_at_base
    if base is not None and not some.plan.deepened:
        found.append(
            h(
                "residual-init",
                f"{what} has the base's depth in its 1/√(2L). Take the target's.",
                is_residual,
                lambda _, w: 0.5 * math.log(w.plan.depth / base),
            )
        )
    if any(stack.branches == 1 for stack in some.plan.stacks.values()):
        found.append(
            h(
                "residual-init",
                f"{what} has a GPT's 1/√(2L), with the number of a hybrid model's layers for L. Each of these is one "
                "branch: divide by √L.",
                is_residual,
                _constant(-0.5 * math.log(2)),
            )
        )
    found += [
        h(
            "init-by-shard",
            f"{what} is √{ranks} times too large: it follows one tensor-parallel rank's share of fan_in, or 1/√L "
            "stands for 1/√(2L). Use the global fan_in.",
            is_residual,
            _constant(0.5 * math.log(ranks)),
        )
        for ranks in (2, 4, 8)
    ]
    found += [
        h(
            "init-by-fan-out",
            "the initial std of hidden weights follows fan_out. Divide σ by the root of the ratio of fan_in.",
            is_hidden,
            lambda e, w: 0.5 * math.log(e.width_ratio / w.r_out(e)),
        ),
        h(
            "bias-init",
            "biases do not start at 0. Initialise them at 0.",
            is_linear_bias,
            lambda _e, _w: math.inf,
        ),
        h(
            "bias-init",
            "biases do not start at 0, nor do those of norms. Initialise them at 0.",
            is_plain_bias,
            lambda _e, _w: math.inf,
        ),
    ]
    zero = "starts at 0, and the recipe does not say so. Say it there, with init_mult 0, or draw it."
    found += [
        h("zero-init", f"{who} {zero}", select, lambda _e, _w: -math.inf)
        for who, select in (
            ("the readout", is_readout),
            ("what writes into the residual stream", is_residual),
            ("the embedding", is_embedding),
        )
    ]
    if some.fused:
        found += _inside_qkv(at)
    return found


def _constant(value: float) -> LogFactor:
    return lambda _entry, _at: value


def _inside_qkv(at: Mapping[int, AtWidth]) -> list[Hypothesis]:
    """About queries, keys and values, whose rows are in one matrix."""

    def share(key: Key, here: AtWidth) -> float | None:
        """Returns the queries' share of the rows, if it is such a weight."""
        return here.fused.get(key.name) if key.quantity is Quantity.INITIAL else None

    def zeroed(key: Key, width: int) -> float:
        here = at[width]
        if (queries := share(key, here)) is not None:
            return 0.5 * math.log(1 - queries)
        # A norm of nothing is nothing as well.
        norms = [name.rpartition(".")[0] for name in here.plan.query_norms]
        return at_modules(lambda _: (*here.of_kind(Kind.LOGITS), *norms), lambda _: -math.inf)(key, here)

    def moved(queries: float, others: float) -> Predict:
        """Returns the whole's log factor where rows are multiplied by these powers of r."""

        def predict(key: Key, width: int) -> float:
            here = at[width]
            if (q := share(key, here)) is None:
                return 0.0
            return 0.5 * math.log(q * here.r ** (2 * queries) + (1 - q) * here.r ** (2 * others))

        return predict

    layer = next(iter(next(iter(at.values())).fused)).removesuffix(".weight").rpartition(".")[2]
    found = [
        Hypothesis(
            "queries-zeroed",
            f"queries start at 0, and the recipe does not say so. Draw their rows of {layer} as its other rows.",
            zeroed,
        )
    ]
    for power in (-0.5, 0.5, -1.0):
        for who, predict in (("keys and values", moved(0, power)), ("queries", moved(power, 0))):
            found.append(
                Hypothesis(
                    "qkv-rows",
                    f"the rows of {who} in {layer} are drawn with {POWERS[power]} the std of the others'. Draw all "
                    "rows alike: they have one fan_in.",
                    predict,
                )
            )
    return found
