"""Numbers that need whole matrices."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def turning(earlier: NDArray[np.float64], both: NDArray[np.float64], later: NDArray[np.float64]) -> float | None:
    """The mean cosine of what turns queries into those some positions on; None where something else is done to them.

    A turn is one linear map for all queries: least squares find it, and leave nothing over.
    """
    turn = np.linalg.lstsq(earlier, both.T, rcond=1e-9)[0].T
    left, size = np.trace(later - turn @ both.T), np.trace(later)
    return float(np.trace(turn) / len(turn)) if size > 0 and abs(left) < _NOTHING_LEFT * size else None


_NOTHING_LEFT = 1e-5


def likeness_of_rows(matrix: Tensor) -> float | None:
    """The mean square of correlations between rows, in units of that of independent ones; None for a few of them.

    Of so many rows that a matrix of two or three equal parts shows rows of each that belong together.
    """
    rows, columns = matrix.shape
    if rows < 16 or columns < 16:
        return None
    step = 1
    while rows % (2 * step) == 0 and rows // (2 * step) >= _ROWS:
        step *= 2
    some = matrix[::step][: 2 * _ROWS].double()
    some = some - some.mean()
    some = some / some.norm(dim=1, keepdim=True).clamp(min=1e-30)
    gram = (some @ some.T).fill_diagonal_(0.0)
    value: float = gram.square().sum().item() / (len(some) * (len(some) - 1)) * columns
    return value


_ROWS = 128


def spectral_norm(matrix: Tensor) -> float:
    """Computes it from the smaller Gram matrix, whose eigenvalues cost less than the matrix's singular values."""
    m = matrix.double()
    gram = m @ m.T if m.shape[0] <= m.shape[1] else m.T @ m
    largest: float = torch.linalg.eigvalsh(gram)[-1].clamp(min=0).sqrt().item()
    return largest
