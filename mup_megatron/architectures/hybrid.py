"""Megatron-Core's `HybridModel` (`MambaModel` before 0.18): each layer is one family, told by a letter of a pattern."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pydantic import Field, field_validator, model_validator

from mup_megatron.architectures.architecture import Architecture
from mup_megatron.architectures.command_line import CommandLine, Reading, Release
from mup_megatron.architectures.decoder import Decoder
from mup_megatron.architectures.families import ATTENTION, EXPERTS, MAMBA, MLP, Family
from mup_megatron.architectures.flag import Flag, number
from mup_megatron.architectures.gpt import GPT
from mup_megatron.architectures.keys import mamba
from mup_megatron.architectures.keys.unread import Unread, absent
from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.errors import InputError
from mup_megatron.validation import brief

FAMILIES: Mapping[str, Family] = {"M": MAMBA, "*": ATTENTION, "-": MLP, "E": EXPERTS}
"""Letter of a pattern → the family of its layer."""
_OTHERS = {
    "G": "gated delta net",
    "D": "sparse attention",
    "+": "latent attention",
    "/": "multi-token prediction",
}
_KNOWN = ", ".join(f"'{letter}' ({family.name})" for letter, family in FAMILIES.items())
_BOUNDARY = "|"
_LONGEST = 10**4
_KEY = "hybrid_layer_pattern"
_AS_GPT = re.compile(r"(?:\*[-E])+")


def _has_mamba(pattern: str) -> bool:
    return "M" in pattern


class HybridFile(mamba.MambaKeys, ModelFile):
    """A hybrid model's shape: a model file with a pattern, which says how many layers there are."""

    unread: ClassVar[tuple[Unread, ...]] = (
        *ModelFile.unread,
        Unread((*mamba.FLAGS,), "hybrid_layer_pattern has no layer M, which reads it. Remove it.", _KEY, _has_mamba),
        absent("a hybrid model's attention has no norms of queries and keys.", "qk_layernorm"),
        absent("a pattern says itself which layers have experts.", "moe_layer_freq"),
        absent("not supported yet in a hybrid model, but in a GPT.", "multi_latent_attention", "mtp_num_layers"),
    )
    following: ClassVar[Mapping[str, str]] = {**ModelFile.following, "mamba_num_heads": "mamba_heads"}
    hybrid_layer_pattern: str = Field(min_length=1, max_length=_LONGEST)
    """One letter a layer: `M` Mamba-2, `*` attention, `-` MLP, `E` experts; `|` where a pipeline stage ends."""

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
                    f"'{letter}' is a layer of {_OTHERS[letter]}, which is not supported yet. Use {_KNOWN}."
                )
            if letter not in (*FAMILIES, _BOUNDARY):
                raise ValueError(f"{letter!r} is no letter of a layer. Use {_KNOWN}, and '|'.")
        if not all(pattern.split(_BOUNDARY)):
            raise ValueError("a pipeline stage has no layer. Put layers on both sides of each '|'.")
        return pattern

    @model_validator(mode="after")
    def _agree(self) -> "HybridFile":
        if self.num_layers != len(self.letters):
            raise ValueError(
                f"num_layers {self.num_layers}, and hybrid_layer_pattern has {len(self.letters)}. Remove num_layers."
            )
        if "M" in self.letters:
            self.require_possible_mamba(self.hidden_size)
        if (self.num_experts is None) is ("E" in self.letters):
            raise ValueError("num_experts belongs to layers E of hybrid_layer_pattern. Give both, or none of them.")
        return self

    def require_tensor_parallel(self, size: int) -> None:
        """Raises InputError unless the model can be split over `size` tensor-parallel ranks."""
        super().require_tensor_parallel(size)
        if "M" in self.letters:
            self.require_split_mamba(self.hidden_size, size)

    @property
    def mamba_heads(self) -> int:
        """Heads of a Mamba layer."""
        return self.mamba_sizes(self.hidden_size).heads

    @property
    def expert_layers(self) -> int:
        """Number of layers with experts."""
        return self.letters.count("E")

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


# ---- on Megatron-LM's command line ---------------------------------------------------------------------------------

