"""Megatron-Core's `HybridModel` (`MambaModel` before 0.18): each layer is one family, told by a letter of a pattern."""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from pydantic import Field, field_validator, model_validator

from mup_megatron.architectures.architecture import Architecture, as_other
from mup_megatron.architectures.command_line import CommandLine, Reading, Release
from mup_megatron.architectures.decoder import Decoder
from mup_megatron.architectures.families import ATTENTION, EXPERTS, LATENT_ATTENTION, MAMBA, MLP, Family
from mup_megatron.architectures.flag import Flag, number
from mup_megatron.architectures.gpt import GPT
from mup_megatron.architectures.keys import mamba
from mup_megatron.architectures.keys.unread import Unread, absent
from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.architectures.names import MTP_STACK
from mup_megatron.architectures.pattern import BOUNDARY, FURTHER, Pattern
from mup_megatron.errors import InputError
from mup_megatron.theory import ModelShape
from mup_megatron.validation import brief

FAMILIES: Mapping[str, Family] = {"M": MAMBA, "*": ATTENTION, "+": LATENT_ATTENTION, "-": MLP, "E": EXPERTS}
"""Letter of a pattern → the family of its layer."""
_OTHERS = {"G": "gated delta net", "D": "sparse attention"}
_KNOWN = ", ".join(f"'{letter}' ({family.name})" for letter, family in FAMILIES.items())
_LONGEST = 10**4
_KEY = "hybrid_layer_pattern"
_AS_GPT = re.compile(r"(?:\*[-E])+|(?:\+[-E])+")


def _problem(pattern: Pattern) -> str | None:
    """Returns why it is the pattern of no model that is supported, and what to do; None where it is one."""
    for letter in pattern.all_letters:
        if letter in _OTHERS:
            return f"'{letter}' is a layer of {_OTHERS[letter]}, which is not supported yet. Use {_KNOWN}."
        if letter not in FAMILIES and letter != BOUNDARY:
            return f"{letter!r} is no letter of a layer. Use {_KNOWN}, with '|' and '/' between them."
    if not all(pattern.stages):
        return "a pipeline stage has no layer. Put layers on both sides of each '|'."
    if not all(pattern.further):
        return "no layer behind a '/', where those of multi-token prediction are. Put some there, or remove it."
    if BOUNDARY in "".join(pattern.further):
        return "a '|' behind a '/': Megatron puts multi-token prediction on the last stage. Remove it there."
    if len({*pattern.further}) > 1:
        return "all layers of multi-token prediction have to be alike. Write the same letters behind each '/'."
    if {"*", "+"} <= {*pattern.all_letters}:
        return "a model of Megatron's has '*' or '+', not both. Choose one kind of attention."
    return None


def _has(sign: str) -> Callable[[str], bool]:
    return lambda pattern: sign in pattern


