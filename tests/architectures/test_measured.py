"""What an architecture says that a check looks at, held against the model itself: names, order, and what is read."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.added_architecture import BankArchitecture, BankFile
from support.shapes import batch, encoder, gpt, hybrid
from torch import Tensor, nn

from mup_megatron.architectures import registry
from mup_megatron.architectures.decoder import Decoder
from mup_megatron.architectures.measured import Kind, Measured
from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.architectures.plain.model import plain_model
from mup_megatron.architectures.registry import architecture_of
from mup_megatron.training.samples import prepared

UNTIED: dict[str, Any] = {
    "untie_embeddings_and_output_weights": True,
    "position_embedding_type": "rope",
    "swiglu": True,
    "normalization": "RMSNorm",
}
UNTIED_ENCODER: dict[str, Any] = {"untie_embeddings_and_output_weights": True}
MODELS = {
    "GPT": gpt(),
    "GPT with norms of queries and keys": gpt(**UNTIED, qk_layernorm=True),
    "GPT with experts": gpt(num_experts=4, moe_shared_expert_intermediate_size=48, add_bias_linear=False),
    "hybrid": hybrid(gpt(), "--*-*"),
    "hybrid, untied": hybrid(gpt(**UNTIED), "*-"),
    "GPT with multi-token prediction": gpt(mtp_num_layers=2, position_embedding_type="rope"),
    "hybrid with multi-token prediction": hybrid(gpt(position_embedding_type="rope"), "-*/*--/*--"),
    "BERT": encoder("bert"),
    "BERT without a binary head, untied": encoder("bert", bert_binary_head=False, **UNTIED_ENCODER),
    "T5": encoder("t5", decoder_num_layers=3),
    "T5, relative positions, untied": encoder("t5", position_embedding_type="relative", **UNTIED_ENCODER),
    "a model of banks": BankFile(**dict(gpt()), architecture="bank"),
}


Call = tuple[Tensor, Tensor]
"""What is looked at, and the output."""


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
        self.plain, self.measured = plain_model(model), measured(model)
        for parameter in self.plain.parameters():
            nn.init.normal_(parameter, std=0.3)
        tokens, labels = batch(model, 0)
        self.batch = prepared(model, {"tokens": tokens, "labels": labels, "loss_mask": torch.ones(labels.shape)})

    def passed(self, kept: dict[str, list[Tensor]] | None = None, *, but: str = "") -> dict[str, list[Call]]:
        """What is looked at of each module at each of its calls, and what it gives, in order.

        With `kept`, modules give that, and all others but one half as much more than they would.
        """
        found: dict[str, list[Call]] = {}

        def hook(name: str) -> Any:
            def watch(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
                calls = found.setdefault(name, [])
                calls.append((args[0] if self.measured[name].kind is Kind.LOGITS else output, output))
                if kept is None or name == but:
                    return None
                return kept[name][len(calls) - 1] if name in kept else 1.5 * output

            return watch

        hooks = [self.plain.get_submodule(name).register_forward_hook(hook(name)) for name in self.measured]
        with torch.no_grad():
            self.plain.loss(self.batch)
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
        kept = {read: [output for _, output in usual[read]] for read in each.reads}
        # Of several calls the last one counts: what a model's own readout gives, not what those of further tokens do.
        assert torch.equal(watched.passed(kept, but=name)[name][-1][0], usual[name][-1][0]), name


def test_each_layer_adds_its_branches_to_the_stream(model: ModelFile) -> None:
    of = measured(model)
    branches = [name for name, each in of.items() if each.kind is Kind.BRANCH]
    read_by_layers = [read for each in of.values() if each.kind is Kind.STREAM for read in each.reads]
    assert [read for read in read_by_layers if read in branches] == branches
    own = architecture_of(model)
    within = own.further_layers(model).values() if isinstance(own, Decoder) and model.mtp_num_layers else []
    further = (model.mtp_num_layers or 0) * sum(len(families) for families in within)
    assert len(branches) == registry.depth_of(model) + further


def test_each_title_has_what_leads(model: ModelFile) -> None:
    of = measured(model).values()
    assert {each.panel for each in of if each.leads} == {each.panel for each in of}
    ends = (Kind.BRANCH, Kind.LOGITS, Kind.STREAM, Kind.READOUT)
    assert all(each.leads for each in of if each.kind in ends)
