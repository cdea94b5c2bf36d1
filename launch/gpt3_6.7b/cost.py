"""What the experiment costs: every job with its FLOPs, and the total beside the paper's own formula. Runs nothing.

FLOPs are those of `mup_megatron.architectures.cost`: computed from the model files, the embedding and the attention
scores included. The paper's formula (Tensor Programs V, section 7.4) multiplies parameters by tokens and knows neither.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from mup_megatron.architectures.cost import parameter_count, training_flops
from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.architectures.registry import load_model_file
from mup_megatron.files import write_atomically
from mup_megatron.search import Ladder, load_space
from mup_megatron.training.options import TrainingOptions
from mup_megatron.tuning import SEARCHABLE, ProxyTraining, ladder_for, settings_of


@dataclass(frozen=True)
class Job:
    """Runs of one kind."""

    stage: str
    runs: int
    name: str
    model: ModelFile
    iterations: int
    batch: int
    """Sequences in an iteration."""

    @property
    def tokens(self) -> int:
        """Of one run."""
        return self.iterations * self.batch * self.model.seq_length

    @property
    def flops(self) -> float:
        """Of all runs."""
        return self.runs * self.tokens * training_flops(self.model).total


@dataclass(frozen=True)
class Formula:
    """The cost of the search relative to the target's run, as s·(t₁·N₁ + t₂·N₂) / (S·T) with some count s, S."""

    what: str
    proxy: float
    target: float
    share: float


def formula(what: str, per_token: tuple[float, float], search: Sequence[Job], run: Job) -> Formula:
    """The paper's formula; `per_token` is what a token is taken to cost at the proxy and at the target."""
    proxy, target = per_token
    spent = proxy * sum(job.runs * job.tokens for job in search)
    return Formula(what, proxy, target, spent / (target * run.runs * run.tokens))


def formulas(search: Sequence[Job], run: Job, rounded: tuple[float, float] | None) -> list[Formula]:
    """The formula with the paper's rounded parameters, with exact ones, and with FLOPs."""
    proxy, target = search[0].model, run.model
    small, large = training_flops(proxy), training_flops(target)
    no_scores = (small.total - small.items["attention_scores"], large.total - large.items["attention_scores"])
    hidden = (no_scores[0] - small.items["readout"], no_scores[1] - large.items["readout"])
    costs = {
        "parameters, exact": (parameter_count(proxy), parameter_count(target)),
        "FLOPs per token": (small.total, large.total),
        "… without attention scores": no_scores,
        "… without attention scores and readout": hidden,
    }
    if rounded is not None:
        costs = {"parameters, as the paper rounds them": rounded, **costs}
    return [formula(what, per_token, search, run) for what, per_token in costs.items()]


@dataclass(frozen=True)
class Fidelities:
    """The search over fidelities: what the sweep of this budget runs."""

    name: str
    training: ProxyTraining
    ladder: Ladder

    def rows(self) -> list[dict[str, Any]]:
        """What is run on each rung."""
        found = []
        for rung in self.ladder.rungs:
            settings, options = settings_of(rung), self.training.options
            batch = options.global_batch_size
            tokens = settings.train_iters * batch * self.training.proxy.seq_length
            found.append(
                {"trials": rung.trials, "width": settings.hidden_size, "iterations": settings.train_iters,
                 "global_batch_size": batch, "tokens_per_run": tokens, "flops": rung.cost}
            )  # fmt: skip
        return found


def read_fidelities(words: tuple[float, Path, Path, int, int]) -> Fidelities:
    """The search that the command line names. Data are not read: their length costs nothing."""
    budget, proxy, space, iterations, batch = words
    options = TrainingOptions(train_iters=iterations, global_batch_size=batch)
    training = ProxyTraining(
        proxy=load_model_file(proxy), fixed={}, data=Path("data"), data_sha256=None, options=options
    )
    ladder = ladder_for(training, load_space(space, SEARCHABLE), budget, None, source=str(space))
    return Fidelities(proxy.stem, training, ladder)


def print_fidelities(found: Fidelities, run: Job) -> None:
    """The rungs, on standard output."""
    console = Console(width=200, highlight=False)
    console.print("The search over fidelities, which is the default. Each rung has the best of the one before\n")
    rungs = table("rung", "trials", "width", "iterations", "batch", "tokens per run", "tokens", "FLOPs",
                  "of the target's")  # fmt: skip
    for number, row in enumerate(found.rows()):
        rungs.add_row(
            str(number), str(row["trials"]), str(row["width"]), f"{row['iterations']:,}", str(row["global_batch_size"]),
            short(row["tokens_per_run"]), short(row["trials"] * row["tokens_per_run"]), f"{row['flops']:.3g}",
            f"{row['flops'] / run.flops:.2%}",
        )  # fmt: skip
    tokens = sum(row["trials"] * row["tokens_per_run"] for row in found.rows())
    rungs.add_row("in all", str(found.ladder.trials), "", "", "", "", short(tokens), f"{found.ladder.cost:.3g}",
                  f"{found.ladder.cost / run.flops:.2%}")  # fmt: skip
    console.print(rungs)
    whole = found.ladder.candidates * found.ladder.rungs[-1].fidelity.cost
    console.print(
        f"\n{found.ladder.candidates} whole trials of {found.name} would cost {whole:.3g}, "
        f"{whole / run.flops:.2%} of the target's.\n",
        soft_wrap=True,
    )


