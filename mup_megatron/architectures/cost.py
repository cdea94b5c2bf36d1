"""What training a model costs: parameters and FLOPs, itemised, from its model file."""

import math
from dataclasses import dataclass

from mup_megatron.architectures.gpt import gpt_shapes
from mup_megatron.architectures.model_file import ModelFile


def parameter_count(model: ModelFile) -> int:
    """All parameters, embeddings and padding included."""
    shape, _ = gpt_shapes(model, model)
    return sum(math.prod(parameter.shape) for parameter in shape.parameters)


@dataclass(frozen=True, slots=True)
class Flops:
    """Training FLOPs for one token: forward and backward, 6 for each weight that the token passes (2 + 4).

    Attention scores are counted without halving for the causal mask, as is usual (PaLM, arXiv 2204.02311, App. B).
    Norms, biases, softmax and recomputation are left out.
    """

    attention_projections: float
    attention_scores: float
    mlp: float
    readout: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.attention_projections + self.attention_scores + self.mlp + self.readout


def training_flops(model: ModelFile) -> Flops:
    """FLOPs per token of training `model` at its sequence length."""
    queries = model.num_attention_heads * model.head_size
    qkv = queries + 2 * model.query_groups * model.head_size
    fc1 = 2 * model.ffn_size if model.swiglu else model.ffn_size
    return Flops(
        attention_projections=6.0 * model.num_layers * (model.hidden_size * qkv + queries * model.hidden_size),
        attention_scores=12.0 * model.num_layers * model.seq_length * queries,
        mlp=6.0 * model.num_layers * model.hidden_size * (fc1 + model.ffn_size),
        readout=6.0 * model.hidden_size * model.padded_vocab_size(),
    )
