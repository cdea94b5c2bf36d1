"""What each rule of batch and duration makes of a tuned short run, beside a sweep where it is moved to.

    python benchmarks/horizon.py [--seeds 1] [-o results/horizon]

A GPT of width 64 is tuned on 200 steps of 8 sequences: the learning rate, the rest as given. It is moved to three runs
of the same model: four times the batch and the steps; four times the batch at the same tokens; four times the steps at
the same batch. At each, the final loss with every rule that is for it, and a sweep of the learning rate with the base's
other values. Finished runs are lines of `runs.jsonl`, and not repeated.
"""

import argparse
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

os.environ.setdefault("OMP_NUM_THREADS", "1")

from many_runs import KeptRuns, bracketed

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.errors import InputError
from mup_megatron.recipe import Horizon, Hyperparameters, Recipe, Schedule, Training, recipe
from mup_megatron.theory import HORIZON_RULES
from mup_megatron.training.options import TrainingOptions

MODEL = ModelFile(
    num_layers=2,
    hidden_size=64,
    num_attention_heads=2,
    vocab_size=1024,
    seq_length=64,
    untie_embeddings_and_output_weights=True,
    add_bias_linear=False,
    position_embedding_type="none",  # with learned ones 200 steps learn frequencies of words and nothing else
    transformer_impl="local",
)
LEARNING_RATE = 2.0**-6
TUNING_RATES = (-2, -1, 0, 1)
SWEEP_RATES = (-2, -1, 0, 1)
"""In octaves around the base's learning rate; more of them where the best is at an end."""
MORE = 3


@dataclass(frozen=True)
class Run:
    """A length and a batch."""

    steps: int
    batch: int

    @property
    def tokens(self) -> int:
        """Returns the tokens of all steps."""
        return self.steps * self.batch * MODEL.seq_length


TUNING = Run(200, 8)
TARGETS = {
    "4 × the batch, 4 × the steps": Run(800, 32),
    "4 × the batch, the same tokens": Run(50, 32),
    "4 × the steps, the same batch": Run(800, 8),
}


def tuned(lr: float) -> Recipe:
    """Returns the recipe of the tuning's run at a learning rate."""
    return Recipe(
        base=MODEL,
        hyperparameters=Hyperparameters(lr=lr, min_lr=lr / 10, weight_decay=0.1, adam_beta2=0.95),
        schedule=Schedule(lr_decay_style="cosine", lr_warmup_fraction=0.1),
        training=Training(train_iters=TUNING.steps, global_batch_size=TUNING.batch, seq_length=MODEL.seq_length),
    )


def moved(given: Recipe, rule: str, run: Run) -> Recipe | None:
    """Returns the recipe with the horizon of a run; None where the rule is not for it."""
    horizon = Horizon(rule=rule, tokens=run.tokens, batch=run.batch)
    try:
        return recipe({**given.model_dump(mode="json"), "horizon": horizon.model_dump()}, source=rule)
    except InputError:
        return None


class Measured:
    """Final losses of runs, kept in a file."""

    def __init__(self, folder: Path, data: Path, seeds: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._kept, self._data, self._seeds = KeptRuns(folder / "runs.jsonl"), data, range(1, seeds + 1)

    def loss(self, given: Recipe, run: Run) -> float:
        """Returns the mean over the seeds of the last tenth's training loss; infinite if a run diverges."""
        return fmean(self._loss(given, run, seed) for seed in self._seeds)

    def sweep(self, run: Run, octaves: Sequence[int]) -> dict[float, float]:
        """Returns learning rate → loss, at rates on either side of the best."""
        rates = [LEARNING_RATE * 2.0**octave for octave in octaves]
        return bracketed(lambda lr: self.loss(tuned(lr), run), rates, most=len(rates) + MORE, mean=float)

    def _loss(self, given: Recipe, run: Run, seed: int) -> float:
        from mup_megatron.training.train import run_training

        options = TrainingOptions(
            train_iters=run.steps, global_batch_size=run.batch, eval_iters=0, seed=seed, log_interval=100
        )
        return self._kept.loss(
            [given.fingerprint, run.steps, run.batch, seed],
            lambda: run_training(MODEL, given, self._data, options),
            lr=given.moved.lr,
            rule=given.horizon.rule if given.horizon else None,
        )


def main() -> None:
    """Runs what is missing and prints the tables, each as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("-o", "--output", type=Path, default=Path("results/horizon"))
    arguments = parser.parse_args()
    from mup_megatron.training import ranks

    ranks.preload()
    import torch

    from mup_megatron.training.data.embedded import embedded_data

    torch.set_num_threads(1)
    measured = Measured(arguments.output, embedded_data(), arguments.seeds)
    tuning = measured.sweep(TUNING, TUNING_RATES)
    best = min(tuning, key=tuning.__getitem__)
    print("\n".join([f"tuning, {TUNING.steps} steps of {TUNING.batch}:", *sweep_table(tuning)]), flush=True)
    # The shortest first, so that something is known early.
    for what, run in sorted(TARGETS.items(), key=lambda item: item[1].tokens):
        made = {rule: moved(tuned(best), rule, run) for rule in HORIZON_RULES}
        rules = {rule: (own, measured.loss(own, run)) for rule, own in made.items() if own is not None}
        print("\n".join(["", f"{what}:", "", *rule_table(rules)]), flush=True)
        print("\n".join(["", *sweep_table(measured.sweep(run, SWEEP_RATES))]), flush=True)


def sweep_table(losses: Mapping[float, float]) -> list[str]:
    """Returns a table of learning rates and losses."""
    rates = sorted(losses)
    return [
        f"| log2 of the learning rate | {' | '.join(f'{math.log2(lr):g}' for lr in rates)} |",
        f"|---|{'---|' * len(rates)}",
        f"| loss | {' | '.join(f'{losses[lr]:.3f}' for lr in rates)} |",
    ]


def rule_table(rules: Mapping[str, tuple[Recipe, float]]) -> list[str]:
    """Returns a table of what each rule makes of the base's values, and of the loss with it."""
    rows = [
        f"| {rule} | {math.log2(own.moved.lr):.2f} | {own.moved.weight_decay:.3g} | {own.moved.adam_beta1:.4g}, "
        f"{own.moved.adam_beta2:.4g} | {loss:.3f} |"
        for rule, (own, loss) in rules.items()
    ]
    return ["| rule | log2 lr | weight decay | betas | loss |", "|---|---|---|---|---|", *rows]


if __name__ == "__main__":
    main()
