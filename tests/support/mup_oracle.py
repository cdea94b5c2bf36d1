"""What microsoft/mup gives the plain GPT: its own init, readout and optimizers, read back from the objects it makes.

No formula of this package is used here, and none of mup is repeated. What mup leaves to its user is written out:

- Attention: "1/d instead of 1/√d", with the constant that makes it 1/√d at the base's head size (mup's README).
- Residual outputs: a std of σ/√(2L) instead of σ, as Megatron draws them.
- Vectors (biases, gains): groups without weight decay. mup would decay them too; Megatron does not, and neither has a
  rule for it.
- eps: mup gives every parameter the same.
- Depth: mup compares models name by name, so its base has the target's depth.

mup knows two infinite sides of a weight or one. A weight with one side fixed while the model grows (fc1 with a fixed
ffn) it takes for an embedding, so it is an oracle only where all sides grow.
"""

import math
from dataclasses import dataclass

import mup
import torch
from support.plain_gpt import PlainGPT
from torch.nn import functional
from torch.optim import Optimizer

from mup_megatron.architectures.model_file import ModelFile


@dataclass(frozen=True)
class Numbers:
    """What one parameter gets."""

    init_std: float | None
    multiplier: float
    lr: float
    weight_decay: float


def mup_gpt(
    base: ModelFile,
    target: ModelFile,
    *,
    sigma: float = 0.02,
    embedding_multiplier: float = 1.0,
    output_multiplier: float = 1.0,
    attention_multiplier: float = 1.0,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> PlainGPT:
    """The target as mup's user would write it, drawn by `mup.init.normal_` with the base's σ."""
    torch.manual_seed(seed)
    scale = attention_multiplier * math.sqrt(base.head_size) / target.head_size
    model = PlainGPT(
        target,
        embedding_multiplier=embedding_multiplier,
        output_multiplier=output_multiplier,
        softmax_scale=scale,
        mup_readout=True,
        dtype=dtype,
    )
    # Where the target's head size is the base's, it is fixed; else it grows.
    growing_head = base.head_size != target.head_size
    with torch.device("meta"):
        at_depth = base.model_copy(update={"num_layers": target.num_layers})
        shapes = PlainGPT(at_depth, mup_readout=True)
        delta = PlainGPT(_doubled(at_depth, growing_head=growing_head), mup_readout=True)
    mup.set_base_shapes(model, shapes, delta=delta)
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            mup.init.normal_(parameter, std=user_std(name, target, sigma))
    return model


def user_std(name: str, target: ModelFile, sigma: float) -> float:
    """The std that mup's user asks for: Megatron's, which does not depend on width."""
    writes_residual = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
    return sigma / math.sqrt(2 * target.num_layers) if writes_residual else sigma


def _doubled(model: ModelFile, *, growing_head: bool) -> ModelFile:
    """Every width twice as large, to show mup which sides grow."""
    heads = 1 if growing_head else 2
    return model.model_copy(
        update={
            "hidden_size": 2 * model.hidden_size,
            "ffn_hidden_size": 2 * model.ffn_size,
            "num_attention_heads": heads * model.num_attention_heads,
            "num_query_groups": heads * model.query_groups,
            "kv_channels": model.head_size * (2 if growing_head else 1),
        }
    )


def mup_adamw(model: PlainGPT, *, lr: float, weight_decay: float, **other: object) -> Optimizer:
    """`mup.MuAdamW` without weight decay on vectors."""
    return mup.MuAdamW(_groups(model), lr=lr, weight_decay=weight_decay, **other)


def mup_sgd(model: PlainGPT, *, lr: float, weight_decay: float, **other: object) -> Optimizer:
    """`mup.MuSGD` without weight decay on vectors."""
    return mup.MuSGD(_groups(model), lr=lr, weight_decay=weight_decay, **other)


def _groups(model: PlainGPT) -> list[dict[str, object]]:
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    return [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]


def mup_numbers(model: PlainGPT, optimizer: Optimizer, target: ModelFile, *, sigma: float) -> dict[str, Numbers]:
    """Every parameter's numbers, measured: the scale of mup's draw, its optimizer's groups, its readout's factor."""
    group_of = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    numbers = {}
    for name, parameter in model.named_parameters():
        is_head = parameter is model.output_layer.weight and name.startswith("output_layer")
        numbers[name] = Numbers(
            init_std=None if parameter.dim() == 1 else _drawn_std(parameter, user_std(name, target, sigma)),
            multiplier=readout_factor(model) if is_head else 1.0,
            lr=group_of[parameter]["lr"],
            weight_decay=group_of[parameter]["weight_decay"],
        )
    return numbers


def _drawn_std(parameter: torch.Tensor, std: float) -> float:
    """The std that mup draws with: its draw is a number times the draw of a unit normal from the same seed."""
    before = parameter.detach().clone()
    torch.manual_seed(1)
    mup.init.normal_(parameter, std=std)
    drawn = parameter.detach().clone()
    torch.manual_seed(1)
    unit = torch.empty_like(drawn).normal_()
    with torch.no_grad():
        parameter.copy_(before)
    factor = (drawn.norm() / unit.norm()).item()
    torch.testing.assert_close(drawn, factor * unit, rtol=1e-12, atol=0)
    return factor


def readout_factor(model: PlainGPT) -> float:
    """What the readout multiplies by beside its weight, tied or not."""
    weight = model.output_layer.weight
    with torch.no_grad():
        x = torch.ones(1, weight.shape[1], dtype=weight.dtype)
        ratio = model.output_layer(x) / functional.linear(x, weight)
    torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio), rtol=1e-9, atol=0)
    return ratio.mean().item()
