"""Reads what wandb wrote offline."""

import json
import struct
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any


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


def place_of(file: Path) -> tuple[str, str, str]:
    """The run's project, group and name."""
    from wandb.proto import wandb_internal_pb2

    for data in records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.HasField("run"):
            return record.run.project, record.run.run_group, record.run.display_name
    raise AssertionError(f"{file}: no run")


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