def short(count: float) -> str:
    """A count for people: 4.00 B."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= 0.9995 * size:  # what is 1000 of the next smaller one in three digits
            return f"{count / size:.3g} {letter}"
    return f"{count:g}"


def table(*titles: str) -> Table:
    """An empty table: the first column is text, the others are numbers."""
    made = Table(box=None, pad_edge=False, header_style="bold")
    for index, title in enumerate(titles):
        made.add_column(title, justify="right" if index else "left")
    return made


def print_costs(search: Sequence[Job], run: Job, found: Sequence[Formula]) -> None:
    """The three tables, on standard output."""
    console = Console(width=200, highlight=False)
    jobs = table("stage", "runs", "model", "parameters", "iterations", "batch", "tokens per run", "tokens", "FLOPs",
                 "of the target's")  # fmt: skip
    spent = sum(job.flops for job in search)
    for job in (*search, run):
        if job is run:
            jobs.add_row(
                "search, in all", str(sum(job.runs for job in search)), "", "", "", "", "",
                short(sum(job.runs * job.tokens for job in search)), f"{spent:.3g}", f"{spent / run.flops:.2%}",
            )  # fmt: skip
        jobs.add_row(
            job.stage, str(job.runs), job.name, short(parameter_count(job.model)), f"{job.iterations:,}",
            str(job.batch), short(job.tokens), short(job.runs * job.tokens), f"{job.flops:.3g}",
            f"{job.flops / run.flops:.2%}",
        )  # fmt: skip
    console.print(
        "The paper's search, --search paper, and the target, with their FLOPs (6 for each weight and token, and the "
        "attention scores)\n"
    )
    console.print(jobs)

    console.print(
        "\nThe search's share of the target's cost by the paper's formula, s·(t₁·N₁ + t₂·N₂) / (S·T), with what is "
        "taken for s and S\n"
    )
    shares = table("s, S", "proxy", "target", "ratio", "share")
    for row in found:
        ratio = row.target / row.proxy
        shares.add_row(row.what, f"{row.proxy:,.0f}", f"{row.target:,.0f}", f"{ratio:.1f}", f"{row.share:.2%}")
    console.print(shares)

    width = run.model.hidden_size / search[0].model.hidden_size
    console.print("\nWhy they differ: FLOPs for one token, item by item\n")
    items = table("item", "proxy", "of all", "target", "of all", "ratio")
    proxy, target = training_flops(search[0].model), training_flops(run.model)
    for item in (*target.items, "total"):
        small, large = ({**cost.items, "total": cost.total}[item] for cost in (proxy, target))
        items.add_row(
            item.replace("_", " "), f"{small:.3g}", f"{small / proxy.total:.1%}", f"{large:.3g}",
            f"{large / target.total:.1%}", f"{large / small:.1f}",
        )  # fmt: skip
    console.print(items)
    console.print(
        f"\nThe target is {width:g} times as wide. Its hidden weights are {width * width:g} times as many; attention "
        f"scores and readout cost only {width:g} times as\nmuch, and parameters do not count the scores at all. So a "
        "narrow proxy is dearer in FLOPs than in parameters.",
        soft_wrap=True,
    )


def read_jobs(words: Sequence[tuple[str, int, Path, int, int]]) -> list[Job]:
    """The jobs that the command line names."""
    return [
        Job(stage, runs, path.stem, load_model_file(path), iterations, batch)
        for stage, runs, path, iterations, batch in words
    ]


FILE = click.Path(path_type=Path)
JOB = (str, click.IntRange(1), FILE, click.IntRange(1), click.IntRange(1))
JOB_WORDS = "STAGE RUNS MODEL.yaml ITERATIONS BATCH"


@click.command()
@click.option("--search", "search_words", type=JOB, multiple=True, required=True, metavar=JOB_WORDS, help="A stage.")
@click.option(
    "--fidelities", type=(float, FILE, FILE, click.IntRange(1), click.IntRange(1)), required=True,
    metavar="BUDGET PROXY.yaml SPACE.yaml ITERATIONS BATCH", help="The search over fidelities.",
)  # fmt: skip
@click.option("--target", "target_words", type=JOB, required=True, metavar=JOB_WORDS, help="The run it is for.")
@click.option("--rounded", type=(float, float), metavar="PROXY TARGET", help="The paper's numbers of parameters.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), metavar="FILE", help="Write the same as JSON.")
def command(
    search_words: Sequence[tuple[str, int, Path, int, int]],
    fidelities: tuple[float, Path, Path, int, int],
    target_words: tuple[str, int, Path, int, int],
    rounded: tuple[float, float] | None,
    json_file: Path | None,
) -> None:
    """What both searches and the run that they are for cost."""
    search, (run,) = read_jobs(search_words), read_jobs([target_words])
    found = formulas(search, run, rounded)
    ours = read_fidelities(fidelities)
    print_fidelities(ours, run)
    print_costs(search, run, found)
    if json_file is not None:
        jobs = [
            {
                "stage": job.stage, "runs": job.runs, "model": job.name, "parameters": parameter_count(job.model),
                "iterations": job.iterations, "global_batch_size": job.batch, "tokens_per_run": job.tokens,
                "flops": job.flops, "of_target": job.flops / run.flops,
            }
            for job in (*search, run)
        ]  # fmt: skip
        content = {
            "fidelities": {"budget": ours.ladder.budget, "rungs": ours.rows()},
            "jobs": jobs,
            "formulas": [asdict(row) for row in found],
        }
        write_atomically(json_file, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    command()
