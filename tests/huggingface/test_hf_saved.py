"""A model that is saved with its multipliers: what the file says, and who is told when they are forgotten."""

import copy
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.hf_families import config, recipe_at
from support.hf_models import batch, built
from torch import nn
from transformers import LlamaForCausalLM, LlamaModel, Trainer, TrainingArguments

from mup_megatron.errors import InputError
from mup_megatron.huggingface import apply_plan, check_optimizer, param_groups, plan_for
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
            model.save_pretrained(tmp_path)  # as at every checkpoint of a run
        assert caplog.text.count("another function") == warned
        assert caplog.text.count("multipliers (lm_head.weight × 1.5), which the saved weights do not hold") == warned
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


def test_a_loaded_model_that_is_used_without_its_plan_says_so_once(
    saved: tuple[LlamaForCausalLM, Path], caplog: pytest.LogCaptureFixture
) -> None:
    _, folder = saved
    for planned in (False, True):
        loaded = LlamaForCausalLM.from_pretrained(folder)
        if planned:
            apply_plan(loaded, plan_for(loaded, recipe(attention_multiplier=2.0)), initialize="keep")  # type: ignore[arg-type]
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="mup_megatron"):
            logits(loaded)
            logits(loaded)
        assert caplog.text.count("no plan was applied to it since it was loaded") == (not planned)


def test_a_damaged_mark_is_an_error(saved: tuple[LlamaForCausalLM, Path]) -> None:
    model, _ = saved
    other = built("llama", config("llama", 64))
    other.config.mup_megatron = ["?"]
    with pytest.raises(InputError, match="no fingerprint"):
        apply_plan(other, plan_for(model, recipe(attention_multiplier=2.0)))


def test_what_is_no_number_in_a_mark_is_an_error(saved: tuple[LlamaForCausalLM, Path]) -> None:
    model, _ = saved
    other = built("llama", config("llama", 64))
    for wrong in ({"softmax_scale": "1"}, {"multipliers": [1]}, {"multipliers": {"lm_head.weight": "2"}}):
        other.config.mup_megatron = {"fingerprint": "0123", "softmax_scale": None, "multipliers": {}} | wrong
        with pytest.raises(InputError, match="Restore it"):
            apply_plan(other, plan_for(model, recipe(attention_multiplier=2.0)), initialize="keep")  # type: ignore[arg-type]


def test_another_recipe_may_go_on_with_one_function(saved: tuple[LlamaForCausalLM, Path]) -> None:
    model, folder = saved
    loaded = LlamaForCausalLM.from_pretrained(folder)
    for wrong, words in (
        ({"attention_multiplier": 3.0}, "attention's scale was 0.5 and is 0.75"),
        ({"attention_multiplier": 2.0, "output_multiplier": 1.0}, "lm_head.weight was 1.5 and is 0.5"),
        ({"attention_multiplier": 2.0, "embedding_multiplier": 2.0}, "model.embed_tokens.weight was 1 and is 2"),
    ):
        with pytest.raises(InputError, match=words) as raised:
            apply_plan(loaded, plan_for(loaded, recipe(**wrong)), initialize="keep")  # type: ignore[arg-type]
        assert len(str(raised.value)) <= 300
    lower = recipe(attention_multiplier=2.0, lr=0.001, weight_decay=0.2)
    apply_plan(loaded, plan_for(loaded, lower), initialize="keep")  # type: ignore[arg-type]
    torch.testing.assert_close(logits(loaded), logits(model))


def test_a_tied_table_has_both_of_its_multipliers_in_the_mark(tmp_path: Path) -> None:
    own = config("llama", 64, tie_word_embeddings=True)
    base = config("llama", 32, tie_word_embeddings=True)
    model = built("llama", own)
    numbers = {"output_multiplier": 3.0, "embedding_multiplier": 5.0}
    apply_plan(model, plan_for(model, recipe_at(base, hyperparameters=numbers)))
    model.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())[KEY]
    assert content["multipliers"] == {"model.embed_tokens.weight": 5.0, "lm_head.weight": 1.5}
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    other = recipe_at(base, hyperparameters=numbers | {"embedding_multiplier": 4.0})
    with pytest.raises(InputError, match="another function"):
        apply_plan(loaded, plan_for(loaded, other), initialize="keep")  # type: ignore[arg-type]


