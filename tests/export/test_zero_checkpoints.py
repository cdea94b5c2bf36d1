"""Checkpoints of DeepSpeed's engine: the same bytes whatever ZeRO did with them, the trained model, and refusals."""

import json
import shutil
from argparse import Namespace
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzz_mutators import CANARY, RunsCode
from support.ds_models import BATCH, ds_config
from support.ds_ranks import run_ranks
from support.hf_multiplied import KINDS, drawn, logits, recipe_of, tokens
from support.training_runs import command_line
from transformers import AutoModelForCausalLM

import mup_megatron.deepspeed  # noqa: F401  the ranks import this module
from mup_megatron.errors import InputError
from mup_megatron.export.export import export
from mup_megatron.export.opened import open_model
from mup_megatron.recipe import Recipe, save_recipe

STAGES = (0, 1, 2, 3)
LLAMA, MIXTRAL = KINDS["llama"], KINDS["mixtral"]
MODEL, OPTIMIZER = "mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"


def _engine(kind: Any, zero: int, recipe_path: str) -> Any:
    """Every rank has the same samples, so that any number of them learns the same."""
    import deepspeed

    size = torch.distributed.get_world_size()
    content = ds_config(zero, train_batch_size=BATCH * size)
    content["mup"] = {"recipe": recipe_path, "initialize": "keep"}
    engine, *_ = deepspeed.initialize(model=drawn(kind), config=content)
    return engine


def _saved(root: str) -> dict[int, torch.Tensor]:
    """Saves the model at every stage as it is, and trained; returns the trained ones' logits."""
    found = {}
    for zero in STAGES:
        engine = _engine(LLAMA, zero, f"{root}/llama.yaml")
        engine.save_checkpoint(f"{root}/begun{zero}")
        for _ in range(2):
            given = tokens()
            engine.backward(engine(input_ids=given, labels=given).loss)
            engine.step()
        engine.save_checkpoint(f"{root}/trained{zero}")
        engine.module.eval()
        found[zero] = logits(engine)
        engine.destroy()
    engine = _engine(MIXTRAL, 2, f"{root}/mixtral.yaml")
    engine.save_checkpoint(f"{root}/mixtral2")
    engine.destroy()
    return found


def _convert(root: str, names: list[str]) -> None:
    from deepspeed.checkpoint.ds_to_universal import main

    for name in names:
        folder = f"{root}/{name}/global_step2"
        settings = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False, "strict": True}
        main(Namespace(input_folder=folder, output_folder=f"{folder}_universal", inject_missing_state=True, **settings))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[int, Path], dict[int, dict[int, torch.Tensor]]]:
    """The folder of the checkpoints, and the trained models' logits by stage, by the number of ranks."""
    roots, found = {}, {}
    for size in (1, 2):
        roots[size] = root = tmp_path_factory.mktemp("zero")
        for name, kind in (("llama", LLAMA), ("mixtral", MIXTRAL)):
            save_recipe(recipe_of(kind), root / f"{name}.yaml")
            drawn(kind).config.save_pretrained(root / name)
        found[size] = run_ranks(_saved, size, str(root))[0]
    run_ranks(_convert, 1, str(roots[2]), ["trained1", "trained3"])
    return roots, found


def exported(folder: Path, to: Path, name: str = "llama") -> Path:
    """Of one of the checkpoints in a root."""
    root = next(each for each in folder.parents if (each / "llama.yaml").exists())
    source = open_model(folder, recipe_of(KINDS[name]), recipe_source="r", target=root / name)
    return export(source, to).to


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_every_stage_and_number_of_ranks_gives_the_same_bytes(saved: Any, tmp_path: Path) -> None:
    roots, _ = saved
    wanted = weights(exported(roots[1] / "begun0", tmp_path / "wanted"))
    for size, root in roots.items():
        for zero in STAGES:
            assert weights(exported(root / f"begun{zero}", tmp_path / f"{size}-{zero}")) == wanted, (size, zero)


@pytest.mark.parametrize("size", [1, 2])
def test_the_trained_model_is_what_stock_transformers_computes(saved: Any, size: int, tmp_path: Path) -> None:
    roots, found = saved
    for zero in STAGES:
        stock = AutoModelForCausalLM.from_pretrained(exported(roots[size] / f"trained{zero}", tmp_path / str(zero)))
        wanted = found[size][zero]
        assert not torch.allclose(wanted, found[size][zero - 1 if zero else 1] + 1)
        assert (logits(stock) - wanted).abs().max() < 1e-5 * wanted.std()


