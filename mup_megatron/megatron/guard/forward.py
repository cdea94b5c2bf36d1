"""The forward pass against the plan: the scale of attention, measured, and multipliers, counted.

What should be there are the plan's sites. Leaves no trace.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from mup_megatron.live import hooks
from mup_megatron.live.compare import CLOSE, close, hook_problems, scale_problem
from mup_megatron.live.problems import Problem, number
from mup_megatron.megatron import branches
from mup_megatron.megatron.model import part_scales
from mup_megatron.megatron.names import local_values, named_modules, unwrapped
from mup_megatron.theory import Acts, Plan, Site

# ---- attention -----------------------------------------------------------------------------------------------------

_CANNOT = (AssertionError, AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError)
"""What an attention raises that cannot be called with two tokens like Megatron's own: then its attribute has to do."""

_LOGITS = (4.0, 2.0**-4, 2.0**-10)
"""Logits that would reveal the expected scale, and ever larger ones: the first that leaves two probabilities counts."""


def attention_problems(chunks: Sequence[torch.nn.Module], plan: Plan) -> list[Problem]:
    """Returns where attention on this rank does not compute softmax(s·q·k) with the plan's s, which is measured.

    Measured to the rounding of the weights' type; what the attention says of itself (`softmax_scale`) is compared
    exactly, and alone where it cannot be called: with context parallelism, FP8, or another signature.
    """
    sites = [site for site in plan.sites if site.acts is Acts.SCALE]
    found = []
    for model in map(unwrapped, chunks):
        modules = dict(named_modules(model))
        for site in sites:
            if site.module in modules:
                attention = modules[site.module.rpartition(".")[0]]
                problem = _scale_problem(site, modules[site.module], attention) or _inference_problem(site, attention)
                found += [problem] if problem is not None else []
    return found


def _scale_problem(site: Site, core: torch.nn.Module, attention: Any) -> Problem | None:
    said = part_scales(core)
    measured = _measured(core, attention, site.factor)
    return scale_problem(
        site.module,
        site.factor,
        said,
        lambda wrong: _scale_cause(site, type(core).__name__, said, wrong, measured),
        measured=measured,
        precision=CLOSE if measured is None else _precision(attention),
        must_be_known=site.changes,
    )


def _scale_cause(site: Site, kind: str, said: Sequence[float], wrong: Sequence[float], measured: float | None) -> str:
    if said and not wrong:
        return (
            f"This attention ({kind}) has the right softmax_scale and computes with another. Let its forward pass use "
            "self.softmax_scale, or use Megatron's local or Transformer Engine attention."
        )
    if not said:
        what = "cannot be measured" if measured is None else "computes with its own"
        return (
            f"This attention ({kind}) has no softmax_scale and {what}. Use Megatron's local or Transformer Engine "
            "attention, or a base of the target's head size and attention_multiplier 1."
        )
    if site.changes and all(close(scale, site.stock) for scale in wrong):
        return "It has Megatron's own 1/√d: the plan's scale did not arrive, or the layer was built anew afterwards."
    return "Something set another scale. Leave softmax_scale to the plan; tune attention_multiplier instead."


def _inference_problem(site: Site, attention: Any) -> Problem | None:
    # Dynamic inference bypasses core_attention and takes its scale from here, or 1/√d where there is none.
    said = getattr(attention, "softmax_scale", None)
    if said == site.factor or (said is None and not site.changes):
        return None
    cause = "Training does not use this one, dynamic inference does. Apply the plan anew; do not set it by hand."
    name = site.module.rpartition(".")[0]
    return Problem(name, "softmax scale of dynamic inference", number(site.factor), number(said), cause)


def _measured(core: torch.nn.Module, attention: Any, expected: float) -> float | None:
    """Returns the scale that an attention computes with: of its heads' the one that is farthest from the expected.

    NaN where it computes no softmax of q·k; None where it cannot be called.
    """
    config = attention.config
    weight = next(attention.parameters(), None)
    if config.context_parallel_size > 1 or config.fp8 or config.fp4 or weight is None or weight.is_meta:
        return None
    for logit in _LOGITS:
        # Powers of two, so that no type rounds them, halved between q and k for the narrow range of float16.
        exponent = round(math.log2(logit / expected))
        try:
            first, second = _two_tokens(
                core, attention, local_values(weight), 2.0 ** (exponent // 2), 2.0 ** (exponent - exponent // 2)
            )
        except _CANNOT:
            return None
        scales = (first.double() / second.double()).log() / 2.0**exponent
        if scales.isfinite().all():
            return float(max(scales.tolist(), key=lambda scale: abs(scale - expected)))
    return math.nan


def _two_tokens(
    core: torch.nn.Module, attention: Any, like: torch.Tensor, query: float, key: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """For each head, how much the second of two tokens attends to the first and to itself.

    With q·k = query·key for the first and 0 for itself, the quotient of the two is exp(s·query·key); that holds too
    where a further, learned term is in the softmax's denominator.
    """
    heads, groups = attention.num_attention_heads_per_partition, attention.num_query_groups_per_partition
    # Those of values are other ones in latent attention.
    size, of_values = attention.key_hidden_size, attention.val_hidden_size
    q = like.new_zeros(2, 1, heads, size, requires_grad=False)
    k = like.new_zeros(2, 1, groups, size, requires_grad=False)
    v = like.new_zeros(2, 1, groups, of_values, requires_grad=False)
    q[..., 0] = query
    k[0, ..., 0] = key
    v[0, ..., 0] = 1.0
    v[1, ..., 1] = 1.0
    with torch.no_grad(), _untouched(core):
        output: Any = core(q, k, v, None, attn_mask_type=attention.attn_mask_type)
    mixed = (output[0] if isinstance(output, tuple) else output).reshape(2, heads, of_values)[1]
    return mixed[:, 0], mixed[:, 1]


@contextmanager
def _untouched(module: torch.nn.Module) -> Iterator[None]:
    """Evaluation, without dropout and its random draws; every attribute is put back, also what a call records."""
    before = [(part, dict(part.__dict__)) for part in module.modules()]
    for part, _ in before:
        part.training = False
    try:
        yield
    finally:
        for part, attributes in before:
            part.__dict__.clear()
            part.__dict__.update(attributes)


def _precision(attention: Any) -> float:
    """Returns how well a scale can be measured: some roundings of the type in which attention computes."""
    weight = next(attention.parameters())
    rounding = torch.finfo(weight.dtype).eps / 2
    if weight.dtype is torch.float32 and weight.is_cuda:
        rounding = 2.0**-11  # TF32
    return max(4.0 * rounding, 1e-5)


# ---- multipliers ---------------------------------------------------------------------------------------------------


def multiplier_problems(chunks: Sequence[torch.nn.Module], plan: Plan) -> list[Problem]:
    """Returns where this rank's hooks are not those of the plan's sites."""
    wanted = hooks.wanted(plan.sites)
    problems: list[Problem] = []
    for model in map(unwrapped, chunks):
        modules = dict(named_modules(model))
        live = ((name, hooks.found(module) + branches.found(modules, name)) for name, module in modules.items())
        problems += hook_problems(live, wanted)
    return problems
