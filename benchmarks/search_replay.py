"""What searches cost and find, replayed on a recorded table of random trials at several widths and lengths.

    python benchmarks/search_replay.py record [--trials 350] [--seeds common|own] [-o results/search_replay]
    python benchmarks/search_replay.py replay TABLE... [--samples 200] [-o PICTURE.png]

`record` trains every trial of the paper's space (mup_megatron.tuning.DEFAULT_SPACE) at every width and length, by the
plans that a recipe at the largest width makes. Stopped at any moment, the same command goes on; finished runs are lines
of a file. A trial is plain torch, not Megatron-Core: a small byte model on the embedded text, with the plan's initial
standard deviations, learning rates, ε, weight decays and multipliers, the recipe's schedule and clipping. Dozens of
trials are trained side by side as one batch of matrices, which is many times faster than one after the other. With
`--seeds common` all trials have the same weights (but for their scale) and batches, with `--seeds own` each its own,
and other ones on every rung.

Its tables are in `benchmarks/tables/`.

`replay` draws samples of these trials and lets searches loose on each: random, Optuna's TPE (which gets the nearest
trial of the sample that it has not had), Optuna's successive halving and Hyperband on steps alone, and the ladder of
`mup-megatron sweep --budget`, by the code of that command. Cost is the share of all whole trials of the sample, regret
how much worse the chosen one is than the sample's best.
"""

import argparse
import gzip
import json
import math
import os
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import TYPE_CHECKING, Any, TypeAlias

os.environ.setdefault("OMP_NUM_THREADS", "1")

from mup_megatron.architectures.cost import training_flops
from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.recipe import Recipe, recipe
from mup_megatron.search.ladder import Fidelity, Ladder, ladder_of
from mup_megatron.search.page.analysis import spearman
from mup_megatron.tuning import DEFAULT_SPACE
from mup_megatron.tuning.fidelities import SHARES

if TYPE_CHECKING:
    import torch

WIDTHS = (16, 32, 64)
LENGTHS = (25, 50, 100, 200)
HEAD_SIZE, LAYERS, LENGTH, BATCH, VOCABULARY = 16, 2, 64, 8, 257
VALIDATION = 32
"""Sequences of the validation loss, in batches of BATCH."""
SEED = 1234
SIDE_BY_SIDE = 35
"""Trials of one batch of matrices."""

Place: TypeAlias = tuple[int, int]
"""Width and steps."""


def model_of(width: int) -> ModelFile:
    """Returns the byte model of this width."""
    return ModelFile(
        num_layers=LAYERS,
        hidden_size=width,
        num_attention_heads=width // HEAD_SIZE,
        vocab_size=VOCABULARY,
        seq_length=LENGTH,
        add_bias_linear=False,
        normalization="RMSNorm",
        untie_embeddings_and_output_weights=True,
        transformer_impl="local",
    )


def recipe_of(trial: int) -> Recipe:
    """Returns the recipe of a trial: its base is the widest model."""
    content = {
        "base": model_of(WIDTHS[-1]).model_dump(mode="json"),
        "hyperparameters": DEFAULT_SPACE.sample(SEED, trial),
        "schedule": {"lr_decay_style": "linear", "lr_warmup_fraction": 0.1},
    }
    return recipe(content, source=f"trial {trial}")


def cost(place: Place) -> float:
    """Returns the FLOPs of a trial."""
    width, steps = place
    return training_flops(model_of(width)).total * steps * BATCH * LENGTH


# ---- recording -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """Losses of trials at every place, in a file of JSON lines, each of them some trials at one place."""

    losses: Mapping[Place, Sequence[float]]

    @classmethod
    def read(cls, file: Path) -> "Table":
        """Reads a table, which may be compressed."""
        opened = gzip.open if file.suffix == ".gz" else open
        found: dict[Place, dict[int, float]] = {}
        with opened(file, "rt", encoding="utf-8") as stream:
            for row in map(json.loads, stream):
                losses = (math.inf if loss is None else loss for loss in row["losses"])
                found.setdefault((row["width"], row["steps"]), {}).update(enumerate(losses, start=row["first"]))
        count = min(len(losses) for losses in found.values())
        return cls({place: [losses[trial] for trial in range(count)] for place, losses in sorted(found.items())})


