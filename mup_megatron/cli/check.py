"""`check`: a verdict on a target and its recipe before the run is paid for."""

import itertools
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.architectures.registry import load_model_file
from mup_megatron.cli.options import COUNT, FILE, load_plan, recipe_option
from mup_megatron.errors import InputError
from mup_megatron.files import write_atomically
from mup_megatron.messages import is_first
from mup_megatron.recipe import Recipe, load_recipe
from mup_megatron.targets import CONFIG_FILE, hugging_face_config, is_hugging_face, read_target

if TYPE_CHECKING:
    from mup_megatron.check.mutants import Mutant
    from mup_megatron.check.verdict.verdict import Verdict

FAILED, UNDECIDED = 1, 2
"""Exit codes. Without a verdict something has to be changed first, and the verdict says what."""
EXIT_CODES = {"pass": 0, "fail": FAILED, "no verdict": UNDECIDED}
RESULTS = Path("results/check")


def _widths(_: click.Context, param: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    """Hidden sizes from a text with commas between them."""
    if value is None:
        return None
    try:
        widths = tuple(int(word) for word in value.split(","))
    except ValueError:
        raise click.BadParameter(
            f"{value!r} is no list of hidden sizes. Give some like 32,64,128.", param=param
        ) from None
    if len(widths) < 3 or widths[0] < 1 or any(second <= first for first, second in itertools.pairwise(widths)):
        raise click.BadParameter(
            f"{value}: a slope needs three or more hidden sizes that rise, like 32,64,128.", param=param
        )
    return widths


@click.command()
@click.argument("target", type=FILE, metavar="TARGET.yaml", required=False)
@click.argument("rest_of_line", nargs=-1, type=click.UNPROCESSED, metavar="| -- LAUNCH LINE")
@recipe_option
@click.option(
    "--level",
    type=click.Choice(["quick", "standard", "full"]),
    default="quick",
    show_default=True,
    help="quick: coordinates, gradients and updates. standard: late steps and whether wider is better as well. full: "
    "whether the learning rate transfers as well.",
)
@click.option("--json", "json_file", type=FILE, metavar="FILE", help="Write the verdict there too.")
@click.option(
    "--output",
    type=FILE,
    metavar="DIR",
    help="Verdict, measurements and picture. [default: results/check/, in a folder named after target and recipe]",
)
@click.option(
    "--widths",
    callback=_widths,
    metavar="W,W,…",
    help="Hidden sizes to train. [default: four, doubling from the least of 32 or more that keeps whole heads]",
)
@click.option("--seeds", type=click.IntRange(2, 10**9), help="Runs at each width. [default: 3; of a launch line 2]")
@click.option("--seed", type=click.IntRange(0, 2**31), default=1, show_default=True, help="The first of them.")
@click.option("--tensor-model-parallel-size", type=COUNT, default=1, show_default=True, help="As of the run.")
@click.option("--pipeline-model-parallel-size", type=COUNT, default=1, show_default=True, help="As of the run.")
@click.option("--sequence-parallel", is_flag=True, help="As of the run.")
@click.option(
    "--deepspeed", type=FILE, metavar="JSON", help="Check the engine that this configuration makes. [Hugging Face]"
)
@click.option("--mutant", "mutant_name", metavar="NAME", help="Make a deliberate mistake, to see what it looks like.")
@click.option("--processes", type=COUNT, help="Models that train at once. [default: as many as there are cores]")
@click.option("--fresh", is_flag=True, help="Measure the reference anew; neither use nor keep a cached one.")
@click.option("--exported", type=FILE, metavar="DIR", help="Compare what `export` made with --against, its CHECKPOINT.")
@click.option("--against", type=FILE, metavar="CHECKPOINT", help="As `export` was given it.")
@click.pass_context
def command(
    context: click.Context,
    /,
    target: Path | None,
    rest_of_line: tuple[str, ...],
    recipe_path: Path,
    level: str,
    json_file: Path | None,
    output: Path | None,
    widths: tuple[int, ...] | None,
    seeds: int | None,
    seed: int,
    tensor_model_parallel_size: int,
    pipeline_model_parallel_size: int,
    sequence_parallel: bool,
    deepspeed: Path | None,
    mutant_name: str | None,
    processes: int | None,
    fresh: bool,
    exported: Path | None,
    against: Path | None,
) -> None:
    """Say whether TARGET with a recipe will train as μP promises, before its run is paid for.

    TARGET is a model file, or a Hugging Face configuration: its config.json, or the folder of that. Or, behind a `--`,
    what starts Megatron-LM: mup-megatron check --recipe R -- torchrun … -m mup_megatron.launch pretrain_gpt.py FLAGS…

    Small models of the target's shape are built at several widths as the run would build them, trained for a few steps
    and compared with a correct reference. Less than a minute on two cores. In the layout of the run to come:
    torchrun --nproc-per-node 2 -m mup_megatron check TARGET.yaml …

    After the run, without a TARGET: mup-megatron check --exported DIR --against CHECKPOINT --recipe R. For a CHECKPOINT
    of DeepSpeed's, which does not say what the model is, TARGET is its configuration.

    Exit code 0: pass. 1: fail. 2: bad input, or no verdict, with what to change.
    """
    if exported is not None or against is not None:
        context.exit(0 if _of_export(exported, against, target, recipe_path) else FAILED)
    if target is None:
        raise click.MissingParameter(ctx=context, param=context.command.params[0])
    chosen: dict[str, Any] = {"widths": widths, "first_seed": seed}
    if seeds is not None:
        chosen["seeds"] = seeds
    parallel = {
        "tensor_model_parallel_size": tensor_model_parallel_size,
        "pipeline_model_parallel_size": pipeline_model_parallel_size,
        "sequence_parallel": sequence_parallel,
    }
    check: Callable[..., Verdict]
    if rest_of_line:
        recipe = load_recipe(recipe_path)
        given = parallel | {"deepspeed": deepspeed, "mutant": mutant_name, "processes": processes}
        _require_default(given, "not for a launch line, which says itself how it runs")
        check = _of_launch_line([str(target), *rest_of_line], recipe, fresh=fresh)
        target = Path("launch-line")
    elif is_hugging_face(read_target(target)):
        recipe, _ = load_plan(target, recipe_path)
        _require_default(parallel | {"mutant": mutant_name}, "for a model file, and the target is none")
        _require_default({"fresh": fresh}, "of no use here: of Hugging Face models no references are kept")
        check = _of_hugging_face(target, recipe, deepspeed)
    else:
        recipe, _ = load_plan(target, recipe_path)
        _require_default({"deepspeed": deepspeed}, "for a Hugging Face configuration, and the target is none")
        check = _of_megatron(target, recipe, parallel, mutant_name, fresh=fresh)
    if output is None:
        suffix = "" if mutant_name is None else f"-{mutant_name}"
        of = target.resolve().parent if target.name == CONFIG_FILE else target.resolve()
        output = RESULTS / f"{of.stem}-{recipe.fingerprint[:12]}{suffix}"
    for folder in (output, *([] if json_file is None else [json_file.parent])):
        _make(folder)
    if json_file is not None and json_file.is_dir():
        raise InputError(f"--json {json_file}: a folder. Give the name of a file.")
    if not rest_of_line:
        chosen["processes"] = processes
    with _CheckProgress(is_first()) as told:
        verdict = check(level, report=told, tell=told.before, **chosen)
    if is_first():
        answer(verdict, target, recipe_path, output, json_file)
    context.exit(EXIT_CODES[verdict.outcome.value])


def _of_megatron(
    target: Path, recipe: Recipe, parallel: Mapping[str, Any], mutant_name: str | None, *, fresh: bool
) -> Callable[..., "Verdict"]:
    """Returns what checks a model file."""
    from mup_megatron.check.measure.levels import Level
    from mup_megatron.check.reference.cache import FOLDER
    from mup_megatron.check.run_megatron import check_megatron
    from mup_megatron.training.options import TrainingOptions

    model = load_model_file(target)
    layout = TrainingOptions(train_iters=1, global_batch_size=1, **parallel)
    mutant = None if mutant_name is None else _mutant(mutant_name, model, recipe)
    references = None if fresh else FOLDER
    return lambda level, **more: check_megatron(
        model, recipe, level=Level(level), layout=layout, mutant=mutant, references=references, **more
    )


def _of_hugging_face(target: Path, recipe: Recipe, deepspeed: Path | None) -> Callable[..., "Verdict"]:
    """Returns what checks a Hugging Face configuration."""
    from mup_megatron.check.measure.levels import Level
    from mup_megatron.check.run_huggingface import check_hugging_face

    config = hugging_face_config(read_target(target), source=str(target))
    return lambda level, **more: check_hugging_face(config, recipe, deepspeed=deepspeed, level=Level(level), **more)


def _of_launch_line(words: list[str], recipe: Recipe, *, fresh: bool) -> Callable[..., "Verdict"]:
    """Returns what checks the model that a launch line builds."""
    from mup_megatron.check.measure.levels import Level
    from mup_megatron.check.reference.cache import FOLDER
    from mup_megatron.check.run_launch_line import check_launch_line

    references = None if fresh else FOLDER
    return lambda level, **more: check_launch_line(words, recipe, level=Level(level), references=references, **more)


def _of_export(exported: Path | None, against: Path | None, target: Path | None, recipe_path: Path) -> bool:
    """Says whether an exported model is the trained one; returns it too."""
    if exported is None or against is None:
        raise InputError("--exported DIR and --against CHECKPOINT go together. Give both.")
    from mup_megatron.export.opened import open_model

    recipe = load_recipe(recipe_path)
    # This prepares what the next one imports, where the model is Megatron's.
    model = open_model(against, recipe, recipe_source=str(recipe_path), target=target)
    from mup_megatron.check.run_exported import check_exported

    compared = check_exported(exported, model)
    click.echo(f"{exported}: {'pass' if compared.passed else 'fail'}\n{compared.told()}")
    return compared.passed


def _require_default(given: Mapping[str, Any], what: str) -> None:
    for name, value in given.items():
        if value is True or value not in (None, False, 1):
            raise InputError(f"--{name.replace('_', '-')} is {what}. Leave it out.")


def answer(verdict: "Verdict", target: Path, recipe_path: Path, output: Path, json_file: Path | None) -> None:
    """Writes the files of a verdict, and its text on standard output.

    Raises:
        InputError: a file cannot be written.
    """
    from mup_megatron.check.report import picture, report

    title = f"{target} with {recipe_path}"
    verdict_json = report.verdict_json(verdict, title=title)
    files: dict[Path, str | bytes] = {
        output / "check.png": picture.png(verdict, title=f"{target.name} with {recipe_path.name}"),
        output / "verdict.json": verdict_json,
        output / "comparison.csv": report.comparison_csv(verdict),
        output / "measurements.csv": report.measurements_csv(verdict),
    }
    files |= {
        output / f"{section.name.replace(' ', '-')}.csv": report.section_csv(section)
        for section in verdict.sections
        if section.rows
    }
    if json_file is not None:
        files[json_file] = verdict_json
    for path, content in files.items():
        write_atomically(path, content)
    click.echo(report.text(verdict, title=title, files=list(files)), nl=False)


def _mutant(name: str, model: ModelFile, recipe: Recipe) -> "Mutant":
    from mup_megatron.check.family.stress import stressed
    from mup_megatron.check.measure.levels import EARLY
    from mup_megatron.check.mutants import MUTANTS, Context

    stress = stressed(recipe, steps=EARLY.steps, eps=recipe.moved.adam_eps)
    context = Context(base=recipe.megatron_base, target=model, recipe=stress, width=model.hidden_size)
    fitting = {mutant.name: mutant for mutant in MUTANTS.values() if mutant.when(context)}
    if name in fitting:
        return fitting[name]
    wrong = "that mistake changes nothing for this target and recipe" if name in MUTANTS else "there is no such mistake"
    known = "\n".join(f"  {mutant.name}: {mutant.what}" for mutant in fitting.values())
    raise InputError(f"--mutant {name}: {wrong}. Choose one of\n{known}")


def _make(folder: Path) -> None:
    """The folder of results: what cannot be written is better known before the check than after it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: not a folder to write to ({error.strerror}). Choose another place.") from None


class _CheckProgress:
    """Progress on standard error: a bar on a terminal, else a line at each quarter. Nothing if it is not to speak."""

    def __init__(self, speaks: bool) -> None:
        self._speaks = speaks
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            # A refreshing thread would be one more thread beside those that train.
            auto_refresh=False,
            disable=not (speaks and sys.stderr.isatty()),
        )
        self._lines = speaks and not sys.stderr.isatty()
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> "_CheckProgress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def before(self, what: str) -> None:
        """Says what is to come."""
        if self._speaks:
            click.echo(what, err=True)

    def __call__(self, what: str, done: int, total: int) -> None:
        """Takes in that so many models of `total` are trained and measured."""
        if self._lines and (done == total or done % max(1, total // 4) == 0):
            click.echo(f"{what}: {done} of {total} models", err=True)
        if what not in self._tasks:
            self._tasks[what] = self._bar.add_task(what, total=total)
        self._bar.update(self._tasks[what], completed=done, total=total)
        self._bar.refresh()
