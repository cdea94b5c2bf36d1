"""The keys of Mamba-2 layers in a model file, and the sizes that follow from them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from mup_megatron.architectures.flag import Flag, whole_number
from mup_megatron.errors import InputError
from mup_megatron.validation import Strict, added

Count = Annotated[int, Field(gt=0, le=10**9)]

FLAGS: Mapping[str, Flag] = {
    "mamba_state_dim": Flag("--mamba-state-dim", "mamba_state_dim", 128, whole_number),
    "mamba_head_dim": Flag("--mamba-head-dim", "mamba_head_dim", 64, whole_number),
    "mamba_num_groups": Flag("--mamba-num-groups", "mamba_num_groups", 8, whole_number),
    "mamba_num_heads": Flag("--mamba-num-heads", "mamba_num_heads", None, whole_number),
}
"""Key → the flag that says the same."""

_EXPANSION = 2
"""Channels inside, relative to hidden_size, where the number of heads is not said."""


@dataclass(frozen=True, slots=True)
class MambaSizes:
    """The sizes of a Mamba-2 layer."""

    heads: int
    head_dim: int
    groups: int
    """Heads in order share the B and C of a group."""
    state_dim: int

    @property
    def inner(self) -> int:
        """Channels of all heads."""
        return self.heads * self.head_dim

    @property
    def states(self) -> int:
        """Rows of B, and of C."""
        return self.groups * self.state_dim

    @property
    def convolved(self) -> int:
        """Channels of the convolution: x, B and C."""
        return self.inner + 2 * self.states

    @property
    def projected(self) -> int:
        """Rows of the input projection: z, x, B, C and dt."""
        return self.inner + self.convolved + self.heads


class MambaKeys(Strict):
    """The keys of Mamba-2 layers, with Megatron's names, meanings and defaults."""

    mamba_state_dim: Count = added("0.2", 128)
    mamba_head_dim: Count = added("0.2", 64)
    mamba_num_groups: Count = added("0.2", 8)
    mamba_num_heads: Count | None = added("0.2", None)
    """Default: 2·hidden_size / mamba_head_dim."""

    def mamba_sizes(self, hidden_size: int) -> MambaSizes:
        """Returns the sizes of a layer at this width."""
        heads = self.mamba_num_heads or _EXPANSION * hidden_size // self.mamba_head_dim
        return MambaSizes(heads, self.mamba_head_dim, self.mamba_num_groups, self.mamba_state_dim)

    def require_possible_mamba(self, hidden_size: int) -> None:
        """Raises ValueError unless there are whole heads, and whole heads in each group."""
        if self.mamba_num_heads is None and _EXPANSION * hidden_size % self.mamba_head_dim:
            raise ValueError(
                f"mamba_head_dim {self.mamba_head_dim} does not divide 2·hidden_size {_EXPANSION * hidden_size}. "
                "Change it, or give mamba_num_heads."
            )
        heads = self.mamba_sizes(hidden_size).heads
        if heads % self.mamba_num_groups:
            raise ValueError(
                f"mamba_num_groups {self.mamba_num_groups} does not divide the {heads} heads of a Mamba layer. Choose "
                "a divisor of them."
            )

    def require_split_mamba(self, hidden_size: int, size: int) -> None:
        """Raises InputError unless heads and groups can be split over `size` tensor-parallel ranks."""
        for key, value in (
            ("mamba_num_heads", self.mamba_sizes(hidden_size).heads),
            ("mamba_num_groups", self.mamba_num_groups),
        ):
            if value % size:
                raise InputError(
                    f"--tensor-model-parallel-size {size} does not divide {key} {value}. Choose a divisor of it."
                )
