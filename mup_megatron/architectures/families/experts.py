"""Experts: a router sends each token to a few of many MLPs; a shared one may see all tokens.

Every expert has matrices of its own, of its own size: what grows is one expert's ffn, not that of all together. Router
and gate compute one number for each expert and for the token, however wide the model is: outputs. Their multiplier is
folded, because nothing can be hooked inside of a router.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

from mup_megatron.architectures.families.family import Family, Growth, Size, alike, norm
from mup_megatron.architectures.families.mlp import two_layers
from mup_megatron.architectures.keys import experts
from mup_megatron.architectures.layout import Layout
from mup_megatron.architectures.measured import STREAM, Kind, Measured, inside
from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.theory import BRANCH, Acts, Kept, Place, Property, Side, Tensor

if TYPE_CHECKING:
    from torch import nn

_OF_MODULES = ("moe_grouped_gemm", "moe_use_legacy_grouped_gemm")
"""Keys that say of how many modules experts are: see `Experts.config`."""


class Experts(Family):
    """A router, experts of which each token passes `moe_router_topk`, and a shared expert with or without a gate."""

    name: ClassVar[str] = "experts"
    expert_parallel: ClassVar[bool] = True
    shared: ClassVar[Mapping[str, str]] = MappingProxyType(
        {
            "moe_shared_expert_intermediate_size": "has_shared_expert",
            "moe_router_group_topk": "has_group_limited_routing",
            "moe_use_legacy_grouped_gemm": "has_legacy_experts",
            **alike(
                "moe_shared_expert_gate",
                "moe_router_score_function",
                "moe_router_pre_softmax",
                "moe_router_enable_expert_bias",
                "moe_router_bias_update_rate",
                "moe_router_topk_scaling_factor",
                "moe_router_load_balancing_type",
                "moe_aux_loss_coeff",
                "moe_z_loss_coeff",
            ),
        }
    )
    sizes: ClassVar[tuple[Size, ...]] = (
        Size(key="moe_ffn_hidden_size", small=64),
        Size(key="moe_shared_expert_intermediate_size", small=64),
        Size(key="num_experts", small=8, spread=4, follows_width=False),
        Size(key="moe_router_topk", small=2, follows_width=False),
    )

    def tensors(self, model: ModelFile, layer: str, growth: Growth) -> Iterator[Tensor]:
        """Yields norm, router, the experts one after the other, and the shared expert with its gate."""
        assert model.num_experts is not None
        mlp, hidden = f"{layer}.mlp", Side(model.hidden_size, grows=True)
        yield from norm(model, f"{layer}.pre_mlp_layernorm.", hidden)
        yield _output(f"{mlp}.router.weight", hidden, model.num_experts, Property.ROUTER)
        if model.add_bias_linear:
            # Megatron draws it as it draws weights.
            yield Tensor(
                name=f"{mlp}.router.bias",
                shape=(model.num_experts,),
                fan_in=Side(1),
                fan_out=Side(model.num_experts),
                properties=frozenset({Property.VECTOR}),
                start=Kept(),
            )
        matrices = _legacy if model.has_legacy_experts else _single
        yield from matrices(model, f"{mlp}.experts", hidden, Side(model.expert_ffn_size, grows=True))
        if model.moe_shared_expert_intermediate_size is not None:
            ffn = Side(model.moe_shared_expert_intermediate_size, grows=True)
            yield from two_layers(model, f"{mlp}.shared_experts", hidden, ffn)
            if model.moe_shared_expert_gate:
                yield _output(f"{mlp}.shared_experts.gate_weight", hidden, 1)

    def places(self, layer: str) -> Iterator[Place]:
        """Yields the branch; the factors of router and gate are folded."""
        yield Place(f"{layer}.mlp", Acts.BRANCH, BRANCH)

    def flops(self, model: ModelFile) -> Mapping[str, float]:
        """Returns those of the router and of the experts that a token passes."""
        assert model.num_experts is not None
        matrices = 3 if model.swiglu else 2
        passed = model.moe_router_topk * model.expert_ffn_size + (model.moe_shared_expert_intermediate_size or 0)
        return {
            "router": 6.0 * model.hidden_size * (model.num_experts + model.moe_shared_expert_gate),
            "experts": 6.0 * model.hidden_size * matrices * passed,
        }

    def config(self, model: ModelFile) -> Mapping[str, Any]:
        """Returns the fields that say how many experts there are, how they are called and how they are chosen."""
        values = {key: getattr(model, key) for key in experts.FLAGS if key not in ("num_experts", *_OF_MODULES)}
        legacy = {"moe_use_legacy_grouped_gemm": True} if model.has_legacy_experts else {}
        # Of local layers Megatron-Core 0.16 knows no other grouping, and later releases none.
        fused = model.transformer_impl == "transformer_engine"
        return {
            **{key: list(value) if isinstance(value, tuple) else value for key, value in values.items()},
            **legacy,
            "num_moe_experts": model.num_experts,
            "moe_ffn_hidden_size": model.expert_ffn_size,
            "moe_grouped_gemm": model.moe_grouped_gemm and (fused or model.has_legacy_experts),
            # The one that every layout has.
            "moe_token_dispatcher_type": "alltoall",
        }

    def problems(self, model: ModelFile, layout: Layout) -> Iterator[str]:
        """Yields which numbers of ranks divide neither the experts nor one of them, or do not fit each other."""
        assert model.num_experts is not None
        tensor, own = layout.tensor_model_parallel_size, layout.expert_tensor_parallel_size
        if tensor > 1 and not layout.sequence_parallel:
            yield (
                f"--tensor-model-parallel-size {tensor}: Megatron trains experts with it under sequence parallelism "
                "alone. Add --sequence-parallel."
            )
        ranks, shared = layout.expert_model_parallel_size, model.moe_shared_expert_intermediate_size or 0
        for size, flag, divisor, divided in (
            (model.num_experts, "expert-model-parallel-size", ranks, f"num_experts {model.num_experts}"),
            (
                model.expert_ffn_size,
                "expert-tensor-parallel-size",
                own,
                f"the size {model.expert_ffn_size} of an expert",
            ),
            (shared, "tensor-model-parallel-size", tensor, f"moe_shared_expert_intermediate_size {shared}"),
        ):
            if size % divisor:
                yield f"--{flag} {divisor} does not divide {divided}. Choose a divisor of it."
        together = ranks * own * layout.pipeline_model_parallel_size
        if layout.world_size % together:
            yield (
                f"--expert-model-parallel-size {ranks} × expert tensor parallelism {own} × "
                f"--pipeline-model-parallel-size {layout.pipeline_model_parallel_size} needs a multiple of {together} "
                f"processes, and there {'is one' if layout.world_size == 1 else f'are {layout.world_size}'}. Start "
                "that many."
            )

    def local_problem(self, model: ModelFile, *, on_cpu: bool) -> str | None:
        """Returns that local experts have no biases."""
        if not model.add_bias_linear:
            return None
        return (
            "add_bias_linear: Megatron's local experts stop in training if they have biases. Train on a GPU with "
            "Transformer Engine, or set add_bias_linear to false in model file and recipe."
        )

    def remarks(self, base: ModelFile, target: ModelFile) -> Iterator[str]:
        """Yields what is known of a base with experts of another number or size."""
        differ = [
            f"{key} {at_base} → {at_target}"
            for key, at_base, at_target in (
                ("num_experts", base.num_experts, target.num_experts),
                ("moe_router_topk", base.moe_router_topk, target.moe_router_topk),
            )
            if at_base != at_target
        ]
        if base.num_experts is None or target.num_experts is None:
            return
        ratios = [model.expert_ffn_size / model.hidden_size for model in (base, target)]
        if ratios[0] != ratios[1]:
            differ.append(f"an expert's ffn over hidden_size {ratios[0]:.4g} → {ratios[1]:.4g}")
        if not differ:
            return
        yield (
            f"Base and target differ in {', '.join(differ)}. Measured at hidden_size 128, from E8 k2 ffn 128 to E32 k8 "
            "ffn 32: the best learning rate moves by at most a quarter of an octave. What layers of experts give at "
            "the start changes with k, and with num_experts where the softmax is over all of them."
        )
        share = (target.moe_router_topk / target.num_experts) / (base.moe_router_topk / base.num_experts)
        if share != 1.0:
            yield f"An expert of the target sees {share:.4g} times the share of tokens, and its eps is that much of it."

    def measured(self, model: ModelFile, layer: str) -> Iterator[Measured]:
        """Yields the norm, the router's weights of the experts, the shared expert, and what all of them add."""
        norm, mlp = f"{layer}.pre_mlp_layernorm", f"{layer}.mlp"
        yield inside(norm, "Experts' output", STREAM)
        yield Measured(f"{mlp}.router", Kind.HIDDEN, "Router", (norm,), leads=True)
        shared = [f"{mlp}.shared_experts"] if model.has_shared_expert else []
        yield from (inside(each, "Experts' output", norm) for each in shared)
        yield Measured(mlp, Kind.BRANCH, "Experts' output", (norm, f"{mlp}.router", *shared), leads=True)

    def plain(self, model: ModelFile, softmax_scale: float) -> "tuple[str, str, nn.Module]":
        """Returns experts without a limit on their tokens."""
        from mup_megatron.architectures.plain.experts import PlainExperts

        return "pre_mlp_layernorm", "mlp", PlainExperts(model)


