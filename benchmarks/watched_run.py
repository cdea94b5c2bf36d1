"""Runs to watch, and the pictures and the table of docs/watching.md, from what they logged.

    python benchmarks/watched_run.py [--train-iters 120] [--browser chromium] [-o results/watched] [--docs docs]

Megatron-LM's loop (`examples/pretrain.py`) on real text, through the launcher and as anybody would run it, with
TensorBoard and with wandb offline: the tuned base, a model four times as wide, and two such runs with something wrong.
Each logs, at every iteration, the learning rate of each role and the size of each layer's output. The pictures are
drawn from TensorBoard's files; with --browser, one is also taken of TensorBoard itself. A run is repeated where its
recipe, its line, the package or a library is another than it was made with. Needs Megatron-Core 0.19; a few minutes on
two cores.
"""

import argparse
import functools
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from loss_curves import ROOT, started
from six_steps import BASE, BATCH, TUNED, model

import mup_megatron
from mup_megatron.megatron.arguments.convert import flags
from mup_megatron.recipe import Recipe, recipe, save_recipe

WIDE = 256
LOSS = "lm loss"
SIZE = "mup/rms/"
PAGE = "watching.md"
BEGIN, END = "<!-- The table of benchmarks/watched_run.py, which writes it. -->", "<!-- Its end. -->"
Scalars = Mapping[str, Mapping[int, float]]
"""Name → iteration → value."""


@dataclass(frozen=True)
class Run:
    """A run, and what is wrong in it."""

    key: str
    called: str
    width: int = WIDE
    rule: str = "mup"
    changes: Mapping[str, float] = field(default_factory=dict)
    """To the tuned hyperparameters."""

    def recipe(self) -> Recipe:
        """Returns the recipe that it is run with."""
        content = {
            "base": model(BASE).model_dump(mode="json"),
            "hyperparameters": {**TUNED, **self.changes},
            "schedule": {"lr_decay_style": "linear", "lr_warmup_fraction": 0.1},
            "parametrization": {"rule": self.rule},
        }
        return recipe(content, source="benchmarks/watched_run.py")


NARROW = Run("base", f"width {BASE}, tuned", width=BASE)
RIGHT = Run("right", f"width {WIDE}, its recipe")
UNSCALED = Run("unscaled", f"width {WIDE}, no rule of μP", rule="standard")
TOO_HIGH = Run("too-high", f"width {WIDE}, lr × 32", changes={"lr": 32 * TUNED["lr"], "min_lr": 32 * TUNED["min_lr"]})
RUNS = (NARROW, RIGHT, UNSCALED, TOO_HIGH)
PICTURES = {"right": (NARROW, RIGHT), "unscaled": (NARROW, UNSCALED), "too-high": (RIGHT, TOO_HIGH)}
"""Name → the run to compare with, dashed, and the one to watch."""

SCRIPT = "examples/pretrain.py"
LOOP = f"""--micro-batch-size {BATCH} --global-batch-size {BATCH} --attention-dropout 0 --hidden-dropout 0
--eval-iters 0 --eval-interval 1000000 --log-interval 10 --tensorboard-log-interval 1 --mup-coordinates-interval 1
--split 99,1,0 --tokenizer-type NullTokenizer --vocab-size 1023 --no-persist-layer-norm
--no-gradient-accumulation-fusion --no-masked-softmax-fusion --no-bias-gelu-fusion --no-bias-swiglu-fusion
--no-bias-dropout-fusion --no-rope-fusion --use-cpu-initialization --distributed-backend gloo --num-workers 0
--wandb-project watched""".split()


def words(run: Run, folder: Path, data: Path, train_iters: int) -> list[str]:
    """Returns what follows the script's name in the line of a run.

    Args:
        run: which one.
        folder: its own.
        data: the PREFIX of the text.
        train_iters: iterations.
    """
    own = flags(model(run.width), run.recipe(), train_iters=train_iters)
    places = {"mup-recipe": _recipe_file(run, folder), "tensorboard-dir": folder / "board", "data-path": data}
    places |= {"data-cache-path": folder.parent / "indices", "wandb-save-dir": folder, "wandb-exp-name": run.key}
    given = [word for name, place in places.items() for word in (f"--{name}", str(place))]
    return [*own, *LOOP, *given, "--train-iters", str(train_iters)]


