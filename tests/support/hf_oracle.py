"""What microsoft/mup gives a Hugging Face model: its own base shapes, draws, readouts and optimizers, read back.

No formula of this package is used here, and none of mup is repeated. What mup leaves to its user is written out:

- Readouts become `MuReadout`, a tied one `MuSharedReadout`.
- GPT-2's `Conv1D` holds its weight transposed; mup's optimizers take the last infinite dimension for fan_in, and its
  user corrects that.
- The draws are those of the library at the base's size, asked of `mup.init` by the library's own words where it has
  any (ResNet: Kaiming); the std of the base where the library's own depends on width (T5).
- Attention: 1/d from the base's 1/√d on. Vectors have no weight decay; eps is not scaled. Depth: mup compares models
  name by name, so its base has the target's depth.
"""

import copy
import math
from collections.abc import Callable, Mapping

import mup
import torch
from mup.infshape import InfDim, InfShape
from support.hf_families import FAMILIES
from support.mup_oracle import Numbers
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

READOUTS: dict[str, tuple[str, ...]] = {
    "gpt2": ("lm_head",),
    "gpt_neox": ("lm_head",),
    "llama": ("lm_head",),
    "mistral": ("lm_head",),
    "qwen2": ("lm_head",),
    "qwen3": ("lm_head",),
    "bert": ("cls.predictions.decoder", "cls.seq_relationship"),
    "vit": ("classifier",),
    "resnet": ("classifier.1",),
    "opt": ("lm_head",),
    "t5": ("lm_head",),
}


def mup_shapes(family: str, model: nn.Module, base: PretrainedConfig, delta: PretrainedConfig) -> None:
    """Gives a model mup's base shapes and readouts, without touching its weights."""
    _put_readouts(model, READOUTS[family])
    with torch.device("meta"):
        small, wider = (FAMILIES[family][0](copy.deepcopy(own)) for own in (base, delta))
    mup.set_base_shapes(model, small, delta=wider, rescale_params=False)
    for module in model.modules():
        if isinstance(module, Conv1D):
            _transpose(module.weight)


def _put_readouts(model: nn.Module, names: tuple[str, ...]) -> None:
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for name in names:
        parent_name, _, own = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        linear = getattr(parent, own)
        if id(linear.weight) in embeddings:
            readout = mup.MuSharedReadout(linear.weight, bias=False)
        else:
            readout = mup.MuReadout(*reversed(linear.weight.shape), bias=False)
            readout.weight = linear.weight
        readout.bias = linear.bias
        setattr(parent, own, readout)


class _Transposed(InfShape):
    """Of a weight whose first dimension is fan_in."""

    def fanin_fanout(self) -> tuple[InfDim, InfDim]:
        return self[0], self[1]


def _transpose(weight: nn.Parameter) -> None:
    shape = _Transposed(weight.infshape)
    shape.main_idx, shape.main = 0, shape[0]
    weight.infshape = shape


def optimizer_of(
    model: nn.Module, kind: str, *, lr: float, weight_decay: float, **other: object
) -> torch.optim.Optimizer:
    """`mup.MuAdamW` or `mup.MuSGD` without weight decay on vectors."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    make = {"adam": mup.MuAdamW, "sgd": mup.MuSGD}[kind]
    made = make(groups, lr=lr, weight_decay=weight_decay, **other)
    assert isinstance(made, torch.optim.Optimizer)
    return made


def numbers(
    model: nn.Module, optimizer: torch.optim.Optimizer, family: str, stds: Mapping[str, float | None]
) -> dict[str, Numbers]:
    """Every parameter's numbers: LR and weight decay of mup's groups, its readouts' factor, the given stds."""
    group_of = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    readouts = {id(m.weight): m for m in (model.get_submodule(name) for name in READOUTS[family])}
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    return {
        name: Numbers(
            init_std=stds.get(name),
            multiplier=1 / readouts[id(p)].width_mult() if id(p) in readouts and id(p) not in tables else 1.0,
            lr=group_of[p]["lr"],
            weight_decay=group_of[p]["weight_decay"],
        )
        for name, p in model.named_parameters()
    }


