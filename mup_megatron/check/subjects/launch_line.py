"""A Megatron-LM launch line as a subject: taken apart, and put together again to train models of a check.

The user's own line is run, with sizes, length, data and recipe of the check in place of its own and everything that
writes or reads checkpoints and logs left out. So script, model builder, optimizer flags and parallel layout are those
of the run to come. The plug-in in that run measures it (`pretrain_observer.py`).

Importing this module imports neither torch nor Megatron.
"""

import json
import os
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.check.measure.measurements import MeasuredRun
from mup_megatron.check.subjects.run_request import result_of
from mup_megatron.errors import InputError
from mup_megatron.megatron.arguments.convert import model_from_values, values_from_flags

OBSERVER = "mup_megatron.check.subjects.pretrain_observer"
_SOURCE = "the launch line"
_VOCABULARY = 256
_OF_LAYERS = re.compile(
    r"--(?:num-layers-per-virtual|num-virtual-stages|pipeline-model-parallel-layout|decoder-first-pipeline|"
    r"decoder-last-pipeline|account-for-|.*-layer-freq|.*-layer-pattern|(?!mtp-).*-num-layers$|no-rope-freq)"
)
"""Flags that speak of single layers, or of how many a stage has."""
_DROPPED = re.compile(
    r"--(?:save|load|use-checkpoint-args|finetune|pretrained-checkpoint|ckpt-|async-save|non-persistent-|"
    r"exit-|override-opt|use-checkpoint-opt|no-load-|no-save-|auto-detect-ckpt|dist-ckpt|use-persistent-ckpt|"
    r"tensorboard-|wandb-|profile|use-pytorch-profiler|record-memory-history|one-logger|enable-one-logger|straggler|"
    r"log-straggler|enable-ft|rampup-batch-size|step-batch-size|train-samples|lr-decay-samples|lr-warmup-samples|"
    r"lr-wsd-decay-samples|lr-warmup-iters|lr-decay-iters|lr-warmup-fraction|lr-wsd-decay-iters|"
    r"data-path|data-args-path|per-split-data|train-data-path|valid-data-path|test-data-path|blend|"
    r"data-cache-path|vocab-file|merge-file|tokenizer-|legacy-tokenizer|tiktoken|fp16|bf16|fp8|fp4|"
    r"overlap-param-gather|cuda-graph|enable-cuda-graph|external-cuda-graph|rerun-mode|error-injection|"
    r"manual-gc|iterations-to-skip|skip-train|mup-recipe|mup-override|mup-print-plan|mup-coordinates|"
    r"mup-accept|mup-observe)"
)
"""Flags that begin so, with what follows them: what writes, reads or ends a run, the data, and the precision, in which
a weight's movement could not be read."""
_DATA = (
    *("--mock-data", "--split", "949,50,1", "--tokenizer-type", "NullTokenizer"),
    # The end of a document is one more.
    *("--vocab-size", str(_VOCABULARY - 1)),
)


@dataclass(frozen=True, slots=True)
class Ended:
    """The end of a process."""

    code: int
    said: str
    """Its standard error, or the end of it."""


Execute = Callable[[Sequence[str]], Ended]


