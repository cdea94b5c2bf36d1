"""A check of a launch line: what is run in its place, and the verdict on what Megatron-LM's own loop then trains."""

import json
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from support.lm_recipes import FROM_RECIPE, WIDTH, a_recipe
from support.lm_runs import CPU_FLAGS, SCRIPT, gpt, run_script

from mup_megatron.check.measure.measurements import Quantity
from mup_megatron.check.run_launch_line import check_launch_line
from mup_megatron.check.subjects.launch_line import Ended, LaunchLine, LineBatch
from mup_megatron.check.verdict.verdict import CheckOutcome, Verdict
from mup_megatron.errors import InputError
from mup_megatron.megatron import cpu
from mup_megatron.recipe import Recipe


@pytest.fixture(autouse=True)
def on_cpu() -> None:
    # Reading a line imports Megatron, and other tests of this process must not find it imported without the runtime.
    cpu.enable()


START = ["torchrun", "--nproc-per-node", "1", "-m", "mup_megatron.launch"]
OWN_DATA = (
    "--data-path 0.3 /data/a 0.7 /data/b --tokenizer-type GPT2BPETokenizer --vocab-file v.json --merge-file m".split()
)
LOGS = "--save /runs/a --save-interval 500 --load /runs/a --tensorboard-dir tb --wandb-project p".split()


def _line(start: Sequence[str] = START, script: Path = SCRIPT, **changes: Any) -> list[str]:
    """As a user has it for the run to come: own data, checkpoints and logs."""
    sizes = {"num_layers": 2, "hidden_size": WIDTH, "train_iters": 500, "seq_length": 64, "max_position_embeddings": 64}
    own = {"save_interval": 500, "bf16": True, **FROM_RECIPE}
    return [*start, str(script), *gpt(**{**sizes, **own, **changes}), *OWN_DATA, *LOGS, *CPU_FLAGS]


def _measuring(words: Sequence[str]) -> list[str]:
    line = LaunchLine.of(words)
    model = line.model().model_copy(
        update={"hidden_size": 32, "ffn_hidden_size": 128, "kv_channels": 8, "seq_length": 32}
    )
    return line.measuring(model, Path("r.yaml"), Path("order.json"), seed=7, batch=LineBatch(8, 4), steps=8)


def _values(words: Sequence[str]) -> dict[str, str]:
    """Flag → the value that counts, which is the last one."""
    following = [*words[1:], ""]
    return {word: value for word, value in zip(words, following, strict=True) if word.startswith("--")}


# ---- the line ------------------------------------------------------------------------------------------------------


def test_launcher_script_and_parallel_layout_stay_as_they_are() -> None:
    words = _measuring(_line(tensor_model_parallel_size=2, sequence_parallel=True, custom="mine"))

    assert words[: len(START) + 1] == [*START, str(SCRIPT)]
    values = _values(words)
    assert values["--tensor-model-parallel-size"] == "2"
    assert "--sequence-parallel" in values
    assert values["--custom"] == "mine"


def test_sizes_length_and_recipe_are_those_of_the_check() -> None:
    values = _values(_measuring([*_line(), "--mup-recipe", "own.yaml"]))

    assert values["--hidden-size"] == "32"
    assert values["--train-iters"] == "8"
    assert values["--seq-length"] == "32"
    assert (values["--global-batch-size"], values["--micro-batch-size"]) == ("8", "4")
    assert values["--mup-recipe"] == "r.yaml"
    assert values["--seed"] == "7"


def test_nothing_is_read_or_written_that_is_the_users() -> None:
    words = _measuring(_line())

    gone = ("/data", "/runs", "--save", "--load", "--tensorboard", "--wandb", "--vocab-file", "--bf16", "GPT2")
    assert [word for word in words if word.startswith(gone)] == []
    assert "--mock-data" in words


@pytest.mark.parametrize(
    ("start", "count"),
    [
        (["torchrun", "--nproc-per-node", "8", "--nnodes=2"], 16),
        (["torchrun", "--nproc_per_node=4", "-m", "mup_megatron.launch"], 4),
        (["python", "-m", "mup_megatron.launch"], 1),
    ],
)
def test_the_number_of_processes_is_read_from_the_launcher(start: list[str], count: int) -> None:
    assert LaunchLine.of([*start, "pretrain_gpt.py", "--num-layers", "2"]).world_size == count


def _in_layout(world: int, **layout: int) -> LaunchLine:
    return LaunchLine.of(_line(["torchrun", f"--nproc-per-node={world}"], **layout))


@pytest.mark.parametrize(
    ("world", "layout", "batch"),
    [
        (1, {}, LineBatch(8, 8)),
        (4, {"tensor_model_parallel_size": 2}, LineBatch(8, 4)),
        (8, {"pipeline_model_parallel_size": 4}, LineBatch(8, 1)),
        (16, {}, LineBatch(16, 1)),
        (3, {}, LineBatch(9, 3)),
    ],
)
def test_the_batch_is_one_that_the_layout_can_share_out(world: int, layout: dict[str, int], batch: LineBatch) -> None:
    assert _in_layout(world, **layout).batch(8) == batch


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["run.sh"], "a shell script hides"),
        (["torchrun", "--nproc-per-node", "8"], "there is no script in it"),
        ([], "there is no script in it"),
    ],
)
def test_a_line_without_a_script_is_refused(words: list[str], what: str) -> None:
    with pytest.raises(InputError, match=what):
        check_launch_line(words, a_recipe())


def test_processes_that_cannot_be_laid_out_are_refused() -> None:
    with pytest.raises(InputError, match="needs a multiple of 4"):
        _in_layout(2, tensor_model_parallel_size=4).batch(8)


