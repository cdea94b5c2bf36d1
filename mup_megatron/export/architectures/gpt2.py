"""GPT-2: learned positions, LayerNorm, an MLP with GELU, biases everywhere, matrices stored as [in, out]."""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.architectures.names import POSITION_EMBEDDINGS
from mup_megatron.export.architectures import layers
from mup_megatron.export.architectures.target import Piece, Target
from mup_megatron.export.folds import Rows


class Gpt2(Target):
    """GPT-2."""

    name: ClassVar[str] = "gpt2"
    model_class: ClassVar[str] = "GPT2LMHeadModel"
    prefix: ClassVar[str] = "transformer"
    embedding: ClassVar[str] = "wte.weight"
    requires: ClassVar[Mapping[str, Any]] = {
        "normalization": "LayerNorm",
        "position_embedding_type": "learned_absolute",
        "swiglu": False,
        "qk_layernorm": False,
        "num_experts": None,
        "multi_latent_attention": False,
    }

    def problems(self, model: ModelFile) -> Iterator[str]:
        """Yields what it lacks; its heads fill hidden_size, and each has keys and values of its own."""
        yield from super().problems(model)
        if model.query_groups != model.num_attention_heads:
            yield f"num_query_groups {model.query_groups}"
        if model.num_attention_heads * model.head_size != model.hidden_size:
            yield f"kv_channels {model.head_size} (heads that do not fill hidden_size)"

    def config(self, model: ModelFile) -> dict[str, Any]:
        """Returns sizes, and the exact GELU."""
        return {
            "n_embd": model.hidden_size,
            "n_inner": model.ffn_size,
            "n_layer": model.num_layers,
            "n_head": model.num_attention_heads,
            "n_positions": model.positions,
            "n_ctx": model.positions,  # the same once more, which transformers no longer reads and llama.cpp does
            "activation_function": "gelu",
            "layer_norm_epsilon": model.norm_epsilon,
            **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
        }

    def tanh_gelu(self) -> dict[str, Any]:
        """Returns the name of the approximation."""
        return {"activation_function": "gelu_new"}

    def layer(self, model: ModelFile, index: int) -> Iterator[Piece]:
        """Yields norms, attention and MLP."""
        name, hidden = f"{self.prefix}.h.{index}", model.hidden_size
        attention, mlp = layers.attention(index), layers.mlp(index)
        rows = tuple(each for of_kind in layers.qkv_rows(model).values() for each in of_kind)
        yield from layers.norm(model, f"{name}.ln_1", layers.input_norm(model, index), hidden, bias=True)
        yield from _linear(
            f"{name}.attn.c_attn", (3 * hidden, hidden), f"{attention}.linear_qkv", model.bias_on_qkv, rows
        )
        biases = model.add_bias_linear
        yield from _linear(f"{name}.attn.c_proj", (hidden, hidden), f"{attention}.linear_proj", biases)
        yield from layers.norm(model, f"{name}.ln_2", layers.mlp_norm(model, index), hidden, bias=True)
        yield from _linear(f"{name}.mlp.c_fc", (model.ffn_size, hidden), f"{mlp}.linear_fc1", biases)
        yield from _linear(f"{name}.mlp.c_proj", (hidden, model.ffn_size), f"{mlp}.linear_fc2", biases)

    def around(self, model: ModelFile) -> Iterator[Piece]:
        """Yields positions and the final norm."""
        shape = (model.positions, model.hidden_size)
        yield Piece(name=f"{self.prefix}.wpe.weight", shape=shape, source=POSITION_EMBEDDINGS)
        yield from layers.norm(model, f"{self.prefix}.ln_f", layers.FINAL_NORM, model.hidden_size, bias=True)


def _linear(name: str, sides: tuple[int, int], source: str, biased: bool, rows: Rows | None = None) -> Iterator[Piece]:
    fan_out, fan_in = sides
    shape = (fan_in, fan_out)
    yield Piece(name=f"{name}.weight", shape=shape, source=f"{source}.weight", rows=rows, transposed=True)
    yield layers.vector(f"{name}.bias", fan_out, f"{source}.bias", rows, trained=biased)


GPT2 = Gpt2()
"""GPT-2."""
