# ruff: noqa: D101, D102, D103  # what these models and changes do is in their names
"""How a check of torch modules fares where reference and subject share the code: right models, and mistakes in them.

    python benchmarks/check_own_code.py [--parts right mistakes] [--seeds 1 2 3] [--only NAME ...]

Right models are of many kinds: transformers written out here with all sorts of norms, positions, attentions and
activations, a convolutional net, a multi-layer perceptron. Mistakes are such
as people make in their own code or script: powers of the width in a forward pass, what only evaluation does, draws that
are each other's, rates that go wrong late. One line each, as it comes.
"""

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import torch
from torch import Tensor, nn
from torch.nn import functional

from mup_megatron.check.measure import batches
from mup_megatron.check.measure.levels import Level
from mup_megatron.check.run_modules import check_modules
from mup_megatron.check.subjects.scripts import Task, prepare_by_plan, warm_up_and_decay
from mup_megatron.check.verdict.verdict import Verdict
from mup_megatron.modules import module_base
from mup_megatron.recipe import Recipe

VOCABULARY, LENGTH, BATCH, BASE = 64, 24, 8, 32
Fault = Callable[[float], float]
"""How many times wider than the base → a factor."""


@dataclass(frozen=True)
class Shape:
    """Of a transformer, and what is wrong in its code, by place."""

    layers: int = 2
    head: int = 16
    heads: int = 0
    """So many heads that grow; 0: their number grows."""
    norm: str = "layer"
    post: bool = False
    positions: str = "learned"
    attention: str = "fused"
    groups: int = 1
    activation: str = "gelu"
    gated: bool = False
    bias: bool = True
    tied: bool = False
    query_norm: bool = False
    cross: bool = True
    base: int = BASE
    std: float = 0.0
    """Of all matrices; 0: torch's own draw."""
    faults: Mapping[str, Fault] = field(default_factory=dict)
    evaluation: Mapping[str, float] = field(default_factory=dict)


class RMS(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


class Code(nn.Module):
    """What all parts have: factors at places."""

    def __init__(self, shape: Shape, width: int) -> None:
        super().__init__()
        self.shape, self.r = shape, width / shape.base

    def at(self, place: str) -> float:
        factor = self.shape.faults[place](self.r) if place in self.shape.faults else 1.0
        if not self.training:
            factor *= self.shape.evaluation.get(place, 1.0)
        return factor

    def normed(self, size: int) -> nn.Module:
        eps = 1e-5 * self.at("eps")
        kinds: dict[str, Callable[[], nn.Module]] = {
            "layer": lambda: nn.LayerNorm(size, eps=eps),
            "rms": lambda: nn.RMSNorm(size, eps=eps),
            "written": lambda: RMS(size, eps),
        }
        return kinds[self.shape.norm]()


class Attention(Code):
    def __init__(self, shape: Shape, width: int) -> None:
        super().__init__(shape, width)
        self.head_dim = width // shape.heads if shape.heads else shape.head
        self.n = width // self.head_dim
        self.scaling = self.head_dim**-0.5
        inner = self.head_dim * (self.n // shape.groups)
        self.q, self.o = nn.Linear(width, width, bias=shape.bias), nn.Linear(width, width, bias=shape.bias)
        self.k, self.v = nn.Linear(width, inner, bias=shape.bias), nn.Linear(width, inner, bias=shape.bias)
        if shape.query_norm:
            self.q_norm, self.k_norm = self.normed(self.head_dim), self.normed(self.head_dim)
        if "temperature" in shape.faults:
            self.temperature = nn.Parameter(torch.ones(()))
        if shape.positions == "rope":
            base = 10000.0 * self.at("rotary base")
            self.register_buffer(
                "turns", base ** (-torch.arange(0, self.head_dim, 2) / self.head_dim), persistent=False
            )

    def rotated(self, x: Tensor) -> Tensor:
        angle = torch.outer(torch.arange(x.shape[-2]) * self.at("position"), self.turns)
        one, other = x.chunk(2, dim=-1)
        return torch.cat([one * angle.cos() - other * angle.sin(), other * angle.cos() + one * angle.sin()], dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for f in (self.q, self.k, self.v))
        if self.shape.query_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q = q * self.at("query")
        if self.shape.positions == "rope":
            q, k = self.rotated(q), self.rotated(k)
        v = v * self.at("value")
        k, v = (t.repeat_interleave(self.shape.groups, dim=1) for t in (k, v))
        scale = self.scaling * self.at("attention scale")
        if "temperature" in self.shape.faults:
            scale = scale * self.temperature * self.at("temperature")
        if self.shape.attention == "fused" and self.shape.positions != "alibi":
            mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=float(scale))
        else:
            mask = torch.full((x.shape[1], x.shape[1]), -math.inf).triu(1)
            if self.shape.positions == "alibi":
                slopes = 2.0 ** (-8 * torch.arange(1, self.n + 1) / self.n) * self.at("alibi")
                mask = (
                    mask - slopes[:, None, None] * (torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])).abs()
                )
            if self.shape.attention == "einsum":
                logits = torch.einsum("bhqd,bhkd->bhqk", q, k) * scale
            else:
                logits = (q @ k.transpose(-2, -1)) * scale
            if "cap" in self.shape.faults:
                logits = 5 * self.at("cap") * torch.tanh(logits / (5 * self.at("cap")))
            mixed = (logits + mask).softmax(-1) @ v
        mixed = mixed.transpose(1, 2).flatten(2) * self.at("mixed")
        result: Tensor = self.o(mixed)
        return result


