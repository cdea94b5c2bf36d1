"""A model that is trained and measured, whoever built it and however its ranks share it."""

from collections.abc import Iterable, Mapping
from typing import Any, Literal, Protocol

from torch import Tensor, nn

from mup_megatron.check.measure.measurements import Quantity
from mup_megatron.check.measure.replay import Replay

At = Literal["input", "masked input", "output"]
"""What of a module is looked at; of logits that masks are in, no number has to be finite."""


class Trainee(Protocol):
    """A model with its optimizer, ready to train: this rank's part of it."""

    def modules(self) -> Iterable[tuple[str, nn.Module, At]]:
        """(global name, module, what of it is looked at) of what this rank holds."""

    def parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        """(global name, this rank's shard or whole of it), each once."""

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """Returns a gradient as the optimizer saw it in the last step; None where this rank cannot say."""

    def replay(self, name: str) -> Replay | None:
        """Returns a new replay of one tensor's optimizer state, whoever holds that; None for what has no optimizer."""

    def forward(self) -> None:
        """A forward pass on the batch that activations are compared on, as training does it; trains nothing."""

    def evaluate(self) -> bool:
        """Returns the same as evaluation does it, or as much of it as can be done; False where that is not asked."""

    def repeat(self, index: int) -> bool:
        """A forward pass on sequences each of which repeats one token, the one that stands at an index of the batch for
        comparisons; False where batches have no tokens.
        """

    def queries(self) -> Iterable[tuple[str, nn.Module, int]]:
        """(global name, module whose first input are queries, which of its dimensions runs over positions)."""

    def beside(self) -> Mapping[tuple[Quantity, str], tuple[float, float]]:
        """Returns what the last forward pass computed beside modules, (sum, count) each; of `Quantity.INSIDE` a sum of
        squares.
        """

    def gradient_norm(self) -> float | None:
        """Returns the last step's gradient norm before clipping, the same on all ranks; None where nobody can say."""

    def step(self, step: int) -> float:
        """Forward, backward, update on the batch of a step, counted from 0. Returns the loss, the same on all ranks."""

    def gathered_matrix(self, name: str, shard: Tensor) -> Tensor | None:
        """A whole matrix from the ranks' shards, on the ranks that can say. Collective among those that hold it."""

    def gathered(self, value: Any) -> list[Any]:
        """Returns the values of all ranks. Collective."""
