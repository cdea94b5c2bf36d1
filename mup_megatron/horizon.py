"""Two runs, that of the tuning and the target's, and what a rule makes of the base's values from one to the other.

The rules are `theory/horizon.py`'s. Here are the keys `training` and `horizon` of a recipe.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from mup_megatron import theory
from mup_megatron.validation import Strict, added, quoted

__all__ = ["Horizon", "Training"]

_Count = Annotated[int, Field(gt=0, le=10**18)]

_COPIED = 0.1
"""Of the way from tuned to moved: so near to the latter is what somebody wrote down with fewer digits."""


class Training(Strict):
    """The run at which the base was tuned. Without `horizon` it is informative, and says nothing about the target."""

    train_iters: _Count | None = None
    global_batch_size: _Count | None = None
    seq_length: _Count | None = None


def _known_rule(name: str) -> str:
    if name not in theory.HORIZON_RULES:
        known = ", ".join(f"'{each}'" for each in theory.HORIZON_RULES)
        raise ValueError(f"should be one of {known}, found {quoted(name)}. Correct this value.")
    return name


def _whole(value: object) -> object:
    """Tokens are written as 3.0e+11 by people."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


class Horizon(Strict):
    """The target's run, and the rule by which the base's values are moved to it."""

    rule: Annotated[str, AfterValidator(_known_rule)]
    tokens: Annotated[_Count, BeforeValidator(_whole)]
    """Of the whole run."""
    batch: _Count
    """Sequences of an iteration."""
    seq_length: _Count | None = added("0.2", None)
    """By default the tuning's."""
    exponent: Annotated[float, Field(gt=0, le=1)] | None = added("0.2", None)
    """Of the rule `tokens`: by which the learning rate falls. By default the rule's own, which is filled in."""

    @model_validator(mode="before")
    @classmethod
    def _filled_in(cls, content: object) -> object:
        if not isinstance(content, Mapping) or content.get("exponent") is not None:
            return content
        name = content.get("rule")
        rule = theory.HORIZON_RULES.get(name) if isinstance(name, str) else None
        return content if rule is None or rule.exponent is None else {**content, "exponent": rule.exponent}

    @model_validator(mode="after")
    def _of_its_rule(self) -> "Horizon":
        _ = self.made_rule  # which may have no exponent
        return self

    @property
    def made_rule(self) -> theory.HorizonRule:
        """The rule, with the exponent that is said."""
        rule = theory.HORIZON_RULES[self.rule]
        return rule if self.exponent is None else rule.with_exponent(self.exponent)

    def ratios(self, tuning: Training) -> theory.Ratios:
        """Returns the target's run over the tuning's.

        Raises:
            PlanError: the tuning's is not known; names the keys.
        """
        iters, batch, length = tuning.train_iters, tuning.global_batch_size, tuning.seq_length
        if iters is None or batch is None or length is None:
            missing = [f"training.{key}" for key, value in tuning.model_dump().items() if value is None]
            raise theory.PlanError(
                f"{', '.join(missing)}: missing, so how far the target's run is from the tuning's is not known. Give "
                f"{'it' if len(missing) == 1 else 'them'} as of the run at which the base was tuned."
            )
        return theory.Ratios(
            batch=self.batch * (self.seq_length or length) / (batch * length),
            tokens=self.tokens / (iters * batch * length),
        )

    def factors(
        self, tuning: Training, optimizers: Sequence[theory.Optimizer], *, decays: bool, back: bool = False
    ) -> theory.Factors:
        """Returns by what the base's values are multiplied.

        Args:
            tuning: the run at which they were tuned.
            optimizers: the recipe's.
            decays: whether the schedule decays over the whole run.
            back: the reverse, from the target's run to the tuning's.

        Raises:
            PlanError: a rule does not go with these.
        """
        rule = self.made_rule
        if not rule.moves:
            return theory.Factors()
        if rule.decays and not decays:
            raise theory.PlanError(
                f"the rule {self.rule} is a fit to schedules that decay over the whole run, and the recipe's does not. "
                "Give it lr_decay_style linear or cosine, lr_decay_fraction 1 and a min_lr of lr/2 at most, or choose "
                "another rule, as steps."
            )
        ratios = self.ratios(tuning)
        return rule.factors(ratios.inverse if back else ratios, optimizers)

    def described(self, tuning: Training, moves: Mapping[str, tuple[float, float]]) -> str:
        """Returns in one line how far the target's run is from the tuning's, and what is moved."""
        rule = self.made_rule
        if not rule.moves:
            return f"horizon {self.rule}: nothing is moved"
        r = self.ratios(tuning)
        how = f"batch × {r.batch:.4g}, tokens × {r.tokens:.4g}, steps × {r.steps:.4g}"
        exponent = "" if self.exponent is None else f" (exponent {self.exponent:g})"
        values = "".join(f"   {key} {before:.6g} → {after:.6g}" for key, (before, after) in moves.items())
        return f"horizon {self.rule}{exponent}: {how}{values or '   nothing is moved'}"

    def to_json(self, tuning: Training, moves: Mapping[str, tuple[float, float]]) -> dict[str, Any]:
        """Returns the same as plain values."""
        own = self.model_dump(exclude_none=True)
        if self.made_rule.moves:
            r = self.ratios(tuning)
            own["ratios"] = {"batch": r.batch, "tokens": r.tokens, "steps": r.steps}
        base, moved = ({key: pair[index] for key, pair in moves.items()} for index in (0, 1))
        return own | {"base": base, "moved": moved}

    def require_as_tuned(self, values: Mapping[str, float], tuning: Training, noted: Mapping[str, object]) -> None:
        """Raises PlanError for what somebody has changed so that values would be moved twice, or from another run.

        Args:
            values: of a recipe, before they are moved.
            tuning: the run at which they were tuned.
            noted: what `transfer` has noted of both, as `tuned` and `tuned_in`.
        """
        if not self.made_rule.moves:
            return
        before, run = (_mapping(noted.get(key)) for key in ("tuned", "tuned_in"))
        tuned = {key: value for key, value in before.items() if isinstance(value, float) and key in values}
        of_each = _every_move(tuned, self.made_rule, self.ratios(tuning))
        for key in (key for key, moved in of_each[self.rule].items() if moved != tuned[key]):
            for name, moves in of_each.items():
                if moves[key] != tuned[key] and abs(values[key] - moves[key]) <= _COPIED * abs(moves[key] - tuned[key]):
                    again = "moved twice" if name == self.rule else f"moved by {self.rule} besides"
                    raise theory.PlanError(
                        f"hyperparameters.{key} {values[key]:g} is what {name} makes of the tuned {tuned[key]:g}, and "
                        f"would be {again}. Write {tuned[key]:g}, or take horizon out."
                    )
        if tuned and all(values[key] == value for key, value in tuned.items()):
            for key, value in tuning.model_dump().items():
                if key in run and run[key] != value:
                    raise theory.PlanError(
                        f"training.{key} is {value}, and these values were tuned at {run[key]}, from which they are "
                        f"moved. Write {run[key]}; the target's run stands in horizon."
                    )

    def run_problems(
        self, tuning: Training, *, batch: int | None, tokens: int | None, seq_length: int | None
    ) -> Iterator[str]:
        """Yields where a run is not this one, in sentences; of what is None nothing is said."""
        remedy = "Give the run the recipe's, or write the run's into the recipe."
        moved = f"the recipe's values are {'moved to' if self.made_rule.moves else 'for'}"
        if batch is not None and batch != self.batch:
            yield f"horizon.batch: {moved} batches of {self.batch} sequences, and this run's have {batch}. {remedy}"
        length = self.seq_length or tuning.seq_length
        if seq_length is not None and length is not None and seq_length != length:
            key = "horizon.seq_length" if self.seq_length else "training.seq_length"
            yield f"{key}: {moved} sequences of {length}, and this run's have {seq_length}. {remedy}"
        # A run has whole iterations.
        within = self.batch * (seq_length or length or 1)
        if tokens is not None and abs(tokens - self.tokens) >= within:
            yield f"horizon.tokens: {moved} {self.tokens} tokens, and this run has {tokens}. {remedy}"


def _mapping(noted: object) -> Mapping[str, object]:
    return noted if isinstance(noted, Mapping) else {}


def _every_move(
    tuned: Mapping[str, float], own: theory.HorizonRule, ratios: theory.Ratios
) -> dict[str, dict[str, float]]:
    """Returns what each rule makes of tuned values, a recipe's own first; nothing of another that cannot."""
    found = {own.name: own.at(ratios).moved(tuned)}
    for name, rule in theory.HORIZON_RULES.items():
        with suppress(theory.PlanError):
            found.setdefault(name, rule.at(ratios).moved(tuned))
    return found
