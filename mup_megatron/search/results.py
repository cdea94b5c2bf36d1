"""The files that a sweep leaves beside its study. Reads trials, runs none."""

import csv
import io
import json
from collections import Counter
from pathlib import Path

from mup_megatron.files import write_atomically
from mup_megatron.json_io import finite
from mup_megatron.search.storage import shown
from mup_megatron.search.study import StudyRecord


def trials_csv(record: StudyRecord) -> str:
    """Returns all trials as CSV, one row each, hyperparameters last. Numbers in full precision.

    On a ladder, `rung` and `candidate` say where each is. Where they are the best of another study, `source_trial` and
    `source_loss` say which each is, and what it came to.
    """
    names = list(record.spec.space.ranges)
    selection = record.spec.selection
    source = [] if selection is None else ["source_trial", "source_loss"]
    ladder = record.spec.ladder
    place = [] if ladder is None else ["rung", "candidate"]
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["number", "slot", "state", "loss", "seconds", "reason", *place, *source, *names])
    for trial in record.trials:
        of: list[object] = []
        if selection is not None:
            candidate = selection.at(trial.slot)
            of = [None, None] if candidate is None else [candidate.trial, candidate.loss]
        at = [] if ladder is None else ladder.place(trial.slot)
        drawn = [trial.parameters.get(name) for name in names]
        writer.writerow(
            [trial.number, trial.slot, trial.state, trial.loss, trial.seconds, trial.reason, *at, *of, *drawn]
        )
    return stream.getvalue()


def best_json(record: StudyRecord) -> str:
    """Returns the best trial, and the study that it is the best of, as JSON. `trial` is null if none is complete."""
    best = record.best
    content = {
        "study": record.spec.name,
        "storage": shown(record.spec.storage),
        **record.spec.recorded(),
        "trials": dict(sorted(Counter(trial.state for trial in record.trials).items())),
        "trial": None
        if best is None
        else {
            "number": best.number,
            "slot": best.slot,
            "loss": best.loss,
            "parameters": dict(best.parameters),
            "seconds": best.seconds,
            "metrics": finite(best.metrics),
        },
    }
    return json.dumps(content, indent=2, allow_nan=False) + "\n"


def write_results(record: StudyRecord, csv_file: Path | None, best_file: Path | None) -> None:
    """Writes the files that are asked for, each whole or not at all.

    Raises:
        InputError: a file cannot be written; what was there before is unchanged.
    """
    if csv_file is not None:
        write_atomically(csv_file, trials_csv(record))
    if best_file is not None:
        write_atomically(best_file, best_json(record))
