"""`proxy`: a small model on which to tune for a target, and the cost of both, itemised."""

from pathlib import Path

import click
from rich.table import Table

from mup_megatron.architectures.cost import active_parameter_count, parameter_count, training_flops
from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.architectures.proxy import MIN_WIDTH, Proxy, Search, choose_proxy
from mup_megatron.architectures.registry import architecture_of, load_model_file
from mup_megatron.cli.options import (
    COUNT,
    FILE,
    MOST,
    TRIAL_BATCH,
    TRIAL_ITERS,
    FiniteFloat,
    answer_console,
    force_option,
    require_new,
    target_argument,
)
from mup_megatron.files import write_atomically
from mup_megatron.yaml_io import dump_yaml


@click.command()
@target_argument
@click.option("-o", "--output", type=FILE, metavar="PROXY.yaml", help="Where to write the proxy's model file.")
@click.option("--hidden-size", type=COUNT, default=MIN_WIDTH, show_default=True, help="Width of the proxy.")
@click.option("--trials", type=COUNT, default=350, show_default=True, help="Trials of the search.")
@click.option("--trial-tokens", type=FiniteFloat(1), help="Tokens of a trial. [default: target's / 75, as in TP5]")
@click.option("--target-tokens", type=FiniteFloat(1), help="Tokens of the target's run. [default: 20 per parameter]")
@click.option("--budget", type=FiniteFloat(0, min_open=True), default=0.1, show_default=True,
              help="What the search may cost, relative to the target's run; decides the proxy's depth.")  # fmt: skip
@click.option("--depth", type=click.Choice(["none", "completep"]), default="none", show_default=True,
              help="The recipe's rule of depth: with one the proxy is shallow too.")  # fmt: skip
@force_option
def command(
    target: Path,
    output: Path | None,
    hidden_size: int,
    trials: int,
    trial_tokens: float | None,
    target_tokens: float | None,
    budget: float,
    depth: str,
    force: bool,
) -> None:
    """A proxy for TARGET with the same architecture and head size, and what the search and the target cost."""
    model = load_model_file(target)
    tokens = target_tokens or 20.0 * parameter_count(model)
    search = Search(trials=trials, trial_tokens=trial_tokens or tokens / 75, target_tokens=tokens)
    proxy = choose_proxy(model, search, width=hidden_size, budget=budget, depth_rule=depth != "none")
    if output is not None:
        require_new(output, force=force)
        content = proxy.model.model_dump(mode="json", exclude_defaults=True)
        write_atomically(output, f"# A proxy for {target.name}\n" + dump_yaml(content))
    _print(model, proxy, search)


def _print(target: ModelFile, proxy: Proxy, search: Search) -> None:
    console = answer_console()
    models = (proxy.model, target)
    flops = [training_flops(model) for model in models]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("", "proxy", "target"):
        table.add_column(title, justify="right" if title else "left")

    def row(name: str, values: list[str]) -> None:
        table.add_row(name, *values)

    sizes = [size.key for size in architecture_of(target).sizes(target)]
    for key in ("num_layers", "hidden_size", "num_attention_heads", "query_groups", "head_size", *sizes):
        row(key, [str(model.value_of(key)) for model in models])
    row("parameters", [f"{parameter_count(model):.3g}" for model in models])
    active = [active_parameter_count(model) for model in models]
    if active != [parameter_count(model) for model in models]:
        row("parameters that a token passes", [f"{count:.3g}" for count in active])
    row("FLOPs per token:", ["", ""])
    for key in flops[1].items:
        row(f"  {key}", [f"{cost.items.get(key, 0.0):.3g}" for cost in flops])
    row("  total", [f"{cost.total:.3g}" for cost in flops])
    runs = (search.trials, 1)
    tokens = (search.trial_tokens, search.target_tokens)
    row("runs", [str(count) for count in runs])
    row("tokens per run", [f"{count:.3g}" for count in tokens])
    row("FLOPs", [f"{n * t * c.total:.3g}" for n, t, c in zip(runs, tokens, flops, strict=True)])
    console.print(table)
    console.print(f"The search costs {search.fraction(proxy.model, target):.2%} of the target's run.", highlight=False)
    batch = TRIAL_BATCH * proxy.model.seq_length
    if batch <= search.trial_tokens <= batch * MOST:
        console.print(
            f"Trials of {search.trial_tokens:.3g} tokens: give `mup-megatron sweep` --train-iters "
            f"{round(search.trial_tokens / batch)} and --global-batch-size {TRIAL_BATCH}, or a larger batch and fewer "
            f"iterations. Left out, a trial has {TRIAL_ITERS * batch:.3g}.",
            highlight=False,
        )
    for note in proxy.notes:
        console.print(f"Note: {note}", highlight=False)
