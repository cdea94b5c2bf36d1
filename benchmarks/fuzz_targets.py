"""What the fuzzer damages: sound inputs of every command that reads a file, and the command that then reads them.

A new command, or a new kind of file, is one more `Target`. Sound inputs are made once, by the commands themselves.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]

TRAIN_NUMBERS = (
    *("--train-iters", "--global-batch-size", "--micro-batch-size", "--seed", "--eval-iters", "--eval-interval"),
    *("--log-interval", "--save-interval", "--tensor-model-parallel-size", "--pipeline-model-parallel-size"),
    "--num-layers-per-virtual-pipeline-stage",
)
SWEEP_NUMBERS = ("--trials", "--workers", "--train-iters", "--global-batch-size", "--micro-batch-size", "--eval-iters",
                 "--seed")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Target:
    """One command line and the files that it reads."""

    words: tuple[str, ...]
    damaged: Mapping[str, str]
    """Path of a file, or of what begins with it → its kind, a key of `fuzz_mutators.KINDS`. One of them is damaged."""
    sound: tuple[str, ...] = ()
    """Further files and folders that the command needs."""
    first: tuple[str, ...] = ()
    """A command line that is run within the case's folder before: caches are named after the place of the data."""
    numbers_of: tuple[str, ...] = ()
    """Flags whose values are made extreme, in every tenth case."""
    weight: int = 1
    """How often it is drawn, relative to the others."""
    binary: bool = False
    """Whether it is about checkpoints, studies, data and caches; else about texts that people write."""
    may_change: tuple[str, ...] = field(default=("results/", "out/", "verdict/"))
    """What begins like this may change although the command refuses, since it is its own output."""

    @property
    def command(self) -> str:
        """The command's name."""
        return self.words[0]


_TRAINING = ("--data", "text", "--train-iters", "4", "--global-batch-size", "2", "--eval-iters", "1",
             "--save", "ck", "--load", "ck", "--output", "out", "--save-interval", "2",
             "--data-cache-path", "cache")  # fmt: skip
_TRAIN = ("train", "base.yaml", "--recipe", "r.yaml", *_TRAINING)
_SWEEP = ("sweep", "base.yaml", "--data", "text", "--trials", "3", "--study", "s", "--space", "space.yaml",
          "--train-iters", "2", "--global-batch-size", "2", "--eval-iters", "1")  # fmt: skip
_BEST_OF = ("sweep", "base.yaml", "--data", "text", "--best", "1", "--of", "s", "--study", "s2",
            "--train-iters", "2", "--global-batch-size", "2", "--eval-iters", "1")  # fmt: skip
_DATA = ("text.bin", "text.idx", "text.json")
_CHECK = ("--level", "quick", "--seeds", "2", "--output", "verdict")

