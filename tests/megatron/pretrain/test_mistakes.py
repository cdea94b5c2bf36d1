"""What would make a run silently another one is stopped before its second iteration, with the right cause named.

Beside each mistake stands its corrected twin, which trains. The scripts are real runs of Megatron-LM's training loop.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from support.lm_recipes import a_recipe, line, recipe_file
from support.lm_runs import SCRIPT, Finished, run_script
from support.watching_page import PAGE

from mup_megatron import messages
from mup_megatron.errors import InputError
from mup_megatron.recipe import Recipe, save_recipe

pytest.importorskip("megatron.training", reason="megatron-core 0.16 has no megatron.training in its wheel")

MISTAKEN = Path(__file__).parents[2] / "support" / "lm_mistakes.py"
Run = Callable[..., Finished]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs the script, with a mistake in it or not, with a recipe or not."""

    def run(words: Sequence[str], *, mistake: str | None = None, ranks: int = 1, with_recipe: bool = True) -> Finished:
        own = ["--mup-recipe", str(recipe_file(tmp_path))] if with_recipe else []
        return run_script(
            SCRIPT if mistake is None else MISTAKEN,
            [*words, *own],
            ranks,
            folder=tmp_path / "ranks",
            launcher=True,
            environment={"MISTAKE": mistake or ""},
        )

    return run


def require_stopped(finished: Finished, *patterns: str) -> None:
    """It ended with status 2 before the second iteration, and one rank said why, in one message."""
    assert set(finished.codes) == {2}, finished.err[0][-2000:]
    assert set(finished.losses) <= {1}
    said = "".join(finished.err)
    for pattern in patterns:
        assert re.search(pattern, said), said[-2000:]
    assert len(re.findall(r"^mup-megatron[:,]", said, re.MULTILINE)) == 1
    assert "Traceback" not in said


# ---- on the line --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "twin", "pattern"),
    [
        (["--decoupled-lr", "0.1"], [], r"--decoupled-lr 0\.1 \(recipe: .*per_parameter"),
        (["--lr-warmup-init", "1e-4"], [], r"--lr-warmup-init 0\.0001 \(recipe: a warm-up from 0"),
        (["--use-mup", "--mup-base-hidden-size", "32"], [], "--use-mup: .*from-native"),
        (
            ["--init-method-xavier-uniform"],
            ["--init-method-std", "0.05"],
            r"--init-method-xavier-uniform True \(recipe",
        ),
        (["--lr", "0.5"], ["--lr", "0.001"], r"--lr 0\.5 \(recipe: 0\.001\)"),
        (["--num-experts", "2"], [], "base has layers of attention and mlp, and the target of attention and experts"),
        (["--multi-latent-attention"], [], "base has layers of attention and mlp, and the target of latent attention"),
    ],
    ids=["decoupled-lr", "lr-warmup-init", "use-mup", "xavier", "lr", "experts", "latent-attention"],
)
def test_a_flag_that_does_not_go_with_a_recipe(run: Run, words: list[str], twin: list[str], pattern: str) -> None:
    require_stopped(run([*line(), *words]), pattern)
    if twin:
        run([*line(), *twin]).require_success()


def test_a_line_that_is_not_the_recipes_horizon(run: Run, tmp_path: Path) -> None:
    """The run of `line`: 2 iterations of 8 × 32 tokens, four times as many as the tuning's."""
    tuning = {"train_iters": 2, "global_batch_size": 2, "seq_length": 32}
    horizon = {"rule": "steps", "tokens": 2 * 8 * 32, "batch": 8}
    moved = Recipe.model_validate({**a_recipe().model_dump(), "training": tuning, "horizon": horizon})
    save_recipe(moved, tmp_path / "moved.recipe.yaml")
    own = ["--mup-recipe", str(tmp_path / "moved.recipe.yaml")]
    run([*line(), *own], with_recipe=False).require_success()
    require_stopped(run([*line(train_iters=4), *own], with_recipe=False), "moved to 512 tokens, and this run has 1024")


