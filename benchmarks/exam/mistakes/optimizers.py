"""Mistakes with optimizers, their groups and schedules."""

from typing import Any

import torch
from torch import nn

from exam import models
from exam.mistakes.entries import mistake
from exam.mistakes.scripts import OwnSchedule, adamw, discard, own_groups, singly
from exam.setups import Modules, Setup
from mup_megatron.check.subjects.scripts import Task, warm_up_and_decay
from mup_megatron.modules import apply_plan, param_groups
from mup_megatron.theory import PlanEntry, Role


@mistake("lm", "optimizer")
def two_groups_by_decay(setup: Modules) -> Setup:
    """The plan's groups are merged into two, with and without weight decay, and each keeps the first one's values."""

    def prepare(model: nn.Module, task: Task) -> Any:
        apply_plan(model, task.plan)
        groups = param_groups(model.named_parameters(), task.plan)
        merged = []
        for decays in (True, False):
            alike = [group for group in groups if (group["weight_decay"] > 0) == decays]
            merged.append({**alike[0], "params": [p for group in alike for p in group["params"]]})
        return adamw(merged, task)

    return setup.with_script(prepare)


@mistake("lm", "optimizer")
def plan_zipped_in_another_order(setup: Modules) -> Setup:
    """The plan's entries are sorted by name and zipped with the model's parameters, which are not."""

    def prepare(model: nn.Module, task: Task) -> Any:
        apply_plan(model, task.plan)
        entries = sorted(task.plan.entries, key=lambda entry: entry.name)
        groups = [
            {"params": [p], "lr": e.lr, "eps": e.eps, "weight_decay": e.weight_decay}
            for p, e in zip(model.parameters(), entries, strict=True)
        ]
        return adamw(groups, task)

    return setup.with_script(prepare)


@mistake("lm", "optimizer")
def entries_by_the_last_part_of_a_name(setup: Modules) -> Setup:
    """What parameters get is looked up by the last part of their names, so that the last of a name counts for all."""

    def change(group: dict[str, Any], entry: PlanEntry, task: Task) -> None:
        last = {e.name.rpartition(".")[2]: e for e in task.plan.entries}[entry.name.rpartition(".")[2]]
        group.update(lr=last.lr, eps=last.eps, weight_decay=last.weight_decay)

    return setup.with_script(own_groups(change))


@mistake("lm", "optimizer", "readout*")
def readout_with_other_betas(setup: Modules) -> Setup:
    """The readout has a group with betas of its own, those of a paper, which are not the recipe's."""

    def change(group: dict[str, Any], entry: PlanEntry, _task: Task) -> None:
        if entry.name == "readout.weight":
            group["betas"] = (0.5, 0.9)

    return setup.with_script(own_groups(change))


@mistake("lm", "optimizer")
def rates_falling_towards_the_input(setup: Modules) -> Setup:
    """Each block has three quarters of the learning rate of the one above it, and the embeddings have least."""

    def change(group: dict[str, Any], entry: PlanEntry, task: Task) -> None:
        blocks = sum(1 for e in task.plan.entries if e.name.endswith("mlp.up.weight"))
        part = entry.name.split(".")
        depth = int(part[1]) + 1 if part[0] == "blocks" else 0 if part[0] in ("tokens", "positions") else blocks + 1
        group["lr"] *= 0.75 ** (blocks + 1 - depth)

    return setup.with_script(own_groups(change))


@mistake("lm", "optimizer", "blocks.*")
def decay_compensated_twice(setup: Modules) -> Setup:
    """The weight decay of hidden weights is multiplied by the ratio of widths by hand; the plan's is so already."""

    def change(group: dict[str, Any], entry: PlanEntry, _task: Task) -> None:
        if entry.role is Role.HIDDEN:
            group["weight_decay"] *= entry.width_ratio

    return setup.with_script(own_groups(change))


@mistake("lm", "optimizer")
def rates_divided_by_hand(setup: Modules) -> Setup:
    """All learning rates of the plan are divided by the ratio of widths once more, by hand."""

    def change(group: dict[str, Any], _entry: PlanEntry, task: Task) -> None:
        group["lr"] *= models.BASE / task.width

    return setup.with_script(own_groups(change))


