"""Megatron-Core's `HybridModel` (`MambaModel` before 0.18): each layer is one family, told by a letter of a pattern."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pydantic import Field, field_validator, model_validator

from mup_megatron.architectures.decoder import Decoder
from mup_megatron.architectures.families import ATTENTION, MLP, Family
from mup_megatron.architectures.flag import Flag
from mup_megatron.architectures.gpt import GPT
from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.architectures.names import in_layer, layer_of

FAMILIES: Mapping[str, Family] = {"*": ATTENTION, "-": MLP}
"""Letter of a pattern → the family of its layer."""
_OTHERS = {
    "M": "Mamba",
    "E": "experts",
    "G": "gated delta net",
    "D": "sparse attention",
    "+": "latent attention",
    "/": "multi-token prediction",
}
_BOUNDARY = "|"
_LONGEST = 10**4
_AS_GPT = re.compile(r"(?:\*-)+")


class HybridFile(ModelFile):
    """A hybrid model's shape: a model file with a pattern, which says how many layers there are."""

    hybrid_layer_pattern: str = Field(min_length=1, max_length=_LONGEST)
    """One letter a layer: `*` attention, `-` MLP; `|` where a pipeline stage ends."""

    @model_validator(mode="before")
    @classmethod
    def _count_layers(cls, content: Any) -> Any:
        pattern = content.get("hybrid_layer_pattern") if isinstance(content, Mapping) else None
        if not isinstance(pattern, str):
            return content
        return {"num_layers": len(_letters(pattern)), **content}

    @field_validator("hybrid_layer_pattern")
    @classmethod
    def _known_letters(cls, pattern: str) -> str:
        for letter in pattern:
            if letter in _OTHERS:
                raise ValueError(
                    f"'{letter}' is a layer of {_OTHERS[letter]}, which is not supported yet. Use '*' and '-'."
                )
            if letter not in (*FAMILIES, _BOUNDARY):
                raise ValueError(f"{letter!r} is no letter of a layer. Use '*' (attention), '-' (MLP) and '|'.")
        if not all(pattern.split(_BOUNDARY)):
            raise ValueError("a pipeline stage has no layer. Put layers on both sides of each '|'.")
        return pattern

    @model_validator(mode="after")
    def _agree(self) -> "HybridFile":
        if self.qk_layernorm:
            raise ValueError("qk_layernorm: a hybrid model's attention has no norms of queries and keys. Remove it.")
        if self.num_layers != len(self.letters):
            raise ValueError(
                f"num_layers {self.num_layers}, and hybrid_layer_pattern has {len(self.letters)}. Remove num_layers."
            )
        return self

    @property
    def letters(self) -> str:
        """The letter of each layer."""
        return _letters(self.hybrid_layer_pattern)

    @property
    def segments(self) -> tuple[str, ...]:
        """The letters between boundaries, where the pattern has any; else all are one."""
        return tuple(self.hybrid_layer_pattern.split(_BOUNDARY))


def _letters(pattern: str) -> str:
    return pattern.replace(_BOUNDARY, "")


class Hybrid(Decoder):
    """A stack whose pattern says of what family each layer is."""

    name: ClassVar[str] = "hybrid"
    description: ClassVar[str] = "a hybrid model"
    file: ClassVar[type[ModelFile]] = HybridFile
    live_classes: ClassVar[tuple[str, ...]] = ("HybridModel", "MambaModel")
    builder: ClassVar[str] = "mup_megatron.megatron.builders.hybrid"
    flags: ClassVar[Mapping[str, Flag]] = {
        "hybrid_layer_pattern": Flag("--hybrid-layer-pattern", "hybrid_layer_pattern", None, str)
    }
    final_norm: ClassVar[str] = "decoder.final_norm."
    branches: ClassVar[int] = 1

    def layers(self, model: ModelFile) -> Sequence[Sequence[Family]]:
        """Returns the one family of each layer."""
        return [(FAMILIES[letter],) for letter in _file(model).letters]

    def with_layers(self, model: ModelFile, kept: Sequence[int]) -> ModelFile:
        """Returns the model with these of its letters, without boundaries."""
        letters = "".join(_file(model).letters[index] for index in kept)
        return model.model_copy(update={"hybrid_layer_pattern": letters, "num_layers": len(letters)})

    def with_depth(self, model: ModelFile, layers: int) -> ModelFile:
        """Returns the model with about so many layers, in whole repetitions of its pattern's period."""
        letters = _file(model).letters
        period = next(n for n in range(1, len(letters) + 1) if letters == (letters[:n] * len(letters))[: len(letters)])
        return self.with_layers(model, range(min(len(letters), max(1, layers // period) * period)))

    def taken_from(self, other: Decoder, model: ModelFile) -> ModelFile | None:
        """Returns a GPT as the pattern `*-*-…` of twice as many layers."""
        if other is not GPT:
            return super().taken_from(other, model)
        pattern = "*-" * model.num_layers
        return HybridFile.model_construct(
            **{**dict(model), "num_layers": len(pattern), "hybrid_layer_pattern": pattern}
        )

    def given_to(self, other: Decoder, model: ModelFile) -> ModelFile | None:
        """Returns a pattern `*-*-…` as a GPT of half as many layers."""
        if other is not GPT:
            return super().given_to(other, model)
        letters = _file(model).letters
        if _AS_GPT.fullmatch(letters) is None:
            return None
        shared = {key: getattr(model, key) for key in ModelFile.model_fields}
        return ModelFile.model_construct(**{**shared, "num_layers": len(letters) // 2})

    def name_in(self, other: Decoder, name: str) -> str:
        """Returns what a GPT of the same layers calls a parameter."""
        assert other is GPT
        parts = layer_of(name)
        if parts is None:
            return name.replace(self.final_norm, GPT.final_norm)
        stack, index, rest = parts
        return in_layer(stack, index // 2, rest)

    def name_from(self, other: Decoder, name: str) -> str:
        """Returns the name here of a GPT's parameter: its attention is in one layer, its MLP in the next."""
        assert other is GPT
        parts = layer_of(name)
        if parts is None:
            return name.replace(GPT.final_norm, self.final_norm)
        stack, index, rest = parts
        return in_layer(stack, 2 * index + rest.startswith(("mlp.", "pre_mlp_layernorm.")), rest)


def _file(model: ModelFile) -> HybridFile:
    assert isinstance(model, HybridFile)
    return model


HYBRID = Hybrid()
