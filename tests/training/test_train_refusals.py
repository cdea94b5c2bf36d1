"""What `train` refuses, with which words, and that nothing is lost by it."""

import json
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.processes import run_ranks
from support.shapes import recipe_for
from support.training_runs import RECIPE, Finished, base, command_line, make_text, options, target

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.errors import InputError
from mup_megatron.recipe import Recipe, save_recipe
from mup_megatron.training.options import require_possible
from mup_megatron.yaml_io import dump_yaml

# Before anything starts: from the arguments alone


@pytest.mark.parametrize(
    ("world_size", "changes", "message"),
    [
        (3, {"tensor_model_parallel_size": 3}, "--tensor-model-parallel-size 3 does not divide num_attention_heads 8"),
        (3, {"pipeline_model_parallel_size": 3}, "--pipeline-model-parallel-size 3 does not divide num_layers 2"),
        (
            2,
            {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 2},
            "--num-layers-per-virtual-pipeline-stage 2 does not divide the 1 layers of a pipeline stage",
        ),
        (1, {"num_layers_per_virtual_pipeline_stage": 1}, "needs a pipeline"),
        (1, {"tensor_model_parallel_size": 2}, "needs a multiple of 2 processes, and there is one"),
        (1, {"micro_batch_size": 3}, "--global-batch-size 8 is not divisible by --micro-batch-size 3 × 1"),
        (3, {"micro_batch_size": None}, "--global-batch-size 8 is not divisible by 3 data-parallel ranks"),
        (1, {"sequence_parallel": True}, "--sequence-parallel needs tensor parallelism"),
        (1, {"save_interval": 5}, "Add --save DIR"),
        (1, {"train_iters": 0}, "--train-iters 0: must be at least 1"),
        (1, {"train_iters": 2147483648}, "--train-iters 2147483648: must be at most 2147483647"),
        (1, {"train_iters": 2147483647}, "--train-iters 2147483647: must be at most 100000000"),
        (1, {"eval_iters": 9223372036854775808}, "--eval-iters 9223372036854775808: must be at most 100000000"),
        (
            1,
            {"train_iters": 10**8, "global_batch_size": 64},
            "more than the 4294967294 samples that Megatron can number",
        ),
        (1, {"seed": 2**32}, "--seed 4294967296: must be at most 2147483647"),
        (1, {"global_batch_size": 10**400}, "--global-batch-size 1000000000"),
        (1, {"eval_iters": -1}, "--eval-iters -1"),
        (1, {"eval_iters": 0, "eval_interval": 2}, "--eval-interval 2"),
        (1, {"wandb_exp_name": "a"}, "Add --wandb-project"),
        (1, {"wandb_project": "a", "output": None}, "Add --output"),
    ],
)
def test_impossible_options(tmp_path: Path, world_size: int, changes: dict[str, Any], message: str) -> None:
    require_possible(target(), RECIPE, options(tmp_path), 1)
    with pytest.raises(InputError) as error:
        require_possible(target(), RECIPE, options(tmp_path, **changes), world_size)
    assert message in str(error.value)
    assert len(max(str(error.value).splitlines(), key=len)) < 300


def test_a_run_that_is_not_the_recipes_horizon(tmp_path: Path) -> None:
    own = options(tmp_path)
    model = target()
    tokens = own.train_iters * own.global_batch_size * model.seq_length
    tuning = {"train_iters": 1, "global_batch_size": own.global_batch_size, "seq_length": model.seq_length}

    def moved(**horizon: Any) -> Recipe:
        run = {"rule": "steps", "tokens": tokens, "batch": own.global_batch_size, **horizon}
        return Recipe.model_validate({**RECIPE.model_dump(), "training": tuning, "horizon": run})

    require_possible(model, moved(), own, 1)
    with pytest.raises(InputError, match=f"moved to {2 * tokens} tokens, and this run has {tokens}"):
        require_possible(model, moved(tokens=2 * tokens), own, 1)
    with pytest.raises(InputError, match=f"of {2 * own.global_batch_size} sequences, and this run's have"):
        require_possible(model, moved(batch=2 * own.global_batch_size), own, 1)


