"""A BERT on Megatron-LM's own training loop, through the launcher: the program's name says what is built."""

from pathlib import Path
from typing import Any

import pytest
from support.lm_recipes import WIDTH, a_recipe, line
from support.lm_runs import Finished, run_script

from mup_megatron.architectures.registry import load_model_file, model_file
from mup_megatron.recipe import save_recipe

pytest.importorskip("megatron.training", reason="megatron-core 0.16 has no megatron.training in its wheel")

SCRIPT = Path(__file__).parents[2] / "support" / "pretrain_bert.py"
ROUNDING = 1e-5
PLAIN = {"output_multiplier": 1.0, "embedding_multiplier": 1.0, "init_method_std": 0.02, "weight_decay": 0.01}


def of_bert(**changes: Any) -> list[str]:
    """The line of a BERT."""
    return line(**{"spec": "local", **changes})


def recipe_of_bert(folder: Path, **more: Any) -> Path:
    """A GPT's recipe of `support` with a BERT as its base."""
    tuned = a_recipe(**more)
    base = {key: value for key, value in dict(tuned.base).items() if value is not None}
    path = folder / "bert.recipe.yaml"
    save_recipe(tuned.model_copy(update={"base": model_file({**base, "architecture": "bert"}, source="t")}), path)
    return path


def run(folder: Path, words: list[str], ranks: int = 1, *, launcher: bool = True, script: Path = SCRIPT) -> Finished:
    return run_script(script, words, ranks, folder=folder, launcher=launcher)


def test_a_base_that_is_the_target_changes_nothing(tmp_path: Path) -> None:
    own = of_bert(train_iters=4, lr=1e-3, min_lr=0, lr_decay_style="constant")
    without = run(tmp_path / "plain", own, launcher=False).require_success()
    given = [*of_bert(train_iters=4), "--mup-recipe", str(recipe_of_bert(tmp_path, width=WIDTH, **PLAIN))]
    assert run(tmp_path / "mup", given).require_success().losses == without.losses


def test_it_trains_alike_on_ranks_and_otherwise_than_without(tmp_path: Path) -> None:
    more = ["--mup-recipe", str(recipe_of_bert(tmp_path))]
    alone = run(tmp_path / "one", [*of_bert(train_iters=4), *more]).require_success().losses
    layout = {"tensor_model_parallel_size": 2, "use_distributed_optimizer": True}
    split = run(tmp_path / "two", [*of_bert(train_iters=4, **layout), *more], 2).require_success().losses
    assert split == pytest.approx(alone, abs=ROUNDING)
    values = {"lr": 1e-3, "min_lr": 1e-3, "init_method_std": 0.05, "weight_decay": 0.1}
    without = run(tmp_path / "without", of_bert(train_iters=4, lr_decay_style="constant", **values)).require_success()
    assert max(abs(alone[step] - without.losses[step]) for step in alone) > 0.01


@pytest.mark.parametrize(
    ("changes", "base", "said"),
    [
        ({"bert_no_binary_head": True}, {}, "bert_binary_head is True in the recipe's base but False in the target"),
        ({}, {"gpt": True}, "the recipe's base is a GPT and the target a BERT"),
    ],
    ids=["another head", "a GPT's recipe"],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, changes: dict[str, Any], base: dict[str, Any], said: str) -> None:
    path = tmp_path / "gpt.recipe.yaml" if base else recipe_of_bert(tmp_path)
    if base:
        save_recipe(a_recipe(), path)
    finished = run(tmp_path / "ranks", [*of_bert(**changes), "--mup-recipe", str(path)])
    assert any(finished.codes), finished.err[0][-2000:]
    assert said in finished.err[0]


def test_a_script_of_another_name_is_told_what_it_builds(tmp_path: Path) -> None:
    script = tmp_path / "mine.py"
    script.write_text(SCRIPT.read_text().replace('assert args.spec == ["local"]', ""))
    path = tmp_path / "gpt.recipe.yaml"
    save_recipe(a_recipe(), path)
    finished = run(tmp_path / "ranks", [*line(), "--mup-recipe", str(path)], script=script)
    assert finished.codes == [2], finished.err[0][-2000:]
    assert "the model is a BertModel, a BERT, and the plan is for a GPT" in finished.err[0]


def test_the_model_file_of_a_line_is_a_berts(tmp_path: Path) -> None:
    path = tmp_path / "model.yaml"
    run(tmp_path / "ranks", [*of_bert(bert_no_binary_head=True), "--mup-write-model-file", str(path)]).require_success()
    written = load_model_file(path)
    assert (dict(written)["architecture"], dict(written)["bert_binary_head"]) == ("bert", False)
    assert written.transformer_impl == "local"
