"""From standard parametrization to μP in six steps on Megatron-Core, one change at a time, with a picture of each.

    python benchmarks/six_steps.py [--widths 64 128 256] [--seeds 1] [--steps 100] [-o results/six_steps]

A GPT whose heads grow with width. Each step adds what one rule of μP says, written out as a recipe without μP would
have to say it at that width; the last is the recipe with μP. For each step and width: the loss over the learning rate,
and how far ten iterations at the base's rate move what the model computes. Pictures are made for docs/six-steps.md;
finished runs are lines of `runs.jsonl`, and not repeated.
"""

import argparse
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from many_runs import KeptRuns, forked_workers

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.check.transfer import at_rate
from mup_megatron.recipe import Hyperparameters, Parametrization, PerParameter, Recipe, Schedule

BASE = 64
RATES = tuple(2.0**power for power in range(-10, -3))
LEARNING_RATE = 2.0**-7
HIDDEN = ("*.linear_qkv.weight", "*.linear_proj.weight", "*.linear_fc1.weight", "*.linear_fc2.weight")
TUNED = {
    "lr": LEARNING_RATE,
    "min_lr": LEARNING_RATE / 10,
    "init_method_std": 0.06,
    "embedding_multiplier": 4.0,
    "output_multiplier": 4.0,
    "weight_decay": 0.1,
}
MOVED = {
    "embedding.word_embeddings": "embedding",
    "decoder.layers.1.self_attention.core_attention.scale_mask_softmax": "attention logits",
    "decoder.layers.1": "last layer",
    "output_layer": "logits",
}
"""What is looked at, and how it is called; of the softmax, what goes into it."""
MOVES = 10
"""Iterations after which it is looked how far outputs have moved."""
BATCH = 8


def model(width: int) -> ModelFile:
    """Returns the GPT of a width: two heads, as large as that makes them."""
    return ModelFile(
        num_layers=2,
        hidden_size=width,
        num_attention_heads=2,
        vocab_size=1024,
        seq_length=64,
        untie_embeddings_and_output_weights=True,
        add_bias_linear=False,
        position_embedding_type="none",
        transformer_impl="local",
    )


@dataclass(frozen=True)
class Step:
    """A parametrization on the way, and what is new in it."""

    name: str
    says: str


STEPS = (
    Step("standard", "one learning rate, one initial std, 1/√d: whatever the width"),
    Step("1 init", "hidden matrices start with σ/√r"),
    Step("2 hidden rate", "hidden matrices learn with η/r"),
    Step("3 readout", "logits are multiplied by 1/r"),
    Step("4 attention", "attention logits by 1/d, not 1/√d"),
    Step("5 eps", "Adam's ε becomes ε/r"),
    Step("6 decay", "weight decay of hidden matrices λ·r: μP"),
)


def recipe(step: int, width: int) -> Recipe:
    """Returns the recipe of the base, as it has to be for a target of this width."""
    r = width / BASE
    values: dict[str, Any] = {**TUNED}
    entry: dict[str, float] = {}
    if step == len(STEPS) - 1:
        return _recipe(values, "mup", ())
    if step >= 1:
        entry["init_mult"] = r**-0.5
    if step >= 2:
        entry["lr_mult"] = 1 / r
    if step >= 3:
        values["output_multiplier"] = TUNED["output_multiplier"] / r
    if step >= 4:
        values["attention_multiplier"] = r**-0.5  # beside 1/√d
    if step >= 5:
        values["adam_eps"] = 1e-8 / r
    return _recipe(values, "standard", [PerParameter(match=match, **entry) for match in HIDDEN] if entry else ())


def _recipe(values: Mapping[str, Any], rule: str, each: Sequence[PerParameter]) -> Recipe:
    return Recipe(
        base=model(BASE),
        hyperparameters=Hyperparameters.model_validate(values),
        schedule=Schedule(lr_decay_style="linear", lr_warmup_fraction=0.1),
        parametrization=Parametrization.model_validate({"rule": rule}),
        per_parameter=tuple(each),
    )


# ---- running -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """The runs of a step at a width: a loss for each rate and seed, and how far outputs move."""

    step: int
    width: int
    iterations: int
    seeds: int


@dataclass(frozen=True)
class Found:
    """The losses by rate, mean over seeds, infinite where a run diverges; and moves by module."""

    losses: Mapping[float, float]
    moves: Mapping[str, float]


def run(job: Job, data: Path, output: Path) -> Found:
    """Runs what is missing of a job."""
    from mup_megatron.training.options import TrainingOptions
    from mup_megatron.training.train import run_training

    kept, target, tuned = KeptRuns(output / "runs.jsonl"), model(job.width), recipe(job.step, job.width)

    def loss(lr: float, seed: int) -> float:
        of_run = at_rate(tuned, lr)
        plan = of_run.plan(target).to_json()
        return kept.loss(
            [plan["parameters"], plan["model"], job.iterations, seed],  # at the base all steps are one run
            lambda: run_training(
                target,
                of_run,
                data,
                TrainingOptions(train_iters=job.iterations, global_batch_size=BATCH, eval_iters=0, seed=seed),
            ),
            step=STEPS[job.step].name,
            width=job.width,
            lr=lr,
            seed=seed,
        )

    losses = {lr: fmean(loss(lr, seed) for seed in range(1, job.seeds + 1)) for lr in RATES}
    return Found(losses, moves(target, tuned))