def test_the_distributed_optimizer_is_for_adam(tmp_path: Path) -> None:
    chosen = options(tmp_path, use_distributed_optimizer=True)
    require_possible(target(), RECIPE, chosen, 1)
    with pytest.raises(InputError, match="the recipe's optimizer is sgd"):
        require_possible(target(), recipe_for(base(), optimizer="sgd"), chosen, 1)


# On the command line: exit code 2, one sentence, no traceback


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    prefix: Path = run_ranks(make_text, 1, tmp_path_factory.mktemp("text"))[0]
    return prefix


def words(folder: Path, text: Path, *more: str, model: ModelFile | None = None, recipe: Recipe = RECIPE) -> list[str]:
    """A run of eight iterations that saves after every fourth and goes on from its own checkpoints."""
    folder.mkdir(exist_ok=True)
    (folder / "target.yaml").write_text(dump_yaml((model or target()).model_dump(mode="json")))
    save_recipe(recipe, folder / "a.recipe.yaml")
    files = [str(folder / "target.yaml"), "--recipe", str(folder / "a.recipe.yaml"), "--data", str(text)]
    folders = ["--output", str(folder / "out"), "--data-cache-path", str(folder / "cache")]
    sizes = ["--train-iters", "8", "--global-batch-size", "4", "--eval-iters", "1", "--save-interval", "4"]
    own = ["--save", str(folder / "ck"), "--load", str(folder / "ck")]
    return ["train", *files, *folders, *sizes, *own, *more]


def run(*arguments: str) -> Finished:
    finished: Finished = run_ranks(command_line, 1, *arguments)[0]
    return finished


def assert_refused(finished: Finished, *parts: str) -> None:
    assert finished.code == 2, finished
    assert finished.stdout == ""
    assert finished.stderr.count("mup-megatron: ") == 1
    assert "Traceback" not in finished.stderr
    for part in parts:
        assert part in finished.stderr


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """A finished run with checkpoints of iterations 4 and 8. Not to be changed."""
    folder = tmp_path_factory.mktemp("done")
    finished = run(*words(folder, text))
    assert finished.code == 0, finished
    assert finished.stdout.startswith(f"{folder / 'out'}: 8 iterations, training loss ")
    assert finished.stdout.count("\n") == 1, "the answer is one line; progress goes to standard error"
    assert "iteration 8/8 | loss " in finished.stderr
    return folder


def test_too_small_a_vocabulary(text: Path, tmp_path: Path) -> None:
    small = {"vocab_size": 256, "make_vocab_size_divisible_by": 8}
    changed = {"model": target().model_copy(update=small), "recipe": recipe_for(base().model_copy(update=small))}
    assert_refused(run(*words(tmp_path, text, **changed)), "vocab_size 256", "smaller than 257", f"{text}.json")
    assert not (tmp_path / "out").exists()


def test_too_little_text(text: Path, tmp_path: Path) -> None:
    long = {"seq_length": 8192}
    changed = {"model": target().model_copy(update=long), "recipe": recipe_for(base().model_copy(update=long))}
    assert_refused(run(*words(tmp_path, text, **changed)), f"{text}.idx", "8192", "Use more text")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        (["--load", "nowhere", "--save", "{}/new"], ["--load nowhere: no checkpoint there", "Check the path"]),
        (["--load", "{}/ck", "--save", "{}/ck", "--seed", "7"], ["training.seed is 1234 there and 7 here"]),
        (["--load", "{}/ck", "--train-iters", "9"], ["training.train_iters is 8 there and 9 here"]),
        (["--load", "{}/ck", "--use-distributed-optimizer"], ["layout.use_distributed_optimizer is False there"]),
        (["--load", "{}/new", "--save", "{}/ck"], ["holds checkpoints already", "--load"]),
        (["--load", "{}/new", "--save", "{}/new"], ["--output {}/out: this run is finished", "another --output"]),
        (["--load", "{}/new", "--save", "{}/new", "--seed", "7"], ["--output {}/out: of another run: training.seed"]),
    ],
    ids=["nothing to load", "seed", "length", "layout", "save over others", "finished output", "another's output"],
)
def test_folders_of_another_run(run_folder: Path, text: Path, changes: list[str], parts: list[str]) -> None:
    before = content(run_folder)
    given = [word.format(run_folder) for word in changes]
    assert_refused(run(*words(run_folder, text, *given)), *(part.format(run_folder) for part in parts))
    assert content(run_folder) == before