def record(output: Path, trials: int, *, own_seeds: bool) -> None:
    """Trains what the table in `output` does not have yet."""
    import time

    import torch

    torch.set_num_threads(1)
    output.parent.mkdir(parents=True, exist_ok=True)
    lines = output.read_text(encoding="utf-8").splitlines() if output.exists() else []
    rows = map(json.loads, lines)
    done = {(row["width"], row["steps"], row["first"], len(row["losses"])) for row in rows}
    text = _text()
    for first in range(0, trials, SIDE_BY_SIDE):
        numbers = range(first, min(first + SIDE_BY_SIDE, trials))
        for width in WIDTHS:
            for steps in LENGTHS:
                if (width, steps, first, len(numbers)) in done:
                    continue
                begun = time.process_time()
                losses = train(text, width, steps, numbers, own_seeds=own_seeds)
                seconds = time.process_time() - begun
                finite = [round(loss, 5) if math.isfinite(loss) else None for loss in losses]
                row = {"width": width, "steps": steps, "first": first, "seconds": round(seconds, 1), "losses": finite}
                with output.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                print(f"trials {first} to {numbers[-1]}, {width} × {steps}: {seconds:.0f} s of CPU", flush=True)
    compressed = output.with_suffix(".jsonl.gz")
    compressed.write_bytes(gzip.compress(output.read_bytes(), mtime=0))
    print(f"{compressed}: {compressed.stat().st_size:,} bytes")


def _text() -> "torch.Tensor":
    """The embedded text as bytes."""
    import numpy as np
    import torch

    from mup_megatron.training.data.embedded import embedded_data

    prefix = embedded_data(tokenizer="byte")
    tokens = np.fromfile(prefix.with_name(prefix.name + ".bin"), dtype=np.uint16)
    return torch.from_numpy(tokens.astype(np.int64))


