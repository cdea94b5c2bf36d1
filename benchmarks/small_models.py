"""The small GPTs that learning rates are swept on, and the values of their base."""

from typing import Any

from mup_megatron.architectures.bert import BertFile
from mup_megatron.architectures.model_file import ModelFile

TUNED = {"init_method_std": 0.06, "embedding_multiplier": 4.0, "output_multiplier": 4.0}
"""Of the base, as the quickstart's search finds them, roughly. With defaults hardly anything is learnt in so few steps
but how frequent words are, and where the best learning rate is says little."""
GPT: dict[str, Any] = {
    "num_layers": 2,
    "vocab_size": 1024,
    "seq_length": 64,
    "untie_embeddings_and_output_weights": True,
    "add_bias_linear": False,
    "position_embedding_type": "none",
    "transformer_impl": "local",
}
HEAD_SIZE = 32


def experts(
    width: int, *, number: int = 8, chosen: int = 2, size: int | None = None, head: int = HEAD_SIZE
) -> ModelFile:
    """Returns a GPT with experts in every layer; one is as wide as the stream, unless its size is said."""
    own: dict[str, Any] = {"num_experts": number, "moe_router_topk": chosen, "moe_ffn_hidden_size": size or width}
    balanced: dict[str, Any] = {"moe_aux_loss_coeff": 0.01}
    return ModelFile(**GPT, hidden_size=width, num_attention_heads=width // head, **own, **balanced)


def latent(width: int, *, rank: int, head: int = HEAD_SIZE) -> ModelFile:
    """Returns a GPT with latent attention, a quarter of whose heads tells positions."""
    return ModelFile(
        **GPT,
        hidden_size=width,
        num_attention_heads=width // head,
        multi_latent_attention=True,
        q_lora_rank=rank,
        kv_lora_rank=rank,
        qk_head_dim=head - head // 4,
        qk_pos_emb_head_dim=head // 4,
        v_head_dim=head,
        qk_layernorm=True,
        normalization="RMSNorm",
    )


def dense(width: int, *, head: int = HEAD_SIZE, **own: Any) -> ModelFile:
    """Returns a GPT; `own` are keys that differ from what follows from its width."""
    return ModelFile(**{**GPT, "hidden_size": width, "num_attention_heads": width // head, **own})


def bert(width: int, *, head: int = HEAD_SIZE) -> ModelFile:
    """Returns a BERT, whose output layer is tied and whose second head tells whether a text goes on."""
    shape = {key: GPT[key] for key in ("num_layers", "vocab_size", "seq_length", "transformer_impl")}
    return BertFile(architecture="bert", **shape, hidden_size=width, num_attention_heads=width // head)


def deep(layers: int) -> ModelFile:
    """Returns a narrow GPT of so many layers."""
    return dense(64, num_layers=layers)
