"""DeepSpeed's Muon in live engines: which parameters it steps, at which rates, under which of ZeRO's stages."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.ds_models import HYPERPARAMETERS, VOCABULARY, ds_config, recipe_for, train_engine, write
from support.ds_ranks import run_ranks
from support.orthogonal import orthogonal

from mup_megatron.deepspeed.config import EngineSettings, problems
from mup_megatron.deepspeed.config import configuration as made
from mup_megatron.errors import InputError
from mup_megatron.huggingface import base_content, plan_for
from mup_megatron.recipe import Recipe, recipe

TUNED: dict[str, Any] = {
    "lr": 0.02,
    "muon_momentum": 0.9,
    "muon_nesterov": True,
    "muon_scale_mode": "shape_scaling",
    "muon_coefficient_type": "simple",
    "clip_grad": 0.0,
}
MUON = {"optimizer": {"type": "Muon", "params": {}}}


def config(width: int) -> transformers.GPT2Config:
    """With an ffn that is as large at every width, so that rates differ."""
    sizes = {"n_embd": 32 * width, "n_head": 2 * width, "n_layer": 2, "n_inner": 64, "n_positions": 16}
    quiet = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
    return transformers.GPT2Config(**sizes, **quiet, vocab_size=VOCABULARY, architectures=["GPT2LMHeadModel"])


def build(width: int) -> transformers.PreTrainedModel:
    torch.manual_seed(11)
    return transformers.GPT2LMHeadModel(config(width))


def own_recipe(**changes: Any) -> Recipe:
    content = {
        "base": base_content(config(1)),
        "hyperparameters": {**HYPERPARAMETERS, **TUNED, **changes},
        "parametrization": {"optimizer": "muon"},
    }
    return recipe(content, source="test")


def started(path: str, stage: int) -> Any:
    """In a rank: an engine on a model of twice the base's width."""
    import torch._dynamo

    # DeepSpeed compiles Muon for every shape, which takes longer than all of this.
    torch._dynamo.config.disable = True
    import deepspeed

    import mup_megatron.deepspeed  # noqa: F401

    size = torch.distributed.get_world_size()
    zero = {"stage": stage, **({"reduce_scatter": False} if stage == 3 else {})}
    content = {**ds_config(world_size=size, mup={"recipe": path}), **MUON, "zero_optimization": zero}
    return deepspeed.initialize(model=build(2), config=content)[0]


