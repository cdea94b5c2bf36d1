"""Hugging Face models that were saved with their multipliers: what is exported of them, and what is refused."""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzz_mutators import CANARY, RunsCode
from safetensors.torch import load_file, save_file
from support.exported import KINDS as GPTS
from support.exported import models
from support.exported import recipe_of as recipe_of_gpt
from support.hf_families import config, recipe_at
from support.hf_models import batch, built
from support.hf_multiplied import KINDS, drawn, logits, recipe_of, tokens
from support.training_runs import command_line
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments

from mup_megatron.check.run_exported import check_exported
from mup_megatron.errors import InputError
from mup_megatron.export.export import Exported, export
from mup_megatron.export.hugging_face import HuggingFaceModel
from mup_megatron.export.opened import open_model
from mup_megatron.huggingface import apply_plan, param_groups, plan_for
from mup_megatron.modules import module_base
from mup_megatron.recipe import Hyperparameters, Recipe, save_recipe
from mup_megatron.theory import Fold

EXACT = 1e-5
SEEN = 1e-2
HALF = 2e-2
ARCHITECTURES = ("llama", "qwen3", "gpt2", "granite", "mixtral", "deepseek_v3")


@dataclass(frozen=True)
class Saved:
    """A trained model, live and saved."""

    live: PreTrainedModel
    recipe: Recipe
    folder: Path

    def opened(self) -> HuggingFaceModel:
        found = open_model(self.folder, self.recipe, recipe_source="test.recipe.yaml")
        assert isinstance(found, HuggingFaceModel)
        return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Saved]:
    """A function that gives a kind's, saved once."""
    made: dict[str, Saved] = {}

    def of(name: str) -> Saved:
        if name not in made:
            model, recipe = drawn(KINDS[name]), recipe_of(KINDS[name])
            apply_plan(model, plan_for(model, recipe), initialize="keep")  # type: ignore[arg-type]
            folder = tmp_path_factory.mktemp("saved")
            # Several files and an index.
            model.save_pretrained(folder, max_shard_size="100KB" if name == "llama" else "5GB")
            made[name] = Saved(model, recipe, folder)
        return made[name]

    return of


def loaded(folder: Path, attention: str = "eager", dtype: torch.dtype = torch.float32) -> Any:
    model, told = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation=attention, dtype=dtype, output_loading_info=True
    )
    assert {key: value for key, value in told.items() if value} == {}
    assert not hasattr(model.config, "mup_megatron")
    return model.eval()


