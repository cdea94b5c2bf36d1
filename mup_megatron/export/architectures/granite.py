"""Granite: a Llama that has every multiplier of μP in its configuration, so that weights stay as they were trained."""

from typing import ClassVar

from mup_megatron.architectures.names import WORD_EMBEDDINGS
from mup_megatron.export.architectures.llama import LlamaLike
from mup_megatron.export.architectures.target import Carried
from mup_megatron.theory import BRANCH, READOUT, SOFTMAX, Plan


class Granite(LlamaLike):
    """Granite."""

    name: ClassVar[str] = "granite"
    model_class: ClassVar[str] = "GraniteForCausalLM"

    def carried(self, plan: Plan) -> Carried:
        """Returns all four; of branches, where they are multiplied alike.

        Its attention_multiplier is the softmax scale itself, and its logits are divided by logits_scaling.
        """
        branches = {plan.site(place).factor for place in plan.places if place.carries == BRANCH}
        alike = len(branches) <= 1
        return Carried(
            frozenset({WORD_EMBEDDINGS, SOFTMAX, READOUT, *((BRANCH,) if alike else ())}),
            {
                "embedding_multiplier": plan[WORD_EMBEDDINGS].multiplier,
                "attention_multiplier": plan.softmax_scale,
                "logits_scaling": 1.0 / plan.output_multiplier,
                "residual_multiplier": branches.pop() if branches and alike else 1.0,
            },
        )


GRANITE = Granite()
"""Granite."""
