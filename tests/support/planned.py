"""Puts the plug-in onto the stock model: a recipe and a model file → a run of `support.stock` with a plan applied.

Calls the adapter as a training script does. Everything but `recipe` and `sizes_of` runs inside a rank.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from support import stock
from support.stock import Layout, Run, Sizes, Training

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.architectures.registry import architecture_of
from mup_megatron.recipe import Hyperparameters, Parametrization, PerParameter, Recipe
from mup_megatron.theory import Plan

Edit = Callable[[list[Any]], None]
"""Changes the built chunks of a model."""

_RESIDUAL = re.compile(r"\.(linear_proj|linear_fc2)\.weight$")


def recipe(
    base: ModelFile,
    *,
    rule: str = "mup",
    optimizer: str = "adam",
    weight_decay_exponent: float = 1.0,
    per_parameter: Sequence[dict[str, Any]] = (),
    **hyperparameters: float,
) -> Recipe:
    """A recipe tuned at `base` with every multiplier 1, weight decay on and a floor of the learning rate."""
    tuned = {
        "lr": 1e-3,
        "min_lr": 1e-4,
        "init_method_std": base.init_method_std,
        "weight_decay": 0.1,
        "adam_beta2": 0.95,
        **hyperparameters,
    }
    return Recipe(
        base=base,
        hyperparameters=Hyperparameters(**tuned),
        per_parameter=tuple(PerParameter(**own) for own in per_parameter),
        parametrization=Parametrization(rule=rule, optimizer=optimizer, weight_decay_exponent=weight_decay_exponent),
    )


def sizes_of(model: ModelFile, tensor_parallel: int = 1) -> Sizes:
    """The sizes of a model file, with the vocabulary as Megatron pads it at this tensor parallelism."""
    return Sizes(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.query_groups,
        kv_channels=model.head_size,
        vocab_size=model.padded_vocab_size(tensor_parallel),
        seq_length=model.seq_length,
        normalization=model.normalization,
        gated_linear_unit=model.swiglu,
        qk_layernorm=model.qk_layernorm,
        add_bias_linear=model.add_bias_linear,
        add_qkv_bias=model.add_qkv_bias,
        position_embedding_type=model.position_embedding_type,
        tied=model.tied,
        init_method_std=model.init_method_std,
    )


def training_of(tuned: Recipe) -> Training:
    """What optimizer and schedule are told: the recipe's values."""
    h = tuned.hyperparameters
    return Training(
        optimizer=tuned.parametrization.optimizer,
        lr=h.lr,
        min_lr=h.min_lr,
        weight_decay=h.weight_decay,
        adam_beta1=h.adam_beta1,
        adam_beta2=h.adam_beta2,
        adam_eps=h.adam_eps,
        clip_grad=h.clip_grad,
        more={key: value for key, value in tuned.optimizer_values.items() if key.startswith("muon_")},
    )


def built(
    model: ModelFile,
    layout: Layout,
    *,
    config_changes: dict[str, Any] | None = None,
    layer_spec: Callable[[], Any] | None = None,
    same_weights: bool = False,
) -> tuple[Sizes, Any, list[Any]]:
    """Sizes, configuration and chunks of a stock model as Megatron draws it.

    `same_weights` puts in numbers that do not depend on the layout, with the std of Megatron's draw.
    """
    from mup_megatron.megatron.builders import build_chunk

    sizes = sizes_of(model, layout.tp)
    stock.init_parallel(layout)
    config = stock.transformer_config(sizes, layout, **architecture_of(model).config(model), **(config_changes or {}))
    ordinary = not (model.multi_latent_attention or model.mtp_num_layers or model.num_experts)
    if layer_spec is not None or (type(model) is ModelFile and ordinary):
        chunks = stock.build_chunks(sizes, layout, config, layer_spec() if layer_spec is not None else None)
    else:
        chunks = [build_chunk(model, config, stage if layout.vpp else None) for stage in range(layout.vpp or 1)]
    if same_weights:
        stock.draw_weights(chunks, sizes.init_method_std)
        with torch.no_grad():
            for chunk in chunks:
                for name, parameter in chunk.named_parameters():
                    if _RESIDUAL.search(name):
                        parameter /= math.sqrt(2 * sizes.num_layers)
    return sizes, config, chunks