class MLP(Code):
    def __init__(self, shape: Shape, width: int) -> None:
        super().__init__(shape, width)
        self.up, self.down = nn.Linear(width, 3 * width, bias=shape.bias), nn.Linear(3 * width, width, bias=shape.bias)
        self.gate = nn.Linear(width, 3 * width, bias=shape.bias) if shape.gated else None

    def forward(self, x: Tensor) -> Tensor:
        act: Callable[[Tensor], Tensor] = getattr(functional, self.shape.activation, None) or getattr(
            torch, self.shape.activation
        )
        inner = act((self.gate or self.up)(x) * self.at("before activation")) * self.at("activation")
        if self.gate is not None:
            inner = inner * self.up(x)
        result: Tensor = self.down(inner)
        return result


class Block(Code):
    def __init__(self, shape: Shape, width: int) -> None:
        super().__init__(shape, width)
        self.one, self.other = self.normed(width), self.normed(width)
        self.attention, self.mlp = Attention(shape, width), MLP(shape, width)

    def forward(self, x: Tensor) -> Tensor:
        if self.shape.post:
            x = self.one(x * self.at("skip") + self.at("branch") * self.at("attention branch") * self.attention(x))
            return self.other(x + self.at("branch") * self.at("mlp branch") * self.mlp(x)) * self.at("norm")
        seen = self.one(x) * self.at("norm")
        x = x * self.at("skip") + self.at("branch") * self.at("attention branch") * self.attention(seen)
        return x + self.at("branch") * self.at("mlp branch") * self.mlp(self.other(x))


