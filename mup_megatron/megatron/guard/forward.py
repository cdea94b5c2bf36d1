"""What the forward pass really does against the plan: the scale of attention, measured, and multipliers, counted.

What should be there is worked out here from the plan's names alone, not by the code of `model.py` that puts it there: a
mistake that both shared would be seen by neither. Leaves no trace.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from mup_megatron.architectures.names import HEAD
from mup_megatron.megatron.guard.problems import Problem, number
from mup_megatron.megatron.model import core_attentions, part_scales
from mup_megatron.megatron.names import named_parameters, unwrapped
from mup_megatron.modules.hooks import ScaledInput, ScaledOutput
from mup_megatron.theory import Plan
from mup_megatron.theory.rules import default_softmax_scale

# ---- attention -----------------------------------------------------------------------------------------------------

_CANNOT = (AssertionError, AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError)
"""What an attention raises that cannot be called with two tokens like Megatron's own: then its attribute has to do."""

_LOGITS = (4.0, 2.0**-4, 2.0**-10)
"""Logits that would reveal the expected scale, and ever larger ones: the first that leaves two probabilities counts."""


def attention_problems(chunks: Sequence[torch.nn.Module], plan: Plan) -> list[Problem]:
    """Where attention on this rank does not compute softmax(s·q·k) with the plan's s, which is measured.

    Measured to the rounding of the weights' type; what the attention says of itself (`softmax_scale`) is compared
    exactly, and alone where it cannot be called: with context parallelism, FP8, or another signature.
    """
    found = []
    for model in map(unwrapped, chunks):
        for name, core in core_attentions(model):
            attention = model.get_submodule(name.removesuffix(".core_attention"))
            problem = _scale_problem(name, core, attention, plan)
            if problem is None:
                problem = _inference_problem(name.removesuffix(".core_attention"), attention, plan)
            if problem is not None:
                found.append(_renamed(problem, model))
    return found


def _scale_problem(name: str, core: torch.nn.Module, attention: Any, plan: Plan) -> Problem | None:
    expected = plan.softmax_scale
    said = part_scales(core)
    wrong = [scale for scale in said if not math.isclose(scale, expected, rel_tol=1e-6)]
    measured = _measured(core, attention, expected)
    if measured is not None and not math.isclose(measured, expected, rel_tol=_precision(attention)):
        return Problem(name, "softmax scale", number(expected), number(measured), _scale_cause(said, wrong, core, plan))
    if wrong:
        return Problem(name, "softmax scale", number(expected), number(wrong[0]), _scale_cause(said, wrong, core, plan))
    if measured is None and not said and plan.changes_softmax_scale:
        cause = (
            f"This attention ({type(core).__name__}) has no softmax_scale and cannot be measured. Use Megatron's local "
            "or Transformer Engine attention, or a base of the target's head size and attention_multiplier 1."
        )
        return Problem(name, "softmax scale", number(expected), "unknown", cause)
    return None


def _scale_cause(said: list[float], wrong: list[float], core: torch.nn.Module, plan: Plan) -> str:
    kind = type(core).__name__
    if said and not wrong:
        return (
            f"This attention ({kind}) has the right softmax_scale and computes with another. Let its forward pass use "
            "self.softmax_scale, or use Megatron's local or Transformer Engine attention."
        )
    if not said:
        return (
            f"This attention ({kind}) has no softmax_scale and computes with its own. Use Megatron's local or "
            "Transformer Engine attention, or a base of the target's head size and attention_multiplier 1."
        )
    default = default_softmax_scale(plan.head_size)
    if plan.changes_softmax_scale and all(math.isclose(scale, default, rel_tol=1e-6) for scale in wrong):
        return "It has Megatron's own 1/√d: the plan's scale did not arrive, or the layer was built anew afterwards."
    return "Something set another scale. Leave softmax_scale to the plan; tune attention_multiplier instead."


def _inference_problem(name: str, attention: Any, plan: Plan) -> Problem | None:
    # Dynamic inference bypasses core_attention and takes its scale from here, or 1/√d where there is none.
    said = getattr(attention, "softmax_scale", None)
    if said == plan.softmax_scale or (said is None and not plan.changes_softmax_scale):
        return None
    cause = "Training does not use this one, dynamic inference does. Apply the plan anew; do not set it by hand."
    return Problem(name, "softmax scale of dynamic inference", number(plan.softmax_scale), number(said), cause)


