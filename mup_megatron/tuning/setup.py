"""The hyperparameters that a search varies, or takes from another study, and those that it leaves alone."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.errors import InputError
from mup_megatron.search import Selection, Space, default_storage, find_study, read_study
from mup_megatron.tuning.context import ModelContext, sweep_context
from mup_megatron.validation import plain


@dataclass(frozen=True)
class SearchSetup:
    """The hyperparameters that a study varies, and what it leaves alone."""

    space: Space
    fixed: Mapping[str, Any]
    """A recipe's content without its base."""
    selection: Selection | None = None
    """The trials of another study that are run, and no others. Its space and what it left alone are the two above."""


def best_of(
    other: str, count: int, *, study: str, storage: str | None, proxy: ModelFile, accept_unfinished: bool
) -> SearchSetup:
    """Selects the best trials of one study for another: all that they depend on but data and length of the run.

    Once that study exists, it keeps the trials that it was made of, whatever has become of the other one.

    Args:
        other: the name of the study that has the trials.
        count: how many.
        study: the name of the one that is to run them.
        storage: of both; None: each has its default.
        proxy: what is to be trained.
        accept_unfinished: whether to choose although trials of the other have no result yet.

    Raises:
        InputError: as `read_study` and `select_best`; the other study's proxy is not this one, or it is the same study.
    """
    if other == study:
        raise InputError(f"--of {other}: the same as --study. Give the new study another name.")
    made = find_study(storage or default_storage(study), study)
    if made is not None and made.spec.selection is not None and made.spec.selection.study == other:
        selection = made.spec.selection
        if len(selection.candidates) != count:
            raise InputError(
                f"--best {count}: study {study!r} was made of the best {len(selection.candidates)} of {other!r}. Give "
                "that number to go on with it, or another name with --study."
            )
        return SearchSetup(made.spec.space, made.spec.context["fixed"], selection)
    found = read_study(storage or default_storage(other), other)
    context = sweep_context(found, ModelContext, flag="--of")
    before, now = context["proxy"], plain(proxy)
    if before != now:
        differing = [key for key in {**now, **before} if before.get(key) != now.get(key)]
        raise InputError(
            f"--of {other}: that study trained another model ({', '.join(differing)} differ), and hyperparameters "
            "belong to the shape they were tuned at. Give the model file of that study."
        )
    return SearchSetup(
        found.spec.space, context["fixed"], found.select_best(count, accept_unfinished=accept_unfinished)
    )