def deviation(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference, relative to the standard deviation of the second."""
    return float((one.double() - other.double()).abs().max() / other.double().std())


def of_tokens(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """The root mean square of each token's differences, relative to the standard deviation of the second.

    In half precision a router chooses another expert for a token now and then, whoever computes it.
    """
    return (one.double() - other.double()).square().mean(-1).sqrt() / other.double().std()


@pytest.mark.parametrize("name", KINDS)
def test_an_exported_model_is_the_trained_one(saved: Callable[[str], Saved], name: str, tmp_path: Path) -> None:
    own = saved(name)
    trained = logits(own.live)
    assert deviation(logits(AutoModelForCausalLM.from_pretrained(own.folder)), trained) > SEEN
    done = export(own.opened(), tmp_path / "out")
    assert done.architecture == KINDS[name].family
    for attention in ("eager", "sdpa"):
        stock = loaded(done.to, attention)
        assert deviation(logits(stock), trained) < EXACT, attention
    generated = [
        stock.generate(
            tokens()[:, :4], attention_mask=torch.ones(2, 4), min_new_tokens=12, max_new_tokens=12,
            do_sample=False, use_cache=cached,
        )
        for cached in (True, False)
    ]  # fmt: skip
    assert torch.equal(*generated)
    if name in ARCHITECTURES:
        half = export(own.opened(), tmp_path / "half", dtype=torch.bfloat16)
        assert of_tokens(logits(loaded(half.to, dtype=torch.bfloat16)), trained).quantile(0.9) < HALF


def test_a_configuration_that_has_the_multipliers_leaves_the_weights_alone(
    saved: Callable[[str], Saved], tmp_path: Path
) -> None:
    own = saved("granite")
    done = export(own.opened(), tmp_path / "out")
    assert done.carried == pytest.approx(
        {
            "embedding_multiplier": 12 * 3.0,
            "attention_multiplier": 0.1 * 1.6,
            "logits_scaling": 8 * 4 / 1.7,
            "residual_multiplier": 0.2 * 0.8,
        }
    )
    before, after = (load_file(folder / "model.safetensors") for folder in (own.folder, done.to))
    changed = {name for name, each in before.items() if not torch.equal(each, after[name])}
    assert changed == {f"model.layers.{layer}.self_attn.k_proj.weight" for layer in (0, 1)} == set(done.folded)


def test_at_the_base_every_byte_stays(tmp_path: Path) -> None:
    model, recipe = built("llama", config("llama", 32)), recipe_at(config("llama", 32))
    model.config.architectures = ["LlamaForCausalLM"]
    apply_plan(model, plan_for(model, recipe))
    model.save_pretrained(tmp_path / "in")
    done = export(open_model(tmp_path / "in", recipe, recipe_source="r"), tmp_path / "out")
    assert (done.carried, done.folded) == ({}, ())
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("in", "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    kept, made = (json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("in", "out"))
    del kept["mup_megatron"]
    assert made == kept


def test_the_last_of_the_trainers_checkpoints_is_taken(tmp_path: Path) -> None:
    own, recipe = config("llama", 64), recipe_at(config("llama", 32), hyperparameters={"output_multiplier": 3.0})
    model = built("llama", own)
    plan = plan_for(model, recipe)
    apply_plan(model, plan)
    optimizer = torch.optim.AdamW(param_groups(model.named_parameters(), plan))
    rows = [{"input_ids": row, "labels": row} for row in batch("llama")["input_ids"]]
    arguments = TrainingArguments(
        str(tmp_path / "run"), max_steps=11, save_steps=9, report_to=[], use_cpu=True, learning_rate=0.01
    )
    Trainer(model, arguments, train_dataset=rows, optimizers=(optimizer, None)).train()  # type: ignore[arg-type]
    assert {each.name for each in (tmp_path / "run").iterdir()} >= {"checkpoint-9", "checkpoint-11"}
    for given in ("run", "run/checkpoint-11"):
        source = open_model(tmp_path / given, recipe, recipe_source="r")
        assert source.described == str(tmp_path / "run" / "checkpoint-11")
        done = export(source, tmp_path / f"{len(given)}")
        assert deviation(logits(loaded(done.to)), logits(model)) < EXACT


# ---- mistakes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama tied, with biases", "gpt2", "qwen3", "deepseek_v3"])
def test_a_fold_that_is_left_out_or_done_twice_fails_the_check(
    saved: Callable[[str], Saved], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = saved(name).opened()
    right = own.outline(None)
    compared = check_exported(export(own, tmp_path / "right").to, own)
    assert compared.passed, compared.told()

    def wrongly(todo: Sequence[Fold], to: str) -> bool:
        wrong = dataclasses.replace(right, folds=todo)
        with monkeypatch.context() as patch:
            patch.setattr(HuggingFaceModel, "outline", lambda *_: wrong)
            done = export(own, tmp_path / to)
        return check_exported(done.to, own).passed

    firsts = [each for each in right.folds if ".1." not in each.tensor]
    for number, each in enumerate(firsts):
        assert not wrongly([other for other in right.folds if other is not each], f"lost {number}"), each
    assert not wrongly([*right.folds, firsts[-1]], "twice"), firsts[-1]


# ---- stock software ------------------------------------------------------------------------------------------------

_STOCK = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "mup_megatron":
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
import torch
from transformers import AutoModelForCausalLM

for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        torch.save(model(torch.load(sys.argv[1])).logits, folder + "/logits.pt")
assert "mup_megatron" not in sys.modules
"""


def test_stock_transformers_runs_it_where_this_package_cannot_be_imported(
    saved: Callable[[str], Saved], tmp_path: Path
) -> None:
    torch.save(tokens(), tmp_path / "tokens.pt")
    names = ("llama", "granite", "deepseek_v3")
    folders = [str(export(saved(name).opened(), tmp_path / name).to) for name in names]
    ended = subprocess.run(
        [sys.executable, "-c", _STOCK, str(tmp_path / "tokens.pt"), *folders], capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    for name, folder in zip(names, folders, strict=True):
        assert deviation(torch.load(f"{folder}/logits.pt"), logits(saved(name).live)) < EXACT


# ---- refusals ------------------------------------------------------------------------------------------------------


def copied(folder: Path, to: Path) -> Path:
    to.mkdir()
    for each in folder.iterdir():
        (to / each.name).write_bytes(each.read_bytes())
    return to


def rewritten(folder: Path, **changes: Any) -> None:
    content = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def a_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(RunsCode(), folder / "pytorch_model.bin")


def without(folder: Path, name: str) -> None:
    held = load_file(folder / "model.safetensors")
    del held[name]
    save_file(held, folder / "model.safetensors")


def with_more(folder: Path, name: str) -> None:
    held = load_file(folder / "model.safetensors")
    save_file({**held, name: torch.ones(2)}, folder / "model.safetensors")


def index_of_shards(folder: Path) -> None:
    """As it stays behind where a model that was saved in several files is saved again in one."""
    file = "model-00001-of-00001.safetensors"
    held = load_file(folder / "model.safetensors")
    save_file({name: 2 * each for name, each in held.items()}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(held, file)}))


