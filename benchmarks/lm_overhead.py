"""What the plug-in costs on Megatron-LM's training loop: at the start, in a step, and where coordinates are measured.

    python benchmarks/lm_overhead.py

Start: seconds spent in the plug-in for a model with GPT-3 175B's 96 layers of names on one rank, sixteen times a
rank's share at TP8 × PP16, at a small width: names are what it handles. Looking at weights grows with
their number and is printed apart. Step: the plug-in's share of each iteration of a small model, and the ratio of
iterations that measure coordinates to those between them, all within one run. Needs Megatron-Core 0.19, no GPU.
"""

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
SCRIPT = Path(__file__).parents[1] / "examples" / "pretrain.py"
RECIPE = """
version: 1
base: {{num_layers: 2, hidden_size: {width}, num_attention_heads: 4, vocab_size: 512, seq_length: {sequence},
       transformer_impl: local}}
hyperparameters: {{lr: 0.001, weight_decay: 0.1, embedding_multiplier: 2.0, output_multiplier: 2.0}}
"""
FLAGS = (
    "--num-attention-heads 4 --micro-batch-size 4 --global-batch-size 4 --attention-dropout 0 --hidden-dropout 0 "
    "--eval-iters 0 --eval-interval 1000 --log-interval 1000 --mock-data --split 949,50,1 "
    "--tokenizer-type NullTokenizer --vocab-size 511 --transformer-impl local --no-persist-layer-norm "
    "--no-gradient-accumulation-fusion --no-masked-softmax-fusion --no-bias-gelu-fusion --no-bias-dropout-fusion "
    "--use-cpu-initialization --distributed-backend gloo --num-workers 0"
)
spent: dict[str, list[float]] = defaultdict(list)
iterations: list[float] = []


def main() -> None:
    """Runs each measurement in a process of its own, because Megatron can be started once in each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["start", "step", "coordinates"], help=argparse.SUPPRESS)
    chosen = parser.parse_args().only
    if chosen is None:
        for name in ("start", "step", "coordinates"):
            subprocess.run([sys.executable, __file__, "--only", name], check=True)
    else:
        {"start": start, "step": step, "coordinates": coordinates}[chosen]()


def start() -> None:
    """96 layers."""
    run(
        "--num-layers 96 --hidden-size 64 --seq-length 16 --max-position-embeddings 16 --train-iters 1",
        width=16,
        sequence=16,
    )
    seconds = {name: sum(times) for name, times in spent.items()}
    weights = seconds.pop("weight_problems")
    total = sum(seconds.values()) - weights
    parts = ", ".join(f"{name} {value:.3f}" for name, value in seconds.items())
    print(f"start-up: {total:.2f} s in the plug-in without looking at weights ({parts}); weights {weights:.2f} s")


def step() -> None:
    """A small model, every iteration."""
    run(
        "--num-layers 4 --hidden-size 256 --seq-length 128 --max-position-embeddings 128 --train-iters 34",
        width=64,
        sequence=128,
    )
    own = [a + b for a, b in zip(spent["stepping"], spent["stepped"], strict=True)]
    shares = [mine / whole for mine, whole in zip(own, iterations, strict=True)][2:]
    print(
        f"step: the plug-in takes {statistics.median(shares):.2%} of an iteration (median), {max(shares):.2%} at most, "
        f"where it verifies; iterations of {statistics.median(iterations) * 1e3:.0f} ms"
    )


def coordinates() -> None:
    """Every second iteration measures, so that both kinds see the same machine."""
    run(
        "--num-layers 4 --hidden-size 256 --seq-length 128 --max-position-embeddings 128 --train-iters 64 "
        "--mup-coordinates-interval 2",
        width=64,
        sequence=128,
    )
    ratios = [on / off for off, on in zip(iterations[2::2], iterations[3::2], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    print(f"coordinates: an iteration that measures takes {middle:.3f} times one that does not ({low:.3f}…{high:.3f})")


def run(words: str, *, width: int, sequence: int) -> None:
    """Trains through the launcher with a clock at each of the plug-in's doors."""
    from mup_megatron import launch
    from mup_megatron.megatron import cpu

    cpu.enable()
    from mup_megatron.megatron import guard
    from mup_megatron.megatron.pretrain import hooks
    from mup_megatron.megatron.pretrain.run import Run

    begin = Run.begin
    Run.begin = staticmethod(timed("begin", begin))  # type: ignore[method-assign, assignment]
    for name in ("prepare", "applied", "overrides", "stands", "stepping", "stepped"):
        setattr(Run, name, timed(name, getattr(Run, name)))
    guard.weight_problems = timed("weight_problems", guard.weight_problems)
    hooks._PLACES["megatron.training.training"]["train_step"] = whole_iteration(  # type: ignore[index]
        hooks._PLACES["megatron.training.training"]["train_step"]
    )
    with tempfile.TemporaryDirectory() as folder, silence():
        recipe = Path(folder) / "r.recipe.yaml"
        recipe.write_text(RECIPE.format(width=width, sequence=sequence))
        os.environ |= {
            "RANK": "0",
            "WORLD_SIZE": "1",
            "LOCAL_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "0",
        }
        launch.main([str(SCRIPT), *words.split(), *FLAGS.split(), "--mup-recipe", str(recipe)])


def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with a clock."""

    def clocked(*args: Any, **kwargs: Any) -> Any:
        begun = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            spent[name].append(time.perf_counter() - begun)

    return clocked


def whole_iteration(wrapper: Callable[..., Any]) -> Callable[..., Any]:
    """The same for Megatron's iteration with ours around it."""

    def clocked(*args: Any, **kwargs: Any) -> Any:
        begun = time.perf_counter()
        try:
            return wrapper(*args, **kwargs)
        finally:
            iterations.append(time.perf_counter() - begun)

    return clocked


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Megatron says much that does not belong here."""
    keep = os.dup(1)
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 1)
        try:
            yield
        finally:
            sys.stdout.flush()
            os.dup2(keep, 1)


if __name__ == "__main__":
    main()
