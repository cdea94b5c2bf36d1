"""An exported model against the trained one: whether stock transformers computes what was trained, and else from where.

The trained model is computed in plain torch, with each of its plan's multipliers at its place; one of transformers' by
its own code, with the plan applied.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import singledispatch
from pathlib import Path
from typing import Any

import torch

from mup_megatron.architectures.names import is_of_mtp
from mup_megatron.architectures.plain.mlp import PlainMlp
from mup_megatron.check.measure import batches
from mup_megatron.check.reference.gpt import planned_model
from mup_megatron.errors import InputError
from mup_megatron.export.architectures.registry import targets
from mup_megatron.export.hugging_face import HuggingFaceModel
from mup_megatron.export.weights import Source, TrainedModel
from mup_megatron.megatron.stored_names import separate
from mup_megatron.theory import Plan, PlanEntry
from mup_megatron.validation import brief

BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Of a difference, relative to the standard deviation of what is compared, by the type of the export's weights.

That of the trained ones does not matter: they are what they are, and both models are computed in single precision."""
ATTENTIONS = ("eager", "sdpa")
_GENERATED = 16
_LONGEST = 64
_SEQUENCES = 2


@dataclass(frozen=True, slots=True)
class Difference:
    """The largest difference at a place of the two models, relative to the standard deviation there."""

    where: str
    size: float


@dataclass(frozen=True, kw_only=True)
class Compared:
    """The outcome of a comparison."""

    bound: float
    differences: dict[str, Sequence[Difference]]
    """By the implementation of attention: before the layers, after each, and of the logits, which come last."""
    generated: int
    """Tokens."""
    alike_with_cache: bool

    @property
    def passed(self) -> bool:
        """True where logits agree, and a cache changes no token."""
        return self.alike_with_cache and all(found[-1].size <= self.bound for found in self.differences.values())

    def told(self) -> str:
        """Returns the outcome in sentences."""
        lines = []
        for name, found in self.differences.items():
            line = f"{name}: logits differ by at most {found[-1].size:.2g} of their standard deviation"
            begins = next((each for each in found if not each.size <= self.bound), None)
            if begins is not None:
                line += f", more than {self.bound:g}; it begins {begins.where}, with {begins.size:.2g}"
            lines.append(line)
        kept = "the same" if self.alike_with_cache else "NOT the same"
        return "\n".join([*lines, f"generate: {self.generated} tokens are {kept} with a cache and without"])