# ---- what was replaced, parts and wholes ---------------------------------------------------------------------------


def test_a_readout_of_another_size_is_noticed_wherever_the_model_goes(tmp_path: Path) -> None:
    model = built("llama", config("llama", 64))
    plan = plan_for(model, recipe())
    apply_plan(model, plan)
    groups = param_groups(model.named_parameters(), plan)
    model.resize_token_embeddings(model.config.vocab_size + 4)
    optimizer = torch.optim.AdamW(groups)
    for use in (
        lambda: model.save_pretrained(tmp_path / "saved"),
        lambda: check_optimizer(optimizer, plan, model),
        lambda: trainer(model, tmp_path, optimizer).train(),
    ):
        with pytest.raises(
            InputError, match=r"lm_head: multiplier should be 1\.5 on its input and is none\. The hook is gone"
        ) as raised:
            use()
        assert len(str(raised.value)) <= 300
    assert not (tmp_path / "saved").exists()


def test_an_attention_that_was_changed_is_noticed(tmp_path: Path) -> None:
    model: Any = built("llama", config("llama", 64))
    apply_plan(model, plan_for(model, recipe(attention_multiplier=2.0)))
    model.model.layers[0].self_attn.scaling = 0.25
    for part in (model, model.model):
        with pytest.raises(InputError, match=r"layers\.0\.self_attn: softmax scale should be .* and is 0\.25"):
            part.save_pretrained(tmp_path)


def test_a_layer_around_the_layer_is_no_replacement(tmp_path: Path) -> None:
    model: Any = built("llama", config("llama", 64))
    apply_plan(model, plan_for(model, recipe()))
    model.lm_head = nn.Sequential(model.lm_head)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())[KEY]["multipliers"] == {"lm_head.weight": 1.5}


@pytest.mark.parametrize("copied", [False, True])
def test_a_part_that_is_saved_by_itself_has_its_own_mark(tmp_path: Path, copied: bool) -> None:
    own = recipe(attention_multiplier=2.0, embedding_multiplier=5.0, output_multiplier=1.0)
    model: Any = built("llama", config("llama", 64))
    apply_plan(model, plan_for(model, own))
    part = copy.deepcopy(model).model if copied else model.model
    part.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())[KEY]
    assert content == {
        "fingerprint": own.fingerprint, "softmax_scale": 0.5, "multipliers": {"embed_tokens.weight": 5.0},
    }  # fmt: skip
    loaded = LlamaModel.from_pretrained(tmp_path)
    tokens = batch("llama")["input_ids"]
    again = recipe(attention_multiplier=2.0, embedding_multiplier=5.0, output_multiplier=1.0, lr=0.5)
    apply_plan(loaded, plan_for(loaded, again), initialize="keep")  # type: ignore[arg-type]
    torch.testing.assert_close(loaded(tokens).last_hidden_state, part(tokens).last_hidden_state)
    with pytest.raises(InputError, match="applied to this model already"):
        apply_plan(part, plan_for(part, own))


def test_a_whole_whose_part_has_a_plan_has_its_mark(tmp_path: Path) -> None:
    model: Any = built("llama", config("llama", 64))
    apply_plan(model.model, plan_for(model.model, recipe(embedding_multiplier=5.0, output_multiplier=1.0)))
    model.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())[KEY]
    assert content["multipliers"] == {"model.embed_tokens.weight": 5.0}


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
    with pytest.raises(InputError, match=r"no plan was applied.*another function"):
        trainer(loaded, saved[1]).train()
    loaded.config.mup_megatron |= {"softmax_scale": None, "multipliers": {}}
    with pytest.raises(InputError, match="no plan was applied") as raised:
        trainer(loaded, saved[1]).train()
    assert "function" not in str(raised.value)


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