def test_universal_checkpoints_give_the_same_bytes(saved: Any, tmp_path: Path) -> None:
    roots, _ = saved
    for zero in (1, 3):
        folder = roots[2] / f"trained{zero}"
        wanted = weights(exported(folder, tmp_path / f"regular {zero}"))
        assert weights(exported(folder / "global_step2_universal", tmp_path / f"universal {zero}")) == wanted


def test_experts_are_published_one_by_one(saved: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    for size, root in saved[0].items():
        folder = exported(root / "mixtral2", tmp_path / str(size), "mixtral")
        assert "model.layers.0.block_sparse_moe.experts.3.w1.weight" in load_file(folder / "model.safetensors")
    assert weights(tmp_path / "1") == weights(tmp_path / "2")


def test_the_check_takes_a_checkpoint_and_says_of_a_mistake_where_it_begins(saved: Any, tmp_path: Path) -> None:
    root = saved[0][2]
    recipe, target = ("--recipe", str(root / "llama.yaml")), str(root / "llama")
    made = command_line("export", str(root / "trained3"), *recipe, "--to", str(tmp_path / "out"), "--target", target)
    assert (made.code, made.stdout.partition(",")[0]) == (0, f"{tmp_path / 'out'}: llama"), made
    against = ("--exported", str(tmp_path / "out"), "--against", str(root / "trained3"), *recipe)
    passed = command_line("check", target, *against)
    assert (passed.code, passed.stdout.partition("\n")[0]) == (0, f"{tmp_path / 'out'}: pass")
    failed = command_line("check", target, *against[:3], str(root / "begun3"), *recipe)
    assert (failed.code, failed.stdout.partition("\n")[0]) == (1, f"{tmp_path / 'out'}: fail")
    unsaid = command_line("check", *against)
    assert unsaid.code == 2
    assert "does not say what the model is. Give its configuration with --target" in unsaid.stderr
    # The Trainer puts it there.
    shutil.copy(root / "llama" / "config.json", root / "trained3")
    said = command_line("check", *against)
    (root / "trained3" / "config.json").unlink()
    assert said.code == 0, said


# ---- refusals ------------------------------------------------------------------------------------------------------


def within(file: Path, key: str, value: Any) -> None:
    """Puts a value into a file's content."""
    content = torch.load(file, weights_only=False)
    content[key] = value
    torch.save(content, file)


def an_optimizers(file: Path, key: str, value: Any) -> None:
    content = torch.load(file, weights_only=False)
    content["optimizer_state_dict"][key] = value
    torch.save(content, file)


DAMAGE: Mapping[str, tuple[Callable[[Path], object], str]] = {
    "code in model states": (lambda f: within(f / MODEL, "mine", RunsCode()), f"{MODEL}: holds "),
    "code in optimizer states": (lambda f: an_optimizers(f / OPTIMIZER, "mine", RunsCode()), f"{OPTIMIZER}: holds "),
    "a client state that is no plain value": (
        lambda f: within(f / MODEL, "args", Fraction(1, 2)), f"{MODEL}: holds fractions.Fraction"
    ),
    "truncated model states": (
        lambda f: (f / MODEL).write_bytes((f / MODEL).read_bytes()[:-200]), f"{MODEL}: damaged"
    ),
    "truncated optimizer states": (
        lambda f: (f / OPTIMIZER).write_bytes((f / OPTIMIZER).read_bytes()[:-200]), f"{OPTIMIZER}: damaged"
    ),
    "a list": (lambda f: torch.save([1], f / OPTIMIZER), f"{OPTIMIZER}: not a file of DeepSpeed's"),
    "no recipe": (lambda f: within(f / MODEL, "mup_megatron", None), "trained without a recipe"),
    "a rank's file is gone": (
        lambda f: (f / OPTIMIZER.replace("rank_0", "rank_1", 1)).unlink(), "global_step2: damaged"
    ),
    "a stage": (
        lambda f: shutil.copy(f / MODEL, f / "layer_00-model_00-model_states.pt"),
        "layer_00-model_00-model_states.pt: a part of a pipeline",
    ),
    "another rank of the model": (
        lambda f: shutil.copy(f / MODEL, f / "mp_rank_01_model_states.pt"),
        "mp_rank_01_model_states.pt: a part of a pipeline, of a model in parallel",
    ),
    "a tag elsewhere": (lambda f: (f.parent / "latest").write_text("../x"), "latest: says ../x"),
    "no checkpoint": (lambda f: shutil.rmtree(f), "and there is no such checkpoint beside it"),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_and_foreign_checkpoints_are_refused_by_name(
    saved: Any, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = saved[0][2]
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "in"
    shutil.copytree(root / "trained2", folder)
    damage, said = DAMAGE[what]
    damage(folder / "global_step2")
    with pytest.raises(InputError) as refusal:
        export(open_model(folder, recipe_of(LLAMA), recipe_source="r", target=root / "llama"), tmp_path / "out")
    assert said in str(refusal.value)
    assert len(str(refusal.value)) <= 300 + len(str(folder))
    assert not (tmp_path / CANARY).exists()
    assert not (tmp_path / "out").exists()


OF_RANK_1 = ("zero_pp_rank_1_mp_rank_00_optim_states.pt", "zero_pp_rank_1_mp_rank_00_model_states.pt")


@pytest.mark.parametrize(("zero", "file"), [(1, OF_RANK_1[0]), (2, OF_RANK_1[0]), (3, OF_RANK_1[0]), (3, OF_RANK_1[1])])
def test_a_ranks_file_of_another_step_is_refused(saved: Any, zero: int, file: str, tmp_path: Path) -> None:
    """DeepSpeed's own function puts them together."""
    root = saved[0][2]
    shutil.copytree(root / f"trained{zero}", tmp_path / "in")
    shutil.copy(root / f"begun{zero}" / "global_step0" / file, tmp_path / "in" / "global_step2")
    with pytest.raises(InputError, match=f"{file}: of another step than zero_pp_rank_0"):
        open_model(tmp_path / "in", recipe_of(LLAMA), recipe_source="r", target=root / "llama")


def test_a_configuration_of_fewer_layers_is_refused(saved: Any, tmp_path: Path) -> None:
    root = saved[0][1]
    shutil.copytree(root / "llama", tmp_path / "less")
    content = json.loads((root / "llama" / "config.json").read_text())
    (tmp_path / "less" / "config.json").write_text(json.dumps({**content, "num_hidden_layers": 1}))
    for zero in STAGES:
        folder = root / f"trained{zero}"
        source = open_model(folder, recipe_of(LLAMA), recipe_source="r", target=tmp_path / "less")
        with pytest.raises(InputError, match=r"global_step2: has model\.layers\.1\..*, which a LlamaForCausalLM"):
            export(source, tmp_path / "out")


def test_code_in_a_universal_checkpoint_is_refused_by_name(
    saved: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = saved[0][2]
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "in"
    shutil.copytree(root / "trained1" / "global_step2_universal", folder)
    file = folder / "zero" / "model.norm.weight" / "fp32.pt"
    for value, said in ((RunsCode(), "fp32.pt: holds "), ({"a": 1}, "fp32.pt: holds no tensor")):
        torch.save(value, file)
        with pytest.raises(InputError, match=said):
            open_model(folder, recipe_of(LLAMA), recipe_source="r", target=root / "llama")
    assert not (tmp_path / CANARY).exists()


def test_another_recipe_and_other_models_are_refused(saved: Any, tmp_path: Path) -> None:
    root = saved[0][1]
    other: Recipe = recipe_of(KINDS["llama tied, with biases"])
    with pytest.raises(InputError, match=r"was trained with another recipe.*Give mup\.recipe\.yaml of that folder"):
        open_model(root / "trained1", other, recipe_source="r", target=root / "llama")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="no configuration of transformers"):
        open_model(root / "trained1", recipe_of(LLAMA), recipe_source="r", target=tmp_path)
    shutil.copytree(root / "trained1", tmp_path / "in")
    module = tmp_path / "in" / "global_step2" / MODEL
    content = torch.load(module, weights_only=False)
    group = next(each for each in content["param_shapes"] if "model.norm.weight" in each)
    del group["model.norm.weight"]
    torch.save(content, module)
    with pytest.raises(InputError, match=r"global_step2: (has|damaged)"):
        export(
            open_model(tmp_path / "in", recipe_of(LLAMA), recipe_source="r", target=root / "llama"), tmp_path / "out"
        )
