"""Mistakes with models of Hugging Face's."""

from typing import Any

from torch import nn

from exam import models
from exam.mistakes.entries import mistake
from exam.mistakes.scripts import adamw
from exam.setups import Modules, Setup
from mup_megatron.check.subjects.scripts import Task, prepare_by_plan
from mup_megatron.modules import apply_plan, param_groups


@mistake("gpt2", "model code", "transformer.h.0.attn*")
def scaling_off_in_one_layer(setup: Modules) -> Setup:
    """The first layer's attention is told to leave its logits unscaled, after the plan was applied."""
    return setup.then(lambda m, _o, _t: setattr(m.get_submodule("transformer.h.0.attn"), "scaling", 1.0))


@mistake("llama-wide-heads", "model code", "model.layers.1.self_attn*")
def attention_made_anew(setup: Modules) -> Setup:
    """One layer's attention is built anew after the plan was applied, gets the old weights, and forgets the scale."""

    def prepare(model: Any, task: Task) -> Any:
        prepare_by_plan(model, task)
        layer = model.model.layers[1]
        anew = type(layer.self_attn)(model.config, 1)
        anew.load_state_dict(layer.self_attn.state_dict())
        layer.self_attn = anew
        return adamw(param_groups(model.named_parameters(), task.plan), task)

    return setup.with_script(prepare)


@mistake("llama", "initial weights", "model.layers.1*")
def last_layer_not_loaded(setup: Modules) -> Setup:
    """The prepared weights are saved and loaded again without the last layer, which keeps the library's draw."""

    def change(model: nn.Module, _optimizer: Any, task: Task) -> None:
        fresh = setup.factory(task.width)
        kept = {name: w for name, w in model.state_dict().items() if ".layers.1." not in name}
        fresh.load_state_dict(kept, strict=False)
        model.load_state_dict(fresh.state_dict())

    return setup.then(change)


@mistake("llama", "optimizer", "model.layers.*")
def adapters_with_the_rate_of_embeddings(setup: Modules) -> Setup:
    """Low-rank adapters beside the queries are trained as well, both factors with the recipe's learning rate."""

    class Adapter(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(width, 8, bias=False), nn.Linear(8, width, bias=False)
            nn.init.zeros_(self.b.weight)

    def change(model: Any, optimizer: Any, task: Task) -> None:
        adapters = [Adapter(task.width) for _ in model.model.layers]
        for layer, adapter in zip(model.model.layers, adapters, strict=True):
            layer.self_attn.q_proj.register_forward_hook(
                lambda _m, args, out, adapter=adapter: out + 2 * adapter.b(adapter.a(args[0]))
            )
        parameters = [p for adapter in adapters for p in adapter.parameters()]
        optimizer.add_param_group({"params": parameters, "lr": task.recipe.hyperparameters.lr, "weight_decay": 0.0})

    return setup.then(change)


@mistake("llama", "initial weights", "lm_head*", "model.embed_tokens*")
def tied_after_the_plan(setup: Modules) -> Setup:
    """The readout is tied to the table of tokens by a flag, after a plan for two tables was applied."""

    def change(model: Any, _optimizer: Any, _task: Task) -> None:
        model.lm_head.weight = model.model.embed_tokens.weight

    return setup.then(change)


@mistake("llama", "initial weights", "lm_head*", "model.embed_tokens*")
def table_resized_after_the_plan(setup: Modules) -> Setup:
    """The vocabulary is padded after the plan was applied: new tables, and what hung on the old ones is lost."""

    def prepare(model: Any, task: Task) -> Any:
        prepare_by_plan(model, task)
        model.resize_token_embeddings(models.VOCABULARY + 16, mean_resizing=False)
        return adamw(param_groups(model.named_parameters(), task.plan), task)

    return setup.with_script(prepare)


@mistake("gpt2", "optimizer")
def groups_of_the_trainer(setup: Modules) -> Setup:
    """Two groups as a trainer makes them, all weights but those of norms with weight decay, and one learning rate."""

    def prepare(model: nn.Module, task: Task) -> Any:
        apply_plan(model, task.plan)
        h = task.recipe.hyperparameters
        named = list(model.named_parameters())
        groups = [
            {"params": [p for n, p in named if p.dim() > 1], "weight_decay": h.weight_decay},
            {"params": [p for n, p in named if p.dim() < 2], "weight_decay": 0.0},
        ]
        return adamw(groups, task, eps=h.adam_eps)

    return setup.with_script(prepare)


@mistake("gpt2", "initial weights", "transformer.h.*.c_proj*", "transformer.h.*")
def residual_rule_applied_again(setup: Modules) -> Setup:
    """The library's factor 1/√(2L) for what writes into the residual stream is applied to the plan's weights again."""

    def change(model: nn.Module, _optimizer: Any, _task: Task) -> None:
        for name, parameter in model.named_parameters():
            if name.endswith("c_proj.weight"):
                parameter.data.mul_(0.5)

    return setup.then(change)
