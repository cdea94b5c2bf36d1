"""Live Megatron models that are saved as `mup-megatron train` saves them, in any layout. For rank functions."""

import json
from pathlib import Path
from typing import Any

import torch
from support.exported import KINDS, models, recipe_of, tokens

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.recipe import Hyperparameters, Recipe
from mup_megatron.theory import Plan
from mup_megatron.training.options import TrainingOptions
from mup_megatron.validation import plain

LIVE = [name for name, kind in KINDS.items() if "apply_layernorm_1p" not in kind.keys]
"""Kinds of which Megatron has local layers: it has no such norm."""


def _options(**changes: Any) -> TrainingOptions:
    return TrainingOptions(**{"train_iters": 1, "global_batch_size": 8, "use_cpu_initialization": True, **changes})


def _texts(model: ModelFile, plan: Plan, recipe: Any) -> dict[str, str]:
    """What a run writes beside its weights."""
    identity = {"version": 1, "fingerprint": recipe.fingerprint, "model": plain(model)}
    return {
        "run.json": json.dumps(identity),
        "recipe.yaml": recipe.to_yaml(),
        "plan.json": json.dumps(plan.to_json()),
        "metrics.csv": "",
        "validation.csv": "",
    }


def save_live(folder: Path) -> dict[str, torch.Tensor]:
    """Builds, draws and saves a model of every kind, in `folder`/NUMBER; returns its live logits by kind."""
    return {name: save_one(folder / str(number), name) for number, name in enumerate(LIVE)}


def save_one(folder: Path, name: str) -> torch.Tensor:
    """Builds, draws and saves a model; returns its live logits."""
    from mup_megatron.megatron.names import named_parameters
    from mup_megatron.training import checkpoint, ranks
    from mup_megatron.training.build import build

    base, model = models(KINDS[name])
    recipe = recipe_of(base)
    plan = recipe.plan(model)
    with ranks.joined(tensor=1, pipeline=1, virtual_stages=None, seed=7):
        built = build(model, recipe, plan, _options(), initialize=True)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for own, parameter in named_parameters([chunk.module for chunk in built.chunks], tied=plan.tied):
                if plan[own].init_std is None:
                    parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
        for own, buffer in built.chunks[0].module.named_buffers():
            if own.endswith("expert_bias"):
                buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))
        checkpoint.save(folder, 1, built, _texts(model, plan, recipe))
        chunk = built.chunks[0].module.eval()
        given = tokens(model)
        positions = torch.arange(given.shape[1]).expand_as(given)
        with torch.no_grad():
            logits: torch.Tensor = chunk(given, positions, None)
    return logits[..., : model.vocab_size].clone()


def stock_logits(folder: Path, name: str) -> torch.Tensor:
    """Builds a model of a kind as Megatron does by itself, loads a folded checkpoint; returns its live logits."""
    from megatron.core import dist_checkpointing

    from mup_megatron.training import ranks
    from mup_megatron.training.build import build

    _, model = models(KINDS[name])
    # A recipe whose base is the target, and that says nothing, changes nothing.
    recipe = Recipe(base=model, hyperparameters=Hyperparameters(lr=0.003))
    with ranks.joined(tensor=1, pipeline=1, virtual_stages=None, seed=8):
        chunk = build(model, recipe, recipe.plan(model), _options(), initialize=True).chunks[0].module
        state = chunk.sharded_state_dict(metadata={"chained_optim_avoid_prefix": True})
        chunk.load_state_dict(dist_checkpointing.load({"model": state}, str(folder / "iter_0000001"))["model"])
        given = tokens(model)
        positions = torch.arange(given.shape[1]).expand_as(given)
        with torch.no_grad():
            logits: torch.Tensor = chunk.eval()(given, positions, None)
    return logits[..., : model.vocab_size].clone()


def save_again(folder: Path, name: str, to: Path, layout: dict[str, Any]) -> None:
    """Saves a model that `save_live` saved, in another layout, with the same weights."""
    from megatron.core import dist_checkpointing

    from mup_megatron.megatron import stored
    from mup_megatron.training import checkpoint, ranks
    from mup_megatron.training.build import build

    base, model = models(KINDS[name])
    recipe = recipe_of(base)
    plan = recipe.plan(model)
    with ranks.joined(
        tensor=layout.get("tensor_model_parallel_size", 1),
        pipeline=layout.get("pipeline_model_parallel_size", 1),
        virtual_stages=None,
        seed=7,
        experts=layout.get("expert_model_parallel_size", 1),
        tensor_of_experts=layout.get("expert_tensor_parallel_size"),
    ):
        built = build(model, recipe, plan, _options(**layout), initialize=False)
        found = checkpoint.find(folder, 1, extras=["run.json"])
        state = {"model0": built.chunks[0].module.sharded_state_dict(metadata={"chained_optim_avoid_prefix": True})}
        with stored.loading(found.folder, found.metadata, remedy=""):
            read = dist_checkpointing.load(state, str(found.folder))
        built.chunks[0].module.load_state_dict(read["model0"])
        checkpoint.save(to, 1, built, _texts(model, plan, recipe))
