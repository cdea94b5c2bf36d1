"""What a narrower model has less of: said by the families of its layers alone, also by one that is defined here."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import pytest

from mup_megatron.architectures import registry
from mup_megatron.architectures.families import ATTENTION, Family, Growth, Size, linear
from mup_megatron.architectures.families.mlp import Mlp
from mup_megatron.architectures.gpt import Gpt
from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.architectures.narrowing import Narrowed, narrowed
from mup_megatron.architectures.proxy import Search, choose_proxy
from mup_megatron.architectures.registry import model_file, shapes_of
from mup_megatron.theory import Side, Tensor


class GatedFile(ModelFile):
    architecture: Literal["gated"]
    gate_hidden_size: int | None = None
    gate_rank: int = 24
    gate_groups: int = 4
    following: ClassVar[Mapping[str, str]] = {**ModelFile.following, "gate_hidden_size": "gate_size"}

    @property
    def gate_size(self) -> int:
        return self.hidden_size // 2 if self.gate_hidden_size is None else self.gate_hidden_size


class GatedMlp(Mlp):
    """An MLP with a gate beside it, with sizes of its own."""

    name = "gated mlp"
    sizes = (
        *Mlp.sizes,
        Size(key="gate_hidden_size", small=32),
        Size(key="gate_rank", small=8, kept=True),
        Size(key="gate_groups", small=1, follows_width=False, divides="gate_hidden_size", fewer="gates are coarser"),
    )

    def tensors(self, model: ModelFile, layer: str, growth: Growth) -> Iterator[Tensor]:
        yield from super().tensors(model, layer, growth)
        gate = Side(model.value_of("gate_hidden_size"), grows=True)
        yield from linear(f"{layer}.mlp.gate", Side(model.hidden_size, grows=True), gate, bias=False)


class Gated(Gpt):
    name = "gated"
    file = GatedFile

    def layers(self, model: ModelFile) -> Sequence[Sequence[Family]]:
        return [(ATTENTION, GatedMlp())] * model.num_layers


@pytest.fixture
def known() -> Iterator[None]:
    registry.register(Gated())
    yield
    del registry._ARCHITECTURES["gated"]


SIZES = {"num_layers": 8, "hidden_size": 1024, "num_attention_heads": 16, "vocab_size": 1000, "seq_length": 32}
GATED = {**SIZES, "architecture": "gated"}


def file(content: Mapping[str, Any], **changes: Any) -> ModelFile:
    return model_file({**content, **changes}, source="model.yaml")


def at(model: ModelFile, hidden: int) -> Narrowed:
    heads = hidden * model.num_attention_heads // model.hidden_size
    return narrowed(model, hidden, model.heads(heads, size=model.head_size, groups=heads))


def sizes(model: ModelFile) -> tuple[int, ...]:
    return tuple(model.value_of(f"gate_{key}") for key in ("hidden_size", "rank", "groups"))


@pytest.mark.usefixtures("known")
@pytest.mark.parametrize(
    ("said", "hidden", "found"),
    [
        ({}, 256, (128, 24, 4)),
        ({"gate_hidden_size": 96}, 256, (24, 24, 4)),
        ({"gate_hidden_size": 24}, 256, (6, 24, 2)),
    ],
)
def test_a_familys_own_sizes_follow_width_as_it_says(said: dict[str, int], hidden: int, found: tuple[int, ...]) -> None:
    narrow = at(file(GATED, **said), hidden)
    assert sizes(narrow.model) == found
    assert not narrow.rounded
    fewer = "gate_groups 2, in the target 4, which do not divide gate_hidden_size 6: gates are coarser."
    assert list(narrow.notes) == ([fewer] if found[2] == 2 else [])


@pytest.mark.usefixtures("known")
def test_what_is_rounded_is_told() -> None:
    [rounded] = at(file(GATED, gate_hidden_size=90, gate_groups=1), 256).rounded
    assert (rounded.key, rounded.wider, float(rounded.exact), rounded.size) == ("gate_hidden_size", 90, 22.5, 22)


@pytest.mark.usefixtures("known")
def test_a_proxy_has_them_and_says_which_of_them_are_no_bottleneck() -> None:
    target = file(GATED, gate_hidden_size=96, gate_rank=300)
    proxy = choose_proxy(target, Search(trials=1, trial_tokens=1.0, target_tokens=100.0))
    assert sizes(proxy.model) == (24, 300, 4)
    assert any(note.startswith("gate_rank 300: kept") for note in proxy.notes)


@pytest.mark.usefixtures("known")
@pytest.mark.parametrize(("key", "grows"), [("gate_hidden_size", True), ("gate_rank", False), ("gate_groups", False)])
def test_tensors_of_ones_own_grow_with_them(key: str, grows: bool) -> None:
    own = {"name": "decoder.layers.*.mlp.own", "fan_out": key, "fan_in": "hidden_size"}
    model = file(GATED, custom_tensors=[own])
    tensor = next(each for each in shapes_of(model, model)[1].tensors if each.name == "decoder.layers.0.mlp.own")
    assert (tensor.fan_out.size, tensor.fan_out.grows) == (model.value_of(key), grows)


def test_heads_of_a_state_space_follow_width_and_their_channels_do_not() -> None:
    content = {**SIZES, "hybrid_layer_pattern": "M*-M", "mamba_num_heads": 48, "mamba_num_groups": 8}
    del content["num_layers"]
    narrow = at(file(content), 256)
    assert {key: narrow.model.value_of(f"mamba_{key}") for key in ("num_heads", "num_groups", "head_dim")} == {
        "num_heads": 12,
        "num_groups": 4,
        "head_dim": 64,
    }
    assert narrow.notes[0].startswith("mamba_num_groups 4, in the target 8, which do not divide mamba_num_heads 12")


def test_an_ffn_that_no_layer_reads_is_narrower_too() -> None:
    """Tensor parallelism divides it all the same, and it is the default of an expert's."""
    content = {**SIZES, "hybrid_layer_pattern": "**", "ffn_hidden_size": 3000}
    del content["num_layers"]
    assert at(file(content), 512).model.ffn_hidden_size == 1500