def test_with_mup_override_the_recipe_wins(run: Run) -> None:
    words = "--lr 0.5 --decoupled-lr 0.1 --lr-warmup-init 1e-4 --init-method-xavier-uniform --adam-eps 1e-3".split()
    assert run([*line(), *words, "--mup-override"]).require_success().losses == run(line()).require_success().losses


# ---- in the script ------------------------------------------------------------------------------------------------


def test_the_script_without_a_mistake_trains(run: Run) -> None:
    assert set(run(line(), mistake="nothing").require_success().losses) == {1, 2}


@pytest.mark.parametrize(
    ("mistake", "pattern"),
    [
        (
            "attention_ignores_its_scale",
            r"core_attention .*scale should be 0\.0\d+ and is 0\.17.*self\.softmax_scale",
        ),
        ("unknown_parameter", "decoder.layers.0.gate: the model has this parameter, the plan has not"),
        ("frozen_parameter", "decoder.layers.1.mlp.linear_fc1.weight.*frozen"),
        ("flattening_scheduler", "lr should be .*scheduler gives all groups one learning rate"),
        ("scheduler_that_flattens_later", "lr.*scheduler gives all groups one learning rate"),
        ("own_overrides", "overrides of its own.*embedding"),
        ("lost_group", "No group of the optimizer holds it"),
        ("dropped_multiplier", "output_layer"),
        ("weights_drawn_again", "linear_fc1.weight.*0.02"),
        ("never_trains", "never built a model"),
        ("betas_after_parsing", r"adam_beta2: the optimizer is configured with 0\.5, the recipe says 0\.999"),
        ("clipping_after_parsing", "clip_grad: 0.01 in the optimizer, 1.0 in the recipe"),
        ("schedule_after_parsing", "lr_decay_style: cosine in the schedule, constant by the recipe"),
        (
            "another_kind_of_model",
            "the model is a Wrapping, a model without a decoder, and the plan is",
        ),
    ],
)
def test_a_mistake_in_the_script_is_stopped(run: Run, mistake: str, pattern: str) -> None:
    require_stopped(run(line(), mistake=mistake), pattern)


