"""Small inputs for a pass of a Hugging Face model on the meta device: configurations do not say what sizes they want.

What a model computes with has no values. What it only counts with (how many patches an image has in each direction) is
on the CPU and has: `modules.forward` takes it to the meta device where the two meet.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

_LENGTH = 8
_GRID = (1, 4, 4)
"""Frames, rows and columns of patches of a small image, for models that take patches."""
_PATCHES = 16

Inputs = dict[str, Any]


def attempts(forward: Callable[..., object], config: Any) -> Iterator[Inputs]:
    """Returns arguments for a call, likeliest first: with everything that is known, and then with text alone.

    Args:
        forward: a model's `forward`, or one of its methods for a part of it.
        config: of the model.
    """
    known = inspect.signature(forward).parameters
    makers = {name: make for name, make in _MAKERS.items() if name in known}
    if not getattr(config, "is_encoder_decoder", False):
        makers.pop("decoder_input_ids", None)
    rest = {"use_cache": False} if "use_cache" in known else {}
    yield from _combined(makers, config, rest)
    if "input_ids" in makers and len(makers) > 1:
        yield from _combined({name: make for name, make in makers.items() if name in _TEXT}, config, rest)


def _combined(makers: Mapping[str, "_Maker"], config: Any, rest: Inputs) -> Iterator[Inputs]:
    made = {name: make(config, makers.keys()) for name, make in makers.items()}
    for attempt in range(max(map(len, made.values()), default=1)):
        yield {name: shapes[min(attempt, len(shapes) - 1)] for name, shapes in made.items() if shapes} | rest


_Maker = Callable[[Any, Any], list[Any]]
_TEXT = frozenset({"input_ids", "decoder_input_ids", "bbox"})
_GRIDS = frozenset({"image_grid_thw", "grid_thw", "grid_hws", "image_grid_hws", "video_grid_thw"})
_IN_PATCHES = _GRIDS | {"spatial_shapes", "image_position_ids", "pixel_position_ids"}


def _meta(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device="meta")


def _ids(config: Any, known: Any) -> list[Any]:
    return [torch.zeros(1, _LENGTH, dtype=torch.long, device="meta")]


def _boxes(config: Any, known: Any) -> list[Any]:
    return [torch.zeros(1, _LENGTH, 4, dtype=torch.long, device="meta")]


def _seen_by(config: Any) -> Any:
    """Returns the configuration of what looks at images."""
    own = next((part for key in ("vision_config", "image_config") if (part := getattr(config, key, None))), config)
    return getattr(own, "vision_config", None) or own


def _pixels(config: Any, known: Any) -> list[Any]:
    own = _seen_by(config)
    channels = getattr(own, "num_channels", None) or getattr(own, "in_channels", None) or 3
    if _IN_PATCHES & set(known):
        return list(_patches(own, channels, flat=bool(_GRIDS & set(known))))
    size = getattr(own, "image_size", None)
    sizes = [size if isinstance(size, list | tuple) else (size, size)] if size else []
    images = [(channels, *both) for both in (*sizes, (224, 224), (64, 64))]
    if "aspect_ratio_ids" in known:
        return [_meta(1, 1, _tiles(own), *image) for image in images]
    # Several images for each text, or frames for each film.
    return [_meta(*more, *image) for more in ((1,), (1, 1)) for image in images]


def _patches(config: Any, channels: int, *, flat: bool) -> Iterator[torch.Tensor]:
    size = getattr(config, "patch_size", None) or 16
    height, width = size if isinstance(size, list | tuple) else (size, size)
    frames = getattr(config, "temporal_patch_size", None) or 1
    values = channels * height * width
    batch = () if flat else (1,)
    yield _meta(*batch, _PATCHES, values * frames)
    yield _meta(*batch, _PATCHES, values)
    yield _meta(*batch, _PATCHES, channels, height, width)


def _tiles(config: Any) -> int:
    return getattr(config, "max_num_tiles", None) or 1


def _grid(config: Any, known: Any) -> list[Any]:
    return [torch.tensor([_GRID])]


def _rows_and_columns(config: Any, known: Any) -> list[Any]:
    return [torch.tensor([_GRID[1:]])]


def _image_sizes(config: Any, known: Any) -> list[Any]:
    own = _seen_by(config)
    size = getattr(own, "image_size", None)
    return [torch.tensor([both]) for both in (*([(size, size)] if isinstance(size, int) else []), (224, 224), (64, 64))]


def _positions(config: Any, known: Any) -> list[Any]:
    rows, columns = torch.meshgrid(torch.arange(_GRID[1]), torch.arange(_GRID[2]), indexing="ij")
    return [torch.stack([columns.flatten(), rows.flatten()], dim=-1)[None]]


def _all_patches(config: Any, known: Any) -> list[Any]:
    return [torch.ones(1, _PATCHES, dtype=torch.long)] if "spatial_shapes" in known else []


def _aspect_ratio(config: Any, known: Any) -> list[Any]:
    return [torch.ones(1, 1, dtype=torch.long)]


def _aspect_ratio_mask(config: Any, known: Any) -> list[Any]:
    return [torch.ones(1, 1, _tiles(_seen_by(config)), dtype=torch.long)]


def _waves(config: Any, known: Any) -> list[Any]:
    bins, length = getattr(config, "num_mel_bins", None), getattr(config, "max_length", None)
    return [*([_meta(1, length, bins)] if bins and length else []), _meta(1, 16000), _meta(1, 1, 16000)]


def _spectra(config: Any, known: Any) -> list[Any]:
    own = getattr(config, "audio_config", None) or getattr(config, "encoder_config", None) or config
    keys = ("num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim", "input_feat_size", "input_dim")
    bins = next((size for key in keys if isinstance(size := getattr(own, key, None), int)), 80)
    return [_meta(1, bins, 2 * getattr(own, "max_source_positions", 100)), _meta(1, 100, bins)]


def _all_of_the_spectra(config: Any, known: Any) -> list[Any]:
    return [torch.ones(1, spectra.shape[-1 if at == 0 else 1]) for at, spectra in enumerate(_spectra(config, known))]


_MAKERS: Mapping[str, _Maker] = {
    "input_ids": _ids,
    "decoder_input_ids": _ids,
    "bbox": _boxes,
    "pixel_values": _pixels,
    "image_grid_thw": _grid,
    "grid_thw": _grid,
    "grid_hws": _rows_and_columns,
    "image_grid_hws": _rows_and_columns,
    "spatial_shapes": _rows_and_columns,
    "image_sizes": _image_sizes,
    "image_position_ids": _positions,
    "pixel_position_ids": _positions,
    "pixel_attention_mask": _all_patches,
    "aspect_ratio_ids": _aspect_ratio,
    "aspect_ratio_mask": _aspect_ratio_mask,
    "input_values": _waves,
    "input_features": _spectra,
    "input_features_mask": _all_of_the_spectra,
    "feature_attention_mask": _all_of_the_spectra,
}
