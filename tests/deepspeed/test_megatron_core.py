"""Megatron-Core under DeepSpeed's engine and in its pipeline trains as `mup-megatron train` does, and mistakes show."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.ds_megatron_runs import CLIP, SHAPES, STEPS, Case, Result, lr_share, plan_of, results, trained_by_megatron
from support.processes import RankFailure, run_ranks
from support.trained import Trained
from support.training_runs import make_text

AGREE = 1e-5
"""Losses of two ways to train: rounding at this learning rate, over eight steps in fp32."""

NOTICED = 1e-4
"""What a mistake changes at least: ten times what rounding may."""

LAYERS = 7
"""Of the pipeline: embedding, four transformer layers, final norm, readout."""

ENGINE = [
    *(Case(tp=tp, zero=zero) for tp in (1, 2) for zero in (0, 1, 2)),
    *(Case(dp=2, zero=zero) for zero in (0, 2)),
    *(Case(tp=2, zero=zero, sequence_parallel=True) for zero in (0, 2)),
    *(Case(shape="untied", tp=tp, zero=1) for tp in (1, 2)),
    Case(shape="untied", tp=2, zero=2, sequence_parallel=True),
    Case(tp=2, zero=1, entry=True),
]
PIPELINE = [
    *(Case(shape=shape, stages=2, zero=zero) for shape in SHAPES for zero in (0, 1)),
    Case(stages=2, zero=1, entry=True),
]
SPLITS = [
    Case(shape=shape, stages=2, zero=1, split=(first, LAYERS))
    for shape, splits in (("tied", (1, 6)), ("untied", range(1, LAYERS)))
    for first in splits
]
MISTAKES = {
    "learning rate": Case(tp=2, zero=1, broken="one learning rate"),
    "learning rate in a pipeline": Case(stages=2, zero=1, broken="one learning rate"),
    "readout multiplier": Case(zero=2, broken="no readout multiplier"),
    "readout multiplier in a pipeline": Case(stages=2, broken="no readout multiplier"),
    "readout multiplier on one rank": Case(tp=2, broken="no readout multiplier", only_rank=1),
    "attention scale on one rank": Case(tp=2, zero=1, broken="the default attention scale", only_rank=1),
    "attention scale of one stage": Case(stages=2, broken="the default attention scale", only_rank=1),
    "gradients of norms": Case(tp=2, sequence_parallel=True, broken="no sums over tensor-parallel ranks"),
    "gradients of query norms": Case(shape="untied", tp=2, broken="no sums over tensor-parallel ranks"),
    "norm of a pipeline": Case(stages=2, broken="the norm as DeepSpeed counts it"),
}
SELDOM = [
    *(Case(tp=tp, zero=zero) for tp, zero in ((1, 0), (1, 1), (2, 0), (2, 2))),
    Case(dp=2, zero=0),
    Case(tp=2, zero=0, sequence_parallel=True),
    Case(shape="untied", tp=1, zero=1),
    *(Case(shape=shape, stages=2, zero=0) for shape in SHAPES),
    *(case for case in SPLITS if case.split != (1, LAYERS)),
]
"""Other cases have all that these have: they are in `make test-full`."""
FOUR_RANKS = [
    *(Case(shape=shape, stages=2, tp=2, zero=zero) for shape in SHAPES for zero in (0, 1)),
    *(Case(stages=2, tp=2, zero=zero, sequence_parallel=True, partitioned=p) for zero, p in ((0, True), (1, False))),
    Case(shape="untied", stages=2, tp=2, zero=1, sequence_parallel=True),
    Case(stages=2, dp=2, zero=1),
    Case(stages=4, zero=1),
]
STOCK = [Case(tp=2, plug_in=False), Case(shape="untied", plug_in=False)]

Ran = dict[Case, list[Result]]
"""Case → what each rank saw."""
Runs = Trained[Case, list[Result]]


def each(cases: Sequence[Case]) -> pytest.MarkDecorator:
    """Parametrizes a test by cases, of which some are slow."""
    marked = [pytest.param(case, id=str(case), marks=pytest.mark.slow if case in SELDOM else ()) for case in cases]
    return pytest.mark.parametrize("case", marked)


def of_pipeline(shape: str) -> Case:
    """One process without a pipeline, from the weights with which pipelines start."""
    return Case(shape=shape, weights_of_pipeline=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text(tmp_path_factory.mktemp("text"))


def _run(cases: Sequence[Case], data: Path, **limits: float) -> Ran:
    """Those of one world size in one set of processes. A rank that waits for ever fails after `timeout_s`."""
    ran: Ran = {}
    for size in sorted({case.world_size for case in cases}):
        together = [case for case in cases if case.world_size == size]
        of_ranks = run_ranks(results, size, together, data, data.parent / "cache", **limits)
        ran |= {case: [rank[i] for rank in of_ranks] for i, case in enumerate(together)}
    return ran


@pytest.fixture(scope="module")
def ran(data: Path) -> Runs:
    references = [of_pipeline(shape) for shape in SHAPES]
    cases = [*references, *ENGINE, *PIPELINE, *SPLITS, *STOCK, *MISTAKES.values()]
    return Trained(lambda group: _run(group, data), [case for case in cases if case not in SELDOM], SELDOM)


@pytest.fixture(scope="module")
def by_megatron(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], list[list[float]]]:
    """(shape, tensor parallelism) → losses and gradient norms of `mup-megatron train`."""
    trained = {}
    for shape, tp in (("tied", 1), ("tied", 2), ("untied", 1)):
        folder = tmp_path_factory.mktemp("trained")
        trained[shape, tp] = run_ranks(trained_by_megatron, tp, shape, data, folder, tp=tp)[0]
    return trained


def _distance(ranks: Sequence[Result], reference: Sequence[float]) -> float:
    return max(abs(a - b) for rank in ranks for a, b in zip(rank.losses, reference, strict=True))


# ---- what must hold ------------------------------------------------------------------------------------------------


@each(ENGINE)
def test_the_engine_trains_as_megatron_does(ran: Runs, by_megatron: dict[tuple[str, int], list], case: Case) -> None:
    losses, norms = by_megatron.get((case.shape, case.tp)) or by_megatron[case.shape, 1]
    assert len(losses) == STEPS
    assert min(norms) > CLIP  # so clipping is a part of it
    assert _distance(ran[case], losses) < AGREE
    if case.zero:  # DeepSpeed keeps no norm at ZeRO 0
        assert all(rank.grad_norms == pytest.approx(norms, rel=AGREE) for rank in ran[case])


@pytest.mark.parametrize("case", STOCK, ids=str)
def test_it_trains_otherwise_without_the_plug_in(
    ran: Runs, by_megatron: dict[tuple[str, int], list], case: Case
) -> None:
    assert _distance(ran[case], by_megatron[case.shape, 1][0]) > 1e-2


@each([*PIPELINE, *SPLITS])
def test_every_split_of_a_pipeline_trains_as_one_process_does(ran: Runs, case: Case) -> None:
    (one,) = ran[of_pipeline(case.shape)]
    assert _distance(ran[case], one.losses) < AGREE


@each([*PIPELINE, *SPLITS])
def test_all_stages_have_all_groups_in_one_order(ran: Runs, case: Case) -> None:
    (one,) = ran[of_pipeline(case.shape)]
    assert len(one.groups) > 2
    assert all(stage.groups == one.groups for stage in ran[case])


@each([*PIPELINE, *SPLITS])
def test_every_split_starts_from_the_same_weights(ran: Runs, case: Case) -> None:
    """Those of one process, which `test_a_pipeline_draws_what_the_plan_says` looks at."""
    (one,) = ran[of_pipeline(case.shape)]
    assert set().union(*(stage.start for stage in ran[case])) == set(plan_of(case.shape).by_name)
    assert all(weight.equal(one.start[name]) for stage in ran[case] for name, weight in stage.start.items())


@pytest.mark.parametrize("shape", SHAPES)
def test_a_pipeline_draws_what_the_plan_says(ran: Runs, shape: str) -> None:
    (one,) = ran[of_pipeline(shape)]
    for entry in plan_of(shape).entries:
        weight = one.start[entry.name]
        if entry.init_std is None:
            assert weight.eq(entry.init_value).all(), entry.name
        else:
            standard_error = entry.init_std / math.sqrt(2 * weight.numel())
            assert abs(float(weight.double().std()) - entry.init_std) < 4 * standard_error, entry.name


@each([*ENGINE, *PIPELINE, *SPLITS])
def test_the_live_engine_holds_the_plan_times_the_schedule(ran: Runs, case: Case) -> None:
    _require_live_values(ran[case], case)


def _require_live_values(ranks: Sequence[Result], case: Case) -> None:
    plan = plan_of(case.shape)
    for rank in ranks:
        for step, values in enumerate(rank.live):
            for name, (lr, eps, weight_decay) in values.items():
                entry = plan[name]
                assert lr == pytest.approx(entry.lr * lr_share(step), rel=1e-12), name
                assert (eps, weight_decay) == (entry.eps, entry.weight_decay), name
    assert set().union(*(rank.live[0] for rank in ranks)) == set(plan.by_name)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_noticed(ran: Runs, by_megatron: dict[tuple[str, int], list], mistake: str) -> None:
    case = MISTAKES[mistake]
    one = of_pipeline(case.shape)
    reference = by_megatron[case.shape, 1][0] if case.stages is None else ran[one][0].losses
    assert _distance(ran[case], reference) > NOTICED
    if case.broken == "one learning rate":
        with pytest.raises(AssertionError):
            _require_live_values(ran[case], case)


# ---- what is refused -----------------------------------------------------------------------------------------------


WHAT_NO_ENGINE_HAS = (
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "gradient_accumulation_fusion",
    "num_stages",
)


def _refused() -> dict[str, str]:
    """The sentences with which models are refused."""
    import os

    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    from support import planned, stock
    from support.stock import Layout

    from mup_megatron.deepspeed import megatron
    from mup_megatron.errors import InputError

    deepspeed.init_distributed("gloo", verbose=False)
    plan, (_, target) = plan_of("tied"), SHAPES["tied"]
    stock.init_parallel(Layout(dp=torch.distributed.get_world_size()))
    said = {}
    for what in WHAT_NO_ENGINE_HAS:
        config = stock.transformer_config(planned.sizes_of(target), Layout())
        if what != "num_stages":
            setattr(config, what, 2)
        try:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("deepspeed.runtime.utils.partition_uniform", lambda **_: [0, 0, LAYERS])
                megatron.pipeline_module(config, target, plan, num_stages=2, partition_method="uniform")
        except InputError as error:
            said[what] = str(error)
    return said


@pytest.fixture(scope="module")
def refused() -> list[dict[str, str]]:
    return run_ranks(_refused, 2)


@pytest.mark.parametrize("what", WHAT_NO_ENGINE_HAS)
def test_what_the_engine_cannot_do_is_refused_on_every_rank(refused: list[dict[str, str]], what: str) -> None:
    one, other = (said[what] for said in refused)
    assert one == other
    assert one.startswith(f"{what}: ")
    assert "\n" not in one


def test_tensor_parallelism_without_an_mpu_is_refused(data: Path) -> None:
    with pytest.raises(RankFailure, match="InputError: mpu: DeepSpeed got none"):
        _run([Case(tp=2, mpu=False)], data)


# ---- slower --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_pipelines_of_tensor_and_data_parallel_stages_train_as_one_process_does(data: Path, ran: Runs) -> None:
    for case, ranks in _run(FOUR_RANKS, data).items():
        (one,) = ran[of_pipeline(case.shape)]
        assert _distance(ranks, one.losses) < AGREE, case
        _require_live_values(ranks, case)


@pytest.mark.slow
def test_bf16_trains_alike_at_its_precision(data: Path, ran: Runs) -> None:
    (one,) = ran[of_pipeline("tied")]
    cases = [Case(stages=2, zero=1, bf16=True), *(replace(of_pipeline("tied"), zero=z, bf16=True) for z in (0, 1, 2))]
    for case, ranks in _run(cases, data).items():
        assert AGREE < _distance(ranks, one.losses) < 1e-2 * min(one.losses), case


@pytest.mark.slow
def test_without_padding_a_pipeline_hangs_at_zero_1(data: Path) -> None:
    """What `pad_on` is for: the last stage of this split has one group, the first has all."""
    hanging = Case(shape="untied", stages=2, zero=1, split=(6, LAYERS), broken="groups without padding")
    with pytest.raises(RankFailure, match="not finished"):
        _run([hanging], data, timeout_s=20)
