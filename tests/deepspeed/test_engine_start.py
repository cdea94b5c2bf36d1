"""How an engine starts with an entry: however it is made, and with one sentence for what is wrong."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from support import ds_pipeline
from support.ds_models import BATCH, build, config, ds_config, recipe_for, train_engine, write
from support.ds_ranks import run_ranks

from mup_megatron.deepspeed.entry import Entry, configuration, drop_auto, entry_of, gradient_clipping, optimizer_params
from mup_megatron.deepspeed.versions import require_supported
from mup_megatron.errors import InputError
from mup_megatron.modules.weights import Initialize
from mup_megatron.recipe import Recipe


def _constructed_directly(recipe_path: str) -> bool:
    import deepspeed
    from deepspeed import DeepSpeedConfig, DeepSpeedEngine, initialize

    import mup_megatron.deepspeed

    config = ds_config() | {"mup": {"recipe": recipe_path}}
    imported_before, *_ = initialize(model=build("gpt2"), config=config)
    deepspeed.comm.barrier()
    own = DeepSpeedConfig(config)
    direct = DeepSpeedEngine(None, build("gpt2"), config=config, config_class=own)
    return None not in map(mup_megatron.deepspeed.plan_of, (imported_before, direct))


def test_an_engine_is_reached_however_it_is_made(tmp_path: Path) -> None:
    assert run_ranks(_constructed_directly, 1, write(recipe_for("gpt2"), tmp_path)) == [True]


def _without_optimizer(recipe: str) -> list[str]:
    import deepspeed

    import mup_megatron.deepspeed
    from mup_megatron.modules.applied import applied_plan

    content = {key: value for key, value in ds_config(mup={"recipe": recipe}).items() if key != "optimizer"}
    model = build("gpt2", 4)
    drawn = model.transformer.wte.weight.detach().clone()
    engine, *_ = deepspeed.initialize(model=model, config=content)
    assert mup_megatron.deepspeed.plan_of(engine) is None
    assert applied_plan(model) is not None
    assert torch.equal(engine.module.transformer.wte.weight, drawn)
    # What was applied once, as before a Trainer's evaluation, is not applied again.
    deepspeed.initialize(model=model, config=content)
    try:
        train_engine(engine, "gpt2", range(1))
    except (AssertionError, RuntimeError, AttributeError) as error:
        return [str(error)]
    return []


def test_an_engine_without_an_optimizer_has_the_multipliers_and_does_not_train(tmp_path: Path) -> None:
    (said,) = run_ranks(_without_optimizer, 1, write(recipe_for("gpt2"), tmp_path))
    assert said == ["must provide optimizer during init in order to use backward"]


def _with_a_target(recipe_path: str, targets: dict[str, str]) -> dict[str, list[str]]:
    """What the ranks say to each "target"; "" where an engine is built."""
    import deepspeed

    import mup_megatron.deepspeed  # noqa: F401

    found = {}
    for name, target in targets.items():
        content = ds_config(world_size=2) | {"mup": {"recipe": recipe_path, "target": target}}
        try:
            deepspeed.initialize(model=build("gpt2", 2), config=content)[0].destroy()
            said = ""
        except InputError as error:
            said = str(error)
        everywhere: list[str] = [""] * 2
        torch.distributed.all_gather_object(everywhere, said)
        found[name] = everywhere
    return found


def test_a_target_is_read_as_the_command_line_reads_it(tmp_path: Path) -> None:
    for name, width in (("right", 2), ("other", 4)):
        config("gpt2", width).save_pretrained(tmp_path / name)
    (tmp_path / "no model type").mkdir()
    (tmp_path / "no model type" / "config.json").write_text("{}")
    targets = {name: str(tmp_path / name) for name in ("right", "other", "no model type", "none")}
    targets["file"] = str(tmp_path / "right" / "config.json")
    found = run_ranks(_with_a_target, 2, write(recipe_for("gpt2"), tmp_path), targets)[0]
    assert found["right"] == found["file"] == ["", ""]
    assert "the model's shape is" in found["other"][0]
    assert "no model_type" in found["no model type"][0]
    assert "none" in found["none"][0]
    assert all(first == second for first, second in found.values())


def failing_on_the_second_rank() -> torch.nn.Module:
    """A target's factory with a mistake of its own."""
    if torch.distributed.get_rank() == 1:
        raise ValueError("no such file on this machine")
    return torch.nn.Linear(2, 2)


