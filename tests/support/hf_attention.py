"""What attention multiplies its logits by, seen in what each back end of Hugging Face's is given or gives.

Logits are compared in the last row, where a causal mask hides nothing, as differences to its first one, so that a
softmax behind them does not matter.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations import flash_attention
from transformers.masking_utils import flash_attention_mask

FLASH = "mup_test_flash"
"""Flash attention as the library calls it, on anything."""

Call = tuple[str, tuple[Any, ...], dict[str, Any]]


def use(model: PreTrainedModel, back_end: str) -> None:
    """Lets a model's attentions use one back end; FLASH is not asked whether the machine could."""
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = back_end


@contextmanager
def flash_on_any_device() -> Iterator[None]:
    """The library's way into flash attention, all of it but the kernel."""
    AttentionInterface.register(FLASH, flash_attention.flash_attention_forward)
    AttentionMaskInterface.register(FLASH, flash_attention_mask)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flash_attention, "_flash_attention_forward", _flash)
        yield


def _flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    softmax_scale: float | None,
    is_causal: bool,
    **_: Any,
) -> Tensor:
    assert mask is None
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    own = {"is_causal": is_causal and q.shape[2] > 1, "scale": softmax_scale}
    return nn.functional.scaled_dot_product_attention(q, k, v, **own).transpose(1, 2)


def attentions(model: nn.Module) -> dict[str, nn.Module]:
    """What has a scale, by name."""
    return {
        name: module for name, module in model.named_modules() if isinstance(getattr(module, "scaling", None), float)
    }


def calls(model: nn.Module, inputs: dict[str, Tensor]) -> list[Call]:
    """Each attention's name, and what it is called with in one forward pass."""
    found: list[Call] = []
    handles = [
        module.register_forward_pre_hook(
            lambda _, args, kwargs, name=name: found.append((name, args, dict(kwargs))), with_kwargs=True
        )
        for name, module in attentions(model).items()
    ]
    with torch.no_grad():
        model(**inputs, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def last_row(model: nn.Module, call: Call, back_end: str) -> Tensor:
    """The logits of one attention's last query, up to a constant."""
    name, args, kwargs = call
    module = attentions(model)[name]
    seen: list[Tensor] = []
    original = nn.functional.scaled_dot_product_attention

    def recording(q: Tensor, k: Tensor, v: Tensor, *args: Any, scale: float | None = None, **other: Any) -> Tensor:
        groups = q.shape[1] // k.shape[1]
        seen.append((q.shape[-1] ** -0.5 if scale is None else scale) * q @ k.repeat_interleave(groups, 1).mT)
        return original(q, k, v, *args, scale=scale, **other)

    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.functional, "scaled_dot_product_attention", recording)
        weights = module(*args, **kwargs)[-1]
    if back_end == "eager":
        assert not seen
        seen.append(weights.log())
    (logits,) = seen
    return logits[..., -1, 1:] - logits[..., -1, :1]
