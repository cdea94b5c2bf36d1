"""Megatron-Core's `BertModel`: one stack of an encoder's layers, a masked language model's head and a binary head."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

from pydantic import model_validator

from mup_megatron.architectures.architecture import READOUT_PANEL, Architecture, Layers
from mup_megatron.architectures.command_line import CommandLine, Reading, Release
from mup_megatron.architectures.families import ATTENTION, MLP, linear, norm, vector
from mup_megatron.architectures.flag import Flag
from mup_megatron.architectures.keys import PLAIN_LAYERS
from mup_megatron.architectures.keys.unread import Unread
from mup_megatron.architectures.measured import Kind, Measured, inside
from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.architectures.tables import embedding, readout, stepped_as_matrix
from mup_megatron.theory import Side, Tensor

STACK = "encoder"
SENTENCES = 2
"""Types of tokens, and outputs of the binary head: which of two sentences, and whether they are in order."""


class BertFile(ModelFile):
    """The shape of a BERT; Megatron-Core's is pre-LN, as a GPT is."""

    unread: ClassVar[tuple[Unread, ...]] = (*ModelFile.unread, PLAIN_LAYERS)
    architecture: Literal["bert"]
    bert_binary_head: bool = True
    """Whether there are a pooler and a head for pairs of sentences, and embeddings of which sentence a token is in."""

    @model_validator(mode="after")
    def _as_built(self) -> "BertFile":
        if self.position_embedding_type != "learned_absolute":
            raise ValueError(
                f"position_embedding_type {self.position_embedding_type}: Megatron's BERT has learned positions, "
                "whatever is asked for. Remove the key."
            )
        return self


class BertCommandLine(CommandLine):
    """A command line whose layers are Transformer Engine's unless `--spec local` says otherwise."""

    def read(self, values: Mapping[str, Any], release: Release | None) -> Reading:
        """Returns its keys; `--transformer-impl` has no say."""
        reading = super().read(values, release)
        return Reading({**reading.content, "transformer_impl": "transformer_engine"}, reading.names, reading.remarks)

    def written(self, model: ModelFile, release: Release) -> Sequence[str]:
        """Returns its flags, with the spec of local layers where it has them."""
        spec = ["--spec", "local"] if model.transformer_impl == "local" else []
        return [*super().written(model, release), *spec]


class Bert(Architecture):
    """An encoder whose readout, tied or not, comes behind a head of its own and has a bias."""

    name: ClassVar[str] = "bert"
    description: ClassVar[str] = "a BERT"
    file: ClassVar[type[ModelFile]] = BertFile
    live_classes: ClassVar[tuple[str, ...]] = ("BertModel",)
    builder: ClassVar[str] = "mup_megatron.megatron.builders.bert"
    plain: ClassVar[str] = "mup_megatron.architectures.plain.bert:PlainBert"
    command_line: ClassVar[CommandLine] = BertCommandLine(
        programs=("pretrain_bert.py",),
        keys={"bert_binary_head": (Flag("--bert-no-binary-head", "bert_binary_head", True),)},
        optional=("bert_binary_head",),
        specs={"local": "local"},
    )
    branches: ClassVar[int] = 2
    shared: ClassVar[tuple[str, ...]] = ("bert_binary_head",)
    objective: ClassVar[str] = "masked tokens"

    def stacks(self, model: ModelFile) -> Mapping[str, Layers]:
        """Returns the encoder: attention and an MLP for each layer."""
        return {STACK: [(ATTENTION, MLP)] * model.num_layers}

    def with_layers(self, model: ModelFile, kept: Sequence[int]) -> ModelFile:
        """Returns the model with as many layers: all are alike."""
        return model.model_copy(update={"num_layers": len(kept)})

    def _readout_norm(self, model: ModelFile) -> str:
        return "lm_head.layer_norm."

    def _tables(self, model: ModelFile) -> Iterator[Tensor]:
        yield from super()._tables(model)
        if _file(model).bert_binary_head:
            hidden = Side(model.hidden_size, grows=True)
            yield stepped_as_matrix(embedding("embedding.tokentype_embeddings.weight", Side(SENTENCES), hidden))

    def _heads(self, model: ModelFile) -> Iterator[Tensor]:
        hidden = Side(model.hidden_size, grows=True)
        # These linear layers have a bias whatever `add_bias_linear` says.
        yield from linear("lm_head.dense", hidden, hidden, bias=True)
        yield from norm(model, "lm_head.layer_norm.", hidden)
        yield from super()._heads(model)
        bias = vector("output_layer.bias", Side(model.padded_vocab_size()), start=0.0)
        yield replace(bias, padded_to=model.make_vocab_size_divisible_by)
        if _file(model).bert_binary_head:
            yield stepped_as_matrix(readout("binary_head.weight", hidden, Side(SENTENCES)))
            yield vector("binary_head.bias", Side(SENTENCES), start=0.0)
            yield from linear("pooler.dense", hidden, hidden, bias=True)

    def _heads_measured(self, model: ModelFile, final: str) -> Iterator[Measured]:
        """Yields the pooler, the head before the readout, the readout, and the binary head."""
        pair = "Binary head"
        if _file(model).bert_binary_head:
            yield inside("pooler.dense", pair, final)
        yield inside("lm_head.dense", READOUT_PANEL, final)
        yield inside("lm_head.layer_norm", READOUT_PANEL, "lm_head.dense")
        yield from super()._heads_measured(model, "lm_head.layer_norm")
        if _file(model).bert_binary_head:
            yield Measured("binary_head", Kind.HIDDEN, pair, ("pooler.dense",), leads=True)

    def flops(self, model: ModelFile) -> Mapping[str, float]:
        """Returns those of the layers, of the head before the readout and of the readout.

        The pooler and the binary head see one token of a sequence, and are left out.
        """
        return {**super().flops(model), "lm_head": 6.0 * model.hidden_size**2}


def _file(model: ModelFile) -> BertFile:
    assert isinstance(model, BertFile)
    return model


BERT = Bert()
