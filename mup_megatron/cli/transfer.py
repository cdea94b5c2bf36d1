"""`transfer`: the best trial of a study as a recipe, for its own run or moved to another batch and number of tokens."""

from pathlib import Path
from typing import Any

import click

from mup_megatron.architectures.registry import load_model_file
from mup_megatron.cli.options import COUNT, FILE, FiniteFloat, answer, force_option
from mup_megatron.search import default_storage, read_study
from mup_megatron.theory import HORIZON_RULES
from mup_megatron.tuning import Target, TargetRun, transferred


class _Tokens(FiniteFloat):
    """A whole number, which may be written as 3e11."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Returns the number that was given as text."""
        number = float(super().convert(value, param, ctx))
        if not number.is_integer():
            self.fail(f"{value} is not a whole number.", param, ctx)
        return int(number)


@click.command()
@click.option("--study", required=True, metavar="NAME")
@click.option("--storage", metavar="URL", help="Any storage of Optuna's. [default: sqlite:///results/NAME.db]")
@click.option("-o", "--output", type=FILE, metavar="R", help="Where to write; standard output by default.")
@click.option("--rule", type=click.Choice(list(HORIZON_RULES)),
              help="Move the values to a target's run by this rule: see docs/horizon.md.")  # fmt: skip
@click.option(
    "--target-tokens", type=_Tokens(min=1), metavar="N", help="Of the target's whole run. [default: the tuning's]"
)
@click.option("--target-batch", type=COUNT, metavar="N",
              help="Sequences of an iteration of the target's. [default: the tuning's]")  # fmt: skip
@click.option("--target-seq-length", type=COUNT, metavar="N", help="[default: the tuning's]")
@click.option("--exponent", type=FiniteFloat(min=0, min_open=True), help="Of the rule tokens. [default: 0.32]")
@click.option("--target", type=FILE, metavar="TARGET.yaml",
              help="Whose run the search was for: the provenance gets its share of that cost.")  # fmt: skip
@click.option("--accept-edge", is_flag=True, help="Although the loss still falls towards an edge of the space.")
@force_option
def command(
    study: str,
    storage: str | None,
    output: Path | None,
    force: bool,
    rule: str | None,
    target_tokens: int | None,
    target_batch: int | None,
    target_seq_length: int | None,
    exponent: float | None,
    target: Path | None,
    accept_edge: bool,
) -> None:
    """The best trial of a study as a recipe, with the study, trial, data and versions that it comes from.

    The provenance also has where a quadratic fit over the best trials puts the optimum, and how sure that is. With
    --rule the recipe gets a horizon, which moves the values to the target's batch and number of tokens.
    """
    asked = {"--target-tokens": target_tokens, "--target-batch": target_batch, "--target-seq-length": target_seq_length}
    given = [name for name, value in asked.items() if value is not None]
    if rule is None and (given or exponent is not None):
        raise click.UsageError(
            f"{(given or ['--exponent'])[0]} without --rule: by which the values are moved. Give it."
        )
    if rule is not None and not given:
        raise click.UsageError(f"--rule {rule}: to which run? Give --target-tokens, --target-batch or both.")
    to = None
    if rule is not None:
        to = TargetRun(
            rule=rule, tokens=target_tokens, batch=target_batch, seq_length=target_seq_length, exponent=exponent
        )
    of = None if target is None else Target(load_model_file(target), target_tokens)
    record = read_study(storage or default_storage(study), study)
    answer(transferred(record, to, target=of, accept_edge=accept_edge).to_yaml(), output, force=force)
