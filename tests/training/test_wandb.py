"""An offline run of Weights & Biases, read back from what wandb wrote."""

import json
import os
import struct
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.processes import run_ranks
from support.training_runs import RECIPE, make_text, options, target

from mup_megatron.training.options import TrainingOptions
from mup_megatron.training.train import run_training


def train_offline(folder: Path, chosen: TrainingOptions) -> None:
    os.environ.update(WANDB_MODE="offline", WANDB_SILENT="true")
    run_training(target(), RECIPE, make_text(folder), chosen)


def records(log: bytes) -> Iterator[bytes]:
    """The records of a `.wandb` file: LevelDB's log format after a header of seven bytes.

    Blocks of 32 KiB hold chunks of checksum, length and type: whole (1), first (2), middle (3) or last (4) of a record.
    """
    block, header = 32768, struct.Struct("<IHB")
    assert log.startswith(b":W&B")
    position, parts = 7, b""
    while position + header.size <= len(log):
        if block - position % block < header.size:
            position += block - position % block
            continue
        _, length, kind = header.unpack_from(log, position)
        position += header.size
        parts += log[position : position + length]
        position += length
        if kind in (1, 4):
            yield parts
            parts = b""


def read_back(file: Path) -> tuple[dict[str, Any], dict[str, dict[int, float]]]:
    """The run's configuration; and of every key its values by step."""
    from wandb.proto import wandb_internal_pb2

    config: dict[str, Any] = {}
    history: dict[str, dict[int, float]] = defaultdict(dict)
    for data in records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        for item in record.run.config.update if record.HasField("run") else ():
            config[item.key] = json.loads(item.value_json)
        if record.HasField("history"):
            for item in record.history.item:
                key = item.key or ".".join(item.nested_key)
                history[key][record.history.step.num] = json.loads(item.value_json)
    return config, history


def test_an_offline_run_holds_recipe_fingerprint_and_learning_rates(tmp_path: Path) -> None:
    chosen = options(tmp_path, wandb_project="widths", wandb_exp_name="double", eval_interval=8)
    run_ranks(train_offline, 1, tmp_path, chosen)
    (file,) = (tmp_path / "out").rglob("*.wandb")
    config, history = read_back(file)
    assert config["fingerprint"] == RECIPE.fingerprint
    assert config["recipe"] == RECIPE.model_dump(mode="json")
    assert config["options"]["train_iters"] == 12

    h = RECIPE.hyperparameters
    linear = {n: h.min_lr + (1 - (n - 1) / 12) * (h.lr - h.min_lr) for n in (4, 8, 12)}
    assert history["lr/input"] == pytest.approx(linear, rel=1e-12)
    assert history["lr/hidden"] == pytest.approx({n: lr / 2 for n, lr in linear.items()}, rel=1e-12)
    assert set(history["validation_loss"]) == {8, 12}

    lines = (tmp_path / "out" / "metrics.csv").read_text().splitlines()[1:]
    assert history["loss"] == {n: float(lines[n - 1].split(",")[1]) for n in (4, 8, 12)}