_PATTERN = Flag("--hybrid-layer-pattern", _KEY, None, str)
_OLDER_PATTERN = Flag("--hybrid-override-pattern", "hybrid_override_pattern", None, str)
"""The one of 0.16; later releases take it for the other."""
_IS_HYBRID = Flag("--is-hybrid-model", "is_hybrid_model", False)
_SINCE = (0, 17)
"""The first release with --hybrid-layer-pattern, which needs neither of the other two."""
_RATIOS = (
    Flag("--hybrid-attention-ratio", "hybrid_attention_ratio", 0.0, number),
    Flag("--hybrid-mlp-ratio", "hybrid_mlp_ratio", 0.0, number),
)
"""Before 0.17: the layers that are attention and MLPs, the others being Mamba, as a part of --num-layers."""
_LOCAL_SPEC = "mup_megatron.megatron.builders.hybrid local_stack_spec"
_STOCK_SPECS = {
    (0, 16): "megatron.core.models.mamba.mamba_layer_specs mamba_stack_spec",
    (0, 18): "megatron.core.models.hybrid.hybrid_layer_specs hybrid_stack_spec",
}
"""The first release that has a spec → its name."""


class HybridCommandLine(CommandLine):
    """A command line that differs between releases, in the pattern's flag and what --num-layers means beside it."""

    def read(self, values: Mapping[str, Any], release: Release | None) -> Reading:
        """Returns the pattern. Beside it Megatron 0.17 takes no notice of --num-layers, and 0.16 wants it to agree."""
        reading = super().read(values, release)
        flag, layers, older = reading.names[_KEY], values.get("num_layers"), release is None or release < _SINCE
        ratios = [float(each.found(values)) for each in _RATIOS]
        remarks = []
        if not (_PATTERN.changed(values) or _OLDER_PATTERN.changed(values)):
            if not any(ratios):
                raise InputError(f"{_IS_HYBRID.name}: no layer is said. Give {_PATTERN.name}, or drop the flag.")
            pattern = _spread(layers, *ratios)
            remarks.append(
                f"{flag}: Megatron 0.16 makes {brief(pattern, 120)} of it, and later releases have no such flag."
            )
        else:
            pattern = str(reading.content[_KEY])
            if any(ratios) and Counter(_letters(pattern)) != Counter(_spread(len(_letters(pattern)), *ratios)):
                raise InputError(f"{_RATIOS[0].name} beside {flag}, whose layers are others. Drop the ratios.")
        if _OLDER_PATTERN.found(values) not in (None, pattern):
            raise InputError(f"{_OLDER_PATTERN.name} beside {flag}: Megatron takes one of them. Drop one.")
        if layers not in (None, len(_letters(pattern))):
            if flag == _OLDER_PATTERN.name and older:
                raise InputError(
                    f"{flag} has {len(_letters(pattern))} layers, and --num-layers is {layers}, which Megatron 0.16 "
                    "refuses. Correct one of them."
                )
            remarks.append(f"--num-layers {layers}: Megatron takes the layers of {flag}, {len(_letters(pattern))}.")
        if release is not None and older and not _IS_HYBRID.changed(values):
            remarks.append(
                f"{_IS_HYBRID.name} is missing: without it Megatron 0.16 draws what writes into the residual stream as "
                "for twice as many layers. A run with a recipe draws it as with the flag."
            )
        return Reading({**reading.content, _KEY: pattern, "num_layers": None}, reading.names, tuple(remarks))

    def written(self, model: ModelFile, release: Release) -> Sequence[str]:
        """Returns pattern and spec; 0.16 knows no boundaries in the pattern, and wants to be told what model it is."""
        if release < _SINCE:
            words = [*_IS_HYBRID.words(True), *_OLDER_PATTERN.words(_file(model).letters)]
        else:
            words = [*_PATTERN.words(_file(model).hybrid_layer_pattern)]
        stock = _STOCK_SPECS[max(since for since in _STOCK_SPECS if since <= release)]
        spec = _LOCAL_SPEC if model.transformer_impl == "local" else stock
        return [*words, *self._words(model, self.details), "--spec", *spec.split()]


