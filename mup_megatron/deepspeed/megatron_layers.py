"""Megatron-Core's layers as the layers of DeepSpeed's pipeline: how a GPTModel is cut, and what a stage holds."""

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.spec_utils import build_module

from mup_megatron.architectures.families import ATTENTION, MLP
from mup_megatron.architectures.gpt import GPT
from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.architectures.names import READOUT_WEIGHT, WORD_EMBEDDINGS
from mup_megatron.architectures.registry import architecture_of
from mup_megatron.errors import InputError

Tensor = torch.Tensor

_TIED = "embedding"
"""The key of what DeepSpeed's pipeline ties."""


def pipeline_layers(config: Any, model: ModelFile) -> list[LayerSpec]:
    """Cuts a GPTModel into the layers of DeepSpeed's pipeline: embedding, each transformer layer, final norm, readout.

    Take `pipeline_module`, which applies the plan too, unless layers of your own come between. The first layer takes
    tokens [batch, sequence], or a tuple of tokens and position ids; between layers goes one tensor, [sequence, batch,
    hidden]; the last gives logits [sequence, batch, vocabulary / TP].

    Args:
        config: Megatron's TransformerConfig of the whole model.
        model: what the plan was made for.

    Raises:
        InputError: the model is no GPT, whose layers these are, or has layers that this pipeline has not.
    """
    architecture = architecture_of(model)
    if architecture is not GPT:
        raise InputError(
            f"DeepSpeed's pipeline is made of a GPT's layers, and the model is {architecture.description}. "
            "Train it without DeepSpeed's pipeline, or in Megatron's."
        )
    if others := [family.name for family in architecture.families(model) if family not in (ATTENTION, MLP)]:
        raise InputError(
            f"The model has layers of {' and '.join(others)}, and DeepSpeed's pipeline those of attention and an MLP "
            "alone. Train it in Megatron's own training."
        )
    spec = get_gpt_decoder_block_spec(
        config,
        use_transformer_engine=model.transformer_impl == "transformer_engine",
        normalization=model.normalization,
    )
    assert spec.layer_specs is not None
    layers = [LayerSpec(_Layer, config, model, layer, index) for index, layer in enumerate(spec.layer_specs)]
    norm = LayerSpec(_FinalNorm, config, spec.layer_norm)
    if not model.tied:
        return [LayerSpec(_Embedding, config, model), *layers, norm, LayerSpec(_Readout, config, model)]
    # Each stage of the two builds what it needs of the weight, so the last has no position embedding.
    first = TiedLayerSpec(_TIED, _Embedding, config, model, tied_weight_attr=WORD_EMBEDDINGS)
    last = TiedLayerSpec(_TIED, _Readout, config, model, forward_fn=_tied_logits, tied_weight_attr=READOUT_WEIGHT)
    return [first, *layers, norm, last]


