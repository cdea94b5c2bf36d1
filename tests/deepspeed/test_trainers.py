"""The entry through the Hugging Face Trainer and Accelerate, which call deepspeed.initialize themselves; zero.Init."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support.ds_models import BATCH, HYPERPARAMETERS, batch, build, config, ds_config, recipe_for, train_torch, write
from support.ds_ranks import run_ranks

import mup_megatron.deepspeed
from mup_megatron.deepspeed.guard import LiveValues, live_values
from mup_megatron.errors import InputError
from mup_megatron.huggingface import apply_plan, param_groups, plan_for

STEPS = range(6)
AUTO = {
    "type": "AdamW",
    "params": {"torch_adam": True, "lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
}


class Data(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """The samples of all steps, in order."""

    def __len__(self) -> int:
        return BATCH * len(STEPS)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {key: value[index % BATCH] for key, value in batch("gpt2", index // BATCH).items()}


def _config(zero: int, entry: dict[str, Any], **changes: Any) -> dict[str, Any]:
    auto = {"train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "gradient_clipping": "auto"}
    content = ds_config(zero) | auto | {"optimizer": AUTO, "gradient_accumulation_steps": "auto"}
    return content | {"mup": entry} | changes


def _trainer(recipe_path: str, zero: int, folder: str, how: str) -> tuple[dict[str, LiveValues], list[list[float]]]:
    """Live values after the training, and each step's learning rates."""
    from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

    changes: dict[str, Any] = {}
    if how == "json scheduler":
        params = {
            "warmup_min_lr": "auto",
            "warmup_max_lr": "auto",
            "warmup_num_steps": "auto",
            "total_num_steps": "auto",
        }
        changes["scheduler"] = {"type": "WarmupDecayLR", "params": params}
    content = _config(zero, {"recipe": recipe_path}, **changes)
    rates: list[list[float]] = []

    class Rates(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            rates.append([float(group["lr"]) for group in trainer.model_wrapped.optimizer.param_groups])

    arguments = TrainingArguments(
        output_dir=folder,
        deepspeed=content,
        per_device_train_batch_size=BATCH // torch.distributed.get_world_size(),
        max_steps=len(STEPS),
        lr_scheduler_type="cosine",
        warmup_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    set_seed(1)
    trainer = Trainer(model=build("gpt2", 4), args=arguments, train_dataset=Data(), callbacks=[Rates()])
    trainer.train()
    engine = trainer.model_wrapped
    assert mup_megatron.deepspeed.plan_of(engine) is not None
    return live_values(engine), rates


@pytest.mark.parametrize(("zero", "how"), [(2, "trainer's scheduler"), (3, "json scheduler")])
def test_the_trainer_trains_by_the_plan(zero: int, how: str, tmp_path: Path) -> None:
    path = write(recipe_for("gpt2"), tmp_path)
    live, rates = run_ranks(_trainer, 2, path, zero, str(tmp_path / "out"), how)[0]
    plan = plan_for(build("gpt2", 4), recipe_for("gpt2"))
    assert live.keys() == plan.by_name.keys()
    for name, own in live.items():
        assert (own.weight_decay, own.eps) == (plan[name].weight_decay, plan[name].eps)
    groups = [group["lr"] for group in param_groups(build("gpt2", 4).named_parameters(), plan)]
    factors = [[lr / peak for lr, peak in zip(of_step, groups, strict=True)] for of_step in rates]
    assert all(of_step == pytest.approx([of_step[0]] * len(of_step)) for of_step in factors)
    assert max(of_step[0] for of_step in factors) == pytest.approx(1.0)
    assert len({of_step[0] for of_step in factors}) > 2


def _accelerate(recipe_path: str, zero: int) -> tuple[dict[str, LiveValues], list[float]]:
    from accelerate import Accelerator, DeepSpeedPlugin
    from accelerate.utils import DummyOptim

    model = build("gpt2", 4)
    loader = torch.utils.data.DataLoader(Data(), batch_size=BATCH)
    content = _config(zero, {"recipe": recipe_path}, gradient_accumulation_steps=1)
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=content))
    engine, _, loader = accelerator.prepare(model, DummyOptim(model.parameters()), loader)
    losses = []
    for inputs in loader:
        loss = engine(**inputs).loss
        accelerator.backward(loss)
        losses.append(loss.item())
    return live_values(engine), losses


