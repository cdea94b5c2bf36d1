"""A small model, a recipe, data and options for training runs, and runs that are killed. For tests of `training/`."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

from fuzz_mutators import CANARY
from support.processes import _rank_main, fork_server
from support.shapes import gpt, recipe_for

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.training.data.documents import documents, scan
from mup_megatron.training.data.tokenizer import make_tokenizer, parse_tokenizer
from mup_megatron.training.data.writing import write_data
from mup_megatron.training.options import TrainingOptions
from mup_megatron.training.train import TrainingResult, run_training

VOCABULARY = 272
"""Room for the 257 tokens of bytes; a multiple of 8·TP, so that it is padded alike, and drawn alike, for every TP."""


def base(**changes: Any) -> ModelFile:
    return gpt(1, vocab_size=VOCABULARY, make_vocab_size_divisible_by=8, **changes)


def target(**changes: Any) -> ModelFile:
    return gpt(2, vocab_size=VOCABULARY, make_vocab_size_divisible_by=8, **changes)


RECIPE = recipe_for(base(), lr=0.01)


def make_text(folder: Path) -> Path:
    """A few thousand bytes of text in Megatron's format; returns their prefix."""
    text = folder / "text.txt"
    text.write_text(" ".join(f"{n} squared is {n * n}," for n in range(400)))
    sources = scan([text])
    spec = parse_tokenizer("byte")
    prefix = folder / "text"
    write_data(prefix, documents(sources), make_tokenizer(spec, lambda: ()), sources=sources, spec="byte")
    return prefix


def options(folder: Path, **changes: Any) -> TrainingOptions:
    """Twelve iterations of 8 sequences; `folder` gets everything."""
    plain: dict[str, Any] = {
        "train_iters": 12,
        "global_batch_size": 8,
        "micro_batch_size": 4,
        "eval_iters": 2,
        "log_interval": 4,
        "output": folder / "out",
        "data_cache_path": folder / "cache",
    }
    return TrainingOptions(**{**plain, **changes})


class Finished(NamedTuple):
    code: int
    stdout: str
    stderr: str


def assert_refused(found: Finished, words: Sequence[str], folder: Path) -> None:
    """A command said no in a sentence with these words, and no code of a damaged file was run in the folder."""
    assert (found.code, found.stdout) == (2, "")
    assert [word for word in words if word not in found.stderr] == [], found.stderr
    assert len(found.stderr) < 500
    assert not (folder / CANARY).exists()


def command_line(*words: str) -> Finished:
    """`mup-megatron …` inside a rank."""
    from mup_megatron.cli.main import main

    out, err, code = StringIO(), StringIO(), 0
    with redirect_stdout(out), redirect_stderr(err):
        try:
            main(words)
        except SystemExit as exit_:
            code = int(exit_.code or 0)
    return Finished(code, out.getvalue(), err.getvalue())


CHANGES = ("open", "os.rename", "os.mkdir", "os.rmdir", "os.remove")


def train_until(kill_at: int, changes: tuple[str, ...], counted: Path, *arguments: Any) -> TrainingResult:
    """A run, in a rank, that kills itself with SIGKILL right before its `kill_at`-th change to the files in `counted`.

    Python tells of every file that is opened for writing, renamed, made or removed before it happens.
    """
    seen = 0

    def hook(event: str, values: tuple[Any, ...]) -> None:
        nonlocal seen
        if event not in changes:
            return
        if event == "open" and not (isinstance(values[1], str) and set(values[1]) & set("wax+")):
            return
        if not isinstance(values[0], str | os.PathLike) or not str(values[0]).startswith(str(counted)):
            return
        seen += 1
        if seen == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return run_training(*arguments)


@contextmanager
def started(world_size: int, folder: Path, function: Callable[..., Any], *arguments: Any) -> Iterator[list[Any]]:
    """The processes of a run that the caller may kill at any moment. None outlives the block."""
    import pickle

    context = fork_server()
    folder.mkdir(parents=True, exist_ok=True)
    store = folder / "store"
    store.unlink(missing_ok=True)
    processes, receivers = [], []
    for rank in range(world_size):
        receiver, sender = context.Pipe(duplex=False)
        job = pickle.dumps((function, arguments, {}))
        process = context.Process(target=_rank_main, args=(rank, world_size, f"file://{store}", 120, job, sender))
        process.start()
        sender.close()
        processes.append(process)
        receivers.append(receiver)
    try:
        yield processes
    finally:
        for process in processes:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                process.kill()
            process.join()
        for receiver in receivers:
            receiver.close()


def killed_when(condition: Callable[[], bool], processes: list[multiprocessing.Process]) -> bool:
    """Kills the processes with SIGKILL as soon as the condition holds; False if one of them ended before."""
    while not condition():
        if wait([process.sentinel for process in processes], timeout=0.002):
            return False
    for process in processes:
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
    for process in processes:
        process.join()
    return True
