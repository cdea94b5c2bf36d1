"""The parts that Megatron-Core needs on the CPU beyond a pretended device: Adam, norms, latent attention, biases."""

import contextlib
import copy
import importlib
import importlib.util
from typing import Any

import torch

from mup_megatron.megatron.cpu.optimizer import GroupStepAdam

CONFIG_OVERRIDES: dict[str, object] = {
    "use_cpu_initialization": True,
    "persist_layer_norm": False,
    "gradient_accumulation_fusion": False,
    "masked_softmax_fusion": False,
    "bias_dropout_fusion": False,
    "bias_activation_fusion": False,
    "apply_rope_fusion": False,
}


def install_adam() -> None:
    """Make `get_megatron_optimizer` build GroupStepAdam, and its distributed optimizer treat it as Apex's FusedAdam.

    Both modules look these names up when called, so models and configurations imported earlier are no obstacle.
    """
    optimizer = importlib.import_module("megatron.core.optimizer")
    _set(optimizer, "Adam", GroupStepAdam)
    _set(optimizer, "USING_PYTORCH_OPTIMIZER", False)
    distributed = importlib.import_module("megatron.core.optimizer.distrib_optimizer")
    _set(distributed, "Adam", GroupStepAdam)
    _set(distributed, "HAVE_APEX_OR_TE", True)
    _set(distributed, "USING_TE_OPTIMIZER", False)
    _set(distributed, "USING_APEX_OPTIMIZER", True)


def allow_norm_under_sequence_parallel() -> None:
    """Let Megatron's wrapper of torch's LayerNorm and RMSNorm build one under sequence parallel.

    There each tensor-parallel rank sees its part of the sequence, so the gradients of gain and bias are partial sums.
    Megatron adds them up over the ranks for every parameter marked `sequence_parallel`, as its fused norms mark theirs.
    """
    norm = importlib.import_module("megatron.core.transformer.torch_norm").WrappedTorchNorm
    original = norm.__new__

    def build(cls: type, config: Any, *args: Any, **kwargs: Any) -> Any:
        if not config.sequence_parallel:
            return original(cls, config, *args, **kwargs)
        unsplit = copy.copy(config)
        unsplit.sequence_parallel = False
        module = original(cls, unsplit, *args, **kwargs)
        for parameter in module.parameters():
            parameter.sequence_parallel = True
        return module

    norm.__new__ = build


def allow_resume_of_distributed_fp32() -> None:
    """Let the distributed optimizer load a state in fp32, where its parameters are views of the model's.

    Megatron copies into them outside of `no_grad`, which torch refuses for a view of a parameter. On a GPU nobody
    notices: bf16 has main parameters of its own.
    """
    optimizer = importlib.import_module("megatron.core.optimizer.distrib_optimizer").DistributedOptimizer
    for name in ("load_state_dict", "load_parameter_state"):
        _set(optimizer, name, torch.no_grad()(getattr(optimizer, name)))


def name_absent_router_kernel() -> None:
    """Give 0.16's router the name that it asks for and forgets to define where Transformer Engine is absent."""
    moe_utils: Any = importlib.import_module("megatron.core.transformer.moe.moe_utils")
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def give_local_attention_head_sizes() -> None:
    """Let Megatron's local attention be built with head sizes of its own, as Transformer Engine's is.

    Latent attention says those of keys and values, which the local one does not take: it has all heads as large as
    `kv_channels`. It computes with whatever it is given, but for the size of what comes out.
    """
    local: Any = importlib.import_module("megatron.core.transformer.dot_product_attention").DotProductAttention
    original = local.__init__

    def build(self: Any, *args: Any, k_channels: int | None = None, v_channels: int | None = None, **more: Any) -> None:
        original(self, *args, **more)
        if v_channels is not None:
            self.hidden_size_per_partition = v_channels * self.num_attention_heads_per_partition

    local.__init__ = build


def give_local_attention_a_bias() -> None:
    """Let Megatron's local attention add a bias to its logits, as Transformer Engine's does: relative positions."""
    local: Any = importlib.import_module("megatron.core.transformer.dot_product_attention").DotProductAttention
    original = local.forward

    def forward(self: Any, *args: Any, attention_bias: torch.Tensor | None = None, **more: Any) -> Any:
        if attention_bias is None:
            return original(self, *args, **more)
        # First of all hooks, so that whoever looks at the logits sees it in them.
        hook = self.scale_mask_softmax.register_forward_pre_hook(
            lambda _module, inputs: (inputs[0] + attention_bias, *inputs[1:]), prepend=True
        )
        try:
            return original(self, *args, **more)
        finally:
            hook.remove()

    local.forward = forward


def compute_yarn_on_the_cpu() -> None:
    """Let the frequencies of YaRN be computed on the CPU, where latent attention leaves them to the device.

    It asks torch for the device of a number, which newer releases of torch answer with an error where there is none.
    """
    yarn: Any = importlib.import_module("megatron.core.models.common.embeddings").YarnRotaryEmbedding
    original = yarn.__init__

    def build(self: Any, *args: Any, **more: Any) -> None:
        original(self, *args, **{**more, "use_cpu_initialization": True})

    yarn.__init__ = build


def sum_gradients_of_shared_keys() -> None:
    """Let latent attention of local layers train alike on every number of tensor-parallel ranks.

    One key with positions is shared by all heads. A rank has the gradient from its own heads alone, and nothing adds
    them up behind Megatron's local projection, whose output is gathered; Transformer Engine's is not divided. Here it
    is given on as that one is: whole, or this rank's part of the sequence.
    """
    latent: Any = importlib.import_module("megatron.core.transformer.multi_latent_attention").MLASelfAttention
    mappings: Any = importlib.import_module("megatron.core.tensor_parallel.mappings")
    original = latent.__init__

    def build(self: Any, config: Any, *args: Any, **more: Any) -> None:
        original(self, config, *args, **more)
        if config.tensor_model_parallel_size > 1:
            self.linear_kv_down_proj.register_forward_hook(whole)

    def whole(module: Any, args: Any, output: tuple[torch.Tensor, Any]) -> tuple[torch.Tensor, Any]:
        gathered = mappings.gather_from_tensor_model_parallel_region(output[0])
        if module.config.sequence_parallel:
            return mappings.scatter_to_sequence_parallel_region(gathered), output[1]
        rank = module.config.kv_lora_rank
        # The product's gradient is contiguous, as 0.16 wants it: what it adds up else is lost.
        key = mappings.copy_to_tensor_model_parallel_region(gathered[..., rank:]) * 1.0
        return torch.cat([gathered[..., :rank], key], dim=-1), output[1]

    latent.__init__ = build


def orthogonalise_in_fp32() -> None:
    """Let Muon multiply fp32 matrices as such, whatever `muon_fp32_matmul_prec` allows a GPU.

    On a CPU torch takes its default for leave to multiply in bf16, where the same run then differs by layout.
    """
    if importlib.util.find_spec("emerging_optimizers") is not None:
        utils: Any = importlib.import_module("emerging_optimizers.utils")
        _set(utils, "fp32_matmul_precision", lambda precision="highest": contextlib.nullcontext())


def know_absent_transformer_engine() -> None:
    """Tell 0.16's latent attention that Transformer Engine is absent: it takes the names of its classes for it."""
    latent: Any = importlib.import_module("megatron.core.transformer.multi_latent_attention")
    latent.HAVE_TE = importlib.import_module("megatron.core.extensions.transformer_engine").HAVE_TE


def _set(module: Any, name: str, value: object) -> None:
    assert hasattr(module, name), f"{module.__name__} has no {name}"
    setattr(module, name, value)