def prepare(
    tuned: Recipe,
    target: ModelFile,
    layout: Layout,
    *,
    model: ModelFile | None = None,
    training: Training | None = None,
    config_changes: dict[str, Any] | None = None,
    layer_spec: Callable[[], Any] | None = None,
    same_weights: bool = False,
    plug_in: bool = True,
    initialize: bool = True,
    edit: Edit | None = None,
    edit_optimizer: Callable[[Any], None] | None = None,
) -> Run:
    """A model that is ready to train as the recipe says, or as stock Megatron-Core does without the plug-in.

    Args:
        tuned: the recipe.
        target: what the plan is for.
        layout: of the ranks.
        model: what is built, where it is not `target`.
        training: where it is not what the recipe says.
        config_changes: fields of the TransformerConfig.
        layer_spec: makes the layers' spec, where it is not Megatron's own local one.
        same_weights: initial weights that do not depend on the layout.
        plug_in: whether the plan is applied.
        initialize: as in `apply_plan`.
        edit: changes the built chunks before the plan is applied.
        edit_optimizer: changes the OptimizerConfig before the plan's overrides are asked for.
    """
    from mup_megatron.megatron.model import apply_plan
    from mup_megatron.megatron.optimizer import config_overrides

    sizes, config, chunks = built(
        model or target, layout, config_changes=config_changes, layer_spec=layer_spec, same_weights=same_weights
    )
    plan = tuned.plan(target)
    if edit is not None:
        edit(chunks)
    if plug_in:
        apply_plan(chunks, plan, initialize=initialize)

    def overrides(wrapped: list[Any], optimizer_config: Any) -> Any:
        if edit_optimizer is not None:
            edit_optimizer(optimizer_config)
        return config_overrides(wrapped, plan, optimizer_config) if plug_in else None

    return stock.finish(sizes, layout, training or training_of(tuned), config, chunks, overrides)


def lr_fraction(training: Training, step: int) -> tuple[float, float]:
    """(peak's share, floor's share) of the learning rate after `step` scheduler steps: linear warm-up, linear decay."""
    if step <= training.warmup_steps:
        return step / training.warmup_steps, 0.0
    remaining = max(0.0, 1.0 - (step - training.warmup_steps) / (training.decay_steps - training.warmup_steps))
    return remaining, 1.0 - remaining


Piece = tuple[str, tuple[int, ...], tuple[int, ...], torch.Tensor]
"""(key of the whole tensor, its shape, where this part begins, this part)."""


def pieces(chunks: Sequence[Any]) -> list[Piece]:
    """This rank's part of every tensor of the whole model; layers of one kind are one tensor with a leading axis."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    found: list[Piece] = []
    for chunk in chunks:
        for entry in nested_values(stock.saved(chunk)):
            parts = nested_values(entry.build()) if isinstance(entry, ShardedTensorFactory) else [entry]
            for part in parts:
                if isinstance(part, ShardedTensor):
                    size = (1,) * part.prepend_axis_num + tuple(part.local_shape)
                    data = part.data.detach().clone().reshape(size)
                    found.append((part.key, tuple(part.global_shape), tuple(part.global_offset), data))
    return found


def assembled(of_ranks: Sequence[Sequence[Piece]]) -> dict[str, torch.Tensor]:
    """The whole tensors from the pieces of all ranks. Parts that several ranks hold must be equal."""
    tensors: dict[str, torch.Tensor] = {}
    for key, shape, begin, part in (piece for of_rank in of_ranks for piece in of_rank):
        tensor = tensors.setdefault(key, torch.full(shape, math.nan, dtype=part.dtype))
        place = tuple(slice(b, b + n) for b, n in zip(begin, part.shape, strict=True))
        assert tensor[place].isnan().all() or tensor[place].equal(part), f"{key}: ranks hold different copies"
        tensor[place] = part
    assert not any(tensor.isnan().any() for tensor in tensors.values())
    return tensors


def family(plan: Plan, key: str) -> list[Any]:
    """The plan's entries of one whole tensor: one, or one for each layer of the stack."""
    return [entry for entry in plan.entries if re.sub(r"^decoder\.layers\.\d+\.", "decoder.layers.", entry.name) == key]