class _OwnAdam(torch.optim.Optimizer):
    """Adam as somebody writes it, with decoupled weight decay."""

    def __init__(self, groups: Any, lr: float, betas: tuple[float, float], corrects: bool, inside: bool) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas})
        self._corrects, self._inside = corrects, inside

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state.update(t=0, m=torch.zeros_like(p), v=torch.zeros_like(p))
                state["t"] += 1
                state["m"].lerp_(p.grad, 1 - beta1)
                state["v"].lerp_(p.grad.square(), 1 - beta2)
                m, v = state["m"], state["v"]
                if self._corrects:
                    m, v = m / (1 - beta1 ** state["t"]), v / (1 - beta2 ** state["t"])
                root = (v + group["eps"]).sqrt() if self._inside else v.sqrt() + group["eps"]
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * m / root)


def _with_own_adam(setup: Modules, *, corrects: bool, inside: bool) -> Setup:
    def prepare(model: nn.Module, task: Task) -> Any:
        apply_plan(model, task.plan)
        groups = param_groups(model.named_parameters(), task.plan)
        return adamw(groups, task, _OwnAdam, corrects=corrects, inside=inside)

    return setup.with_script(prepare)


@mistake("lm", "optimizer")
def eps_inside_the_root(setup: Modules) -> Setup:
    """The optimizer adds the plan's eps under the root, where the ratio would have to be squared."""
    return _with_own_adam(setup, corrects=True, inside=True)


@mistake("lm", "optimizer")
def averages_not_corrected(setup: Modules) -> Setup:
    """The optimizer does not correct its averages for having started at 0, as the base's did."""
    return _with_own_adam(setup, corrects=False, inside=False)


@mistake("lm", "optimizer")
def amsgrad(setup: Modules) -> Setup:
    """AMSGrad is turned on for the target alone."""

    def prepare(model: nn.Module, task: Task) -> Any:
        apply_plan(model, task.plan)
        return adamw(param_groups(model.named_parameters(), task.plan), task, amsgrad=True)

    return setup.with_script(prepare)


@mistake("lm", "optimizer")
def decay_by_the_base_rate(setup: Modules) -> Setup:
    """Weight decay is a step of its own, by the recipe's learning rate at that time instead of the parameter's."""

    def prepare(model: nn.Module, task: Task) -> Any:
        apply_plan(model, task.plan)
        groups = singly(model, task.plan)
        own = {group["name"]: (group["weight_decay"], group["lr"]) for group in groups}
        for group in groups:
            group["weight_decay"] = 0.0
        optimizer = adamw(groups, task)

        def decay(optimizer: Any, _args: Any, _kwargs: Any) -> None:
            for group in optimizer.param_groups:
                weight_decay, peak = own[group["name"]]
                part = group["lr"] / peak
                for p in group["params"]:
                    p.data.mul_(1 - part * task.recipe.hyperparameters.lr * weight_decay)

        optimizer.register_step_pre_hook(decay)
        return optimizer

    return setup.with_script(prepare)


@mistake("lm", "optimizer")
def decay_twice(setup: Modules) -> Setup:
    """A loop after each step decays the weights by hand; the optimizer has done so already."""

    def decay(optimizer: Any, _args: Any, _kwargs: Any) -> None:
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.data.mul_(1 - group["lr"] * group["weight_decay"])

    return setup.then(lambda _m, optimizer, _t: discard(optimizer.register_step_post_hook(decay)))


@mistake("lm", "training loop")
def averages_left_in(setup: Modules) -> Setup:
    """Every fourth step the averaged weights are swapped in for an evaluation and never swapped out."""

    def change(model: nn.Module, optimizer: Any, _task: Task) -> None:
        averages = [p.detach().clone() for p in model.parameters()]
        done = [0]

        def average(_optimizer: Any, _args: Any, _kwargs: Any) -> None:
            done[0] += 1
            for mean, p in zip(averages, model.parameters(), strict=True):
                mean.lerp_(p.detach(), 0.2)
                if done[0] % 4 == 0:
                    p.data.copy_(mean)

        optimizer.register_step_post_hook(average)

    return setup.then(change)


