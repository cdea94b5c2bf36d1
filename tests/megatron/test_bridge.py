"""A recipe in Megatron-Bridge's configuration: what is written, what is put into its places, and what stops the run."""

import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from support import bridge
from support.processes import run_ranks
from support.shapes import gpt
from support.stock import Layout, Run

from mup_megatron.errors import InputError
from mup_megatron.megatron.versions import core_version
from mup_megatron.recipe import Recipe, recipe

BASE = gpt(vocab_size=64)
WIDE = gpt(4, vocab_size=64)
TUNED = recipe(
    {
        "base": BASE.model_dump(exclude_unset=True),
        "hyperparameters": {
            "lr": 0.01,
            "min_lr": 0.001,
            "weight_decay": 0.2,
            "adam_beta2": 0.9,
            "clip_grad": 0.5,
            "init_method_std": 0.05,
            "output_multiplier": 2.0,
            "attention_multiplier": 1.5,
        },
        "schedule": {"lr_decay_style": "linear", "lr_warmup_fraction": 0.25},
    },
    source="test",
)


Change = Callable[[Any], None]
Edit = Callable[[Run, int], None]


def _nothing(config: Any) -> None: ...


def _set(section: str, **values: Any) -> Change:
    return lambda config: vars(getattr(config, section)).update(values)


@dataclass
class Outcome:
    """Of a run: its losses, up to the sentence that stopped it, if one did."""

    losses: list[float] = field(default_factory=list)
    refusal: str = ""
    written: list[str] = field(default_factory=list)
    """The fields that a `use_recipe` has changed and then refused."""


def _outcome(
    tuned: Recipe = TUNED,
    before: Change = _nothing,
    after: Change = _nothing,
    edit: Edit | None = None,
    *,
    provider: bool = True,
    resumed_at: int = 0,
) -> Outcome:
    from mup_megatron.megatron.bridge import use_recipe

    config, outcome = bridge.container(WIDE, provider=provider), Outcome()
    before(config)
    found = _fields(config)
    try:
        callback = use_recipe(config, tuned, WIDE)
    except InputError as error:
        now = _fields(config)
        return Outcome(refusal=str(error), written=[key for key in now if key not in found or now[key] != found[key]])
    try:
        after(config)
        for loss in bridge.pretrain(config, [callback], edit, resumed_at=resumed_at):
            outcome.losses.append(loss)
    except InputError as error:
        outcome.refusal = str(error)
    return outcome


def _fields(config: Any) -> dict[str, Any]:
    """Everything that a container holds, by section and field; lists as they are now."""
    sections = {"": config, **{name: part for name, part in vars(config).items() if hasattr(part, "__dict__")}}
    return {
        f"{name}.{key}": list(value) if isinstance(value, list) else value
        for name, section in sections.items()
        for key, value in vars(section).items()
    }


# ---- the run -------------------------------------------------------------------------------------------------------


def _trained() -> list[list[float]]:
    stock = bridge.pretrain(bridge.container(WIDE), [])
    return [[*stock], *(_outcome(provider=provider).losses for provider in (True, False))]


def test_a_provider_and_a_model_configuration_train_alike_and_not_as_without_a_plan() -> None:
    stock, of_provider, of_configuration = run_ranks(_trained, 1)[0]
    assert len(of_provider) == bridge.ITERATIONS, of_provider
    assert of_provider == of_configuration
    assert abs(of_provider[-1] - stock[-1]) > 1e-2


def _at_base() -> tuple[list[float], list[float]]:
    """Losses at the base with the recipe's values written by hand, and with the recipe."""
    from mup_megatron.megatron.bridge import use_recipe

    plain = TUNED.model_copy(
        update={
            "hyperparameters": TUNED.hyperparameters.model_copy(
                update={"output_multiplier": 1.0, "attention_multiplier": 1.0, "init_method_std": 0.02}
            )
        }
    )
    config = bridge.container(BASE)
    planned = [*bridge.pretrain(config, [use_recipe(config, plain, BASE)])]
    by_hand = bridge.container(BASE)
    by_hand.optimizer, by_hand.scheduler = config.optimizer, config.scheduler
    return [*bridge.pretrain(by_hand, [])], planned