class HybridFile(mamba.MambaKeys, ModelFile):
    """A hybrid model's shape: a model file with a pattern, which says how many layers there are."""

    unread: ClassVar[tuple[Unread, ...]] = (
        *ModelFile.unread,
        Unread((*mamba.FLAGS,), "hybrid_layer_pattern has no layer M, which reads it. Remove it.", _KEY, _has("M")),
        absent("a hybrid model's attention has no norms of queries and keys.", "qk_layernorm"),
        absent("a pattern says itself which layers have experts.", "moe_layer_freq"),
        Unread(
            ("multi_latent_attention",),
            "hybrid_layer_pattern has no layer +, which is what it asks for in a hybrid model. Remove it, or write +.",
            _KEY,
            _has("+"),
            on_lines=False,
        ),
        Unread(
            ("mtp_num_layers",),
            "hybrid_layer_pattern says these layers, behind '/', and has none. Remove the key, or write them there.",
            _KEY,
            _has(FURTHER),
            on_lines=False,
        ),
    )
    following: ClassVar[Mapping[str, str]] = {**ModelFile.following, "mamba_num_heads": "mamba_heads"}
    hybrid_layer_pattern: str = Field(min_length=1, max_length=_LONGEST)
    """One letter a layer: `M` Mamba-2, `*` attention, `+` latent attention, `-` MLP, `E` experts; `|` where a pipeline
    stage ends. Behind the stack, each with a `/` before it, the letters within a layer of multi-token prediction."""

    @model_validator(mode="before")
    @classmethod
    def _follow_pattern(cls, content: Any) -> Any:
        text = content.get(_KEY) if isinstance(content, Mapping) else None
        if not isinstance(text, str):
            return content
        pattern = Pattern.of(text)
        found: dict[str, Any] = {"num_layers": len(pattern.letters)}
        if "+" in pattern.all_letters:
            found["multi_latent_attention"] = True
        given = {key: value for key, value in content.items() if value is not None or key != "mtp_num_layers"}
        return {**found, "mtp_num_layers": len(pattern.further) or None, **given}

    @field_validator("hybrid_layer_pattern")
    @classmethod
    def _supported(cls, text: str) -> str:
        if problem := _problem(Pattern.of(text)):
            raise ValueError(problem)
        return text

    @model_validator(mode="after")
    def _agree(self) -> "HybridFile":
        counted = {"num_layers": len(self.letters), "mtp_num_layers": len(self.pattern.further) or None}
        for key, count in counted.items():
            if (said := getattr(self, key)) != count:
                raise ValueError(f"{key} {said}, and hybrid_layer_pattern has {count}. Remove {key}.")
        letters = self.pattern.all_letters
        if "+" in letters and not self.multi_latent_attention:
            raise ValueError("multi_latent_attention false, and hybrid_layer_pattern has a layer +. Remove the key.")
        if "M" in letters:
            self.require_possible_mamba(self.hidden_size)
        if (self.num_experts is None) is ("E" in letters):
            raise ValueError("num_experts belongs to layers E of hybrid_layer_pattern. Give both, or none of them.")
        return self

    def require_tensor_parallel(self, size: int) -> None:
        """Raises InputError unless the model can be split over `size` tensor-parallel ranks."""
        super().require_tensor_parallel(size)
        if "M" in self.pattern.all_letters:
            self.require_split_mamba(self.hidden_size, size)

    @property
    def mamba_heads(self) -> int:
        """Heads of a Mamba layer."""
        return self.mamba_sizes(self.hidden_size).heads

    @property
    def expert_layers(self) -> int:
        """Number of layers with experts, of multi-token prediction too."""
        return self.pattern.all_letters.count("E")

    @property
    def pattern(self) -> Pattern:
        """The pattern in its parts."""
        return Pattern.of(self.hybrid_layer_pattern)

    @property
    def letters(self) -> str:
        """The letter of each layer of the stack."""
        return self.pattern.letters


# ---- on Megatron-LM's command line ---------------------------------------------------------------------------------

_PATTERN = Flag("--hybrid-layer-pattern", _KEY, None, str)
_OLDER_PATTERN = Flag("--hybrid-override-pattern", "hybrid_override_pattern", None, str)
"""The one of 0.16; later releases take it for the other."""
_IS_HYBRID = Flag("--is-hybrid-model", "is_hybrid_model", False)
_SINCE = (0, 17)
"""The first release with --hybrid-layer-pattern, which needs neither of the other two."""
_NEWER = {
    FURTHER: ((0, 17), "multi-token prediction ('/')"),
    "+": ((0, 19), "latent attention ('+')"),
}
"""A sign of a pattern → the first release that has it, and what it is."""
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


