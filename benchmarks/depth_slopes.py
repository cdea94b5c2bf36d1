"""Slopes over depth of the residual stream, with a rule of depth and without.

    python benchmarks/depth_slopes.py [--depths 2 4 8 16 32] [--seeds 3] [--steps 8] [--optimizer adam]

A GPT of width 64 on Megatron-Core, its base the shallowest: how large the stream behind the last layer is at the start,
and how far some steps of training have moved it, on a batch that no step trains on. A slope is of log(value) over
log(layers). What keeps its size is at 0; without a rule what layers learn adds up, and the stream's movement grows.
"""

import argparse
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

os.environ.setdefault("OMP_NUM_THREADS", "1")

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.recipe import Depth, Hyperparameters, Parametrization, Recipe, Schedule

DEPTHS = (2, 4, 8, 16, 32)
RULES: Mapping[str, Depth | None] = {"none": None, "α = 1": Depth(alpha=1.0), "α = ½": Depth(alpha=0.5)}
RATES = {"adam": 2.0**-8, "sgd": 2.0**-3}
ALLOWED = 0.15
"""The slope of what keeps its size, at most."""


@dataclass(frozen=True)
class Sizes:
    """The stream behind the last layer, as root mean squares."""

    start: float
    update: float


def main() -> None:
    """Measures, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="+", default=DEPTHS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--optimizer", choices=RATES, default="adam")
    arguments = parser.parse_args()
    depths, seeds, steps = sorted(arguments.depths), range(1, arguments.seeds + 1), arguments.steps
    from rich.progress import track

    from mup_megatron.training import ranks

    ranks.preload()
    jobs = [(rule, depth, seed) for rule in RULES for depth in depths for seed in seeds]
    found: dict[tuple[str, int], list[Sizes]] = {}
    with ranks.joined(tensor=1, pipeline=1, virtual_stages=None, seed=1):
        for rule, depth, seed in track(jobs):
            recipe = recipe_of(model(depths[0]), RULES[rule], arguments.optimizer)
            found.setdefault((rule, depth), []).append(measured(model(depth), recipe, steps=steps, seed=seed))
    print("\n".join(table(found, depths)))


def model(layers: int) -> ModelFile:
    """Returns a narrow GPT of so many layers."""
    return ModelFile(
        num_layers=layers,
        hidden_size=64,
        num_attention_heads=4,
        vocab_size=256,
        seq_length=32,
        untie_embeddings_and_output_weights=True,
        transformer_impl="local",
    )


def recipe_of(base: ModelFile, depth: Depth | None, optimizer: str) -> Recipe:
    """Returns a recipe with this rule of depth, and embeddings as large as TP5 tuned them for GPT-3."""
    return Recipe(
        base=base,
        hyperparameters=Hyperparameters(
            lr=RATES[optimizer],
            init_method_std=0.05,
            embedding_multiplier=10.0,
            weight_decay=0.0,
            adam_eps=1e-12,
            clip_grad=0.0,
        ),
        schedule=Schedule(lr_decay_style="linear"),
        parametrization=Parametrization(depth=depth, optimizer=optimizer),
    )


def measured(target: ModelFile, recipe: Recipe, *, steps: int, seed: int) -> Sizes:
    """Trains a live model, and looks at its last layer before and behind it."""
    import torch

    from mup_megatron.check.measure.measurements import RunProtocol
    from mup_megatron.check.run_megatron import ONE_PROCESS
    from mup_megatron.check.subjects.megatron import build_megatron

    protocol = RunProtocol(steps=steps, recorded=(steps,), batch_size=8, spectral=False)
    trainee = build_megatron(
        target, recipe, recipe.plan(target), seed=seed, protocol=protocol, layout=ONE_PROCESS, world_size=1
    )
    last = next(module for name, module, _ in trainee.modules() if name == f"decoder.layers.{target.num_layers - 1}")
    seen: list[torch.Tensor] = []

    def keep(_module: object, _args: object, output: object) -> None:
        stream = output[0] if isinstance(output, tuple) else output
        assert isinstance(stream, torch.Tensor)
        seen.append(stream.detach().double())

    def look() -> torch.Tensor:
        hook = last.register_forward_hook(keep)
        with torch.no_grad():
            trainee.forward()
        hook.remove()
        return seen.pop()

    before = look()
    for step in range(steps):
        trainee.step(step)
    change = look() - before
    return Sizes(*(float(each.square().mean().sqrt()) for each in (before, change)))


def table(found: Mapping[tuple[str, int], Sequence[Sizes]], depths: Sequence[int]) -> list[str]:
    """Returns a line for each rule and quantity: the mean over seeds at each depth, the slope, and whether it stays."""
    lines = [
        f"| | {' | '.join(f'L {depth}' for depth in depths)} | slope | within ±{ALLOWED:g} |",
        f"|---|{'---|' * (len(depths) + 2)}",
    ]
    for rule in RULES:
        for quantity in ("start", "update"):
            values = [fmean(getattr(sizes, quantity) for sizes in found[rule, depth]) for depth in depths]
            slope = slope_of(depths, values)
            cells = " | ".join(f"{value:.4g}" for value in values)
            what = f"{rule}: {'size at the start' if quantity == 'start' else 'moved by training'}"
            lines.append(f"| {what} | {cells} | {slope:+.2f} | {'yes' if abs(slope) <= ALLOWED else 'no'} |")
    return lines


def slope_of(depths: Sequence[int], values: Sequence[float]) -> float:
    """Returns the slope of log(value) over log(depth), by least squares."""
    xs, ys = [math.log(depth) for depth in depths], [math.log(value) for value in values]
    mean_x, mean_y = fmean(xs), fmean(ys)
    return sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / sum((x - mean_x) ** 2 for x in xs)


if __name__ == "__main__":
    main()
