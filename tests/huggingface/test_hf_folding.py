"""A pretrained model as the start of a run: its function stays, whatever the plan's multipliers; and its refusals."""

from pathlib import Path

import pytest
import torch
from support.hf_families import config, recipe_at
from support.hf_models import built
from support.hf_multiplied import KINDS, Kind, drawn, logits, recipe_of
from transformers import AutoModelForCausalLM

from mup_megatron.errors import InputError
from mup_megatron.huggingface import apply_plan, check_optimizer, param_groups, plan_for, start_from
from mup_megatron.modules.applied import applied_to


@pytest.mark.parametrize("name", KINDS)
def test_a_pretrained_model_starts_as_the_function_that_it_is(name: str) -> None:
    kind = KINDS[name]
    # Experts have no kernel in double precision.
    dtype, near = (torch.float64, 1e-12) if kind.branches else (torch.float32, 2e-6)
    model = drawn(kind, dtype)
    stock = logits(model)
    recipe = recipe_of(kind)
    plan = plan_for(model, recipe)
    start_from(model, plan)
    applied = applied_to(model)
    assert applied is not None
    assert applied.softmax_scale is not None
    assert len(applied.multipliers) >= 3
    assert (logits(model) - stock).abs().max() < near
    optimizer = torch.optim.AdamW(param_groups(model.named_parameters(), plan), betas=recipe.moved.betas)
    check_optimizer(optimizer, plan, model)


def test_nothing_is_changed_where_every_multiplier_is_one() -> None:
    own = config("llama", 32)
    model, again = built("llama", own), built("llama", own)
    start_from(model, plan_for(model, recipe_at(own)))
    assert all(map(torch.equal, model.state_dict().values(), again.state_dict().values()))


def test_a_model_that_has_its_multipliers_is_refused_before_a_weight_is_changed(tmp_path: Path) -> None:
    kind = KINDS["llama"]
    trained = drawn(kind)
    plan = plan_for(trained, recipe_of(kind))
    apply_plan(trained, plan, initialize="keep")  # type: ignore[arg-type]
    before = [each.clone() for each in trained.state_dict().values()]
    with pytest.raises(InputError, match="applied to this model already"):
        start_from(trained, plan)
    assert all(map(torch.equal, trained.state_dict().values(), before))
    trained.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(InputError, match="was trained with the recipe"):
        start_from(loaded, plan)
    assert all(map(torch.equal, loaded.state_dict().values(), before))


def test_what_is_not_known_of_a_model_type_is_refused_by_its_name() -> None:
    for hyperparameters, said in (
        ({"attention_multiplier": 2.0}, "model type opt: what makes its queries is not known"),
        ({"output_multiplier": 2.0}, "model type opt: model.decoder.embed_tokens.weight is tied"),
    ):
        model = built("opt", config("opt", 64))
        plan = plan_for(model, recipe_at(config("opt", 64), hyperparameters=hyperparameters))
        with pytest.raises(InputError, match=said):
            start_from(model, plan)
    # What belongs to whole weights needs no name.
    kind = Kind("gpt_neox", matrix="*.dense.weight")
    model = drawn(kind, torch.float64)
    stock = logits(model)
    recipe = recipe_of(kind)
    own = recipe.model_copy(
        update={"hyperparameters": recipe.hyperparameters.model_copy(update={"attention_multiplier": 1.0})}
    )
    start_from(model, plan_for(model, own))
    assert (logits(model) - stock).abs().max() < 1e-12


def test_pieces_and_other_modules_are_refused() -> None:
    kind = KINDS["llama"]
    plan = plan_for(drawn(kind), recipe_of(kind))
    with pytest.raises(InputError, match=r"not whole on this rank\. Call start_from on the loaded model"):
        start_from(drawn(kind).to("meta"), plan)
    with pytest.raises(InputError, match="a Linear is no model of Hugging Face's"):
        start_from(torch.nn.Linear(2, 2), plan)
