"""Small models that are more than one Transformer decoder: state spaces, encoders, two stacks, several models in one.

Width is one number: hidden sizes follow it, heads of 16 in number, each feed-forward part twice as wide.
"""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel

VOCABULARY = 64


def _text(width: int, **own: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": width // 16,
        "max_position_embeddings": 32,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 1,
    } | own


def _decoder(width: int, **own: Any) -> dict[str, Any]:
    return _text(width, num_key_value_heads=width // 32, **own)


def _vision(width: int, **own: Any) -> dict[str, Any]:
    sizes = {"image_size": 16, "patch_size": 8, "intermediate_size": 2 * width, "num_hidden_layers": 2}
    return {"hidden_size": width, "num_attention_heads": width // 16, **sizes} | own


def _stacks(width: int, **own: Any) -> dict[str, Any]:
    """An encoder of one layer and a decoder of two."""
    sides = {"encoder": 1, "decoder": 2}
    layers = {f"{side}_layers": count for side, count in sides.items()}
    heads = {f"{side}_attention_heads": width // 16 for side in sides}
    ffn = {f"{side}_ffn_dim": 2 * width for side in sides}
    tokens = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    return {"d_model": width, **layers, **heads, **ffn, **tokens, "decoder_start_token_id": 0} | own


def _mamba2(width: int, prefix: str = "mamba_") -> dict[str, Any]:
    """Heads of 16 in twice the hidden size."""
    return {f"{prefix}n_heads": width // 8, f"{prefix}d_head": 16, f"{prefix}d_state": 8, f"{prefix}n_groups": 1}


def _siglip(width: int) -> dict[str, Any]:
    return {"model_type": "siglip_vision_model", "vision_use_head": False, **_vision(width)}


MODELS: dict[str, tuple[str, Callable[[int], dict[str, Any]]]] = {
    "mamba": (
        "MambaForCausalLM",
        lambda w: {"vocab_size": VOCABULARY, "hidden_size": w, "num_hidden_layers": 2, "state_size": 8},
    ),
    "mamba2": (
        "Mamba2ForCausalLM",
        lambda w: {
            "vocab_size": VOCABULARY,
            "hidden_size": w,
            "num_hidden_layers": 2,
            "num_heads": w // 8,
            "head_dim": 16,
            "state_size": 8,
            "n_groups": 1,
            "chunk_size": 4,
        },
    ),
    "nemotron_h": (
        "NemotronHForCausalLM",
        lambda w: (
            _decoder(w, layers_block_type=["linear_attention", "full_attention", "mlp"], head_dim=16)
            | {"mamba_num_heads": w // 8, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1, "chunk_size": 4}
        ),
    ),
    "bamba": ("BambaForCausalLM", lambda w: _decoder(w, attn_layer_indices=[1], mamba_chunk_size=4, **_mamba2(w))),
    "falcon_h1": (
        "FalconH1ForCausalLM",
        lambda w: _decoder(w, head_dim=16, mamba_d_ssm=2 * w, mamba_chunk_size=4, **_mamba2(w)),
    ),
    "jamba": (
        "JambaForCausalLM",
        lambda w: (
            _decoder(w, num_experts=1, num_experts_per_tok=1, attn_layer_period=2, attn_layer_offset=1)
            | {"mamba_d_state": 8, "mamba_dt_rank": 4}
        ),
    ),
    "roberta": ("RobertaForMaskedLM", _text),
    "electra": ("ElectraForPreTraining", lambda w: _text(w, embedding_size=w // 2)),
    "albert": ("AlbertForPreTraining", lambda w: _text(w, embedding_size=w // 2)),
    "squeezebert": ("SqueezeBertForMaskedLM", lambda w: _text(w, embedding_size=w)),
    "deberta-v2": ("DebertaV2ForMaskedLM", lambda w: _text(w, relative_attention=True, pos_att_type="p2c|c2p")),
    "modernbert": ("ModernBertForMaskedLM", lambda w: _text(w, cls_token_id=0, sep_token_id=0)),
    "distilbert": (
        "DistilBertForMaskedLM",
        lambda w: {
            "vocab_size": VOCABULARY,
            "dim": w,
            "hidden_dim": 2 * w,
            "n_layers": 2,
            "n_heads": w // 16,
            "max_position_embeddings": 32,
            "sinusoidal_pos_embds": True,
        },
    ),
    "bart": ("BartForConditionalGeneration", lambda w: _stacks(w, max_position_embeddings=32)),
    "marian": ("MarianMTModel", lambda w: _stacks(w, max_position_embeddings=32)),
    "whisper": (
        "WhisperForConditionalGeneration",
        lambda w: _stacks(
            w,
            num_mel_bins=8,
            max_source_positions=8,
            max_target_positions=16,
            begin_suppress_tokens=None,
            suppress_tokens=None,
        ),
    ),
    "clip": ("CLIPModel", lambda w: {"text_config": _text(w), "vision_config": _vision(2 * w), "projection_dim": 24}),
    "llava": (
        "LlavaForConditionalGeneration",
        lambda w: {
            "text_config": {"model_type": "llama", **_decoder(w)},
            "vision_config": {"model_type": "clip_vision_model", **_vision(w, num_attention_heads=w // 8)},
        },
    ),
    "gemma3": (
        "Gemma3ForConditionalGeneration",
        lambda w: {
            "text_config": _decoder(w, head_dim=24, layer_types=None),
            "vision_config": _siglip(w),
            "mm_tokens_per_image": 4,
        },
    ),
    "qwen3_vl": (
        "Qwen3VLForConditionalGeneration",
        lambda w: {
            "text_config": _decoder(w, head_dim=24)
            | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 4, 4]}},
            "vision_config": {"depth": 2, "hidden_size": w, "num_heads": w // 16, "intermediate_size": 2 * w}
            | {"out_hidden_size": w, "deepstack_visual_indexes": [0], "patch_size": 4, "num_position_embeddings": 16},
        },
    ),
}


def parts(name: str, width: int, **changes: Any) -> PretrainedConfig:
    """Returns a model's configuration; keys of a configuration within it are changed by a mapping."""
    architecture, sizes = MODELS[name]
    own = sizes(width)
    for key, value in changes.items():
        own[key] = own[key] | value if isinstance(own.get(key), dict) else value
    return transformers.AutoConfig.for_model(name, **own, architectures=[architecture])


def live(config: PretrainedConfig, *, seed: int = 3) -> PreTrainedModel:
    """Returns a freshly drawn model."""
    torch.manual_seed(seed)
    model: PreTrainedModel = getattr(transformers, (config.architectures or [""])[0])(config)
    return model.eval()
