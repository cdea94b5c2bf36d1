"""The memory of trials, before the first of them."""

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from support.commands import BASE

from mup_megatron.architectures.cost import parameter_count
from mup_megatron.architectures.registry import model_file
from mup_megatron.errors import InputError
from mup_megatron.training.options import TrainingOptions
from mup_megatron.tuning import memory
from mup_megatron.tuning.memory import free_gpu_memory, free_memory, remark_on_memory, state_bytes, trial_bytes

PROXY = model_file({**BASE, "hidden_size": 256, "num_layers": 4, "num_attention_heads": 4}, source="proxy.yaml")
OPTIONS = TrainingOptions(train_iters=3, global_batch_size=8)
GIB = 2**30


def test_states_are_counted_by_parameter() -> None:
    assert state_bytes(PROXY, OPTIONS) == 16 * parameter_count(PROXY)
    assert state_bytes(PROXY, replace(OPTIONS, bf16=True)) == 18 * parameter_count(PROXY)


def test_activations_grow_with_the_micro_batch_alone() -> None:
    def activations(**changes: int) -> int:
        options = replace(OPTIONS, **changes)
        return trial_bytes(PROXY, options) - state_bytes(PROXY, options) - memory.PROCESS_BYTES

    assert activations(global_batch_size=16) == 2 * activations()
    assert activations(global_batch_size=16, micro_batch_size=8) == activations()


def test_trials_that_fit_are_not_remarked_on_and_as_many_as_fit_are_named() -> None:
    each = trial_bytes(PROXY, OPTIONS)
    free = (3 * each + 1, 64 * GIB)
    assert remark_on_memory(PROXY, OPTIONS, 3, free=lambda: free) is None
    said = remark_on_memory(PROXY, OPTIONS, 4, free=lambda: free)
    assert said is not None
    assert said.startswith(f"4 trials of about {each / GIB:.3g} GiB may not fit")
    assert said.endswith("Use --workers 3.")
    assert "--micro-batch-size" in (remark_on_memory(PROXY, OPTIONS, 1, free=lambda: (1, 64 * GIB)) or "")
    assert remark_on_memory(PROXY, OPTIONS, 999, free=lambda: None) is None


def test_a_trial_that_can_never_fit_is_refused() -> None:
    total = state_bytes(PROXY, OPTIONS) - 1
    with pytest.raises(InputError, match=r"for weights, gradients and optimizer alone, .* Search on a smaller proxy"):
        remark_on_memory(PROXY, OPTIONS, 1, free=lambda: (total, total))
    assert remark_on_memory(PROXY, OPTIONS, 1, free=lambda: (total, total + 1)) is not None


def test_this_machine_has_memory_and_a_control_group_less(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_number_in", lambda path: None)
    free, total = free_memory()
    assert 0 < free <= total
    limits = {"max": total // 4, "current": total // 8}
    monkeypatch.setattr(memory, "_number_in", lambda path: limits[path.rpartition(".")[2]])
    assert free_memory() == (min(free_memory()[0], total // 4 - total // 8), total // 4)


def test_a_gpu_is_asked_about_without_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\necho "$@" > "$(dirname "$0")/asked"\necho "1024, 4096"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert free_gpu_memory() == (GIB, 4 * GIB)
    assert "--id=3" in (tmp_path / "asked").read_text()
    tool.unlink()
    monkeypatch.setattr(subprocess, "run", _no_tool)
    assert free_gpu_memory() is None


def _no_tool(*args: object, **kwargs: object) -> None:
    raise FileNotFoundError("nvidia-smi")
