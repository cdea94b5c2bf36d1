"""The mistakes of the exam: each a function from a right set-up to one in which somebody has made it.

Each says what was done, and what it breaks: the *plan*, where the run does not do what the recipe says, or the
*transfer*, where the model's own code follows width in a way that no recipe knows.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from mup_megatron.check.modules import Task, prepare_by_plan, warm_up_and_decay
from mup_megatron.check.mutants import Context, Mutant
from mup_megatron.huggingface import plan_for
from mup_megatron.megatron.names import named_parameters, unwrapped
from mup_megatron.modules import apply_plan, param_groups, plan_for_module
from mup_megatron.recipe import Recipe
from mup_megatron.theory import Plan, PlanEntry, Role

from . import models
from .setups import Megatron, Modules, Setup
from .subjects import SUBJECTS

Place = Literal["model code", "initial weights", "optimizer", "schedule", "training loop", "recipe"]


@dataclass(frozen=True, kw_only=True)
class Mistake:
    """One mistake."""

    name: str
    what: str
    """In a sentence."""
    where: Place
    breaks: Literal["plan", "transfer"]
    subject: str
    """The right set-up in which it is made: a key of SUBJECTS."""
    make: Callable[[Any], Setup]
    culprits: Sequence[str]
    """Patterns of names that are right to be named first; none where nobody can say."""

    @property
    def right(self) -> Setup:
        """Without it."""
        return SUBJECTS[self.subject]()

    @property
    def wrong(self) -> Setup:
        """With it."""
        return self.make(self.right)


MISTAKES: dict[str, Mistake] = {}


def mistake(
    subject: str, where: Place, *culprits: str, breaks: Literal["plan", "transfer"] = "plan"
) -> Callable[[Callable[[Any], Setup]], Callable[[Any], Setup]]:
    """Enters a function into the list."""

    def enter(function: Callable[[Any], Setup]) -> Callable[[Any], Setup]:
        name = function.__name__.replace("_", "-")
        assert function.__doc__ is not None, name
        assert name not in MISTAKES, name
        what = " ".join(function.__doc__.split())
        MISTAKES[name] = Mistake(
            name=name, what=what, where=where, breaks=breaks, subject=subject, make=function, culprits=culprits
        )
        return function

    return enter


# ---- the model's own code ------------------------------------------------------------------------------------------


class _LengthNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * functional.normalize(x, dim=-1)


@mistake("lm", "model code", "norm", "norm.*", "readout*", breaks="transfer")
def final_norm_of_unit_length(setup: Modules) -> Setup:
    """The final norm divides by the length of a vector and not by its root mean square."""
    return setup.with_model("final-norm-of-unit-length", lambda w: models.Lm(w, final=_LengthNorm))


@mistake("lm", "model code", "blocks.*.attention*", breaks="transfer")
def heads_averaged(setup: Modules) -> Setup:
    """The outputs of the heads, of which a wider model has more, are averaged, and every head's place gets the mean."""

    class Averaged(models.SelfAttention):
        def attended(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = super().attended(q, k, v)
            return out.mean(1, keepdim=True).expand_as(out)

    return setup.with_model("heads-averaged", lambda w: models.Lm(w, attention=Averaged))


@mistake("lm", "model code", "blocks.*.mlp*", breaks="transfer")
def branch_gain_from_width(setup: Modules) -> Setup:
    """The MLP's output is multiplied by a trained gain for each channel that starts at 1/√width."""

    class Scaled(models.Mlp):
        def __init__(self, width: int) -> None:
            super().__init__(width)
            self.scale = nn.Parameter(torch.full((width,), width**-0.5))

        def forward(self, x: Tensor) -> Tensor:
            return self.scale * super().forward(x)

    return setup.with_model("branch-gain-from-width", lambda w: models.Lm(w, mlp=Scaled))


@mistake("lm", "model code", "blocks.*.attention*", breaks="transfer")
def logits_over_root_of_width(setup: Modules) -> Setup:
    """Attention logits are divided by the root of the model's width, where the size of heads belongs."""

    class OverWidth(models.SelfAttention):
        def attended(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            scale = self.out.in_features**-0.5
            return functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)

    return setup.with_model("logits-over-root-of-width", lambda w: models.Lm(w, attention=OverWidth))


@mistake("lm", "model code", "blocks.0*", "tokens*", breaks="transfer")
def positions_of_unit_length(setup: Modules) -> Setup:
    """Fixed sinusoidal positions are vectors of length 1 at every width, and are added to embeddings that grow."""

    class Fixed(models.Lm):
        def __init__(self, width: int) -> None:
            super().__init__(width, positions=False)
            angles = torch.outer(torch.arange(models.LENGTH), 100.0 ** -(torch.arange(width // 2) * 2 / width))
            table = torch.cat([angles.sin(), angles.cos()], dim=1)
            self.register_buffer("table", functional.normalize(table, dim=-1))

        def embedded(self, tokens: Tensor) -> Tensor:
            table: Any = self.table
            return super().embedded(tokens) + table[: tokens.shape[1]]

    return setup.with_model("positions-of-unit-length", Fixed)


@mistake("lm", "model code", "blocks.0*", "tokens*", breaks="transfer")
def tokens_of_unit_length(setup: Modules) -> Setup:
    """The vectors of tokens are divided by their length before they enter the residual stream."""

    class Normalised(models.Lm):
        def embedded(self, tokens: Tensor) -> Tensor:
            return functional.normalize(super().embedded(tokens), dim=-1)

    return setup.with_model("tokens-of-unit-length", Normalised)


@mistake("lm-tied", "model code", "readout*", "tokens*", breaks="transfer")
def tied_logits_over_root_of_width(setup: Modules) -> Setup:
    """A model with a tied table divides its logits by √width in its code, and the plan by the ratio of widths."""

    class Divided(models.Lm):
        def predicted(self, x: Tensor) -> Tensor:
            return super().predicted(x / x.shape[-1] ** 0.5)

    return setup.with_model("tied-logits-over-root-of-width", lambda w: Divided(w, tied=True))


@mistake("lm", "model code", "blocks.*.mlp*", breaks="transfer")
def layers_divided_by_root_of_fan_in(setup: Modules) -> Setup:
    """The MLP's layers have weights of std 1 and divide what they compute by √fan_in in their code."""

    class Divided(nn.Linear):
        def reset_parameters(self) -> None:
            nn.init.normal_(self.weight)
            nn.init.zeros_(self.bias)

        def forward(self, x: Tensor) -> Tensor:
            return functional.linear(x / self.in_features**0.5, self.weight, self.bias)

    changed = setup.with_model(
        "layers-divided-by-root-of-fan-in", lambda w: models.Lm(w, mlp=partial(models.Mlp, linear=Divided))
    )
    return replace(changed, hyperparameters={**setup.hyperparameters, "lr": 0.02})


@mistake("lm", "model code", "blocks.*.attention*", breaks="transfer")
def window_from_width(setup: Modules) -> Setup:
    """Attention sees as many positions back as width/16: more in a wider model."""

    class Windowed(models.SelfAttention):
        def attended(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            n = torch.arange(q.shape[-2])
            back = n[:, None] - n
            seen = (back >= 0) & (back < self.out.in_features // 16)
            return functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=self.scaling)

    return setup.with_model("window-from-width", lambda w: models.Lm(w, attention=Windowed))


@mistake("lm-gated", "model code", "blocks.*.mlp*", breaks="transfer")
def gate_by_softmax(setup: Modules) -> Setup:
    """The MLP's gate is a softmax over its channels, so that all of them together let through 1."""

    class Soft(models.GatedMlp):
        def gated(self, x: Tensor) -> Tensor:
            return x.softmax(-1)

    return setup.with_model("gate-by-softmax", lambda w: models.Lm(w, mlp=Soft))


@mistake("lm-gated", "model code", "blocks.*.mlp*", breaks="transfer")
def gate_by_sum(setup: Modules) -> Setup:
    """One gate for all channels is the sigmoid of their sum, not of their mean."""

    class Summed(models.GatedMlp):
        def gated(self, x: Tensor) -> Tensor:
            return x.sum(-1, keepdim=True).sigmoid() * functional.silu(x)

    return setup.with_model("gate-by-sum", lambda w: models.Lm(w, mlp=Summed))


@mistake("lm", "model code", "temperature", "readout*", breaks="transfer")
def temperature_from_width(setup: Modules) -> Setup:
    """A trained temperature of the logits starts at width/32."""

    class Tempered(models.Lm):
        def __init__(self, width: int) -> None:
            super().__init__(width)
            self.temperature = nn.Parameter(torch.full((1,), width / models.BASE))

        def predicted(self, x: Tensor) -> Tensor:
            return self.temperature * super().predicted(x)

    return setup.with_model("temperature-from-width", Tempered)


@mistake("lm", "model code", "blocks.*.attention*", breaks="transfer")
def values_scaled_by_a_buffer(setup: Modules) -> Setup:
    """Values are multiplied by a buffer that holds 1/√(number of heads)."""

    class Buffered(models.SelfAttention):
        def __init__(self, width: int) -> None:
            super().__init__(width)
            self.register_buffer("factor", torch.full((1,), (width / models.HEAD) ** -0.5))

        def attended(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            factor: Any = self.factor
            return super().attended(q, k, v * factor)

    return setup.with_model("values-scaled-by-a-buffer", lambda w: models.Lm(w, attention=Buffered))


@mistake("towers", "model code", breaks="transfer")
def product_of_towers_over_root_of_width(setup: Modules) -> Setup:
    """The score of a pair is the product of two vectors over √width, as if they stayed independent in training."""

    class Rooted(models.Towers):
        def scored(self, u: Tensor, v: Tensor) -> Tensor:
            return u @ v.T * u.shape[-1] ** -0.5

    return setup.with_model("product-of-towers-over-root-of-width", Rooted)


@mistake("lm", "training loop", breaks="transfer")
def activations_punished_by_their_sum(setup: Modules) -> Setup:
    """The loss has a penalty on squared activations that is summed over channels."""

    def loss(model: Any, tokens: Tensor) -> Tensor:
        x = model.embedded(tokens[:, :-1])
        for block in model.blocks:
            x = block(x)
        logits = model.predicted(model.norm(x))
        penalty = 0.02 * x.square().sum(-1).mean()
        return functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()) + penalty

    return setup.with_loss("activations-punished-by-their-sum", loss)


@mistake("lm", "training loop", breaks="transfer")
def weights_punished_in_the_loss(setup: Modules) -> Setup:
    """The loss has the sum of all squared weights in it, beside the optimizer's own weight decay."""

    def loss(model: Any, tokens: Tensor) -> Tensor:
        return setup.loss(model, tokens) + 1e-4 * sum(p.square().sum() for p in model.parameters())

    return setup.with_loss("weights-punished-in-the-loss", loss)


@mistake("lm", "training loop", breaks="transfer")
def loss_times_width(setup: Modules) -> Setup:
    """The loss is multiplied by the ratio of widths, to make up for logits that are divided by it."""

    def loss(model: Any, tokens: Tensor) -> Tensor:
        result: Tensor = setup.loss(model, tokens) * (model.readout.in_features / models.BASE)
        return result

    return setup.with_loss("loss-times-width", loss)


@mistake("convnet", "model code", breaks="transfer")
def channels_summed(setup: Modules) -> Setup:
    """What a convolutional block adds is weighted by one sigmoid of all channels' sum, where their mean belongs."""

    class Weighted(models.ConvBlock):
        def forward(self, x: Tensor) -> Tensor:
            added = self.conv(torch.relu(self.norm(x)))
            return x + added * 2 * added.mean((2, 3), keepdim=True).sum(1, keepdim=True).sigmoid()

    def factory(width: int) -> nn.Module:
        net = models.ConvNet(width)
        norm = partial(nn.GroupNorm, 4)
        net.blocks = nn.ModuleList(Weighted(width, norm=norm) for _ in range(2))
        return net

    return setup.with_model("channels-summed", factory)


# ---- initial weights, and parameters that are made anew ------------------------------------------------------------


@mistake("lm", "initial weights", "blocks.1.attention.qkv*")
def last_attention_drawn_again(setup: Modules) -> Setup:
    """After the plan was applied, the queries, keys and values of the last block are drawn with the base's std."""
    return setup.then(
        lambda m, _o, _t: _discard(nn.init.normal_(m.get_parameter("blocks.1.attention.qkv.weight"), std=0.1))
    )


def _discard(_: Any) -> None:
    """For what changes in place, where nothing is to be returned."""


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
    return setup.then(lambda m, _o, t: _discard(m.get_parameter("readout.weight").data.mul_(t.plan.output_multiplier)))


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
        return _adamw(param_groups(model.named_parameters(), task.plan), task)

    return setup.with_script(prepare)


@mistake("lm-post", "initial weights", "blocks.*")
def positive_weights(setup: Modules) -> Setup:
    """The first layers of the MLPs are made positive after the plan was applied, as a monotone model wants them."""

    def change(model: nn.Module, _optimizer: Any, _task: Task) -> None:
        for name, parameter in model.named_parameters():
            if name.endswith("mlp.up.weight"):
                parameter.data.abs_()

    return setup.then(change)


# ---- the optimizer -------------------------------------------------------------------------------------------------


def _adamw(groups: Any, task: Task, kind: Any = torch.optim.AdamW, **options: Any) -> Any:
    h = task.recipe.hyperparameters
    return kind(groups, lr=h.lr, betas=(h.adam_beta1, h.adam_beta2), **options)


def _singly(model: nn.Module, plan: Plan) -> list[dict[str, Any]]:
    """A group for each parameter."""
    return [
        {"params": [p], "name": name, "lr": e.lr, "eps": e.eps, "weight_decay": e.weight_decay}
        for name, p in model.named_parameters()
        if (e := plan[name])
    ]


def _own_groups(change: Callable[[dict[str, Any], PlanEntry, Task], None]) -> Callable[[nn.Module, Task], Any]:
    """A script with a group for each parameter, of which each is changed."""

    def prepare(model: nn.Module, task: Task) -> Any:
        apply_plan(model, task.plan)
        groups = _singly(model, task.plan)
        for group in groups:
            change(group, task.plan[group["name"]], task)
        return _adamw(groups, task)

    return prepare


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
        return _adamw(merged, task)

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
        return _adamw(groups, task)

    return setup.with_script(prepare)


@mistake("lm", "optimizer")
def entries_by_the_last_part_of_a_name(setup: Modules) -> Setup:
    """What parameters get is looked up by the last part of their names, so that the last of a name counts for all."""

    def change(group: dict[str, Any], entry: PlanEntry, task: Task) -> None:
        last = {e.name.rpartition(".")[2]: e for e in task.plan.entries}[entry.name.rpartition(".")[2]]
        group.update(lr=last.lr, eps=last.eps, weight_decay=last.weight_decay)

    return setup.with_script(_own_groups(change))


@mistake("lm", "optimizer", "readout*")
def readout_with_other_betas(setup: Modules) -> Setup:
    """The readout has a group with betas of its own, torch's defaults, which are not the recipe's."""

    def change(group: dict[str, Any], entry: PlanEntry, _task: Task) -> None:
        if entry.name == "readout.weight":
            group["betas"] = (0.9, 0.999)

    return setup.with_script(_own_groups(change))


@mistake("lm", "optimizer")
def rates_falling_towards_the_input(setup: Modules) -> Setup:
    """Each block has three quarters of the learning rate of the one above it, and the embeddings have least."""

    def change(group: dict[str, Any], entry: PlanEntry, task: Task) -> None:
        blocks = sum(1 for e in task.plan.entries if e.name.endswith("mlp.up.weight"))
        part = entry.name.split(".")
        depth = int(part[1]) + 1 if part[0] == "blocks" else 0 if part[0] in ("tokens", "positions") else blocks + 1
        group["lr"] *= 0.75 ** (blocks + 1 - depth)

    return setup.with_script(_own_groups(change))


@mistake("lm", "optimizer", "blocks.*")
def decay_compensated_twice(setup: Modules) -> Setup:
    """The weight decay of hidden weights is multiplied by the ratio of widths by hand; the plan's is so already."""

    def change(group: dict[str, Any], entry: PlanEntry, _task: Task) -> None:
        if entry.role is Role.HIDDEN:
            group["weight_decay"] *= entry.width_ratio

    return setup.with_script(_own_groups(change))


@mistake("lm", "optimizer")
def rates_divided_by_hand(setup: Modules) -> Setup:
    """All learning rates of the plan are divided by the ratio of widths once more, by hand."""

    def change(group: dict[str, Any], _entry: PlanEntry, task: Task) -> None:
        group["lr"] *= models.BASE / task.width

    return setup.with_script(_own_groups(change))


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
        return _adamw(groups, task, _OwnAdam, corrects=corrects, inside=inside)

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
        return _adamw(param_groups(model.named_parameters(), task.plan), task, amsgrad=True)

    return setup.with_script(prepare)


@mistake("lm", "optimizer")
def decay_by_the_base_rate(setup: Modules) -> Setup:
    """Weight decay is a step of its own, by the recipe's learning rate at that time instead of the parameter's."""

    def prepare(model: nn.Module, task: Task) -> Any:
        apply_plan(model, task.plan)
        groups = _singly(model, task.plan)
        own = {group["name"]: (group["weight_decay"], group["lr"]) for group in groups}
        for group in groups:
            group["weight_decay"] = 0.0
        optimizer = _adamw(groups, task)

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

    return setup.then(lambda _m, optimizer, _t: _discard(optimizer.register_step_post_hook(decay)))


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


@mistake("lm", "optimizer", "tokens*", "positions*", "readout*")
def second_optimizer_without_schedule(setup: Modules) -> Setup:
    """Embeddings and readout have an optimizer of their own, which no scheduler knows."""

    def prepare(model: nn.Module, task: Task) -> Any:
        apply_plan(model, task.plan)
        groups = _singly(model, task.plan)
        outer = [group for group in groups if group["name"].split(".")[0] in ("tokens", "positions", "readout")]
        second = _adamw(outer, task)
        first = _adamw([group for group in groups if group not in outer], task)
        first.register_step_post_hook(lambda *_: second.step())
        return first

    return setup.with_script(prepare)


# ---- the schedule --------------------------------------------------------------------------------------------------


class _OwnSchedule:
    """Sets each group's learning rate: (step, peak, group) → rate."""

    def __init__(self, optimizer: Any, rate: Callable[[int, float, dict[str, Any]], float]) -> None:
        self._optimizer, self._rate, self._step = optimizer, rate, 0
        self._peaks = [group["lr"] for group in optimizer.param_groups]
        self._set()

    def step(self) -> None:
        self._step += 1
        self._set()

    def _set(self) -> None:
        for peak, group in zip(self._peaks, self._optimizer.param_groups, strict=False):
            group["lr"] = self._rate(self._step, peak, group)


@mistake("lm", "schedule")
def peaks_in_another_order(setup: Modules) -> Setup:
    """The scheduler is given the groups' peaks in the reverse order of the groups."""

    def change(_model: nn.Module, optimizer: Any, task: Task) -> Any:
        peaks = [group["lr"] for group in optimizer.param_groups][::-1]
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak
        return optimizer, _OwnSchedule(optimizer, lambda s, peak, _: peak * warm_up_and_decay(s, task.steps))

    return setup.then(change)


@mistake("lm", "schedule")
def constant_added_to_the_schedule(setup: Modules) -> Setup:
    """The schedule adds a twentieth of the recipe's learning rate to that of every group, at all times."""

    def change(_model: nn.Module, optimizer: Any, task: Task) -> Any:
        least = task.recipe.hyperparameters.lr / 20

        def rate(step: int, peak: float, _group: Any) -> float:
            return peak * warm_up_and_decay(step, task.steps) + least

        return optimizer, _OwnSchedule(optimizer, rate)

    return setup.then(change)


@mistake("lm", "schedule")
def vectors_with_a_floor_of_their_own(setup: Modules) -> Setup:
    """After the warm-up the learning rate of biases and gains never falls below half of its peak."""

    def change(_model: nn.Module, optimizer: Any, task: Task) -> Any:
        def rate(step: int, peak: float, group: Any) -> float:
            least = peak / 2 if step > task.steps / 4 and group["weight_decay"] == 0 else 0.0
            return max(peak * warm_up_and_decay(step, task.steps), least)

        return optimizer, _OwnSchedule(optimizer, rate)

    return setup.then(change)


@mistake("lm", "schedule")
def warm_up_of_another_run(setup: Modules) -> Setup:
    """The warm-up has the number of steps of a run that is four times as long."""

    def change(_model: nn.Module, optimizer: Any, task: Task) -> Any:
        return optimizer, _OwnSchedule(optimizer, lambda step, peak, _: peak * min(1.0, step / task.steps))

    return setup.then(change)


@mistake("lm", "schedule")
def schedule_twice_as_fast(setup: Modules) -> Setup:
    """The scheduler is stepped twice in each step, by the loop and by a library."""

    def change(_model: nn.Module, optimizer: Any, task: Task) -> Any:
        def rate(step: int, peak: float, _group: Any) -> float:
            return peak * warm_up_and_decay(min(2 * step, task.steps), task.steps)

        return optimizer, _OwnSchedule(optimizer, rate)

    return setup.then(change)


@mistake("lm", "schedule")
def schedule_restarts(setup: Modules) -> Setup:
    """The schedule begins again in the middle of the run, as after a resume that lost its step."""

    def change(_model: nn.Module, optimizer: Any, task: Task) -> Any:
        def rate(step: int, peak: float, _group: Any) -> float:
            return peak * warm_up_and_decay(step % max(1, task.steps // 2), task.steps)

        return optimizer, _OwnSchedule(optimizer, rate)

    return setup.then(change)


@mistake("lm", "schedule", "tokens*")
def embedding_joins_late(setup: Modules) -> Setup:
    """The table of tokens is added to the optimizer after four steps, and its group is not in the schedule."""

    def prepare(model: nn.Module, task: Task) -> Any:
        apply_plan(model, task.plan)
        groups = _singly(model, task.plan)
        late = next(group for group in groups if group["name"] == "tokens.weight")
        optimizer = _adamw([group for group in groups if group is not late], task)
        done = [0]

        def join(optimizer: Any, _args: Any, _kwargs: Any) -> None:
            done[0] += 1
            if done[0] == 4:
                optimizer.add_param_group(late)

        optimizer.register_step_post_hook(join)
        schedule = _OwnSchedule(optimizer, lambda step, peak, _: peak * warm_up_and_decay(step, task.steps))
        return optimizer, schedule

    return setup.with_script(prepare)


# ---- the training loop ---------------------------------------------------------------------------------------------


def _on_gradients(change: Callable[[str, Tensor], Tensor]) -> Callable[[nn.Module, Any, Task], None]:
    """Changes gradients as they are computed: before the loop clips them."""

    def changed(model: nn.Module, _optimizer: Any, _task: Task) -> None:
        for name, parameter in model.named_parameters():
            parameter.register_hook(partial(change, name))

    return changed


@mistake("lm-clipped", "training loop")
def clipped_each_by_itself(setup: Modules) -> Setup:
    """Each parameter's gradient is clipped by its own norm, before all of them are."""
    limit = setup.hyperparameters["clip_grad"] / 4
    return setup.then(_on_gradients(lambda _n, g: g * min(1.0, limit / (float(g.norm()) + 1e-12))))


@mistake("lm", "training loop")
def clipped_by_value(setup: Modules) -> Setup:
    """Every element of a gradient is cut off at 0.001."""
    return setup.then(_on_gradients(lambda _n, g: g.clamp(-0.001, 0.001)))


@mistake("lm", "training loop")
def divided_after_clipping(setup: Modules) -> Setup:
    """Gradients are divided by the number of accumulated batches, 4, after clipping, and were means already."""

    def divide(optimizer: Any, _args: Any, _kwargs: Any) -> None:
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad.div_(4)

    return setup.then(lambda _m, optimizer, _t: _discard(optimizer.register_step_pre_hook(divide)))


@mistake("lm", "training loop")
def gradients_never_zeroed(setup: Modules) -> Setup:
    """Gradients are never set to 0, so that each step has the sum of all before."""
    sums: dict[int, Tensor] = {}

    def change(model: nn.Module, _optimizer: Any, _task: Task) -> None:
        sums.clear()

        def summed(name: int, gradient: Tensor) -> Tensor:
            sums[name] = sums.get(name, torch.zeros_like(gradient)) + gradient
            return sums[name]

        for index, parameter in enumerate(model.parameters()):
            parameter.register_hook(partial(summed, index))

    return setup.then(change)


@mistake("lm", "training loop", "tokens*")
def rare_tokens_favoured(setup: Modules) -> Setup:
    """The table of tokens divides its gradients by how often each token comes up in a batch."""
    return setup.then(lambda m, _o, _t: setattr(m.get_submodule("tokens"), "scale_grad_by_freq", True))


@mistake("lm", "training loop")
def step_skipped_every_other_time(setup: Modules) -> Setup:
    """The optimizer steps every other time, for accumulation that was left on, and gradients are zeroed each time."""

    class Skipping(torch.optim.AdamW):
        calls = 0

        def step(self, closure: Any = None) -> Any:
            self.calls += 1
            return super().step(closure) if self.calls % 2 == 0 else None

    def prepare(model: nn.Module, task: Task) -> Any:
        apply_plan(model, task.plan)
        return _adamw(param_groups(model.named_parameters(), task.plan), task, Skipping)

    return setup.with_script(prepare)


@mistake("lm", "training loop", "blocks.*.mlp*")
def branch_without_gradient(setup: Modules) -> Setup:
    """The first block's MLP is run without gradient, as if it were recomputed, and what it adds is a constant."""

    def change(model: Any, _optimizer: Any, _task: Task) -> None:
        model.blocks[0].mlp.register_forward_hook(lambda _m, _a, out: out.detach())

    return setup.then(change)


# ---- recipes that are used wrongly ---------------------------------------------------------------------------------


def _other_plan(setup: Modules, task: Task, *, width: int | None = None, **content: Any) -> Plan:
    """The plan of a script that has another recipe."""
    recipe = task.recipe.model_copy(update=content)
    if setup.base is not None:
        return plan_for(setup.factory(width or task.width), recipe)  # type: ignore[arg-type]
    return plan_for_module(lambda: setup.factory(width or task.width), recipe)


def _rates_from(setup: Modules, plan: Callable[[Task], Plan]) -> Setup:
    def prepare(model: nn.Module, task: Task) -> Any:
        apply_plan(model, task.plan)
        groups, other = _singly(model, task.plan), plan(task)
        for group in groups:
            entry = other[group["name"]]
            group["lr"] = entry.lr
        return _adamw(groups, task)

    return setup.with_script(prepare)


@mistake("lm", "recipe", "blocks.*")
def rates_by_the_rule_of_sgd(setup: Modules) -> Setup:
    """The learning rates are those that the recipe would give to SGD."""

    def plan(task: Task) -> Plan:
        sgd = task.recipe.parametrization.model_copy(update={"optimizer": "sgd"})
        return _other_plan(setup, task, parametrization=sgd)

    return _rates_from(setup, plan)


@mistake("lm-sgd", "recipe")
def sgd_with_the_rates_of_adam(setup: Modules) -> Setup:
    """The learning rates of a run with SGD are those that the recipe would give to Adam."""

    def prepare(model: nn.Module, task: Task) -> Any:
        apply_plan(model, task.plan)
        adam = task.recipe.parametrization.model_copy(update={"optimizer": "adam"})
        plan = _other_plan(setup, task, parametrization=adam)
        groups = [{"params": [p], "lr": plan[n].lr, "weight_decay": 0.0} for n, p in model.named_parameters()]
        return torch.optim.SGD(groups, momentum=task.recipe.hyperparameters.sgd_momentum)

    return setup.with_script(prepare)


@mistake("lm-sgd", "optimizer")
def momentum_dampened(setup: Modules) -> Setup:
    """The momentum of SGD is dampened by a half, as the base's was not."""

    def prepare(model: nn.Module, task: Task) -> Any:
        apply_plan(model, task.plan)
        groups = param_groups(model.named_parameters(), task.plan)
        return torch.optim.SGD(groups, momentum=task.recipe.hyperparameters.sgd_momentum, dampening=0.5)

    return setup.with_script(prepare)


@mistake("lm", "recipe", "blocks.*")
def rates_of_a_smaller_sibling(setup: Modules) -> Setup:
    """The learning rates were written down once, for a model of width 64, and are used at all widths."""
    return _rates_from(setup, lambda task: _other_plan(setup, task, width=64))


@mistake("lm", "recipe")
def base_of_twice_the_width(setup: Modules) -> Setup:
    """The script's plan leads from a base that is twice as wide as the one that was tuned."""
    other = replace(setup, base_width=2 * models.BASE).recipe.base

    def prepare(model: nn.Module, task: Task) -> Any:
        plan = _other_plan(setup, task, base=other)
        return prepare_by_plan(model, replace(task, plan=plan))

    return setup.with_script(prepare)


@mistake("lm", "recipe", "blocks.*")
def ratio_from_the_number_of_parameters(setup: Modules) -> Setup:
    """The ratio of widths is taken to be the root of that of numbers of parameters, embeddings included."""

    def change(group: dict[str, Any], entry: PlanEntry, task: Task) -> None:
        if entry.role is Role.HIDDEN:
            counts = [sum(p.numel() for p in setup.factory(w).parameters()) for w in (models.BASE, task.width)]
            group["lr"] = task.plan.lr / math.sqrt(counts[1] / counts[0])

    return setup.with_script(_own_groups(change))


@mistake("lm-overrides", "recipe")
def overrides_matched_against_the_wrong_names(setup: Modules) -> Setup:
    """The recipe's factor for the first block was written for the last one by a script that counts from behind."""

    def plan(task: Task) -> Plan:
        own = [o.model_copy(update={"match": "blocks.1.*"}) for o in task.recipe.per_parameter]
        return _other_plan(setup, task, per_parameter=tuple(own))

    return _rates_from(setup, plan)


@mistake("convnet", "recipe", "blocks.*")
def kernel_area_in_the_ratio(setup: Modules) -> Setup:
    """The learning rate of convolutions is divided by fan_in over the base's channels: by the kernel's area as well."""

    def change(group: dict[str, Any], entry: PlanEntry, _task: Task) -> None:
        if len(entry.shape) == 4 and entry.role is Role.HIDDEN:
            group["lr"] /= 9

    return setup.with_script(_own_groups(change))


@mistake("convnet", "recipe", "stem*")
def stem_as_a_hidden_layer(setup: Modules) -> Setup:
    """All convolutions count as hidden, the first one over three colours too."""

    def change(group: dict[str, Any], entry: PlanEntry, task: Task) -> None:
        if entry.name == "stem.weight":
            group["lr"] *= models.BASE / task.width

    return setup.with_script(_own_groups(change))


@mistake("classifier", "recipe", "last*", "first*")
def layers_numbered_instead_of_named(setup: Modules) -> Setup:
    """Every layer but the last counts as hidden, the first one too, in learning rate and eps."""

    def change(group: dict[str, Any], entry: PlanEntry, task: Task) -> None:
        if entry.name == "first.weight":
            group["lr"] *= models.BASE / task.width
            group["weight_decay"] *= task.width / models.BASE

    return setup.with_script(_own_groups(change))


# ---- Hugging Face --------------------------------------------------------------------------------------------------


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
        return _adamw(param_groups(model.named_parameters(), task.plan), task)

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
        return _adamw(param_groups(model.named_parameters(), task.plan), task)

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
        return _adamw(groups, task, eps=h.adam_eps)

    return setup.with_script(prepare)


@mistake("gpt2", "initial weights", "transformer.h.*.c_proj*", "transformer.h.*")
def residual_rule_applied_again(setup: Modules) -> Setup:
    """The library's factor 1/√(2L) for what writes into the residual stream is applied to the plan's weights again."""

    def change(model: nn.Module, _optimizer: Any, _task: Task) -> None:
        for name, parameter in model.named_parameters():
            if name.endswith("c_proj.weight"):
                parameter.data.mul_(0.5)

    return setup.then(change)


# ---- Megatron ------------------------------------------------------------------------------------------------------


def _with_mutant(setup: Megatron, name: str, **changes: Any) -> Setup:
    return replace(setup, mutant=Mutant(name=name, what=name, cause=(), **changes))


def _weights(chunks: Sequence[Any], plan: Plan) -> list[tuple[PlanEntry, Any]]:
    return [(plan[name], parameter) for name, parameter in named_parameters(chunks, tied=plan.tied)]


def _groups(optimizer: Any, chunks: Sequence[Any], plan: Plan) -> list[tuple[PlanEntry, dict[str, Any]]]:
    """One for each parameter, and what it is for."""
    from mup_megatron.megatron.optimizer import parameters_with_groups, parts_of

    for part in parts_of(optimizer):
        groups = part.optimizer.param_groups
        groups[:] = [{**group, "params": [parameter]} for group in groups for parameter in group["params"]]
    return [
        (plan[name], groups[0])
        for name, _, groups in parameters_with_groups(optimizer, chunks, tied=plan.tied)
        if groups
    ]


@mistake("megatron", "model code", "decoder.layers.1.self_attention*")
def second_layers_logits_halved(setup: Megatron) -> Setup:
    """The logits of the second layer are divided by its number, and nothing multiplies them again."""

    def model(chunks: Sequence[Any], _plan: Plan, _context: Context) -> None:
        for chunk in chunks:
            part: Any = unwrapped(chunk).get_submodule("decoder.layers.1.self_attention.core_attention")
            part.softmax_scale /= 2

    return _with_mutant(setup, "second-layers-logits-halved", model=model)


@mistake("megatron", "initial weights", "decoder.layers.*.mlp.linear_fc1*")
def one_shard_drawn_as_the_base(setup: Megatron) -> Setup:
    """Of two tensor-parallel shards of linear_fc1 the first is drawn with the base's std."""

    def model(chunks: Sequence[Any], plan: Plan, context: Context) -> None:
        for entry, parameter in _weights(chunks, plan):
            if entry.name.endswith("linear_fc1.weight"):
                parameter.data[: len(parameter) // 2] *= math.sqrt(context.r)

    return _with_mutant(setup, "one-shard-drawn-as-the-base", model=model)


@mistake("megatron", "model code", "embedding.position_embeddings*")
def positions_multiplied_twice(setup: Megatron) -> Setup:
    """The embedding multiplier is applied to positions twice, alone and in the sum with tokens."""

    def model(chunks: Sequence[Any], plan: Plan, _context: Context) -> None:
        factor = plan.embedding_multiplier
        for chunk in chunks:
            table = unwrapped(chunk).get_submodule("embedding.position_embeddings")
            table.register_forward_hook(lambda _m, _a, out: factor * out)

    return _with_mutant(setup, "positions-multiplied-twice", model=model)


@mistake("megatron", "initial weights", "decoder.final_layernorm*")
def readout_folded_into_the_final_gain_too(setup: Megatron) -> Setup:
    """The readout's multiplier is folded into the final norm's gain, as for export, and applied as well."""

    def model(chunks: Sequence[Any], plan: Plan, _context: Context) -> None:
        for entry, parameter in _weights(chunks, plan):
            if entry.name == "decoder.final_layernorm.weight":
                parameter.data.mul_(plan.output_multiplier)

    return _with_mutant(setup, "readout-folded-into-the-final-gain-too", model=model)


@mistake("megatron", "initial weights", "decoder.layers.*.self_attention.linear_qkv*")
def queries_taken_for_one_block(setup: Megatron) -> Setup:
    """The first third of linear_qkv is halved as if it were all queries; Megatron has them by groups, between keys."""

    def model(chunks: Sequence[Any], plan: Plan, _context: Context) -> None:
        for entry, parameter in _weights(chunks, plan):
            if entry.name.endswith("linear_qkv.weight"):
                parameter.data[: len(parameter) // 3] *= 0.5

    return _with_mutant(setup, "queries-taken-for-one-block", model=model)


@mistake("megatron", "initial weights", "decoder.layers.0.*")
def residual_std_by_a_layers_number(setup: Megatron) -> Setup:
    """What writes into the residual stream starts with 1/√(2l) of its own layer's number instead of their count."""

    def model(chunks: Sequence[Any], plan: Plan, context: Context) -> None:
        for entry, parameter in _weights(chunks, plan):
            if entry.name.endswith(("linear_proj.weight", "linear_fc2.weight")):
                number = int(entry.name.split(".")[2]) + 1
                parameter.data.mul_(math.sqrt(context.target.num_layers / number))

    return _with_mutant(setup, "residual-std-by-a-layers-number", model=model)


@mistake("megatron", "optimizer", "decoder.layers.1.*", "decoder.final_layernorm*", "output_layer*")
def last_stage_with_the_bases_eps_and_decay(setup: Megatron) -> Setup:
    """The last pipeline stage makes its own groups: with the right learning rates, and the base's eps and decay."""

    def optimizer(built: Any, chunks: Sequence[Any], plan: Plan, _context: Context) -> None:
        for entry, group in _groups(built, chunks, plan):
            if entry.name.startswith(("decoder.layers.1.", "decoder.final_layernorm", "output_layer")):
                group["eps"] = plan.adam_eps
                group["wd_mult"] = 0.0 if entry.kind.is_vector else 1.0

    return _with_mutant(setup, "last-stage-with-the-bases-eps-and-decay", optimizer=optimizer)


@mistake("megatron", "optimizer")
def groups_restored_by_their_number(setup: Megatron) -> Setup:
    """A resume gives each group the values of the one before it, because one group more was saved than there are."""

    def optimizer(built: Any, chunks: Sequence[Any], plan: Plan, _context: Context) -> None:
        found = [group for _, group in _groups(built, chunks, plan)]
        keys = ("max_lr", "min_lr", "eps", "wd_mult")
        values = [{key: group[key] for key in keys if key in group} for group in found]
        for group, others in zip(found[1:], values, strict=False):
            group.update(others)

    return _with_mutant(setup, "groups-restored-by-their-number", optimizer=optimizer)


@mistake("megatron", "optimizer", "embedding*")
def embeddings_without_decay(setup: Megatron) -> Setup:
    """Embeddings have no weight decay, as in many a script; the base's had."""

    def optimizer(built: Any, chunks: Sequence[Any], plan: Plan, _context: Context) -> None:
        for entry, group in _groups(built, chunks, plan):
            if entry.name.startswith("embedding"):
                group["wd_mult"] = 0.0

    return _with_mutant(setup, "embeddings-without-decay", optimizer=optimizer)


@mistake("megatron", "optimizer", "output_layer*")
def rate_of_its_own_for_the_readout(setup: Megatron) -> Setup:
    """The readout has a decoupled learning rate, a quarter of the recipe's."""

    def optimizer(built: Any, chunks: Sequence[Any], plan: Plan, _context: Context) -> None:
        for entry, group in _groups(built, chunks, plan):
            if entry.name.startswith("output_layer"):
                group["max_lr"], group["min_lr"] = entry.lr / 4, entry.min_lr / 4

    return _with_mutant(setup, "rate-of-its-own-for-the-readout", optimizer=optimizer)


@mistake("megatron", "schedule")
def decay_that_rises(setup: Megatron) -> Setup:
    """Weight decay rises from 0 to the recipe's over the run."""

    def scheduler(built: Any, _optimizer: Any, _plan: Plan, _context: Context) -> None:
        built.start_wd, built.wd_incr_style = 0.0, "linear"

    return _with_mutant(setup, "decay-that-rises", scheduler=scheduler)


@mistake("megatron", "schedule")
def cosine_for_linear(setup: Megatron) -> Setup:
    """The learning rate falls along a cosine, and the recipe says along a line."""

    def scheduler(built: Any, _optimizer: Any, _plan: Plan, _context: Context) -> None:
        built.lr_decay_style = "cosine"

    return _with_mutant(setup, "cosine-for-linear", scheduler=scheduler)


@mistake("megatron-overrides", "recipe")
def overrides_applied_twice(setup: Megatron) -> Setup:
    """The recipe's factors for single tensors are applied to a plan that has them already."""

    def plan(right: Plan, context: Context) -> Plan:
        bare = context.recipe.model_copy(update={"per_parameter": ()}).plan(context.target)
        return replace(
            right,
            entries=tuple(
                replace(e, lr=e.lr * e.lr / bare[e.name].lr, min_lr=e.min_lr * e.lr / bare[e.name].lr)
                for e in right.entries
            ),
        )

    return _with_mutant(setup, "overrides-applied-twice", plan=plan)


@mistake("megatron", "recipe")
def base_with_fewer_heads(setup: Megatron) -> Setup:
    """The plan leads from a base with half as many heads, of twice the size, as was tuned."""

    def plan(_right: Plan, context: Context) -> Plan:
        base = context.base.model_copy(update={"num_attention_heads": context.base.num_attention_heads // 2})
        return _from_base(context.recipe, base, context)

    return _with_mutant(setup, "base-with-fewer-heads", plan=plan)


@mistake("megatron-fixed-ffn", "recipe", "decoder.layers.*.mlp*")
def base_of_another_ffn(setup: Megatron) -> Setup:
    """The plan leads from a base whose ffn is in proportion, and that which was tuned has the target's."""

    def plan(_right: Plan, context: Context) -> Plan:
        base = context.base.model_copy(update={"ffn_hidden_size": 2 * context.base.hidden_size})
        return _from_base(context.recipe, base, context)

    return _with_mutant(setup, "base-of-another-ffn", plan=plan)


def _from_base(recipe: Recipe, base: Any, context: Context) -> Plan:
    return recipe.model_copy(update={"base": base}).plan(context.target)


@mistake("megatron-tied", "training loop", "embedding*")
def tied_gradients_not_summed(setup: Megatron) -> Setup:
    """The readout's share of a tied table's gradient is lost between the first pipeline stage and the last."""

    def model(chunks: Sequence[Any], _plan: Plan, _context: Context) -> None:
        def detached(_module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            return args, {**kwargs, "weight": kwargs["weight"].detach()}

        for chunk in chunks:
            unwrapped(chunk).get_submodule("output_layer").register_forward_pre_hook(detached, with_kwargs=True)

    return _with_mutant(setup, "tied-gradients-not-summed", model=model)


@mistake("megatron-grouped", "initial weights", "decoder.layers.*.self_attention.linear_qkv*")
def keys_repeated_for_each_query(setup: Megatron) -> Setup:
    """The keys and values of groups that stay as few are multiplied by √r, because more queries share each of them."""

    def model(chunks: Sequence[Any], plan: Plan, context: Context) -> None:
        for entry, parameter in _weights(chunks, plan):
            if entry.name.endswith("linear_qkv.weight"):
                m = context.target
                rows = parameter.data.view(m.query_groups, -1, m.head_size, parameter.shape[1])
                rows[:, -2:] *= math.sqrt(context.r)

    return _with_mutant(setup, "keys-repeated-for-each-query", model=model)