TARGETS: dict[str, Target] = {
    # ---- checkpoints, studies, data, caches ------------------------------------------------------------------------
    "train from a checkpoint": Target(
        words=_TRAIN,
        damaged={"ck": "checkpoint"},
        sound=("base.yaml", "r.yaml", *_DATA),
        numbers_of=TRAIN_NUMBERS,
        weight=8,
        binary=True,
        may_change=("out/", "cache/"),
    ),
    "export a checkpoint": Target(
        words=("export", "ck", "--recipe", "r.yaml", "--to", "exported"),
        damaged={"ck": "checkpoint", "r.yaml": "yaml"},
        sound=("base.yaml", *_DATA),
        weight=4,
        binary=True,
        may_change=("exported/",),
    ),
    "fold a checkpoint": Target(
        words=("fold", "ck", "--recipe", "r.yaml", "--to", "folded"),
        damaged={"ck": "checkpoint", "r.yaml": "yaml"},
        sound=("base.yaml", *_DATA),
        weight=2,
        binary=True,
        may_change=("folded/",),
    ),
    "unfold a checkpoint": Target(
        words=("unfold", "folded", "--recipe", "r.yaml", "--to", "unfolded"),
        damaged={"folded": "checkpoint"},
        sound=("base.yaml", "r.yaml", "ck", *_DATA),
        first=("fold", "ck", "--recipe", "r.yaml", "--to", "folded"),
        weight=2,
        binary=True,
        may_change=("unfolded/",),
    ),
    "train on data": Target(
        words=_TRAIN,
        damaged={"text": "data"},
        sound=("base.yaml", "r.yaml", *_DATA),
        numbers_of=TRAIN_NUMBERS,
        weight=4,
        binary=True,
        may_change=("out/", "cache/"),
    ),
    "train into an output": Target(
        words=_TRAIN,
        damaged={"out/run.json": "json", "out/metrics.csv": "text"},
        sound=("base.yaml", "r.yaml", "ck", "out", *_DATA),
        weight=1,
        binary=True,
        may_change=("out/", "cache/"),
    ),
    "train from cached indices": Target(
        words=(*_TRAIN[:12], "--output", "other", "--data-cache-path", "cache"),
        damaged={"cache/index/*/*.npy": "npy", "cache/index/*/*.txt": "text"},
        sound=("base.yaml", "r.yaml", *_DATA),
        first=(*_TRAIN[:12], "--output", "out", "--data-cache-path", "cache"),
        weight=2,
        binary=True,
        may_change=("other/", "cache/"),
    ),
    "sweep goes on": Target(
        words=_SWEEP,
        damaged={"results/s.db": "study"},
        sound=("base.yaml", "space.yaml", "results/cache", *_DATA),
        numbers_of=SWEEP_NUMBERS,
        weight=4,
        binary=True,
        may_change=("results/s/", "results/cache/"),
    ),
    "sweep of the best": Target(
        words=_BEST_OF,
        damaged={"results/s.db": "study"},
        sound=("base.yaml", "space.yaml", "results/cache", *_DATA),
        weight=2,
        binary=True,
        may_change=("results/s2", "results/cache/"),
    ),
    "sweep on data": Target(
        words=("sweep", *_SWEEP[1:4], "--trials", "1", *_SWEEP[6:]),
        damaged={"text": "data", "space.yaml": "yaml", "base.yaml": "yaml"},
        sound=("base.yaml", "space.yaml", *_DATA),
        numbers_of=SWEEP_NUMBERS,
        weight=2,
        binary=True,
    ),
    "transfer": Target(
        words=("transfer", "--study", "s", "-o", "best.yaml"),
        damaged={"results/s.db": "study"},
        weight=10,
        binary=True,
        may_change=(),
    ),
    "sweep report": Target(
        words=("sweep", "report", "s"),
        damaged={"results/s.db": "study"},
        weight=5,
        binary=True,
        may_change=("results/s/report/",),
    ),
    "data from text": Target(
        words=("data", "in.txt", "-o", "made/d", "--tokenizer", "bpe:300"),
        damaged={"in.txt": "text"},
        weight=4,
        binary=True,
    ),
    "data from lines": Target(
        words=("data", "docs.jsonl", "in.txt", "-o", "made/d", "--tokenizer", "byte", "--format", "json"),
        damaged={"docs.jsonl": "jsonl"},
        sound=("in.txt",),
        weight=6,
        binary=True,
    ),
    "data with a tokenizer": Target(
        words=("data", "in.txt", "-o", "made/d", "--tokenizer", "tokenizer.json"),
        damaged={"tokenizer.json": "json"},
        sound=("in.txt",),
        weight=8,
        binary=True,
    ),
    "check from references": Target(
        words=("check", "base.yaml", "--recipe", "r.yaml", *_CHECK, "--widths", "32,64,96"),
        damaged={"results/check/references/*.json": "json"},
        sound=("base.yaml", "r.yaml", "results/check"),
        weight=1,
        binary=True,
    ),
    # ---- texts that people write -----------------------------------------------------------------------------------
    "check a model file": Target(
        words=("check", "base.yaml", "--recipe", "r.yaml", *_CHECK, "--widths", "32,64,96"),
        damaged={"base.yaml": "yaml", "r.yaml": "yaml"},
        sound=("base.yaml", "r.yaml", "results/check"),
    ),
    "check a configuration": Target(
        words=("check", "gpt2.json", "--recipe", "gpt2.recipe.yaml", *_CHECK, "--widths", "32,64,96"),
        damaged={"gpt2.json": "json", "gpt2.recipe.yaml": "yaml"},
        sound=("gpt2.json", "gpt2.recipe.yaml"),
    ),
    "check an engine": Target(
        words=(
            "check",
            "gpt2.json",
            "--recipe",
            "gpt2.recipe.yaml",
            *_CHECK,
            "--widths",
            "32,64,96",
            "--deepspeed",
            "ds.json",
        ),
        damaged={"ds.json": "json"},
        sound=("gpt2.json", "gpt2.recipe.yaml"),
    ),
    "explain": Target(
        words=("explain", "target.yaml", "--recipe", "r.yaml"),
        damaged={"target.yaml": "yaml", "r.yaml": "yaml"},
        sound=("target.yaml", "r.yaml"),
        weight=10,
    ),
    "explain a configuration": Target(
        words=("explain", "llama", "--recipe", "llama.recipe.yaml", "--format", "json"),
        damaged={"llama/config.json": "json", "llama.recipe.yaml": "yaml"},
        sound=("llama", "llama.recipe.yaml"),
        weight=8,
    ),
    "ds-config": Target(
        words=("ds-config", "gpt2.json", "--recipe", "gpt2.recipe.yaml", "--train-iters", "10", "-o", "new.json"),
        damaged={"gpt2.json": "json", "gpt2.recipe.yaml": "yaml"},
        sound=("gpt2.json", "gpt2.recipe.yaml"),
        numbers_of=("--train-iters", "--global-batch-size", "--micro-batch-size"),
        weight=6,
    ),
    "ds-config --check": Target(
        words=("ds-config", "gpt2.json", "--recipe", "gpt2.recipe.yaml", "--check", "ds.json"),
        damaged={"ds.json": "json"},
        sound=("gpt2.json", "gpt2.recipe.yaml"),
        weight=10,
    ),
    "args": Target(
        words=("args", "target.yaml", "--recipe", "r.yaml", "--train-iters", "10"),
        damaged={"target.yaml": "yaml", "r.yaml": "yaml"},
        sound=("target.yaml", "r.yaml"),
        numbers_of=("--train-iters",),
        weight=6,
    ),
    "model --from-args": Target(
        words=("model", "--from-args", "-o", "new.yaml", "--", "run.sh"),
        damaged={"run.sh": "text"},
        weight=10,
    ),
    "from-native": Target(
        words=("from-native", "-o", "new.yaml", "--", "native.sh"),
        damaged={"native.sh": "text"},
        weight=6,
    ),
    "recipe": Target(
        words=("recipe", "--base", "base.yaml", "--lr", "0.01", "-o", "new.yaml"),
        damaged={"base.yaml": "yaml"},
        numbers_of=("--lr", "--weight-decay", "--adam-eps", "--lr-warmup-fraction"),
        weight=3,
    ),
    "recipe of a configuration": Target(
        words=("recipe", "--base", "gpt2.json", "--lr", "0.01", "-o", "new.yaml"),
        damaged={"gpt2.json": "json"},
        weight=3,
    ),
    "proxy": Target(
        words=("proxy", "target.yaml", "-o", "new.yaml"),
        damaged={"target.yaml": "yaml"},
        numbers_of=("--hidden-size", "--trials", "--trial-tokens", "--target-tokens", "--budget"),
        weight=4,
    ),
}
"""By a name that the table of results shows."""

