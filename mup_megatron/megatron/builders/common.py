"""The arguments that the models of all architectures are built with."""

from typing import Any

from megatron.core import parallel_state

from mup_megatron.architectures.model_file import ModelFile

__all__ = ["arguments"]


def arguments(model: ModelFile, config: Any, stage: int | None) -> dict[str, Any]:
    """Returns the keyword arguments that every language model of Megatron-Core's takes."""
    return {
        "config": config,
        "vocab_size": model.padded_vocab_size(config.tensor_model_parallel_size),
        "max_sequence_length": model.positions,
        "pre_process": parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
        "post_process": parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
        "share_embeddings_and_output_weights": model.tied,
        "position_embedding_type": model.position_embedding_type,
        "rotary_percent": model.rotary_percent,
        "rotary_base": model.rotary_base,
    }
