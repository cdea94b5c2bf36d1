"""A Hugging Face model that was trained with a plan → the same architecture of transformers, which needs none.

Names stay as transformers publishes them: there is no way through Megatron's. A published tensor is a parameter of the
live model, or a part of one, as one expert of a layer's; what becomes of the parameter becomes of its parts.
"""

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from mup_megatron.errors import InputError
from mup_megatron.export.architectures.target import Piece
from mup_megatron.export.weights import Outline, Stored, TrainedModel, Weights
from mup_megatron.huggingface.configs import config_of_base, refused
from mup_megatron.huggingface.folding import carried_by, folds_of
from mup_megatron.huggingface.plan import class_of, plan_for
from mup_megatron.modules.apply import apply_plan, difference_of
from mup_megatron.modules.marker import KEY, mark_of
from mup_megatron.modules.weights import Initialize
from mup_megatron.recipe import HuggingFaceBase, Recipe
from mup_megatron.targets import hugging_face_config
from mup_megatron.theory import Fold
from mup_megatron.validation import brief

_FREQUENCIES = r"rotary_emb\.inv_freq$"
"""What earlier releases saved, and transformers passes over in every model."""


@dataclass(frozen=True, slots=True)
class Published:
    """A tensor as transformers publishes it."""

    live: str
    """The parameter or buffer of the live model that it is of."""
    shape: tuple[int, ...]
    is_buffer: bool
    is_whole: bool
    """Whether it is all of that, as it is."""


@dataclass(frozen=True, kw_only=True)
class HuggingFaceModel(TrainedModel):
    """A trained model of transformers'; its weights have the names that transformers publishes."""

    content: Mapping[str, Any]
    """Its configuration as it is written."""
    skeleton: PreTrainedModel
    """As the library builds it, without weights."""
    published: Mapping[str, Published]
    """By name."""

    @property
    def config(self) -> PretrainedConfig:
        """Its configuration as transformers reads it."""
        return self.skeleton.config

    def require_whole(self) -> None:
        """Raises InputError unless every tensor of the model is there in its shape."""
        for name, wanted in self.published.items():
            found = self.weights.stored.get(name)
            if found is None:
                raise InputError(
                    f"{self.described}: has no {brief(name, 80)}, which a {type(self.skeleton).__name__} of this "
                    "configuration has. Give the configuration and the weights of one run."
                )
            if found.shape != wanted.shape:
                raise InputError(
                    f"{self.described}: {brief(name, 80)} has the shape {list(found.shape)}, and the configuration "
                    f"says {list(wanted.shape)}. Give the configuration and the weights of one run."
                )
        if (unread := self._unread()) is not None:
            raise InputError(
                f"{self.described}: has {brief(unread, 80)}, which a {type(self.skeleton).__name__} of this "
                "configuration has not. Give the configuration and the weights of one run."
            )

    def _unread(self) -> str | None:
        """Returns a tensor that the model would be without, as those of a layer more; None if there is none."""
        passed_over = self.skeleton._keys_to_ignore_on_load_unexpected or ()
        known = {*self.published, *self.skeleton.state_dict()}  # the second has each name of what is tied
        for name in self.weights.stored:
            if name not in known and not any(re.search(each, name) for each in (*passed_over, _FREQUENCIES)):
                return name
        return None

    def outline(self, architecture: str | None) -> Outline:
        """Returns the same architecture, with its multipliers in its configuration or folded into its weights."""
        own = self.config.model_type
        if architecture not in (None, own):
            raise InputError(
                f"--architecture {architecture}: a model of transformers stays what it is, a {own}. Leave the option "
                "out."
            )
        carried = carried_by(self.skeleton, self.plan)
        return Outline(
            architecture=own,
            vocab_size=self.config.get_text_config().vocab_size,
            config={
                **{key: value for key, value in self.content.items() if key not in (KEY, "torch_dtype")},
                "architectures": [type(self.skeleton).__name__],
                **carried.keys,
            },
            carried=carried.keys,
            pieces=[
                Piece(name=name, shape=each.shape, source=name, single_precision=each.is_buffer)
                for name, each in self.published.items()
            ],
            folds=[*self._of_published(folds_of(self.skeleton, self.plan, carried=carried.names))],
        )

    def live(self) -> PreTrainedModel:
        """Returns it with its weights and its plan, in single precision, as it was trained."""
        build: Any = type(self.skeleton)
        model: PreTrainedModel = build.from_pretrained(
            None,
            config=copy.deepcopy(self.config),
            state_dict={name: self.weights.read(name) for name in self.published},
            dtype=torch.float32,
        )
        apply_plan(model, self.plan, initialize=Initialize.KEEP)
        model.train(False)
        return model

    def _of_published(self, todo: Sequence[Fold]) -> Iterator[Fold]:
        """Yields the folds of parameters as folds of what they are published as."""
        for fold in todo:
            for name, each in self.published.items():
                if each.live == fold.tensor:
                    assert fold.rows is None or each.is_whole, name
                    yield replace(fold, tensor=name)


