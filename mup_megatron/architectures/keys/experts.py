"""Keys of models with experts: what decides tensors and losses, or has to be the same at base and target."""

import ast
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from mup_megatron.architectures.flag import Flag, number, whole_number
from mup_megatron.architectures.keys.unread import only_with
from mup_megatron.errors import InputError
from mup_megatron.validation import Strict, added, brief

_Count = Annotated[int, Field(gt=0, le=10**9)]
_Coefficient = Annotated[float, Field(ge=0)]
_Balancing = Literal["aux_loss", "seq_aux_loss", "global_aux_loss", "sinkhorn", "none"]
_LONGEST = 10**4
"""Layers of a pattern."""


def _none(value: Any) -> Any:
    """Returns None for a coefficient that is 0; anything else as it is."""
    return None if type(value) in (int, float) and value == 0 else value


def _alone(value: Any) -> Any:
    """Returns the item of a list that has one, as Megatron takes it; anything else as it is."""
    return value[0] if isinstance(value, list | tuple) and len(value) == 1 else value


def _pattern(value: Any) -> Any:
    """Returns the list that a text such as `([0]*3+[1]*58)` stands for; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return layer_frequency(value)
    except InputError as error:
        raise ValueError(f"{error}. Correct this value.") from None


def _one_or_many(value: Any) -> str:
    return "(many)" if isinstance(value, list | tuple) else "(one)"


_BY_FORM = Discriminator(_one_or_many)
_Coefficients = Annotated[tuple[_Coefficient, ...], Field(strict=False, min_length=1)]
_Balancings = Annotated[tuple[_Balancing, ...], Field(strict=False, min_length=1)]
_OfLayer = Annotated[int, Field(ge=0, le=1)]
_Layers = Annotated[tuple[_OfLayer, ...], Field(strict=False, min_length=1, max_length=_LONGEST)]


class ExpertKeys(Strict):
    """The experts of a model; without `num_experts` it has none, and the other keys say nothing."""

    num_experts: _Count | None = None
    moe_ffn_hidden_size: _Count | None = None
    """Of one expert. Default: that of an MLP."""
    moe_layer_freq: Annotated[
        Annotated[_Count, Tag("(one)")] | Annotated[_Layers, Tag("(many)")], _BY_FORM, BeforeValidator(_pattern)
    ] = added("0.2", 1)
    """Every so many layers one with experts, from the first on; or 1 (experts) or 0 (an MLP) for each layer."""
    moe_router_topk: _Count = added("0.2", 2)
    moe_shared_expert_intermediate_size: _Count | None = added("0.2", None)
    """Of all shared experts together. Default: no shared expert."""
    moe_shared_expert_gate: bool = added("0.2", False)
    moe_router_score_function: Literal["softmax", "sigmoid", "sqrtsoftplus"] = added("0.2", "softmax")
    moe_router_pre_softmax: bool = added("0.2", False)
    """The softmax is over all experts; else over those that are chosen."""
    moe_router_enable_expert_bias: bool = added("0.2", False)
    moe_router_bias_update_rate: _Coefficient = added("0.2", 1e-3)
    moe_router_topk_scaling_factor: Annotated[float, Field(gt=0)] | None = added("0.2", None)
    moe_router_num_groups: _Count | None = added("0.2", None)
    moe_router_group_topk: _Count | None = added("0.2", None)
    moe_router_load_balancing_type: Annotated[
        Annotated[_Balancing, Tag("(one)")] | Annotated[_Balancings, Tag("(many)")], _BY_FORM, BeforeValidator(_alone)
    ] = added("0.2", "aux_loss")
    moe_aux_loss_coeff: Annotated[
        Annotated[_Coefficient, Tag("(one)")] | Annotated[_Coefficients, Tag("(many)")],
        _BY_FORM,
        BeforeValidator(_alone),
    ] = added("0.2", 0.0)
    moe_z_loss_coeff: Annotated[_Coefficient | None, BeforeValidator(_none)] = added("0.2", None)
    moe_grouped_gemm: bool = added("0.2", False)
    """All experts' matrices in one module, where it is Transformer Engine's."""
    moe_use_legacy_grouped_gemm: bool = added("0.2", False)
    """With `moe_grouped_gemm`, all experts' matrices in one tensor: Megatron-Core 0.16 alone."""

    @property
    def has_shared_expert(self) -> bool:
        """True where every token also passes an expert that is not chosen."""
        return self.moe_shared_expert_intermediate_size is not None

    @property
    def has_group_limited_routing(self) -> bool:
        """True where a token's experts are from a few groups of them."""
        return self.moe_router_group_topk is not None

    @property
    def has_legacy_experts(self) -> bool:
        """True where all experts' matrices of a layer are one tensor."""
        return self.moe_grouped_gemm and self.moe_use_legacy_grouped_gemm

    def has_experts(self, layer: int) -> bool:
        """Returns whether a GPT's layer, counted from 0, has experts in place of an MLP."""
        if self.num_experts is None:
            return False
        if isinstance(self.moe_layer_freq, int):
            return layer % self.moe_layer_freq == 0
        return bool(self.moe_layer_freq[layer])

    def require_possible_experts(self, num_layers: int, *, biases: bool) -> None:
        """Raises ValueError, by key, for experts that Megatron cannot build.

        Args:
            num_layers: of the model.
            biases: whether its linear layers have some.
        """
        problem = next((why for wrong, why in self._impossible(num_layers, biases) if wrong), None)
        if problem is not None:
            raise ValueError(problem)

    def _impossible(self, num_layers: int, biases: bool) -> Sequence[tuple[bool, str]]:
        """(whether it is so, what is wrong with that)."""
        experts, k, freq = self.num_experts, self.moe_router_topk, self.moe_layer_freq
        if experts is None:
            return []
        groups, of_groups = self.moe_router_num_groups, self.moe_router_group_topk
        kinds, coefficients = self.moe_router_load_balancing_type, self.moe_aux_loss_coeff
        chosen_alone = k == 1 and self.moe_router_score_function == "softmax" and not self.moe_router_pre_softmax
        return [
            (k > experts, f"moe_router_topk {k} is more than num_experts {experts}. Lower it."),
            (
                isinstance(freq, tuple) and len(freq) != num_layers,
                f"moe_layer_freq has {len(freq) if isinstance(freq, tuple) else 0} layers, and num_layers is "
                f"{num_layers}. Give one for each layer.",
            ),
            (isinstance(freq, tuple) and 1 not in freq, "moe_layer_freq: no layer has experts. Remove num_experts."),
            (
                self.has_shared_expert and biases,
                "moe_shared_expert_intermediate_size: shared experts have no biases. Set add_bias_linear to false.",
            ),
            (
                chosen_alone and kinds != "sinkhorn",
                "moe_router_topk 1: the softmax over the one that is chosen is always 1. Set moe_router_pre_softmax.",
            ),
            (
                self.moe_router_enable_expert_bias and self.moe_router_score_function == "softmax",
                "moe_router_enable_expert_bias: it needs another moe_router_score_function than softmax, as sigmoid.",
            ),
            (
                of_groups is not None and groups is None,
                "moe_router_group_topk: moe_router_num_groups is missing. Give it.",
            ),
            (
                groups is not None and of_groups is not None and (experts % groups != 0 or of_groups > groups),
                f"moe_router_num_groups {groups} with moe_router_group_topk {of_groups}: it has to divide num_experts "
                f"{experts}, and a token cannot choose from more groups than there are.",
            ),
            (
                groups is not None and of_groups is not None and k > of_groups * (experts // groups),
                f"moe_router_topk {k} is more than the experts of moe_router_group_topk {of_groups} of "
                f"{groups} groups. Lower it, or choose from more groups.",
            ),
            (
                self.has_legacy_experts and biases,
                "moe_use_legacy_grouped_gemm: such experts have no biases. Set add_bias_linear to false.",
            ),
            (
                isinstance(kinds, tuple) != isinstance(coefficients, tuple)
                or (isinstance(kinds, tuple) and isinstance(coefficients, tuple) and len(kinds) != len(coefficients)),
                "moe_aux_loss_coeff: give one for each of moe_router_load_balancing_type.",
            ),
            (
                kinds == "sinkhorn" and coefficients != 0.0,
                "moe_router_load_balancing_type sinkhorn has no auxiliary loss. Set moe_aux_loss_coeff to 0.",
            ),
        ]


# ---- on Megatron-LM's command line ---------------------------------------------------------------------------------


def layer_frequency(text: str) -> int | list[int]:
    """Returns what a word of --moe-layer-freq means: a number, or a list as Python writes it with `+` and `*`."""
    try:
        found = _evaluated(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, RecursionError, ValueError, MemoryError):
        found = None
    if found is None:
        raise InputError(f"'{brief(text, 60)}' is neither a number nor a list of 0 and 1, as ([0]*3+[1]*58)")
    return found


def _evaluated(node: ast.expr) -> int | list[int] | None:
    match node:
        case ast.Constant(int() as value) if not isinstance(value, bool):
            return value
        case ast.List(items):
            values = [_evaluated(item) for item in items]
            return [value for value in values if isinstance(value, int)] if None not in values else None
        case ast.BinOp(left, ast.Add(), right):
            one, other = _evaluated(left), _evaluated(right)
            return one + other if isinstance(one, list) and isinstance(other, list) else None
        case ast.BinOp(left, ast.Mult(), right):
            one, other = _evaluated(left), _evaluated(right)
            if isinstance(one, int) and isinstance(other, list):
                one, other = other, one
            repeated = isinstance(one, list) and isinstance(other, int) and len(one) * other <= _LONGEST
            return one * other if repeated and isinstance(one, list) and isinstance(other, int) else None
        case _:
            return None


def _balancing(text: str) -> str | list[str]:
    words = text.split()
    return words[0] if len(words) == 1 else words


def _coefficients(text: str) -> float | list[float]:
    values = [number(word) for word in text.split()]
    return values[0] if len(values) == 1 else values


FLAGS: Mapping[str, Flag] = {
    "num_experts": Flag("--num-experts", "num_experts", None, whole_number),
    "moe_ffn_hidden_size": Flag("--moe-ffn-hidden-size", "moe_ffn_hidden_size", None, whole_number),
    "moe_layer_freq": Flag("--moe-layer-freq", "moe_layer_freq", 1, layer_frequency),
    "moe_router_topk": Flag("--moe-router-topk", "moe_router_topk", 2, whole_number),
    "moe_shared_expert_intermediate_size": Flag(
        "--moe-shared-expert-intermediate-size", "moe_shared_expert_intermediate_size", None, whole_number
    ),
    "moe_shared_expert_gate": Flag("--moe-shared-expert-gate", "moe_shared_expert_gate", False),
    "moe_router_score_function": Flag("--moe-router-score-function", "moe_router_score_function", "softmax", str),
    "moe_router_pre_softmax": Flag("--moe-router-pre-softmax", "moe_router_pre_softmax", False),
    "moe_router_enable_expert_bias": Flag("--moe-router-enable-expert-bias", "moe_router_enable_expert_bias", False),
    "moe_router_bias_update_rate": Flag("--moe-router-bias-update-rate", "moe_router_bias_update_rate", 1e-3, number),
    "moe_router_topk_scaling_factor": Flag(
        "--moe-router-topk-scaling-factor", "moe_router_topk_scaling_factor", None, number
    ),
    "moe_router_num_groups": Flag("--moe-router-num-groups", "moe_router_num_groups", None, whole_number),
    "moe_router_group_topk": Flag("--moe-router-group-topk", "moe_router_group_topk", None, whole_number),
    "moe_router_load_balancing_type": Flag(
        "--moe-router-load-balancing-type", "moe_router_load_balancing_type", "aux_loss", _balancing, many=True
    ),
    "moe_aux_loss_coeff": Flag("--moe-aux-loss-coeff", "moe_aux_loss_coeff", 0.0, _coefficients, many=True),
    "moe_z_loss_coeff": Flag("--moe-z-loss-coeff", "moe_z_loss_coeff", None, number),
    "moe_grouped_gemm": Flag("--moe-grouped-gemm", "moe_grouped_gemm", False),
    "moe_use_legacy_grouped_gemm": Flag("--moe-use-legacy-grouped-gemm", "moe_use_legacy_grouped_gemm", False),
}
"""Key → the flag that says the same."""
UNREAD = (
    only_with("num_experts", *(key for key in FLAGS if key != "num_experts")),
    only_with("moe_router_enable_expert_bias", "moe_router_bias_update_rate"),
    only_with("moe_shared_expert_intermediate_size", "moe_shared_expert_gate", on_lines=False),
    only_with("moe_grouped_gemm", "moe_use_legacy_grouped_gemm"),
)
