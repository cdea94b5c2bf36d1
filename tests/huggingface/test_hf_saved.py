"""A model that is saved with its multipliers: what the file says, and who is told when they are forgotten."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.hf_families import config, recipe_at
from support.hf_models import batch, built
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

from mup_megatron.errors import InputError
from mup_megatron.huggingface import apply_plan, param_groups, plan_for
from mup_megatron.recipe import Recipe

KEY = "mup_megatron"


def recipe(**hyperparameters: float) -> Recipe:
    return recipe_at(config("llama", 32), hyperparameters={"output_multiplier": 3.0, "lr": 0.01} | hyperparameters)


@pytest.fixture
def saved(tmp_path: Path) -> tuple[LlamaForCausalLM, Path]:
    model = built("llama", config("llama", 64))
    assert isinstance(model, LlamaForCausalLM)
    apply_plan(model, plan_for(model, recipe(attention_multiplier=2.0)))
    model.save_pretrained(tmp_path)
    return model, tmp_path


def logits(model: Any) -> torch.Tensor:
    result: torch.Tensor = model(input_ids=batch("llama")["input_ids"]).logits.detach()
    return result


def test_the_file_says_what_is_missing_in_it(saved: tuple[LlamaForCausalLM, Path]) -> None:
    model, folder = saved
    content = json.loads((folder / "config.json").read_text())[KEY]
    assert content["fingerprint"] == recipe(attention_multiplier=2.0).fingerprint
    assert content["softmax_scale"] == 0.5
    assert content["multipliers"] == {"lm_head.weight": 1.5}
    assert not hasattr(model.config, KEY)


def test_saving_warns_where_the_function_is_another_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for own, warned in ((recipe(), True), (recipe_at(config("llama", 64)), False)):
        model = built("llama", config("llama", 64))
        apply_plan(model, plan_for(model, own))
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="mup_megatron"):
            model.save_pretrained(tmp_path)
        assert ("another function" in caplog.text) is warned
    plain = built("llama", config("llama", 64))
    plain.save_pretrained(tmp_path)
    assert KEY not in json.loads((tmp_path / "config.json").read_text())


def test_a_loaded_model_takes_its_plan_back_and_no_other(saved: tuple[LlamaForCausalLM, Path]) -> None:
    model, folder = saved
    own = recipe(attention_multiplier=2.0)
    loaded = LlamaForCausalLM.from_pretrained(folder)
    assert not torch.allclose(logits(loaded), logits(model), atol=1e-3)
    plan = plan_for(loaded, own)
    with pytest.raises(InputError, match=f"recipe {own.fingerprint[:12]}.*keep"):
        apply_plan(loaded, plan)
    with pytest.raises(InputError, match="would be another function"):
        apply_plan(loaded, plan_for(loaded, recipe(attention_multiplier=3.0)), initialize="keep")  # type: ignore[arg-type]
    apply_plan(loaded, plan, initialize="keep")  # type: ignore[arg-type]
    torch.testing.assert_close(logits(loaded), logits(model))
    with pytest.raises(InputError, match="applied to this model already"):
        apply_plan(loaded, plan, initialize="keep")  # type: ignore[arg-type]


def test_a_damaged_mark_is_an_error(saved: tuple[LlamaForCausalLM, Path]) -> None:
    model, _ = saved
    other = built("llama", config("llama", 64))
    other.config.mup_megatron = ["?"]
    with pytest.raises(InputError, match="no fingerprint"):
        apply_plan(other, plan_for(model, recipe(attention_multiplier=2.0)))


# ---- the Trainer ---------------------------------------------------------------------------------------------------


def trainer(model: Any, folder: Path, optimizer: torch.optim.Optimizer | None = None) -> Trainer:
    tokens = batch("llama")["input_ids"]
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    arguments = TrainingArguments(str(folder / "run"), max_steps=1, report_to=[], save_strategy="no", use_cpu=True)
    return Trainer(model, arguments, train_dataset=rows, optimizers=(optimizer, None))  # type: ignore[arg-type]


def test_the_trainer_does_not_train_a_saved_model_whose_plan_was_forgotten(
    saved: tuple[LlamaForCausalLM, Path],
) -> None:
    loaded = LlamaForCausalLM.from_pretrained(saved[1])
    with pytest.raises(InputError, match="no plan was applied"):
        trainer(loaded, saved[1]).train()


def test_the_trainer_has_the_plans_optimizer_or_stops(saved: tuple[LlamaForCausalLM, Path]) -> None:
    model, folder = saved
    plan = plan_for(model, recipe(attention_multiplier=2.0))
    with pytest.raises(InputError, match="param_groups"):
        trainer(model, folder).train()
    groups = param_groups(model.named_parameters(), plan)
    with pytest.raises(InputError, match="RMSprop: its step is not AdamW's"):
        trainer(model, folder, torch.optim.RMSprop(groups)).train()
    trainer(model, folder, torch.optim.AdamW(groups)).train()


def test_another_trainer_is_left_alone(tmp_path: Path) -> None:
    trainer(built("llama", config("llama", 64)), tmp_path).train()
    assert transformers.Trainer.create_optimizer.__name__ == "create_optimizer"