@dataclass(frozen=True, kw_only=True)
class LaunchLine:
    """A launch line in its parts."""

    start: tuple[str, ...]
    """Everything before the flags: launcher, its options, the script."""
    flags: tuple[str, ...]

    @classmethod
    def of(cls, words: Sequence[str]) -> "LaunchLine":
        """Takes a line apart at its script.

        Raises:
            InputError: there is no script in it.
        """
        for index, word in enumerate(words):
            if word.endswith(".py") and not word.startswith("-"):
                return cls(start=tuple(words[: index + 1]), flags=tuple(words[index + 1 :]))
        if words and words[0].endswith(".sh"):
            raise InputError(
                f"{words[0]}: a shell script hides the command that it runs. Give that: torchrun … SCRIPT.py FLAGS…"
            )
        raise InputError(
            f"{shlex.join(words) or 'nothing'} after --: there is no script in it. Give the command that starts the "
            "run: torchrun … -m mup_megatron.launch pretrain_gpt.py FLAGS…"
        )

    @property
    def world_size(self) -> int:
        """The number of processes that it starts: torchrun's flags, or the environment of other launchers."""
        given = {}
        words = iter(self.start)
        for word in words:
            name, equals, value = word.partition("=")
            if name.lstrip("-").replace("_", "-") in ("nproc-per-node", "nnodes"):
                given[name.lstrip("-").replace("_", "-")] = value if equals else next(words, "")
        if not given:
            return int(os.environ.get("WORLD_SIZE", "1"))
        return _count(given.get("nproc-per-node", "1")) * _count(given.get("nnodes", "1"))

    @property
    def tensor_parallel(self) -> int:
        """The number of ranks that share a layer."""
        return self._whole("--tensor-model-parallel-size")

    @property
    def pipeline_parallel(self) -> int:
        """The number of pipeline stages."""
        return self._whole("--pipeline-model-parallel-size")

    @property
    def depth_is_free(self) -> bool:
        """True where it may have another number of layers: where nothing says which stage has which."""
        return not any(_OF_LAYERS.match(word) for word in self.flags)

    def _whole(self, flag: str) -> int:
        value = "1"
        for word, following in zip(self.flags, (*self.flags[1:], ""), strict=True):
            if word.partition("=")[0] == flag:
                value = word.partition("=")[2] or following
        if not value.isdigit() or int(value) < 1:
            raise InputError(f"{_SOURCE}: {flag} {value}: not a number of ranks. Give one of 1 or more.")
        return int(value)

    def batch(self, size: int) -> "LineBatch":
        """The least batch of `size` or more that the layout can share out: a micro-batch for each pipeline stage.

        Raises:
            InputError: the processes cannot be laid out so.
        """
        model, world = self.pipeline_parallel * self.tensor_parallel, self.world_size
        if world % model:
            raise InputError(
                f"{_SOURCE} starts {world} process{'es' if world > 1 else ''}, and its tensor × pipeline parallelism "
                f"needs a multiple of {model}. Give both as of the run to come."
            )
        share = world // self.tensor_parallel
        micro = -(-size // share)
        return LineBatch(micro * share, micro)

    def model(self) -> ModelFile:
        """Returns the model that it trains, with the vocabulary of the check.

        Raises:
            InputError: it is no model that is supported, or its flags leave it open.
        """
        values = values_from_flags([*self._kept(), *_DATA], source=_SOURCE)
        return model_from_values(values, vocab_size=_VOCABULARY, source=_SOURCE, script=self.start[-1])

    def measuring(
        self, model: ModelFile, recipe: Path, request: Path, *, seed: int, batch: "LineBatch", steps: int
    ) -> list[str]:
        """Returns the words that train a model of the check instead.

        Args:
            model: of one width.
            recipe: of the check.
            request: what is to be measured.
            seed: of the run.
            batch: how many sequences.
            steps: how long.
        """
        changed = {
            "num-layers": model.num_layers,
            "hidden-size": model.hidden_size,
            "num-attention-heads": model.num_attention_heads,
            "kv-channels": model.head_size,
            "ffn-hidden-size": model.ffn_size,
            **({"num-query-groups": model.query_groups} if model.group_query_attention else {}),
            "seq-length": model.seq_length,
            "max-position-embeddings": model.positions,
            "make-vocab-size-divisible-by": model.make_vocab_size_divisible_by,
            "attention-dropout": 0,
            "hidden-dropout": 0,
            "context-parallel-size": 1,
            "micro-batch-size": batch.micro,
            "global-batch-size": batch.whole,
            "train-iters": steps,
            "eval-iters": 0,
            "eval-interval": steps + 1,
            "seed": seed,
            "mup-recipe": recipe,
            "mup-observe": f"{OBSERVER}:{request}",
        }
        said = [word for name, value in changed.items() for word in (f"--{name}", str(value))]
        return [*self.start, *self._kept(), *_DATA, *said, "--mup-override", "--no-check-for-nan-in-loss-and-grad"]

    def _kept(self) -> Iterator[str]:
        dropping = False
        for word in self.flags:
            if word.startswith("--"):
                dropping = _DROPPED.match(word) is not None
            if not dropping:
                yield word


@dataclass(frozen=True, slots=True)
class LineBatch:
    """Sequences of an iteration, and those that go through the model at once."""

    whole: int
    micro: int


def _count(word: str) -> int:
    """A number of torchrun's: of nodes, at least so many; of processes on one, as many as devices unless it is said."""
    number = word.partition(":")[0]
    if number.isdigit():
        return int(number)
    import torch

    return max(1, torch.cuda.device_count())


def result_of_line(words: Sequence[str], request: Path, ended: Ended) -> MeasuredRun:
    """Reads what a run of the line has measured.

    Raises:
        InputError: it measured nothing.
    """
    try:
        return MeasuredRun.from_json(json.loads(result_of(request).read_text(encoding="utf-8")))
    except FileNotFoundError:
        end = "\n".join(f"  {line}" for line in ended.said.strip().splitlines()[-15:])
        how = f"with code {ended.code}" if ended.code else "without having trained with the plug-in"
        raise InputError(
            f"{_SOURCE} ended {how}. Its last words:\n{end}\nIt was run as\n  {shlex.join(words)}"
        ) from None


def run_line(words: Sequence[str]) -> Ended:
    """Runs a command line as a process of its own.

    Raises:
        InputError: it cannot be started.
    """
    try:
        done = subprocess.run(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    except OSError as error:
        raise InputError(
            f"{words[0]}: cannot be run ({error.strerror}). Give the command that starts the run."
        ) from None
    return Ended(done.returncode, done.stderr)
