"""An error on one rank is an error on all: nobody is left waiting in the next collective."""

import pytest
from support.processes import run_ranks

from mup_megatron.collectives import gathered, raising_together
from mup_megatron.errors import InputError


def _fails_on_the_first(message: str) -> tuple[str, str, list[int]]:
    from torch import distributed

    rank = distributed.get_rank()
    said, cause = "", ""
    try:
        with raising_together():
            if rank == 0:
                raise InputError(message) from OSError("the disk")
    except InputError as error:
        said, cause = str(error), str(error.__cause__)
    return said, cause, gathered(rank)


def test_what_one_rank_raises_all_raise_with_the_cause_where_it_was() -> None:
    first, second = run_ranks(_fails_on_the_first, 2, "a file is missing", timeout_s=120)
    assert first == ("a file is missing", "the disk", [0, 1])
    assert second == ("a file is missing", "None", [0, 1])


def test_a_single_process_raises_what_is_wrong_and_nothing_else() -> None:
    with raising_together():
        done = True
    assert done
    with pytest.raises(InputError, match="wrong"), raising_together():
        raise InputError("wrong")
    with pytest.raises(KeyError), raising_together():
        raise KeyError("a bug")