_BASE = "num_layers: 1\nhidden_size: 32\nnum_attention_heads: 1\nvocab_size: 300\nseq_length: 16\n"
_GPT2 = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "n_embd": 64,
    "n_head": 4,
    "n_layer": 1,
    "n_positions": 64,
    "vocab_size": 256,
    "initializer_range": 0.06,
    "attn_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
_LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 256,
    "max_position_embeddings": 64,
    "initializer_range": 0.12,
}
_SHAPE = "--num-layers 2 --hidden-size 128 --num-attention-heads 4 --seq-length 16 --max-position-embeddings 16"
_RUN = """#!/bin/bash
set -euo pipefail
HIDDEN=${HIDDEN:-128}
MODEL=(
    --num-layers 2
    --hidden-size $HIDDEN
    --num-attention-heads 4 --seq-length 16 --max-position-embeddings 16
)
TOKENS="--vocab-size 300 --make-vocab-size-divisible-by 8"
torchrun --nproc-per-node 1 pretrain_gpt.py "${MODEL[@]}" $TOKENS --swiglu \\
    --attention-dropout 0 --hidden-dropout 0 --lr 1e-4 --bf16 "$@"
"""
_NATIVE = (
    f"python pretrain_gpt.py {_SHAPE} --vocab-size 300 --lr 1e-3 --use-mup --mup-base-hidden-size 32 "
    "--mup-base-head-dim 32 \\\n  --lr-decay-style cosine --lr-warmup-iters 2 --train-iters 20 --weight-decay 0.1\n"
)