def test_a_checkpoint_of_another_recipe(run_folder: Path, text: Path, tmp_path: Path) -> None:
    other = recipe_for(base(), lr=0.02)
    arguments = words(tmp_path, text, "--load", str(run_folder / "ck"), recipe=other)
    assert_refused(run(*arguments), "another recipe", RECIPE.fingerprint, other.fingerprint)


def test_a_checkpoint_of_another_model(run_folder: Path, text: Path, tmp_path: Path) -> None:
    arguments = words(tmp_path, text, "--load", str(run_folder / "ck"), model=target(hidden_size=96, kv_channels=8))
    assert_refused(run(*arguments), "model.hidden_size is 64 there and 96 here")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def corrupt(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("iter_0000008/__0_0.distcp", truncate),
        ("iter_0000008/__0_0.distcp", corrupt),
        ("iter_0000008/.metadata", Path.unlink),
        ("iter_0000008/mup/files.json", truncate),
        ("iter_0000008/mup/run.json", corrupt),
        ("latest_checkpointed_iteration.txt", corrupt),
    ],
)
def test_a_damaged_checkpoint(
    run_folder: Path, text: Path, tmp_path: Path, file: str, damage: Callable[[Path], None]
) -> None:
    checkpoints = tmp_path / "ck"
    for name, data in content(run_folder / "ck").items():
        (checkpoints / name).parent.mkdir(parents=True, exist_ok=True)
        (checkpoints / name).write_bytes(data)
    damage(checkpoints / file)
    before = content(checkpoints)
    assert_refused(run(*words(tmp_path, text)), str(checkpoints / file))
    assert content(checkpoints) == before
    # The remedy that the message names: another checkpoint.
    (checkpoints / "latest_checkpointed_iteration.txt").write_text("4")
    assert run(*words(tmp_path, text)).code == 0
    assert (tmp_path / "out" / "metrics.csv").read_bytes() == (run_folder / "out" / "metrics.csv").read_bytes()


# A full disk


def with_files_no_larger_than(size: int, *arguments: str) -> Finished:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    return command_line(*arguments)


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_disk_that_fills_up_while_saving(text: Path, tmp_path: Path, ranks: int) -> None:
    arguments = words(tmp_path, text, "--tensor-model-parallel-size", str(ranks))
    assert all(finished.code == 0 for finished in run_ranks(command_line, ranks, *arguments))
    measured = (tmp_path / "out" / "metrics.csv").read_bytes()
    (tmp_path / "ck" / "latest_checkpointed_iteration.txt").write_text("4")
    before = content(tmp_path / "ck")
    first, *others = run_ranks(with_files_no_larger_than, ranks, 100_000, *arguments)
    assert_refused(first, f"{tmp_path / 'ck'}: the checkpoint of iteration 8 cannot be written (writing failed")
    assert [other.code for other in others] == [2] * (ranks - 1), "every rank leaves with the same code"
    assert all("mup-megatron: " not in other.stderr for other in others), "and the first alone says why"
    assert content(tmp_path / "ck") == before
    assert all(finished.code == 0 for finished in run_ranks(command_line, ranks, *arguments))
    assert (tmp_path / "out" / "metrics.csv").read_bytes() == measured


def test_a_disk_that_fills_up_with_metrics(text: Path, tmp_path: Path) -> None:
    # Large enough for everything that is written before, and for a part of the rows.
    limit = 2048 + len(json.dumps(RECIPE.plan(target()).to_json()))
    iterations = str(limit // 40)
    arguments = words(tmp_path, text, "--train-iters", iterations, "--global-batch-size", "1", "--eval-iters", "0")
    more = ["--save-interval", "100000"]
    refused = run_ranks(with_files_no_larger_than, 1, limit, *arguments, *more)[0]
    assert_refused(refused, "metrics.csv: cannot be written (File too large)")
