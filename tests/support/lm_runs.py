"""Runs a script on Megatron-LM's training loop, on the CPU, in as many processes as it has ranks; tells what happened.

The processes are forked from the server of `processes.py`, which has imported Megatron; otherwise each is what torchrun
would start: its environment, its arguments, the script as `__main__`. Nothing of Megatron's global state outlives it.
"""

import faulthandler
import functools
import inspect
import json
import os
import runpy
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, NamedTuple

import torch
from support.processes import HANGS_AFTER_S, RankFailure, _end, fork_server

from mup_megatron.megatron.versions import checkpoint_results_in_this_process

SCRIPT = Path(__file__).parents[2] / "examples" / "pretrain.py"

CPU_FLAGS = tuple(
    "--transformer-impl local --no-persist-layer-norm --no-gradient-accumulation-fusion --no-masked-softmax-fusion "
    "--no-bias-gelu-fusion --no-bias-swiglu-fusion --no-bias-dropout-fusion --no-rope-fusion "
    "--use-cpu-initialization --distributed-backend gloo --num-workers 0".split()
)
"""What Megatron-LM has to be told where there is no GPU; docs/cpu.md says why."""

MOCK_DATA = tuple("--mock-data --split 949,50,1 --tokenizer-type NullTokenizer --vocab-size 511".split())
"""Megatron's own made-up tokens; with the end of document there are 512, which no tensor-parallel size up to 4 pads."""


def gpt(**changes: Any) -> list[str]:
    """The flags of a small GPT and of six iterations of 8 sequences. `changes` are further ones, with underscores.

    True makes a flag that stands alone, None drops a flag: `gpt(swiglu=True, min_lr=None)`.
    """
    values: dict[str, Any] = {
        "num_layers": 4,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "seq_length": 32,
        "max_position_embeddings": 32,
        "attention_dropout": 0,
        "hidden_dropout": 0,
        "micro_batch_size": 4,
        "global_batch_size": 8,
        "train_iters": 6,
        "lr": 1e-3,
        "min_lr": 0,
        "lr_decay_style": "linear",
        "eval_iters": 0,
        "eval_interval": 100,
        "log_interval": 1,
        **changes,
    }
    words = []
    for name, value in values.items():
        if value is not None:
            words.append(f"--{name.replace('_', '-')}")
            if value is not True:
                words += str(value).split()
    return words


def hybrid(pattern: str = "*-*-") -> dict[str, Any]:
    """The flags of `gpt` that make a hybrid model of it, of local layers."""
    spec = "mup_megatron.megatron.builders.hybrid local_stack_spec"
    return {"num_layers": None, "hybrid_layer_pattern": pattern, "spec": spec}


class Finished(NamedTuple):
    """What is left of a run; lists are by rank."""

    codes: list[int]
    losses: dict[int, float]
    """Each iteration's training loss, exactly; the printed ones are rounded, and the second is a mean of two."""
    out: list[str]
    err: list[str]

    def require_success(self) -> "Finished":
        """Itself. Raises RankFailure with the end of what the failed ranks said."""
        if any(self.codes):
            said = [f"rank {rank} exited with {code}:\n{self.err[rank][-3000:]}" for rank, code in self._failed()]
            raise RankFailure("\n".join(said))
        return self

    def _failed(self) -> Iterator[tuple[int, int]]:
        return ((rank, code) for rank, code in enumerate(self.codes) if code)


def run_script(
    script: Path,
    words: Sequence[str],
    ranks: int = 1,
    *,
    folder: Path,
    launcher: bool = False,
    environment: Mapping[str, str] | None = None,
    timeout_s: float = HANGS_AFTER_S,
) -> Finished:
    """Runs `script` with the arguments `words` on so many ranks, and waits for all of them.

    A failing rank does not end the others: whether they notice is the script's affair, and what tests are about.

    Args:
        folder: becomes the working directory, and gets what the ranks print.
        launcher: True to run it through `mup_megatron.launch`.
        environment: variables beside torchrun's.
        timeout_s: of the whole run.

    Raises:
        RankFailure: a rank still ran at the end of that time. It holds the rank's stack. Nothing runs on.
    """
    context = fork_server()
    folder.mkdir(parents=True, exist_ok=True)
    # The ranks meet at a store of ours, as under torchrun: its port is free because it is taken at once.
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    started = []
    try:
        for rank in range(ranks):
            variables = {**_torchrun_environment(rank, ranks, store.port), **(environment or {})}
            arguments = (rank, script.resolve(), list(words), folder, launcher, variables, timeout_s)
            process = context.Process(target=_rank_main, args=arguments)
            process.start()
            started.append(process)
        late = _wait(started, timeout_s)
        if late:
            raise RankFailure("\n".join(_stack(folder, rank, timeout_s) for rank in late))
    finally:
        for process in started:
            _end(process)
    return Finished(
        codes=[process.exitcode for process in started],
        losses=_losses(folder, ranks),
        out=[_file(folder, rank, "out").read_text() for rank in range(ranks)],
        err=[_file(folder, rank, "err").read_text() for rank in range(ranks)],
    )