def make_inputs(folder: Path, run: Callable[..., None]) -> None:
    """Makes the sound inputs of every target.

    Args:
        folder: gets them.
        run: runs `mup-megatron WORDS…` within the folder, and raises when that fails.
    """
    text = " ".join(f"{n} squared is {n * n}," for n in range(400))
    written = {
        "base.yaml": _BASE,
        "target.yaml": _BASE.replace("32", "128").replace("heads: 1", "heads: 4"),
        "space.yaml": "lr: {low: -4, high: -1, base: 10}\noutput_multiplier: {low: 0.5, high: 2, log: true}\n",
        "in.txt": text,
        "docs.jsonl": "".join(json.dumps({"text": text[n : n + 80], "id": n}) + "\n" for n in range(0, 1600, 80)),
        "gpt2.json": json.dumps(_GPT2, indent=1),
        "llama/config.json": json.dumps({**_LLAMA, "hidden_size": 256, "num_attention_heads": 16,
                                         "num_key_value_heads": 8, "intermediate_size": 768}, indent=1),
        "llama_base.json": json.dumps(_LLAMA, indent=1),
        "run.sh": _RUN,
        "native.sh": _NATIVE,
    }  # fmt: skip
    for name, content in written.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content, encoding="utf-8")
    run("recipe", "--base", "base.yaml", "--lr", "0.01", "-o", "r.yaml")
    run("recipe", "--base", "gpt2.json", "--lr", "0.008", "-o", "gpt2.recipe.yaml")
    run("recipe", "--base", "llama_base.json", "--lr", "0.016", "-o", "llama.recipe.yaml")
    run("ds-config", "gpt2.json", "--recipe", "gpt2.recipe.yaml", "--global-batch-size", "4", "--micro-batch-size", "4",
        "-o", "ds.json")  # fmt: skip
    run("data", "in.txt", "-o", "bpe", "--tokenizer", "bpe:300")
    shutil.copy(folder / "bpe.tokenizer.json", folder / "tokenizer.json")
    run("data", "in.txt", "-o", "text", "--tokenizer", "byte")
    run(*_TRAIN)
    # As if the run had been stopped after its first checkpoint: there is something left to do.
    (folder / "ck" / "latest_checkpointed_iteration.txt").write_text("2", encoding="utf-8")
    shutil.rmtree(folder / "ck" / "iter_0000004")
    (folder / "out" / "result.json").unlink()
    run(*_SWEEP[:5], "2", *_SWEEP[6:])
    run(*TARGETS["check a model file"].words)