def readout_factor(model: nn.Module, name: str) -> float:
    """What a readout multiplies by beside its weight, measured."""
    module = model.get_submodule(name)
    with torch.no_grad():
        x = torch.ones(1, module.weight.shape[1], dtype=module.weight.dtype)
        bias = 0.0 if module.bias is None else module.bias
        ratio = (module(x) - bias) / nn.functional.linear(x, module.weight)
    torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio), rtol=1e-6, atol=0)
    return ratio.mean().item()


# ---- draws ---------------------------------------------------------------------------------------------------------

Draw = Callable[[torch.Tensor], object]


def mup_draws(family: str, model: PreTrainedModel, base: PretrainedConfig, *, scale: float = 1.0) -> dict[str, Draw]:
    """How mup's user draws every parameter that is not a constant, times `scale`: name → what draws it in place."""
    draws: dict[str, Draw] = {}
    for module_name, module in model.named_modules():
        for own, _ in module.named_parameters(recurse=False):
            draw = _resnet(module, own) if family == "resnet" else _normal(family, module_name, own, module, base)
            if draw is not None:
                draws[f"{module_name}.{own}" if module_name else own] = _scaled(draw, scale)
    names = dict(model.named_parameters())
    return {name: draw for name, draw in draws.items() if name in names}


def _scaled(draw: Draw, scale: float) -> Draw:
    def scaled(weight: torch.Tensor) -> None:
        draw(weight)
        weight.mul_(scale)

    return scaled


def _resnet(module: nn.Module, own: str) -> Draw | None:
    if isinstance(module, nn.Conv2d):
        return lambda w: mup.init.kaiming_normal_(w, mode="fan_out", nonlinearity="relu")
    if not isinstance(module, nn.Linear):
        return None
    if own == "weight":
        return lambda w: mup.init.kaiming_uniform_(w, a=math.sqrt(5))
    width = module.weight.infshape.width_mult()
    bound = math.sqrt(width / module.weight.shape[1])  # 1/√fan_in of the base, as mup's rescaling leaves it
    return lambda w: mup.init.uniform_(w, -bound, bound)


def _normal(family: str, module_name: str, own: str, module: nn.Module, base: PretrainedConfig) -> Draw | None:
    drawn = own in ("weight", "cls_token", "position_embeddings") and "norm" not in type(module).__name__.lower()
    if not drawn:
        return None
    std = t5_std(module_name, base) if family == "t5" else 0.02
    if family == "gpt2" and module_name.endswith("c_proj"):
        std /= math.sqrt(2 * base.n_layer)
    return lambda w: mup.init.normal_(w, std=std)


def t5_std(name: str, base: PretrainedConfig) -> float:
    """What T5 draws with at the base, from its paper's code (Mesh TensorFlow)."""
    width, inner, key = base.d_model, base.d_ff, base.d_kv
    match name.rpartition(".")[2]:
        case "shared" | "embed_tokens" | "lm_head":
            return 1.0
        case "q":
            return float((width * key) ** -0.5)
        case "k" | "v" | "wi" | "relative_attention_bias":
            return float(width**-0.5)
        case "o":
            return float((base.num_heads * key) ** -0.5)
        case "wo":
            return float(inner**-0.5)
    raise AssertionError(name)


def drawn_std(weight: torch.Tensor, draw: Draw) -> float:
    """The std that a draw has: it is a number times the draw of a unit distribution from the same seed."""
    seed = torch.default_generator.manual_seed  # of the CPU alone: torch.manual_seed notes for GPUs who called it
    with torch.no_grad():
        seed(1)
        draw(weight)
        found = weight.detach().double().flatten()
        factors = {}
        for unit in ("normal", "uniform"):
            seed(1)
            other = torch.empty_like(weight)
            (other.normal_() if unit == "normal" else other.uniform_(-(3**0.5), 3**0.5))
            other = other.double().flatten()
            factor = found.norm() / other.norm()
            if torch.allclose(found, factor * other, rtol=1e-4, atol=1e-6 * factor):
                factors[unit] = factor.item()
    assert len(factors) == 1, "neither normal nor uniform around 0"
    return next(iter(factors.values()))
