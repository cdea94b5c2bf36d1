"""Megatron-Core models that DeepSpeed's engine and pipeline save, exported: the same bytes, and refusals."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzz_mutators import CANARY, RunsCode
from support import exported
from support.ds_megatron_runs import SHAPES, Case, plan_of, tuned
from support.ds_megatron_saves import BEGUN, TRAINED, converted, folder_of, saved
from support.processes import run_ranks
from support.training_runs import command_line

from mup_megatron.errors import InputError
from mup_megatron.export.export import export
from mup_megatron.export.opened import open_model
from mup_megatron.export.weights import Source
from mup_megatron.recipe import save_recipe
from mup_megatron.validation import plain
from mup_megatron.yaml_io import dump_yaml

EXACT = 1e-5

ENGINE = [
    *(Case(entry=True, zero=zero) for zero in (0, 1, 2, 3)),
    Case(entry=True, shape="untied", zero=2),
    Case(entry=True, fused_gelu=True),
    *(Case(entry=True, dp=2, zero=zero) for zero in (1, 3)),
]
PIPELINE = [
    *(Case(entry=True, stages=1, dp=dp, zero=1) for dp in (1, 2)),
    *(Case(entry=True, stages=2, zero=zero) for zero in (0, 1)),
    Case(entry=True, shape="untied", stages=2, zero=1),
]
STAGES = Case(entry=True, stages=2, zero=1)
BF16 = Case(entry=True, stages=2, zero=1, bf16=True)
PARALLEL = Case(entry=True, tp=2, zero=1)
OPTIMIZER = "zero_pp_rank_0_mp_rank_01_optim_states.pt"


@dataclass(frozen=True)
class Made:
    """Checkpoints, and what each rank had of the live models in the end."""

    root: Path
    live: Mapping[Case, list[dict[str, Any]]]

    def folder(self, case: Case, when: str) -> Path:
        return folder_of(self.root, case) / when

    def model_file(self, shape: str) -> Path:
        return self.root / f"{shape}.yaml"

    def opened(self, case: Case, when: str) -> Source:
        return self.opened_at(self.folder(case, when), case.shape)

    def opened_at(self, folder: Path, shape: str) -> Source:
        found = open_model(folder, tuned(shape), recipe_source="r", target=self.model_file(shape))
        assert isinstance(found, Source)
        return found


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    root = tmp_path_factory.mktemp("megatron")
    live: dict[Case, list[dict[str, Any]]] = {}
    for size in (1, 2):
        cases = [each for each in (*ENGINE, *PIPELINE, BF16, PARALLEL) if each.world_size == size]
        of_ranks = run_ranks(saved, size, cases, root)
        live |= {case: [rank[i] for rank in of_ranks] for i, case in enumerate(cases)}
    for shape, (_, target) in SHAPES.items():
        (root / f"{shape}.yaml").write_text(dump_yaml(plain(target)))
        save_recipe(tuned(shape), root / f"{shape}.recipe.yaml")
    made = Made(root, live)
    run_ranks(converted, 1, [made.folder(case, TRAINED) / "global_step3" for case in (ENGINE[3], STAGES)])
    return made


def weights(source: Source, to: Path) -> bytes:
    return (export(source, to).to / "model.safetensors").read_bytes()


@pytest.mark.parametrize("shape", SHAPES)
def test_engine_and_pipeline_on_any_ranks_give_the_bytes_of_one_process(made: Made, shape: str, tmp_path: Path) -> None:
    wanted = weights(exported.drawn(SHAPES[shape][1], plan_of(shape)), tmp_path / "wanted")
    cases = [case for case in (*ENGINE, *PIPELINE) if case.shape == shape]
    assert len(cases) > 1
    for case in cases:
        assert weights(made.opened(case, BEGUN), tmp_path / str(case)) == wanted, case


@pytest.mark.parametrize("case", [case for case in ENGINE if case.dp == 1], ids=str)
def test_the_export_computes_what_the_live_engine_does(made: Made, case: Case, tmp_path: Path) -> None:
    (live,) = made.live[case]
    stock = exported.loaded(export(made.opened(case, TRAINED), tmp_path / "out").to)
    with torch.no_grad():
        given = stock(exported.tokens(SHAPES[case.shape][1])).logits
    assert (given - live["logits"]).abs().max() < EXACT * live["logits"].std()
    begun = exported.loaded(export(made.opened(case, BEGUN), tmp_path / "begun").to)
    with torch.no_grad():
        before = begun(exported.tokens(SHAPES[case.shape][1])).logits
    assert (before - live["logits"]).abs().max() > 1e-2 * live["logits"].std()


@pytest.mark.parametrize("case", PIPELINE, ids=str)
def test_weights_of_a_trained_pipeline_are_those_of_its_stages(made: Made, case: Case) -> None:
    read = made.opened(case, TRAINED).weights
    held = [(name, weight) for stage in made.live[case] for name, weight in stage.items()]
    assert {name for name, _ in held} == set(read.stored) == set(plan_of(case.shape).by_name)
    assert all(read.read(name).equal(weight) for name, weight in held)


def test_of_a_pipeline_in_bf16_the_single_precision_weights_are_read(made: Made) -> None:
    read = made.opened(BF16, TRAINED).weights
    held = [(name, weight) for stage in made.live[BF16] for name, weight in stage.items()]
    assert all(read.read(name).bfloat16().equal(weight) for name, weight in held)
    assert any(not read.read(name).equal(weight.float()) for name, weight in held)


@pytest.mark.parametrize("case", [ENGINE[3], STAGES], ids=str)
def test_universal_checkpoints_give_the_same_bytes(made: Made, case: Case, tmp_path: Path) -> None:
    folder = made.folder(case, TRAINED)
    wanted = weights(made.opened_at(folder / "global_step3", case.shape), tmp_path / "regular")
    assert weights(made.opened_at(folder / "global_step3_universal", case.shape), tmp_path / "universal") == wanted


def test_the_commands_take_a_pipeline(made: Made, tmp_path: Path) -> None:
    run, target = str(made.folder(STAGES, TRAINED)), str(made.model_file("tied"))
    recipe, to = ("--recipe", str(made.root / "tied.recipe.yaml")), str(tmp_path / "out")
    done = command_line("export", run, *recipe, "--to", to, "--target", target)
    assert (done.code, done.stdout.partition(",")[0]) == (0, f"{to}: gpt2"), done
    passed = command_line("check", target, "--exported", to, "--against", run, *recipe)
    assert (passed.code, passed.stdout.partition("\n")[0]) == (0, f"{to}: pass"), passed
    begun = str(made.folder(STAGES, BEGUN))
    failed = command_line("check", target, "--exported", to, "--against", begun, *recipe)
    assert (failed.code, failed.stdout.partition("\n")[0]) == (1, f"{to}: fail"), failed
    unsaid = command_line("export", run, *recipe, "--to", f"{to}2")
    assert unsaid.code == 2
    assert "global_step3: does not say what the model is. Give its model file with --target" in unsaid.stderr


# ---- refusals ------------------------------------------------------------------------------------------------------


def within(file: Path, key: str, value: Any) -> None:
    """Puts a value into a file's content."""
    content = torch.load(file, weights_only=False)
    content[key] = value
    torch.save(content, file)