def elsewhere(folder: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "../model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


DAMAGE: Mapping[str, tuple[Callable[[Path], object], str]] = {
    "a stock model": (lambda f: rewritten(f, mup_megatron=None), "config.json: does not say a recipe"),
    "a mark of somebody else's": (lambda f: rewritten(f, mup_megatron=3), "has no fingerprint"),
    "another recipe": (lambda f: rewritten(f, mup_megatron={"fingerprint": "0" * 64}), "was trained with another"),
    "another size": (lambda f: rewritten(f, vocab_size=65), "vocab_size is 64 in the recipe's base but 65"),
    "a layer less": (
        lambda f: rewritten(f, num_hidden_layers=1, layer_types=["full_attention"]),
        "config.json: was changed after the model was saved: the multiplier of model.layers.1",
    ),
    "heads of another size": (
        lambda f: rewritten(f, num_attention_heads=4, num_key_value_heads=2, head_dim=64),
        "config.json: was changed after the model was saved: attention's scale was ",
    ),
    "a tensor more": (
        lambda f: with_more(f, "model.layers.2.mlp.up_proj.weight"),
        "has model.layers.2.mlp.up_proj.weight, which a Qwen3ForCausalLM of this configuration has not",
    ),
    "another saving's index": (index_of_shards, "has model.safetensors and model.safetensors.index.json, of two savi"),
    "a tensor is gone": (lambda f: without(f, "model.norm.weight"), "has no model.norm.weight"),
    "truncated": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-9]),
        "model.safetensors: cannot be read as safetensors",
    ),
    "a pickle in its place": (
        lambda f: torch.save(RunsCode(), f / "model.safetensors"), "model.safetensors: cannot be read as safetensors"
    ),
    "a pickle alone": (a_pickle, "pytorch_model.bin: a pickle"),
    "files elsewhere": (elsewhere, "weight_map has to say a safetensors file beside it"),
    "no configuration": (lambda f: (f / "config.json").write_text("[]"), "config.json: no configuration"),
    "nothing": (lambda f: [each.unlink() for each in f.iterdir()], "no model there that save_pretrained"),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_and_foreign_folders_are_refused_by_name(
    saved: Callable[[str], Saved], what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    own = saved("qwen3")
    folder = copied(own.folder, tmp_path / "in")
    damage, said = DAMAGE[what]
    damage(folder)
    with pytest.raises(InputError) as refusal:
        export(open_model(folder, own.recipe, recipe_source="test.recipe.yaml"), tmp_path / "out")
    assert said in str(refusal.value)
    assert len(str(refusal.value)) <= 300
    assert {each.name for each in tmp_path.iterdir()} == {"in"}
    assert not (tmp_path / CANARY).exists()


def test_what_earlier_releases_saved_beside_the_weights_is_passed_over(
    saved: Callable[[str], Saved], tmp_path: Path
) -> None:
    own = saved("qwen3")
    folder = copied(own.folder, tmp_path / "in")
    with_more(folder, "model.layers.0.self_attn.rotary_emb.inv_freq")
    export(open_model(folder, own.recipe, recipe_source="r"), tmp_path / "out")


def test_weights_of_several_types_are_exported_in_the_one_that_holds_all(
    saved: Callable[[str], Saved], tmp_path: Path
) -> None:
    own = saved("qwen3")
    folder = copied(own.folder, tmp_path / "in")
    held = load_file(folder / "model.safetensors")
    held["model.embed_tokens.weight"] = held["model.embed_tokens.weight"].bfloat16()
    save_file(held, folder / "model.safetensors")
    done = export(open_model(folder, own.recipe, recipe_source="r"), tmp_path / "out")
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(load_file(done.to / "model.safetensors")[name], held[name])


def test_the_commands_say_what_they_did(saved: Callable[[str], Saved], tmp_path: Path) -> None:
    own = saved("granite")
    recipe, to = str(tmp_path / "own.recipe.yaml"), str(tmp_path / "out")
    save_recipe(own.recipe, Path(recipe))
    given = ("export", str(own.folder), "--recipe", recipe, "--to", to)
    done = command_line(*given)
    assert done.code == 0, done
    assert done.stdout.startswith(f"{to}: granite, ")
    assert "logits_scaling 18.8235" in done.stdout
    against = ("check", "--exported", to, "--against", str(own.folder), "--recipe", recipe)
    right = command_line(*against)
    assert (right.code, right.stdout.partition("\n")[0]) == (0, f"{to}: pass")
    rewritten(Path(to), logits_scaling=8.0)
    wrong = command_line(*against)
    assert wrong.code == 1
    assert "it begins behind the layers" in wrong.stdout
    for more, said in (
        (("--architecture", "llama"), "--architecture llama: a model of transformers stays what it is, a granite"),
        (("--target", str(own.folder)), "says itself what the model is"),
    ):
        refused = command_line(*given[:-1], f"{to}2", *more)
        assert (refused.code, refused.stdout) == (2, "")
        assert said in refused.stderr
    again = command_line("export", to, "--recipe", recipe, "--to", f"{to}2")
    assert "does not say a recipe" in again.stderr


def test_a_family_that_is_not_known_is_refused_where_its_name_is_needed(tmp_path: Path) -> None:
    for multiplier, done in (("attention_multiplier", False), ("embedding_multiplier", True)):
        recipe = recipe_at(config("gpt_neox", 64), hyperparameters={multiplier: 2.0})
        model = built("gpt_neox", config("gpt_neox", 64)).eval()
        model.config.architectures = ["GPTNeoXForCausalLM"]
        apply_plan(model, plan_for(model, recipe))
        model.save_pretrained(tmp_path / multiplier)
        source = open_model(tmp_path / multiplier, recipe, recipe_source="r")
        if done:
            exported: Exported = export(source, tmp_path / "out")
            assert deviation(logits(loaded(exported.to)), logits(model)) < EXACT
        else:
            with pytest.raises(InputError, match="model type gpt_neox: what makes its queries is not known"):
                export(source, tmp_path / "out")
            assert not (tmp_path / "out").exists()


def test_recipes_of_other_models_and_their_checkpoints_are_refused(tmp_path: Path) -> None:
    (tmp_path / "latest").write_text("global_step1")
    with pytest.raises(InputError, match="latest: says global_step1, and there is no such checkpoint beside it"):
        open_model(tmp_path, recipe_of_gpt(models(GPTS["llama"])[0]), recipe_source="r")
    base = module_base(lambda: torch.nn.Linear(4, 2), lambda: torch.nn.Linear(8, 2))
    own = Recipe(base=base, hyperparameters=Hyperparameters(lr=0.01))
    with pytest.raises(InputError, match="r: of a torch module of your own, which is no architecture"):
        open_model(tmp_path, own, recipe_source="r")
    with pytest.raises(InputError, match="no such folder"):
        open_model(tmp_path / "none", recipe_of(KINDS["llama"]), recipe_source="r")
