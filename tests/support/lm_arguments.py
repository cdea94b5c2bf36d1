"""Megatron-LM's own argument parser, where the installed Megatron-Core brings it along, and what arguments say once."""

import argparse
from typing import Any

import pytest

from mup_megatron.architectures.model_file import ModelFile


def parser_of_megatron() -> argparse.ArgumentParser:
    """The parser as `megatron.training` makes it, before anything of ours is added."""
    arguments = pytest.importorskip("megatron.training.arguments", reason="megatron-core 0.16 has no megatron.training")
    parser = argparse.ArgumentParser(description="Megatron-LM Arguments", allow_abbrev=False)
    added: argparse.ArgumentParser = arguments.add_megatron_arguments(parser)
    return added


def said_once(model: ModelFile) -> ModelFile:
    """The same model without what says nothing: what follows from its other keys, as Megatron fills it in."""
    plain = model.model_copy(update={"ffn_hidden_size": None})
    changes: dict[str, Any] = {
        "max_position_embeddings": None
        if model.max_position_embeddings == model.seq_length
        else model.max_position_embeddings,
        "add_qkv_bias": model.add_qkv_bias and not model.add_bias_linear,
        "ffn_hidden_size": None if model.ffn_hidden_size == plain.ffn_size else model.ffn_hidden_size,
        "num_query_groups": model.num_query_groups if model.group_query_attention else 1,
    }
    if model.kv_channels is not None and model.kv_channels * model.num_attention_heads == model.hidden_size:
        changes["kv_channels"] = None
    return model.model_copy(update=changes)