def test_at_the_base_it_changes_no_digit() -> None:
    stock, planned = run_ranks(_at_base, 1)[0]
    assert planned == stock


def _two_ranks() -> list[float]:
    from mup_megatron.megatron.bridge import use_recipe

    config = bridge.container(WIDE, layout=Layout(tp=2, sequence_parallel=True, distributed_optimizer=True))
    return [*bridge.pretrain(config, [use_recipe(config, TUNED, WIDE)])]


def test_it_trains_on_two_tensor_parallel_ranks_under_the_guard() -> None:
    first, second = run_ranks(_two_ranks, 2)
    assert first == second
    assert len(first) == bridge.ITERATIONS


# ---- weights from a checkpoint, and a resumed run ------------------------------------------------------------------


def _other_weights(run: Run, step: int) -> None:
    """What a checkpoint brings: no draw of this recipe."""
    if step == 0:
        for parameter in run.chunks[0].parameters():
            parameter.data.mul_(1.5)


def _flat_after_three(run: Run, step: int) -> None:
    if step == 3:
        for group in run.optimizer.param_groups:
            group["max_lr"] = 0.01


def _loaded() -> dict[str, Outcome]:
    changes = {
        "finetune": _set("checkpoint", finetune=True),
        "pretrained_checkpoint": _set("checkpoint", pretrained_checkpoint="/checkpoints/own"),
        "drawn": _nothing,
    }
    return {
        "resumed": _outcome(edit=_other_weights, resumed_at=10_000),
        **{name: _outcome(after=change, edit=_other_weights) for name, change in changes.items()},
    }


def test_weights_are_compared_in_a_run_that_draws_them_and_in_no_other() -> None:
    loaded = run_ranks(_loaded, 1)[0]
    drawn = loaded.pop("drawn")
    assert "initial std should be" in drawn.refusal
    assert drawn.losses == []
    for name, outcome in loaded.items():
        assert outcome.refusal == "", name
        assert len(outcome.losses) == bridge.ITERATIONS


def _counted() -> tuple[list[float], str]:
    """A run, and then one that goes on from step 10,000 with the same callback; of the latter, losses and refusal."""
    from mup_megatron.megatron.bridge import use_recipe

    config, losses = bridge.container(WIDE), []
    callbacks = [use_recipe(config, TUNED, WIDE)]
    assert len([*bridge.pretrain(config, callbacks)]) == bridge.ITERATIONS
    try:
        for loss in bridge.pretrain(config, callbacks, _flat_after_three, resumed_at=10_000):
            losses.append(loss)
    except InputError as error:
        return losses, str(error)
    return losses, ""


def test_a_resumed_run_is_compared_again_after_steps_of_its_own() -> None:
    losses, refusal = run_ranks(_counted, 1)[0]
    assert "max_lr should be" in refusal
    assert len(losses) == 4


# ---- what is written -----------------------------------------------------------------------------------------------


def _written() -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    from mup_megatron.megatron.bridge import use_recipe

    config = bridge.container(WIDE)
    use_recipe(config, TUNED, WIDE)
    return (
        {key: getattr(config.optimizer, key) for key in ("lr", "min_lr", "weight_decay", "adam_beta2", "clip_grad")},
        vars(config.scheduler),
        {key: getattr(config.model, key) for key in ("init_method_std", "softmax_scale")},
    )


def test_the_recipe_wins_over_what_the_configuration_says_of_the_run() -> None:
    optimizer, scheduler, model = run_ranks(_written, 1)[0]
    assert optimizer == {"lr": 0.01, "min_lr": 0.001, "weight_decay": 0.2, "adam_beta2": 0.9, "clip_grad": 0.5}
    assert model == {"init_method_std": 0.05, "softmax_scale": TUNED.plan(WIDE).softmax_scale}
    assert scheduler["lr_decay_style"] == "linear"
    assert (scheduler["lr_warmup_fraction"], scheduler["lr_warmup_iters"]) == (0.25, 0)
    # The schedule's weight decay is what acts, whatever the optimizer's is.
    assert scheduler["start_weight_decay"] == scheduler["end_weight_decay"] == 0.2