def _output(name: str, hidden: Side, size: int, *more: Property) -> Tensor:
    """Returns a matrix from the residual stream to as many numbers at every width."""
    return Tensor(
        name=name,
        shape=(size, hidden.size),
        fan_in=hidden,
        fan_out=Side(size),
        properties=frozenset({Property.FOLDED, *more}),
    )


def _single(model: ModelFile, name: str, hidden: Side, ffn: Side) -> Iterator[Tensor]:
    """Each expert's own matrices; Transformer Engine's grouped ones are parameters of one module.

    Such a module has one input for all of them, at which no factor of one expert could act: theirs are folded.
    """
    assert model.num_experts is not None
    grouped = model.moe_grouped_gemm and model.transformer_impl == "transformer_engine"
    pattern = f"{name}.{{tensor}}{{expert}}" if grouped else f"{name}.local_experts.{{expert}}.{{tensor}}"
    alike = [_of_expert(model, tensor, folded=grouped) for tensor in two_layers(model, "", hidden, ffn)]
    for expert in range(model.num_experts):
        for tensor in alike:
            yield replace(tensor, name=pattern.format(tensor=tensor.name[1:], expert=expert))


def _of_expert(model: ModelFile, tensor: Tensor, *, folded: bool) -> Tensor:
    assert model.num_experts is not None
    more = {Property.EXPERT, Property.FOLDED} if folded else {Property.EXPERT}
    return replace(tensor, properties=tensor.properties | more, share=model.moe_router_topk / model.num_experts)


def _legacy(model: ModelFile, name: str, hidden: Side, ffn: Side) -> Iterator[Tensor]:
    """Yields all experts' matrices beside each other, transposed, in one tensor for each of the two layers."""
    assert model.num_experts is not None
    fc1, fc2 = (tensor for tensor in two_layers(model, "", hidden, ffn) if tensor.name.endswith(".weight"))
    for tensor, own, shape in (
        (fc1, "weight1", (hidden.size, model.num_experts * fc1.fan_out.size)),
        (fc2, "weight2", (model.num_experts * ffn.size, hidden.size)),
    ):
        yield replace(_of_expert(model, tensor, folded=True), name=f"{name}.{own}", shape=shape)


EXPERTS = Experts()
"""The family of layers of experts."""
