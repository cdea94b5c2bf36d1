"""Every parameter of a Megatron-Core `GPTModel` from its model file: global names and shapes, nothing allocated.

Names are those of the model on one rank; `stage_layers` and `global_name` map a pipeline stage's own numbering to them.
To add a kind of block (experts, latent attention), write a function that yields its parameters and call it from
`_layer`.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.errors import InputError
from mup_megatron.theory import Dimension, Kind, ModelShape, Parameter

WORD_EMBEDDINGS = "embedding.word_embeddings.weight"
POSITION_EMBEDDINGS = "embedding.position_embeddings.weight"
HEAD = "output_layer.weight"
_LAYER = re.compile(r"^(decoder\.layers\.)(\d+)(\..+)$")


_SAME = {
    "swiglu": "swiglu",
    "normalization": "normalization",
    "apply_layernorm_1p": "apply_layernorm_1p",
    "qk_layernorm": "qk_layernorm",
    "position_embedding_type": "position_embedding_type",
    "add_bias_linear": "add_bias_linear",
    "add_qkv_bias": "bias_on_qkv",
    "untie_embeddings_and_output_weights": "untie_embeddings_and_output_weights",
}
"""What base and target must share: key → what it decides. μP compares sizes, not architectures."""


def gpt_shapes(base: ModelFile, target: ModelFile) -> tuple[ModelShape, ModelShape]:
    """The shapes of base and target, named as in the target, and with the names of the base's `transformer_impl`.

    Depth, heads, ffn and head size may differ; which of them grow is known from both together.

    Raises:
        InputError: the two differ in architecture; names the key.
    """
    for key, what in _SAME.items():
        at_base, at_target = getattr(base, what), getattr(target, what)
        if at_base != at_target:
            raise InputError(
                f"{key} is {at_base} in the recipe's base but {at_target} in the target. "
                "Hyperparameters transfer between widths of one architecture: tune a base that has the target's."
            )
    head_size_grows = base.head_size != target.head_size
    tuned_names = _shape(target.model_copy(update={"transformer_impl": base.transformer_impl}), head_size_grows)
    base = base.model_copy(update={"transformer_impl": target.transformer_impl})
    shape = _shape(target, head_size_grows)
    parameters = tuple(
        replace(parameter, name_at_base=tuned.name if tuned.name != parameter.name else None)
        for parameter, tuned in zip(shape.parameters, tuned_names.parameters, strict=True)
    )
    return _shape(base, head_size_grows), replace(shape, parameters=parameters)


def _shape(model: ModelFile, head_size_grows: bool) -> ModelShape:
    parameters = tuple(_parameters(model, Dimension(model.head_size, infinite=head_size_grows)))
    names = [parameter.name for parameter in parameters]
    return ModelShape(
        parameters=parameters,
        hidden_size=model.hidden_size,
        head_size=model.head_size,
        num_layers=model.num_layers,
        readout=WORD_EMBEDDINGS if model.tied else HEAD,
        readout_norm=tuple(name for name in names if name.startswith("decoder.final_layernorm.")),
        query_norms=tuple(name for name in names if ".q_layernorm." in name),
    )


def _parameters(model: ModelFile, head: Dimension) -> Iterator[Parameter]:
    hidden = Dimension(model.hidden_size, infinite=True)
    vocabulary = Dimension(model.padded_vocab_size(), infinite=False)
    yield replace(_embedding(WORD_EMBEDDINGS, vocabulary, hidden), padded_to=model.make_vocab_size_divisible_by)
    if model.position_embedding_type == "learned_absolute":
        yield _embedding(POSITION_EMBEDDINGS, Dimension(model.positions, infinite=False), hidden)
    for layer in range(model.num_layers):
        yield from _layer(model, f"decoder.layers.{layer}", head)
    yield from _norm(model, "decoder.final_layernorm.", hidden)
    if not model.tied:
        yield replace(_matrix(HEAD, Kind.HEAD, hidden, vocabulary), padded_to=model.make_vocab_size_divisible_by)


def _layer(model: ModelFile, name: str, head: Dimension) -> Iterator[Parameter]:
    # Transformer Engine fuses each norm into the linear layer that follows it.
    fused = model.transformer_impl == "transformer_engine"
    hidden = Dimension(model.hidden_size, infinite=True)
    attention_norm = f"{name}.self_attention.linear_qkv.layer_norm_" if fused else f"{name}.input_layernorm."
    mlp_norm = f"{name}.mlp.linear_fc1.layer_norm_" if fused else f"{name}.pre_mlp_layernorm."
    yield from _norm(model, attention_norm, hidden)
    yield from _self_attention(model, f"{name}.self_attention", head)
    yield from _norm(model, mlp_norm, hidden)
    yield from _mlp(model, f"{name}.mlp")


def _self_attention(model: ModelFile, name: str, head: Dimension) -> Iterator[Parameter]:
    hidden = Dimension(model.hidden_size, infinite=True)
    queries = model.num_attention_heads * model.head_size
    keys_and_values = 2 * model.query_groups * model.head_size
    # One fused matrix, so one fan_out: all of its rows.
    qkv = Dimension(queries + keys_and_values, infinite=True)
    yield from _linear(f"{name}.linear_qkv", Kind.WEIGHT, hidden, qkv, bias=model.bias_on_qkv)
    if model.qk_layernorm:
        yield from _norm(model, f"{name}.q_layernorm.", head)
        yield from _norm(model, f"{name}.k_layernorm.", head)
    attended = Dimension(queries, infinite=True)
    yield from _linear(f"{name}.linear_proj", Kind.RESIDUAL, attended, hidden, bias=model.add_bias_linear)


def _mlp(model: ModelFile, name: str) -> Iterator[Parameter]:
    hidden = Dimension(model.hidden_size, infinite=True)
    ffn = Dimension(model.ffn_size, infinite=True)
    gate_and_up = Dimension(2 * model.ffn_size if model.swiglu else model.ffn_size, infinite=True)
    yield from _linear(f"{name}.linear_fc1", Kind.WEIGHT, hidden, gate_and_up, bias=model.add_bias_linear)
    yield from _linear(f"{name}.linear_fc2", Kind.RESIDUAL, ffn, hidden, bias=model.add_bias_linear)


def _linear(name: str, kind: Kind, fan_in: Dimension, fan_out: Dimension, *, bias: bool) -> Iterator[Parameter]:
    yield _matrix(f"{name}.weight", kind, fan_in, fan_out)
    if bias:
        yield _vector(f"{name}.bias", Kind.BIAS, fan_out, init_value=0.0)


def _norm(model: ModelFile, prefix: str, size: Dimension) -> Iterator[Parameter]:
    yield _vector(f"{prefix}weight", Kind.GAIN, size, init_value=0.0 if model.apply_layernorm_1p else 1.0)
    if model.normalization == "LayerNorm":
        yield _vector(f"{prefix}bias", Kind.BIAS, size, init_value=0.0)


def _matrix(name: str, kind: Kind, fan_in: Dimension, fan_out: Dimension) -> Parameter:
    return Parameter(name=name, kind=kind, shape=(fan_out.size, fan_in.size), fan_in=fan_in, fan_out=fan_out)


def _embedding(name: str, entries: Dimension, hidden: Dimension) -> Parameter:
    shape = (entries.size, hidden.size)
    return Parameter(name=name, kind=Kind.EMBEDDING, shape=shape, fan_in=entries, fan_out=hidden)


def _vector(name: str, kind: Kind, size: Dimension, *, init_value: float) -> Parameter:
    one = Dimension(1, infinite=False)
    return Parameter(name=name, kind=kind, shape=(size.size,), fan_in=one, fan_out=size, init_value=init_value)


def global_name(local_name: str, layers: Sequence[int], *, tied: bool) -> str:
    """The plan's name of a parameter that a pipeline stage calls `local_name`.

    Args:
        local_name: for example "decoder.layers.0.mlp.linear_fc1.weight".
        layers: the global index, from 0, of each layer that the stage (or virtual stage) holds, in its order.
        tied: whether readout and embedding are one weight; the last stage then holds a copy under the readout's name.
    """
    if tied and local_name == HEAD:
        return WORD_EMBEDDINGS
    match = _LAYER.match(local_name)
    return f"{match[1]}{layers[int(match[2])]}{match[3]}" if match else local_name


def stage_layers(
    num_layers: int, *, stages: int, stage: int, virtual_stages: int = 1, virtual_stage: int = 0
) -> tuple[int, ...]:
    """The global indices of the layers on one (virtual) pipeline stage, split evenly as Megatron does by default.

    With virtual stages, stage s holds every `stages`-th block of layers: virtual stage v starts at
    v·(num_layers/virtual_stages) + s·(layers per block).
    """
    blocks = stages * virtual_stages
    assert num_layers % blocks == 0, (num_layers, stages, virtual_stages)
    size = num_layers // blocks
    first = virtual_stage * (num_layers // virtual_stages) + stage * size
    return tuple(range(first, first + size))
