"""The launcher of test ranks: a failing, dying or hanging rank must end a test with its reason, not hang it."""

import os
import time

import pytest
import torch
from support.processes import RankFailure, run_ranks


def _sum(scale: int, *, offset: int) -> tuple[torch.Tensor, dict[str, str]]:
    total = torch.tensor([scale * torch.distributed.get_rank()])
    torch.distributed.all_reduce(total)
    return total + offset, {name: os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}


def test_results_come_back_by_rank() -> None:
    results = run_ranks(_sum, 3, 10, offset=1)
    assert [total.item() for total, _ in results] == [31, 31, 31]
    assert [env for _, env in results] == [{"RANK": r, "LOCAL_RANK": r, "WORLD_SIZE": "3"} for r in "012"]


def _raise_on_last() -> None:
    if torch.distributed.get_rank() == 1:
        raise KeyError("the reason")
    torch.distributed.barrier()


def test_a_failure_shows_its_traceback_while_others_wait() -> None:
    with pytest.raises(RankFailure, match=r"(?s)rank 1 of 2 failed.*_raise_on_last.*KeyError: 'the reason'"):
        run_ranks(_raise_on_last, 2)


def _die() -> None:
    if torch.distributed.get_rank() == 0:
        os._exit(3)
    torch.distributed.barrier()


def test_a_death_shows_its_exit_code() -> None:
    with pytest.raises(RankFailure, match=r"rank 0 died with exit code 3|rank 1 of 2 failed"):
        run_ranks(_die, 2)


def _hang(pid_file: str) -> None:
    with open(pid_file, "w") as file:
        file.write(str(os.getpid()))
    time.sleep(3600)


def test_a_hang_is_ended(tmp_path) -> None:  # type: ignore[no-untyped-def]
    pid_file = tmp_path / "pid"
    with pytest.raises(RankFailure, match="rank 0 not finished after 5 s"):
        run_ranks(_hang, 1, str(pid_file), timeout_s=5)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)
