"""Step time of DeepSpeed with the "mup" entry against the same run without it, interleaved in one process.

    python benchmarks/deepspeed_step_time.py [--steps 30] [--width 256] [--stages 0 1 2 3]

Two engines of one GPT-2 take turns, so that a machine that speeds up or slows down does so for both. "Without" has the
two groups that people write by hand (weight decay, none) and no entry; "with" has a plan of width ratio 4 and the guard
on. Prints, for each ZeRO stage, the median of the ratio of neighbouring steps, and its quartiles.
"""

import argparse
import os
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("LOCAL_RANK", "0")

import deepspeed
import torch
import transformers

import mup_megatron.deepspeed
from mup_megatron.huggingface import base_content
from mup_megatron.recipe import recipe, save_recipe

SEQUENCE, BATCH, LAYERS, VOCABULARY = 128, 4, 4, 1024


def config(width: int) -> transformers.GPT2Config:
    """4 layers with heads of 32."""
    return transformers.GPT2Config(
        n_embd=width,
        n_layer=LAYERS,
        n_head=width // 32,
        vocab_size=VOCABULARY,
        n_positions=SEQUENCE,
        bos_token_id=0,
        eos_token_id=0,
    )


def engine(width: int, stage: int, entry: dict[str, Any]) -> Any:
    """An engine of one model, with the entry or without."""
    torch.manual_seed(1)
    model = transformers.GPT2LMHeadModel(config(width))
    content: dict[str, Any] = {
        "train_batch_size": BATCH,
        "optimizer": {"type": "AdamW", "params": {"torch_adam": True, "lr": 1e-4, "weight_decay": 0.1}},
        "zero_optimization": {"stage": stage},
        "gradient_clipping": 1.0,
        **entry,
    }
    by_hand = [
        {"params": [p for p in model.parameters() if p.dim() > 1]},
        {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    made, *_ = deepspeed.initialize(
        model=model, config=content, model_parameters=model.parameters() if entry else by_hand
    )
    return made


def main() -> None:
    """Measures each stage and prints a line for it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3])
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)  # of torch's collectives, in DeepSpeed, at every step
    with tempfile.TemporaryDirectory() as folder:
        store = f"file://{folder}/store"
        torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
        deepspeed.init_distributed("gloo")
        path = Path(folder) / "r.yaml"
        tuned = {"lr": 1e-4, "weight_decay": 0.1}
        save_recipe(
            recipe({"base": base_content(config(arguments.width // 4)), "hyperparameters": tuned}, source="r"), path
        )
        print("stage  ms without  ratio with/without: median  quartiles")
        for stage in arguments.stages:
            without, ratios = measure(arguments.width, stage, arguments.steps, {"mup": {"recipe": str(path)}})
            low, _, high = statistics.quantiles(ratios, n=4)
            middle = statistics.median(ratios)
            print(f"{stage:5d}  {1e3 * without:10.1f}  {middle:30.3f}  {low:.3f} to {high:.3f}", flush=True)
        torch.distributed.destroy_process_group()


def measure(width: int, stage: int, steps: int, entry: dict[str, Any]) -> tuple[float, list[float]]:
    """Median seconds of a step without the entry, and the ratio of each pair of neighbouring steps."""
    engines = [engine(width, stage, {}), engine(width, stage, entry)]
    assert [mup_megatron.deepspeed.plan_of(one) is None for one in engines] == [True, False]
    generator = torch.Generator().manual_seed(1)
    times: tuple[list[float], list[float]] = ([], [])
    for step in range(steps + 3):
        tokens = torch.randint(VOCABULARY, (BATCH, SEQUENCE), generator=generator)
        for which in (0, 1) if step % 2 else (1, 0):
            begun = time.perf_counter()
            loss = engines[which](input_ids=tokens, labels=tokens).loss
            engines[which].backward(loss)
            engines[which].step()
            times[which].append(time.perf_counter() - begun)
    warm = [both[3:] for both in times]
    return statistics.median(warm[0]), [b / a for a, b in zip(*warm, strict=True)]


if __name__ == "__main__":
    main()
