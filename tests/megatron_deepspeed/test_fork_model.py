"""A model that the fork has built becomes what the plan says: initial weights, multipliers, attention scale."""

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from support.fork_models import MODELS, CoreAttention, FlashSelfAttention, GPTModel, GPTModelPipe, Layout
from support.fork_runs import built, parsed
from support.plain_gpt import PlainGPT
from support.shapes import gpt, recipe_for

from mup_megatron import megatron_deepspeed
from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.errors import InputError
from mup_megatron.megatron_deepspeed.names import core_names
from mup_megatron.recipe import PerParameter, Recipe, save_recipe
from mup_megatron.theory import Plan

LAYOUTS = {
    "core attention": Layout(),
    "scaling by layer": Layout(layer_scaling=True),
    "flash attention": Layout(attention="flash"),
    "sequence parallelism of DeepSpeed": Layout(sequence_parallel_of_deepspeed=True),
    "and with flash attention": Layout(attention="flash", sequence_parallel_of_deepspeed=True),
}
SHAPES = {
    "tied": {},
    "untied": {"untie_embeddings_and_output_weights": True},
    "as Llama": {"swiglu": True, "normalization": "RMSNorm", "add_bias_linear": False},
}


def reference(model: ModelFile, plan: Plan, fork_model: Any) -> PlainGPT:
    """A plain GPT with the plan's numbers and the weights of one of the fork's."""
    plain = PlainGPT(
        model,
        embedding_multiplier=plan.embedding_multiplier,
        output_multiplier=plan.output_multiplier,
        softmax_scale=plan.softmax_scale,
    )
    names = core_names(fork_model)
    weights = {names[name]: tensor for name, tensor in fork_model.state_dict().items() if name in names}
    for name, tensor in weights.items():
        if (
            ".linear_qkv." in name
        ):  # the fork has all queries, then all keys, then all values; Megatron-Core head by head
            heads = tensor.view(3, model.num_attention_heads, model.head_size, -1)
            weights[name] = heads.transpose(0, 1).reshape(tensor.shape)
    if model.tied:
        weights["output_layer.weight"] = weights["embedding.word_embeddings.weight"]
    plain.load_state_dict(weights)
    return plain


