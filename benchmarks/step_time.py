"""Step time with the plan of a width ratio of 4 against the same model without it, interleaved in one run; or with a
multiplier on every residual branch.

    python benchmarks/step_time.py [--steps 30] [--widths 128 256 512] [--with branches]

Both models live in one process and take turns, so that a machine that speeds up or slows down does so for both, and
time is the processor's, which other processes do not have a part in. "Without" is a plan
at its base, which hooks nothing and overrides nothing (tests/megatron/test_noop.py). Prints the median of the
ratio of neighbouring steps, and its quartiles.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Mapping

os.environ.setdefault("OMP_NUM_THREADS", "1")

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.recipe import Recipe, recipe
from mup_megatron.training import ranks
from mup_megatron.training.options import TrainingOptions, batch_sizes

SEQUENCE, BATCH, LAYERS, VOCABULARY = 128, 8, 4, 1024


def model(width: int) -> ModelFile:
    """4 layers with heads of 32."""
    return ModelFile(
        num_layers=LAYERS,
        hidden_size=width,
        num_attention_heads=width // 32,
        vocab_size=VOCABULARY,
        seq_length=SEQUENCE,
        transformer_impl="local",
    )


def tuned_at(width: int, **values: float) -> Recipe:
    """A recipe of that width with the values that matter here."""
    return recipe(
        {
            "base": model(width).model_dump(),
            "hyperparameters": {"lr": 1e-4, "weight_decay": 0.1, **values},
        },
        source="benchmark",
    )


SIDES: Mapping[str, Callable[[int], Recipe]] = {
    "plan": lambda width: tuned_at(width // 4),
    "branches": lambda width: tuned_at(width, residual_multiplier=0.5),
}
"""What the model has on the side that is "with", at a width."""


def main() -> None:
    """Measures each width and prints a line for it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--widths", type=int, nargs="+", default=[128, 256, 512])
    parser.add_argument("--with", dest="side", choices=SIDES, default="plan")
    arguments = parser.parse_args()
    ranks.preload()
    print("width  ms without  ratio with/without: median  quartiles")
    for width in arguments.widths:
        without, ratios = measure(width, arguments.steps, SIDES[arguments.side])
        low, _, high = statistics.quantiles(ratios, n=4)
        print(
            f"{width:5d}  {1e3 * without:10.1f}  {statistics.median(ratios):30.3f}  {low:.3f} to {high:.3f}", flush=True
        )


def measure(width: int, steps: int, side: Callable[[int], Recipe]) -> tuple[float, list[float]]:
    """Median seconds of a step without, and the ratio of each pair of neighbouring steps."""
    options = TrainingOptions(train_iters=10 * steps, global_batch_size=BATCH)
    with ranks.joined(tensor=1, pipeline=1, virtual_stages=None, seed=1):
        from mup_megatron.training.build import build
        from mup_megatron.training.loop import train_iteration

        tokens = _Noise()
        runs = []
        for chosen in (tuned_at(width), side(width)):
            runs.append(build(model(width), chosen, chosen.plan(model(width)), options, initialize=True))
        sizes = batch_sizes(options, 1)
        times: tuple[list[float], list[float]] = ([], [])
        for step in range(steps + 3):
            order = (0, 1) if step % 2 else (1, 0)
            for which in order:
                begun = time.process_time()
                train_iteration(runs[which], tokens, step, sizes, problem=False)
                if step >= 3:  # the first steps allocate
                    times[which].append(time.process_time() - begun)
    return statistics.median(times[0]), [b / a for a, b in zip(*times, strict=True)]


class _Noise:
    """Random tokens in the form of Megatron's data set: what a step costs does not depend on them."""

    class config:  # noqa: N801 - Megatron's name
        """What a step reads of a data set's configuration."""

        sequence_length = SEQUENCE

    def __len__(self) -> int:
        return 10**6

    def __getitem__(self, index: int) -> dict[str, object]:
        import torch

        generator = torch.Generator().manual_seed(index)
        tokens = torch.randint(VOCABULARY, (SEQUENCE + 1,), generator=generator)
        return {
            "tokens": tokens[:-1],
            "labels": tokens[1:],
            "loss_mask": torch.ones(SEQUENCE),
            "position_ids": torch.arange(SEQUENCE),
        }


if __name__ == "__main__":
    main()
