"""Which widths a check can afford, and what is told of it before."""

import re

import pytest
import torch

from mup_megatron.check.family import cost as expense
from mup_megatron.check.family.cost import Expense, Machine, Shapes, affordable, prediction
from mup_megatron.check.measure.levels import Level
from mup_megatron.check.verdict.later import LATER
from mup_megatron.errors import InputError

WIDTHS = [32, 64, 128, 256]


def _layers(times: int) -> Shapes:
    return [torch.Size((4 * times, times))] * 4


def _affordable(of_least: int) -> tuple[list[int], list[str]]:
    widths = [of_least * width // 32 for width in WIDTHS]
    return affordable(widths, _layers, tokens=32)


def test_usual_widths_stay() -> None:
    assert _affordable(32) == (WIDTHS, [])


def test_fewer_widths_are_trained_where_all_would_take_long_and_that_is_said() -> None:
    widths, [remark] = _affordable(256)
    assert widths == [256, 512, 1024]
    assert remark.startswith("3 widths, 256, 512, 1024, and not 4")


def test_what_takes_far_too_long_is_refused_with_the_widths_that_would_do() -> None:
    with pytest.raises(InputError, match=r"a core about \d+ min.*--widths 2048,4096,8192") as refused:
        _affordable(2048)
    assert len(str(refused.value)) <= 300


def _told(level: Level, monkeypatch: pytest.MonkeyPatch, *, once: bool, processes: int = 2) -> str:
    monkeypatch.setattr(Machine, "measured", classmethod(lambda _: Machine(flops=1e30, calls=1e3)))
    shapes = {width: _layers(width) for width in WIDTHS}
    return prediction(
        shapes,
        tokens=32,
        level=level,
        seeds=3,
        processes=processes,
        kept=lambda _protocol, rule: rule.value == "standard",
        once=[(shapes[32], LATER)] if once else [],
        layers=" of 4 of 80 layers",
    )


def _seconds(told: str) -> int:
    found = re.search(r"about (\d+) (s|min)", told)
    assert found is not None, told
    return int(found[1]) * (60 if found[2] == "min" else 1)


def test_what_runs_once_is_part_of_what_is_told_and_not_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    without, all_of_it = (_told(Level.QUICK, monkeypatch, once=once) for once in (False, True))
    assert without.startswith("12 + 16 models of 4 of 80 layers, widths 32, 64, 128, 256, in 2 processes: about ")
    own: Expense = expense.expense_of_run(_layers(32), LATER, tokens=32)
    assert _seconds(all_of_it) - _seconds(without) == pytest.approx(own.calls / 1e3, abs=60)


def test_every_level_tells_of_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    quick, standard, full = (_told(level, monkeypatch, once=False) for level in Level)
    assert _seconds(standard) > 2 * _seconds(quick)
    assert full == standard + " and then the learning rates of transfer, longer than all of it"
