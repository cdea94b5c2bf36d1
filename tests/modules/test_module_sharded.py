"""Models whose weights are sharded: FSDP2 after and before a plan, and from the meta device."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.ds_ranks import run_ranks
from support.hf_families import config, recipe_at
from support.hf_models import batch, built
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from transformers import LlamaForCausalLM

from mup_megatron.errors import InputError
from mup_megatron.huggingface import apply_plan, check_optimizer, param_groups, plan_for
from mup_megatron.modules import Initialize, module_base, plan_for_module
from mup_megatron.recipe import Recipe
from mup_megatron.theory import Plan

OWN = {"pad_token_id": 3}


def llama_plan() -> Plan:
    recipe = recipe_at(config("llama", 32, **OWN), hyperparameters={"output_multiplier": 2.0})
    return plan_for(built("llama", config("llama", 64, **OWN)), recipe)


def sharded(model: nn.Module) -> nn.Module:
    for layer in model.model.layers:  # type: ignore[union-attr]
        fully_shard(layer)  # type: ignore[arg-type]
    return fully_shard(model)


def on_meta() -> LlamaForCausalLM:
    with torch.device("meta"):
        return LlamaForCausalLM(config("llama", 64, **OWN))


def refusal(make: Callable[[], object]) -> str:
    with pytest.raises(InputError) as raised:
        make()
    assert len(str(raised.value)) <= 300
    return str(raised.value)


def fsdp_runs(rank: int) -> dict[str, Any]:
    """All of it in one group of processes: starting one costs more than what is tried."""
    plan, inputs, found = llama_plan(), {"input_ids": batch("llama")["input_ids"]}, {}

    model = on_meta()
    found["on meta"] = refusal(lambda: apply_plan(model, plan))
    sharded(model)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(6e9)
    found["same plan"] = (
        plan_for(model, recipe_at(config("llama", 32, **OWN), hyperparameters={"output_multiplier": 2.0})) == plan
    )
    torch.manual_seed(7 + rank)  # ranks need not agree
    apply_plan(model, plan, initialize=Initialize.REDRAW)
    state = {name: p.full_tensor().detach() for name, p in model.named_parameters() if isinstance(p, DTensor)}
    found["state"], found["redrawn"] = state, model(**inputs).logits.detach()
    optimizer = torch.optim.AdamW(param_groups(model.named_parameters(), plan))
    check_optimizer(optimizer, plan, model)
    model(**inputs).logits.sum().backward()
    optimizer.step()

    model = built("llama", config("llama", 64, **OWN))
    apply_plan(model, plan)
    before = model(**inputs).logits
    found["after"] = (sharded(model)(**inputs).logits - before).abs().max().item()

    model = built("llama", config("llama", 64, **OWN))
    found["before"] = refusal(lambda: apply_plan(sharded(model), plan))

    model = FullyShardedDataParallel(
        built("llama", config("llama", 64, **OWN)), use_orig_params=True, device_id=torch.device("cpu")
    )
    found["wrapped before"] = refusal(lambda: apply_plan(model, plan))
    flat = FullyShardedDataParallel(built("llama", config("llama", 64, **OWN)), device_id=torch.device("cpu"))
    optimizer = torch.optim.AdamW(flat.parameters())
    found["flat"] = [
        refusal(lambda: param_groups(flat.named_parameters(), plan)),
        refusal(lambda: check_optimizer(optimizer, plan, flat)),
    ]
    found["wrapped groups"] = [group["name"] for group in param_groups(model.named_parameters(), plan)]
    return found


def _ranked() -> dict[str, Any]:
    return fsdp_runs(torch.distributed.get_rank())


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    one, other = run_ranks(_ranked, 2)
    assert all(torch.equal(one["state"][name], other["state"][name]) for name in one["state"])
    result: dict[str, Any] = one
    return result


def test_a_model_from_the_meta_device_is_all_drawn_and_set(found: dict[str, Any]) -> None:
    plan = llama_plan()
    assert found["same plan"]
    assert set(found["state"]) == set(plan.by_name)
    for entry in plan.entries:
        weight = found["state"][entry.name]
        if entry.init_std is None:
            assert weight.unique().tolist() == [entry.init_value]
        else:
            assert weight.std().item() == pytest.approx(entry.init_std, rel=0.1), entry.name
    assert found["state"]["model.embed_tokens.weight"][3].abs().max() == 0
    # As one process computes it: rotary positions too, which are in no checkpoint.
    plain = built("llama", config("llama", 64, **OWN))
    plain.load_state_dict(found["state"], strict=False)
    apply_plan(plain, plan, initialize=Initialize.KEEP)
    torch.testing.assert_close(plain(input_ids=batch("llama")["input_ids"]).logits, found["redrawn"])


def test_sharding_after_the_plan_changes_nothing(found: dict[str, Any]) -> None:
    assert found["after"] < 1e-5


def test_what_was_sharded_or_emptied_too_early_is_told_the_order(found: dict[str, Any]) -> None:
    assert "Call apply_plan first and fully_shard then" in found["before"]
    assert "Call apply_plan first and wrap the model then" in found["wrapped before"]
    assert "to_empty" in found["on meta"]


def test_flattened_parameters_are_told_what_keeps_them(found: dict[str, Any]) -> None:
    assert all("use_orig_params=True" in message for message in found["flat"])


def test_groups_are_made_under_the_older_fsdp_too(found: dict[str, Any]) -> None:
    own = built("llama", config("llama", 64, **OWN))
    assert found["wrapped groups"] == [group["name"] for group in param_groups(own.named_parameters(), llama_plan())]


# ---- any module, in one process ------------------------------------------------------------------------------------


class Shifted(nn.Module):
    """It has a buffer that is not saved, and a constant."""

    def __init__(self, width: int = 32, *, constant: bool = False) -> None:
        super().__init__()
        self.fc, self.norm, self.head = nn.Linear(8, width), nn.BatchNorm1d(width), nn.Linear(width, 4)
        self.register_buffer("shift", torch.arange(float(width)), persistent=False)
        if constant:
            self.root = torch.tensor(2.0)


class Resetting(Shifted):
    def reset_parameters(self) -> None:
        self.shift.copy_(torch.arange(float(len(self.shift))))  # type: ignore[operator,arg-type]


def _emptied(kind: type[Shifted], **own: Any) -> tuple[Shifted, Plan]:
    recipe = Recipe.model_validate(
        {"base": module_base(lambda: kind(16), lambda: kind(24)), "hyperparameters": {"lr": 0.01}}
    )
    with torch.device("meta"):
        model = kind(**own)
    return model.to_empty(device="cpu"), plan_for_module(kind, recipe)


def test_a_buffer_that_nothing_sets_is_named() -> None:
    model, plan = _emptied(Shifted)
    message = refusal(lambda: apply_plan(model, plan, initialize=Initialize.REDRAW))
    assert message.startswith("shift: ")
    assert "reset_parameters()" in message


def test_a_constant_that_stayed_behind_is_named() -> None:
    model, plan = _emptied(Resetting, constant=True)
    assert refusal(lambda: apply_plan(model, plan, initialize=Initialize.REDRAW)).startswith("root: ")


def test_buffers_are_set_by_their_modules() -> None:
    model, plan = _emptied(Resetting)
    for buffer in model.buffers():
        buffer.fill_(77)
    apply_plan(model, plan, initialize=Initialize.REDRAW)
    assert torch.equal(model.shift, torch.arange(32.0))  # type: ignore[arg-type]
    assert model.norm.running_var.unique().tolist() == [1.0]  # type: ignore[union-attr]
    assert model.norm.num_batches_tracked == 0
