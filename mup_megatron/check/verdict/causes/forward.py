"""Mistakes in the forward pass: multipliers and the scale of attention."""

import math
from collections.abc import Callable, Collection, Mapping

from mup_megatron.architectures.measured import Kind
from mup_megatron.check.entries import token_table
from mup_megatron.check.measure.measurements import Key, Quantity
from mup_megatron.check.verdict.causes.at_width import AtWidth
from mup_megatron.check.verdict.causes.hypothesis import Hypothesis

OfActivation = Callable[[Key, AtWidth], float]


def at_modules(modules: Callable[[AtWidth], Collection[str]], factor: Callable[[AtWidth], float]) -> OfActivation:
    """The outputs of modules are so many times larger: log."""

    def predict(key: Key, here: AtWidth) -> float:
        return factor(here) if key.quantity is Quantity.ACTIVATION and key.name in modules(here) else 0.0

    return predict


def at_readout(factor: Callable[[AtWidth], float]) -> OfActivation:
    """Returns a prediction: the readout is so many times larger."""

    def readouts(here: AtWidth) -> Collection[str]:
        plan = here.plan
        return here.of_kind(Kind.READOUT) if plan.readout is None or plan.tied else (plan[plan.readout].module,)

    return at_modules(readouts, factor)


def at_logits(factor: Callable[[AtWidth], float]) -> OfActivation:
    """Returns a prediction: the attention logits are so many times larger."""
    return at_modules(lambda here: here.of_kind(Kind.LOGITS), factor)


def at_tables(factor: Callable[[AtWidth], float], *, tokens: bool = True) -> OfActivation:
    """Returns a prediction: the embeddings, or all but that of tokens, are so many times larger."""

    def tables(here: AtWidth) -> Collection[str]:
        return [module for module, name in here.tables.items() if tokens or name != token_table(here.plan)]

    return at_modules(tables, factor)


def root_of_head(here: AtWidth) -> float:
    """Returns the step from what attention should have to 1/√d, times a factor that it has of its own, as YaRN's."""
    return math.log(here.alpha * here.plan.own_softmax_scale / here.plan.softmax_scale)


def forward_pass(at: Mapping[int, AtWidth]) -> list[Hypothesis]:
    """Multipliers that are missing, replaced or applied twice."""

    def h(name: str, sentence: str, predict: OfActivation) -> Hypothesis:
        return Hypothesis(name, sentence, lambda key, width: predict(key, at[width]))

    return [
        h(
            "attention-sqrt-d",
            "attention logits are scaled by 1/√d. Set softmax_scale to α·√d_base/d, which falls as 1/d.",
            at_logits(root_of_head),
        ),
        h(
            "attention-no-base",
            "attention logits are scaled by 1/d alone. Set softmax_scale to α·√d_base/d, as at the base.",
            at_logits(lambda w: root_of_head(w) - math.log(w.plan.head_size) / 2),
        ),
        h(
            "attention-multiplier-dropped",
            "the recipe's attention_multiplier is not applied. Multiply softmax_scale by it.",
            at_logits(lambda w: -math.log(w.alpha)),
        ),
        h(
            "attention-multiplier-twice",
            "the recipe's attention_multiplier is applied twice. Apply it once, in softmax_scale.",
            at_logits(lambda w: math.log(w.alpha)),
        ),
        h(
            "attention-scale-stock",
            "attention logits are scaled as attention does by itself. Set the plan's softmax_scale on the built "
            "module, which may not read the configuration's.",
            at_logits(lambda w: root_of_head(w) - math.log(w.alpha)),
        ),
        h(
            "attention-own-factor-dropped",
            "the scale of attention logits lacks the factor that attention has of its own, YaRN's mscale². Multiply "
            "softmax_scale by it.",
            at_logits(lambda w: -math.log(w.plan.own_softmax_scale * math.sqrt(w.plan.head_size))),
        ),
        h(
            "readout-multiplied-twice",
            "the readout's multiplier is applied twice. Leave it to the plan's hook, or take that away.",
            at_readout(lambda w: math.log(w.plan.output_multiplier)),
        ),
        h(
            "readout-not-multiplied",
            "the readout's multiplier α_out/r is not applied. Multiply the readout's input by it.",
            at_readout(lambda w: -math.log(w.plan.output_multiplier)),
        ),
        h(
            "readout-ratio-dropped",
            "the readout's 1/r is lost: α_out replaced it. Multiply by both.",
            at_readout(lambda w: math.log(w.r)),
        ),
        h(
            "output-multiplier-dropped",
            "the recipe's output_multiplier is lost: 1/r replaced it. Multiply the logits by both.",
            at_readout(lambda w: -math.log(w.recipe.moved.output_multiplier)),
        ),
        h(
            "embedding-multiplier-dropped",
            "the recipe's embedding_multiplier is not applied. Multiply token and position embeddings by it.",
            at_tables(lambda w: -math.log(w.recipe.moved.embedding_multiplier)),
        ),
        h(
            "embedding-multiplier-twice",
            "the recipe's embedding_multiplier is applied twice. Apply it once.",
            at_tables(lambda w: math.log(w.recipe.moved.embedding_multiplier)),
        ),
        h(
            "embedding-multiplier-on-tokens-only",
            "the recipe's embedding_multiplier is not applied to positions. Multiply the sum of both tables by it.",
            at_tables(lambda w: -math.log(w.recipe.moved.embedding_multiplier), tokens=False),
        ),
    ]
