"""The groups of the fork's optimizer: the plan's learning rate, weight decay and eps at every step, as ratios."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.fork_models import MODELS, GPTModel, GPTModelPipe, Layout, OptimizerParamScheduler, get_param_groups
from support.fork_runs import built
from support.processes import run_ranks
from support.shapes import gpt, recipe_for

from mup_megatron import megatron_deepspeed
from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.errors import InputError
from mup_megatron.megatron_deepspeed import groups
from mup_megatron.megatron_deepspeed.names import named_parameters
from mup_megatron.recipe import PerParameter, Recipe

LLAMA = {"swiglu": True, "normalization": "RMSNorm", "position_embedding_type": "rope", "add_bias_linear": False,
         "untie_embeddings_and_output_weights": True}  # fmt: skip
CASES = {
    "twice as wide": (gpt(1), gpt(2), {}),
    "four times, two layers more, untied": (
        gpt(1, untie_embeddings_and_output_weights=True),
        gpt(4, untie_embeddings_and_output_weights=True, num_layers=4),
        {},
    ),
    "as Llama, twice": (gpt(1, **LLAMA), gpt(2, **LLAMA), {}),
    "only the ffn twice as wide": (gpt(1), gpt(1, ffn_hidden_size=128), {}),
    "SGD": (gpt(1), gpt(2), {"optimizer": "sgd"}),
    "standard parametrization": (gpt(1), gpt(2), {"rule": "standard"}),
    "no weight decay": (gpt(1), gpt(2), {"weight_decay": 0.0}),
}


def recipe_of(base: ModelFile, changes: dict[str, Any]) -> Recipe:
    own = (PerParameter(match="*.linear_fc1.weight", lr_mult=1.5),)
    return recipe_for(base, **changes).model_copy(update={"per_parameter": own})


class FusedAdam(torch.optim.AdamW):
    """What the fork uses on a GPU: weight decay apart from the gradient, as in AdamW."""


@pytest.mark.parametrize(("base", "target", "changes"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_the_scheduler_gives_every_parameter_what_the_plan_says_at_every_step(
    kind: Any, base: ModelFile, target: ModelFile, changes: dict[str, Any], tensor_parallel: int, tmp_path: Path
) -> None:
    recipe = recipe_of(base, changes)
    model, args = built(kind, target, recipe, tmp_path, "--tensor-model-parallel-size", str(tensor_parallel),
                        layout=Layout(tensor_parallel=tensor_parallel))  # fmt: skip
    made = megatron_deepspeed.param_groups([model], get_param_groups([model]), FusedAdam)
    assert len({group["name"] for group in made}) == len(made)
    plan, h = recipe.plan(target), recipe.hyperparameters
    optimizer: torch.optim.Optimizer
    if args.optimizer == "adam":
        optimizer = FusedAdam(made, lr=args.lr, weight_decay=args.weight_decay, eps=args.adam_eps)
    else:
        optimizer = torch.optim.SGD(made, lr=args.lr, weight_decay=args.weight_decay)
    scheduler = OptimizerParamScheduler(
        optimizer, max_lr=args.lr, min_lr=args.min_lr, weight_decay=args.weight_decay, steps=20, warmup=5
    )
    for step in range(25):
        # How far the schedule has got, from the base's rate alone.
        base_lr = scheduler.get_lr()
        risen = base_lr / h.lr if step <= 5 else None
        group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        seen = []
        for _, name, parameter in named_parameters([model]):
            group, entry = group_of[id(parameter)], plan[name]
            seen.append(name)
            if risen is not None:
                expected = risen * entry.lr
            else:
                expected = entry.min_lr + (base_lr - h.min_lr) / (h.lr - h.min_lr) * (entry.lr - entry.min_lr)
            assert group["lr"] == pytest.approx(expected, rel=1e-12), (step, name)
            assert group["weight_decay"] == pytest.approx(entry.weight_decay, rel=1e-12), name
            assert group.get("eps") == entry.eps, name
        assert sorted(seen) == sorted(entry.name for entry in plan.entries)
        scheduler.step(1, 0)


def test_nothing_is_in_two_groups_or_in_none(tmp_path: Path) -> None:
    model, _ = built(GPTModel, gpt(2), recipe_of(gpt(1), {}), tmp_path)
    made = megatron_deepspeed.param_groups([model], get_param_groups([model]), FusedAdam)
    inside = [id(p) for group in made for p in group["params"]]
    assert sorted(inside) == sorted(id(p) for p in model.parameters())


def test_without_a_recipe_the_forks_own_groups_are_given_back() -> None:
    model = GPTModel(gpt(2))
    own = get_param_groups([model])
    assert megatron_deepspeed.param_groups([model], own, FusedAdam) is own


def stage_of(kind_name: str, untied: bool, num_layers: int, folder: str) -> list[tuple[str, int, dict[str, float]]]:
    """In a rank: its stage's groups: name, elements, what else they hold."""
    rank, stages = torch.distributed.get_rank(), torch.distributed.get_world_size()
    shape: dict[str, Any] = {"untie_embeddings_and_output_weights": untied, "num_layers": num_layers}
    kind = {made.__name__: made for made in MODELS}[kind_name]
    own = Path(folder) / str(rank)
    own.mkdir(parents=True)
    model, _ = built(
        kind, gpt(2, **shape), recipe_of(gpt(1, **shape), {}), own,
        "--deepspeed", "--pipeline-model-parallel-size", str(stages), stages=stages, stage=rank,
    )  # fmt: skip
    made = megatron_deepspeed.param_groups([model], get_param_groups([model]), FusedAdam)
    # DeepSpeed looks up the name of everything in a group when it saves.
    assert {id(p) for group in made for p in group["params"]} == {id(p) for p in model.parameters()}
    padding = [p for name, p in model.named_parameters() if name.startswith("mup_padding_")]
    assert all(p.numel() == 1 and p.item() == 0.0 for p in padding)
    keys = ("lr_mult", "wd_mult", "eps")
    return [(g["name"], sum(p.numel() for p in g["params"]), {key: g[key] for key in keys}) for g in made]


