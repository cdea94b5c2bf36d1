"""The fidelities of a proxy's trials: narrower models and shorter runs, and the ladder that a budget makes of them.

All rungs have one recipe, whose base is the proxy: μP carries the same hyperparameters to the narrower models, so their
losses rank candidates as the proxy's do. A run on any rung has its whole schedule, to the end of its decay.
"""

from dataclasses import replace
from typing import Annotated, Any

from pydantic import Field

from mup_megatron.architectures.cost import training_flops
from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.architectures.narrowing import narrowed
from mup_megatron.architectures.proxy import Search, choose_proxy
from mup_megatron.architectures.registry import model_file
from mup_megatron.errors import InputError
from mup_megatron.search import Fidelity, Ladder, Rung, Space, StudyRecord, choose_ladder
from mup_megatron.tuning.objective import ProxyTraining
from mup_megatron.validation import Strict, validated

SHARES = ((1 / 4, 1 / 8), (1 / 4, 1 / 2), (1 / 2, 1 / 2), (1, 1))
"""Width and steps of a trial on each rung, of the proxy's. A narrower model says as much of a trial as a shorter run
does, for less."""
LEAST_HEAD = 32
"""TP5 (App. D.4) found smaller heads of proxies to transfer worse."""
HEAD_STEP = 8
"""Sizes of heads are multiples of it, as kernels of attention want them."""


class Settings(Strict):
    """The settings of a rung as its study records them."""

    hidden_size: Annotated[int, Field(gt=0)]
    train_iters: Annotated[int, Field(gt=0)]
    model: dict[str, Any]
    """Keys of the model file in which the narrower model differs from the proxy, `hidden_size` among them."""


def narrower(proxy: ModelFile, share: float) -> ModelFile:
    """Returns the proxy at about this share of its width; itself if it cannot be narrower.

    In whole heads of its size if there are enough for that, else in as many narrower heads as it has, of 32 at least.
    """
    wanted = share * proxy.hidden_size
    try:
        whole = choose_proxy(proxy, Search(1, 1, 1), width=max(1, round(wanted)), budget=1.0).model
    except InputError:
        whole = proxy
    size = max(LEAST_HEAD, round(share * proxy.head_size / HEAD_STEP) * HEAD_STEP)
    hidden = proxy.hidden_size * size // proxy.head_size
    if abs(whole.hidden_size - wanted) <= abs(hidden - wanted) or proxy.hidden_size * size % proxy.head_size:
        return whole
    heads = proxy.heads(proxy.num_attention_heads, size=size, groups=proxy.query_groups)
    return narrowed(proxy, hidden, heads).model


def ladder_for(
    training: ProxyTraining, space: Space, budget: float, found: StudyRecord | None, *, source: str
) -> Ladder:
    """Returns the ladder of a search with this budget; that of the study, if it was made with the same.

    Args:
        training: of whole trials.
        space: what is searched.
        budget: FLOPs for all trials.
        found: the study, if it exists.
        source: what the space is called.

    Raises:
        InputError: the budget is too small, or a rung could not be run somewhere in the space.
    """
    if found is not None and found.spec.context == training.context():
        ladder = found.spec.ladder
        if ladder is not None and ladder.budget == budget:
            return ladder
    rungs: dict[tuple[int, int], Fidelity] = {}
    for width, length in SHARES:
        model, steps = narrower(training.proxy, width), max(1, round(length * training.options.train_iters))
        rungs[model.hidden_size, steps] = _fidelity(training, model, steps)
    ladder = choose_ladder(list(rungs.values()), budget)
    for rung in ladder.rungs:
        at_rung(training, rung).require_possible(space, source=source)
    return ladder


def _fidelity(training: ProxyTraining, model: ModelFile, steps: int) -> Fidelity:
    before, now = (each.model_dump(mode="json") for each in (training.proxy, model))
    tokens = steps * training.options.global_batch_size * model.seq_length
    changes = {key: now[key] for key in now if now[key] != before[key]}
    settings = {"hidden_size": model.hidden_size, "train_iters": steps, "model": changes}
    return Fidelity(settings, training_flops(model).total * tokens)


def settings_of(rung: Rung) -> Settings:
    """Returns the settings of a rung.

    Raises:
        InputError: they are damaged.
    """
    return validated(Settings, dict(rung.fidelity.settings), source=_called(rung))


def _called(rung: Rung) -> str:
    return f"the rung of {rung.trials} trials"


def at_rung(training: ProxyTraining, rung: Rung) -> ProxyTraining:
    """Returns the training of a trial on a rung.

    Raises:
        InputError: the settings of the rung are damaged.
    """
    settings = settings_of(rung)
    model = model_file({**training.proxy.model_dump(mode="json"), **settings.model}, source=_called(rung))
    return replace(training, narrower=model, options=replace(training.options, train_iters=settings.train_iters))