def _with_a_failing_factory(recipe_path: str) -> str:
    import deepspeed

    import mup_megatron.deepspeed  # noqa: F401

    entry = {"recipe": recipe_path, "target": f"{__name__}:failing_on_the_second_rank"}
    try:
        deepspeed.initialize(model=torch.nn.Linear(2, 2), config=ds_config(world_size=2) | {"mup": entry})
    except InputError as error:
        return str(error)
    return ""


def test_a_mistake_in_a_targets_factory_on_one_rank_ends_all(tmp_path: Path) -> None:
    path = write(ds_pipeline.recipe_for(tied=False), tmp_path)
    first, second = run_ranks(_with_a_failing_factory, 2, path, collective_s=20)
    assert first == second
    assert "ValueError: no such file on this machine" in first


def _without_a_configuration(recipe_path: str) -> str:
    from deepspeed import DeepSpeedEngine

    import mup_megatron.deepspeed  # noqa: F401

    try:
        DeepSpeedEngine(None, build("gpt2"), config=ds_config() | {"mup": {"recipe": recipe_path}})
    except InputError as error:
        return str(error)
    return ""


def test_an_engine_whose_entry_cannot_be_seen_is_refused(tmp_path: Path) -> None:
    (said,) = run_ranks(_without_a_configuration, 1, write(recipe_for("gpt2"), tmp_path))
    assert "config_class" in said


# ---- bad input -----------------------------------------------------------------------------------------------------

ADAM = {"type": "AdamW", "params": {"torch_adam": True}}


def _adam(**params: Any) -> dict[str, Any]:
    return {"optimizer": {"type": "AdamW", "params": {"torch_adam": True, **params}}}


BAD_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown key": (
        {"mup": {"recipe": "R", "recipie": "x"}},
        r'"mup": recipie: unknown key. Did you mean \'recipe\'\?',
    ),
    "no recipe": ({"mup": {"target": None}}, r'"mup": recipe: missing'),
    "no such recipe": ({"mup": {"recipe": "none.yaml"}}, "none.yaml"),
    "MuAdam": ({"optimizer": {"type": "MuAdam"}}, r'MuAdam is μP.*"type": "AdamW"'),
    "MuAdamW": ({"optimizer": {"type": "MuAdamW"}}, r'MuAdamW is μP.*"type": "AdamW"'),
    "MuSGD": ({"optimizer": {"type": "MuSGD"}}, r'MuSGD is μP.*"type": "SGD"'),
    "Lamb": ({"optimizer": {"type": "Lamb"}}, "the rules for Lamb are not those"),
    "OneBitAdam": ({"optimizer": {"type": "OneBitAdam"}}, "the rules for OneBitAdam are not those"),
    "Lion": ({"optimizer": {"type": "Lion"}}, "the rules for Lion are not those"),
    "Muon": ({"optimizer": {"type": "Muon"}}, "the rules for Muon are not those"),
    "SGD": ({"optimizer": {"type": "SGD"}}, "the rules for SGD are not those"),
    "coupled decay": ({"optimizer": {"type": "Adam", "params": {"adam_w_mode": False}}}, '"type": "AdamW"'),
    "lr": (_adam(lr=0.1), r'"optimizer.params.lr" is 0.1 and the recipe says 0.004'),
    "betas": (_adam(betas=[0.9, 0.999]), r'"optimizer.params.betas" is \[0.9, 0.999\] and the recipe says'),
    "eps": (_adam(eps=1e-8), r'"optimizer.params.eps"'),
    "weight decay": (_adam(weight_decay=0.0), r'"optimizer.params.weight_decay" is 0.0'),
    "momentum": (_adam(momentum=0.9), r'"optimizer.params.momentum": AdamW has no such value'),
    "clipping": ({"gradient_clipping": 1.0}, r'"gradient_clipping" is 1.0 and the recipe says 0.7'),
    "hybrid engine": ({"hybrid_engine": {"enabled": True}}, r'"hybrid_engine" is not supported'),
    "experts": ({"expert_parallel": {"enabled": True}}, r'"expert_parallel" is not supported'),
    "zenflow": (
        {"zero_optimization": {"stage": 2, "zenflow": {"topk_ratio": 0.1}}},
        r'"zero_optimization.zenflow" is not supported',
    ),
    "super offload": (
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "super_offload": True}}},
        r'"zero_optimization.offload_optimizer.super_offload" is not supported',
    ),
    "a ratio of offload": (
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}},
        r'"zero_optimization.offload_optimizer.ratio" is not supported',
    ),
    "tensor parallelism": ({"tensor_parallel": {"autotp_size": 2}}, r'"tensor_parallel.autotp_size" is not supported'),
    "a batch that is not the horizon's": ({"mup": {"recipe": "MOVED"}}, "this run's have"),
    "another head": ({"mup": {"recipe": "LLAMA"}}, "llama"),
    "another vocabulary": ({"mup": {"recipe": "VOCABULARY"}}, "vocab_size"),
    "more parameters": ({"mup": {"recipe": "MORE"}}, "tie_word_embeddings|lm_head"),
    "a schedule that flattens": (
        {"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 0.1}}},
        "warmup_max_lr is 0.1, and the recipe's lr is 0.004",
    ),
    "a schedule of objects": ({"scheduler": {"type": "LambdaLR", "params": {}}}, "LambdaLR"),
}