def _recipe_file(run: Run, folder: Path) -> Path:
    return folder / f"{run.key}.recipe.yaml"


def logged(run: Run, folder: Path, data: Path, train_iters: int) -> Scalars:
    """Returns what a run wrote to TensorBoard; it is run if it has not been, or was of another kind.

    Args:
        run: which one.
        folder: its own; what is there of a run of another kind, or of one that has not ended, is deleted.
        data: the PREFIX of the text.
        train_iters: iterations.
    """
    kept, key = folder / "key.json", _key(run, data, train_iters)
    if kept.exists() and kept.read_text(encoding="utf-8") == key:
        return _scalars(folder / "board")
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    save_recipe(run.recipe(), _recipe_file(run, folder))
    line = started(1, "-m", "mup_megatron.launch", SCRIPT, *words(run, folder, data, train_iters))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    with (folder / "log.txt").open("w", encoding="utf-8") as log:
        subprocess.run([*map(str, line)], cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, check=True)
    kept.write_text(key, encoding="utf-8")
    return _scalars(folder / "board")


def _key(run: Run, data: Path, train_iters: int) -> str:
    """Returns all that a run follows from, as text."""
    versions = {name: version(name) for name in ("megatron-core", "torch")}
    made_with = {"package": _code(), "python": sys.version, **versions}
    line = words(run, Path(), data, train_iters)
    return json.dumps({"fingerprint": run.recipe().fingerprint, "words": line, **made_with}, indent=1)


@functools.cache
def _code() -> str:
    """Changes whenever the package does, or the script that is launched."""
    files = [*sorted(Path(mup_megatron.__file__).parent.rglob("*.py")), ROOT / SCRIPT]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def _scalars(board: Path) -> Scalars:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    if not board.exists():
        return {}
    events = EventAccumulator(str(board), size_guidance={"scalars": 0})
    events.Reload()
    return {name: {e.step: e.value for e in events.Scalars(name)} for name in events.Tags()["scalars"]}


# ---- drawing -------------------------------------------------------------------------------------------------------


def picture(before: tuple[Run, Scalars], watched: tuple[Run, Scalars]) -> bytes:
    """Returns a PNG: loss, learning rate of each role, and size of each layer's output, over iterations.

    Args:
        before: the run to compare with, dashed.
        watched: the other one.
    """
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(13, 3.6), layout="constrained")
    loss, rates, sizes = figure.subplots(1, 3)
    for (run, scalars), style in ((before, "--"), (watched, "-")):
        _lines(loss, {run.called: scalars[LOSS]}, style, labelled=True)
        for axes, prefix in ((rates, "mup/lr/"), (sizes, SIZE)):
            of_panel = {
                name.removeprefix(prefix): values for name, values in scalars.items() if name.startswith(prefix)
            }
            _lines(axes, of_panel, style, labelled=style == "-")
    loss.set_title(LOSS)
    loss.legend(fontsize="small", frameon=False)
    for axes, title in ((rates, "mup/lr/ROLE"), (sizes, "mup/rms/LAYER")):
        axes.set(title=title, yscale="log")
        axes.legend(fontsize="small", frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    for axes in (loss, rates, sizes):
        axes.set_xlabel("iteration")
    figure.suptitle(f"{watched[0].called} (dashed: {before[0].called})")
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=100)
    return content.getvalue()


def _lines(axes: Any, of_panel: Scalars, style: str, *, labelled: bool) -> None:
    for index, (name, values) in enumerate(sorted(of_panel.items())):
        # A learning rate of 0, as before a warm-up, is in no logarithmic picture.
        drawn = {iteration: value for iteration, value in values.items() if value > 0}
        label = name if labelled else None
        axes.plot([*drawn], [*drawn.values()], style, color=f"C{index}", linewidth=1.3, label=label)