def train(text: "torch.Tensor", width: int, steps: int, trials: Sequence[int], *, own_seeds: bool) -> list[float]:
    """Returns the validation losses of trials that are trained side by side."""
    import torch

    seeds = [f"{trial}/{width}/{steps}" if own_seeds else "common" for trial in trials]
    recipes = [recipe_of(trial) for trial in trials]
    plans = [each.plan(model_of(width)).to_json() for each in recipes]
    draws = [torch.Generator().manual_seed(random.Random(seed).getrandbits(63)) for seed in seeds]
    held = len(text) // 20

    def batch(generator: torch.Generator, low: int, high: int) -> torch.Tensor:
        begins = torch.randint(low, high - LENGTH - 1, (BATCH, 1), generator=generator)
        return text[begins + torch.arange(LENGTH + 1)]

    weights = {
        entry["name"]: torch.stack([_drawn(plan["parameters"][i], g) for plan, g in zip(plans, draws, strict=True)])
        for i, entry in enumerate(plans[0]["parameters"])
    }
    for weight in weights.values():
        weight.requires_grad_()
    entries = {
        entry["name"]: [plan["parameters"][i] for plan in plans] for i, entry in enumerate(plans[0]["parameters"])
    }
    values = {key: _column([plan["model"][key] for plan in plans]) for key in FACTORS}
    moments = {name: (torch.zeros_like(weight), torch.zeros_like(weight)) for name, weight in weights.items()}
    for step in range(steps):
        tokens = torch.stack([batch(g, held, len(text)) for g in draws])
        losses = forward(weights, values, tokens)
        gradients = torch.autograd.grad(losses.sum(), list(weights.values()))
        norms = torch.stack([gradient.flatten(1).norm(dim=1) for gradient in gradients]).norm(dim=0)
        clip = torch.clamp(_column([each.hyperparameters.clip_grad for each in recipes]) / (norms + 1e-6), max=1.0)
        warmup = max(1, round(0.1 * steps))
        part = min((step + 1) / warmup, (steps - step) / max(steps - warmup, 1))
        with torch.no_grad():
            for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
                _adam(weight, gradient * _like(clip, weight), moments[name], entries[name], step + 1, part)
    check = torch.Generator().manual_seed(0)
    with torch.no_grad():
        batches = [batch(check, 0, held).expand(len(trials), BATCH, LENGTH + 1) for _ in range(VALIDATION // BATCH)]
        return torch.stack([forward(weights, values, tokens) for tokens in batches]).mean(dim=0).tolist()


FACTORS = ("embedding_multiplier", "softmax_scale", "output_multiplier")


def _column(values: Sequence[float]) -> "torch.Tensor":
    import torch

    return torch.tensor(values, dtype=torch.float32)


def _like(values: "torch.Tensor", weight: "torch.Tensor") -> "torch.Tensor":
    """One value of each trial, as can be multiplied with its tensors."""
    return values.view(-1, *[1] * (weight.dim() - 1))


def _drawn(entry: Mapping[str, Any], generator: "torch.Generator") -> "torch.Tensor":
    import torch

    if entry["init_std"] is None:
        return torch.full(entry["shape"], float(entry["init_value"]))
    return entry["init_std"] * torch.randn(entry["shape"], generator=generator)


def _adam(
    weight: "torch.Tensor",
    gradient: "torch.Tensor",
    moments: tuple["torch.Tensor", "torch.Tensor"],
    entries: Sequence[Mapping[str, Any]],
    step: int,
    part: float,
) -> None:
    """One step of AdamW with each trial's own values. `part`: of its learning rate."""
    lr, eps, decay = (
        _like(_column([entry[key] for entry in entries]), weight) for key in ("lr", "eps", "weight_decay")
    )
    first, second = moments
    first.mul_(BETAS[0]).add_(gradient, alpha=1 - BETAS[0])
    second.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
    weight.mul_(1 - part * lr * decay)
    root = (second / (1 - BETAS[1] ** step)).sqrt().add_(eps)
    weight.sub_(part * lr * (first / (1 - BETAS[0] ** step)) / root)


BETAS = (0.9, 0.999)
"""The recipe's defaults."""


def forward(
    weights: Mapping[str, "torch.Tensor"], values: Mapping[str, "torch.Tensor"], tokens: "torch.Tensor"
) -> "torch.Tensor":
    """Returns the loss of each trial on its tokens, of shape (trials, sequences, LENGTH + 1)."""
    import torch
    from torch.nn import functional

    count, sequences, width = len(tokens), tokens.shape[1], weights["decoder.final_layernorm.weight"].shape[1]
    inputs, targets = tokens[:, :, :-1], tokens[:, :, 1:]
    words, places = (weights[f"embedding.{kind}_embeddings.weight"] for kind in ("word", "position"))
    index = inputs.reshape(count, -1, 1).expand(-1, -1, width)
    x = torch.gather(words, 1, index) + places[:, :LENGTH].repeat(1, sequences, 1)
    x = x * _like(values["embedding_multiplier"], x)

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return functional.rms_norm(x, (width,), eps=1e-5) * weights[name][:, None]

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return torch.bmm(x, weights[name].transpose(1, 2))

    for layer in range(LAYERS):
        at = f"decoder.layers.{layer}."
        qkv = linear(norm(x, at + "input_layernorm.weight"), at + "self_attention.linear_qkv.weight")
        heads = qkv.view(count * sequences, LENGTH, width // HEAD_SIZE, 3, HEAD_SIZE).permute(3, 0, 2, 1, 4)
        scale = values["softmax_scale"].repeat_interleave(sequences).view(-1, 1, 1, 1)
        seen = functional.scaled_dot_product_attention(heads[0] * scale, heads[1], heads[2], is_causal=True, scale=1.0)
        x = x + linear(seen.transpose(1, 2).reshape(count, -1, width), at + "self_attention.linear_proj.weight")
        inner = linear(norm(x, at + "pre_mlp_layernorm.weight"), at + "mlp.linear_fc1.weight")
        x = x + linear(functional.gelu(inner), at + "mlp.linear_fc2.weight")
    x = norm(x, "decoder.final_layernorm.weight") * _like(values["output_multiplier"], x)
    logits = linear(x, "output_layer.weight")[..., :VOCABULARY]
    flat = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return flat.view(count, -1).mean(dim=1)


# ---- replaying -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """Some trials of the table."""

    losses: Mapping[Place, Sequence[float]]
    numbers: Sequence[int]

    def loss(self, place: Place, candidate: int) -> float:
        """Returns the loss of a candidate of the sample."""
        return self.losses[place][self.numbers[candidate]]

    def part(self, share: float) -> int:
        """Returns the number of trials in a share of it."""
        return max(1, round(share * len(self.numbers)))


@dataclass(frozen=True)
class Outcome:
    """What a search has come to: its cost in whole trials, and the candidate that it chose."""

    cost: float
    chosen: int


WHOLE: Place = (WIDTHS[-1], LENGTHS[-1])
Method: TypeAlias = Callable[[Sample, random.Random], Outcome]


def at_random(share: float) -> Method:
    """Returns a random search of so many whole trials, as a share of the sample."""

    def run(sample: Sample, draw: random.Random) -> Outcome:
        count = sample.part(share)
        tried = draw.sample(range(len(sample.numbers)), count)
        return Outcome(count, min(tried, key=lambda candidate: sample.loss(WHOLE, candidate)))

    return run


def tpe(share: float) -> Method:
    """Returns a search of so many whole trials, as a share of the sample, with Optuna's TPE."""

    def run(sample: Sample, draw: random.Random) -> Outcome:
        import optuna

        count = sample.part(share)
        distributions = {
            name: optuna.distributions.FloatDistribution(each.low, each.high, log=each.log)
            for name, each in DEFAULT_SPACE.ranges.items()
        }
        left = {candidate: DEFAULT_SPACE.sample(SEED, number) for candidate, number in enumerate(sample.numbers)}
        unit = {candidate: _unit(values) for candidate, values in left.items()}
        study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=draw.getrandbits(32), multivariate=True))
        tried = []
        for _ in range(count):
            wanted = _unit(study.ask(distributions).params)
            nearest = min(left, key=lambda candidate: math.dist(unit[candidate], wanted))
            loss = sample.loss(WHOLE, nearest)
            state = optuna.trial.TrialState.COMPLETE if math.isfinite(loss) else optuna.trial.TrialState.PRUNED
            made = optuna.trial.create_trial(
                params=left.pop(nearest),
                distributions=distributions,
                value=loss if math.isfinite(loss) else None,
                state=state,
            )
            study.add_trial(made)
            tried.append(nearest)
        return Outcome(count, min(tried, key=lambda candidate: sample.loss(WHOLE, candidate)))

    return run


def _unit(values: Mapping[str, float]) -> list[float]:
    return [each.fraction(values[name]) for name, each in DEFAULT_SPACE.ranges.items()]


def pruned(pruner: Callable[[], Any]) -> Method:
    """Returns a search of all candidates on steps alone, that one of Optuna's pruners stops early.

    Every length is a run of its own, since its learning rate decays to its end.
    """

    def run(sample: Sample, draw: random.Random) -> Outcome:
        import optuna

        study = optuna.create_study(
            study_name=str(draw.random()), pruner=pruner(), sampler=optuna.samplers.RandomSampler(seed=0)
        )
        spent, whole = 0.0, []
        for candidate in draw.sample(range(len(sample.numbers)), len(sample.numbers)):
            trial = study.ask()
            for number, steps in enumerate(LENGTHS, start=1):
                place = (WIDTHS[-1], steps)
                spent += cost(place) / cost(WHOLE)
                loss = sample.loss(place, candidate)
                trial.report(loss if math.isfinite(loss) else 1e9, 2 ** (number - 1))
                if place == WHOLE:
                    whole.append(candidate)
                    study.tell(trial, loss if math.isfinite(loss) else 1e9)
                elif trial.should_prune():
                    study.tell(trial, state=optuna.trial.TrialState.PRUNED)
                    break
        return Outcome(spent, min(whole, key=lambda candidate: sample.loss(WHOLE, candidate)))

    return run


def climbed(places: Sequence[Place], counts: Sequence[int] | None = None) -> Method:
    """Returns the search of `mup-megatron sweep --budget` on these rungs, whose lowest one has all candidates.

    Args:
        places: of the rungs.
        counts: trials of the rungs above the lowest; None: as that command chooses them.
    """

    def run(sample: Sample, draw: random.Random) -> Outcome:
        fidelities = [Fidelity({}, cost(place)) for place in places]
        numbers = draw.sample(range(len(sample.numbers)), len(sample.numbers))
        ladder = ladder_of(fidelities, len(numbers), math.inf)
        if counts is not None:
            kept = [len(numbers), *counts]
            rungs = (type(rung)(rung.fidelity, n) for rung, n in zip(ladder.rungs, kept, strict=True))
            ladder = Ladder(math.inf, tuple(rungs))
        results: dict[int, float] = {}
        while todo := [slot for slot in ladder.wanted(results, results) if slot not in results]:
            for slot in todo:
                rung, candidate = ladder.place(slot)
                results[slot] = sample.loss(places[rung], numbers[candidate])
        spent = sum(fidelities[ladder.place(slot)[0]].cost for slot in results)
        whole = [slot for slot in results if ladder.place(slot)[0] == len(places) - 1]
        chosen = min(whole, key=lambda slot: results[slot])
        return Outcome(spent / cost(WHOLE), numbers[ladder.place(chosen)[1]])

    return run


def methods() -> Iterator[tuple[str, Method]]:
    """Lists what is compared."""
    import optuna

    for share in (0.05, 0.1, 0.2, 0.4):
        yield f"random, {share:.0%} of the trials", at_random(share)
    for share in (0.05, 0.1):
        yield f"TPE, {share:.0%} of the trials", tpe(share)
    yield "successive halving on steps, factor 4", pruned(lambda: optuna.pruners.SuccessiveHalvingPruner(1, 4, 0))
    yield (
        "Hyperband on steps, factor 2",
        pruned(lambda: optuna.pruners.HyperbandPruner(1, 2 ** (len(LENGTHS) - 1), 2)),
    )
    own = [(round(width * WIDTHS[-1]), round(length * LENGTHS[-1])) for width, length in SHARES]
    yield f"ladder of sweep --budget: {_called(own)}", climbed(own)


def _called(places: Sequence[Place]) -> str:
    return ", ".join(f"{width}×{steps}" for width, steps in places)


@dataclass(frozen=True)
class Replayed:
    """What a method has come to over all samples: of each its cost, in whole trials of the sample, and its regret."""

    name: str
    costs: Sequence[float]
    regrets: Sequence[float]


def replay(table: Table, samples: int, size: int | None, chosen: Iterator[tuple[str, Method]]) -> Sequence[Replayed]:
    """Prints and returns cost and regret of every method over samples of the table."""
    import numpy as np

    whole = np.array(table.losses[WHOLE])
    count, first = len(whole), int(whole.argmin())
    size = size or max(2, round(0.8 * count))
    print(f"{count} trials, {samples} samples of {size}\n")
    print("| rung | rank correlation with whole trials | rank there of the later best |\n|---|---|---|")
    for place, losses in table.losses.items():
        rank = sum(loss < losses[first] for loss in losses) + 1
        print(f"| {place[0]}×{place[1]} | {spearman(np.array(losses), whole):.3f} | {rank} |")
    heads = ("cost, median", "90 %", "regret, median", "90 %", "within 0.5 %", "within 1 %")
    print(f"\n| search | {' | '.join(heads)} |\n|{'---|' * (len(heads) + 1)}")
    found = []
    for name, method in chosen:
        costs, regrets = [], []
        for number in range(samples):
            draw = random.Random(f"{SEED}/{number}")
            sample = Sample(table.losses, draw.sample(range(count), size))
            outcome = method(sample, draw)
            best = min(sample.loss(WHOLE, candidate) for candidate in range(size))
            costs.append(outcome.cost / size)
            regrets.append(sample.loss(WHOLE, outcome.chosen) / best - 1)
        cells = [
            *(f"{value:.1%}" for value in (median(costs), _ninetieth(costs))),
            *(f"{value:.2%}" for value in (median(regrets), _ninetieth(regrets))),
            *(f"{sum(regret <= most for regret in regrets) / samples:.0%}" for most in (0.005, 0.01)),
        ]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
        found.append(Replayed(name, costs, regrets))
    return found


def picture(tables: Mapping[str, Sequence[Replayed]]) -> bytes:
    """Returns a PNG: what each search costs and how far from the best it ends, a panel for each table."""
    import io

    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(6.4 * len(tables), 4.4), layout="constrained")
    panels = figure.subplots(1, len(tables), sharey=True, squeeze=False)[0]
    for panel, (called, found) in zip(panels, tables.items(), strict=True):
        for number, each in enumerate(found):
            middle, high = 100 * median(each.regrets), 100 * _ninetieth(each.regrets)
            panel.plot([100 * median(each.costs)] * 2, [middle, high], color=f"C{number}", alpha=0.4)
            panel.plot(100 * median(each.costs), middle, "o", color=f"C{number}", label=each.name)
        panel.axhline(0.5, color="black", linewidth=0.8, linestyle=":")
        panel.axvline(5, color="black", linewidth=0.8, linestyle=":")
        panel.set_xscale("log")
        panel.set_xlabel("cost, % of all whole trials")
        panel.set_title(called)
    panels[0].set_ylabel("loss above the sample's best, %: median to 90 %")
    panels[0].legend(fontsize=7)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _ninetieth(values: Sequence[float]) -> float:
    return quantiles(values, n=10)[-1]


