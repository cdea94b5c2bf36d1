"""A language model: embeddings, one or more stacks of layers of families, each with a final norm, and heads.

What differs between models (which stacks there are, which families a layer has, which heads, what a model file says of
it) is in one file for each: `gpt.py`, `hybrid.py`, `bert.py`, `t5.py`.
"""

import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from mup_megatron.architectures.alike import LAYOUT, SHARED, named_as, require_alike
from mup_megatron.architectures.command_line import CommandLine
from mup_megatron.architectures.custom import custom_tensors
from mup_megatron.architectures.families import MLP, Block, Family, Growth, Size, norm
from mup_megatron.architectures.families.family import alike
from mup_megatron.architectures.layout import Layout
from mup_megatron.architectures.measured import BIAS, CONTEXT, STREAM, Kind, Measured, inside
from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.architectures.names import POSITION_EMBEDDINGS, READOUT_WEIGHT, WORD_EMBEDDINGS
from mup_megatron.architectures.tables import embedding, readout, stepped_as_matrix
from mup_megatron.errors import InputError
from mup_megatron.theory import BRANCH, READOUT, Acts, ModelShape, Place, Property, Side, Stack, Tensor

_WIDTHS = ("hidden_size", "num_attention_heads", "num_query_groups")
"""Keys that grow at whatever base, beside `Architecture.widths`."""
_QUERY_NORM = re.compile(r"\.(?:q_layernorm\.|linear_q_up_proj\.layer_norm_)")
_MTP_NORM = re.compile(r"mtp\.layers\.\d+\.final_layernorm\.")
READOUT_PANEL = "Readout (the model's logits)"
"""The title under which what leads to the logits is shown."""

Layers = Sequence[Sequence[Family]]
"""The families of each layer of a stack, in order."""


