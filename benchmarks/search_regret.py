"""Whether what a search over fidelities chooses is right at four times the width, by real searches in small.

    python benchmarks/search_regret.py [--seeds 1 2 3 4 5] [--trials 16] [--line 8] [--workers 2]

For each seed: `mup-megatron sweep --budget`, for what 16 whole trials cost, over the paper's space on the quickstart's
proxy, and `mup-megatron transfer`; then a second `sweep` with that recipe, of the learning rate alone, 1½ octaves to
either side, and its `transfer`. Both recipes' learning rates are run at four times the width, and eight others around
the first, half an octave apart. Regret is how much worse a recipe's own rate is than the best of all. What is done is
in `results/search-regret-SEED`; stopped at any moment, the same command goes on.
"""

import argparse
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from mup_megatron.architectures.cost import training_flops
from mup_megatron.quickstart.experiment import (
    FIXED,
    ExperimentSettings,
    GridFile,
    GridTraining,
    Result,
    curve,
    grid,
    run_grid,
)
from mup_megatron.recipe import Recipe, load_recipe, recipe, save_recipe
from mup_megatron.search import StudyRecord, read_study
from mup_megatron.training.data import CACHE
from mup_megatron.training.data.embedded import embedded_data
from mup_megatron.training.ranks import preload
from mup_megatron.yaml_io import dump_yaml

STEPS = tuple(2.0 ** (half / 2) for half in range(-4, 5))
"""Of the grid, relative to the recipe's learning rate."""


@dataclass(frozen=True)
class Search:
    """One search with what it came to at the wide model."""

    settings: ExperimentSettings
    record: StudyRecord
    recipe: Recipe
    refined: Recipe
    """After the search of the learning rate alone."""
    runs: tuple[Result, ...]

    def row(self) -> str:
        """Returns it as a row of the table."""
        losses = curve(self.runs, self.settings.wide, "mup")
        best = min(losses, key=lambda rate: losses[rate])
        ladder = self.record.spec.ladder
        assert ladder is not None
        assert self.record.best is not None
        spent = ladder.cost / ladder.rungs[-1].fidelity.cost
        cells = [
            f"{self.settings.seed}",
            " → ".join(f"{rung.trials}" for rung in ladder.rungs),
            f"{spent:.1f}",
            f"{self.record.best.loss:.3f}",
            f"{losses[best]:.3f} at {best:.2e}",
        ]
        for each in (self.recipe, self.refined):
            lr = each.hyperparameters.lr
            cells += [f"{lr:.2e}", f"{losses[lr]:.3f}", f"{losses[lr] / losses[best] - 1:.2%}"]
        return f"| {' | '.join(cells)} |"


def searched(seed: int, trials: int, line: int, workers: int) -> Search:
    """Runs a search and its grid, or what is left of them."""
    settings = ExperimentSettings(seed=seed)
    folder = Path("results") / f"search-regret-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    data = embedded_data(CACHE, tokenizer=f"bpe:{settings.vocab_size}")
    options = settings.options(CACHE)
    proxy, fixed, study = folder / "proxy.yaml", folder / "fixed.recipe.yaml", f"search-regret-{seed}"
    model = settings.model(settings.width)
    proxy.write_text(dump_yaml(model.model_dump(mode="json", exclude_defaults=True)))
    values = {**FIXED["hyperparameters"], "lr": 0.01}  # the rate is searched
    content = {**FIXED, "hyperparameters": values, "base": model.model_dump(mode="json")}
    save_recipe(recipe(content, source="the quickstart"), fixed)
    budget = (
        trials * training_flops(model).total * settings.train_iters * settings.global_batch_size * settings.seq_length
    )
    storage = f"sqlite:///{folder / 'study.db'}"
    run = ["--data", data, "--train-iters", settings.train_iters, "--global-batch-size", settings.global_batch_size,
           "--eval-iters", settings.eval_iters, "--seed", seed, "--workers", workers]  # fmt: skip
    first, second = folder / "searched.recipe.yaml", folder / "refined.recipe.yaml"
    of_all, of_rate = (["--study", name, "--storage", storage] for name in (study, f"{study}-lr"))
    _run("sweep", proxy, "--recipe", fixed, *of_all, "--budget", f"{budget:.6e}", *run)
    _run("transfer", *of_all, "-o", first, "--accept-edge", "--force")
    tuned = load_recipe(first)
    lr = tuned.hyperparameters.lr
    space = folder / "lr.yaml"
    space.write_text(dump_yaml({"lr": {"low": lr / 2**1.5, "high": lr * 2**1.5, "log": True}}))
    _run("sweep", proxy, "--recipe", first, "--space", space, *of_rate, "--trials", line, *run)
    _run("transfer", *of_rate, "-o", second, "--accept-edge", "--force")
    refined = load_recipe(second)
    rates = {*(lr * step for step in STEPS), refined.hyperparameters.lr}
    settings = ExperimentSettings(seed=seed, learning_rates=tuple(sorted(rates)))
    cells = grid(settings, settings.wide, "mup")
    stored = GridFile(folder / "grid.json", {"recipe": tuned.fingerprint})
    objective = GridTraining(settings, tuned, data, options, cells)

    def tick(done: int, total: int, text: str) -> None:
        print(f"[{done}/{total}] {text}", file=sys.stderr, flush=True)

    runs = run_grid(objective, stored, folder / "logs", workers, tick)
    return Search(settings, read_study(storage, study), tuned, refined, runs)


def _run(*words: object) -> None:
    subprocess.run([sys.executable, "-m", "mup_megatron", *map(str, words)], check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    """Runs what is missing and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--trials", type=int, default=16, help="Whole trials that a search may cost.")
    parser.add_argument("--line", type=int, default=8, help="Trials of the learning rate alone.")
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    preload()
    found = [searched(seed, arguments.trials, arguments.line, arguments.workers) for seed in arguments.seeds]
    titles = ("seed", "trials on each rung", "cost, whole trials", "proxy", "wide, best", "searched lr", "wide",
              "regret", "lr alone", "wide", "regret")  # fmt: skip
    print(f"| {' | '.join(titles)} |\n|{'---|' * len(titles)}")
    for each in found:
        print(each.row())


if __name__ == "__main__":
    main()