def seed_noise(tables: Sequence[Table]) -> str:
    """Returns how far the losses of the best ten whole trials of the first table lie apart in the others."""
    import numpy as np

    whole = [table.losses[WHOLE] for table in tables]
    count = min(map(len, whole))
    best = sorted(range(count), key=lambda trial: whole[0][trial])[:10]
    losses = np.array([[each[trial] for trial in best] for each in whole])
    spread = float(np.sqrt(losses.var(axis=0, ddof=1).mean()))
    return f"Seed noise of the best ten: standard deviation {spread:.4f}, {spread / losses.mean():.2%} of the loss."


def main() -> None:
    """Records, or replays."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record")
    recording.add_argument("--trials", type=int, default=350)
    recording.add_argument("--seeds", choices=["common", "own"], default="common")
    recording.add_argument("-o", "--output", type=Path, default=Path("results/search_replay"))
    replaying = commands.add_parser("replay")
    replaying.add_argument("tables", type=Path, nargs="+", metavar="TABLE")
    replaying.add_argument("--samples", type=int, default=200)
    replaying.add_argument("--size", type=int, help="Trials of a sample. [default: four fifths of them]")
    replaying.add_argument("-o", "--output", type=Path, metavar="PNG", help="Where to draw it.")
    arguments = parser.parse_args()
    if arguments.command == "record":
        file = arguments.output / f"{arguments.seeds}.jsonl"
        record(file, arguments.trials, own_seeds=arguments.seeds == "own")
        return
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    tables = [Table.read(file) for file in arguments.tables]
    found = {}
    for file, table in zip(arguments.tables, tables, strict=True):
        print(f"## {file.name}\n")
        found[file.name] = replay(table, arguments.samples, arguments.size, methods())
        print()
    if arguments.output is not None:
        arguments.output.write_bytes(picture(found))
    if len(tables) > 1:
        print(seed_noise(tables))


if __name__ == "__main__":
    main()
