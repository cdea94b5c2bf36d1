"""Something of one class of tensors is a power of the width ratio away from its rule."""

import math
from collections.abc import Mapping

from mup_megatron.check.entries import (
    is_bias,
    is_convolution,
    is_embedding,
    is_gain,
    is_hidden,
    is_readout,
    token_table,
)
from mup_megatron.check.measure.measurements import Quantity
from mup_megatron.check.measure.optimizers import rule_in_words
from mup_megatron.check.verdict.causes.at_width import AtWidth
from mup_megatron.check.verdict.causes.hypothesis import Hypothesis, LogFactor, Select, of_weights

POWERS = {-2.0: "1/r²", -1.0: "1/r", -0.5: "1/√r", 0.5: "√r", 1.0: "r"}


def _classes(tokens: str | None) -> tuple[tuple[str, str, Select], ...]:
    return (
        ("hidden", "hidden weights", is_hidden),
        ("embedding", "embeddings", is_embedding),
        ("embedding", "the token embedding", lambda e: e.name == tokens),
        ("readout", "the readout", is_readout),
        ("gain", "norm gains", is_gain),
        ("bias", "biases", is_bias),
        ("convolution", "convolutions", is_convolution),
    )


QUANTITIES: tuple[tuple[Quantity, str, str, tuple[float, ...]], ...] = (
    (Quantity.INITIAL, "init", "the initial std", (0.5, -0.5, -1.0, 1.0)),
    (Quantity.LEARNING_RATE, "learning-rate", "the learning rate", (1.0, 0.5, -0.5, -1.0, -2.0)),
    (Quantity.EPS, "eps", "Adam's eps", (1.0, 0.5, -0.5, -1.0)),
    (Quantity.WEIGHT_DECAY, "weight-decay", "the weight decay", (1.0, 0.5, -0.5, -1.0)),
)


def _power(power: float) -> LogFactor:
    return lambda entry, here: power * math.log(entry.width_ratio if is_hidden(entry) else here.r)


def powers(at: Mapping[int, AtWidth]) -> list[Hypothesis]:
    """Something of one class of tensors is a power of the width ratio away from its rule."""
    some = next(iter(at.values()))
    found = []
    for quantity, short, long, powers in QUANTITIES:
        for kind, who, select in _classes(token_table(some.plan)):
            right = rule_in_words(some.recipe, quantity, kind)
            for power in powers:
                found.append(
                    of_weights(
                        f"{kind}-{short}",
                        f"{long} of {who} is {POWERS[power]} times what it should be: give them {right}.",
                        quantity,
                        at,
                        select,
                        _power(power),
                    )
                )
    return found
