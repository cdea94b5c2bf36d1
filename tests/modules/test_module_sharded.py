"""Models on several ranks: DDP, and FSDP2 after and before a plan, also from the meta device."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.ds_ranks import run_ranks
from support.hf_families import config, recipe_at
from support.hf_models import batch, built
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaForCausalLM

from mup_megatron.errors import InputError
from mup_megatron.huggingface import apply_plan, check_optimizer, param_groups, plan_for
from mup_megatron.modules import Initialize, module_base, plan_for_module
from mup_megatron.recipe import Recipe
from mup_megatron.theory import Plan

OWN = {"pad_token_id": 3}


def llama_plan(**hyperparameters: float) -> Plan:
    recipe = recipe_at(config("llama", 32, **OWN), hyperparameters={"output_multiplier": 2.0} | hyperparameters)
    return plan_for(built("llama", config("llama", 64, **OWN)), recipe)


def sharded(model: Any) -> Any:
    for layer in model.model.layers:
        fully_shard(layer)
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
    plan, inputs = llama_plan(), {"input_ids": batch("llama")["input_ids"]}
    found: dict[str, Any] = {}

    model: Any = on_meta()
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
    model.reshard()
    optimizer = torch.optim.AdamW(param_groups(model.named_parameters(), plan))
    check_optimizer(optimizer, plan, model)
    model(**inputs).logits.sum().backward()
    optimizer.step()

    model = built("llama", config("llama", 64, **OWN))
    apply_plan(model, plan)
    before = model(**inputs).logits
    found["after"] = (sharded(model)(**inputs).logits - before).abs().max().item()

    model = sharded(on_meta()).to_empty(device="cpu")
    found["forgotten redraw"] = refusal(lambda: apply_plan(model, plan))
    at_base = plan_for(model, recipe_at(config("llama", 64, **OWN)))
    found["forgotten at the base"] = refusal(lambda: apply_plan(model, at_base))
    own_start = replace(plan, entries=tuple(replace(e, init_std=None, init_value=None) for e in plan.entries))
    found["own start"] = refusal(lambda: apply_plan(model, own_start, initialize=Initialize.REDRAW))

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


def double(*, tied: bool = False) -> Any:
    return built("llama", config("llama", 64, **OWN, tie_word_embeddings=tied), dtype=torch.float64)


def emptied() -> Any:
    with torch.device("meta"):
        return double()


def losses_of(model: Any, plan: Plan, rank: int = 0, ranks: int = 1) -> list[float]:
    """Of all ranks together, each with its share of the same batches."""
    optimizer = torch.optim.AdamW(param_groups(model.named_parameters(), plan))
    check_optimizer(optimizer, plan, model)
    losses = []
    for step in range(5):
        tokens = batch("llama", seed=step)["input_ids"].chunk(ranks)[rank]
        optimizer.zero_grad()
        logits = model(input_ids=tokens).logits
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        loss = loss.detach()
        if ranks > 1:
            torch.distributed.all_reduce(loss)
        losses.append(loss.item() / ranks)
    return losses


def wrapped_runs(rank: int) -> dict[str, Any]:
    """Losses of one model, plain and under what ranks and memory are saved with."""
    plan = llama_plan(lr=0.01)
    keywords: dict[str, Any] = {"rank": rank, "ranks": 2}
    losses = {}

    def run(name: str, model: Any, wrap: Callable[[Any], Any], *, first: bool, **own: Any) -> None:
        model = wrap(model) if first else model
        apply_plan(model, plan, **own)
        losses[name] = losses_of(model if first else wrap(model), plan, **keywords)

    model = double()
    apply_plan(model, plan)
    losses["plain"] = losses_of(model, plan)
    for first, when in ((True, "first"), (False, "last")):
        run(f"DDP {when}", double(), DistributedDataParallel, first=first)
        run(f"FSDP2 {when}", double(), sharded, first=first)
        run(f"all {when}", double(), wrapped_in_all, first=first)

    # Drawn anew, where the first rank's seed counts.
    model = emptied().to_empty(device="cpu")
    torch.manual_seed(11)
    apply_plan(model, plan, initialize=Initialize.REDRAW)
    losses["plain redraw"] = losses_of(model, plan)
    for name, model in {
        "DDP": DistributedDataParallel(emptied().to_empty(device="cpu")),
        "FSDP2": sharded(emptied()).to_empty(device="cpu"),
    }.items():
        torch.manual_seed(11 + 7 * rank)
        apply_plan(model, plan, initialize=Initialize.REDRAW)
        losses[f"{name} redraw"] = losses_of(model, plan, **keywords)

    found: dict[str, Any] = {"losses": losses}
    tied = plan_for(double(tied=True), recipe_at(config("llama", 32, **OWN, tie_word_embeddings=True)))
    model = double(tied=True)
    apply_plan(model, tied)
    losses["tied plain"] = losses_of(model, tied)
    model = sharded(double(tied=True))
    apply_plan(model, tied)
    losses["tied FSDP2"] = losses_of(model, tied, **keywords)

    # A forward pass leaves whole copies of weights behind, which are no part of what is trained.
    model = sharded(double())
    with torch.no_grad():
        model(input_ids=batch("llama")["input_ids"])
    copies = param_groups(model.named_parameters(), plan)
    found["copies"] = refusal(lambda: check_optimizer(torch.optim.AdamW(copies), plan, model))
    with torch.no_grad():
        model(input_ids=batch("llama")["input_ids"])
    apply_plan(model, plan)
    losses["FSDP2 after a pass"] = losses_of(model, plan, **keywords)
    return found


def wrapped_in_all(model: Any) -> Any:
    for index, layer in enumerate(model.model.layers):
        model.model.layers[index] = torch.compile(checkpoint_wrapper(layer), backend="eager")
    return sharded(model)


def _ranked() -> dict[str, Any]:
    rank = torch.distributed.get_rank()
    return fsdp_runs(rank) | wrapped_runs(rank)


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    one, other = run_ranks(_ranked, 2)
    assert all(torch.equal(one["state"][name], other["state"][name]) for name in one["state"])
    result: dict[str, Any] = one
    return result


def test_losses_are_those_of_one_process_without_wrappers(found: dict[str, Any]) -> None:
    losses = found["losses"]
    for name, own in losses.items():
        plain = "tied plain" if "tied" in name else "plain redraw" if "redraw" in name else "plain"
        assert own == pytest.approx(losses[plain], abs=1e-6), name
    stock = double()
    other = losses_of(stock, plan_for(stock, recipe_at(config("llama", 64, **OWN), hyperparameters={"lr": 0.01})))
    assert max(abs(one - two) for one, two in zip(other, losses["plain"], strict=True)) > 1e-2


def test_an_optimizer_of_copies_is_refused(found: dict[str, Any]) -> None:
    assert "call model.reshard() before the optimizer is made" in found["copies"]


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
    assert "to_empty" in found["forgotten redraw"]
    assert "to_empty" in found["forgotten at the base"]
    assert "cannot be drawn into pieces" in found["own start"]
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


class OwnStart(Resetting):
    """One of its weights is drawn in a way that no plan says."""

    def reset_parameters(self) -> None:
        super().reset_parameters()
        with torch.no_grad():
            self.decay.copy_(torch.arange(4.0))

    def __init__(self, width: int = 32) -> None:
        super().__init__(width)
        self.decay = nn.Parameter(torch.zeros(4))


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


def test_a_weight_that_keeps_its_librarys_start_gets_it() -> None:
    model, plan = _emptied(OwnStart)
    kept = {name: replace(plan[name], init_std=None, init_value=None) for name in ("decay", "head.bias")}
    plan = replace(plan, entries=tuple(kept.get(entry.name, entry) for entry in plan.entries))
    apply_plan(model, plan, initialize=Initialize.REDRAW)
    assert torch.equal(model.decay, torch.arange(4.0))  # type: ignore[arg-type]
    # By the layer's own reset, which draws the weight as well; the plan draws it again.
    assert 0 < model.head.bias.abs().max() < 32**-0.5
    assert model.head.weight.std().item() == pytest.approx(plan["head.weight"].init_std, rel=0.3)
    model, _ = _emptied(Shifted)
    model.register_buffer("shift", None)
    model.decay = nn.Parameter(torch.zeros(4))
    message = refusal(lambda: apply_plan(model, plan, initialize=Initialize.REDRAW))
    assert message.startswith("decay: ")
