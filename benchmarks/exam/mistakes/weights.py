"""Mistakes with initial weights, and parameters that are made anew after a plan was applied."""

from typing import Any

from torch import nn

from exam import models
from exam.mistakes.entries import mistake
from exam.mistakes.scripts import adamw, discard
from exam.setups import Modules, Setup
from mup_megatron.check.subjects.scripts import Task, prepare_by_plan
from mup_megatron.modules import param_groups


@mistake("lm", "initial weights", "blocks.1.attention.qkv*")
def last_attention_drawn_again(setup: Modules) -> Setup:
    """After the plan was applied, the queries, keys and values of the last block are drawn with the base's std."""
    return setup.then(
        lambda m, _o, _t: discard(nn.init.normal_(m.get_parameter("blocks.1.attention.qkv.weight"), std=0.1))
    )


@mistake("lm", "initial weights", "blocks.*.mlp.*")
def xavier_after_the_plan(setup: Modules) -> Setup:
    """A loop over the MLPs draws their weights anew by Xavier's rule after the plan was applied."""

    def change(model: nn.Module, _optimizer: Any, _task: Task) -> None:
        for module in model.modules():
            if isinstance(module, models.Mlp):
                nn.init.xavier_uniform_(module.up.weight)
                nn.init.xavier_uniform_(module.down.weight)

    return setup.then(change)


@mistake("lm", "initial weights", "blocks.*.norm2*")
def branches_start_at_zero(setup: Modules) -> Setup:
    """The gains of the norms before the MLPs are set to 0, so that each branch starts as nothing; the base had none."""

    def change(model: nn.Module, _optimizer: Any, _task: Task) -> None:
        for name, parameter in model.named_parameters():
            if name.endswith("norm2.weight"):
                nn.init.zeros_(parameter)

    return setup.then(change)


@mistake("lm", "initial weights", "tokens*")
def embedding_multiplied_in_the_weights_too(setup: Modules) -> Setup:
    """The table of tokens is multiplied by the recipe's embedding multiplier, which the model applies as well."""

    def change(model: nn.Module, _optimizer: Any, task: Task) -> None:
        model.get_parameter("tokens.weight").data.mul_(task.recipe.hyperparameters.embedding_multiplier)

    return setup.then(change)


@mistake("lm", "initial weights", "readout*")
def readout_folded_and_multiplied(setup: Modules) -> Setup:
    """The readout's weight is multiplied by α_out/r, and the forward pass goes on multiplying by it."""
    return setup.then(lambda m, _o, t: discard(m.get_parameter("readout.weight").data.mul_(t.plan.output_multiplier)))


@mistake("lm", "initial weights", "blocks.*", "readout*", "tokens*", "positions*")
def corner_from_the_base(setup: Modules) -> Setup:
    """The weights of a model of the base's width are copied into the upper left corner of each matrix."""

    def change(model: nn.Module, _optimizer: Any, _task: Task) -> None:
        small = dict(setup.factory(models.BASE).named_parameters())
        for name, parameter in model.named_parameters():
            rows = small[name].detach()
            if rows.dim() == 2:
                parameter.data[: rows.shape[0], : rows.shape[1]] = rows

    return setup.then(change)


@mistake("lm-tied", "initial weights", "readout*", "tokens*")
def untied_by_a_copy(setup: Modules) -> Setup:
    """The readout of a tied model gets a copy of the table after the optimizer was made, which does not train it."""

    def change(model: Any, _optimizer: Any, _task: Task) -> None:
        model.readout.weight = nn.Parameter(model.tokens.weight.detach().clone())

    return setup.then(change)


@mistake("lm", "initial weights", "blocks.0.mlp.down*")
def layer_replaced_after_the_optimizer(setup: Modules) -> Setup:
    """A layer is replaced by a new one of its kind after the optimizer was made, which holds the old one."""

    def change(model: Any, _optimizer: Any, _task: Task) -> None:
        old = model.blocks[0].mlp.down
        model.blocks[0].mlp.down = nn.Linear(old.in_features, old.out_features)

    return setup.then(change)


@mistake("lm", "initial weights", "readout*")
def readout_replaced_after_the_plan(setup: Modules) -> Setup:
    """The readout is replaced by a new layer with the same weights, and the old one's multiplier is lost."""

    def prepare(model: Any, task: Task) -> Any:
        prepare_by_plan(model, task)
        old = model.readout
        model.readout = nn.Linear(old.in_features, old.out_features, bias=False)
        model.readout.load_state_dict(old.state_dict())
        return adamw(param_groups(model.named_parameters(), task.plan), task)

    return setup.with_script(prepare)


@mistake("lm-post", "initial weights", "blocks.*")
def positive_weights(setup: Modules) -> Setup:
    """The first layers of the MLPs are made positive after the plan was applied, as a monotone model wants them."""

    def change(model: nn.Module, _optimizer: Any, _task: Task) -> None:
        for name, parameter in model.named_parameters():
            if name.endswith("mlp.up.weight"):
                parameter.data.abs_()

    return setup.then(change)