def _saved() -> tuple[dict[str, str], str]:
    import importlib

    from mup_megatron.megatron.bridge import use_recipe

    config = bridge.container(WIDE)
    use_recipe(config, TUNED, WIDE)
    saved = config.optimizer_config_override_provider.to_cfg_dict()
    module, _, name = saved["_target_"].rpartition(".")
    try:
        getattr(importlib.import_module(module), name)().build_config_overrides(None)
    except InputError as error:
        return saved, str(error)
    return saved, "built"


def test_a_configuration_that_was_saved_and_read_back_does_not_run_without_its_plan() -> None:
    saved, told = run_ranks(_saved, 1)[0]
    assert list(saved) == ["_target_"]
    assert "Call use_recipe on it before pretrain." in told


# ---- what stops it -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mistake:
    """Something wrong in a configuration or a run, and a part of the sentence that stops it."""

    says: str
    before: Change = _nothing
    after: Change = _nothing
    edit: Edit | None = None
    tuned: Recipe = TUNED
    trains: int = 0
    """The steps before it is found."""


class Own(bridge.OptimizerConfigOverrideProvider):
    """Overrides of a user's own."""


def _own_overrides(config: Any) -> None:
    config.optimizer_config_override_provider = Own()


def _stock_overrides(config: Any) -> None:
    config.optimizer_config_override_provider = bridge.OptimizerConfigOverrideProvider()


def _stock_overrides_never_written_over(config: Any) -> None:
    _stock_overrides(config)
    config.scheduler.override_opt_param_scheduler = False


def _twice(config: Any) -> None:
    from mup_megatron.megatron.bridge import use_recipe

    use_recipe(config, TUNED, WIDE)


def _sharded(config: Any) -> None:
    config.dist.use_megatron_fsdp = True


def _fields_of_another_release(config: Any) -> None:
    del config.scheduler.lr_decay_iters, config.scheduler.lr_warmup_samples


def _sections_of_another_release(config: Any) -> None:
    del config.dist, config.checkpoint.finetune, config.optimizer_config_override_provider


def _of_another_run(rule: str) -> Recipe:
    run = {"train_iters": bridge.ITERATIONS, "global_batch_size": 8, "seq_length": WIDE.seq_length}
    horizon = {"rule": rule, "tokens": 2 * bridge.ITERATIONS * 8 * WIDE.seq_length, "batch": 8}
    return recipe({**TUNED.model_dump(exclude_unset=True), "training": run, "horizon": horizon}, source="test")


