"""The model's tensors in Megatron-LM's format `torch`: one file of each rank, put together by the plan's shapes.

    iter_0000100/mp_rank_TT/model_optim_rng.pt            tensor-parallel rank
    iter_0000100/mp_rank_TT_PPP/…, …_EEE/…                and of the pipeline, and of experts, where there are several

A file has the layers of its stage by their number within it, stage by stage if it has several virtual ones, and its
experts by their number within the rank.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from mup_megatron.architectures.names import global_name, layer_of
from mup_megatron.errors import InputError
from mup_megatron.export.weights import Stored
from mup_megatron.theory import Plan, Tensor
from mup_megatron.unpickling import read_torch

FILE = "model_optim_rng.pt"
_RANK = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?(?:_(\d{3,}))?")
_STAGES = re.compile(r"model(\d*)")
_CUT_EACH = frozenset({"gate", "up"})
"""Parts of which every tensor-parallel rank has its own share; of others, as of queries, it has whole heads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The layout of a run over ranks."""

    tensor: int
    pipeline: int
    experts: int
    tensor_of_experts: int

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "Layout":
        """Returns the one that Megatron's arguments say."""

        def size(key: str) -> int:
            return int(values.get(key) or 1)

        tensor = size("tensor_model_parallel_size")
        return cls(
            tensor=tensor,
            pipeline=size("pipeline_model_parallel_size"),
            experts=size("expert_model_parallel_size"),
            tensor_of_experts=int(values.get("expert_tensor_parallel_size") or tensor),
        )


@dataclass(frozen=True, slots=True, order=True)
class Rank:
    """The ranks that a file is of."""

    pipeline: int
    tensor: int
    experts: int


def rank_files(folder: Path) -> Sequence[Path]:
    """Returns the files of all ranks in a checkpoint; none where it is in another format."""
    return sorted(path for path in folder.glob(f"mp_rank_*/{FILE}") if _RANK.fullmatch(path.parent.name))


def read_rank(path: Path, *, remedy: str) -> Mapping[str, Any]:
    """Returns the content of a rank's file, whose tensors are read once they are used.

    Raises:
        InputError: it is damaged, or holds what may run code.
    """
    content = read_torch(path, source=str(path), remedy=remedy)
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise InputError(f"{path}: not a checkpoint of Megatron-LM. {remedy}")
    return content


def rank_of(path: Path, layout: Layout) -> Rank:
    """Returns the ranks that a file is of, as its folder's name says."""
    found = _RANK.fullmatch(path.parent.name)
    assert found is not None
    numbers = [int(each) for each in found.groups() if each is not None]
    pipeline = numbers.pop(1) if layout.pipeline > 1 and len(numbers) > 1 else 0
    experts = numbers.pop(1) if layout.experts > 1 and len(numbers) > 1 else 0
    if len(numbers) != 1:
        raise InputError(f"{path}: its folder's name is not that of a rank under the layout that is stored in it.")
    return Rank(pipeline, numbers[0], experts)


def stages(content: Mapping[str, Any]) -> Sequence[str]:
    """Returns the keys of each virtual stage of a rank's file, in their order."""
    found = sorted((int(match[1] or 0), key) for key in content if (match := _STAGES.fullmatch(key)))
    return [key for _, key in found if isinstance(content[key], Mapping)]


def tensors_of(stage: Mapping[str, Any]) -> Mapping[str, torch.Tensor]:
    """Returns the tensors of a stage by the rank's own names."""
    return {name: each for name, each in stage.items() if isinstance(each, torch.Tensor)}


class Names:
    """The plan's names of what each rank has."""

    def __init__(self, contents: Mapping[Rank, Mapping[str, Any]], plan: Plan, layout: Layout, experts: int) -> None:
        """Counts the layers of every stage, which follow one another through the pipeline, stage by virtual stage."""
        self._tied, self._here = plan.tied, experts // layout.experts
        by_pipeline = {
            rank.pipeline: [content[key] for key in stages(content)]
            for rank, content in sorted(contents.items(), reverse=True)
        }
        self._layers: dict[tuple[int, int], dict[str, range]] = {}
        before = dict.fromkeys(plan.stacks, 0)
        most = max(map(len, by_pipeline.values()), default=0)
        for stage in range(most):
            for pipeline in sorted(by_pipeline):
                own = self._layers[pipeline, stage] = {}
                held = by_pipeline[pipeline][stage] if stage < len(by_pipeline[pipeline]) else {}
                for stack, count in _counted(held).items():
                    first = before.get(stack, 0)
                    own[stack] = range(first, first + count)
                    before[stack] = first + count

    def of(self, name: str, rank: Rank, stage: int) -> str:
        """Returns the plan's name of a tensor; the copy of a tied table has the table's."""
        first = rank.experts * self._here
        layers = self._layers[rank.pipeline, stage]
        return global_name(name, layers, tied=self._tied, experts=range(first, first + self._here))


