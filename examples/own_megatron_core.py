"""μP in your own Megatron-Core code: four calls beside what the code does anyway.

    python examples/own_megatron_core.py

Trains a model 4× as wide as the base for a few steps on noise. Without a GPU it runs on the CPU.
"""

import torch

from mup_megatron.megatron import cpu

cpu.enable()  # before the first `import megatron`; on a machine with a GPU it does nothing

from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer import TransformerConfig

from mup_megatron.architectures import ModelFile
from mup_megatron.megatron.guard import require_as_planned
from mup_megatron.megatron.model import apply_plan, configure
from mup_megatron.megatron.optimizer import config_overrides
from mup_megatron.recipe import recipe

# What was tuned, and at which shape. Both usually come from files: load_model_file(...), load_recipe(...).
base = ModelFile(
    num_layers=2, hidden_size=64, num_attention_heads=2, vocab_size=256, seq_length=32, transformer_impl="local"
)
target = base.model_copy(update={"hidden_size": 256, "num_attention_heads": 8})
tuned = recipe({"base": base.model_dump(), "hyperparameters": {"lr": 0.005, "weight_decay": 0.1}}, source="example")
plan = tuned.plan(target)

store = torch.distributed.HashStore()
torch.distributed.init_process_group("gloo" if cpu.is_enabled() else "nccl", store=store, rank=0, world_size=1)
parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
tensor_parallel.model_parallel_cuda_manual_seed(1)

config = TransformerConfig(
    num_layers=target.num_layers,
    hidden_size=target.hidden_size,
    num_attention_heads=target.num_attention_heads,
    init_method_std=tuned.moved.init_method_std,
    attention_dropout=0.0,
    hidden_dropout=0.0,
    **cpu.transformer_config_overrides(),
)
configure(config, plan)  # 1. attention scale, before the model is built
model = GPTModel(
    config=config,
    transformer_layer_spec=get_gpt_layer_local_spec(),
    vocab_size=target.padded_vocab_size(),
    max_sequence_length=target.positions,
    share_embeddings_and_output_weights=target.tied,
).cuda()
apply_plan([model], plan)  # 2. initial weights and multipliers, before DDP
chunks = [DistributedDataParallel(config, DistributedDataParallelConfig(), model)]
optimizer_config = OptimizerConfig(
    optimizer="adam",
    lr=tuned.moved.lr,
    min_lr=tuned.moved.min_lr,
    weight_decay=tuned.moved.weight_decay,
    **tuned.optimizer_values,  # betas, eps
)
optimizer = get_megatron_optimizer(
    optimizer_config,
    chunks,
    config_overrides=config_overrides(chunks, plan, optimizer_config),  # 3. every parameter's own group
    use_gloo_process_groups=False,
)
# 4. what is live against the plan, before the first step; with Megatron's scheduler after optimizer, if there is one
require_as_planned(chunks, plan, optimizer, weights=True)

tokens = torch.randint(target.vocab_size, (4, target.seq_length + 1)).cuda()
positions = torch.arange(target.seq_length).expand(4, -1).cuda()
for step in range(5):
    chunks[0].zero_grad_buffer()
    optimizer.zero_grad()
    # Megatron's own scheduler would do this: each group has its own peak.
    for group in optimizer.param_groups:
        group["lr"], group["weight_decay"] = group["max_lr"], optimizer_config.weight_decay * group["wd_mult"]
    loss = chunks[0](tokens[:, :-1], positions, None, labels=tokens[:, 1:]).mean()
    loss.backward()
    chunks[0].finish_grad_sync()
    optimizer.step()
    print(f"step {step}: loss {loss.item():.4f}")
require_as_planned(chunks, plan, optimizer, weights=False)  # and at any later time
for group in optimizer.param_groups:
    print(f"{len(group['params']):3d} tensors at lr {group['lr']:.5g}, weight decay {group['weight_decay']:.3g}")