def _spread(layers: int | None, attention: float, mlps: float) -> str:
    """The pattern that 0.16 makes of shares: attention evenly between Mamba layers, then MLPs in the place of these."""
    if layers is None:
        raise InputError(f"{_RATIOS[0].name} without --num-layers, of which it is a part. Give both.")
    if min(attention, mlps) < 0 or attention + mlps > 1:
        raise InputError(f"{_RATIOS[0].name} {attention:g} and {_RATIOS[1].name} {mlps:g} are no parts of a whole.")
    pattern = ["M"] * layers
    of_attention, of_mlps = round(layers * attention), round(layers * mlps)
    mamba = layers - of_attention
    _place(pattern, "*", mamba / (of_attention + 1))
    if of_mlps:
        _place(pattern, "-", (mamba - of_mlps) / of_mlps)
    return "".join(pattern)


def _place(pattern: list[str], letter: str, between: float) -> None:
    """Puts a letter behind every so many Mamba layers, in the place of one."""
    left = between
    for index, each in enumerate(pattern):
        if each == "M" and left < 0.5:
            pattern[index] = letter
            left += between
        elif each == "M":
            left -= 1


class Hybrid(Decoder):
    """A stack whose pattern says of what family each layer is."""

    name: ClassVar[str] = "hybrid"
    description: ClassVar[str] = "a hybrid model"
    file: ClassVar[type[ModelFile]] = HybridFile
    live_classes: ClassVar[tuple[str, ...]] = ("HybridModel", "MambaModel")
    builder: ClassVar[str] = "mup_megatron.megatron.builders.hybrid"
    command_line: ClassVar[CommandLine] = HybridCommandLine(
        programs=("pretrain_hybrid.py", "pretrain_mamba.py"),
        providers=("hybrid", "mamba"),
        keys={_KEY: (_PATTERN, _OLDER_PATTERN, *_RATIOS)},
        details=mamba.FLAGS,
        markers=(_IS_HYBRID,),
        specs={_LOCAL_SPEC: "local", **dict.fromkeys(_STOCK_SPECS.values(), "transformer_engine")},
    )
    final_norm: ClassVar[str] = "final_norm"
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

    def config(self, model: ModelFile) -> Mapping[str, Any]:
        """Returns the fields of its layers, and that the stock initialisation counts one branch a layer."""
        return {**super().config(model), "is_hybrid_model": True}

    def stages(self, model: ModelFile) -> Sequence[int] | None:
        """Returns the layers between the pattern's boundaries; None where it has none."""
        segments = _file(model).segments
        return None if len(segments) == 1 else [len(segment) for segment in segments]

    def taken_from(self, other: Architecture, model: ModelFile) -> ModelFile | None:
        """Returns a GPT as the pattern `*-*-…` of twice as many layers, with `E` where it has experts."""
        if other is not GPT:
            return super().taken_from(other, model)
        if model.multi_latent_attention or model.mtp_num_layers:
            return None
        pattern = "".join("*E" if model.has_experts(layer) else "*-" for layer in range(model.num_layers))
        own = {"num_layers": len(pattern), "hybrid_layer_pattern": pattern, "moe_layer_freq": 1}
        return HybridFile.model_construct(**{**dict(model), **own})

    def given_to(self, other: Architecture, model: ModelFile) -> ModelFile | None:
        """Returns a pattern `*-*-…`, or with `E` for `-`, as a GPT of half as many layers."""
        if other is not GPT:
            return super().given_to(other, model)
        letters = _file(model).letters
        if _AS_GPT.fullmatch(letters) is None:
            return None
        shared = {key: getattr(model, key) for key in ModelFile.model_fields}
        frequency = tuple(int(letter == "E") for letter in letters[1::2])
        own = {"num_layers": len(letters) // 2, "moe_layer_freq": frequency if len(set(frequency)) > 1 else 1}
        return ModelFile.model_construct(**{**shared, **own})


def _file(model: ModelFile) -> HybridFile:
    assert isinstance(model, HybridFile)
    return model


HYBRID = Hybrid()