def _counted(names: Iterable[str]) -> Mapping[str, int]:
    """Returns the number of layers of each stack."""
    found: dict[str, int] = {}
    for name in names:
        if (parts := layer_of(name)) is not None:
            found[parts[0]] = max(found.get(parts[0], 0), parts[1] + 1)
    return found


class RankWeights:
    """The model's tensors, each put together from its ranks' shares."""

    def __init__(
        self, contents: Mapping[Rank, Mapping[str, Any]], plan: Plan, tensors: Iterable[Tensor], layout: Layout,
        *, experts: int, source: str,
    ) -> None:  # fmt: skip
        """Looks for every share; reads none.

        Args:
            contents: the files' content by their ranks.
            plan: that the model was trained with.
            tensors: the model's, with the parts of those that are fused.
            layout: of the run.
            experts: of a layer, on all ranks.
            source: what the checkpoint is called in messages.

        Raises:
            InputError: a rank's file is missing.
        """
        self._plan, self._layout, self._source = plan, layout, source
        self._tensors = {tensor.name: tensor for tensor in tensors}
        self.names = Names(contents, plan, layout, experts)
        self._shares: dict[str, dict[int, torch.Tensor]] = {}
        for rank, content in sorted(contents.items()):
            for stage, key in enumerate(stages(content)):
                for own, tensor in tensors_of(content[key]).items():
                    name = self.names.of(own, rank, stage)
                    self._shares.setdefault(name, {}).setdefault(rank.tensor % self._divided(name), tensor)
        for name, shares in self._shares.items():
            missing = set(range(self._divided(name))) - set(shares)
            if missing:
                raise InputError(
                    f"{source}: {name} is of {self._divided(name)} tensor-parallel ranks, and that of rank "
                    f"{min(missing)} is missing. Put the files of all ranks into one folder."
                )

    def first_row(self, name: str, rank: Rank) -> int:
        """Returns the row of the whole tensor at which a rank's share begins, where it has rows one after the other."""
        if self._split(name) != 0:
            return 0
        share = rank.tensor % self._divided(name)
        return share * len(self._shares[name][share])

    def _divided(self, name: str) -> int:
        return self._layout.tensor_of_experts if ".experts." in name else self._layout.tensor

    @cached_property
    def stored(self) -> Mapping[str, Stored]:
        """Everything that there is, by global name."""
        return {name: Stored(self._shape(name), self._parts(name)[0].dtype) for name in self._shares}

    def read(self, name: str) -> torch.Tensor:
        """Returns a tensor, put together from its ranks' shares."""
        parts, dimension = self._parts(name), self._split(name)
        if dimension is None:
            return parts[0].clone()
        tensor = self._tensors.get(name)
        if dimension == 0 and tensor is not None and any(part.name in _CUT_EACH for part in tensor.parts):
            total = sum(part.rows for part in tensor.parts)
            cuts = [part.rows * len(each) // total for part in tensor.parts for each in parts[:1]]
            by_part = zip(*(each.split(cuts) for each in parts), strict=True)
            parts = [share for of_part in by_part for share in of_part]
        return torch.cat(parts, dimension)

    def _parts(self, name: str) -> list[torch.Tensor]:
        return [share for _, share in sorted(self._shares[name].items())]

    def _shape(self, name: str) -> tuple[int, ...]:
        shape, dimension = [*self._parts(name)[0].shape], self._split(name)
        if dimension is not None:
            shape[dimension] = sum(each.shape[dimension] for each in self._parts(name))
        return tuple(shape)

    def _split(self, name: str) -> int | None:
        """Returns the dimension along which a tensor is divided: the one in which a share is not the plan's shape."""
        parts = self._parts(name)
        entry = self._plan.by_name.get(name)
        if len(parts) == 1 or entry is None:
            return None
        if entry.padded_to is not None:
            return 0
        own, wanted = tuple(parts[0].shape), entry.shape
        other = [at for at, (here, whole) in enumerate(zip(own, wanted, strict=False)) if here != whole]
        if not other and len(own) == len(wanted):
            return None
        if len(own) != len(wanted) or len(other) != 1 or own[other[0]] * len(parts) != wanted[other[0]]:
            raise InputError(
                f"{self._source}: a rank has {list(own)} of {name}, and the plan says {list(wanted)}, on {len(parts)} "
                "ranks. Give the recipe and the checkpoint of one run."
            )
        return other[0]