class Transformer(Code):
    """Predicts the next token."""

    def __init__(self, shape: Shape, width: int) -> None:
        super().__init__(shape, width)
        self.tokens = nn.Embedding(VOCABULARY, width)
        if shape.positions == "learned":
            self.positions = nn.Embedding(LENGTH, width)
        if shape.positions == "sinusoidal":
            turns = (10000.0 * self.at("sinusoidal base")) ** (-torch.arange(0, width, 2) / width)
            angle = torch.outer(torch.arange(LENGTH).float(), turns)
            self.register_buffer("table", torch.cat([angle.sin(), angle.cos()], dim=-1), persistent=False)
        self.embedding_norm = self.normed(width) if shape.post else None
        self.blocks = nn.ModuleList(Block(shape, width) for _ in range(shape.layers))
        self.final = self.normed(width)
        self.readout = nn.Linear(width, VOCABULARY, bias=False)
        if shape.tied:
            self.readout.weight = self.tokens.weight
        if shape.std:
            for parameter in self.parameters():
                if parameter.dim() > 1:
                    nn.init.normal_(parameter, std=shape.std)
        if "gain" in shape.faults:
            for name, parameter in self.named_parameters():
                if name.endswith("one.weight"):
                    nn.init.constant_(parameter, self.at("gain"))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) * self.at("tokens")
        if self.shape.positions == "learned":
            x = x + self.positions.weight[: ids.shape[1]] * self.at("positions")
        if self.shape.positions == "sinusoidal":
            x = x + self.table[: ids.shape[1]] * self.at("positions")
        x = x * self.at("embedding")
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        for block in self.blocks:
            x = block(x)
        x = self.final(x) * self.at("final")
        result: Tensor = self.readout(x) * self.at("logits")
        return result * (1.0 if torch.is_grad_enabled() else self.shape.evaluation.get("no_grad", 1.0))


class Convolutional(Code):
    """Classifies pictures; with batch norms."""

    def __init__(self, shape: Shape, width: int) -> None:
        super().__init__(shape, width)
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.stages = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(shape.layers))
        norm: Any = nn.BatchNorm2d if shape.norm != "group" else lambda n: nn.GroupNorm(4, n)
        self.norms = nn.ModuleList(norm(width) for _ in range(shape.layers))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x) * self.at("embedding")
        for stage, norm in zip(self.stages, self.norms, strict=True):
            x = x + self.at("branch") * stage(norm(x).relu())
        result: Tensor = self.head(x.mean((2, 3))) * self.at("logits")
        return result


class Perceptron(Code):
    def __init__(self, shape: Shape, width: int) -> None:
        super().__init__(shape, width)
        self.first, self.second = nn.Linear(12, width), nn.Linear(width, width)
        self.third, self.last = nn.Linear(width, width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        act: Any = getattr(functional, self.shape.activation)
        x = act(self.first(x) * self.at("embedding"))
        x = act(self.second(x) * self.at("before activation"))
        x = act(self.third(x))
        result: Tensor = self.last(x) * self.at("logits")
        return result


def text_batch(step: int, _width: int) -> Tensor:
    return batches.tokens(VOCABULARY, LENGTH, BATCH, seed=0, step=step)


def text_loss(model: Any, tokens: Tensor) -> Tensor:
    return functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def picture_batch(step: int, _width: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step + 1)
    labels = torch.randint(4, (32,), generator=generator)
    return 0.5 * torch.randn(32, 1, 8, 8, generator=generator) + labels.view(-1, 1, 1, 1) / 2, labels


def class_loss(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1])


def vector_batch(step: int, _width: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step + 1)
    x = torch.randn(32, 12, generator=generator)
    return x, torch.stack([x[:, 0], x[:, 1] * x[:, 2], x[:, 3].abs()], dim=1)