def moves(target: ModelFile, tuned: Recipe) -> dict[str, float]:
    """Returns how far some iterations move the outputs of modules, as root mean squares."""
    import torch

    from mup_megatron.check.measure.measurements import RunProtocol
    from mup_megatron.check.run_megatron import ONE_PROCESS
    from mup_megatron.check.subjects.megatron import build_megatron
    from mup_megatron.training import ranks

    protocol = RunProtocol(steps=MOVES, recorded=(MOVES,), batch_size=BATCH, spectral=False)
    with ranks.joined(tensor=1, pipeline=1, virtual_stages=None, seed=1):
        trainee = build_megatron(
            target, tuned, tuned.plan(target), seed=1, protocol=protocol, layout=ONE_PROCESS, world_size=1
        )
        modules = {name: module for name, module, _ in trainee.modules() if name in MOVED}

        def look() -> dict[str, torch.Tensor]:
            seen: dict[str, torch.Tensor] = {}

            def keep(name: str, args: Any, output: Any) -> None:
                value = args if name.endswith("softmax") else output
                first = value[0] if isinstance(value, tuple) else value
                seen[name] = first.detach().double()

            hooks = [
                module.register_forward_hook(lambda _module, args, output, name=name: keep(name, args, output))
                for name, module in modules.items()
            ]
            with torch.no_grad():
                trainee.forward()
            for hook in hooks:
                hook.remove()
            return seen

        before = look()
        for step in range(MOVES):
            trainee.step(step)
        after = look()
    return {called: float((after[name] - before[name]).square().mean().sqrt()) for name, called in MOVED.items()}


# ---- telling -------------------------------------------------------------------------------------------------------


def table(found: Mapping[tuple[int, int], Found], widths: Sequence[int]) -> list[str]:
    """Returns a row for each step: log2 of the best rate at each width with its loss, and regret at the widest."""
    lines = [
        f"| step | what is new | {' | '.join(f'{width}' for width in widths)} | regret at {widths[-1]} |",
        f"|---|---|{'---|' * (len(widths) + 1)}",
    ]
    best = min(found[0, BASE].losses, key=lambda lr: found[0, BASE].losses[lr])
    for number, step in enumerate(STEPS):
        cells = []
        for width in widths:
            losses = found[number, width].losses
            optimum = min(losses, key=lambda lr: losses[lr])
            cells.append(f"{losses[optimum]:.3f} at {math.log2(optimum):.0f}")
        wide = found[number, widths[-1]].losses
        regret = f"{wide[best] / min(wide.values()) - 1:.1%}" if math.isfinite(wide[best]) else "diverges"
        lines.append(f"| {step.name} | {step.says} | {' | '.join(cells)} | {regret} |")
    return lines


_BESIDE: dict[str, Any] = {"fontsize": "small", "loc": "upper left", "bbox_to_anchor": (1.0, 1.0)}
"""Where a legend stands: beside its panel, so that it covers none of it."""


def picture(number: int, found: Mapping[tuple[int, int], Found], widths: Sequence[int]) -> bytes:
    """Returns a PNG of a step: how far outputs move over width, and loss over learning rate."""
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(12, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name in MOVED.values():
        left.plot(widths, [found[number, width].moves[name] for width in widths], marker="o", label=name)
    everything = [value for each in found.values() for value in each.moves.values()]
    left.set(xscale="log", yscale="log", ylim=(min(everything) / 1.5, max(everything) * 1.5), xlabel="width")
    left.set_xticks(widths, [str(width) for width in widths])
    left.minorticks_off()
    left.set_title(f"moved by {MOVES} iterations")
    left.set_ylabel("root mean square of the change")
    left.legend(**_BESIDE)
    losses = [loss for each in found.values() for loss in each.losses.values() if math.isfinite(loss)]
    top = min(losses) + 0.6 * (max(losses) - min(losses))
    for width in widths:
        finite = {lr: loss for lr, loss in found[number, width].losses.items() if math.isfinite(loss)}
        right.plot([math.log2(lr) for lr in finite], [*finite.values()], marker="o", label=f"width {width}")
    right.axvline(math.log2(LEARNING_RATE), color="grey", linestyle=":", label="rate of the panel\non the left")
    right.set(ylim=(min(losses) - 0.05, top), xlabel="log2 of the learning rate", title="loss at the end")
    right.set_ylabel(f"loss (higher than {top:.1f}: not shown)")
    right.legend(**_BESIDE)
    figure.suptitle(f"{STEPS[number].name}: {STEPS[number].says}")
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)
    return content.getvalue()


def main() -> None:
    """Runs what is missing, prints the table and draws the steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("-o", "--output", type=Path, default=Path("results/six_steps"))
    arguments = parser.parse_args()
    from rich.progress import track

    from mup_megatron.training.data.embedded import embedded_data

    arguments.output.mkdir(parents=True, exist_ok=True)
    data, widths = embedded_data(), sorted({BASE, *arguments.widths})
    jobs = [
        Job(step, width, arguments.steps, arguments.seeds) for width in reversed(widths) for step in range(len(STEPS))
    ]
    with forked_workers(arguments.jobs, arguments.output / "runs.log") as pool:
        pending = [pool.submit(run, job, data, arguments.output) for job in jobs]
        results = [future.result() for future in track(pending)]
    found = {(job.step, job.width): result for job, result in zip(jobs, results, strict=True)}
    print("\n".join(table(found, widths)))
    for number in range(len(STEPS)):
        (arguments.output / f"step-{number}.png").write_bytes(picture(number, found, widths))
    content = [
        {
            "step": STEPS[job.step].name,
            "width": job.width,
            "losses": {f"{lr:g}": loss for lr, loss in result.losses.items()},
            "moves": dict(result.moves),
        }
        for job, result in zip(jobs, results, strict=True)
    ]
    (arguments.output / "steps.json").write_text(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