def _measured(core: torch.nn.Module, attention: Any, expected: float) -> float | None:
    """The scale that an attention computes with: of its heads' the one that is farthest from the expected.

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
                core, attention, weight, 2.0 ** (exponent // 2), 2.0 ** (exponent - exponent // 2)
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
    size = attention.hidden_size_per_attention_head
    q = like.new_zeros(2, 1, heads, size, requires_grad=False)
    k, v = (like.new_zeros(2, 1, groups, size, requires_grad=False) for _ in range(2))
    q[..., 0] = query
    k[0, ..., 0] = key
    v[0, ..., 0] = 1.0
    v[1, ..., 1] = 1.0
    with torch.no_grad(), _untouched(core):
        output: Any = core(q, k, v, None, attn_mask_type=attention.attn_mask_type)
    mixed = (output[0] if isinstance(output, tuple) else output).reshape(2, heads, size)[1]
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
    """How well a scale can be measured: some roundings of the type in which attention computes."""
    weight = next(attention.parameters())
    rounding = torch.finfo(weight.dtype).eps / 2
    if weight.dtype is torch.float32 and weight.is_cuda:
        rounding = 2.0**-11  # TF32
    return max(4.0 * rounding, 1e-5)


# ---- multipliers ---------------------------------------------------------------------------------------------------

_Hooks = list[tuple[str, float]]
"""(what is scaled, factor) for each hook of ours on a module."""


def multiplier_problems(chunks: Sequence[torch.nn.Module], plan: Plan) -> list[Problem]:
    """Where a multiplier of the plan is missing, acts twice, has another factor or stands where none should."""
    found = []
    for model in map(unwrapped, chunks):
        expected = _expected_hooks(model, plan)
        for name, module in model.named_modules():
            hooks, wanted = _hooks(module), expected.get(name, [])
            if hooks != wanted:
                problem = Problem(name, "multiplier", _listed(wanted), _listed(hooks), _hook_cause(hooks, wanted))
                found.append(_renamed(problem, model))
    return found


def _expected_hooks(model: torch.nn.Module, plan: Plan) -> dict[str, _Hooks]:
    """What should stand on each module, by the model's own name of it; nothing where a multiplier is 1."""
    expected: dict[str, _Hooks] = {}
    own_names = (name for name, _ in model.named_parameters())
    for own_name, (name, _) in zip(own_names, named_parameters([model], tied=plan.tied), strict=True):
        entry = plan[name]
        if own_name != HEAD and not entry.is_readout and entry.multiplier != 1.0:
            # The input is what scales a weight and leaves its bias alone; a table has no input to scale.
            side = "output" if entry.is_embedding else "input"
            expected[own_name.rpartition(".")[0]] = [(side, entry.multiplier)]
    # A tied readout on the embedding's own stage has no parameter.
    if hasattr(model, "output_layer") and plan.output_multiplier != 1.0:
        expected[HEAD.rpartition(".")[0]] = [("input", plan.output_multiplier)]
    return expected


def _hooks(module: torch.nn.Module) -> _Hooks:
    before = [("input", h.factor) for h in module._forward_pre_hooks.values() if isinstance(h, ScaledInput)]
    after = [("output", h.factor) for h in module._forward_hooks.values() if isinstance(h, ScaledOutput)]
    return before + after


def _listed(hooks: _Hooks) -> str:
    return " and ".join(f"{number(factor)} on its {side}" for side, factor in hooks) or "none"


def _hook_cause(found: _Hooks, wanted: _Hooks) -> str:
    if not found:
        return "The hook is gone: the layer was built anew or copied without it. Apply the plan to the final model."
    if not wanted:
        return "The plan has no multiplier here. Another plan was applied to this model; build it anew."
    if len(found) > 1:
        return "The plan was applied more than once. Apply it once, to a freshly built model."
    return "Another recipe's plan was applied to this model. Build it anew with this one."


def _renamed(problem: Problem, model: Any) -> Problem:
    """With the layer's number in the whole model for its number on this stage."""
    start, _, rest = problem.name.partition("decoder.layers.")
    if start or not rest:
        return problem
    own, _, rest = rest.partition(".")
    layer = model.decoder.layers[int(own)].layer_number - 1
    name = f"decoder.layers.{layer}.{rest}"
    return Problem(name, problem.quantity, problem.expected, problem.found, problem.cause)
