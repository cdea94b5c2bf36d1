"""Trials per hour of short trials: forked from one process that has imported everything, against fresh processes.

    python benchmarks/trials_per_hour.py [--trials 8] [--width 128] [--iterations 20]

Both do the same trials of one study, one at a time, and have to find the same losses. How long a forked trial takes to
begin, all imports included, is printed first.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.search import Launch, ReportFn, StudySpec, TrialOutcome, default_storage, run_sweep
from mup_megatron.search.worker import Finished, TrialJob, Worker
from mup_megatron.training import ranks
from mup_megatron.training.data import CACHE
from mup_megatron.training.data.embedded import embedded_data
from mup_megatron.training.options import TrainingOptions
from mup_megatron.tuning import DEFAULT_SPACE, ProxyTraining


def main() -> None:
    """Runs the study in both ways and prints their rates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--iterations", type=int, default=20)
    arguments = parser.parse_args()
    ranks.preload()
    data = embedded_data(CACHE)
    objective = ProxyTraining(
        proxy=ModelFile(
            num_layers=4,
            hidden_size=arguments.width,
            num_attention_heads=arguments.width // 32,
            vocab_size=1024,
            seq_length=128,
            transformer_impl="local",
        ),
        fixed={},
        data=data,
        data_sha256=None,
        options=TrainingOptions(train_iters=arguments.iterations, global_batch_size=8, eval_iters=1),
    )
    print(f"a forked trial begins {1000 * _seconds_to_begin():.0f} ms after it is asked for", flush=True)
    rates, losses = {}, {}
    for launch in ("fork", "spawn"):
        rates[launch], losses[launch] = _run(objective, launch, arguments.trials)
        print(f"{launch}: {rates[launch]:.0f} trials per hour", flush=True)
    assert losses["fork"] == losses["spawn"]
    print(f"forked against fresh: {rates['fork'] / rates['spawn']:.2f}×")


def _seconds_to_begin(trials: int = 9) -> float:
    """Returns the median over trials that only look at the clock, which is the same in all processes."""

    def now(parameters: Mapping[str, float], report: ReportFn) -> TrialOutcome:
        from mup_megatron.training import loop  # what a real one needs, and finds imported

        assert loop.train_iteration
        return TrialOutcome(time.perf_counter())

    worker, waits = Worker(now), []
    try:
        for number in range(trials):
            asked = time.perf_counter()
            worker.submit(TrialJob(number, {}))
            result = worker.receive()
            assert isinstance(result, Finished)
            assert result.outcome.loss is not None
            waits.append(result.outcome.loss - asked)
    finally:
        worker.close()
    return statistics.median(waits)


def _run(objective: ProxyTraining, launch: Launch, trials: int) -> tuple[float, list[float | None]]:
    with tempfile.TemporaryDirectory() as folder:
        spec = StudySpec(
            name="benchmark",
            storage=default_storage("benchmark", Path(folder)),
            seed=1,
            sampler="random",
            space=DEFAULT_SPACE,
            context={},
        )
        begun = time.perf_counter()
        result = run_sweep(spec, objective, trials, launch=launch, log_folder=Path(folder) / "logs")
        seconds = time.perf_counter() - begun
    return 3600 * trials / seconds, [trial.loss for trial in result.trials]


if __name__ == "__main__":
    main()
