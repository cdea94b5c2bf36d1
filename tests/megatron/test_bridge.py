"""A recipe in Megatron-Bridge's configuration: what is written, what is put into its places, and what stops the run."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
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


def _nothing(config: Any) -> None: ...


def _outcome(tuned: Recipe, before: Change, after: Change, edit: Any, provider: bool = True) -> list[float] | str:
    """The losses of a run, or the sentence that stops it."""
    from mup_megatron.megatron.bridge import use_recipe

    config = bridge.container(WIDE, provider=provider)
    try:
        before(config)
        callback = use_recipe(config, tuned, WIDE)
        after(config)
        return bridge.pretrain(config, [callback], edit)
    except InputError as error:
        return str(error)


# ---- the run -------------------------------------------------------------------------------------------------------


def _trained() -> list[Any]:
    stock = bridge.pretrain(bridge.container(WIDE), [])
    return [stock, *(_outcome(TUNED, _nothing, _nothing, None, provider) for provider in (True, False))]


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
    planned = bridge.pretrain(config, [use_recipe(config, plain, BASE)])
    by_hand = bridge.container(BASE)
    by_hand.optimizer, by_hand.scheduler = config.optimizer, config.scheduler
    return bridge.pretrain(by_hand, []), planned


def test_at_the_base_it_changes_no_digit() -> None:
    stock, planned = run_ranks(_at_base, 1)[0]
    assert planned == stock


def _two_ranks() -> list[float]:
    from mup_megatron.megatron.bridge import use_recipe

    config = bridge.container(WIDE, layout=Layout(tp=2, sequence_parallel=True, distributed_optimizer=True))
    return bridge.pretrain(config, [use_recipe(config, TUNED, WIDE)])


def test_it_trains_on_two_tensor_parallel_ranks_under_the_guard() -> None:
    first, second = run_ranks(_two_ranks, 2)
    assert first == second
    assert len(first) == bridge.ITERATIONS


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
    edit: Callable[[Run, int], None] | None = None
    tuned: Recipe = TUNED


class Own(bridge.OptimizerConfigOverrideProvider):
    """Overrides of a user's own."""


def _own_overrides(config: Any) -> None:
    config.optimizer_config_override_provider = Own()


def _stock_overrides(config: Any) -> None:
    config.optimizer_config_override_provider = bridge.OptimizerConfigOverrideProvider()


def _twice(config: Any) -> None:
    from mup_megatron.megatron.bridge import use_recipe

    use_recipe(config, TUNED, WIDE)


def _one_rate(run: Run, step: int) -> None:
    if step == 3:
        for group in run.optimizer.param_groups:
            group["max_lr"] = 0.01


def _set(section: str, **values: Any) -> Change:
    return lambda config: vars(getattr(config, section)).update(values)


MISTAKES: Mapping[str, Mistake] = {
    "its own μP": Mistake("Megatron's own μP is on", before=_set("model", use_mup=True)),
    "its own μP, later": Mistake("Megatron's own μP is on", after=_set("model", use_mup=True)),
    "overrides of one's own": Mistake("Own gives the optimizer overrides of its own", before=_own_overrides),
    "twice": Mistake("called on this configuration already", after=_twice),
    "adapters": Mistake("adapters train none of them", before=lambda config: setattr(config, "peft", object())),
    "an old container": Mistake(
        "0.3 or later", before=lambda config: delattr(config, "optimizer_config_override_provider")
    ),
    "another horizon": Mistake(
        "horizon",
        tuned=recipe(
            {
                **TUNED.model_dump(exclude_unset=True),
                "training": {"train_iters": 8, "global_batch_size": 8, "seq_length": 12},
                "horizon": {"rule": "none", "tokens": 1e6, "batch": 8},
            },
            source="test",
        ),
    ),
    "weights from elsewhere": Mistake(
        "perform_initialization is off", after=_set("model", perform_initialization=False)
    ),
    "a lost hook": Mistake("multiplier", after=lambda config: config.model._pre_wrap_hooks.clear()),
    "lost overrides": Mistake("All groups have one learning rate", after=_stock_overrides),
    "another rate": Mistake("lr: the optimizer is configured with 0.0003", after=_set("optimizer", lr=3e-4)),
    "the schedule's own decay": Mistake(
        "start_wd", after=_set("scheduler", start_weight_decay=0.033, end_weight_decay=0.033)
    ),
    "another warm-up": Mistake(
        "the length of the warm-up", after=_set("scheduler", lr_warmup_fraction=None, lr_warmup_iters=1)
    ),
    "other betas": Mistake("Adam's betas", after=_set("optimizer", adam_beta2=0.95)),
    "a rate that is lost on the way": Mistake("", edit=_one_rate),
}
_OF_017 = {name for name in MISTAKES if name.startswith("its own μP")}


def _outcomes() -> dict[str, list[float] | str]:
    named = {name: made for name, made in MISTAKES.items() if core_version() >= (0, 17, 0) or name not in _OF_017}
    return {name: _outcome(made.tuned, made.before, made.after, made.edit) for name, made in named.items()}


@pytest.fixture(scope="module")
def outcomes() -> dict[str, list[float] | str]:
    outcomes: dict[str, list[float] | str] = run_ranks(_outcomes, 1)[0]
    return outcomes


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_stops_the_run_with_its_reason(name: str, outcomes: dict[str, list[float] | str]) -> None:
    if name in _OF_017 and core_version() < (0, 17, 0):
        pytest.skip("megatron-core 0.16 has no μP of its own")
    told = outcomes[name]
    assert isinstance(told, str), f"it trained: {told}"
    assert MISTAKES[name].says in told
