"""The fork's parameters in the plan's terms: global names, and the shape that this rank holds. Changes no model.

The fork has two GPT models. `GPTModel` calls its parameters much as older Megatron-LM did; `GPTModelPipe`, a pipeline
of DeepSpeed's, by the place of their layer in the whole pipeline.
"""

import re
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch

from mup_megatron.architectures.names import POSITION_EMBEDDINGS, READOUT_WEIGHT, WORD_EMBEDDINGS
from mup_megatron.live.compare import Remedies, parameter_problems
from mup_megatron.modules.groups import PADDING
from mup_megatron.theory import Plan

_LAYER_PARTS = {
    "self_attention.query_key_value": "self_attention.linear_qkv",
    "self_attention.dense": "self_attention.linear_proj",
    "post_attention_layernorm": "pre_mlp_layernorm",
    "mlp.dense_h_to_4h": "mlp.linear_fc1",
    "mlp.dense_4h_to_h": "mlp.linear_fc2",
}
"""Within a layer: what the fork calls otherwise than Megatron-Core."""

_SPLIT = {
    "self_attention.linear_qkv.weight": 0,
    "self_attention.linear_qkv.bias": 0,
    "self_attention.linear_proj.weight": 1,
    "mlp.linear_fc1.weight": 0,
    "mlp.linear_fc1.bias": 0,
    "mlp.linear_fc2.weight": 1,
    WORD_EMBEDDINGS: 0,
    READOUT_WEIGHT: 0,
}
"""End of a plan's name → the dimension that tensor parallelism splits. By name, because the fork marks a parameter as
split only while it draws it."""

_EMBEDDING = re.compile(r"^(?:.+\.)?(word|position)_embeddings\.(?:local_embeddings\.)?weight$")


def unwrapped(chunk: torch.nn.Module) -> torch.nn.Module:
    """Returns the GPTModel or GPTModelPipe inside the fork's wrappers (DDP, Float16Module)."""
    model: Any = chunk
    while hasattr(model, "module"):
        model = model.module
    assert isinstance(model, torch.nn.Module)
    return model


def is_pipe(model: torch.nn.Module) -> bool:
    """Says if a model that is not wrapped is DeepSpeed's pipeline, which keeps the layers of all stages as `specs`."""
    return hasattr(model, "specs")


def core_names(model: torch.nn.Module) -> dict[str, str]:
    """Returns {the fork's name: the plan's} for every parameter that a stage of a model holds.

    What the plan has no name for keeps the fork's, so that it is found to be unknown.

    Args:
        model: a GPTModel or GPTModelPipe, not wrapped.
    """
    named = [name for name, _ in model.named_parameters(remove_duplicate=False) if not name.startswith(PADDING)]
    to_plan = _of_pipe if is_pipe(model) else _of_gpt_model
    return dict(to_plan(model, named))


def named_parameters(chunks: Sequence[torch.nn.Module]) -> Iterator[tuple[str, str, torch.nn.Parameter]]:
    """(the fork's name, the plan's, parameter) of everything that this rank trains or should; wrapped or not."""
    for chunk in chunks:
        model = unwrapped(chunk)
        names = core_names(model)
        for name, parameter in model.named_parameters():
            if name in names:
                yield name, names[name], parameter


def _of_gpt_model(model: Any, named: Sequence[str]) -> Iterator[tuple[str, str]]:
    encoder = "language_model.encoder."
    for name in named:
        # Where the last stage of a pipeline has a copy of the embedding, it is called without the language model.
        if embedding := _EMBEDDING.match(name):
            yield name, _embedding(embedding)
        elif layer := re.match(rf"{re.escape(encoder)}layers\.(\d+)\.(.+)$", name):
            # A stage numbers its layers from 0; the layer itself knows its place in the model, from 1.
            number = model.language_model.encoder.layers[int(layer[1])].layer_number - 1
            yield name, _in_layer(number, layer[2])
        elif name.startswith(f"{encoder}final_layernorm."):
            yield name, "decoder." + name.removeprefix(encoder)
        else:
            yield name, READOUT_WEIGHT if name == "language_model.output_layer.weight" else name


def _of_pipe(model: Any, named: Sequence[str]) -> Iterator[tuple[str, str]]:
    kinds = [getattr(getattr(spec, "typename", None), "__name__", "") for spec in model.specs]
    # What comes before the first one is a cast and the embedding; experts would put something behind the last.
    first = kinds.index("ParallelTransformerLayerPipe")
    last = first + kinds.count("ParallelTransformerLayerPipe") - 1
    for name in named:
        place = re.match(r"(\d+)\.(.+)$", name)
        if embedding := _EMBEDDING.match(name):
            yield name, _embedding(embedding)
        elif place and first <= int(place[1]) <= last:
            yield name, _in_layer(int(place[1]) - first, place[2])
        elif place and int(place[1]) > last and place[2] in ("weight", "bias"):
            yield name, f"decoder.final_layernorm.{place[2]}"
        else:
            yield name, READOUT_WEIGHT if place and place[2] == "lm_head.weight" else name


def _embedding(match: re.Match[str]) -> str:
    return WORD_EMBEDDINGS if match[1] == "word" else POSITION_EMBEDDINGS


def _in_layer(number: int, name: str) -> str:
    module, _, parameter = name.rpartition(".")
    return f"decoder.layers.{number}.{_LAYER_PARTS.get(module, module)}.{parameter}"


# ---- shapes --------------------------------------------------------------------------------------------------------


def global_shape(parameter: torch.nn.Parameter, fork_name: str, name: str, tensor_parallel: int) -> tuple[int, ...]:
    """Returns the shape that a rank's parameter has over all `tensor_parallel` ranks together.

    Also where ZeRO-3 has taken it away and left an empty one.
    """
    shape = list(getattr(parameter, "ds_shape", parameter.shape))
    # Under sequence parallelism each rank holds the embeddings of its own positions.
    split = 0 if ".local_embeddings." in fork_name else _split_dimension(name)
    if split is not None:
        shape[split] *= tensor_parallel
    return tuple(shape)


def _split_dimension(name: str) -> int | None:
    return next((dimension for end, dimension in _SPLIT.items() if name.endswith(end)), None)


_SAME_MODEL = "Is the model another one than the command line says?"
_REMEDIES = Remedies(
    unknown="Only the fork's GPTModel and GPTModelPipe with ordinary layers are supported.",
    missing=_SAME_MODEL,
    shape=_SAME_MODEL,
)


def mismatches(
    chunks: Sequence[torch.nn.Module], plan: Plan, tensor_parallel: int, *, everywhere: Collection[str] | None = None
) -> list[str]:
    """Returns where this rank's parameters and shapes are not the plan's, and what no rank has; in sentences.

    Args:
        chunks: what this rank holds, wrapped or not.
        plan: for the whole model.
        tensor_parallel: over how many ranks a tensor is split.
        everywhere: the plan's names of what all ranks hold; this rank's where there is one.
    """
    held = list(named_parameters(chunks))
    shapes = {name: global_shape(p, fork_name, name, tensor_parallel) for fork_name, name, p in held}
    return parameter_problems(
        shapes,
        plan,
        _REMEDIES,
        everywhere=everywhere,
        tensor_parallel=tensor_parallel,
        own_names={name: fork_name for fork_name, name, _ in held},
    )