def require_release(pattern: str, release: Release, *, name: str = _KEY) -> None:
    """Raises InputError unless that release has all that a pattern says; `name` is of what says it."""
    for sign, (since, what) in _NEWER.items():
        if sign in pattern and release < since:
            here, first = (".".join(map(str, numbers)) for numbers in (release, since))
            raise InputError(
                f"{name} {brief(pattern, 60)}: Megatron-Core {here} has no {what} in a pattern. Take {first} or later."
            )


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
        parts = Pattern.of(pattern)
        count = len(parts.letters)
        if any(ratios) and Counter(parts.letters) != Counter(_spread(count, *ratios)):
            raise InputError(f"{_RATIOS[0].name} beside {flag}, whose layers are others. Drop the ratios.")
        if _OLDER_PATTERN.found(values) not in (None, pattern):
            raise InputError(f"{_OLDER_PATTERN.name} beside {flag}: Megatron takes one of them. Drop one.")
        if release is not None:
            require_release(pattern, release, name=flag)
        if layers not in (None, count):
            if flag == _OLDER_PATTERN.name and older:
                raise InputError(
                    f"{flag} has {count} layers, and --num-layers is {layers}, which Megatron 0.16 refuses. Correct "
                    "one of them."
                )
            remarks.append(f"--num-layers {layers}: Megatron takes the layers of {flag}, {count}.")
        found: dict[str, Any] = {_KEY: pattern, "num_layers": None}
        if parts.further:
            found["mtp_num_layers"] = len(parts.further)
            if (said := values.get("mtp_num_layers")) not in (None, len(parts.further)):
                remarks.append(f"--mtp-num-layers {said}: Megatron takes those of {flag}, {len(parts.further)}.")
        if "+" in parts.all_letters:
            found["multi_latent_attention"] = True
        if release is not None and older and not _IS_HYBRID.changed(values):
            remarks.append(
                f"{_IS_HYBRID.name} is missing: without it Megatron 0.16 draws what writes into the residual stream as "
                "for twice as many layers. A run with a recipe draws it as with the flag."
            )
        return Reading({**reading.content, **found}, reading.names, tuple(remarks))

    def written(self, model: ModelFile, release: Release) -> Sequence[str]:
        """Returns pattern and spec; 0.16 knows no boundaries in the pattern, and wants to be told what model it is.

        Raises:
            InputError: the release has not all that the pattern says.
        """
        require_release(_file(model).hybrid_layer_pattern, release)
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

    def further_layers(self, model: ModelFile) -> Mapping[str, Sequence[Family]]:
        """Returns those of the pattern's letters behind a `/`, which are a stack of their own."""
        return {f"{MTP_STACK}.{i}": (FAMILIES[letter],) for i, letter in enumerate(_file(model).pattern.further[0])}

    def with_layers(self, model: ModelFile, kept: Sequence[int]) -> ModelFile:
        """Returns the model with these of its letters, without boundaries; multi-token prediction stays."""
        pattern = _file(model).pattern
        left = replace(pattern, stages=("".join(pattern.letters[index] for index in kept),))
        return model.model_copy(update={"hybrid_layer_pattern": str(left), "num_layers": len(kept)})

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
        stages = _file(model).pattern.stages
        return None if len(stages) == 1 else [len(stage) for stage in stages]

    def shapes(self, base: ModelFile, target: ModelFile, of_base: Architecture) -> tuple[ModelShape, ModelShape]:
        """Returns the shapes of base and target, whose layers of multi-token prediction are alike within.

        Raises:
            InputError: they are not, or as for every architecture.
        """
        own = as_other(of_base, self, base)
        within = [each.pattern.further[:1] for each in (own, target) if isinstance(each, HybridFile)]
        if all(within) and len({*within}) > 1:
            [at_base], [at_target] = within
            raise InputError(
                f"hybrid_layer_pattern: behind '/' the recipe's base has {brief(at_base, 40)} and the target "
                f"{brief(at_target, 40)}. Tune a base that has the target's layers there."
            )
        return super().shapes(base, target, of_base)

    def taken_from(self, other: Architecture, model: ModelFile) -> ModelFile | None:
        """Returns a GPT as the pattern `*-*-…` of twice as many layers: `E` are experts, `+` latent attention."""
        if other is not GPT:
            return super().taken_from(other, model)
        attention = "+" if model.multi_latent_attention else "*"
        layers = [attention + ("E" if model.has_experts(layer) else "-") for layer in range(model.num_layers)]
        pattern = Pattern(("".join(layers),), (layers[-1],) * (model.mtp_num_layers or 0))
        own = {"num_layers": 2 * len(layers), "hybrid_layer_pattern": str(pattern), "moe_layer_freq": 1}
        return HybridFile.model_construct(**{**dict(model), **own})

    def given_to(self, other: Architecture, model: ModelFile) -> ModelFile | None:
        """Returns a pattern `*-*-…`, or with `E` for `-`, `+` for `*`, as a GPT of half as many layers.

        Multi-token prediction has to be as the last layer, behind each `/`.
        """
        if other is not GPT:
            return super().given_to(other, model)
        pattern = _file(model).pattern
        letters = pattern.letters
        if _AS_GPT.fullmatch(letters) is None or {*pattern.further} - {letters[-2:]}:
            return None
        shared = {key: getattr(model, key) for key in ModelFile.model_fields}
        frequency = tuple(int(letter == "E") for letter in letters[1::2])
        own = {"num_layers": len(letters) // 2, "moe_layer_freq": frequency if len(set(frequency)) > 1 else 1}
        return ModelFile.model_construct(**{**shared, **own})


def _file(model: ModelFile) -> HybridFile:
    assert isinstance(model, HybridFile)
    return model


HYBRID = Hybrid()
