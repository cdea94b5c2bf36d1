"""Muon on Megatron-LM's own lines: what a line and a recipe say of it, and runs on its training loop."""

from pathlib import Path
from typing import Any

import pytest
from support.lm_arguments import parser_of_megatron
from support.lm_recipes import a_recipe, line, recipe_file
from support.lm_runs import SCRIPT, Finished, run_script

from mup_megatron.errors import InputError
from mup_megatron.megatron.arguments.convert import flags as flags_of
from mup_megatron.megatron.pretrain import flags
from mup_megatron.recipe import load_recipe

pytest.importorskip("emerging_optimizers", reason="megatron-core 0.16 has no Muon")

MUON: dict[str, Any] = {"muon_scale_mode": "spectral", "muon_momentum": 0.8, "muon_nesterov": True}


def file(folder: Path, name: str = "a", optimizer: str = "muon", **more: Any) -> Path:
    values = MUON if optimizer == "muon" else {}
    return recipe_file(folder, name, parametrization={"optimizer": optimizer}, **{**values, **more})


def taken_over(*words: str) -> Any:
    values = flags.add_to(parser_of_megatron()).parse_args(["--train-iters", "1000", *words])
    given, options = flags.take_given(values), flags.options_of(values)
    assert options is not None
    flags.take_over(values, given, options)
    return values


def test_a_line_has_the_recipes_values(tmp_path: Path) -> None:
    values = taken_over("--mup-recipe", str(file(tmp_path)))
    assert (values.optimizer, values.muon_momentum, values.muon_nesterov) == ("muon", 0.8, True)
    assert (values.muon_scale_mode, values.muon_tp_mode, values.muon_split_qkv) == ("spectral", "duplicated", True)


def test_what_args_writes_is_what_the_recipe_says(tmp_path: Path) -> None:
    path = file(tmp_path)
    words = flags_of(a_recipe().megatron_base, load_recipe(path))
    assert {"--optimizer", "muon", "--muon-nesterov", "--muon-tp-mode", "duplicated"} <= {*words}
    values = taken_over("--mup-recipe", str(path), *words)
    assert values.muon_nesterov
    plain = flags_of(a_recipe().megatron_base, load_recipe(file(tmp_path, muon_nesterov=False)))
    assert "--muon-nesterov" not in plain
    assert not any(word.startswith("--muon") for word in flags_of(a_recipe().megatron_base, a_recipe()))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--optimizer adam", r"--optimizer adam \(recipe: muon\)"),
        ("--optimizer soap", r"--optimizer soap \(recipe: muon\)"),
        ("--optimizer muon --muon-momentum 0.95", r"--muon-momentum 0.95 \(recipe: 0.8\)"),
        ("--muon-scale-mode unit_rms_norm", r"--muon-scale-mode unit_rms_norm \(recipe: spectral\)"),
        ("--fp16", r"--fp16 True \(recipe: False\)"),
        ("--muon-no-split-qkv", r"--muon-split-qkv False \(recipe: True\)"),
        ("--muon-scalar-optimizer lion", r"--muon-scalar-optimizer lion \(recipe: adam\)"),
        ("--use-distributed-optimizer", "--use-distributed-optimizer: a plan is tested with it for Adam"),
        (
            "--tensor-model-parallel-size 2 --muon-tp-mode blockwise",
            "muon_tp_mode blockwise: with a tensor parallelism of 2 .*Use --muon-tp-mode duplicated",
        ),
    ],
)
def test_a_line_that_says_something_else_is_refused(words: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        taken_over("--mup-recipe", str(file(tmp_path)), *words.split())


def test_a_recipe_for_adam_is_none_for_muon(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--optimizer muon \(recipe: adam\)"):
        taken_over("--mup-recipe", str(file(tmp_path, optimizer="adam")), "--optimizer", "muon")


def test_a_run_is_one_on_two_ranks_and_goes_on(tmp_path: Path) -> None:
    """Also with another recipe's learning rates, where that is accepted."""
    pytest.importorskip("megatron.training", reason="megatron-core 0.16 has no megatron.training in its wheel")

    def trained(name: str, ranks: int = 1, recipe: str = "a", words: tuple[str, ...] = (), **own: Any) -> Finished:
        more = {"save": tmp_path / name, "save_interval": 2, "ckpt_format": "torch_dist", "train_iters": 4, **own}
        told = [*line(**more), "--mup-recipe", str(tmp_path / f"{recipe}.recipe.yaml"), *words]
        return run_script(SCRIPT, told, ranks, folder=tmp_path / f"{name}-ranks", launcher=True)

    file(tmp_path)
    file(tmp_path, "b", lr=2e-3)
    whole = trained("whole").require_success().losses
    both = trained("both", 2, tensor_model_parallel_size=2).require_success().losses
    assert both == pytest.approx(whole, abs=1e-5)
    (tmp_path / "both" / "latest_checkpointed_iteration.txt").write_text("2")
    again = trained("again", load=tmp_path / "both").require_success().losses
    assert again == pytest.approx({i: whole[i] for i in (3, 4)}, abs=1e-5)
    (tmp_path / "both" / "latest_checkpointed_iteration.txt").write_text("2")
    other = trained(
        "other",
        recipe="b",
        words=("--mup-accept-recipe-change", "--override-opt-param-scheduler"),
        load=tmp_path / "both",
    ).require_success()
    assert other.losses[3] == pytest.approx(whole[3], abs=1e-5)
    assert other.losses[4] != pytest.approx(whole[4], abs=1e-4)