def moved_recipe(tuning: dict[str, int], horizon: dict[str, Any]) -> Recipe:
    content = recipe_for("gpt2").model_dump(mode="json")
    return Recipe.model_validate({**content, "training": tuning, "horizon": horizon})


def _with_tuned_betas(recipe_path: str) -> list[str]:
    """The betas of an engine of a recipe with a horizon, and what is said once they are those that were tuned."""
    import deepspeed

    import mup_megatron.deepspeed  # noqa: F401
    from mup_megatron.deepspeed.run import before_step, run_of

    engine, *_ = deepspeed.initialize(model=build("gpt2", 2), config=ds_config(mup={"recipe": recipe_path}))
    run = run_of(engine)
    assert run is not None
    before_step(engine, run)
    live = tuple(engine.optimizer.param_groups[0]["betas"])
    assert live == (run.recipe.moved.adam_beta1, run.recipe.moved.adam_beta2)
    h = run.recipe.hyperparameters
    for group in engine.optimizer.param_groups:
        group["betas"] = (h.adam_beta1, h.adam_beta2)
    try:
        before_step(engine, run)
    except InputError as error:
        return [str(error)]
    return []


def test_betas_are_moved_and_the_tuned_ones_are_noticed(tmp_path: Path) -> None:
    tuning = {"train_iters": 100, "global_batch_size": BATCH, "seq_length": 32}
    given = moved_recipe(tuning, {"rule": "steps", "tokens": 400 * BATCH * 32, "batch": BATCH})
    assert given.moved.adam_beta1 != given.hyperparameters.adam_beta1
    ((said,),) = run_ranks(_with_tuned_betas, 1, write(given, tmp_path))
    assert "betas of the group" in said
    assert f"should be {(given.moved.adam_beta1, given.moved.adam_beta2)}" in said


def _messages(configs: dict[str, dict[str, Any]]) -> dict[str, list[str]]:
    """What deepspeed.initialize says to each configuration, on every rank."""
    import deepspeed

    import mup_megatron.deepspeed  # noqa: F401

    found = {}
    for name, content in configs.items():
        try:
            deepspeed.initialize(model=build("gpt2", 2), config=content)
            message = "no error"
        except InputError as error:
            message = str(error)
        everywhere: list[str] = [""] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everywhere, message)
        found[name] = everywhere
    return found


@pytest.fixture(scope="module")
def messages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    folder = tmp_path_factory.mktemp("recipes")
    plain = recipe_for("gpt2")
    base = config("gpt2").to_dict()

    def with_base(**changes: Any) -> Recipe:
        content = plain.model_dump(mode="json")
        content["base"] = {**content["base"], **changes}
        return Recipe.model_validate(content)

    assert base["tie_word_embeddings"]
    tuning = {"train_iters": 100, "global_batch_size": BATCH, "seq_length": 32}
    longer = {"rule": "steps", "tokens": 400 * 2 * BATCH * 32, "batch": 2 * BATCH}
    paths = {
        "R": write(plain, folder),
        "MOVED": write(moved_recipe(tuning, longer), folder, "moved.yaml"),
        "LLAMA": write(recipe_for("llama"), folder, "llama.yaml"),
        "VOCABULARY": write(with_base(vocab_size=64), folder, "vocabulary.yaml"),
        "MORE": write(with_base(tie_word_embeddings=False), folder, "more.yaml"),
    }
    configs = {}
    for name, (changes, _) in BAD_CONFIGS.items():
        content = ds_config(world_size=2, mup={"recipe": "R"}) | changes
        content["mup"] = {**content["mup"]}
        if content["mup"].get("recipe") in paths:
            content["mup"]["recipe"] = paths[content["mup"]["recipe"]]
        configs[name] = content
    return run_ranks(_messages, 2, configs)[0]


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_a_bad_configuration_gets_one_sentence_on_every_rank(name: str, messages: dict[str, list[str]]) -> None:
    first, second = messages[name]
    assert re.search(BAD_CONFIGS[name][1], first), first
    assert first == second
    assert "\n" not in first


