"""The places of a GPT's parts in Megatron, and which rows of its fused tensors are what.

Names are those of the plan, which follow `transformer_impl`: Transformer Engine fuses a norm into what follows it.
"""

from collections.abc import Iterator, Mapping

from mup_megatron.architectures.decoder import STACK
from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.architectures.names import in_layer
from mup_megatron.export.architectures.target import Piece
from mup_megatron.export.folds import Rows

FINAL_NORM = f"{STACK}.final_layernorm."


def attention(index: int) -> str:
    """Returns the name of a layer's attention."""
    return in_layer(STACK, index, "self_attention")


def mlp(index: int) -> str:
    """Returns the name of a layer's MLP, or of its experts with their router."""
    return in_layer(STACK, index, "mlp")


def _fused(model: ModelFile) -> bool:
    return model.transformer_impl == "transformer_engine"


def input_norm(model: ModelFile, index: int) -> str:
    """Returns the prefix of the norm before attention."""
    if _fused(model) and not model.multi_latent_attention:
        return f"{attention(index)}.linear_qkv.layer_norm_"
    return in_layer(STACK, index, "input_layernorm.")


def mlp_norm(model: ModelFile, index: int) -> str:
    """Returns the prefix of the norm before an MLP or experts."""
    if _fused(model) and not model.has_experts(index):
        return f"{mlp(index)}.linear_fc1.layer_norm_"
    return in_layer(STACK, index, "pre_mlp_layernorm.")


def latent_norm(model: ModelFile, index: int, latent: str) -> str:
    """Returns the prefix of the norm of a latent, `q` or `kv`."""
    inside = f"linear_{latent}_up_proj.layer_norm_" if _fused(model) else f"{latent}_layernorm."
    return f"{attention(index)}.{inside}"


def expert(model: ModelFile, index: int, which: int, matrix: str) -> str:
    """Returns the name of the weight of an expert, of its `linear_fc1` or `linear_fc2`."""
    if model.moe_grouped_gemm and _fused(model):
        return f"{mlp(index)}.experts.{matrix}.weight{which}"
    return f"{mlp(index)}.experts.local_experts.{which}.{matrix}.weight"


def qkv_rows(model: ModelFile) -> Mapping[str, Rows]:
    """Returns the rows of queries, keys and values in `linear_qkv`, group by group: queries, then its key and value."""
    size, queries = model.head_size, model.num_attention_heads // model.query_groups * model.head_size
    starts = [group * (queries + 2 * size) for group in range(model.query_groups)]
    return {
        "q": tuple(range(start, start + queries) for start in starts),
        "k": tuple(range(start + queries, start + queries + size) for start in starts),
        "v": tuple(range(start + queries + size, start + queries + 2 * size) for start in starts),
    }


def norm(model: ModelFile, name: str, prefix: str, size: int, *, bias: bool = False) -> Iterator[Piece]:
    """Yields a norm's gain, as such and not as its distance from 1, and its bias."""
    shift = 1.0 if model.apply_layernorm_1p else 0.0
    yield Piece(name=f"{name}.weight", shape=(size,), source=f"{prefix}weight", shift=shift)
    if bias:
        yield Piece(name=f"{name}.bias", shape=(size,), source=f"{prefix}bias")


def vector(name: str, size: int, source: str, rows: Rows | None = None, *, trained: bool) -> Piece:
    """Returns a bias: a trained one, or zeros where the model does without."""
    return Piece(name=name, shape=(size,), source=source if trained else None, rows=rows if trained else None)


def matrix(name: str, fan_out: int, fan_in: int, source: str, rows: Rows | None = None) -> Piece:
    """Returns a matrix [out, in]."""
    return Piece(name=name, shape=(fan_out, fan_in), source=source, rows=rows)


def gated(name: str, names: tuple[str, str, str], ffn: int, hidden: int, fc1: str, fc2: str) -> Iterator[Piece]:
    """Yields the gate, up and down projections of a gated MLP, of which the first two are one trained matrix."""
    gate, up, down = names
    yield matrix(f"{name}.{gate}.weight", ffn, hidden, fc1, (range(ffn),))
    yield matrix(f"{name}.{up}.weight", ffn, hidden, fc1, (range(ffn, 2 * ffn),))
    yield matrix(f"{name}.{down}.weight", hidden, ffn, fc2)
