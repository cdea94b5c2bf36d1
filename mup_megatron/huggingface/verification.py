"""A Hugging Face model's forward pass held against the plan: attention's scale in use, and factors in code.

Base and target are run on the meta device with a small input, and each operation is watched. So a plan is given only
to models whose attention is seen to compute what the plan says.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch

from mup_megatron.errors import InputError
from mup_megatron.huggingface import configs
from mup_megatron.modules.attention import attention_modules
from mup_megatron.modules.forward import Factor, Forward, watched_forward
from mup_megatron.modules.shapes import MetaModule
from mup_megatron.theory import rules
from mup_megatron.validation import shortened

_LENGTH = 8
_CLOSE = 1e-4
"""Relative difference of two scales that are one: some code rounds them to half precision."""


def forward_of(built: MetaModule) -> Forward:
    """Returns what a forward pass of a model does.

    Raises:
        InputError: its forward pass cannot be run with the inputs that are known, or not on the meta device.
    """
    model: Any = built.module
    model.eval()
    if str(getattr(model.config, "_attn_implementation", None)) not in ("eager", "sdpa", "None"):
        model.set_attn_implementation("eager")  # a kernel's own code cannot be watched; it is told the same scale
    if getattr(model, "_can_set_experts_implementation", lambda: False)():
        model.set_experts_implementation("batched_mm")  # without values there is no loop over those that were chosen
    readout = model.get_output_embeddings()
    weight = None if readout is None else readout.weight
    # Some classifiers look for the end of the text, of which there is none here. What they stand on has the attention.
    parts = [model] if readout is not None or model.base_model is model else [model, model.base_model]
    failure: Exception | None = None
    for part in parts:
        for inputs in _attempts(part):
            try:
                with configs.quiet():
                    return watched_forward(model, partial(part, **inputs), built.watch, weight)
            except Exception as error:  # a library's code may raise anything, and some of it cannot run without values
                failure = failure or error
    assert failure is not None
    what = shortened(f"{type(failure).__name__}: {configs.in_a_line(failure)}", 80)
    raise InputError(
        f"model type {model.config.model_type}: its attention could not be looked at, because {type(model).__name__}'s "
        f"forward pass does not run on small inputs without values ({what}). It is not supported."
    ) from failure


def require_right_softmax(
    base: Forward, after: Forward, model: torch.nn.Module, *, alpha: float, standard: bool
) -> None:
    """Raises InputError where attention would not compute with the scale that follows from the base's.

    Args:
        base: the recipe's base, as the library makes it.
        after: the target, told what the plan says.
        model: the target.
        alpha: the recipe's attention_multiplier.
        standard: every scale stays the library's.
    """
    if len(base.softmaxes) != len(after.softmaxes):
        raise InputError(
            f"attention computes {len(base.softmaxes)} softmaxes in the recipe's base and {len(after.softmaxes)} in "
            "the target. Give the base the target's architecture."
        )
    seen = {found.where for found in after.softmaxes}
    for name, module, _ in attention_modules(model):
        if name in after.called and not any(where == name or where.startswith(f"{name}.") for where in seen):
            raise InputError(
                f"{name}: no softmax was seen in {type(module).__name__}, so what it computes is not known. A model "
                "with such an attention is not supported."
            )
    for own, found in zip(base.softmaxes, after.softmaxes, strict=True):
        if own.scale is None or found.scale is None:
            raise InputError(
                f"{found.where}: what its attention multiplies logits by is no number that could be seen. A model with "
                "such an attention is not supported."
            )
        wanted = rules.softmax_scale(
            base_head_size=found.head_size if standard else own.head_size,
            head_size=found.head_size,
            alpha=alpha,
            stock=own.scale,
        )
        if not math.isclose(found.scale, wanted, rel_tol=_CLOSE):
            raise InputError(
                f"{found.where}: its attention would multiply logits by {found.scale:.4g}, where {wanted:.4g} follows "
                f"from the recipe's base, and it cannot be told. Use attention_multiplier 1, and a base whose heads "
                f"have the target's size ({found.head_size}; the base's have {own.head_size})."
            )


def require_no_hidden_factor(base: Forward, target: Forward, model: torch.nn.Module) -> None:
    """Raises InputError where the code multiplies by a number that is another one at another width.

    What a table's rows are multiplied by may be another one: the plan takes it back. But it has to be known.
    """
    for name, factor in (*base.looked_up.items(), *target.looked_up.items()):
        if not factor:
            raise InputError(
                f"{name}: {type(model).__name__} multiplies its rows by something that is no one number that could be "
                "seen, so its multiplier is unknown. Switch it off in both configurations, or choose another model."
            )
    for own, found in zip(base.factors, target.factors, strict=False):
        if (own.where, own.operation) != (found.where, found.operation):
            break
        if own.number != found.number:
            raise InputError(
                f"{found.where or type(model).__name__}: its code has a factor that follows width, "
                f"{_told(own)} in the recipe's base and {_told(found)} in the target, which μP has no place for. "
                "Switch it off in both configurations, or choose another model."
            )
    if len(base.factors) != len(target.factors):
        raise InputError(
            f"{type(model).__name__}: its forward pass does other things at the target's width than at the base's, so "
            "what it multiplies by cannot be compared. Choose another model."
        )


def _told(factor: Factor) -> str:
    sign = {"mul": "×", "div": "÷", "add": "+", "sub": "−", "pow": "^"}.get(factor.operation, factor.operation)
    return f"{sign} {factor.number:g}" if factor.number is not None else "an unknown number"


# ---- inputs --------------------------------------------------------------------------------------------------------


def _attempts(model: Any) -> Iterator[dict[str, Any]]:
    """Arguments of a small pass on the meta device, likeliest first: configurations do not say what sizes they want."""
    known = inspect.signature(model.forward).parameters
    makers = {name: make for name, make in _MAKERS.items() if name in known}
    if not getattr(model.config, "is_encoder_decoder", False):
        makers.pop("decoder_input_ids", None)
    made = {name: make(model.config) for name, make in makers.items()}
    rest = {"use_cache": False} if "use_cache" in known else {}
    for attempt in range(max(map(len, made.values()), default=1)):
        yield {name: shapes[min(attempt, len(shapes) - 1)] for name, shapes in made.items() if shapes} | rest


def _meta(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device="meta")


def _ids(config: Any) -> list[torch.Tensor]:
    return [torch.zeros(1, _LENGTH, dtype=torch.long, device="meta")]


def _boxes(config: Any) -> list[torch.Tensor]:
    return [torch.zeros(1, _LENGTH, 4, dtype=torch.long, device="meta")]


def _pixels(config: Any) -> list[torch.Tensor]:
    own = getattr(config, "vision_config", None) or config
    size, channels = getattr(own, "image_size", None), getattr(own, "num_channels", None) or 3
    sizes = [size if isinstance(size, list | tuple) else (size, size)] if size else []
    return [_meta(1, channels, *both) for both in (*sizes, (224, 224), (64, 64))]


def _waves(config: Any) -> list[torch.Tensor]:
    bins, length = getattr(config, "num_mel_bins", None), getattr(config, "max_length", None)
    return [*([_meta(1, length, bins)] if bins and length else []), _meta(1, 16000), _meta(1, 1, 16000)]


def _spectra(config: Any) -> list[torch.Tensor]:
    own = getattr(config, "audio_config", None) or config
    keys = ("num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim", "input_dim")
    bins = next((size for key in keys if isinstance(size := getattr(own, key, None), int)), 80)
    return [_meta(1, bins, 2 * getattr(own, "max_source_positions", 100)), _meta(1, 100, bins)]


_MAKERS: Mapping[str, Callable[[Any], list[torch.Tensor]]] = {
    "input_ids": _ids,
    "decoder_input_ids": _ids,
    "bbox": _boxes,
    "pixel_values": _pixels,
    "input_values": _waves,
    "input_features": _spectra,
}
