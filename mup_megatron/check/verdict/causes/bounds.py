"""Causes of what is out of bounds: the first of each kind, and what to do."""

from collections.abc import Mapping, Sequence

from mup_megatron.check.measure.measurements import LOGITS, WITHOUT_MEAN, Quantity
from mup_megatron.check.verdict.causes.ranking import Cause
from mup_megatron.check.verdict.comparison import Finding

_CAUSES: dict[Quantity, tuple[str, str]] = {
    Quantity.ALIKE: (
        "draws-alike",
        "its initial weights are another tensor's: both are drawn from the same numbers. Draw all of a model with one "
        "generator, and do not seed it again for each layer, or copy one layer into all.",
    ),
    Quantity.ROWS: (
        "rows-alike",
        "rows of its initial weights are each other's. Draw the whole of it, and on each rank its own part.",
    ),
    Quantity.MEAN: ("draw-mean", "its initial weights have a mean. Draw them around 0."),
    Quantity.TAILS: (
        "draw-shape",
        "its initial weights are drawn from another distribution than the plan's. Draw them from a normal one, or as "
        "the model's library does.",
    ),
    Quantity.CONSTANT: (
        "constant-follows-width",
        "it is no weight, and differs between widths. Give it the base's value at every width.",
    ),
    Quantity.POSITION: (
        "positions",
        "positions turn queries otherwise than they should, or otherwise in wider models. Look for a rotary base, a "
        "scale of positions or a table of them that follows width.",
    ),
    Quantity.EVALUATION: (
        "evaluation-differs",
        "under eval() and no_grad() it computes something else than in training, before which nothing does. Look for a "
        "factor or a path that depends on `training`, and for a multiplier that one of the two lacks or has twice.",
    ),
    Quantity.SUMMED: (
        "micro-batches-summed",
        "the losses of several forward passes are summed, so gradients grow with their number. Divide by it.",
    ),
    Quantity.LOSS: (
        "loss-follows-width",
        "the first loss follows width, when nothing is known yet. Look for a factor on logits or loss that does.",
    ),
}
_FORWARD = (
    "width-in-forward",
    "its size follows width, and nothing before it does. Look for a power of width in the code that computes it: on "
    "embeddings, residual branches, attention logits, in a norm or a temperature. μP puts such factors into the plan.",
)
_ATTENTION = (
    "attention-follows-width",
    "attention logits follow width otherwise than in μP, where they stay, and fall as 1/√(head size) before training. "
    "Look for a scale of 1/√(head size) in the code where heads grow, or for another power of width. Give the "
    "attention a float `scaling` and an integer `head_dim`, which a plan then sets if the name of its class has "
    "`Attention` in it, or let the number of heads grow.",
)


def of_bounds(found: Sequence[Finding], copying: Mapping[str, str] | None = None) -> tuple[Cause, ...]:
    """Returns the first of each kind; what slopes show is one kind, of which the first is told.

    Args:
        found: what is out of bounds.
        copying: modules that copy one layer into all of theirs → how their class is called.
    """
    causes: dict[str, Cause] = {}
    of_slopes = {_ATTENTION[0], _FORWARD[0]}
    for finding in found:
        usual = _ATTENTION if LOGITS in finding.key.name else _FORWARD
        name, sentence = _CAUSES.get(finding.key.quantity, usual)
        culprit = finding.key.name.removesuffix(f".{WITHOUT_MEAN}")
        if name in of_slopes and of_slopes & set(causes):
            continue
        if name == "draws-alike":
            sentence = _of_copies(culprit, copying or {}) or sentence
        causes.setdefault(name, Cause(name, f"{culprit}: {sentence}", culprit, 1.0))
    return tuple(causes.values())


def _of_copies(parameter: str, copying: Mapping[str, str]) -> str | None:
    """Returns what is said where torch itself has copied a layer."""
    for module, kind in copying.items():
        layers = f"{module}.layers".removeprefix(".")
        if parameter.startswith(f"{layers}."):
            return (
                f"its initial weights are those of the other layers: {kind} deep-copies the one layer that it is "
                f"given. After building it, draw each layer of `{layers}` anew, as nn.Transformer does: "
                "`nn.init.xavier_uniform_(p)` for every parameter p of the layer that has two dimensions."
            )
    return None