MISTAKES: Mapping[str, Mistake] = {
    "its own μP": Mistake("Megatron's own μP is on", before=_set("model", use_mup=True)),
    "its own μP, later": Mistake("Megatron's own μP is on", after=_set("model", use_mup=True)),
    "overrides of one's own": Mistake("Own gives the optimizer overrides of its own", before=_own_overrides),
    "twice": Mistake("called on this configuration already", after=_twice),
    "adapters": Mistake("adapters train none of them", before=lambda config: setattr(config, "peft", object())),
    "a container without sections": Mistake(
        "optimizer_config_override_provider, dist, checkpoint.finetune: not in this container. Take a release of "
        "Megatron-Bridge that has them; 0.6.2 was tried.",
        before=_sections_of_another_release,
    ),
    "a container without fields": Mistake(
        "lr_warmup_samples, lr_decay_iters: not in this container", before=_fields_of_another_release
    ),
    "a model without hooks": Mistake(
        "model.pre_wrap_hooks: not in this container. Take a release of Megatron-Bridge that has it",
        before=lambda config: setattr(config, "model", SimpleNamespace(seq_length=12)),
    ),
    "no length": Mistake("train_iters: missing", before=_set("train", train_iters=None)),
    "another horizon": Mistake("horizon.tokens: the recipe's values are for", tuned=_of_another_run("none")),
    "a batch that grows": Mistake(
        "rampup_batch_size: horizon's steps is a rule for one batch",
        before=_set("train", rampup_batch_size=[4, 4, 16]),
        tuned=_of_another_run("steps"),
    ),
    "weights that are not drawn": Mistake(
        "Turn it on; weights to go on from belong into checkpoint.pretrained_checkpoint.",
        after=_set("model", perform_initialization=False),
    ),
    "another draw": Mistake(
        "Drop init_method_xavier_uniform or the custom init method",
        after=_set("model", init_method=torch.nn.init.xavier_uniform_),
    ),
    "a lost hook": Mistake(
        "output_layer: multiplier should be 0.5 on its input and is none. The hook is gone",
        after=lambda config: config.model._pre_wrap_hooks.clear(),
    ),
    "lost overrides": Mistake(
        "That is the base's value: this group's own is lost. Leave optimizer_config_override_provider to use_recipe; "
        "after loading another run's checkpoint, start the optimizer anew (load_optim=False). If a checkpoint was "
        "loaded, override_opt_param_scheduler may have written over it: drop that.",
        after=_stock_overrides,
    ),
    "lost overrides, not overridden": Mistake(
        "All groups have one learning rate, so the plan's are lost. Leave optimizer_config_override_provider to",
        after=_stock_overrides_never_written_over,
    ),
    "a warm-up from a rate": Mistake("drop lr_warmup_init", after=_set("scheduler", lr_warmup_init=1e-4)),
    "another rate": Mistake("lr: the optimizer is configured with 0.0003", after=_set("optimizer", lr=3e-4)),
    "the schedule's own decay": Mistake(
        "start_wd should be 0.2 and is 0.033", after=_set("scheduler", start_weight_decay=0.033, end_weight_decay=0.033)
    ),
    "another warm-up": Mistake(
        "the length of the warm-up: 8 in the schedule, 16 by the recipe",
        after=_set("scheduler", lr_warmup_fraction=None, lr_warmup_iters=1),
    ),
    "other betas": Mistake(
        "adam_beta2: the optimizer is configured with 0.95, the recipe says 0.9.",
        after=_set("optimizer", adam_beta2=0.95),
    ),
    "a rate that is lost on the way": Mistake(
        "max_lr should be 0.0025 and is 0.01. That is the base's value", edit=_flat_after_three, trains=4
    ),
}
_OF_017 = {name for name in MISTAKES if name.startswith("its own μP")}


def _outcomes() -> dict[str, Outcome]:
    named = {name: made for name, made in MISTAKES.items() if core_version() >= (0, 17, 0) or name not in _OF_017}
    return {name: _outcome(made.tuned, made.before, made.after, made.edit) for name, made in named.items()}


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Outcome]:
    outcomes: dict[str, Outcome] = run_ranks(_outcomes, 1)[0]
    return outcomes


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_stops_the_run_with_its_reason(name: str, outcomes: dict[str, Outcome]) -> None:
    if name in _OF_017 and core_version() < (0, 17, 0):
        pytest.skip("megatron-core 0.16 has no μP of its own")
    outcome = outcomes[name]
    assert outcome.refusal, f"it trained: {outcome.losses}"
    assert MISTAKES[name].says in outcome.refusal
    assert len(outcome.losses) == MISTAKES[name].trains


def _of_older_core() -> Outcome:
    """FSDP with a Megatron-Core that wraps a model before a plan can be applied."""
    from mup_megatron.megatron import versions

    with mock.patch.object(versions, "known_release", return_value=(0, 18)):
        return _outcome(before=_sharded)


def test_fsdp_is_refused_where_a_plan_does_not_reach_its_weights() -> None:
    outcome = run_ranks(_of_older_core, 1)[0]
    assert outcome.refusal.startswith("use_megatron_fsdp: the plan does not reach these weights in Megatron-Core 0.18.")
    assert outcome.written == []


def test_the_tool_for_the_real_bridge_knows_its_cases() -> None:
    tool = Path(__file__).parents[2] / "tools" / "megatron-bridge-check"
    ended = subprocess.run([sys.executable, tool, "at the base", "adaptors"], capture_output=True, text=True)
    assert ended.returncode == 2
    assert "error: no such case: adaptors. There are at the base, without the plug-in; at the base;" in ended.stderr


def test_a_refusal_speaks_of_fields_not_of_a_command_line(outcomes: dict[str, Outcome]) -> None:
    for name, outcome in outcomes.items():
        for others in ("--", "command line", "initialize=", "config_overrides"):
            assert others not in outcome.refusal, name


def test_a_configuration_that_is_refused_is_as_it_was(outcomes: dict[str, Outcome]) -> None:
    assert {name: outcome.written for name, outcome in outcomes.items() if outcome.written} == {}
