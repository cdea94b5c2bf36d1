"""The model's tensors in torch's distributed format, as Megatron writes them, by the plan's names."""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from mup_megatron.export.weights import Stored
from mup_megatron.megatron import stored
from mup_megatron.megatron.stored_names import Location, places


class StoredWeights:
    """The model's tensors in torch's distributed format, as Megatron writes them."""

    def __init__(self, folder: Path, metadata: Metadata, *, remedy: str) -> None:
        """Reads nothing yet."""
        self._folder, self._metadata, self._remedy = folder, metadata, remedy

    @cached_property
    def _places(self) -> Mapping[str, Location]:
        shapes = {
            key: tuple(entry.size)
            for key, entry in self._metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        return places(shapes)

    @cached_property
    def stored(self) -> Mapping[str, Stored]:
        """Everything that there is, by global name."""
        found = {}
        for name, place in self._places.items():
            entry = self._metadata.state_dict_metadata[place.key]
            assert isinstance(entry, TensorStorageMetadata)
            found[name] = Stored(tuple(entry.size)[len(place.at) :], entry.properties.dtype)
        return found

    def read(self, name: str) -> torch.Tensor:
        """Returns a tensor, put together from its parts."""
        place = self._places[name]
        return stored.read_tensor(self._folder, self._metadata, place.key, at=place.at, remedy=self._remedy)