def _called_badly(recipe_path: str) -> dict[str, str]:
    import deepspeed
    from deepspeed.runtime.lr_schedules import WarmupLR

    import mup_megatron.deepspeed  # noqa: F401

    def message(**arguments: Any) -> str:
        model = arguments.pop("model", None) or build("gpt2", 2)
        content = ds_config() | {"mup": {"recipe": recipe_path}}
        given = {key: value(model) if callable(value) else value for key, value in arguments.items()}
        try:
            deepspeed.initialize(model=model, config=content, **given)
        except InputError as error:
            return str(error)
        return "no error"

    def all_but_one(model: Any) -> Any:
        return list(model.parameters())[1:]

    def flattening(model: Any) -> Any:
        return lambda optimizer: WarmupLR(optimizer, warmup_max_lr=0.004, warmup_num_steps=2)

    def floor(model: Any) -> Any:
        return lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=10, eta_min=1e-4)

    def of_another(model: Any) -> Any:
        other = torch.optim.SGD([{"params": [p]} for p in model.parameters()], lr=0.004)
        return WarmupLR(other, warmup_num_steps=2)

    return {
        "client optimizer": message(optimizer=lambda model: torch.optim.AdamW(model.parameters())),
        "client callable": message(optimizer=lambda model: torch.optim.AdamW),
        "own values": message(
            model_parameters=lambda model: [{"params": list(model.parameters()), "weight_decay": 0.1}]
        ),
        "left out": message(model_parameters=all_but_one),
        "flattening": message(lr_scheduler=flattening),
        "floor": message(lr_scheduler=floor),
        "of another optimizer": message(lr_scheduler=of_another),
        "a generator": message(model_parameters=lambda model: model.parameters()),
        "a module": message(model=torch.nn.Linear(2, 2)),
    }


def test_a_bad_call_gets_one_sentence(tmp_path: Path) -> None:
    found = run_ranks(_called_badly, 1, write(recipe_for("gpt2"), tmp_path))[0]
    assert "was given an optimizer of its own" in found["client optimizer"]
    assert "was given an optimizer of its own" in found["client callable"]
    assert "group 0 has values of its own (weight_decay 0.1)" in found["own values"]
    assert "transformer.wte.weight: not among model_parameters" in found["left out"]
    assert "WarmupLR has warmup_max_lr 0.004" in found["flattening"]
    assert "eta_min" in found["floor"]
    assert "was made for" in found["of another optimizer"]
    assert found["a generator"] == "no error"
    assert "a Linear has no configuration" in found["a module"]


@pytest.mark.parametrize("version", ["0.18.9", "0.20.0", "1.0", "1", "unknown"])
def test_another_deepspeed_is_refused(version: str) -> None:
    with pytest.raises(InputError, match=rf"DeepSpeed {version} is not supported\. Install 0\.19\."):
        require_supported(version)


def test_a_supported_deepspeed_is_not() -> None:
    for version in ("0.19.0+cpu", "0.19rc1", "0.19.8", None):
        require_supported(version)


def test_a_section_that_is_none_is_named() -> None:
    with pytest.raises(InputError, match=r"^ds\.json: zero_optimization: .*found 2"):
        configuration({"zero_optimization": 2}, source="ds.json")


# ---- the entry, without an engine ----------------------------------------------------------------------------------


def test_an_entry_is_what_it_says() -> None:
    assert entry_of({"optimizer": {}}) is None
    assert entry_of({"mup": {"recipe": "r"}}) == Entry(recipe="r", target=None, initialize=True, guard=True)
    assert Entry(recipe="r").how_to_initialize is Initialize.RESCALE
    assert Entry(recipe="r", initialize=False).how_to_initialize is Initialize.KEEP
    assert Entry(recipe="r", initialize="redraw").how_to_initialize is Initialize.REDRAW


def test_what_is_absent_or_auto_is_the_recipes() -> None:
    recipe = recipe_for("gpt2")
    wanted = {"lr": 0.004, "betas": [0.9, 0.95], "eps": 1e-7, "weight_decay": 0.1}
    assert optimizer_params("AdamW", None, recipe) == wanted
    auto = dict.fromkeys(wanted, "auto") | {"torch_adam": True}
    assert optimizer_params("adamw", auto, recipe) == wanted | {"torch_adam": True}
    assert optimizer_params("Adam", dict(wanted), recipe) == wanted
    sgd = recipe_for("gpt2", optimizer="sgd", sgd_momentum=0.8)
    assert optimizer_params("SGD", {}, sgd) == {"lr": 0.004, "momentum": 0.8, "weight_decay": 0.1}
    without_decay = recipe_for("gpt2", weight_decay=0.0)
    assert optimizer_params("Adam", {"adam_w_mode": False}, without_decay)["adam_w_mode"] is False
    assert [gradient_clipping(given, recipe) for given in (None, "auto", 0.7)] == [0.7, 0.7, 0.7]


