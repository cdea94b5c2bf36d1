"""Slopes over width of correct models, with their intervals, as a check measures them on Megatron-Core.

    python benchmarks/check_slopes.py [--families] [--only NAME ...] [--widths 64 128 256 512] [--seeds 3]

For a GPT and a Llama-like model of two layers: how far training has moved each output of the last layer, and the
gradients of its weights, beside the same in plain torch (the reference of the check) and in standard parametrization
(its control). Each slope is of log(value) over log(width), with its 95 % interval from the seeds.

With `--families` the models have experts, latent attention or Mamba layers, and a table has a row for each kind of
tensor: how far training has moved what is computed with it, and its first gradient. What a tensor inside of a module
moves is that module's output. Each cell is of Megatron-Core, of the reference, and in standard parametrization.
Gradients are as the optimizer sees them: clipping takes the slope of their norm away from all; it is told below.
"""

import argparse
import os
from collections.abc import Iterator, Sequence

os.environ.setdefault("OMP_NUM_THREADS", "1")

from rates.architectures import FAMILIES, REPORT

from mup_megatron.architectures.measured import Kind
from mup_megatron.check.measure import levels
from mup_megatron.check.measure.measurements import Key, Quantity
from mup_megatron.check.verdict.verdict import Verdict
from mup_megatron.theory import family_of

WIDTHS = (32, 64, 128, 256, 512, 1024)
OF_FAMILIES = (64, 128, 256, 512)
ARCHITECTURES = ("gpt", "llama")
STEPS = (levels.EARLY.recorded[0], levels.EARLY.recorded[-1])


def main() -> None:
    """Measures and prints a table for each architecture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", action="store_true", help="experts, latent attention and Mamba layers")
    parser.add_argument("--only", nargs="+", choices=sorted({**REPORT, **FAMILIES}), metavar="NAME")
    parser.add_argument("--widths", type=int, nargs="+")
    parser.add_argument("--seeds", type=int, default=levels.SEEDS)
    arguments = parser.parse_args()
    from rich.console import Console
    from rich.progress import Progress

    from mup_megatron.check.run_megatron import check_megatron
    from mup_megatron.training import ranks

    ranks.preload()
    usual, told = (OF_FAMILIES, kinds_table) if arguments.families else (WIDTHS, table)
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("")

        def report(what: str, done: int, total: int) -> None:
            progress.update(task, description=what, completed=done, total=total)

        for name in arguments.only or (FAMILIES if arguments.families else ARCHITECTURES):
            chosen = {**REPORT, **FAMILIES}[name]
            verdict = check_megatron(
                chosen.target,
                chosen.recipe,
                widths=arguments.widths or usual,
                seeds=arguments.seeds,
                report=report,
            )
            lines = [f"\n{name}: {verdict.outcome.value}, {verdict.seconds:.0f} s\n", *told(verdict)]
            print("\n".join(lines), flush=True)


def table(verdict: Verdict) -> Sequence[str]:
    """Markdown: one row for each quantity, output and time."""
    lines = ["| what | of | step | Megatron-Core | reference | standard |", "|---|---|---|---|---|---|"]
    for quantity in (Quantity.UPDATE, Quantity.GRADIENT):
        for key in verdict.comparison:
            if key.quantity is quantity and key.step in STEPS and _told(key):
                cells = (quantity, f"`{key.name}`", key.step, *_slopes(verdict, key))
                lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def _told(key: Key) -> bool:
    """The last layer stands for all of them, and a matrix for its bias."""
    first = key.name.startswith("decoder.layers.0")
    return not first and (key.quantity is Quantity.UPDATE or key.name.endswith(".weight"))


def kinds_table(verdict: Verdict) -> Sequence[str]:
    """Markdown: one row for each kind of tensor, and for attention logits; the last of a kind stands for all."""
    times = [f"update after {step} steps" for step in STEPS]
    first = min((key.step for key in verdict.comparison if key.quantity is Quantity.GRADIENT), default=0)
    lines = [f"| tensor | {' | '.join(times)} | gradient at step {first} |", "|---|---|---|---|"]
    for kind, tensor, module in _kinds(verdict):
        keys = [Key(Quantity.UPDATE, module, step) for step in STEPS]
        keys.append(Key(Quantity.GRADIENT, tensor, first))
        cells = [" / ".join(map(str, _slopes(verdict, key))) for key in keys]
        lines.append(f"| {' | '.join([f'`{kind}`', *cells])} |")
    norm = " / ".join(map(str, _slopes(verdict, Key(Quantity.NORM, "all parameters", first))))
    return [*lines, f"| norm of all gradients, before clipping | | | {norm} |"]


def _kinds(verdict: Verdict) -> Iterator[tuple[str, str, str]]:
    """Kind → the last tensor of it, and the innermost module around that which is measured."""
    measured = [each.module for each in verdict.measured]
    for kind, tensor in {family_of(name): name for name in verdict.entries}.items():
        around = [module for module in measured if tensor.startswith(f"{module}.")]
        yield kind, tensor, max(around, key=len, default="")
    logits = [each.module for each in verdict.measured if each.kind is Kind.LOGITS]
    yield from ((family_of(module), "", module) for module in logits[-1:])


def _slopes(verdict: Verdict, key: Key) -> Sequence[object]:
    """Of subject, reference and control; none of what was not measured."""
    compared, control = (found.get(key) for found in (verdict.comparison, verdict.control_comparison))
    if compared is None:
        return ()
    return (compared.subject, compared.reference, "" if control is None else control.subject)


if __name__ == "__main__":
    main()