def test_the_page_on_watching_quotes_what_is_said(run: Run) -> None:
    finished = run(line(), mistake="scheduler_that_flattens_later")
    said = [re.sub(r"recipe /\S+/", "recipe ", text) for text in (finished.out[0], finished.err[0])]
    quoted = [
        block.strip("\n") for block in re.findall(r"```text\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    ]
    assert len(quoted) == 2
    assert all(any(block in text for text in said) for block in quoted)


def test_defaults_of_the_script_do_not_come_between(run: Run) -> None:
    """Megatron puts them where a value is None, which may be what the recipe means."""
    assert run(line(), mistake="defaults_of_its_own").require_success().losses == run(line()).require_success().losses


def test_who_wants_no_verification_gets_none(run: Run) -> None:
    finished = run([*line(), "--mup-no-verify"], mistake="weights_drawn_again")
    assert set(finished.require_success().losses) == {1, 2}


def test_all_ranks_stop_together_and_one_speaks(run: Run) -> None:
    words = line(tensor_model_parallel_size=2)
    finished = run(words, mistake="attention_ignores_its_scale", ranks=2)
    require_stopped(finished, "core_attention")
    assert "mup-megatron" not in finished.err[1]


def test_before_the_ranks_meet_the_first_to_come_speaks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It need not be the first rank, which may start later, or may be on a machine where nothing is wrong."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for key, value in {"WORLD_SIZE": "16", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}.items():
        monkeypatch.setenv(key, value)

    def said(rank: int, text: str) -> str:
        monkeypatch.setenv("RANK", str(rank))
        messages.complain(InputError(text))
        return capsys.readouterr().err

    assert said(8, "--lr: no") == "mup-megatron, rank 8: --lr: no\n"
    assert said(0, "--lr: no") == ""
    assert said(9, "r.yaml: no such file") == "mup-megatron, rank 9: r.yaml: no such file\n"
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert said(0, "--lr: no") == "mup-megatron: --lr: no\n"


def test_ranks_that_have_not_met_say_it_once(run: Run) -> None:
    require_stopped(run([*line(tensor_model_parallel_size=2), "--lr", "0.5"], ranks=2), "--lr 0.5")


# ---- in a checkpoint ----------------------------------------------------------------------------------------------


def saving(folder: Path, **changes: object) -> list[str]:
    return line(save=folder, load=folder, ckpt_format="torch", save_interval=2, **changes)


def test_a_checkpoint_of_another_recipe(run: Run, tmp_path: Path) -> None:
    run(saving(tmp_path / "ck")).require_success()
    other = recipe_file(tmp_path, "b", lr=2e-3)
    longer = [*saving(tmp_path / "ck", train_iters=3), "--override-opt-param-scheduler"]
    require_stopped(
        run([*longer, "--mup-recipe", str(other)], with_recipe=False),
        r"hyperparameters.lr: 0\.001 there, 0\.002 here",
    )
    accepted = [*longer, "--mup-recipe", str(other), "--mup-accept-recipe-change"]
    assert set(run(accepted, with_recipe=False).require_success().losses) == {3}


def test_a_checkpoint_of_a_recipe_without_the_plug_ins_flags(run: Run, tmp_path: Path) -> None:
    run(saving(tmp_path / "ck")).require_success()
    plain = saving(tmp_path / "ck", lr=1e-3, lr_decay_style="constant", min_lr=0)
    require_stopped(run(plain, with_recipe=False), "trained with a recipe.*mup.recipe.yaml")


def test_nor_where_the_copy_beside_it_is_lost(run: Run, tmp_path: Path) -> None:
    run(saving(tmp_path / "ck")).require_success()
    (tmp_path / "ck" / "iter_0000002" / "mup.recipe.yaml").unlink()
    plain = saving(tmp_path / "ck", lr=1e-3, lr_decay_style="constant", min_lr=0)
    require_stopped(run(plain, with_recipe=False), "trained with a recipe.*ck/mup.recipe.yaml")


def test_a_schedule_that_a_checkpoint_brings_along(run: Run, tmp_path: Path) -> None:
    linear = ["--mup-recipe", str(recipe_file(tmp_path, "linear", schedule={"lr_decay_style": "linear"}))]
    run([*saving(tmp_path / "ck"), *linear], with_recipe=False).require_success()
    longer = [*saving(tmp_path / "ck", train_iters=4), *linear, "--use-checkpoint-opt_param-scheduler"]
    require_stopped(run(longer, with_recipe=False), r"the end of the decay: 16 in the schedule, 32 by the recipe")


def test_a_checkpoint_of_plain_megatron(run: Run, tmp_path: Path) -> None:
    plain = saving(tmp_path / "ck", lr=1e-3, lr_decay_style="constant", min_lr=0)
    run(plain, with_recipe=False).require_success()
    further = saving(tmp_path / "ck", train_iters=3)
    require_stopped(run(further), "trained without a recipe.*--mup-accept-recipe-change --no-load-optim")
    accepted = [*further, "--mup-accept-recipe-change"]
    require_stopped(run(accepted), "add --no-load-optim")
    assert set(run([*accepted, "--no-load-optim"]).require_success().losses) == {3}


@pytest.mark.parametrize("mistake", [None, "overriding_as_on_the_main_branch"])
def test_overriding_the_schedule_leaves_the_groups_to_the_plan(run: Run, tmp_path: Path, mistake: str | None) -> None:
    whole = run(saving(tmp_path / "whole", train_iters=4)).require_success()
    run(saving(tmp_path / "ck", train_iters=2)).require_success()
    longer = [*saving(tmp_path / "ck", train_iters=4), "--override-opt-param-scheduler"]
    rest = run(longer, mistake=mistake).require_success()
    assert {i: rest.losses[i] for i in (3, 4)} == {i: whole.losses[i] for i in (3, 4)}