DAMAGE: Mapping[str, tuple[Callable[[Path], object], str]] = {
    "a layer's file is gone": (
        lambda f: next(f.glob("layer_03*")).unlink(), "layer_03-model_00-model_states.pt is missing"
    ),
    "a stage's file is gone": (
        lambda f: (f / "mp_rank_01_model_states.pt").unlink(), "mp_rank_01_model_states.pt: missing"
    ),
    "a stage's optimizer is gone": (
        lambda f: (f / OPTIMIZER).unlink(), "the files *_mp_rank_01_optim_states.pt are missing"
    ),
    "code in a stage": (
        lambda f: within(f / "mp_rank_01_model_states.pt", "mine", RunsCode()), "mp_rank_01_model_states.pt: holds "
    ),
    "code in an optimizer": (lambda f: within(f / OPTIMIZER, "mine", RunsCode()), f"{OPTIMIZER}: holds "),
    "a truncated optimizer": (
        lambda f: (f / OPTIMIZER).write_bytes((f / OPTIMIZER).read_bytes()[:-200]), f"{OPTIMIZER}: damaged"
    ),
    "another stage's optimizer": (
        lambda f: shutil.copy(f / OPTIMIZER.replace("rank_01", "rank_00"), f / OPTIMIZER), "global_step0: damaged"
    ),
    "no number of stages": (
        lambda f: within(f / "mp_rank_00_model_states.pt", "checkpoint_parallel_dimensions", None),
        "mp_rank_00_model_states.pt: does not say of how many stages it is",
    ),
    "stages that are parallel": (
        lambda f: within(
            f / "mp_rank_00_model_states.pt", "checkpoint_parallel_dimensions", {"pp_degree": 1, "tp_degree": 2}
        ),
        "of a pipeline whose stages are models in parallel",
    ),
    "no recipe": (
        lambda f: within(f / "mp_rank_00_model_states.pt", "mup_megatron", None), "trained without a recipe"
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_pipelines_are_refused_by_name(
    made: Made, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "in"
    shutil.copytree(made.folder(STAGES, BEGUN), folder)
    damage, said = DAMAGE[what]
    damage(folder / "global_step0")
    with pytest.raises(InputError) as refusal:
        made.opened_at(folder, "tied")
    assert said in str(refusal.value)
    assert len(str(refusal.value)) <= 300 + len(str(folder))
    assert not (tmp_path / CANARY).exists()


def test_code_in_a_layer_is_refused_by_name(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(made.folder(PIPELINE[2], BEGUN), tmp_path / "in")
    file = next((tmp_path / "in" / "global_step0").glob("layer_02*"))
    within(file, "mine", RunsCode())
    with pytest.raises(InputError, match=rf"{file.name}: holds "):
        made.opened_at(tmp_path / "in", "tied")
    assert not (tmp_path / CANARY).exists()


@pytest.mark.parametrize(
    ("case", "changes", "said"),
    [
        (STAGES, {"num_layers": 3}, r"layer_05-model_00-model_states\.pt: the pipeline of the model file has 5 layers"),
        (STAGES, {"num_layers": 5}, r"layer_06-model_00-model_states\.pt is missing, or the model file is of a model"),
        (ENGINE[1], {"num_layers": 3}, r"has decoder\.layers\.3\.\S+, which a model of \S+ has not"),
        (ENGINE[1], {"num_layers": 5}, r"has no decoder\.layers\.4\.\S+, which the recipe's plan has"),
        (ENGINE[1], {"ffn_hidden_size": 160}, r"linear_fc1\.\S+ has the shape \[128"),
        (STAGES, {"num_attention_heads": 8, "kv_channels": 8}, r"num_attention_heads is 8, and \S+ was trained with 4"),
        (ENGINE[1], {"norm_epsilon": 1e-6}, r"norm_epsilon is 1e-06, and \S+ was trained with 1e-05"),
    ],
)
def test_another_model_file_is_refused_by_name(
    made: Made, case: Case, changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    target = tmp_path / "model.yaml"
    target.write_text(dump_yaml({**plain(SHAPES[case.shape][1]), **changes}))
    with pytest.raises(InputError, match=said):
        open_model(made.folder(case, BEGUN), tuned("tied"), recipe_source="r", target=target).require_whole()


def test_parallel_models_other_recipes_and_configurations_are_refused(made: Made, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"mp_rank_01_model_states\.pt: a part of a pipeline, of a model in parallel"):
        made.opened(PARALLEL, BEGUN)
    with pytest.raises(InputError, match=r"was trained with another recipe.*Give mup\.recipe\.yaml of that folder"):
        made.opened_at(made.folder(STAGES, BEGUN), "untied")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(InputError, match=r"a configuration of transformers, and the recipe's base is a model file"):
        open_model(made.folder(STAGES, BEGUN), tuned("tied"), recipe_source="r", target=tmp_path)
