"""Llama, and what is like it: grouped queries, rotary embeddings, RMSNorm, a gated MLP."""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.export.architectures import layers
from mup_megatron.export.architectures.target import Piece, Target

GATED = ("gate_proj", "up_proj", "down_proj")


class LlamaLike(Target):
    """An architecture with Llama's names, whose layers may have norms of queries and keys, or experts."""

    prefix: ClassVar[str] = "model"
    embedding: ClassVar[str] = "embed_tokens.weight"
    requires: ClassVar[Mapping[str, Any]] = {
        "normalization": "RMSNorm",
        "position_embedding_type": "rope",
        "swiglu": True,
        "rotary_percent": 1.0,
        "qk_layernorm": False,
        "num_experts": None,
        "multi_latent_attention": False,
    }

    def config(self, model: ModelFile) -> dict[str, Any]:
        """Returns sizes, norms, rotary embeddings and which layers have biases."""
        return {
            "hidden_size": model.hidden_size,
            "intermediate_size": model.ffn_size,
            "num_hidden_layers": model.num_layers,
            "num_attention_heads": model.num_attention_heads,
            "num_key_value_heads": model.query_groups,
            "head_dim": model.head_size,
            "hidden_act": "silu",
            "max_position_embeddings": model.positions,
            "rms_norm_eps": model.norm_epsilon,
            "rope_theta": float(model.rotary_base),
            "attention_bias": model.bias_on_qkv,
            "mlp_bias": model.add_bias_linear,
            "attention_dropout": 0.0,
        }

    def layer(self, model: ModelFile, index: int) -> Iterator[Piece]:
        """Yields norms, attention and MLP."""
        name = f"{self.prefix}.layers.{index}"
        hidden = model.hidden_size
        yield from layers.norm(model, f"{name}.input_layernorm", layers.input_norm(model, index), hidden)
        yield from self.attention(model, f"{name}.self_attn", index)
        yield from layers.norm(model, f"{name}.post_attention_layernorm", layers.mlp_norm(model, index), hidden)
        yield from self.mlp(model, name, index)

    def attention(self, model: ModelFile, name: str, index: int) -> Iterator[Piece]:
        """Yields what makes queries, keys and values, and the projection back."""
        own, hidden = layers.attention(index), model.hidden_size
        for kind, rows in layers.qkv_rows(model).items():
            size = sum(map(len, rows))
            yield layers.matrix(f"{name}.{kind}_proj.weight", size, hidden, f"{own}.linear_qkv.weight", rows)
            if model.bias_on_qkv:
                source = f"{own}.linear_qkv.bias"
                yield layers.vector(f"{name}.{kind}_proj.bias", size, source, rows, trained=True)
        attended = model.num_attention_heads * model.head_size
        yield layers.matrix(f"{name}.o_proj.weight", hidden, attended, f"{own}.linear_proj.weight")
        if model.bias_on_qkv:
            bias = f"{own}.linear_proj.bias"
            yield layers.vector(f"{name}.o_proj.bias", hidden, bias, trained=model.add_bias_linear)

    def mlp(self, model: ModelFile, layer: str, index: int) -> Iterator[Piece]:
        """Yields the gated MLP."""
        own, ffn, hidden = layers.mlp(index), model.ffn_size, model.hidden_size
        fc1, fc2 = (f"{own}.linear_{each}" for each in ("fc1", "fc2"))
        yield from layers.gated(f"{layer}.mlp", GATED, ffn, hidden, f"{fc1}.weight", f"{fc2}.weight")
        if model.add_bias_linear:
            for kind, rows in zip(GATED, (range(ffn), range(ffn, 2 * ffn)), strict=False):
                yield layers.vector(f"{layer}.mlp.{kind}.bias", ffn, f"{fc1}.bias", (rows,), trained=True)
            yield layers.vector(f"{layer}.mlp.{GATED[2]}.bias", hidden, f"{fc2}.bias", trained=True)

    def around(self, model: ModelFile) -> Iterator[Piece]:
        """Yields the final norm."""
        yield from layers.norm(model, f"{self.prefix}.norm", layers.FINAL_NORM, model.hidden_size)


class Llama(LlamaLike):
    """Llama."""

    name: ClassVar[str] = "llama"
    model_class: ClassVar[str] = "LlamaForCausalLM"

    def problems(self, model: ModelFile) -> Iterator[str]:
        """Yields what it lacks; transformers wants heads to divide hidden_size, although one may have its own size."""
        yield from super().problems(model)
        if model.hidden_size % model.num_attention_heads:
            yield f"hidden_size {model.hidden_size} with num_attention_heads {model.num_attention_heads}"


LLAMA = Llama()
"""Llama."""