def mean_loss(logits: Tensor, labels: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """Computes Megatron's cross entropy, as a `loss_fn`: the mean over labels, or over a mask beside them."""
    labels, mask = labels if isinstance(labels, tuple) else (labels, torch.ones_like(labels, dtype=torch.float32))
    losses = tensor_parallel.vocab_parallel_cross_entropy(logits, labels.transpose(0, 1).contiguous())
    losses = losses.transpose(0, 1).float()
    mean: Tensor = (losses * mask).sum() / mask.sum()
    return mean


class _Embedding(torch.nn.Module):
    def __init__(self, config: Any, model: ModelFile) -> None:
        super().__init__()
        self.embedding = LanguageModelEmbedding(
            config=config,
            vocab_size=_vocabulary(model),
            max_sequence_length=model.positions,
            position_embedding_type=model.position_embedding_type,
        )
        if model.tied:  # for a readout on this stage: it has no weight of its own, but a multiplier
            self.output_layer = _output_layer(config, model, with_weight=False)

    def forward(self, inputs: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        if isinstance(inputs, tuple):
            tokens, positions = inputs
        else:
            tokens, positions = inputs, torch.arange(inputs.shape[1], device=inputs.device).expand_as(inputs)
        hidden: Tensor = self.embedding(tokens, positions)
        return hidden


class _Layer(torch.nn.Module):
    def __init__(self, config: Any, model: ModelFile, spec: Any, index: int) -> None:
        super().__init__()
        self.config = config
        self.layer = build_module(spec, config=config, layer_number=index + 1)
        self.rotary = None
        if model.position_embedding_type == "rope":
            self.rotary = RotaryEmbedding(
                kv_channels=config.kv_channels,
                rotary_percent=model.rotary_percent,
                rotary_interleaved=config.rotary_interleaved,
                rotary_base=model.rotary_base,
                use_cpu_initialization=config.use_cpu_initialization,
            )

    def forward(self, hidden: Tensor) -> Tensor:
        sequence_parallel = self.config.sequence_parallel
        length = hidden.shape[0] * (self.config.tensor_model_parallel_size if sequence_parallel else 1)
        angles = None if self.rotary is None else self.rotary(length)
        # Under sequence parallelism each rank drops other values, since it has other tokens.
        with tensor_parallel.get_cuda_rng_tracker().fork() if sequence_parallel else nullcontext():
            output: Tensor = self.layer(hidden, attention_mask=None, rotary_pos_emb=angles)[0]
        return output


class _FinalNorm(torch.nn.Module):
    def __init__(self, config: Any, norm: Any) -> None:
        super().__init__()
        self.final_layernorm = build_module(
            norm, config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon
        )

    def forward(self, hidden: Tensor) -> Tensor:
        normed: Tensor = self.final_layernorm(hidden)
        return normed


class _Readout(torch.nn.Module):
    def __init__(self, config: Any, model: ModelFile) -> None:
        super().__init__()
        self.output_layer = _output_layer(config, model, with_weight=True)

    def forward(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.output_layer(hidden)[0]
        return logits


def _output_layer(config: Any, model: ModelFile, *, with_weight: bool) -> torch.nn.Module:
    layer: torch.nn.Module = tensor_parallel.ColumnParallelLinear(
        config.hidden_size,
        _vocabulary(model),
        config=config,
        init_method=config.init_method,
        bias=False,
        gather_output=False,
        skip_weight_param_allocation=not with_weight,
    )
    return layer


def _vocabulary(model: ModelFile) -> int:
    return model.padded_vocab_size(parallel_state.get_tensor_model_parallel_world_size())


def _tied_logits(module: torch.nn.Module, hidden: Tensor) -> Tensor:
    """Returns the readout where its stage has a copy of the weight, and where it has the embedding itself."""
    weight = None if isinstance(module, _Readout) else module.get_parameter(WORD_EMBEDDINGS)
    output_layer: Any = module.get_submodule("output_layer")
    logits: Tensor = output_layer(hidden, weight=weight)[0]
    return logits


class Stage(torch.nn.Module):
    """The modules of a stage of the pipeline, under the names that it has in a stage of Megatron's pipeline."""

    def __init__(self, config: Any, parts: Iterable[torch.nn.Module]) -> None:
        super().__init__()
        self.config = config
        self.decoder = torch.nn.Module()
        layers = torch.nn.ModuleList()
        self.decoder.layers = layers
        for part in parts:
            match part:
                case _Embedding():
                    self.embedding = part.embedding
                    if hasattr(part, "output_layer"):
                        self.output_layer = part.output_layer
                case _Layer():
                    layers.append(part.layer)
                case _FinalNorm():
                    self.decoder.final_layernorm = part.final_layernorm
                case _Readout():
                    self.output_layer = part.output_layer


def gather_between_stages(pipeline: PipelineModule) -> None:
    """Gathers what a stage sends over tensor-parallel ranks, and scatters what it gets, for sequence parallelism.

    Each rank then has other tokens, and DeepSpeed takes activations for the same on all.

    By default (`pipe_partitioned`) it sends a part of each rank's and puts them together again as one.
    """
    if pipeline.stage_id > 0:
        pipeline.register_forward_pre_hook(
            lambda _, inputs: (tensor_parallel.scatter_to_sequence_parallel_region(inputs[0]),)
        )
    if pipeline.stage_id < pipeline.num_stages - 1:
        pipeline.register_forward_hook(
            lambda _, __, hidden: tensor_parallel.gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=False
            )
        )