def one_step(engine: Any) -> dict[str, float]:
    """How far a first step is from the plan's, relative to it, of each matrix that Muon steps: of a gradient that is
    the same on all ranks and has no direction that is as good as 0.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    from mup_megatron.deepspeed import plan_of

    plan = plan_of(engine)
    assert plan is not None
    named = list(engine.module.named_parameters())

    def whole(parameter: torch.nn.Parameter) -> torch.Tensor:
        held = safe_get_full_fp32_param(parameter) if engine.zero_optimization_stage() else parameter
        return held.detach().double().clone()

    before = {name: whole(p) for name, p in named}
    drawn = {n: torch.randn(b.shape, generator=torch.Generator().manual_seed(len(n))) for n, b in before.items()}
    loss = sum((p * drawn[name]).sum() for name, p in named)
    engine.backward(loss)
    engine.step()
    found = {}
    for name, p in named:
        entry = plan[name]
        if entry.optimizer == "muon":
            rows, columns = entry.shape
            step = orthogonal(drawn[name]) * math.sqrt(max(1, rows / columns))
            wanted = -entry.lr * (step + entry.weight_decay * before[name])
            moved = whole(p) - before[name]
            found[name] = float((moved - wanted).norm() / wanted.norm())
    return found


def trained(path: str, stages: tuple[int, ...]) -> dict[Any, Any]:
    """In a rank: losses under each stage, what a step is off, and who steps what."""
    found: dict[Any, Any] = {}
    for stage in stages:
        engine = started(path, stage)
        found[stage] = train_engine(engine, "gpt2", range(4))
        engine.destroy()
        if stage < 3:
            engine = started(path, stage)
            found["step", stage] = one_step(engine)
            engine.destroy()
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    (found,) = run_ranks(trained, 1, write(own_recipe(), tmp_path_factory.mktemp("alone")), (0,))
    return found


def test_a_step_is_the_plans_rate_times_the_orthogonalised_gradient(alone: dict[Any, Any]) -> None:
    off = alone["step", 0]
    # GPT-2's tables have no "embed" in their names, by which DeepSpeed tells what is none of Muon's.
    assert set(off) == {
        f"transformer.h.{i}.{part}.weight"
        for i in range(2)
        for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    assert max(off.values()) < 1e-3, off


def test_two_ranks_train_as_one_under_each_stage(alone: dict[Any, Any], tmp_path: Path) -> None:
    for found in run_ranks(trained, 2, write(own_recipe(), tmp_path), (0, 1, 2, 3)):
        for stage in range(4):
            assert found[stage] == pytest.approx(alone[0], abs=1e-4), stage
        assert max(off for stage in range(3) for off in found["step", stage].values()) < 1e-3


def changed(path: str) -> list[str]:
    """In a rank: what the guard says of groups that somebody changed."""
    said = []
    for key, value in (("momentum", 0.5), ("betas", (0.1, 0.2)), ("weight_decay", 0.7), ("lr", 1.0)):
        engine = started(path, 1)
        group = next(group for group in engine.optimizer.param_groups if key in group)
        group[key] = value
        try:
            train_engine(engine, "gpt2", range(1))
            said.append("")
        except InputError as error:
            said.append(str(error))
        engine.destroy()
    return said


def test_the_guard_looks_at_both(tmp_path: Path) -> None:
    (said,) = run_ranks(changed, 1, write(own_recipe(), tmp_path))
    words = ("momentum of the group", "betas of the group", "weight_decay of the group", "learning rate of this group")
    assert all(key in each for key, each in zip(words, said, strict=True)), said


def gone_on(path: str, folder: str, stage: int) -> tuple[list[float], list[float]]:
    """In a rank: losses of a run, and of one that goes on from its middle."""
    engine = started(path, stage)
    train_engine(engine, "gpt2", range(3))
    engine.save_checkpoint(folder)
    whole = train_engine(engine, "gpt2", range(3, 6))
    engine.destroy()
    engine = started(path, stage)
    engine.load_checkpoint(folder)
    return whole, train_engine(engine, "gpt2", range(3, 6))


@pytest.mark.parametrize("stage", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_run_goes_on_with_its_momenta(stage: int, tmp_path: Path) -> None:
    ((whole, again),) = run_ranks(gone_on, 1, write(own_recipe(), tmp_path), str(tmp_path / "ck"), stage)
    assert again == pytest.approx(whole, abs=1e-6)


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_a_configuration_names_it(tmp_path: Path) -> None:
    own = own_recipe()
    path = write(own, tmp_path)
    content = made(own, path=path, settings=EngineSettings(global_batch_size=4))
    assert content["optimizer"] == {
        "type": "Muon",
        "params": {"lr": 0.02, "momentum": 0.9, "betas": [0.9, 0.95], "eps": 1e-7, "weight_decay": 0.1},
    }
    plan = plan_for(build(2), own)
    assert problems(content, own, plan, source="ds.json") == []
    sharded = made(own, path=path, settings=EngineSettings(global_batch_size=4, zero_stage=3))
    assert sharded["zero_optimization"] == {"stage": 3, "reduce_scatter": False}
    assert problems(sharded, own, plan, source="ds.json") == []


@pytest.mark.parametrize(
    ("changes", "config", "said"),
    [
        ({"clip_grad": 1.0}, {}, r'"zero_optimization.stage" 1: under ZeRO .* Tune with clip_grad 0, or write stage 0'),
        ({"clip_grad": 1.0}, {"zero_optimization": {"stage": "2"}}, r'"zero_optimization.stage" 2: under ZeRO'),
        (
            {},
            {"zero_optimization": {"stage": 1, "cpu_offload": True}},
            r'"zero_optimization.offload_optimizer": not te',
        ),
        ({}, {"fp16": {"enabled": True}}, r'"fp16": not tested together with Muon\. Remove it, or use bf16'),
        (
            {},
            {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}},
            r'"zero_optimization.offload_optimizer": not tested together with Muon',
        ),
        (
            {},
            {"zero_optimization": {"stage": 3}},
            'DeepSpeed has Muon under stage 3 without it. Write "reduce_scatter": fa',
        ),
        ({"muon_scale_mode": "spectral"}, {}, "muon_scale_mode: the recipe's is spectral, and DeepSpeed's Muon has sh"),
        ({"muon_nesterov": False}, {}, "muon_nesterov: the recipe's is False, and DeepSpeed's Muon has True"),
        ({"muon_num_ns_steps": 6}, {}, "muon_num_ns_steps: the recipe's is 6"),
        ({}, {"optimizer": {"type": "Muon", "params": {"momentum": 0.5}}}, r'"optimizer.params.momentum" is 0.5'),
        (
            {},
            {"optimizer": {"type": "Muon", "params": {"adam_lr": 0.5}}},
            r'"optimizer.params.adam_lr": the recipe has',
        ),
        ({}, {"optimizer": {"type": "Muon", "params": {"per_head_muon": True}}}, "for whole matrices. Remove it"),
        (
            {},
            {"optimizer": {"type": "Muon", "params": {"muon_lr": 0}}},
            r'"optimizer.params.muon_lr": the recipe has one',
        ),
        (
            {},
            {"optimizer": {"type": "Muon", "params": {"nesterov": True}}},
            r'"optimizer.params.nesterov": .*Nesterov\'s always. Remove it',
        ),
        (
            {},
            {"optimizer": {"type": "Muon", "params": {"nesterov": False}}},
            r'"optimizer.params.nesterov": DeepSpeed does not read it',
        ),
        (
            {},
            {"optimizer": {"type": "Muon", "params": {"ns_steps": 7}}},
            r'"optimizer.params.ns_steps": .* 5 iterations always',
        ),
        (
            {},
            {"optimizer": {"type": "Muon", "params": {"adam_w_mode": False}}},
            r'"optimizer.params.adam_w_mode": .* weight decay to the gradient',
        ),
        ({}, {"optimizer": {"type": "AdamW"}}, 'Write "type": "Muon"'),
    ],
)
def test_what_cannot_be_right_is_refused(changes: Any, config: Any, said: str, tmp_path: Path) -> None:
    own = own_recipe(**changes)
    content = {**ds_config(1, mup={"recipe": write(own, tmp_path)}), **MUON, **config}
    found = problems(content, own, plan_for(build(2), own), source="ds.json")
    assert len(found) == 1
    with pytest.raises(InputError, match=said):
        raise InputError(found[0])
    assert len(found[0]) <= 300


def test_a_new_configuration_is_none_that_cannot_be_right(tmp_path: Path) -> None:
    own = own_recipe(clip_grad=1.0)
    with pytest.raises(InputError, match="under ZeRO DeepSpeed clips by the norm of what Muon has orthogonalised"):
        made(own, path=write(own, tmp_path), settings=EngineSettings(global_batch_size=4, zero_stage=2))
    assert made(own, path="r", settings=EngineSettings(global_batch_size=4, zero_stage=0))["gradient_clipping"] == 1.0


def test_lion_is_not_deepspeeds() -> None:
    with pytest.raises(InputError, match="the recipe's is lion, and for DeepSpeed there is adam, sgd and muon"):
        made(recipe_for("gpt2", optimizer="lion"), path="r", settings=EngineSettings(global_batch_size=4))
