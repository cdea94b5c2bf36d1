"""The fork's arguments: the model that they describe, the recipe that takes over, and what no recipe goes with."""

import argparse
from pathlib import Path
from typing import Any

import pytest
from support import fork_models
from support.fork_runs import RUN, parsed
from support.lm_arguments import said_once
from support.shapes import gpt, recipe_for

from mup_megatron import megatron_deepspeed
from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.errors import InputError
from mup_megatron.megatron_deepspeed import model_from_fork_args
from mup_megatron.recipe import Recipe, Schedule, save_recipe

MODELS = {
    "as GPT-3": gpt(2),
    "untied, four layers": gpt(1, untie_embeddings_and_output_weights=True, num_layers=4),
    "as Llama": gpt(2, swiglu=True, normalization="RMSNorm", position_embedding_type="rope", rotary_base=500000,
                    add_bias_linear=False),
    "grouped queries": gpt(2, group_query_attention=True, num_query_groups=2),
    "no positions": gpt(1, position_embedding_type="none", max_position_embeddings=40),
    "gains around 0": gpt(1, apply_layernorm_1p=True),
}  # fmt: skip


@pytest.fixture
def recipe(tmp_path: Path) -> tuple[Recipe, Path]:
    given = recipe_for(gpt(1))
    save_recipe(given, tmp_path / "R.recipe.yaml")
    return given, tmp_path / "R.recipe.yaml"


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_the_arguments_of_a_model_give_the_model(model: ModelFile, tensor_parallel: int) -> None:
    args = parsed(model, "--tensor-model-parallel-size", str(tensor_parallel))
    # The fork knows its vocabulary only as it has padded it.
    padded = model.padded_vocab_size(tensor_parallel)
    assert model_from_fork_args(args) == said_once(model.model_copy(update={"vocab_size": padded}))


def test_without_a_recipe_nothing_is_changed() -> None:
    plain = fork_models.parser().parse_args([*fork_models.flags(gpt(1)), *RUN])
    patched = megatron_deepspeed.add_arguments(fork_models.parser()).parse_args([*fork_models.flags(gpt(1)), *RUN])
    ours = {key: value for key, value in vars(patched).items() if key.startswith("mup_")}
    assert vars(patched) == vars(plain) | ours
    assert set(ours.values()) == {None, False}


def test_what_the_recipe_says_takes_the_place_of_the_defaults(recipe: tuple[Recipe, Path]) -> None:
    given, path = recipe
    args = parsed(gpt(2), "--mup-recipe", str(path))
    h = given.hyperparameters
    found = (args.lr, args.min_lr, args.init_method_std, args.weight_decay, args.adam_beta2, args.adam_eps)
    assert found == (h.lr, h.min_lr, h.init_method_std, h.weight_decay, h.adam_beta2, h.adam_eps)
    assert args.mup_fingerprint == given.fingerprint


def test_the_schedule_is_in_fractions_of_the_run(tmp_path: Path) -> None:
    schedule = Schedule(lr_decay_style="cosine", lr_warmup_fraction=0.1, lr_decay_fraction=0.8)
    save_recipe(recipe_for(gpt(1)).model_copy(update={"schedule": schedule}), tmp_path / "R.yaml")
    args = parsed(gpt(2), "--mup-recipe", str(tmp_path / "R.yaml"))
    assert (args.lr_decay_style, args.lr_decay_iters) == ("cosine", 80)
    assert args.lr_warmup_fraction == pytest.approx(0.125)  # of the decay, as the fork has it


def test_flags_that_say_something_else_are_listed_unless_the_recipe_may_win(recipe: tuple[Recipe, Path]) -> None:
    given, path = recipe
    words = ("--mup-recipe", str(path), "--lr", "0.1", "--init-method-xavier-uniform")
    with pytest.raises(InputError, match=r"(?s)--lr 0.1 \(recipe: 0.003\).*--init-method-xavier-uniform True"):
        parsed(gpt(2), *words)
    args = parsed(gpt(2), *words, "--mup-override")
    assert (args.lr, args.init_method_xavier_uniform) == (given.hyperparameters.lr, False)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--kd"], "--kd: distillation"),
        (["--mos"], "--mos: distillation"),
        (["--random-ltd"], "--random-ltd: "),
        (["--ds-sequence-parallel-fpdt"], "--ds-sequence-parallel-fpdt: "),
        (["--retro-add-retriever"], "--retro-add-retriever: "),
        (["--universal-checkpoint"], "--universal-checkpoint: "),
        (["--create-moe-param-group"], "--create-moe-param-group: models with experts"),
        (["--num-experts-switch", "4"], "--num-experts-switch: models with experts"),
        (["--train-tokens", "1000000"], "--train-tokens: .*--train-iters or --train-samples"),
        (["--lr-warmup-tokens", "1000"], "--lr-warmup-tokens: "),
        (["--lr-decay-tokens", "1000"], "--lr-decay-tokens: "),
        (["--use-checkpoint-opt_param-scheduler"], "--use-checkpoint-opt_param-scheduler: "),
        (["--transformer-impl", "transformer_engine"], "--transformer-impl transformer_engine: "),
        (["--mup-coordinates-interval", "10"], "--mup-coordinates-interval: not available"),
        (["--mup-no-verify"], "--mup-no-verify: nothing is compared"),
    ],
)
def test_what_no_plan_reaches_is_refused(recipe: tuple[Recipe, Path], words: list[str], says: str) -> None:
    with pytest.raises(InputError, match=says):
        parsed(gpt(2), "--mup-recipe", str(recipe[1]), *words)
    if not words[0].startswith("--mup-"):
        parsed(gpt(2), *words)  # without a recipe it is the fork's own business


def test_experts_are_refused() -> None:
    with pytest.raises(InputError, match="--num-experts: models with experts are not supported yet"):
        model_from_fork_args(parsed(gpt(1), "--num-experts", "4"))


def test_a_schedule_that_the_fork_does_not_have_is_refused(tmp_path: Path) -> None:
    given = recipe_for(gpt(1)).model_copy(update={"schedule": Schedule(lr_decay_style="WSD")})
    save_recipe(given, tmp_path / "R.yaml")
    with pytest.raises(InputError, match="lr_decay_style WSD: the fork"):
        parsed(gpt(2), "--mup-recipe", str(tmp_path / "R.yaml"))


def test_a_flag_of_ours_alone_does_nothing_and_says_so() -> None:
    with pytest.raises(InputError, match="--mup-override: does nothing without --mup-recipe"):
        parsed(gpt(1), "--mup-override")


def test_a_parser_that_passes_unknown_flags_over_works_as_well(recipe: tuple[Recipe, Path]) -> None:
    parser = megatron_deepspeed.add_arguments(fork_models.parser())
    words = [*fork_models.flags(gpt(2)), *RUN, "--mup-recipe", str(recipe[1]), "--of-another-kind", "1"]
    args, rest = parser.parse_known_args(words)
    assert rest == ["--of-another-kind", "1"]
    assert args.lr == recipe[0].hyperparameters.lr


def test_layers_that_the_fork_can_vary_without_the_plan_are_mentioned(
    recipe: tuple[Recipe, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    args: argparse.Namespace = parsed(gpt(2), "--mup-recipe", str(recipe[1]), "--squared-relu")
    model: Any = fork_models.GPTModel(gpt(2), std=args.init_method_std)
    megatron_deepspeed.apply_to_model([model], args)
    assert "--squared-relu: a model file has no key for it" in capsys.readouterr().out
