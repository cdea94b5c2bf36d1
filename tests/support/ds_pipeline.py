"""A small model of layers: whole in plain torch, and in stages under DeepSpeed's pipeline, with the same names."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mup_megatron.modules import module_base
from mup_megatron.recipe import Recipe, recipe

VOCABULARY = 24
LENGTH = 6
MICRO, MICRO_BATCHES = 2, 2
BLOCKS = 3
TIED = "tied_modules.table.weight"
HYPERPARAMETERS: dict[str, Any] = {
    "lr": 0.005,
    "init_method_std": 0.02,
    "embedding_multiplier": 2.0,
    "output_multiplier": 0.5,
    "weight_decay": 0.1,
    "adam_beta2": 0.95,
    "adam_eps": 1e-7,
    "clip_grad": 0.5,
}


class Table(nn.Embedding):
    """Token embeddings."""

    def __init__(self, width: int) -> None:
        super().__init__(VOCABULARY, 16 * width)


class Block(nn.Module):
    """Norm, hidden layer, residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16 * width)
        self.linear = nn.Linear(16 * width, 16 * width)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(self.norm(x)))


class Head(nn.Linear):
    """The readout, where it is a layer of its own."""

    def __init__(self, width: int) -> None:
        super().__init__(16 * width, VOCABULARY, bias=False)


def tied_head(embedding: nn.Embedding, x: Tensor) -> Tensor:
    """The readout, where it is the embedding."""
    return functional.linear(x, embedding.weight)


def loss_function(logits: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


class Whole(nn.Module):
    """All layers in one process, by the names that the pipeline gives them."""

    def __init__(self, width: int, *, tied: bool) -> None:
        super().__init__()
        if tied:
            self.tied_modules = nn.ModuleDict({"table": Table(width)})
        else:
            self.add_module("0", Table(width))
        for index in range(BLOCKS):
            self.add_module(str(1 + index), Block(width))
        self.tied = tied
        if not tied:
            self.add_module(str(1 + BLOCKS), Head(width))
        self.output_multiplier = 1.0
        """Of a tied readout: a plan's hooks reach layers, and it is none."""

    def forward(self, tokens: Tensor) -> Tensor:
        embedding: Any = self.tied_modules["table"] if self.tied else self.get_submodule("0")
        x = embedding(tokens)
        for index in range(BLOCKS):
            x = self.get_submodule(str(1 + index))(x)
        return tied_head(embedding, self.output_multiplier * x) if self.tied else self.get_submodule(str(1 + BLOCKS))(x)


def tied_target() -> nn.Module:
    return Whole(4, tied=True)


def untied_target() -> nn.Module:
    return Whole(4, tied=False)


def recipe_for(*, tied: bool, **per_parameter: float) -> Recipe:
    """Tuned at width 1; `per_parameter` are learning rates relative to the rule, by the beginning of a name."""
    content = {
        "base": module_base(lambda: Whole(1, tied=tied), lambda: Whole(2, tied=tied)).model_dump(mode="json"),
        "hyperparameters": HYPERPARAMETERS,
        "per_parameter": [{"match": f"{key.strip('_')}.*", "lr_mult": value} for key, value in per_parameter.items()],
    }
    return recipe(content, source="test")


def stage(split: int, *, tied: bool, width: int = 4) -> Any:
    """This rank's stage of a pipeline of two, whose first has `split` layers; layers start as the whole model's."""
    import deepspeed
    from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec

    deepspeed.init_distributed("gloo")

    class Split(PipelineModule):  # type: ignore[misc]
        def _partition_layers(self, method: str = "uniform") -> None:
            self.parts = [0, split, BLOCKS + 2]
            first = self._topo.get_coord(self.global_rank).pipe
            self._set_bounds(start=self.parts[first], stop=self.parts[first + 1])

    blocks = [LayerSpec(Block, width) for _ in range(BLOCKS)]
    ends = (
        (TiedLayerSpec("table", Table, width), TiedLayerSpec("table", Table, width, forward_fn=tied_head))
        if tied
        else (LayerSpec(Table, width), LayerSpec(Head, width))
    )
    built = Split([ends[0], *blocks, ends[1]], num_stages=2, loss_fn=loss_function)
    whole = drawn(width, tied=tied).state_dict()
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            parameter.copy_(whole[name])
    return built


def drawn(width: int, *, tied: bool) -> Whole:
    """The whole model, always with the same draw."""
    torch.manual_seed(5)
    return Whole(width, tied=tied)


def micro_batches(step: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(tokens, labels) of each micro-batch of a step."""
    for index in range(MICRO_BATCHES):
        generator = torch.Generator().manual_seed(100 * step + index)
        start = torch.randint(VOCABULARY, (MICRO, 1), generator=generator)
        tokens = (start + torch.arange(LENGTH + 1)) % VOCABULARY
        yield tokens[:, :-1], tokens[:, 1:]


def config(zero: int, **changes: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": MICRO,
        "gradient_accumulation_steps": MICRO_BATCHES,
        "train_batch_size": MICRO * MICRO_BATCHES,
        "zero_optimization": {"stage": zero},
        "optimizer": {"type": "AdamW", "params": {"torch_adam": True}},
        "steps_per_print": 10**9,
        **changes,
    }
