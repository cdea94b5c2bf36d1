"""A search on a Ray cluster: each task is the same command on one of its machines, and all share the study's storage.

In a process of its own and not in Ray's: trials are forked, and what Ray runs in its processes does not survive a fork.
"""

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

from mup_megatron.errors import InputError
from mup_megatron.search.worker import MOST_WORKERS, require_count

_KEPT = 2000
"""Characters of what a command said last."""


def run_on_ray(words: Sequence[str], tasks: int, *, say: Callable[[str], None]) -> None:
    """Runs `mup-megatron WORDS…` in so many tasks at a time, until all have ended.

    The cluster is that of RAY_ADDRESS, or one that Ray starts on this machine. A task takes one CPU, and a GPU if the
    cluster has any; if its machine is lost Ray starts it elsewhere. The folder is the one that this command was started
    in, which all machines have to share for trials to go on from their checkpoints.

    Raises:
        InputError: Ray is missing, or a command ended with an error.
    """
    require_count("--workers", tasks, MOST_WORKERS)
    try:
        import ray
    except ImportError:
        raise InputError("--ray: needs Ray. Install it: pip install 'mup-megatron[ray]'") from None
    was_there = ray.is_initialized()
    if not was_there:
        ray.init(log_to_driver=False, logging_level="ERROR")
    try:
        gpus = 1 if ray.cluster_resources().get("GPU", 0) else 0
        run: Any = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=-1)(_run)
        say(f"{tasks} tasks on {len(ray.nodes())} machines of Ray's")
        environment = {name: os.environ[name] for name in ("PYTHONPATH",) if name in os.environ}
        waiting = [run.remote(list(words), os.getcwd(), environment) for _ in range(tasks)]
        for code, said in ray.get(waiting):
            if code != 0:
                raise InputError(f"--ray: a task ended with exit code {code}: {said.strip()[-_KEPT:]}")
    finally:
        if not was_there:
            ray.shutdown()


def _run(words: Sequence[str], folder: str, environment: dict[str, str]) -> tuple[int, str]:
    """Runs the command, and has it leave in order if Ray ends this task; returns its exit code and what it said."""
    process = subprocess.Popen(
        [sys.executable, "-m", "mup_megatron", *words],
        cwd=folder, env={**os.environ, **environment}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        _, said = process.communicate()
        return process.returncode, said
    finally:
        if process.poll() is None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()