def hugging_face_model(
    content: Mapping[str, Any],
    recipe: Recipe,
    weights: Weights,
    *,
    live_names: bool = False,
    source: str,
    described: str,
    folder: Path,
) -> HuggingFaceModel:
    """Returns the trained model of a configuration and weights.

    Args:
        content: of `config.json`.
        recipe: the run's; its base is a Hugging Face configuration.
        weights: by the names that transformers publishes.
        live_names: they have those of the live model instead.
        source: what the configuration is called in messages.
        described: what the checkpoint is called.
        folder: where it lies.

    Raises:
        InputError: configuration and recipe do not go together.
    """
    assert isinstance(recipe.base, HuggingFaceBase)
    config = hugging_face_config(content, source=source)
    plan = plan_for(config, recipe)
    with refused(f"{source}: no model can be built from it"), torch.device("meta"):
        build: Any = class_of(config, config_of_base(recipe.base))
        skeleton: PreTrainedModel = build(copy.deepcopy(config))
    mark = mark_of(content.get(KEY), source=source)
    if mark is not None and mark.fingerprint == recipe.fingerprint:
        difference = difference_of(mark, skeleton, plan)
        if difference is not None:
            raise InputError(
                f"{source}: was changed after the model was saved: {difference}. Restore it, or save the model again."
            )
    return HuggingFaceModel(
        plan=plan,
        weights=_Republished(skeleton, weights) if live_names else weights,
        described=described,
        folder=folder,
        content=content,
        skeleton=skeleton,
        published=dict(_published(skeleton)),
    )


def _published(skeleton: PreTrainedModel) -> Iterator[tuple[str, Published]]:
    """(name, what it is of) of each tensor that transformers saves of a model."""
    parameters = dict(skeleton.named_parameters())
    saved = skeleton.state_dict(keep_vars=True)
    buffers = {name: each for name, each in skeleton.named_buffers() if name in saved}
    for live, tensor in (*parameters.items(), *buffers.items()):
        if not tensor.is_floating_point():
            raise InputError(f"{brief(live, 80)}: a buffer of type {tensor.dtype}, which cannot be exported.")
        made = _reverted(skeleton, live, tensor.detach())
        for name, part in made.items():
            whole = len(made) == 1 and part.shape == tensor.shape
            yield name, Published(live, tuple(part.shape), is_buffer=live in buffers, is_whole=whole)


def _reverted(skeleton: PreTrainedModel, live: str, tensor: torch.Tensor) -> Mapping[str, torch.Tensor]:
    """Returns a tensor of a live model as transformers publishes it: under another name, or in several parts."""
    with refused(f"{brief(live, 80)}: it cannot be published by itself"):
        found: dict[str, torch.Tensor] = revert_weight_conversion(skeleton, {live: tensor})
    return found


class _Republished:
    """The weights of a live model, by the names that transformers publishes."""

    def __init__(self, skeleton: PreTrainedModel, weights: Weights) -> None:
        self._skeleton, self._weights = skeleton, weights
        self._live = {name: each.live for name, each in _published(skeleton)}
        self._last: tuple[str, Mapping[str, torch.Tensor]] | None = None

    @cached_property
    def stored(self) -> Mapping[str, Stored]:
        """Everything that there is, by its published name; what the model has no place for, by its own."""
        found: dict[str, Stored] = {}
        for live in dict.fromkeys(self._live.values()):
            if (own := self._weights.stored.get(live)) is not None:
                made = _reverted(self._skeleton, live, torch.empty(own.shape, dtype=own.dtype, device="meta"))
                found |= {name: Stored(tuple(part.shape), own.dtype) for name, part in made.items()}
        others = self._weights.stored.keys() - self._live.values()
        return found | {name: self._weights.stored[name] for name in sorted(others)}

    def read(self, name: str) -> torch.Tensor:
        """Returns a tensor; several of one live tensor, one after the other, read that once."""
        live = self._live[name]
        if self._last is None or self._last[0] != live:
            self._last = None
            self._last = live, _reverted(self._skeleton, live, self._weights.read(live))
        return self._last[1][name]