def square_loss(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    return functional.mse_loss(model(batch[0]), batch[1])


OF_KIND: dict[str, tuple[Any, Any, Any]] = {
    "transformer": (Transformer, text_batch, text_loss),
    "convolutional": (Convolutional, picture_batch, class_loss),
    "perceptron": (Perceptron, vector_batch, square_loss),
}


@dataclass(frozen=True)
class Case:
    """A model, and how it is checked."""

    shape: Shape = Shape()
    kind: str = "transformer"
    values: Mapping[str, Any] = field(default_factory=dict)
    widths: tuple[int, ...] = (32, 64, 128)
    prepare: Any = prepare_by_plan
    factory: Any = None
    """(shape, width) → model, in place of the kind's own."""
    loss: Any = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def verdict(self, level: str, seed: int) -> Verdict:
        made, batch, loss = OF_KIND[self.kind]
        make = self.factory or made
        values = {"lr": 0.004, "adam_beta2": 0.95, **self.values}
        optimizer = values.pop("optimizer", "adam")
        b = self.shape.base
        recipe = Recipe.model_validate(
            {
                "base": module_base(lambda: make(self.shape, b), lambda: make(self.shape, 2 * b)),
                "hyperparameters": values,
                "parametrization": {"optimizer": optimizer},
            }
        )
        return check_modules(
            lambda width: make(self.shape, width),
            recipe,
            widths=self.widths,
            batch=batch,
            loss=self.loss or loss,
            prepare=self.prepare,
            readout="tokens.weight" if self.shape.tied else None,
            level=Level(level),
            first_seed=seed,
            **self.options,
        )


T = Shape
RIGHT: dict[str, Case] = {
    "plain": Case(),
    "rms, rope": Case(T(norm="rms", positions="rope", bias=False)),
    "llama": Case(T(norm="rms", positions="rope", bias=False, gated=True, activation="silu", groups=2)),
    "llama, written out": Case(
        T(norm="written", positions="rope", bias=False, gated=True, activation="silu", attention="written")
    ),
    "tied": Case(T(tied=True)),
    "tied, rope": Case(T(tied=True, positions="rope", norm="rms")),
    "post-norm": Case(T(post=True)),
    "post-norm, tied": Case(T(post=True, tied=True)),
    "post-norm, sinusoidal": Case(T(post=True, positions="sinusoidal")),
    "sinusoidal": Case(T(positions="sinusoidal")),
    "alibi": Case(T(positions="alibi")),
    "no positions": Case(T(positions="none", attention="einsum")),
    "query norm": Case(T(query_norm=True, positions="rope")),
    "query norm, heads grow": Case(T(query_norm=True, heads=2)),
    "heads grow": Case(T(heads=2)),
    "heads grow, rope": Case(T(heads=2, positions="rope", attention="written")),
    "relu": Case(T(activation="relu")),
    "tanh": Case(T(activation="tanh")),
    "deep": Case(T(layers=4)),
    "one layer": Case(T(layers=1)),
    "small std": Case(T(std=0.02), values={"lr": 0.004}),
    "std 0.05, tied": Case(T(std=0.05, tied=True)),
    "large std": Case(T(std=0.1, norm="rms", positions="rope")),
    "wide heads": Case(T(head=32), widths=(64, 128, 256)),
    "base 64": Case(T(base=64), widths=(64, 128, 256)),
    "soft cap": Case(T(attention="written", faults={"cap": lambda _: 1.0})),
    "norm by hand": Case(T(norm="written")),
    "base 48": Case(T(base=48), widths=(48, 96, 192)),
    "embedding multiplier": Case(values={"embedding_multiplier": 10.0}),
    "embedding multiplier, tied": Case(T(tied=True, std=0.05), values={"embedding_multiplier": 0.3}),
    "output multiplier": Case(values={"output_multiplier": 3.7}),
    "output multiplier, tied": Case(T(tied=True), values={"output_multiplier": 0.3}),
    "attention multiplier": Case(T(heads=2), values={"attention_multiplier": 4.0}),
    "lr 0.02": Case(values={"lr": 0.02}),
    "lr 0.001": Case(values={"lr": 0.001}),
    "no clipping": Case(values={"clip_grad": 0.0}),
    "low clipping": Case(values={"clip_grad": 0.05}),
    "weight decay": Case(values={"weight_decay": 0.3}),
    "sgd": Case(kind="perceptron", values={"optimizer": "sgd", "lr": 0.02, "weight_decay": 0.0}),
    "convolutional": Case(kind="convolutional"),
    "convolutional, group norm": Case(T(norm="group"), kind="convolutional"),
    "perceptron, relu": Case(T(activation="relu"), kind="perceptron"),
    "perceptron, tanh": Case(T(activation="tanh"), kind="perceptron"),
    "wide range": Case(widths=(32, 128, 512)),
    "odd widths": Case(widths=(48, 80, 160, 336)),
}


def power(exponent: float) -> Fault:
    return lambda r: r**exponent


def wrong(places: Mapping[str, Fault], **changes: Any) -> Case:
    return Case(T(faults=places, **changes))


# ---- scripts and factories that are wrong ---------------------------------------------------------------------------


def one_draw(shape: Shape, width: int) -> nn.Module:
    """All blocks from one generator, seeded again for each."""
    model = Transformer(shape, width)
    seed = torch.randint(10**6, ()).item()
    for block in model.blocks:
        generator = torch.Generator().manual_seed(int(seed))
        for parameter in block.parameters():
            if parameter.dim() > 1:
                bound = 3**0.5 / (3 * parameter.shape[1]) ** 0.5
                parameter.data.uniform_(-bound, bound, generator=generator)
    return model


def copied(shape: Shape, width: int) -> nn.Module:
    """The second block's MLP starts as the first one's."""
    model = Transformer(shape, width)
    model.blocks[1].mlp.load_state_dict(model.blocks[0].mlp.state_dict())
    return model


def after_plan(change: Callable[[nn.Module], None]) -> Any:
    def prepare(model: nn.Module, task: Task) -> Any:
        optimizer = prepare_by_plan(model, task)
        with torch.no_grad():
            change(model)
        return optimizer

    return prepare


def _shifted(model: nn.Module) -> None:
    weight = model.get_parameter("blocks.1.mlp.up.weight")
    weight.mul_((1 - 0.3**2) ** 0.5).add_(0.3 * weight.std())


def _other_shape(model: nn.Module) -> None:
    weight = model.get_parameter("blocks.0.mlp.down.weight")
    std = weight.std()
    weight.copy_(torch.distributions.Laplace(0.0, 1.0).sample(weight.shape) * std / 2**0.5)


def _ten_percent(model: nn.Module) -> None:
    model.get_parameter("blocks.1.attention.o.weight").mul_(1.1)


def late(change: Callable[[dict[str, Any], float], None], after: int = 10) -> Any:
    """A scheduler that is right for some steps."""

    def prepare(model: nn.Module, task: Task) -> Any:
        optimizer = prepare_by_plan(model, task)
        assert optimizer is not None
        rates = [group["lr"] for group in optimizer.param_groups]

        class Schedule:
            steps = 0

            def step(self) -> None:
                self.steps += 1
                self.set()

            def set(self) -> None:
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * warm_up_and_decay(self.steps, task.steps)
                    if self.steps >= after:
                        change(group, task.plan.lr * warm_up_and_decay(self.steps, task.steps))

        schedule = Schedule()
        schedule.set()
        return optimizer, schedule

    return prepare


def _collapsed(group: dict[str, Any], lr: float) -> None:
    group["lr"] = lr


def _no_decay(group: dict[str, Any], _lr: float) -> None:
    group["weight_decay"] = 0.0


def summed_loss(model: Any, tokens: Tensor) -> Tensor:
    return sum((text_loss(model, part) for part in tokens.chunk(4)), torch.zeros(()))


def mean_loss(model: Any, tokens: Tensor) -> Tensor:
    return summed_loss(model, tokens) / 4


def hooked(factor: float) -> Any:
    """Gradients so many times as large."""

    def prepare(model: nn.Module, task: Task) -> Any:
        for parameter in model.parameters():
            parameter.register_hook(lambda gradient: gradient * factor)
        return prepare_by_plan(model, task)

    return prepare


RIGHT |= {
    "micro-batches averaged": Case(loss=mean_loss),
    "micro-batches averaged, no clipping": Case(loss=mean_loss, values={"clip_grad": 0.0}),
}
ROPE: dict[str, Any] = {"positions": "rope", "norm": "rms"}
MISTAKES: dict[str, Case] = {
    "√r on embeddings": wrong({"embedding": power(0.5)}),
    "√h on embeddings": wrong({"embedding": lambda r: (32 * r) ** 0.5}, **ROPE),
    "1/√r on embeddings": wrong({"embedding": power(-0.5)}),
    "√r on tokens, not on positions, post-norm": wrong({"tokens": power(0.5)}, post=True),
    "√r on tokens, not on sinusoids": wrong({"tokens": power(0.5)}, positions="sinusoidal"),
    "√r on learned positions": wrong({"positions": power(0.5)}),
    "1/r on learned positions": wrong({"positions": power(-1)}),
    "logits / r": wrong({"logits": power(-1)}),
    "logits / r, tied": wrong({"logits": power(-1)}, tied=True),
    "logits / √r": wrong({"logits": power(-0.5)}),
    "logits / √h": wrong({"logits": lambda r: (32 * r) ** -0.5}),
    "logits · r": wrong({"logits": power(1)}),
    "final norm / r": wrong({"final": power(-1)}),
    "branches / √r": wrong({"branch": power(-0.5)}),
    "branches · √r": wrong({"branch": power(0.5)}),
    "branches / r": wrong({"branch": power(-1)}, **ROPE),
    "branches · r^¼": wrong({"branch": power(0.25)}),
    "attention branch / √r": wrong({"attention branch": power(-0.5)}),
    "mlp branch · √r": wrong({"mlp branch": power(0.5)}),
    "mlp branch / √r, post-norm": wrong({"mlp branch": power(-0.5)}, post=True),
    "skip / √r": wrong({"skip": power(-0.5)}),
    "attention scale 1/√h": wrong({"attention scale": power(-0.5)}),
    "attention scale · √r": wrong({"attention scale": power(0.5)}),
    "attention scale 1/√d, heads grow, written": Case(
        T(heads=2, attention="written", faults={"attention scale": power(0.5)})
    ),
    "attention 1/d², heads grow": Case(T(heads=2, faults={"attention scale": power(-1)})),
    "query · √r": wrong({"query": power(0.5)}, **ROPE),
    "value · √r": wrong({"value": power(0.5)}),
    "mixed / √r": wrong({"mixed": power(-0.5)}),
    "norm output · √r": wrong({"norm": power(0.5)}),
    "norm output / √r, post": wrong({"norm": power(-0.5)}, post=True),
    "before activation · √r": wrong({"before activation": power(0.5)}),
    "before tanh / √r": wrong({"before activation": power(-0.5)}, activation="tanh"),
    "activation · √r": wrong({"activation": power(0.5)}),
    "activation / √r, gated": wrong({"activation": power(-0.5)}, gated=True, activation="silu"),
    "rotary base ∝ r": wrong({"rotary base": power(1)}, **ROPE),
    "rotary base ∝ √r": wrong({"rotary base": power(0.5)}, **ROPE),
    "rotary position / r": wrong({"position": power(-1)}, **ROPE),
    "rotary position / √r, written": wrong({"position": power(-0.5)}, attention="written", **ROPE),
    "rotary position · √r, einsum": wrong({"position": power(0.5)}, attention="einsum", **ROPE),
    "sinusoidal base ∝ r": wrong({"sinusoidal base": power(1)}, positions="sinusoidal"),
    "sinusoidal table · √r": wrong({"positions": power(0.5)}, positions="sinusoidal"),
    "temperature √r": wrong({"temperature": power(0.5)}, attention="written"),
    "cap ∝ r": wrong({"cap": power(1)}, attention="written"),
    "eps ∝ r": wrong({"eps": power(1)}),
    "eps ∝ r², rms": wrong({"eps": power(2)}, norm="rms"),
    "eps ∝ r, written": wrong({"eps": power(1)}, norm="written"),
    "eval: head factor twice": Case(T(evaluation={"logits": 0.25})),
    "eval: softmax scale": Case(T(evaluation={"attention scale": 2.0})),
    "eval: embedding factor": Case(T(evaluation={"embedding": 0.5})),
    "eval: branch / 2": Case(T(evaluation={"branch": 0.5})),
    "no_grad: logits": Case(T(evaluation={"no_grad": 0.5})),
    "convolutional, √r on stem": Case(T(faults={"embedding": power(0.5)}), kind="convolutional"),
    "convolutional, branch / √r": Case(T(faults={"branch": power(-0.5)}), kind="convolutional"),
    "perceptron, √r inside": Case(T(faults={"before activation": power(0.5)}, activation="relu"), kind="perceptron"),
    "perceptron, logits / r": Case(T(faults={"logits": power(-1)}, activation="relu"), kind="perceptron"),
    "one draw for all layers": Case(factory=one_draw),
    "one MLP copied": Case(factory=copied),
    "draw with a mean": Case(prepare=after_plan(_shifted)),
    "draw of another shape": Case(prepare=after_plan(_other_shape)),
    "10 % on one tensor": Case(prepare=after_plan(_ten_percent)),
    "rates collapse after 10": Case(prepare=late(_collapsed)),
    "rates collapse after 30": Case(prepare=late(_collapsed, 30)),
    "no weight decay after 12": Case(prepare=late(_no_decay, 12), values={"weight_decay": 0.1}),
    "micro-batches summed": Case(loss=summed_loss),
    "micro-batches summed, no clipping": Case(loss=summed_loss, values={"clip_grad": 0.0}),
    "gradients × 4": Case(prepare=hooked(4.0)),
    "gradients × 4, no clipping": Case(prepare=hooked(4.0), values={"clip_grad": 0.0}),
    "gradients × 4, low clipping": Case(prepare=hooked(4.0), values={"clip_grad": 0.05}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=("right", "mistakes"), default=("right", "mistakes"))
    parser.add_argument("--level", default="quick")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--only", nargs="+", default=[])
    parser.add_argument("--slopes", action="store_true", help="the furthest slopes of each")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for part in arguments.parts:
        cases = RIGHT if part == "right" else MISTAKES
        as_hoped = count = 0
        for seed in arguments.seeds:
            for name, case in cases.items():
                if arguments.only and not any(word in name for word in arguments.only):
                    continue
                begun = time.process_time()
                try:
                    verdict = case.verdict(arguments.level, seed)
                except Exception as error:  # whatever a model's code raises is told, and the others go on
                    print(f"{part:8} {name:45} {seed:5} {type(error).__name__}: {error}", flush=True)
                    count += 1
                    continue
                first = next((f.sentence for s in verdict.sections for f in s.findings), "")
                if not first and not verdict.passed:
                    first = " ".join(verdict.sections[0].lines)
                cause = verdict.causes[0].name if verdict.causes else ""
                spent = time.process_time() - begun
                print(f"{part:8} {name:45} {seed:5} {verdict.outcome:10} {spent:3.0f} s {cause:20} {first}", flush=True)
                if arguments.slopes:
                    print(_furthest(verdict), flush=True)
                count += 1
                as_hoped += (verdict.outcome.value == "fail") == (part == "mistakes")
        print(f"{part}: {as_hoped} of {count}")


def _furthest(verdict: Verdict) -> str:
    from mup_megatron.check.measure.measurements import Quantity
    from mup_megatron.check.verdict.comparison import own_slopes

    lines = []
    for quantity, step in (
        (Quantity.ACTIVATION, 0),
        (Quantity.INSIDE, 0),
        (Quantity.UPDATE, 8),
        (Quantity.POSITION, 0),
    ):
        slopes = own_slopes(verdict.subject, quantity, step, logarithms=quantity is not Quantity.POSITION).values()
        for c in sorted(slopes, key=lambda c: -abs(c.subject.value))[:4]:
            lines.append(f"    {quantity} {c.key.name} {c.subject}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