def taken(browser: str, output: Path, picture: Path) -> None:
    """Takes a picture of TensorBoard, with the tuned base, the run with its recipe and the one without a rule.

    Args:
        browser: a Chromium that runs without a display.
        output: the folder of all runs.
        picture: the file.
    """
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "runs").mkdir()
        for run in (NARROW, RIGHT, UNSCALED):
            (Path(folder) / "runs" / run.called).symlink_to(output / run.key / "board", target_is_directory=True)
        board = subprocess.Popen(
            [sys.executable, "-m", "tensorboard.main", "--logdir", "runs", "--host", "127.0.0.1", "--port", "0"],
            cwd=folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            assert board.stderr is not None
            place = next(found[0] for line in board.stderr if (found := re.search(r"http://[\d.:]+/", line)))
            page = f"{place}?darkMode=false#scalars&tagFilter=mup&_smoothingWeight=0"
            # The page's own clock runs ahead while nothing is pending, so it has drawn everything by then.
            flags = ["--no-sandbox", "--hide-scrollbars", "--window-size=1240,1330", "--virtual-time-budget=60000"]
            subprocess.run([browser, "--headless", *flags, f"--screenshot={picture}", page], check=True)
        finally:
            board.terminate()
            board.wait()


def told(found: Mapping[str, Scalars]) -> list[str]:
    """Returns a row for each run: its loss at the end, and how far the sizes of outputs went.

    Args:
        found: key of a run → what it logged.
    """
    names = sorted(name for name in found[RIGHT.key] if name.startswith(SIZE))
    heads = " | ".join(f"`{name.removeprefix(SIZE)}`" for name in names)
    lines = [f"| run | loss | {heads} |", f"|---|---|{'---|' * len(names)}"]
    for run in RUNS:
        scalars = found[run.key]
        ends = [list(scalars[name].values()) for name in names]
        cells = [f"{values[0]:.3g} → {values[-1]:.3g}" for values in ends]
        last = list(scalars[LOSS].values())[-1]
        lines.append(f"| {run.called} | {last:.3f} | {' | '.join(cells)} |")
    return lines


def with_table(page: str, table: Sequence[str]) -> str:
    """Returns the page with a table between its two marks.

    Args:
        page: as it was.
        table: its lines.
    """
    before, _, rest = page.partition(BEGIN)
    _, found, after = rest.partition(END)
    assert found, "the page has lost a mark"
    return "\n".join([f"{before}{BEGIN}", "", *table, "", f"{END}{after}"])


def main(given: Sequence[str] | None = None) -> None:
    """Runs what is missing, writes the table and draws the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train-iters", type=int, default=120)
    parser.add_argument("--browser", help="a Chromium, to take a picture of TensorBoard with")
    parser.add_argument("-o", "--output", type=Path, default=Path("results/watched"))
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="where the page is, and its pictures")
    arguments = parser.parse_args(given)
    page: Path = arguments.docs / PAGE
    if not page.is_file():
        parser.error(f"--docs {arguments.docs}: there is no {PAGE}, in which the table is written")
    from mup_megatron.training.data.embedded import embedded_data

    data, output = embedded_data().resolve(), arguments.output.resolve()
    found = {run.key: logged(run, output / run.key, data, arguments.train_iters) for run in RUNS}
    page.write_text(with_table(page.read_text(encoding="utf-8"), told(found)), encoding="utf-8")
    folder = arguments.docs / "watching"
    folder.mkdir(parents=True, exist_ok=True)
    for name, (before, watched) in PICTURES.items():
        drawn = picture((before, found[before.key]), (watched, found[watched.key]))
        (folder / f"{name}.png").write_bytes(drawn)
    if arguments.browser is not None:
        taken(arguments.browser, output, folder.resolve() / "tensorboard.png")


if __name__ == "__main__":
    main()