@pytest.mark.parametrize("untied", [False, True])
def test_all_stages_of_a_pipeline_have_the_same_groups_in_the_same_order(untied: bool, tmp_path: Path) -> None:
    first, middle, last = run_ranks(stage_of, 3, "GPTModelPipe", untied, 3, str(tmp_path))
    assert [(name, values) for name, _, values in first] == [(name, values) for name, _, values in middle]
    assert [(name, values) for name, _, values in first] == [(name, values) for name, _, values in last]
    sizes = {name: size for name, size, _ in middle}
    # The middle stage has layers alone: what would be empty there has one element.
    assert sizes["mup embedding.word_embeddings.weight"] == 1
    assert all(size >= 1 for size in sizes.values())


def test_groups_of_two_recipes_have_the_same_names_if_they_put_the_same_parameters_together() -> None:
    target = gpt(2)
    before, now = recipe_for(gpt(1)).plan(target), recipe_for(gpt(1), lr=0.1).plan(target)
    assert groups.tell_apart_the_same(before, now)
    assert list(groups.values(before)) == list(groups.values(now))
    assert not groups.tell_apart_the_same(before, recipe_of(gpt(1), {}).plan(target))


def test_zero_3_takes_nothing_from_the_groups(tmp_path: Path) -> None:
    model, _ = built(GPTModel, gpt(2), recipe_for(gpt(1)), tmp_path)
    for parameter in model.parameters():
        parameter.ds_shape = parameter.shape  # type: ignore[attr-defined]
        parameter.data = torch.empty(0)
    given = get_param_groups([model])
    assert [len(group["params"]) for group in given] == [0, len(list(model.parameters()))]  # all taken for vectors
    plan = recipe_for(gpt(1)).plan(gpt(2))
    group_of = {id(p): group for group in megatron_deepspeed.param_groups([model], given, FusedAdam)
                for p in group["params"]}  # fmt: skip
    for _, name, parameter in named_parameters([model]):
        assert (group_of[id(parameter)]["wd_mult"] == 0.0) == (plan[name].weight_decay == 0.0)


def test_a_frozen_parameter_is_refused(tmp_path: Path) -> None:
    model, _ = built(GPTModelPipe, gpt(2), recipe_for(gpt(1)), tmp_path)
    model.get_parameter("2.mlp.dense_h_to_4h.weight").requires_grad_(False)
    with pytest.raises(InputError, match=r"2\.mlp\.dense_h_to_4h\.weight: it is frozen"):
        megatron_deepspeed.param_groups([model], get_param_groups([model]), FusedAdam)


@pytest.mark.parametrize("change", [{"lr_mult": 10.0}, {"wd_mult": 0.0}], ids=["lr_mult", "wd_mult"])
def test_groups_of_the_scripts_own_are_refused(change: dict[str, float], tmp_path: Path) -> None:
    model, _ = built(GPTModel, gpt(2), recipe_for(gpt(1)), tmp_path)
    given = get_param_groups([model])
    head = given[0]["params"].pop()
    given.append({"name": "own", "params": [head], "wd_mult": 1.0, "lr_mult": 1.0} | change)
    with pytest.raises(InputError, match="the script gives it a learning rate or weight decay of its own"):
        megatron_deepspeed.param_groups([model], given, FusedAdam)


def test_adam_with_weight_decay_in_the_gradient_is_refused(tmp_path: Path) -> None:
    model, _ = built(GPTModel, gpt(2), recipe_for(gpt(1)), tmp_path)
    with pytest.raises(InputError, match="torch's Adam, whose weight decay is not the plan's"):
        megatron_deepspeed.param_groups([model], get_param_groups([model]), torch.optim.Adam)


@pytest.mark.parametrize("flag", ["--ds_fused_adam", "--cpu-optimizer"])
def test_adam_of_another_kind_may_be_asked_for(flag: str, tmp_path: Path) -> None:
    model, _ = built(GPTModel, gpt(2), recipe_for(gpt(1)), tmp_path, flag)
    assert megatron_deepspeed.param_groups([model], get_param_groups([model]), torch.optim.Adam)


def test_adam_without_weight_decay_is_adam(tmp_path: Path) -> None:
    model, _ = built(GPTModel, gpt(2), recipe_for(gpt(1), weight_decay=0.0), tmp_path)
    assert megatron_deepspeed.param_groups([model], get_param_groups([model]), torch.optim.Adam)
