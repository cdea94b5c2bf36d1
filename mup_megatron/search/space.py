"""The search space: which hyperparameters are drawn, and from where. Not the search, and not what the names mean.

A space file maps each hyperparameter to `{low, high, log, base}`, in one of three forms:

    weight_decay: {low: 0.0, high: 0.2}               uniform between the bounds
    lr: {low: 1.0e-4, high: 1.0e-1, log: true}        log-uniform between the bounds
    lr: {low: -4, high: -1, base: 10}                 10^U(-4, -1): the bounds are exponents of the base

The second and third line are the same distribution. `log` and `base` exclude each other, because beside `base` the
bounds would no longer be clear.

A draw depends on the seed, the trial's number and the hyperparameter's name alone: the order of the file does not
matter, and a hyperparameter that is added leaves the draws of the others as they were.
"""

import math
import random
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from mup_megatron.errors import InputError
from mup_megatron.validation import Strict, validated
from mup_megatron.yaml_io import read_yaml

LARGEST_BOUND = 1e100
"""Of a space. Not far beyond, the width of a range is no number any more, and pictures of it cannot be drawn."""


@dataclass(frozen=True)
class SearchRange:
    """One hyperparameter's distribution: uniform, or log-uniform, between two values."""

    low: float
    high: float
    log: bool

    def at(self, fraction: float) -> float:
        """Returns the value below which `fraction` (0 to 1) of the distribution lies."""
        if self.log:
            value = math.exp(math.log(self.low) + fraction * (math.log(self.high) - math.log(self.low)))
        else:
            value = self.low + fraction * (self.high - self.low)
        return min(max(value, self.low), self.high)  # rounding must not leave the bounds

    def holds(self, value: float) -> bool:
        """Says if a value is between the bounds, which a database may have rounded."""
        return self.low <= value <= self.high or any(math.isclose(value, bound) for bound in (self.low, self.high))

    def fraction(self, value: float) -> float:
        """Inverts `at`: returns the part of the distribution that lies below a value of it."""
        if self.log:
            return (math.log(value) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        return (value - self.low) / (self.high - self.low)


@dataclass(frozen=True)
class Space:
    """Hyperparameter name → distribution, all independent of each other."""

    ranges: Mapping[str, SearchRange]

    def sample(self, seed: int, trial: int) -> dict[str, float]:
        """Returns the hyperparameters of trial number `trial` (from 0) of a random search with this seed."""
        # Python promises `random()` of a seeded generator to be the same in every version; numpy promises less.
        return {
            name: bounds.at(random.Random(f"{seed}/{trial}/{name}").random()) for name, bounds in self.ranges.items()
        }

    def to_json(self) -> dict[str, dict[str, float | bool]]:
        """Returns plain values. The forms of a file are gone: bounds are values, and `log` says how they are drawn."""
        return {
            name: {"low": bounds.low, "high": bounds.high, "log": bounds.log} for name, bounds in self.ranges.items()
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Mapping[str, Any]]) -> "Space":
        """Inverts `to_json`."""
        return cls({name: SearchRange(entry["low"], entry["high"], entry["log"]) for name, entry in content.items()})


class _Entry(Strict):
    """One hyperparameter as a file gives it."""

    low: float
    high: float
    log: bool | None = None
    base: Annotated[float, Field(gt=1)] | None = None

    @model_validator(mode="after")
    def _possible(self) -> "_Entry":
        if self.low >= self.high:
            raise ValueError(f"low {self.low:g} is not below high {self.high:g}. Correct the bounds.")
        if self.base is not None and self.log is not None:
            raise ValueError("has both log and base. Keep base if the bounds are exponents, log if they are values.")
        if self.log and self.low <= 0:
            raise ValueError(f"low {self.low:g} is not positive, which log needs. Raise it, or use base and exponents.")
        try:
            values = self._bounds()
        except OverflowError:
            values = (0.0, math.inf)
        if self.base is None and max(map(abs, values)) > LARGEST_BOUND:
            raise ValueError(f"has a bound beyond {LARGEST_BOUND:g}. Choose a narrower range.")
        if self.base is not None and not (0 < values[0] < values[1] <= LARGEST_BOUND):
            raise ValueError(
                f"{self.base:g}^{self.low:g} to {self.base:g}^{self.high:g} is no range of ordinary numbers. "
                "With base the bounds are exponents."
            )
        return self

    def _bounds(self) -> tuple[float, float]:
        return (self.low, self.high) if self.base is None else (self.base**self.low, self.base**self.high)

    def search_range(self) -> SearchRange:
        low, high = self._bounds()
        return SearchRange(low, high, log=self.base is not None or bool(self.log))


def load_space(path: Path, allowed: Collection[str]) -> Space:
    """Reads the space of a YAML file.

    Args:
        path: the file.
        allowed: the hyperparameters that may appear in it.

    Raises:
        InputError: the file cannot be read, is not YAML, is empty, names a hyperparameter that is not allowed, has an
            unknown key, a wrong type or bounds that make no range. The message names file, key and remedy.
    """
    content = read_yaml(path)
    if not isinstance(content, Mapping) or not content:
        raise InputError(f"{path}: no hyperparameters. Write lines such as `lr: {{low: -4, high: -1, base: 10}}`.")
    for name in content:
        if name not in allowed:
            raise InputError(f"{path}: {name}: not a hyperparameter to search. Choose from {', '.join(allowed)}.")
    return Space(
        {name: validated(_Entry, entry, source=f"{path}: {name}").search_range() for name, entry in content.items()}
    )