@mistake("lm", "optimizer", "tokens*", "positions*", "norm*", "readout*")
def second_optimizer_without_schedule(setup: Modules) -> Setup:
    """All but the blocks has an optimizer of its own, which no scheduler knows."""

    def prepare(model: nn.Module, task: Task) -> Any:
        apply_plan(model, task.plan)
        groups = singly(model, task.plan)
        inner = [group for group in groups if group["name"].startswith("blocks")]
        names = {group["name"] for group in inner}
        second = adamw([group for group in groups if group["name"] not in names], task)
        first = adamw(inner, task)
        first.register_step_post_hook(lambda *_: second.step())
        return first

    return setup.with_script(prepare)


# ---- schedules -----------------------------------------------------------------------------------------------------


@mistake("lm", "schedule")
def peaks_in_another_order(setup: Modules) -> Setup:
    """The scheduler is given the groups' peaks in the reverse order of the groups."""

    def change(_model: nn.Module, optimizer: Any, task: Task) -> Any:
        peaks = [group["lr"] for group in optimizer.param_groups][::-1]
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak
        return optimizer, OwnSchedule(optimizer, lambda s, peak, _: peak * warm_up_and_decay(s, task.steps))

    return setup.then(change)


@mistake("lm", "schedule")
def constant_added_to_the_schedule(setup: Modules) -> Setup:
    """The schedule adds a twentieth of the recipe's learning rate to that of every group, at all times."""

    def change(_model: nn.Module, optimizer: Any, task: Task) -> Any:
        least = task.recipe.hyperparameters.lr / 20

        def rate(step: int, peak: float, _group: Any) -> float:
            return peak * warm_up_and_decay(step, task.steps) + least

        return optimizer, OwnSchedule(optimizer, rate)

    return setup.then(change)


@mistake("lm", "schedule")
def vectors_with_a_floor_of_their_own(setup: Modules) -> Setup:
    """After the warm-up the learning rate of biases and gains never falls below half of its peak."""

    def change(_model: nn.Module, optimizer: Any, task: Task) -> Any:
        def rate(step: int, peak: float, group: Any) -> float:
            least = peak / 2 if step > task.steps / 4 and group["weight_decay"] == 0 else 0.0
            return max(peak * warm_up_and_decay(step, task.steps), least)

        return optimizer, OwnSchedule(optimizer, rate)

    return setup.then(change)


@mistake("lm", "schedule")
def warm_up_of_another_run(setup: Modules) -> Setup:
    """The warm-up has the number of steps of a run that is four times as long."""

    def change(_model: nn.Module, optimizer: Any, task: Task) -> Any:
        return optimizer, OwnSchedule(optimizer, lambda step, peak, _: peak * min(1.0, step / task.steps))

    return setup.then(change)


@mistake("lm", "schedule")
def schedule_twice_as_fast(setup: Modules) -> Setup:
    """The scheduler is stepped twice in each step, by the loop and by a library."""

    def change(_model: nn.Module, optimizer: Any, task: Task) -> Any:
        def rate(step: int, peak: float, _group: Any) -> float:
            return peak * warm_up_and_decay(min(2 * step, task.steps), task.steps)

        return optimizer, OwnSchedule(optimizer, rate)

    return setup.then(change)


@mistake("lm", "schedule")
def schedule_restarts(setup: Modules) -> Setup:
    """The schedule begins again in the middle of the run, as after a resume that lost its step."""

    def change(_model: nn.Module, optimizer: Any, task: Task) -> Any:
        def rate(step: int, peak: float, _group: Any) -> float:
            return peak * warm_up_and_decay(step % max(1, task.steps // 2), task.steps)

        return optimizer, OwnSchedule(optimizer, rate)

    return setup.then(change)


@mistake("lm", "schedule", "tokens*")
def embedding_joins_late(setup: Modules) -> Setup:
    """The table of tokens is added to the optimizer after four steps, and its group is not in the schedule."""

    def prepare(model: nn.Module, task: Task) -> Any:
        apply_plan(model, task.plan)
        groups = singly(model, task.plan)
        late = next(group for group in groups if group["name"] == "tokens.weight")
        optimizer = adamw([group for group in groups if group is not late], task)
        done = [0]

        def join(optimizer: Any, _args: Any, _kwargs: Any) -> None:
            done[0] += 1
            if done[0] == 4:
                optimizer.add_param_group(late)

        optimizer.register_step_post_hook(join)
        schedule = OwnSchedule(optimizer, lambda step, peak, _: peak * warm_up_and_decay(step, task.steps))
        return optimizer, schedule

    return setup.with_script(prepare)