def _reference() -> list[float]:
    model, h = build("gpt2", 4), HYPERPARAMETERS
    plan = plan_for(model, recipe_for("gpt2"))
    apply_plan(model, plan)
    betas = (0.9, h["adam_beta2"])
    optimizer = torch.optim.AdamW(param_groups(model.named_parameters(), plan), lr=h["lr"], betas=betas)
    return train_torch(model, optimizer, "gpt2", STEPS, h["clip_grad"])


@pytest.mark.parametrize("zero", [2, 3])
def test_accelerate_trains_by_the_plan(zero: int, tmp_path: Path) -> None:
    live, losses = run_ranks(_accelerate, 1, write(recipe_for("gpt2"), tmp_path), zero)[0]
    plan = plan_for(build("gpt2", 4), recipe_for("gpt2"))
    wanted = {own.name: LiveValues(own.lr, own.weight_decay, own.eps) for own in plan.entries}
    assert live == wanted
    assert losses == pytest.approx(_reference(), rel=2e-5)


# ---- built inside deepspeed.zero.Init ------------------------------------------------------------------------------


def _inside_zero_init(recipe_path: str) -> dict[str, Any]:
    """What happens to a model whose own initialisation met empty tensors."""
    import deepspeed
    from transformers import GPT2LMHeadModel

    found: dict[str, Any] = {}
    for how in (True, "redraw", False):
        content = ds_config(3, world_size=2) | {"mup": {"recipe": recipe_path, "initialize": how}}
        with deepspeed.zero.Init(config_dict_or_path=content):
            model = GPT2LMHeadModel(config("gpt2", 4))
        try:
            engine, *_ = deepspeed.initialize(model=model, config=content)
        except InputError as error:
            found[str(how)] = str(error)
            continue
        stds = {}
        for name, parameter in engine.module.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter]):
                stds[name] = parameter.detach().float().square().mean().sqrt().item()
        found[str(how)] = stds
        engine.destroy()
    return found


def test_a_model_from_zero_init_is_drawn_anew_or_refused(tmp_path: Path) -> None:
    found = run_ranks(_inside_zero_init, 2, write(recipe_for("gpt2"), tmp_path))[0]
    plan = plan_for(build("gpt2", 4), recipe_for("gpt2"))
    assert '"redraw"' in found["True"]
    for name, std in found["redraw"].items():
        wanted = plan[name].init_std
        # Five standard errors of the root mean square of so many draws; a constant is exact.
        tolerance = 1e-6 if wanted is None else 5 / math.sqrt(2 * math.prod(plan[name].shape))
        assert std == pytest.approx(plan[name].init_value if wanted is None else wanted, rel=tolerance), name
    # What was asked to be left alone is: the library's draw did not take place.
    assert found["False"].keys() == plan.by_name.keys()
    assert any(
        own.init_std is not None and found["False"][own.name] != pytest.approx(own.init_std, rel=0.5)
        for own in plan.entries
    )


# ---- DeepSpeed's own μP --------------------------------------------------------------------------------------------


def _mu_adam(width: int) -> dict[str, float]:
    """Name → learning rate by DeepSpeed's MuAdam, for a model that was built inside zero.Init."""
    import deepspeed
    import mup
    from transformers import GPT2LMHeadModel

    content = ds_config(3)
    content["optimizer"] = {"type": "MuAdam", "params": {"lr": 0.004}}
    content["zero_allow_untested_optimizer"] = True
    base, delta = GPT2LMHeadModel(config("gpt2", 1)), GPT2LMHeadModel(config("gpt2", 2))
    with deepspeed.zero.Init(config_dict_or_path=content):
        model = GPT2LMHeadModel(config("gpt2", width))
    mup.set_base_shapes(model, base, delta=delta, do_assert=False, rescale_params=False)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=content)
    return {name: own.lr for name, own in live_values(engine).items()}


def test_deepspeeds_mu_adam_trains_without_mup_under_zero_init() -> None:
    """The failure that this is about; with the entry MuAdam is refused, and ZeRO-3 has the plan's rates."""
    rates = run_ranks(_mu_adam, 1, 4)[0]
    assert set(rates.values()) == {0.004}
    plan = plan_for(build("gpt2", 4), recipe_for("gpt2"))
    assert {own.lr for own in plan.entries} == {0.004, 0.001}
