"""Megatron-Core's `T5Model`: an encoder, and a decoder that attends to it."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

from pydantic import model_validator

from mup_megatron.architectures.architecture import Architecture, Layers
from mup_megatron.architectures.command_line import CommandLine, Reading, Release
from mup_megatron.architectures.families import ATTENTION, CROSS_ATTENTION, MLP, vector
from mup_megatron.architectures.flag import Flag, whole_number
from mup_megatron.architectures.keys import PLAIN_LAYERS
from mup_megatron.architectures.keys.unread import Unread, absent
from mup_megatron.architectures.model_file import Count, Depth, ModelFile
from mup_megatron.errors import InputError
from mup_megatron.theory import Side, Tensor

ENCODER, DECODER = "encoder", "decoder"
_TOGETHER = {"num_layers": "encoder_num_layers", "seq_length": "encoder_seq_length"}
"""Key of every model file → what Megatron also calls it where there are two stacks."""

_Positions = Literal["learned_absolute", "rope", "none", "relative"]
_NOT_RELATIVE = "without position_embedding_type relative Megatron does not read it. Remove the key."
_OF_BUCKETS = ("relative_attention_num_buckets", "relative_attention_max_distance")


class T5File(ModelFile):
    """The shape of a T5: `num_layers` and `seq_length` are the encoder's; the decoder's are as many by default."""

    unread: ClassVar[tuple[Unread, ...]] = (
        *ModelFile.unread,
        PLAIN_LAYERS,
        absent("Megatron's cross-attention has no grouped queries.", "group_query_attention"),
        absent("Megatron's T5 does not take it.", "rotary_base"),
        Unread(_OF_BUCKETS, _NOT_RELATIVE, "position_embedding_type", "relative".__eq__),
    )
    architecture: Literal["t5"]
    position_embedding_type: _Positions = "learned_absolute"  # type: ignore[assignment]
    encoder_num_layers: Depth
    decoder_num_layers: Depth
    decoder_seq_length: Count
    relative_attention_num_buckets: Count = 32
    relative_attention_max_distance: Count = 128

    @model_validator(mode="before")
    @classmethod
    def _both_stacks(cls, content: Any) -> Any:
        if not isinstance(content, Mapping):
            return content
        found = dict(content)
        for key, other in _TOGETHER.items():
            said = [found[name] for name in (key, other) if found.get(name) is not None]
            if len(said) == 2 and said[0] != said[1]:
                raise ValueError(f"{key} {said[0]} beside {other} {said[1]}: both are the encoder's. Remove {key}.")
            if said:
                found[key] = said[0]
        found.pop("encoder_seq_length", None)
        for key, own in (
            ("num_layers", "encoder_num_layers"),
            ("num_layers", "decoder_num_layers"),
            ("seq_length", "decoder_seq_length"),
        ):
            if found.get(own) is None and key in found:
                found[own] = found[key]
        return found

    @model_validator(mode="after")
    def _as_built(self) -> "T5File":
        buckets, distance = self.relative_attention_num_buckets, self.relative_attention_max_distance
        if self.position_embedding_type == "relative" and not 4 <= buckets < 2 * distance:
            raise ValueError(
                f"relative_attention_num_buckets {buckets}: at least 4, of which half are for single distances below "
                f"relative_attention_max_distance {distance}. Change one of them."
            )
        if self.positions < self.decoder_seq_length:
            raise ValueError(
                f"max_position_embeddings {self.positions} is smaller than decoder_seq_length "
                f"{self.decoder_seq_length}. Raise it, or shorten the sequence."
            )
        return self


# ---- on Megatron-LM's command line ---------------------------------------------------------------------------------

_DECODER_LAYERS = Flag("--decoder-num-layers", "decoder_num_layers", None, whole_number)
_FLAGS = (
    _DECODER_LAYERS,
    Flag("--decoder-seq-length", "decoder_seq_length", None, whole_number),
    Flag("--relative-attention-num-buckets", "relative_attention_num_buckets", 32, whole_number),
    Flag("--relative-attention-max-distance", "relative_attention_max_distance", 128, whole_number),
)


class T5CommandLine(CommandLine):
    """A command line on which the decoder's number of layers has no effect of its own."""

    def read(self, values: Mapping[str, Any], release: Release | None) -> Reading:
        """Returns the keys. Megatron's program gives the decoder as many layers as the encoder, whatever is said."""
        reading = super().read(values, release)
        decoder = reading.content[_DECODER_LAYERS.key]
        encoder = values.get("num_layers") or values.get("encoder_num_layers")
        if None not in (decoder, encoder) and decoder != encoder:
            raise InputError(
                f"{_DECODER_LAYERS.name} {decoder} beside {encoder} of the encoder: pretrain_t5.py builds a decoder of "
                "as many layers as the encoder has. Give the same number twice."
            )
        return reading

    def written(self, model: ModelFile, release: Release) -> Sequence[str]:
        """Returns the decoder's sizes, and what differs from Megatron's defaults."""
        own = _file(model)
        if own.decoder_num_layers != own.num_layers:
            raise InputError(
                f"decoder_num_layers {own.decoder_num_layers}: pretrain_t5.py builds a decoder of as many layers as "
                f"the encoder has, {own.num_layers}. Give both as many."
            )
        return super().written(model, release)


