"""The schedule of a launch line in fractions of its run, as a recipe has it."""

from collections.abc import Mapping
from typing import Any, NoReturn, get_args

from mup_megatron.errors import InputError
from mup_megatron.hyperparameters import LONGEST_SCHEDULE, Schedule
from mup_megatron.validation import brief


def schedule_of(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Returns Megatron's counts as fractions of the run.

    Raises:
        InputError: Megatron's own conditions on them, in the line's own words.
    """
    unit, other = ("samples", "iters") if values["train_samples"] is not None else ("iters", "samples")

    def text(key: str) -> str:
        return f"--{key.replace('_', '-')} {values[key]}"

    def refuse(what: str, remedy: str) -> NoReturn:
        raise InputError(f"{source}: {what}. {remedy}")

    mixed = [key for key in (f"train_{other}", f"lr_decay_{other}", f"lr_warmup_{other}") if values[key]]
    if mixed and values[f"train_{unit}"] is not None:
        refuse(f"{text(mixed[0])} beside {text(f'train_{unit}')}", "Megatron counts a run in one unit: drop one.")
    if values["lr_warmup_fraction"] is not None and values[f"lr_warmup_{unit}"]:
        refuse(
            f"{text('lr_warmup_fraction')} beside {text(f'lr_warmup_{unit}')}", "Megatron takes one: drop the other."
        )
    run = values[f"train_{unit}"]
    for key, least in (
        (f"train_{unit}", 1),
        (f"lr_decay_{unit}", 1),
        (f"lr_wsd_decay_{unit}", 1),
        (f"lr_warmup_{unit}", 0),
        ("lr_warmup_fraction", 0),
    ):
        if values[key] is not None and values[key] < least:
            refuse(f"{text(key)} is below {least}", "Correct this value.")

    def fraction(key: str, count: float) -> float:
        if run is None:
            refuse(f"{text(key)}: a recipe counts in fractions of the run", "Give --train-iters.")
        if count > LONGEST_SCHEDULE * run:
            refuse(f"{text(key)} is too long for {text(f'train_{unit}')}", "A recipe reaches a million runs.")
        return count / int(run)

    style, decay_key, warmup_key = values["lr_decay_style"], f"lr_decay_{unit}", f"lr_warmup_{unit}"
    if style not in get_args(Schedule.model_fields["lr_decay_style"].annotation):
        refuse(f"--lr-decay-style {brief(style, 60)}: a recipe does not know it", "Choose another.")
    decay = 1.0 if values[decay_key] is None else fraction(decay_key, values[decay_key])
    end = text(decay_key) if values[decay_key] is not None else text(f"train_{unit}") if run is not None else "the run"
    if values["lr_warmup_fraction"] is not None:
        warmup_key = "lr_warmup_fraction"
        # Megatron's is a fraction of the decay.
        warmup = values["lr_warmup_fraction"] * decay
    else:
        warmup = fraction(warmup_key, values[warmup_key]) if values[warmup_key] else 0.0
    if warmup >= decay:
        what = "is no part of" if warmup_key == "lr_warmup_fraction" else "does not end before"
        refuse(f"{text(warmup_key)} {what} {end}, which Megatron refuses", "Shorten the warm-up.")
    if style == "inverse-square-root" and not warmup:
        refuse("--lr-decay-style inverse-square-root is measured from the end of the warm-up", "Give one.")
    schedule = {"lr_decay_style": style, "lr_warmup_fraction": warmup, "lr_decay_fraction": decay}
    if style == "WSD":
        key = f"lr_wsd_decay_{unit}"
        if values[key] is None:
            refuse(f"--{key.replace('_', '-')} is missing, which --lr-decay-style WSD needs", "Give it.")
        final = fraction(key, values[key])
        if final > decay - warmup:
            beside = f", of which {text(warmup_key)} are the warm-up" if warmup else ""
            refuse(f"{text(key)} is longer than {end}{beside}", "Shorten it.")
        schedule["lr_wsd_decay_fraction"] = final
        schedule["lr_wsd_decay_style"] = values["lr_wsd_decay_style"]
    return schedule
