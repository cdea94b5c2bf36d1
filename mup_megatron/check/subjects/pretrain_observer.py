"""Measures a run that Megatron-LM's own loop trains; `launch_line.py` starts it, with `--mup-observe`.

The loop, its model, its optimizer and its layout are the user's; the data are the check's, or what the model learns
could not be compared. Importing it imports Megatron.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.rerun_state_machine import RerunDataIterator

from mup_megatron.check.measure.measurements import MeasuredRun
from mup_megatron.check.measure.measuring import Recorder
from mup_megatron.check.subjects.megatron import MegatronTrainee
from mup_megatron.check.subjects.run_request import RunRequest, result_of
from mup_megatron.collectives import gathered
from mup_megatron.files import write_atomically
from mup_megatron.megatron.names import unwrapped
from mup_megatron.megatron.pretrain.observer import Scene
from mup_megatron.training.build import Built
from mup_megatron.training.data.dataset import global_batch
from mup_megatron.training.options import BatchSizes
from mup_megatron.training.ranks import is_first


def observe(argument: str, scene: Scene) -> "Observed":
    """See `megatron/pretrain/observer.py`; the argument is the path of a request. Collective."""
    return Observed(Path(argument), scene)


class Observed:
    """A run of Megatron-LM's loop under observation. Collective in all that it does."""

    def __init__(self, path: Path, scene: Scene) -> None:
        values = scene.values
        self._path, self._request = path, RunRequest.read(path)
        self._values = values
        config: Any = unwrapped(scene.chunks[0]).config
        sizes = BatchSizes(
            global_batch=values.global_batch_size,
            micro_batch=values.micro_batch_size,
            data_parallel=values.data_parallel_size,
        )
        built = Built(config, scene.chunks, scene.optimizer, scene.scheduler)
        self._trainee = _Trainee(built, scene.model, scene.recipe, seed=values.seed, sizes=sizes)
        self._recorder = Recorder(self._trainee, self._request.protocol)
        self._losses: list[float] = []
        self._end_if(self._recorder.start())

    def stepping(self, iterators: Any) -> Any:
        """Gives the check's data in place of the run's own."""
        self._recorder.before_step()
        step = len(self._losses)
        mask = _causal_mask(self._values) if self._values.create_attention_mask_in_dataloader else {}

        def made() -> RerunDataIterator:
            return RerunDataIterator(iter([{**b, **mask} for b in self._trainee.micro_batches(step)]))

        return [made() for _ in iterators] if isinstance(iterators, list) else made()

    def stepped(self, losses: Mapping[str, Any]) -> None:
        """Looks at what the iteration did; at the last one, or at one after which it is no use to go on, ends."""
        own = float(losses.get("lm loss", next(iter(losses.values())))) if losses else None
        loss = next(loss for loss in gathered(own) if loss is not None)
        self._losses.append(loss)
        problem = self._recorder.after_step(len(self._losses), loss)
        if len(self._losses) == self._request.protocol.steps and problem is None:
            self._write(None)
        self._end_if(problem)

    def _end_if(self, problem: str | None) -> None:
        if problem is not None:
            self._write(problem)
            sys.exit(0)

    def _write(self, problem: str | None) -> None:
        found = self._recorder.values()
        run = MeasuredRun(self._request.width, self._request.seed, found, tuple(self._losses), problem)
        if is_first():
            write_atomically(result_of(self._path), json.dumps(run.to_json()))


class _Trainee(MegatronTrainee):
    """Whose steps are taken by somebody else."""

    def micro_batches(self, step: int) -> list[dict[str, torch.Tensor]]:
        """This rank's, in a step counted from 0."""
        return global_batch(
            self._data,
            step,
            global_batch_size=self._sizes.global_batch,
            micro_batch_size=self._sizes.micro_batch,
            data_parallel_rank=parallel_state.get_data_parallel_rank(),
            data_parallel_size=self._sizes.data_parallel,
        )


def _causal_mask(values: Any) -> dict[str, torch.Tensor]:
    """Returns what is masked, as Megatron's data have it."""
    length = values.seq_length
    mask = torch.ones((values.micro_batch_size, 1, length, length), dtype=torch.bool).triu(1)
    return {"attention_mask": mask}