class Architecture(ABC):
    """An architecture, from its model file to everything that the rest of the package asks of it."""

    name: ClassVar[str]
    """As in a model file's `architecture`, and in a plan."""
    description: ClassVar[str]
    """For messages, with its article: "a GPT"."""
    file: ClassVar[type[ModelFile]]
    """What its model files say."""
    live_classes: ClassVar[tuple[str, ...]]
    """Names of the classes of Megatron-Core's that are it."""
    builder: ClassVar[str]
    """The module whose `build` makes a live one; imported when it is used, because it imports Megatron."""
    plain: ClassVar[str]
    """The class in `plain/` that is it in plain torch, as `module:Class`; imported when it is used."""
    command_line: ClassVar[CommandLine] = CommandLine()
    """What Megatron-LM's command line says of it alone."""
    final_norm: ClassVar[str] = "final_layernorm"
    """The name in its stack of the norm behind the layers."""
    readout: ClassVar[str] = READOUT_WEIGHT
    """The name of the weight that computes the logits, where it is not the token embedding."""
    branches: ClassVar[int]
    """Residual branches of a layer as the stock initialisation counts them (`is_hybrid_model`)."""
    shared: ClassVar[tuple[str, ...]] = ()
    """Keys of its model files that base and target must share, beside those of every model and of the families."""
    objective: ClassVar[str] = "next token"
    """What it is trained to do: the name of an objective of `training`."""
    pipelines: ClassVar[bool] = True
    """Whether Megatron-Core splits it over pipeline stages."""

    @abstractmethod
    def stacks(self, model: ModelFile) -> Mapping[str, Layers]:
        """Returns the layers of each stack, by the name of the module that has them, in the order of a forward pass."""

    @abstractmethod
    def with_layers(self, model: ModelFile, kept: Sequence[int]) -> ModelFile:
        """Returns the model with these of its layers alone, in this order."""

    def with_depth(self, model: ModelFile, layers: int) -> ModelFile:
        """Returns the model with its first layers alone."""
        return self.with_layers(model, range(layers))

    def with_length(self, model: ModelFile, length: int) -> ModelFile:
        """Returns the model for sequences of so many tokens."""
        positions = None if model.max_position_embeddings is None else length
        return model.model_copy(update={"seq_length": length, "max_position_embeddings": positions})

    def stages(self, model: ModelFile) -> Sequence[int] | None:
        """Returns how many layers each pipeline stage has; None where the model file leaves them to an even split."""
        return None

    def taken_from(self, other: "Architecture", model: ModelFile) -> ModelFile | None:
        """Returns another architecture's model as one of this; None if this has none that is equal."""
        return model if other is self else None

    def given_to(self, other: "Architecture", model: ModelFile) -> ModelFile | None:
        """Returns a model of this architecture as one of another; None if that has none that is equal."""
        return model if other is self else None

    def shapes(self, base: ModelFile, target: ModelFile, of_base: "Architecture") -> tuple[ModelShape, ModelShape]:
        """Returns the shapes of base and target, named as in the target, with the names that patterns mean.

        Depth, heads, ffn and head size may differ; which of them grow is known from both together.

        Args:
            base: at which hyperparameters were tuned.
            target: a model of this architecture.
            of_base: the base's architecture.

        Raises:
            InputError: the two differ in architecture; names the key.
        """
        if base.custom_tensors != target.custom_tensors:
            raise InputError(
                "custom_tensors of the recipe's base and of the target differ, in what they say or in order. Both have "
                "to list the same."
            )
        require_alike(base, target, SHARED)
        own, as_tuned = as_other(of_base, self, base), as_other(self, of_base, target)
        if of_base is not self and target.custom_tensors:
            raise InputError(
                "custom_tensors: their names are of one architecture, and the recipe's base is of another. Tune a base "
                "of the target's."
            )
        if own is None or as_tuned is None:
            raise InputError(
                f"the recipe's base is {of_base.description} and the target {self.description}, which are not one "
                "model. Tune a base of the target's architecture."
            )
        of_families = {key: decides for family in self.families(target) for key, decides in family.shared.items()}
        require_alike(own, target, {**alike(*self.shared), **of_families})
        kinds_at_base, kinds = ({each.name for each in self.families(m)} for m in (own, target))
        if kinds_at_base != kinds:
            raise InputError(
                f"the recipe's base has layers of {' and '.join(sorted(kinds_at_base))}, and the target of "
                f"{' and '.join(sorted(kinds))}. Tune a base with the target's kinds of layers."
            )
        growth = Growth(own, target)
        if of_base is self and all(getattr(base, key) == getattr(target, key) for key in LAYOUT):
            shape = self._shape(target, growth)
            return shape if base is target else self._shape(base, growth), shape
        as_tuned = named_as(as_tuned, base)
        # One model has its tensors in one order, whatever architecture it is taken for.
        tuned_names = [tensor.name for tensor in of_base._tensors(as_tuned, growth)]
        shape = self._shape(target, growth)
        tensors = tuple(
            replace(tensor, name_at_base=tuned if tuned != tensor.name else None)
            for tensor, tuned in zip(shape.tensors, tuned_names, strict=True)
        )
        at_base = self._shape(named_as(own, target), growth)
        of_own = zip(at_base.tensors, of_base._tensors(base, growth), strict=True)
        base_tensors = tuple(replace(tensor, name_at_base=tuned.name) for tensor, tuned in of_own)
        return replace(at_base, tensors=base_tensors), replace(shape, tensors=tensors)

    def remarks(self, base: ModelFile, target: ModelFile) -> Sequence[str]:
        """Returns what is known of transfer from this base to a target of this architecture, in sentences."""
        own = [each for each in self.families(target) if isinstance(each, Family)]
        return [remark for family in own for remark in family.remarks(base, target)]

    def config(self, model: ModelFile) -> Mapping[str, Any]:
        """Returns the fields of a TransformerConfig that only models of its kind, or with its layers, have."""
        return {field: value for each in self.families(model) for field, value in each.config(model).items()}

    def problems(self, model: ModelFile, layout: Layout) -> Iterator[str]:
        """Yields why Megatron cannot train the layers of a model on these ranks, by flag, and what to do."""
        for family in self.families(model):
            yield from family.problems(model, layout)

    def local_problem(self, model: ModelFile, *, on_cpu: bool) -> str | None:
        """Returns why Megatron's local layers cannot be those of a model, and what to do; None where they can."""
        return next(filter(None, (each.local_problem(model, on_cpu=on_cpu) for each in self.families(model))), None)

    def native_problem(self, model: ModelFile) -> str | None:
        """Returns why no recipe does what Megatron's own μP does with a model, and what to do; None where one does."""
        return (
            f"--use-mup: the line builds {self.description}, whose logits Megatron's own μP leaves as they are, so no "
            "recipe does the same. Write one by hand with `mup-megatron recipe`."
        )

    def expert_parallel(self, model: ModelFile) -> bool:
        """Returns whether ranks of expert parallelism hold different parts of a model."""
        return any(family.expert_parallel for family in self.families(model))

    def families(self, model: ModelFile) -> Collection[Block]:
        """Returns the kinds of layers that a model has, each once."""
        return {family.name: family for _, family in self._branches(model)}.values()

    def _branches(self, model: ModelFile) -> Iterator[tuple[str, Block]]:
        """Each layer's name and one of its families, in order; then those behind the stacks."""
        yield from self._in_stacks(model)
        yield from self._further(model)

    def _in_stacks(self, model: ModelFile) -> Iterator[tuple[str, Family]]:
        for stack, layers in self.stacks(model).items():
            for index, families in enumerate(layers):
                for family in families:
                    yield f"{stack}.layers.{index}", family

    def _further(self, model: ModelFile) -> Iterator[tuple[str, Block]]:
        """Yields each layer's name and one of its families, of layers that stand behind the stacks."""
        yield from ()

    def _shape(self, model: ModelFile, growth: Growth) -> ModelShape:
        tensors = tuple(self._tensors(model, growth))
        names = [tensor.name for tensor in tensors]
        final = self._readout_norm(model)
        return ModelShape(
            architecture=self.name,
            tensors=tensors,
            hidden_size=model.hidden_size,
            head_size=model.head_size,
            stacks={stack: Stack(len(layers), self.branches) for stack, layers in self.stacks(model).items()},
            readout=WORD_EMBEDDINGS if model.tied else self.readout,
            stock_softmax_scale=model.stock_softmax_scale,
            readout_norm=tuple(n for n in names if n.startswith(final) or _MTP_NORM.match(n)),
            query_norms=tuple(name for name in names if _QUERY_NORM.search(name)),
            places=tuple(self.places(model)),
        )

    def _readout_norm(self, model: ModelFile) -> str:
        """Returns the prefix of the parameters of the norm before the readout."""
        return f"{[*self.stacks(model)][-1]}.{self.final_norm}."

    def _tensors(self, model: ModelFile, growth: Growth) -> Iterator[Tensor]:
        yield from self._tables(model)
        for stack, layers in self.stacks(model).items():
            for index, families in enumerate(layers):
                for family in families:
                    for tensor in family.tensors(model, f"{stack}.layers.{index}", growth):
                        yield replace(tensor, stack=stack)
            yield from norm(model, f"{stack}.{self.final_norm}.", Side(model.hidden_size, grows=True))
        widths = {*_WIDTHS, *(size.key for size in self.widths(model))}
        yield from custom_tensors(model, self.stacks(model), growth, widths)
        *_, last = self.stacks(model)
        for layer, block in self._further(model):
            for tensor in block.tensors(model, layer, growth):
                # Megatron draws what writes into the stream there as in the stack itself, by the stack's depth. Each
                # has a stream of its own, with the branches of one layer, and there are as many at any depth.
                yield replace(tensor, stack=last, deepens=False)
        yield from self._heads(model)

    def _tables(self, model: ModelFile) -> Iterator[Tensor]:
        """Yields the tables that are looked up: the embeddings of words, first, and of what else there is."""
        hidden = Side(model.hidden_size, grows=True)
        vocabulary = Side(model.padded_vocab_size())
        yield replace(embedding(WORD_EMBEDDINGS, vocabulary, hidden), padded_to=model.make_vocab_size_divisible_by)
        if model.position_embedding_type == "learned_absolute":
            yield stepped_as_matrix(embedding(POSITION_EMBEDDINGS, Side(model.positions), hidden))

    def _heads(self, model: ModelFile) -> Iterator[Tensor]:
        """Yields what is behind the stacks: the readout, unless it is the token embedding, and what else there is."""
        if not model.tied:
            vocabulary = Side(model.padded_vocab_size())
            head = readout(self.readout, Side(model.hidden_size, grows=True), vocabulary)
            yield replace(head, padded_to=model.make_vocab_size_divisible_by)

    def sizes(self, model: ModelFile) -> Sequence[Size]:
        """Returns the sizes of a model's families that it has, each once."""
        own = [each for each in self.families(model) if isinstance(each, Family)]
        found = {size.key: size for family in own for size in family.sizes}
        return [size for size in found.values() if size.of(model) is not None]

    def widths(self, model: ModelFile) -> Sequence[Size]:
        """Returns what a narrower model has less of, beside heads: the ffn, a key of every model, and its families'."""
        found = {size.key: size for size in (*MLP.sizes, *self.sizes(model)) if size.is_width}
        return [*found.values()]

    def places(self, model: ModelFile) -> Iterator[Place]:
        """Yields where factors act in a model, beside those of single weights."""
        for table in self._tables(model):
            yield Place(table.name.rpartition(".")[0], Acts.OUTPUT, table.name)
        within = [
            [_in_stack(place, stack) for place in family.places(f"{stack}.layers.{index}")]
            for stack, layers in self.stacks(model).items()
            for index, families in enumerate(layers)
            for family in families
        ]
        # All branches or none: what is known of some of them alone would be half a rule.
        known = all(any(place.carries == BRANCH for place in own) for own in within)
        behind = [list(block.places(layer)) for layer, block in self._further(model)]
        yield from (place for own in (*within, *behind) for place in own if known or place.carries != BRANCH)
        yield Place(self.readout.rpartition(".")[0], Acts.INPUT, READOUT)

    def measured(self, model: ModelFile) -> Iterator[Measured]:
        """Yields the modules that a check looks at, in the order of a forward pass; norms as modules of their own."""
        stream: list[str] = []
        for table in (each for each in self._tables(model) if Property.EMBEDDING in each.properties):
            module = table.name.rpartition(".")[0]
            yield Measured(module, Kind.TABLE, "Embedding", (), leads=table.name == WORD_EMBEDDINGS)
            stream.append(module)
        final: tuple[str, ...] = ()
        for stack, layers in self.stacks(model).items():
            biases = [*self._biases(model, stack)]
            yield from (inside(each, "Attention logits") for each in biases)
            # What one stack gives is what the next one may attend to; each begins with what is looked up.
            at = {STREAM: stream, CONTEXT: final, BIAS: biases}
            for index, families in enumerate(layers):
                layer = f"{stack}.layers.{index}"
                yield from layer_measured(model, layer, families, at)
                at = {**at, STREAM: [layer]}
            final = (f"{stack}.{self.final_norm}",)
            yield inside(*final, "Residual stream", f"{stack}.layers.{len(layers) - 1}")
        yield from self._heads_measured(model, final[0])

    def _biases(self, model: ModelFile, stack: str) -> Iterator[str]:
        """Yields the modules whose output is added to the attention logits of a stack."""
        yield from ()

    def _heads_measured(self, model: ModelFile, final: str) -> Iterator[Measured]:
        """Yields what a check looks at behind the stacks, of which the last gives what is named."""
        module = self.readout.rpartition(".")[0]
        yield Measured(module, Kind.READOUT, READOUT_PANEL, (final,), leads=True)

    def flops(self, model: ModelFile) -> Mapping[str, float]:
        """Returns training FLOPs for one token, by item: see `cost.Flops`."""
        found: Counter[str] = Counter()
        for _, family in self._branches(model):
            found.update(family.flops(model))
        return {**found, "readout": 6.0 * model.hidden_size * model.padded_vocab_size()}


def _in_stack(place: Place, stack: str) -> Place:
    return replace(place, stack=stack) if place.carries == BRANCH else place


def layer_measured(
    model: ModelFile, layer: str, families: Sequence[Family], at: Mapping[str, Sequence[str]]
) -> Iterator[Measured]:
    """Yields what a check looks at in a layer; `at` gives it the residual stream and what else it reads."""
    for family in families:
        own = [each.among(at) for each in family.measured(model, layer)]
        yield from own
        at = {**at, STREAM: [*at[STREAM], *(each.module for each in own if each.kind is Kind.BRANCH)]}
    yield Measured(layer, Kind.STREAM, "Residual stream", tuple(at[STREAM]), leads=True)


def as_other(one: Architecture, other: Architecture, model: ModelFile) -> ModelFile | None:
    """Returns a model of one architecture as one of another, by whichever of the two knows; None if they differ."""
    given = one.given_to(other, model)
    return other.taken_from(one, model) if given is None else given
