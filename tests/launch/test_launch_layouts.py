"""launch/: what the scripts would start for each GPT-3 model divides evenly, fits the GPUs and says what is missing.

Layouts and batches are read off the command lines that the scripts print. Nothing here has a GPU.
"""

import math
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from support.processes import HANGS_AFTER_S

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.architectures.registry import load_model_file, shapes_of

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
SIZES = ["125m", "1.3b", "6.7b", "13b", "175b"]
BATCH_IN_TOKENS = {"125m": 0.5e6, "1.3b": 1e6, "6.7b": 2e6, "13b": 2e6, "175b": 3.2e6}
"""arXiv 2005.14165, Table 2.1, where the numbers are rounded."""

GPU_BYTES = 80e9
REQUIRED = {
    "MEGATRON": "/software/Megatron-LM",
    "RECIPE": "configs/recipes/gpt3_6.7b.recipe.yaml",
    "DATA_PATH": "0.3 /data/books 0.7 /data/web",
    "VOCAB_FILE": "/data/gpt2-vocab.json",
    "MERGE_FILE": "/data/gpt2-merges.txt",
}
OURS = {*REQUIRED, "OUTPUT", "DRY_RUN", "NODE_RANK", "NNODES", "MASTER_ADDR", "MASTER_PORT", "TRAIN_TOKENS"}
OURS |= {"SAVE_INTERVAL", "EXIT_MINUTES", "SCRIPT"}