def test_auto_is_taken_out_before_others_fill_it_in() -> None:
    content: dict[str, Any] = {
        "gradient_clipping": "auto",
        "train_batch_size": "auto",
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "eps": 1e-8, "betas": "auto", "weight_decay": "auto"}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": "auto", "warmup_num_steps": "auto"}},
    }
    before = {key: dict(value) if isinstance(value, dict) else value for key, value in content.items()}
    drop_auto(content)
    assert content == before
    content["mup"] = {"recipe": "r"}
    drop_auto(content)
    assert content == {
        "train_batch_size": "auto",
        "optimizer": {"type": "AdamW", "params": {"eps": 1e-8}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}},
        "mup": {"recipe": "r"},
    }


# ---- between two engines, and during the run -----------------------------------------------------------------------


def _changed_during_the_run(recipe: str) -> dict[str, str]:
    """What is done to a model or an optimizer after it was planned → what is said."""
    import deepspeed

    import mup_megatron.deepspeed  # noqa: F401
    from mup_megatron.huggingface import apply_plan, plan_for
    from mup_megatron.recipe import load_recipe

    content = ds_config(mup={"recipe": recipe})
    said = {}

    def attempt(name: str, act: Any) -> None:
        try:
            act()
            said[name] = ""
        except InputError as error:
            said[name] = str(error)

    def stepped(change: Any, **before: bool) -> Any:
        def act() -> None:
            model = build("gpt2", 4)
            model.transformer.wpe.weight.requires_grad_(before.get("trainable", True))
            engine, *_ = deepspeed.initialize(model=model, config=content)
            train_engine(engine, "gpt2", range(1))
            change(engine)
            train_engine(engine, "gpt2", range(1))

        return act

    def without_an_optimizer_first() -> None:
        model = build("gpt2", 4)
        deepspeed.initialize(model=model, config={k: v for k, v in content.items() if k != "optimizer"})
        deepspeed.initialize(model=model, config=content)

    def resized() -> None:
        model = build("llama", 4)
        apply_plan(model, plan_for(model, load_recipe(Path(recipe).parent / "llama.yaml")))
        model.resize_token_embeddings(56)
        deepspeed.initialize(model=model, config=ds_config(mup={"recipe": str(Path(recipe).parent / "llama.yaml")}))

    attempt("nothing", stepped(lambda engine: None))
    attempt("betas", stepped(lambda engine: engine.optimizer.param_groups[0].update(betas=(0.5, 0.5))))
    attempt("unfrozen", stepped(lambda e: e.module.transformer.wpe.weight.requires_grad_(True), trainable=False))
    attempt("engine without optimizer", without_an_optimizer_first)
    attempt("resized", resized)
    return said


def test_what_is_changed_after_the_plan_was_applied_is_noticed(tmp_path: Path) -> None:
    path = write(recipe_for("gpt2"), tmp_path)
    write(recipe_for("llama"), tmp_path, "llama.yaml")
    (said,) = run_ranks(_changed_during_the_run, 1, path)
    assert said.pop("nothing") == ""
    assert re.search(r"betas of the group .* should be \(0\.9, 0\.95\) and is \(0\.5, 0\.5\)", said.pop("betas"))
    assert "was frozen when the engine was built is trainable now" in said.pop("unfrozen")
    assert "left its initial weights alone" in said.pop("engine without optimizer")
    assert "the model's shape is (56, 128)" in said.pop("resized")
    assert said == {}


@pytest.mark.parametrize("key", ["amsgrad", "maximize"])
def test_options_that_make_another_optimizer_are_refused(key: str) -> None:
    with pytest.raises(InputError, match=rf'"optimizer.params.{key}": the recipe was made for AdamW without it'):
        optimizer_params("AdamW", {key: True}, recipe_for("gpt2"))


def test_an_entry_that_is_written_otherwise_is_no_entry_and_no_silence() -> None:
    with pytest.raises(InputError, match='"MuP": the entry is written "mup"'):
        entry_of({"MuP": {"recipe": "r.yaml"}})
