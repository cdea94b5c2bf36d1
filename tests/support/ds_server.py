"""The process from which DeepSpeed's test ranks are forked, with the slow imports done; `ds_ranks.py` asks it.

Requests come on standard input, pickled, each after its length; the answer is the ranks' process ids in one line.
"""

import datetime
import faulthandler
import importlib
import io
import os
import pickle
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import torch

torch.set_num_threads(1)

_IMPORTED_BY_RANKS = (
    "deepspeed.comm.mori",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.pipe",
    "mup_megatron.checkpoint_recipe",
    "mup_megatron.collectives",
    "mup_megatron.unpickling",
    "pytest",
    "support.ds_models",
    "torch._dynamo",  # by the first optimizer
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama",
)
"""By nearly every one, some of them late. Not `mup_megatron.deepspeed`: there are tests of when that is imported."""


def main() -> None:
    """Imports, and forks until standard input ends."""
    import deepspeed
    import transformers
    from deepspeed.comm.torch import build_shm_op

    for name in _IMPORTED_BY_RANKS:
        importlib.import_module(name)
    from mup_megatron.training import ranks

    transformers.logging.set_verbosity_error()
    deepspeed.utils.logger.setLevel("ERROR")
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what ranks print goes where their complaints go
    # Compiled or found once, and inherited: a rank that is killed meanwhile would leave a lock for which all wait.
    build_shm_op()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them here
    ranks.keep()
    while header := sys.stdin.buffer.read(8):
        request = sys.stdin.buffer.read(int.from_bytes(header, "big"))
        world_size, settings = pickle.loads(request)
        pids = []
        for rank in range(world_size):
            pid = os.fork()
            if pid == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                os.setsid()
                _rank(rank, world_size, **settings)
                os._exit(0)
            pids.append(pid)
        print(*pids, file=answers)


def _rank(rank: int, world_size: int, *, job: bytes, folder: str, timeout_s: float, collective_s: float) -> None:
    size = str(world_size)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=size, LOCAL_WORLD_SIZE=size)
    # A hanging rank says where it hangs before it is ended.
    faulthandler.dump_traceback_later(0.9 * timeout_s, exit=False)
    try:
        function, args, kwargs = pickle.loads(job)
        torch.distributed.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=collective_s),
        )
        report: tuple[bool, Any] = (True, function(*args, **kwargs))
        _write(report, Path(folder), rank)
        # Nobody hangs up while another is still in the last collective.
        torch.distributed.barrier()
    except BaseException:
        report = (False, traceback.format_exc())
        _write(report, Path(folder), rank)
    sys.stderr.flush()


def _write(report: tuple[bool, Any], folder: Path, rank: int) -> None:
    buffer = io.BytesIO()
    torch.save(report, buffer)
    (folder / f"report.{rank}.new").write_bytes(buffer.getvalue())
    (folder / f"report.{rank}.new").rename(folder / f"report.{rank}")


if __name__ == "__main__":
    main()