def test_widths_are_such_that_tensor_parallel_ranks_can_share_them() -> None:
    trained: list[str] = []

    def execute(words: Sequence[str]) -> Ended:
        trained.append(_values(words)["--num-attention-heads"])
        return Ended(1, "")

    with pytest.raises(InputError, match="code 1"):
        check_launch_line(
            _line(["torchrun", "--nproc-per-node=2"], tensor_model_parallel_size=2),
            a_recipe(),
            references=None,
            execute=execute,
        )

    assert trained == ["2"]


def test_a_line_that_fails_is_told_with_its_last_words_and_how_it_was_run() -> None:
    with pytest.raises(InputError, match="code 3") as error:
        check_launch_line(_line(), a_recipe(), references=None, execute=lambda _: Ended(3, "CUDA: no luck"))

    assert "CUDA: no luck" in str(error.value)
    assert shlex.join(START) in str(error.value)


def test_a_line_that_never_met_the_plug_in_is_told_so() -> None:
    with pytest.raises(InputError, match="without having trained with the plug-in"):
        check_launch_line(_line(), a_recipe(), references=None, execute=lambda _: Ended(0, ""))


# ---- the verdict ---------------------------------------------------------------------------------------------------


def _run(folder: Path, ranks: int) -> Callable[[Sequence[str]], Ended]:
    """What torchrun would do."""
    count = iter(range(1000))

    def execute(words: Sequence[str]) -> Ended:
        at = next(index for index, word in enumerate(words) if word.endswith(".py"))
        done = run_script(Path(words[at]), words[at + 1 :], ranks, folder=folder / str(next(count)), launcher=True)
        return Ended(max(map(abs, done.codes)), done.err[0])

    return execute


Check = Callable[..., Verdict]


@pytest.fixture(scope="module")
def check(tmp_path_factory: pytest.TempPathFactory) -> Check:
    """Runs a line on so many ranks; all checks share their references."""
    pytest.importorskip("megatron.training", reason="megatron-core 0.16 has no megatron.training in its wheel")
    references = tmp_path_factory.mktemp("references")

    def checked(folder: Path, words: Sequence[str], ranks: int = 1, recipe: Recipe | None = None) -> Verdict:
        execute = _run(folder, ranks)
        return check_launch_line(
            words, recipe or a_recipe(), widths=(64, 128), seeds=2, references=references, execute=execute
        )

    return checked


@pytest.mark.slow  # one of two ranks is beneath
def test_a_right_line_passes_and_its_movements_are_read(check: Check, tmp_path: Path) -> None:
    verdict = check(tmp_path, _line())

    require_read(verdict)


def require_read(verdict: Verdict) -> None:
    assert verdict.outcome is CheckOutcome.PASS, json.dumps(verdict.to_json()["sections"], indent=1)[:5000]
    read = {key.name for key in verdict.comparison if key.quantity is Quantity.LEARNING_RATE}
    assert {"embedding.word_embeddings.weight", "decoder.layers.1.mlp.linear_fc2.weight"} <= read
    assert any(key.quantity is Quantity.UPDATE and "scale_mask_softmax" in key.name for key in verdict.comparison)


_WRONG = """
import sys
sys.path.insert(0, {folder!r})
import pretrain as script
from megatron.core.models.gpt import GPTModel

original = GPTModel.forward

def forward(self, *args, **kwargs):
    # A layer of the user's own, which a recipe does not know: scores that grow with width.
    if not hasattr(self, "changed"):
        self.changed = True
        for layer in self.decoder.layers:
            attention = layer.self_attention.core_attention
            attention.softmax_scale *= (self.config.hidden_size / 32) ** 0.5
    return original(self, *args, **kwargs)

GPTModel.forward = forward
if __name__ == "__main__":
    script.main()
"""


def test_what_the_users_own_script_does_wrong_fails_and_is_named(check: Check, tmp_path: Path) -> None:
    script = tmp_path / "own_script.py"
    script.write_text(_WRONG.format(folder=str(SCRIPT.parent)))

    verdict = check(tmp_path, [*_line(script=script), "--mup-no-verify"])

    assert verdict.outcome is CheckOutcome.FAIL
    assert any("scale_mask_softmax" in finding.key.name for s in verdict.sections for finding in s.findings)


def test_the_layout_of_the_line_is_what_is_checked(check: Check, tmp_path: Path) -> None:
    """Two tensor-parallel ranks of which each updates its shards: what they move adds up to one verdict."""
    start = ["torchrun", "--nproc-per-node", "2", "-m", "mup_megatron.launch"]
    words = _line(start, tensor_model_parallel_size=2, sequence_parallel=True)

    verdict = check(tmp_path, words, ranks=2)

    require_read(verdict)
    assert {key.quantity for key in verdict.comparison} >= {Quantity.LEARNING_RATE, Quantity.UPDATE, Quantity.SPECTRAL}


@pytest.mark.slow
def test_the_steps_of_muon_are_read_in_a_line(check: Check, tmp_path: Path) -> None:
    pytest.importorskip("emerging_optimizers", reason="megatron-core 0.16 has no Muon")
    own = a_recipe(parametrization={"optimizer": "muon"}, muon_scale_mode="unit_rms_norm", muon_nesterov=True)

    verdict = check(tmp_path, _line(), recipe=own)

    assert verdict.outcome is CheckOutcome.PASS, json.dumps(verdict.to_json()["sections"], indent=1)[:5000]
    left = [each.largest for key, each in verdict.comparison.items() if key.quantity is Quantity.UNEXPLAINED]
    assert max(left) < 0.004