def environment(**changes: str) -> dict[str, str]:
    """This one with the commands of this environment on the PATH, and nothing that the scripts would read."""
    inherited = {k: v for k, v in os.environ.items() if k not in OURS and not k.startswith("SLURM_")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{inherited['PATH']}"
    return inherited | {"PATH": path, "PYTHONPATH": str(ROOT)} | changes


def run(script: str, *words: str, cwd: Path = ROOT, **changes: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", LAUNCH / script, *words],
        cwd=cwd, env=environment(**changes), capture_output=True, text=True, check=False, timeout=HANGS_AFTER_S,
    )  # fmt: skip


@dataclass(frozen=True)
class Line:
    """A printed command line: what it sets in the environment, and its words."""

    environment: dict[str, str]
    words: list[str]

    def number(self, flag: str, default: int | None = None) -> int:
        if flag not in self.words and default is not None:
            return default
        assert self.words.count(flag) == 1, flag
        return int(self.words[self.words.index(flag) + 1])

    def word(self, flag: str) -> str:
        assert self.words.count(flag) == 1, flag
        return self.words[self.words.index(flag) + 1]

    @property
    def world(self) -> int:
        return self.number("--nnodes") * self.number("--nproc-per-node")

    @property
    def tp(self) -> int:
        return self.number("--tensor-model-parallel-size")

    @property
    def pp(self) -> int:
        return self.number("--pipeline-model-parallel-size")

    @property
    def vpp(self) -> int:
        return self.number("--num-virtual-stages-per-pipeline-rank", 1)

    @property
    def dp(self) -> int:
        return self.world // (self.tp * self.pp)

    @property
    def micro(self) -> int:
        return self.number("--micro-batch-size")

    @property
    def batch(self) -> int:
        return self.number("--global-batch-size")

    @property
    def micro_batches(self) -> int:
        return self.batch // (self.micro * self.dp)


def line_of(text: str) -> Line:
    words = shlex.split(text)
    assignments = [word for word in words[:2] if re.match(r"\w+=", word)]
    return Line(dict(word.split("=", 1) for word in assignments), words[len(assignments) :])


@cache
def dry_run(size: str) -> Line:
    done = run("gpt3.sh", size, "--dry-run", **REQUIRED)
    assert (done.returncode, done.stderr) == (0, "")
    return line_of(done.stdout)


def model_of(size: str) -> ModelFile:
    return load_model_file(ROOT / "configs" / "models" / f"gpt3_{size}.yaml")


def parameters_per_gpu(size: str) -> float:
    """Of the largest rank: the layers are spread evenly, embedding and positions are all on the first stage."""
    line, model = dry_run(size), model_of(size)
    shapes = shapes_of(model, model)[1].tensors
    blocks = sum(math.prod(p.shape) for p in shapes if p.name.startswith("decoder.layers."))
    others = sum(math.prod(p.shape) for p in shapes if not p.name.startswith("decoder.layers."))
    return (blocks / line.pp + others) / line.tp


def bytes_per_gpu(size: str) -> float:
    """An estimate, in bytes: weights and gradients, the optimizer's share, activations, and the logits of one pass.

    bf16 weights 2, fp32 gradients 4, and fp32 master weight and both Adam moments 12, shared by the model copies.
    Activations of a layer: 34·s·b·h bytes, shared by tensor and sequence parallelism (Korthikanti et al., arXiv
    2205.05198, where attention does not keep the softmax); one rank holds as many layers as the model has, and with v
    virtual stages (1 + (p − 1)/(p·v)) times that. Logits: bf16, fp32 and the fp32 gradient.
    """
    line, model = dry_run(size), model_of(size)
    states = parameters_per_gpu(size) * (2 + 4 + 12 / line.dp)
    layer = 34 * model.seq_length * line.micro * model.hidden_size / line.tp
    held = model.num_layers * (1 + (line.pp - 1) / (line.pp * line.vpp) if line.vpp > 1 else 1)
    logits = model.seq_length * line.micro * padded_vocabulary(size) / line.tp * (2 + 4 + 4)
    return states + layer * held + logits


def padded_vocabulary(size: str) -> int:
    """As Megatron pads it: to a multiple of make_vocab_size_divisible_by times the tensor parallel size."""
    model = model_of(size)
    multiple = model.make_vocab_size_divisible_by * dry_run(size).tp
    return -(-model.vocab_size // multiple) * multiple


each_size = pytest.mark.parametrize("size", SIZES)


# Layout and batch


def test_these_are_all_the_layouts() -> None:
    rows = [line.split() for line in (LAUNCH / "layouts.txt").read_text(encoding="utf-8").splitlines()]
    assert [row[0] for row in rows if row and not row[0].startswith("#")] == SIZES


@each_size
def test_the_gpus_divide_evenly(size: str) -> None:
    line = dry_run(size)
    assert line.world % (line.tp * line.pp) == 0
    assert line.number("--nproc-per-node") == 8
    assert 8 % line.tp == 0, "tensor parallelism stays within a node"


@each_size
def test_the_model_divides_by_tensor_parallelism(size: str) -> None:
    line, model = dry_run(size), model_of(size)
    groups = model.num_query_groups if model.group_query_attention else model.num_attention_heads
    for what in (model.num_attention_heads, groups, model.ffn_size, model.hidden_size, padded_vocabulary(size)):
        assert what % line.tp == 0
    assert model.seq_length % line.tp == 0  # sequence parallelism
    assert ("--sequence-parallel" in line.words) == (line.tp > 1)


@each_size
def test_the_layers_divide_by_the_stages(size: str) -> None:
    line, model = dry_run(size), model_of(size)
    assert model.num_layers % (line.pp * line.vpp) == 0
    if line.vpp > 1:
        assert line.pp > 1
        assert line.micro_batches % line.pp == 0  # the interleaved schedule wants it


@each_size
def test_the_batch_is_the_paper_s_and_divides_evenly(size: str) -> None:
    line, model = dry_run(size), model_of(size)
    assert line.batch % (line.micro * line.dp) == 0
    assert line.batch * model.seq_length == pytest.approx(BATCH_IN_TOKENS[size], rel=0.05)
    # The bubble of the pipeline: under a twentieth of a step.
    assert (line.pp - 1) / (line.vpp * line.micro_batches) < 0.05


@each_size
def test_the_run_is_300_billion_tokens(size: str) -> None:
    line, model = dry_run(size), model_of(size)
    assert line.number("--train-iters") == int(300e9) // (line.batch * model.seq_length)


@each_size
def test_the_estimated_memory_leaves_a_quarter_of_the_gpu(size: str) -> None:
    # For what the estimate leaves out: communication buffers, temporary tensors, fragmentation.
    assert bytes_per_gpu(size) < 0.75 * GPU_BYTES


@each_size
def test_the_readme_says_what_the_scripts_do(size: str) -> None:
    line = dry_run(size)
    cells = [size, line.number("--nnodes"), line.world, line.tp, line.pp, line.vpp, line.dp]
    recompute = line.word("--recompute-granularity") if "--recompute-granularity" in line.words else "none"
    cells += [line.micro, line.batch, line.micro_batches, recompute, f"{bytes_per_gpu(size) / 1e9:.0f} GB"]
    assert f"| {' | '.join(map(str, cells))} |\n" in (LAUNCH / "README.md").read_text(encoding="utf-8")


# The command line


@each_size
def test_the_command_is_megatron_s_own_with_the_launcher_before_it(size: str) -> None:
    line, model = dry_run(size), model_of(size)
    script = line.words.index("/software/Megatron-LM/pretrain_gpt.py")
    assert line.words[0] == "torchrun"
    assert line.words[script - 2 : script] == ["-m", "mup_megatron.launch"]
    assert line.word("--mup-recipe") == REQUIRED["RECIPE"]
    assert line.environment == {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    for key in ("num_layers", "hidden_size", "num_attention_heads", "seq_length"):
        assert line.number(f"--{key.replace('_', '-')}") == getattr(model, key)
    assert line.word("--ckpt-format") == "torch_dist"
    assert line.word("--save") == line.word("--load")
    assert {"--bf16", "--use-distributed-optimizer"} <= set(line.words)
    at = line.words.index("--data-path")
    assert line.words[at + 1 : at + 5] == ["0.3", "/data/books", "0.7", "/data/web"]


def test_what_is_added_comes_last_and_so_wins() -> None:
    done = run("gpt3.sh", "125m", "--log-interval", "1", DRY_RUN="1", **REQUIRED)
    assert line_of(done.stdout).words[-2:] == ["--log-interval", "1"]


def test_another_number_of_nodes_changes_data_parallelism_alone() -> None:
    usual, half = dry_run("175b"), line_of(run("gpt3.sh", "175b", "--dry-run", NNODES="64", **REQUIRED).stdout)
    for key in ("tp", "pp", "vpp", "micro", "batch"):
        assert getattr(half, key) == getattr(usual, key)
    assert half.dp * 2 == usual.dp


@pytest.mark.parametrize("name", REQUIRED)
def test_what_is_not_set_is_named(name: str) -> None:
    done = run("gpt3.sh", "125m", **{key: value for key, value in REQUIRED.items() if key != name})
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"gpt3.sh: {name} is not set: ")


@pytest.mark.parametrize(
    ("words", "changes", "said"),
    [
        ((), {}, "which size\\? '' is none of: 125m 1.3b 6.7b 13b 175b"),
        (("2b",), {}, "'2b' is none of"),
        (("175b",), {"NNODES": "10"}, "10 nodes are 80 GPUs, which tensor parallel 8 times pipeline parallel 16"),
        (("6.7b",), {"NNODES": "3"}, "3 nodes make 12 model copies, and 12 copies of 4 sequences do not divide"),
        (("13b",), {"NNODES": "256"}, "leave 1 micro batches a step, which the 2 interleaved stages do not divide"),
        (("125m",), {"TRAIN_TOKENS": "abc"}, "gpt3.sh: TRAIN_TOKENS=abc is not a whole number above 0. Write it with"),
        (("125m",), {"TRAIN_TOKENS": "3e11"}, "TRAIN_TOKENS=3e11 is not a whole number above 0"),
        (("125m",), {"NNODES": "two"}, "NNODES=two is not a whole number above 0"),
        (("125m",), {"TRAIN_TOKENS": "1000"}, "less than one step of 524288 tokens"),
        (("6.7b",), {}, "NODE_RANK is not set: this node's number from 0 to 15"),
        (("6.7b",), {"NODE_RANK": "0"}, "MASTER_ADDR is not set"),
        (("125m",), {}, "MEGATRON=/software/Megatron-LM has no pretrain_gpt.py"),
    ],
)
def test_what_cannot_be_started_is_said(words: tuple[str, ...], changes: dict[str, str], said: str) -> None:
    done = run("gpt3.sh", *words, **REQUIRED, **changes)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.search(said, done.stderr)


def test_a_recipe_that_is_not_there_stops_it() -> None:
    done = run("gpt3.sh", "125m", "--dry-run", **(REQUIRED | {"RECIPE": "missing.recipe.yaml"}))
    assert (done.returncode, done.stdout) == (2, "")
    assert "missing.recipe.yaml" in done.stderr


# Slurm


def test_slurm_starts_the_same_on_every_node_and_ends_before_its_time() -> None:
    done = run("slurm.sh", "6.7b", "--log-interval", "1", DRY_RUN="1", **REQUIRED)
    assert (done.returncode, done.stderr) == (0, "")
    step, command = done.stdout.splitlines()
    assert shlex.split(step)[:4] == ["srun", "--kill-on-bad-exit=1", "launch/gpt3.sh", "6.7b"]
    line = line_of(command)
    assert line.words[-2:] == ["--log-interval", "1"]
    # The time in the script leaves half an hour for the last checkpoint.
    time = re.search(r"^#SBATCH --time=(\d+):00:00$", (LAUNCH / "slurm.sh").read_text(encoding="utf-8"), re.MULTILINE)
    assert time is not None
    assert line.number("--exit-duration-in-mins") == int(time[1]) * 60 - 30
    same = [word for word in dry_run("6.7b").words if not word.startswith("results/")]
    ended = line.words[: line.words.index("--exit-duration-in-mins")]
    assert [word for word in ended if "/results/" not in word] == same


def slurm_commands(folder: Path, steps: int) -> Path:
    """srun and scontrol as a cluster would have them: a step gets as far as `steps`, and a requeue is noted."""
    for name, body in {
        "srun": f'cd "$OUTPUT"; mkdir -p checkpoints; echo {steps} > checkpoints/latest_checkpointed_iteration.txt',
        "scontrol": f'if [ "$1" = requeue ]; then echo "$2" >> "{folder}/requeued"; else echo node1; fi',
    }.items():
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
    return folder


@pytest.mark.parametrize(
    ("before", "after", "requeued", "status"),
    [(None, 500, True, 0), (500, 1000, True, 0), (500, 143051, False, 0), (500, 500, False, 2)],
    ids=["begins", "goes on", "is complete", "gets no further"],
)
def test_a_job_is_queued_again_until_it_is_complete(
    tmp_path: Path, before: int | None, after: int, requeued: bool, status: int
) -> None:
    output = tmp_path / "output"
    output.mkdir()
    if before is not None:
        (output / "checkpoints").mkdir()
        (output / "checkpoints" / "latest_checkpointed_iteration.txt").write_text(f"{before}\n")
    path = f"{slurm_commands(tmp_path, after)}{os.pathsep}{os.environ['PATH']}"
    job = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "77", "SLURM_JOB_NUM_NODES": "16", "SLURM_JOB_NODELIST": "n"}
    done = run("slurm.sh", "6.7b", cwd=tmp_path, **(REQUIRED | job | {"PATH": path, "OUTPUT": str(output)}))
    assert done.returncode == status, done.stderr
    assert (tmp_path / "requeued").exists() == requeued
    if status:
        assert "got no further than step 500" in done.stderr


# Two processes on the CPU


@pytest.mark.slow
def test_two_cpu_processes_train_and_go_on_from_their_checkpoint(tmp_path: Path) -> None:
    def train(output: str, *words: str) -> str:
        done = run("two_cpu_processes.sh", *words, OUTPUT=str(tmp_path / output), OMP_NUM_THREADS="1")
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    def losses(text: str) -> dict[int, str]:
        return {int(step): loss for step, loss in re.findall(r"iteration +(\d+)/.*?lm loss: (\S+)", text)}

    whole = losses(train("whole"))
    first, second = losses(train("parts", "--exit-interval", "10")), losses(train("parts"))
    assert list(first) == list(range(1, 11))
    assert list(second) == list(range(11, 21))
    # Megatron's second line of a process is the mean of its first two steps.
    assert {**first, **second} | {12: whole[12]} == whole
    assert float(whole[20]) < float(whole[1]) - 0.5