def _torchrun_environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }


def _wait(processes: Sequence[ForkServerProcess], timeout_s: float) -> list[int]:
    """The ranks that have not ended by then."""
    deadline = time.monotonic() + timeout_s
    pending = {process.sentinel: rank for rank, process in enumerate(processes)}
    while pending:
        ended = wait(list(pending), timeout=max(0.0, deadline - time.monotonic()))
        if not ended:
            break
        for sentinel in ended:
            assert isinstance(sentinel, int)
            processes[pending.pop(sentinel)].join()
    return list(pending.values())


def _stack(folder: Path, rank: int, timeout_s: float) -> str:
    path = _file(folder, rank, "err")
    said = path.read_text()[-3000:] if path.exists() else "(it has not begun)"
    return f"rank {rank} still ran after {timeout_s} s, and was killed:\n{said}"


def _losses(folder: Path, ranks: int) -> dict[int, float]:
    """The losses of the first rank that knows them; all that do agree."""
    paths = (_file(folder, rank, "losses") for rank in range(ranks))
    rows = next((path.read_text().splitlines() for path in paths if path.exists()), [])
    return dict(json.loads(row) for row in rows)


def _file(folder: Path, rank: int, kind: str) -> Path:
    return folder / f"rank{rank}.{kind}"


# ---- in the rank -----------------------------------------------------------------------------------------------------


def _rank_main(
    rank: int, script: Path, words: list[str], folder: Path, launcher: bool, variables: dict[str, str], timeout_s: float
) -> None:
    os.setsid()
    os.environ.update(variables)
    os.chdir(folder)
    for stream, kind in ((sys.stdout, "out"), (sys.stderr, "err")):
        _redirect(stream.fileno(), _file(folder, rank, kind))
    # A hanging rank says where it hangs before the parent ends it.
    faulthandler.dump_traceback_later(0.9 * timeout_s, exit=False)
    torch.set_num_threads(1)
    _record_losses(_file(folder, rank, "losses"))
    try:
        with checkpoint_results_in_this_process():  # a server for them would import everything anew, for each rank
            _run(script, words, launcher)
    except Exception:
        # As the interpreter ends a script; multiprocessing would tell the error in its own way.
        sys.excepthook(*sys.exc_info())
        sys.exit(1)


def _redirect(descriptor: int, path: Path) -> None:
    """To the file, also what other programs print that the script starts."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, descriptor)
    os.close(file)


def _run(script: Path, words: list[str], launcher: bool) -> None:
    # The package registers its hooks when it is imported, and here the server has done so without a script.
    sys.modules.pop("mup_megatron.megatron", None)
    if launcher:
        from mup_megatron import launch

        sys.argv = [launch.__file__, str(script), *words]
        sys.path.insert(0, os.getcwd())
        launch.main([str(script), *words])
    else:
        sys.argv = [str(script), *words]
        sys.path.insert(0, str(script.parent))
        runpy.run_path(str(script), run_name="__main__")


def _record_losses(path: Path) -> None:
    """Has Megatron's `training_log` write each iteration's loss into a file, where this rank knows it."""
    import megatron.training.training as training

    path.unlink(missing_ok=True)
    original: Callable[..., Any] = training.training_log
    signature = inspect.signature(original)

    @functools.wraps(original)
    def recording(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        loss = given["loss_dict"].get("lm loss")
        if loss is not None:
            with path.open("a") as stream:
                stream.write(json.dumps([given["iteration"], loss.item()]) + "\n")
        return original(*args, **kwargs)

    training.training_log = recording
