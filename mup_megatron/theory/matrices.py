"""The optimizers that step matrices alone, and leave the rest to Adam: Muon and Lion, as Megatron-Core has them.

Muon puts an orthogonal matrix in a gradient's place, whose singular values are all 1, and multiplies it by what a scale
mode makes of its shape. A step of Adam moves every entry alike; one of Muon's, every direction. So where Adam's factors
follow the number of entries that add up, Muon's say how the spectral norm of the update follows width (SC):

                         hidden          table             readout                   router
    spectral norm ∝      √(r_out/r_in)   √max(P, h)        √(1/r_in), times r_in     √(1/r_in)

- A hidden update of spectral norm √(out/in) changes outputs as much as they are large, whatever the width.
- A table of P rows of size h has rows of norm √(h/max(P, h)) in its update, entries of 1/√max(P, h): these stay.
- A readout is multiplied by 1/r_in, so its update is r_in times what acts; a router's multiplier is folded into it.

The factor is that, divided by how the scale of its mode follows width already. It depends on both sides at base and
target and not on their ratios alone, because the modes do. The weight decay makes up for the factor, and there is no
eps: a gradient's size does not matter.

Sources
    SC    A Spectral Condition for Feature Learning, arXiv 2310.17813
    measured: update slopes over widths 64 to 256, see docs/optimizers.md
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from fractions import Fraction
from typing import Any

from mup_megatron.theory.errors import PlanError
from mup_megatron.theory.optimizers import ADAM, ONE, Factor, Optimizer, optimizers, register
from mup_megatron.theory.tensors import Property, Role, Tensor
from mup_megatron.theory.widths import Matrix, Scaling, Sizes

Scale = Callable[[Fraction, Fraction], Fraction]
"""The square of what an update is multiplied by, from the rows and columns of its matrix as it is stored."""

SCALE_MODES: Mapping[str, Scale] = {
    "spectral": max,
    "unit_rms_norm": lambda rows, columns: rows / columns,
    "shape_scaling": lambda rows, columns: max(Fraction(1), rows / columns),
}
"""Megatron's `--muon-scale-mode` → its scale. A constant that multiplies all, as 0.2, does not change a factor."""
DEFAULT_SCALE_MODE = "spectral"
"""Megatron's own."""
UNIT = "unit_rms_norm"
"""The mode that is the spectral condition itself: it is right for any parts of a tensor."""


def is_stepped_as_matrix(tensor: Tensor) -> bool:
    """Returns whether an optimizer of matrices steps a tensor, and leaves it to no other.

    That is a matrix, or a batch of them as experts are, inside the model: no vector, no convolution, no readout and no
    table, unless the tensor itself says otherwise.
    """
    if tensor.stepped_as_matrix is not None:
        return tensor.stepped_as_matrix
    if tensor.properties & {Property.VECTOR, Property.READOUT, Property.EMBEDDING}:
        return False
    sides = (tensor.fan_in.size, tensor.fan_out.size)
    return len(tensor.shape) in {2, 3} and tensor.shape[-2:] in {sides, sides[::-1]}


def _factor(mode: str, role: Role) -> Factor:
    return lambda s: _of_all(s, [_of_one(s, matrix, role, SCALE_MODES[mode]) for matrix in s.stored], mode)


def _of_one(s: Scaling, matrix: Matrix, role: Role, scale: Scale) -> float:
    """Returns the factor of one matrix; in whole numbers up to the root, so that equal shapes have exactly 1."""
    rows, columns = matrix.rows, matrix.columns
    if role is Role.INPUT and rows != matrix.fan_out:
        wanted = _ratio(rows, columns, max)
    else:
        wanted = _grown(matrix.fan_out if matrix.name else s.fan_out) / _grown(s.fan_in)
    if role is Role.OUTPUT:
        wanted *= _grown(s.fan_in) ** 2
    return math.sqrt(wanted / _ratio(rows, columns, scale))


def _grown(sizes: Sizes) -> Fraction:
    return Fraction(sizes.target) / Fraction(sizes.base) if sizes.grows else Fraction(1)


def _ratio(rows: Sizes, columns: Sizes, scale: Scale) -> Fraction:
    at_base = scale(Fraction(rows.base), Fraction(columns.base))
    return scale(Fraction(rows.target), Fraction(columns.target)) / at_base


def _of_all(s: Scaling, factors: list[float], mode: str) -> float:
    if any(not math.isclose(each, factors[0], rel_tol=1e-9) for each in factors):
        each = ", ".join(f"{m.name} × {factor:.4g}" for m, factor in zip(s.stored, factors, strict=True))
        raise PlanError(
            f"under muon_scale_mode {mode} its parts need different learning rates ({each}), and it has one. Use "
            f"--muon-scale-mode {UNIT} (muon_scale_mode in the recipe), or let all parts grow alike."
        )
    return factors[0]


def _inverse(factor: Factor) -> Factor:
    return lambda s: 1.0 / factor(s)


def _muon(mode: str) -> Optimizer:
    """Muon's rules under a scale mode."""
    lr = {role: _factor(mode, role) for role in Role}
    inverse = {role: _inverse(factor) for role, factor in lr.items()}
    return Optimizer(
        name="muon",
        title="Muon",
        hyperparameters=(
            "muon_momentum",
            "muon_nesterov",
            "muon_scale_mode",
            "muon_extra_scale_factor",
            "muon_num_ns_steps",
            "muon_coefficient_type",
            "muon_tp_mode",
        ),
        lr=lr,
        eps=None,
        weight_decay={**inverse, Role.HIDDEN: ONE},
        compensation=inverse[Role.HIDDEN],
        step=0,
        others=(ADAM,),
        routes=_routed("muon"),
        scale_mode=mode,
        told=_muon_told,
    )


def _muon_told(hyperparameters: Mapping[str, Any]) -> Optimizer:
    return _muon(hyperparameters["muon_scale_mode"])


def _routed(name: str) -> Callable[[Tensor], Optimizer]:
    return lambda tensor: optimizers()[name] if is_stepped_as_matrix(tensor) else ADAM


MUON = _muon(DEFAULT_SCALE_MODE)
"""Momentum, then an orthogonalised update times the scale of its mode; decoupled weight decay."""

LION = replace(
    ADAM,
    name="lion",
    title="Lion",
    # Megatron gives Lion Adam's betas.
    hyperparameters=("adam_beta1", "adam_beta2"),
    eps=None,
    others=(ADAM,),
    routes=_routed("lion"),
)
"""The sign of a momentum, which moves every entry alike as Adam does; decoupled weight decay."""

for _each in (MUON, LION):
    register(_each)
