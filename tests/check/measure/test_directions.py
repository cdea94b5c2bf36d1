"""Muon's and Lion's steps: directions in plain torch, and η and λ read back from them."""

import importlib.util
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.shapes import HYPERPARAMETERS, gpt

from mup_megatron.check.measure.directions import (
    COEFFICIENTS,
    Directed,
    Direction,
    DirectionReplay,
    LionDirection,
    MuonDirection,
    orthogonalised,
    splits_of,
)
from mup_megatron.check.measure.optimizers import Handling, Split
from mup_megatron.check.measure.replay import AdamReplay, Fitted
from mup_megatron.recipe import Hyperparameters

STEPS = 5
OFF = 0.006
"""What a check calls off, at least."""
OTHERS_PACKAGE = pytest.mark.skipif(
    importlib.util.find_spec("emerging_optimizers") is None, reason="it is for Python 3.12 and later"
)


def told(**changes: Any) -> Hyperparameters:
    return Hyperparameters(**{**HYPERPARAMETERS, "adam_beta1": 0.8, **changes})


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def direction(of: Direction, gradient: torch.Tensor) -> torch.Tensor:
    of.observe(gradient)
    return of.now()


@pytest.mark.parametrize("shape", [(8, 24), (24, 8), (3, 8, 24)])
def test_singular_vectors_stay_and_singular_values_are_about_1(shape: tuple[int, ...]) -> None:
    matrix = drawn(*shape).double()
    found = orthogonalised(matrix, coefficients="polar_express", iterations=8)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    torch.testing.assert_close(found, left @ right, atol=0.02, rtol=0)


@OTHERS_PACKAGE
@pytest.mark.parametrize("iterations", [5, 12])
@pytest.mark.parametrize("coefficients", COEFFICIENTS)
def test_each_iteration_is_that_of_the_package_that_megatron_has_it_from(coefficients: Any, iterations: int) -> None:
    from emerging_optimizers.orthogonalized_optimizers.muon_utils import newton_schulz

    for matrix in (drawn(12, 40), drawn(40, 12)):
        theirs = newton_schulz(matrix, steps=iterations, coefficient_type=coefficients)
        ours = orthogonalised(matrix, coefficients=coefficients, iterations=iterations)
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_queries_keys_and_values_of_a_group_are_rows_that_follow_each_other() -> None:
    splits = splits_of(gpt(2, group_query_attention=True, num_query_groups=2))
    assert splits == dict.fromkeys(
        (f"decoder.layers.{i}.self_attention.linear_qkv.weight" for i in range(2)), (32, 8, 8)
    )


def test_parts_are_orthogonalised_one_by_one() -> None:
    h, gradient = told(muon_momentum=0.0, muon_scale_mode="unit_rms_norm"), drawn(2 * 12, 16)
    found = direction(MuonDirection(h, (8, 2, 2)), gradient).view(2, 12, 16)
    for begin, end in ((0, 8), (8, 10), (10, 12)):
        part = gradient.view(2, 12, 16)[:, begin:end].reshape(-1, 16)
        wanted = orthogonalised(part, coefficients="quintic", iterations=5) * (len(part) / 16) ** 0.5
        torch.testing.assert_close(found[:, begin:end].reshape(-1, 16), wanted)


# ---- read back -------------------------------------------------------------------------------------------------------

Make = Callable[[Hyperparameters, Split], Direction]
KINDS: dict[str, tuple[Make, bool]] = {"muon": (MuonDirection, True), "lion": (lambda h, _: LionDirection(h), False)}


def read(optimizer: torch.optim.Optimizer, replay: Any) -> Fitted:
    """What the replay makes of an optimizer's last step on its one matrix."""
    [parameter] = optimizer.param_groups[0]["params"]
    for step in range(STEPS):
        parameter.grad = drawn(*parameter.shape, seed=step + 1)
        before = parameter.detach().clone()
        optimizer.step()
        replay.observe(parameter.grad, before)
    found: Fitted = replay.fitted(replay.sums(before, parameter.detach() - before))
    return found


def weight() -> torch.nn.Parameter:
    return torch.nn.Parameter(0.05 * drawn(24, 32))


def stepped(kind: str, h: Hyperparameters, *, split: Split = (), lr: float = 0.01, decay: float = 0.5) -> Directed:
    make, _ = KINDS[kind]
    group = {"params": [weight()], "lr": lr, "weight_decay": decay, "handling": Handling(split)}
    return Directed([group], lambda own: make(h, own.split))


def replay_of(kind: str, h: Hyperparameters, split: Split = ()) -> DirectionReplay:
    make, whole = KINDS[kind]
    return DirectionReplay(make(h, split), whole=whole)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("lr", "decay"), [(0.1, 0.0), (0.01, 0.5)])
def test_their_values_are_read_back(kind: str, lr: float, decay: float) -> None:
    found = read(stepped(kind, told(), lr=lr, decay=decay), replay_of(kind, told()))
    assert found.lr == pytest.approx(lr, rel=1e-4)
    assert found.weight_decay == pytest.approx(decay, abs=1e-3)
    assert found.eps is None
    assert found.unexplained < 1e-3


OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "momentum": ("muon", {"muon_momentum": 0.5}),
    "Nesterov": ("muon", {"muon_nesterov": True}),
    "iterations": ("muon", {"muon_num_ns_steps": 3}),
    "coefficients": ("muon", {"muon_coefficient_type": "simple"}),
    "beta1": ("lion", {"adam_beta1": 0.5}),
    "beta2": ("lion", {"adam_beta2": 0.5}),
}


@pytest.mark.parametrize("other", OTHERS)
def test_those_of_other_settings_are_not_explained(other: str) -> None:
    kind, changes = OTHERS[other]
    assert read(stepped(kind, told(**changes)), replay_of(kind, told())).unexplained > OFF


def test_nor_are_parts_that_were_taken_for_one_matrix() -> None:
    assert read(stepped("muon", told(), split=(4, 2)), replay_of("muon", told(), (4, 2))).unexplained < 1e-3
    assert read(stepped("muon", told()), replay_of("muon", told(), (4, 2))).unexplained > OFF


def test_nor_is_another_optimizer() -> None:
    adam: dict[str, Any] = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-3}
    for kind in KINDS:
        assert read(torch.optim.AdamW([weight()], **adam), replay_of(kind, told())).unexplained > 0.1
        assert read(stepped(kind, told()), AdamReplay(0.8, 0.95)).unexplained > 0.1


def test_a_scale_is_of_the_rate_and_not_unexplained() -> None:
    found = {
        mode: read(stepped("muon", told(muon_scale_mode=mode)), replay_of("muon", told(muon_scale_mode="spectral"))).lr
        for mode in ("spectral", "unit_rms_norm", "shape_scaling")
    }
    assert found["spectral"] == pytest.approx(0.01, rel=1e-4)
    # 24 rows, 32 columns: √32, √(24/32) and 1.
    assert found["unit_rms_norm"] == pytest.approx(0.01 * 24**0.5 / 32, rel=1e-4)
    assert found["shape_scaling"] == pytest.approx(0.01 * 32**-0.5, rel=1e-4)


def test_every_setting_has_its_coefficients() -> None:
    for kind, nesterov in itertools.product(COEFFICIENTS, (False, True)):
        found = direction(MuonDirection(told(muon_coefficient_type=kind, muon_nesterov=nesterov), ()), drawn(8, 16))
        assert found.isfinite().all()