def tokens_of(model: ModelFile) -> torch.Tensor:
    return torch.randint(model.vocab_size, (3, model.seq_length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("kind", MODELS)
def test_the_forward_pass_is_that_of_the_plan(kind: Any, shape: Any, layout: Layout, tmp_path: Path) -> None:
    target = gpt(2, **shape)
    recipe = recipe_for(gpt(1, **shape), init_method_std=0.3)
    model, _ = built(kind, target, recipe, tmp_path, layout=layout)
    model.double()
    plan = recipe.plan(target)
    assert plan.changes_softmax_scale
    assert plan.output_multiplier != 1.0 != plan.embedding_multiplier
    expected = reference(target, plan, model)(tokens_of(target))
    torch.testing.assert_close(model(tokens_of(target)), expected, rtol=1e-11, atol=1e-12)


def test_the_readout_is_scaled_in_one_place(tmp_path: Path) -> None:
    untied = {"untie_embeddings_and_output_weights": True}
    model, _ = built(GPTModel, gpt(2, **untied), recipe_for(gpt(1, **untied)), tmp_path)
    assert not model.get_submodule("language_model.output_layer")._forward_pre_hooks  # the fork uses its weight alone
    pipe, _ = built(GPTModelPipe, gpt(2, **untied), recipe_for(gpt(1, **untied)), tmp_path)
    assert len(pipe.get_submodule("5.lm_head")._forward_pre_hooks) == 1


@pytest.mark.parametrize("kind", MODELS)
def test_a_weights_own_multiplier_acts_on_the_weight_and_not_on_its_bias(kind: Any, tmp_path: Path) -> None:
    own = (PerParameter(match="*.linear_fc2.weight", multiplier=3.0),)
    recipe = recipe_for(gpt(1), init_method_std=0.3).model_copy(update={"per_parameter": own})
    model, _ = built(kind, gpt(2), recipe, tmp_path)
    model.double()
    for name, bias in model.named_parameters():
        if name.endswith(".bias"):
            torch.nn.init.normal_(bias)
    plain = reference(gpt(2), recipe.plan(gpt(2)), model)
    with torch.no_grad():
        for name, weight in plain.named_parameters():
            if name.endswith("linear_fc2.weight"):
                weight.mul_(3.0)
    expected = plain(tokens_of(gpt(2)))
    torch.testing.assert_close(model(tokens_of(gpt(2))), expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("untied", [False, True])
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_what_was_drawn_is_rescaled_and_never_drawn_again(
    kind: Any, untied: bool, tensor_parallel: int, tmp_path: Path
) -> None:
    target = gpt(4, untie_embeddings_and_output_weights=untied, num_layers=3)
    recipe = recipe_for(gpt(1, untie_embeddings_and_output_weights=untied))
    layout = Layout(tensor_parallel=tensor_parallel)
    torch.manual_seed(7)
    stock = kind(target, layout, std=recipe.hyperparameters.init_method_std)
    torch.manual_seed(7)
    model, _ = built(kind, target, recipe, tmp_path, "--tensor-model-parallel-size", str(tensor_parallel),
                     layout=layout)  # fmt: skip
    plan, names = recipe.plan(target), core_names(model)
    sigma = recipe.hyperparameters.init_method_std
    rescaled = 0
    for (name, drawn), now in zip(stock.named_parameters(), model.parameters(), strict=True):
        entry = plan[names[name]]
        # Megatron's draw: σ, and σ/√(2L) for what writes into the residual stream.
        stock_std = sigma / 6**0.5 if "dense_4h_to_h" in name or "attention.dense" in name else sigma
        factor = 1.0 if entry.init_std is None else entry.init_std / stock_std
        torch.testing.assert_close(now, drawn * factor, rtol=1e-6, atol=0.0)
        rescaled += factor != 1.0
    assert rescaled >= 12  # the hidden weights of three layers


def test_weights_that_the_fork_did_not_draw_are_left_alone(tmp_path: Path) -> None:
    torch.manual_seed(7)
    stock = GPTModel(gpt(2), std=0.05)
    torch.manual_seed(7)
    model, _ = built(GPTModel, gpt(2), recipe_for(gpt(1)), tmp_path, "--no-initialization")
    assert all(torch.equal(a, b) for a, b in zip(stock.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("kind", MODELS)
def test_at_the_base_with_multipliers_1_nothing_is_touched(kind: Any, tmp_path: Path) -> None:
    recipe = recipe_for(gpt(1), embedding_multiplier=1.0, output_multiplier=1.0, attention_multiplier=1.0)
    torch.manual_seed(7)
    stock = kind(gpt(1), std=recipe.hyperparameters.init_method_std)
    torch.manual_seed(7)
    model, _ = built(kind, gpt(1), recipe, tmp_path)
    assert torch.equal(model(tokens_of(gpt(1))), stock(tokens_of(gpt(1))))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    x = torch.ones(2)
    assert megatron_deepspeed.scale_head_input(x) is x


@pytest.mark.parametrize("kind", MODELS)
def test_without_a_recipe_nothing_is_touched(kind: Any) -> None:
    torch.manual_seed(7)
    stock = kind(gpt(2))
    torch.manual_seed(7)
    model = kind(gpt(2))
    megatron_deepspeed.apply_to_model([model], parsed(gpt(2)))
    assert torch.equal(model(tokens_of(gpt(2))), stock(tokens_of(gpt(2))))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_attention_that_ignores_its_scale_is_refused_before_anything_is_changed(tmp_path: Path) -> None:
    save_recipe(recipe_for(gpt(1)), tmp_path / "R.yaml")
    args = parsed(gpt(2), "--mup-recipe", str(tmp_path / "R.yaml"))
    model = GPTModel(gpt(2), Layout(attention="triton"), std=args.init_method_std)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(InputError, match="core_attention_flash: the fork's Triton attention ignores the scale"):
        megatron_deepspeed.apply_to_model([model], args)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_such_attention_is_fine_where_the_scale_is_its_own(tmp_path: Path) -> None:
    recipe = recipe_for(gpt(1), attention_multiplier=1.0)
    model, _ = built(GPTModel, gpt(2), recipe, tmp_path, layout=Layout(attention="triton"))
    assert all(m.softmax_scale is None for m in model.modules() if isinstance(m, FlashSelfAttention))


def attention_error(model: torch.nn.Module, args: argparse.Namespace) -> str:
    with pytest.raises(InputError) as caught:
        megatron_deepspeed.apply_to_model([model], args)
    return str(caught.value)


def test_attention_of_another_kind_is_refused(tmp_path: Path) -> None:
    save_recipe(recipe_for(gpt(1)), tmp_path / "R.yaml")
    args = parsed(gpt(2), "--mup-recipe", str(tmp_path / "R.yaml"))
    model: Any = GPTModelPipe(gpt(2), std=args.init_method_std)
    next(m for m in model.modules() if isinstance(m, CoreAttention)).norm_factor *= 2
    assert "2.self_attention.core_attention: this attention divides by 5.65685" in attention_error(model, args)
    model.get_submodule("3.self_attention").core_attention = torch.nn.Identity()
    assert "there are 2 attention layers and 1 modules that a scale can be set in" in attention_error(model, args)


def test_a_model_that_is_not_what_the_command_line_says_is_refused(tmp_path: Path) -> None:
    save_recipe(recipe_for(gpt(1)), tmp_path / "R.yaml")
    args = parsed(gpt(2), "--mup-recipe", str(tmp_path / "R.yaml"))
    with pytest.raises(
        InputError, match=r"linear_proj.weight\): the model's shape is \(128, 128\), the plan's \(64, 64\)"
    ):
        megatron_deepspeed.apply_to_model([GPTModel(gpt(4))], args)
    with pytest.raises(InputError, match=r"language_model\.output_layer\.weight: the model has this parameter"):
        megatron_deepspeed.apply_to_model([GPTModel(gpt(2, untie_embeddings_and_output_weights=True))], args)
    with pytest.raises(InputError, match=r"decoder.layers.1.+: the plan has this parameter, the model has not"):
        megatron_deepspeed.apply_to_model([GPTModel(gpt(2), stages=2)], args)


def test_residual_branches_have_no_place_for_a_multiplier(tmp_path: Path) -> None:
    save_recipe(recipe_for(gpt(1), residual_multiplier=0.5), tmp_path / "R.yaml")
    args = parsed(gpt(2), "--mup-recipe", str(tmp_path / "R.yaml"))
    assert "the fork's layers have no place" in attention_error(GPTModel(gpt(2), std=args.init_method_std), args)


def recipe_with_clipping(value: float) -> Recipe:
    return recipe_for(gpt(1), clip_grad=value)


def test_deepspeed_clips_as_the_recipe_says(tmp_path: Path) -> None:
    save_recipe(recipe_with_clipping(0.5), tmp_path / "R.yaml")
    words = ("--deepspeed", "--mup-recipe", str(tmp_path / "R.yaml"))
    args = parsed(gpt(2), *words)
    args.deepspeed_config_dict = {"gradient_clipping": 1.0}
    with pytest.raises(InputError, match=r"gradient_clipping in DeepSpeed's configuration is 1, .* clip_grad is 0.5"):
        megatron_deepspeed.apply_to_model([GPTModel(gpt(2))], args)
    args = parsed(gpt(2), *words, "--mup-override")
    args.deepspeed_config_dict = {}
    megatron_deepspeed.apply_to_model([GPTModel(gpt(2))], args)
    assert args.deepspeed_config_dict == {"gradient_clipping": 0.5}


def test_compression_is_refused(tmp_path: Path) -> None:
    save_recipe(recipe_for(gpt(1)), tmp_path / "R.yaml")
    args = parsed(gpt(2), "--mup-recipe", str(tmp_path / "R.yaml"))
    args.compression_training = True
    with pytest.raises(InputError, match="compression_training in DeepSpeed's configuration"):
        megatron_deepspeed.apply_to_model([GPTModel(gpt(2))], args)


def test_the_plan_is_printed_where_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    built(GPTModel, gpt(2), recipe_for(gpt(1)), tmp_path, "--mup-print-plan")
    out = capsys.readouterr().out
    assert "from width 32 to 64" in out
    assert "decoder.layers.0-1.self_attention.linear_qkv.weight" in out
