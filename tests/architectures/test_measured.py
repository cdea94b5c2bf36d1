"""What an architecture says that a check looks at, held against the model itself: names, order, and what is read."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.added_architecture import BankArchitecture, BankFile
from support.shapes import gpt, hybrid
from torch import Tensor, nn

from mup_megatron.architectures import registry
from mup_megatron.architectures.measured import Kind, Measured
from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.architectures.plain.decoder import PlainDecoder
from mup_megatron.architectures.registry import architecture_of

UNTIED: dict[str, Any] = {
    "untie_embeddings_and_output_weights": True,
    "position_embedding_type": "rope",
    "swiglu": True,
    "normalization": "RMSNorm",
}
MODELS = {
    "GPT": gpt(),
    "GPT with norms of queries and keys": gpt(**UNTIED, qk_layernorm=True),
    "GPT with experts": gpt(num_experts=4, moe_shared_expert_intermediate_size=48, add_bias_linear=False),
    "hybrid": hybrid(gpt(), "--*-*"),
    "hybrid, untied": hybrid(gpt(**UNTIED), "*-"),
    "a model of banks": BankFile(**dict(gpt()), architecture="bank"),
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Iterator[ModelFile]:
    registry.register(BankArchitecture())
    yield MODELS[request.param]
    del registry._ARCHITECTURES["bank"]


def measured(model: ModelFile) -> dict[str, Measured]:
    return {each.module: each for each in architecture_of(model).measured(model)}


class Watched:
    """A plain model, and what is looked at in a forward pass of it, with some outputs replaced or enlarged."""

    def __init__(self, model: ModelFile) -> None:
        torch.manual_seed(0)
        self.plain, self.measured = PlainDecoder(model), measured(model)
        for parameter in self.plain.parameters():
            nn.init.normal_(parameter, std=0.3)
        self.tokens = torch.randint(model.vocab_size, (2, model.seq_length))

    def passed(self, kept: dict[str, Tensor] | None = None, *, but: str = "") -> dict[str, tuple[Tensor, Tensor]]:
        """What is looked at of each module, and what it gives, in order.

        With `kept`, modules give that, and all others but one half as much more than they would.
        """
        found: dict[str, tuple[Tensor, Tensor]] = {}

        def hook(name: str) -> Any:
            def watch(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
                found[name] = (args[0] if self.measured[name].kind is Kind.LOGITS else output, output)
                return None if kept is None or name == but else kept.get(name, 1.5 * output)

            return watch

        hooks = [self.plain.get_submodule(name).register_forward_hook(hook(name)) for name in self.measured]
        with torch.no_grad():
            self.plain(self.tokens)
        for each in hooks:
            each.remove()
        return found


def test_all_are_there_in_the_order_of_a_forward_pass(model: ModelFile) -> None:
    watched = Watched(model)
    assert list(watched.passed()) == list(watched.measured)


def test_nothing_but_what_is_read_changes_what_is_seen(model: ModelFile) -> None:
    watched = Watched(model)
    usual = watched.passed()
    for name, each in watched.measured.items():
        kept = {read: usual[read][1] for read in each.reads}
        assert torch.equal(watched.passed(kept, but=name)[name][0], usual[name][0]), name


def test_each_layer_adds_its_branches_to_the_stream(model: ModelFile) -> None:
    of = measured(model)
    branches = [name for name, each in of.items() if each.kind is Kind.BRANCH]
    read_by_layers = [read for each in of.values() if each.kind is Kind.STREAM for read in each.reads]
    assert [read for read in read_by_layers if read in branches] == branches
    assert len(branches) == registry.depth_of(model)


def test_each_title_has_what_leads(model: ModelFile) -> None:
    of = measured(model).values()
    assert {each.panel for each in of if each.leads} == {each.panel for each in of}
    ends = (Kind.BRANCH, Kind.LOGITS, Kind.STREAM, Kind.READOUT)
    assert all(each.leads for each in of if each.kind in ends)