class T5Architecture(Architecture):
    """Two stacks; each residual output starts with a std by its own stack's number of layers."""

    name: ClassVar[str] = "t5"
    description: ClassVar[str] = "a T5"
    file: ClassVar[type[ModelFile]] = T5File
    live_classes: ClassVar[tuple[str, ...]] = ("T5Model",)
    builder: ClassVar[str] = "mup_megatron.megatron.builders.t5"
    plain: ClassVar[str] = "mup_megatron.architectures.plain.t5:PlainT5"
    command_line: ClassVar[CommandLine] = T5CommandLine(
        programs=("pretrain_t5.py", "simple_t5_batch_inference.py"),
        keys={flag.key: (flag,) for flag in _FLAGS},
        optional=tuple(flag.key for flag in _FLAGS),
    )
    readout: ClassVar[str] = "lm_head.output_layer.weight"
    branches: ClassVar[int] = 2
    """Also in the decoder, whose layers have three."""
    shared: ClassVar[tuple[str, ...]] = _OF_BUCKETS
    objective: ClassVar[str] = "denoising"
    pipelines: ClassVar[bool] = False

    def stacks(self, model: ModelFile) -> Mapping[str, Layers]:
        """Returns the encoder, and the decoder with attention to it."""
        own = _file(model)
        return {
            ENCODER: [(ATTENTION, MLP)] * own.encoder_num_layers,
            DECODER: [(ATTENTION, CROSS_ATTENTION, MLP)] * own.decoder_num_layers,
        }

    def with_layers(self, model: ModelFile, kept: Sequence[int]) -> ModelFile:
        """Returns the model with as many layers in the encoder, and the decoder in the ratio that it has to it."""
        own, count = _file(model), len(kept)
        decoder = max(1, round(count * own.decoder_num_layers / own.encoder_num_layers))
        return model.model_copy(
            update={"num_layers": count, "encoder_num_layers": count, "decoder_num_layers": decoder}
        )

    def with_length(self, model: ModelFile, length: int) -> ModelFile:
        """Returns the model for texts of so many tokens, of which the decoder has as large a part as before."""
        own = _file(model)
        decoder = min(length, max(1, round(length * own.decoder_seq_length / own.seq_length)))
        return super().with_length(model, length).model_copy(update={"decoder_seq_length": decoder})

    def _biases(self, model: ModelFile, stack: str) -> Iterator[str]:
        if _file(model).position_embedding_type == "relative":
            yield f"{stack}_relative_pos_emb.relative_attention_bias"

    def _tables(self, model: ModelFile) -> Iterator[Tensor]:
        yield from super()._tables(model)
        buckets, heads = _file(model).relative_attention_num_buckets, model.num_attention_heads
        for stack in (ENCODER, DECODER):
            for bias in self._biases(model, stack):
                # Added to the logits: looked up, and no embedding that the embedding multiplier would scale.
                yield Tensor(
                    name=f"{bias}.weight",
                    shape=(buckets, heads),
                    fan_in=Side(buckets),
                    fan_out=Side(heads, grows=True),
                )

    def _heads(self, model: ModelFile) -> Iterator[Tensor]:
        yield from super()._heads(model)
        if model.tied:  # Megatron's readout has a bias where it is tied
            bias = vector("lm_head.output_layer.bias", Side(model.padded_vocab_size()), start=0.0)
            yield replace(bias, padded_to=model.make_vocab_size_divisible_by)

    def flops(self, model: ModelFile) -> Mapping[str, float]:
        """Returns those of the mean of all tokens, the encoder's and the decoder's."""
        own = _file(model)
        encoder, decoder = own.seq_length, own.decoder_seq_length
        shorter = own.model_copy(update={"seq_length": decoder})
        found: Counter[str] = Counter()
        for stack, layers in self.stacks(model).items():
            for family in (family for families in layers for family in families):
                # What a decoder's tokens attend to in the encoder is as long as the encoder's sequence.
                seen = own if stack == ENCODER or family is CROSS_ATTENTION else shorter
                share = (encoder if stack == ENCODER else decoder) / (encoder + decoder)
                found.update({item: share * value for item, value in family.flops(seen).items()})
        readout = 6.0 * model.hidden_size * model.padded_vocab_size()
        return {**found, "readout": readout * decoder / (encoder + decoder)}


def _file(model: ModelFile) -> T5File:
    assert isinstance(model, T5File)
    return model


T5 = T5Architecture()
