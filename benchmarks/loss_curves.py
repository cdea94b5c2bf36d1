"""Loss curves to the last bit, for a change that must change none: recorded in one checkout, compared with another's.

    python benchmarks/loss_curves.py -o before.json          # in the checkout before, in the same environment
    python benchmarks/loss_curves.py -o after.json --against before.json

The curves: every trial and run of the quickstart; our training loop on one process and on four (tensor and pipeline
parallel, sequence parallel, distributed optimizer); Megatron-LM's loop on two processes; DeepSpeed with ZeRO 0, 2 and 3
on two. Only commands are used, none of the package's modules, so that checkouts may differ in everything inside.
Numbers are written as hexadecimal floats. Some six minutes on two cores. Ends with 1 if a curve differs.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
Curves = dict[str, list[str]]

MODEL = {
    "num_layers": 4,
    "hidden_size": 128,
    "num_attention_heads": 8,
    "vocab_size": 1024,
    "make_vocab_size_divisible_by": 8,
    "seq_length": 32,
    "transformer_impl": "local",
}
RECIPE = {
    "version": 1,
    "base": {**MODEL, "num_layers": 2, "hidden_size": 64, "num_attention_heads": 4},
    "hyperparameters": {
        "lr": 0.004,
        "min_lr": 0.0004,
        "init_method_std": 0.05,
        "embedding_multiplier": 5.0,
        "output_multiplier": 0.5,
        "attention_multiplier": 1.5,
        "weight_decay": 0.1,
        "adam_beta2": 0.95,
        "adam_eps": 1e-6,
        "clip_grad": 0.7,
    },
    "schedule": {"lr_decay_style": "cosine", "lr_warmup_fraction": 0.2},
    "per_parameter": [{"match": "*.linear_fc2.weight", "lr_mult": 2.0, "multiplier": 0.5}],
}
LAYOUT = """--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --sequence-parallel
--use-distributed-optimizer""".split()
LOOP = """--num-layers 4 --hidden-size 128 --num-attention-heads 8 --seq-length 32 --max-position-embeddings 32
--attention-dropout 0 --hidden-dropout 0 --micro-batch-size 2 --global-batch-size 8 --train-iters 10 --lr 0.004
--min-lr 0.0004 --lr-decay-style cosine --lr-warmup-fraction 0.2 --weight-decay 0.1 --adam-beta2 0.95 --adam-eps 1e-6
--clip-grad 0.7 --eval-iters 0 --eval-interval 100 --log-interval 1 --tensorboard-log-interval 1 --mock-data --split
949,50,1 --tokenizer-type NullTokenizer --vocab-size 1023 --tensor-model-parallel-size 2 --transformer-impl local
--make-vocab-size-divisible-by 8 --no-persist-layer-norm --no-gradient-accumulation-fusion --no-masked-softmax-fusion
--no-bias-gelu-fusion --no-bias-swiglu-fusion --no-bias-dropout-fusion --no-rope-fusion --use-cpu-initialization
--distributed-backend gloo --num-workers 0""".split()


def run(*words: str | Path) -> None:
    """Runs a command of this checkout; its output is shown if it fails."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([*map(str, words)], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, words))}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")


def started(ranks: int, *words: str | Path) -> Sequence[str | Path]:
    """The command line of a module or script on so many processes."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *words]


def column(path: Path, *names: str) -> list[str]:
    """The columns of a CSV, row by row, as hexadecimal floats."""
    with path.open(encoding="utf-8") as stream:
        return [float(row[name]).hex() for row in csv.DictReader(stream) for name in names]


def quickstart(folder: Path) -> Curves:
    """Every run of the quickstart."""
    run(sys.executable, "-m", "mup_megatron", "quickstart", "--output", folder / "quickstart")
    found = sorted(folder.rglob("metrics.csv"))
    return {f"quickstart {path.parent.relative_to(folder)}": column(path, "loss", "grad_norm") for path in found}


def training(folder: Path) -> Curves:
    """Our own loop, in two layouts."""
    model, recipe = folder / "model.yaml", folder / "own.recipe.yaml"
    model.write_text(json.dumps(MODEL))
    recipe.write_text(json.dumps(RECIPE))
    run(sys.executable, "-m", "mup_megatron", "data", "-o", folder / "text")
    given = [
        "train",
        model,
        "--recipe",
        recipe,
        "--data",
        folder / "text",
        "--global-batch-size",
        8,
        "--train-iters",
        12,
    ]
    curves = {}
    for name, ranks, layout in (("one process", 1, []), ("four processes", 4, LAYOUT)):
        out = folder / name.replace(" ", "-")
        run(*started(ranks, "-m", "mup_megatron", *given, "--output", out, *layout))
        curves[f"training, {name}"] = column(out / "metrics.csv", "loss", "grad_norm")
    return curves


def megatron_lm(folder: Path) -> Curves:
    """Megatron-LM's loop, from the events that it writes."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe = folder / "own.recipe.yaml"
    recipe.write_text(json.dumps(RECIPE))
    script = ["-m", "mup_megatron.launch", "examples/pretrain.py", *LOOP, "--mup-recipe", recipe]
    run(*started(2, *script, "--tensorboard-dir", folder / "events"))
    events = EventAccumulator(str(folder / "events"))
    events.Reload()
    names = ("lm loss", "grad-norm", "learning-rate")
    return {f"Megatron-LM, {name}": [each.value.hex() for each in events.Scalars(name)] for name in names}


def deepspeed(folder: Path) -> Curves:
    """DeepSpeed at three stages of ZeRO."""
    curves = {}
    content = json.loads((ROOT / "examples" / "deepspeed_gpt2" / "ds_mup.json").read_text(encoding="utf-8"))
    for stage in (0, 2, 3):
        config, out = folder / f"zero{stage}.json", folder / f"zero{stage}.losses"
        config.write_text(json.dumps({**content, "zero_optimization": {"stage": stage}}))
        script = Path(__file__).with_name("loss_curves_deepspeed.py")
        run(*started(2, "-m", "mup_megatron.launch", "--deepspeed", script, "--deepspeed_config", config, "--out", out))
        curves[f"DeepSpeed, ZeRO {stage}"] = json.loads(out.read_text(encoding="utf-8"))
    return curves


PARTS: dict[str, Callable[[Path], Curves]] = {
    "training": training,
    "megatron-lm": megatron_lm,
    "deepspeed": deepspeed,
    "quickstart": quickstart,
}


def main() -> None:
    """Records, and compares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--against", type=Path, help="what another checkout wrote")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    arguments = parser.parse_args()
    curves: Curves = {}
    for part in arguments.parts:
        with tempfile.TemporaryDirectory() as folder:
            curves |= PARTS[part](Path(folder))
        print(f"{part}: recorded", flush=True)
    arguments.output.write_text(json.dumps(curves, indent=1) + "\n", encoding="utf-8")
    if arguments.against is None:
        return
    before = json.loads(arguments.against.read_text(encoding="utf-8"))
    compared = {name: before.get(name) == curve for name, curve in curves.items()}
    for name, equal in compared.items():
        print(f"{'equal' if equal else 'DIFFERS'}  {name}  ({len(curves[name])} numbers)")
    raise SystemExit(0 if all(compared.values()) else 1)


if __name__ == "__main__":
    main()
