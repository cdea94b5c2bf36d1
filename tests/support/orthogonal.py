"""The iteration of Muon by which a gradient becomes nearly orthogonal, as an oracle. For tests of Muon."""

import torch


def orthogonal(gradient: torch.Tensor) -> torch.Tensor:
    """Returns five steps of Newton and Schulz with Muon's coefficients, in fp64."""
    x = gradient.double()
    turned = x.shape[0] > x.shape[1]
    x = x.T if turned else x
    x = x / x.norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if turned else x
