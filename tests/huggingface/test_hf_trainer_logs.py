"""The Trainer logs what it always does, of the first group; docs/watching.md says so."""

from pathlib import Path

import pytest
import torch
from support.hf_families import config, recipe_at
from support.hf_models import batch, built
from support.watching_page import names, require_same
from transformers import Trainer, TrainingArguments

from mup_megatron.huggingface import apply_plan, param_groups, plan_for


def test_the_trainer_logs_the_rate_of_the_first_group(tmp_path: Path) -> None:
    model = built("llama", config("llama", 64))
    plan = plan_for(model, recipe_at(config("llama", 32), hyperparameters={"lr": 0.01}))
    apply_plan(model, plan)
    optimizer = torch.optim.AdamW(param_groups(model.named_parameters(), plan))
    rows = [{"input_ids": row, "labels": row} for row in batch("llama")["input_ids"]]
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=2,
        logging_steps=1,
        lr_scheduler_type="constant",
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=rows, optimizers=(optimizer, None))  # type: ignore[arg-type]
    trainer.train()
    first = trainer.state.log_history[0]
    require_same(names("Hugging Face's Trainer"), set(first) - {"epoch", "step"})
    assert first["learning_rate"] == pytest.approx(plan["model.embed_tokens.weight"].lr)
    assert first["learning_rate"] == pytest.approx(2 * plan["model.layers.0.mlp.up_proj.weight"].lr)