def check_exported(folder: Path, source: TrainedModel) -> Compared:
    """Compares an exported model with the one that it was exported from.

    Args:
        folder: of the export.
        source: the trained model.

    Raises:
        InputError: the folder is none of an export, transformers cannot load it, or nothing can be exported of the
            trained model.
    """
    source.outline(None)
    source.require_whole()
    trained = _trained(source)
    given = batches.tokens(trained.vocab_size, trained.length, _SEQUENCES, seed=1, step=0)[:, : trained.length]
    wanted = trained.streams(given)
    differences: dict[str, Sequence[Difference]] = {}
    for attention in ATTENTIONS:
        stock = _loaded(folder, attention, trained.architectures)
        differences[attention] = [*_compared(wanted, _stock(stock, given))]
    begun = given[:, : -(-trained.length // 2)]
    more = min(_GENERATED, trained.positions - begun.shape[1])
    generated = [
        stock.generate(
            begun,
            attention_mask=torch.ones_like(begun),
            min_new_tokens=more,
            max_new_tokens=more,
            do_sample=False,
            use_cache=cached,
        )
        for cached in (True, False)
        if more
    ]
    bound = BOUNDS.get(_written_dtype(stock), BOUNDS[torch.float32])
    alike = more == 0 or torch.equal(*generated)
    return Compared(bound=bound, differences=differences, generated=more, alike_with_cache=alike)


_Streams = list[tuple[str, torch.Tensor]]


@dataclass(frozen=True, kw_only=True)
class _Trained:
    """A trained model that runs."""

    vocab_size: int
    length: int
    """Of the sequences that are compared."""
    positions: int
    architectures: Collection[str]
    """That it can have been exported to."""
    streams: Callable[[torch.Tensor], _Streams]
    """Returns what enters its first layer, what each layer gives, and the logits."""


@singledispatch
def _trained(source: TrainedModel) -> _Trained:
    """Returns the trained model with its weights, in single precision."""
    raise NotImplementedError


@_trained.register
def _(source: HuggingFaceModel) -> _Trained:
    live = source.live()
    positions = getattr(source.config, "max_position_embeddings", _LONGEST)
    return _Trained(
        vocab_size=source.config.get_text_config().vocab_size,
        length=min(positions, _LONGEST),
        positions=positions,
        architectures=[source.config.model_type],
        streams=lambda given: _stock(live, given),
    )


@_trained.register
def _(source: Source) -> _Trained:
    model, plan = source.model.model_copy(update={"mtp_num_layers": None}), _plain(source.plan)
    live = planned_model(plan, model, dtype=torch.float32)
    for mlp in live.modules():
        if source.tanh_gelu and isinstance(mlp, PlainMlp):
            mlp.gelu = "tanh"
    with torch.no_grad():
        for trained, entry in zip(_left(source.plan), plan.entries, strict=True):
            own, weight = live.get_parameter(entry.name), source.weights.read(trained.name)
            rows = min(len(own), len(weight))  # a vocabulary is padded as the run's layout had it
            own[:rows].copy_(weight[:rows])
        for name, buffer in live.named_buffers():
            if name in source.weights.stored:
                buffer.copy_(source.weights.read(name))
    (stack,) = plan.stacks  # of a GPT, as all that can be exported are
    layers: Any = live.get_submodule(f"{stack}.layers")
    return _Trained(
        vocab_size=model.vocab_size,
        length=min(model.seq_length, _LONGEST),
        positions=model.positions,
        architectures=targets().keys(),
        streams=lambda given: _streams(lambda: live(given)[..., : model.vocab_size], [*layers]),
    )


def _plain(plan: Plan) -> Plan:
    """Returns the plan of a trained model by the names of a plain one, without multi-token prediction.

    A plan that is made anew for the plain model's names would be another one: an override finds a parameter by its
    name, and what is folded into the weight in a grouped matrix is not in one of its own.
    """
    return replace(
        plan,
        entries=tuple(replace(entry, name=separate(entry.name)) for entry in _left(plan)),
        places=tuple(place for place in plan.places if not is_of_mtp(place.module)),
    )


def _left(plan: Plan) -> Sequence[PlanEntry]:
    """Returns the parameters that an export has a place for."""
    return [entry for entry in plan.entries if not is_of_mtp(entry.name)]


def _stock(stock: Any, given: torch.Tensor) -> _Streams:
    base = stock.base_model
    layers = base.layers if hasattr(base, "layers") else base.h
    return _streams(lambda: stock(given).logits, [*layers])


def _streams(run: Callable[[], torch.Tensor], layers: Sequence[torch.nn.Module]) -> _Streams:
    found: _Streams = []

    def first(_: torch.nn.Module, args: Any, kwargs: Any) -> None:
        found.append(("before the first layer (embedding)", args[0] if args else kwargs["hidden_states"]))

    def after(name: str) -> Callable[..., None]:
        def hook(_: torch.nn.Module, _args: Any, output: Any) -> None:
            found.append((name, output[0] if isinstance(output, tuple) else output))

        return hook

    handles = [layers[0].register_forward_pre_hook(first, with_kwargs=True)]
    handles += [layer.register_forward_hook(after(f"in layer {n}")) for n, layer in enumerate(layers)]
    try:
        with torch.no_grad():
            found.append(("behind the layers (final norm or head)", run()))
    finally:
        for handle in handles:
            handle.remove()
    return found


def _compared(wanted: _Streams, found: _Streams) -> Sequence[Difference]:
    if [each.shape for _, each in wanted] != [each.shape for _, each in found]:
        raise InputError("--exported: its layers or sizes are not those of the checkpoint. Give the two of one run.")
    return [
        Difference(where, float((one.double() - other.double()).abs().max() / one.double().std()))
        for (where, one), (_, other) in zip(wanted, found, strict=True)
    ]


def _loaded(folder: Path, attention: str, architectures: Collection[str]) -> Any:
    from transformers import AutoModelForCausalLM

    if not (folder / "config.json").is_file():
        raise InputError(f"--exported {folder}: no config.json there. Give the --to folder of `mup-megatron export`.")
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            attn_implementation=attention,
            dtype=torch.float32,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
        )
    except Exception as error:  # transformers raises whatever it likes for a folder that is damaged
        raise InputError(
            f"--exported {folder}: transformers cannot load it ({brief(error)}). Export the checkpoint again."
        ) from None
    if model.config.model_type not in architectures:
        raise InputError(
            f"--exported {folder}: a model of type {model.config.model_type}, and exports are "
            f"{', '.join(architectures)}. Give the --to folder of `mup-megatron export`."
        )
    model.train(False)
    return model


def _written_dtype(stock: Any) -> torch.dtype:
    """Returns the type that an export's weights are stored in, as its configuration says."""
    from transformers import AutoConfig

    found: Any = AutoConfig.from_pretrained(stock.config._name_or_path, local_files_only=True).dtype
    return found if isinstance(found, torch.dtype) else torch.float32
