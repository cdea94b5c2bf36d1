"""An architecture that the package does not know: layers of attention and of a bank of small experts behind a router.

Everything that it is to the package stands here: what its model files say, its tensors with what the core can say of
them (a router that is an output and folded, experts in one 3-D tensor, a bottleneck of a fixed size), how Megatron-Core
builds it, and the same layer in plain torch. `build` is what a builder's module has.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from mup_megatron.architectures.decoder import Decoder
from mup_megatron.architectures.families import ATTENTION, Family, Growth, norm
from mup_megatron.architectures.measured import STREAM, Kind, Measured, inside
from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.theory import Property, Role, Side, Tensor

EXPERTS = 4
RANK = 8


class BankFile(ModelFile):
    architecture: Literal["bank"] = "bank"


class Bank(Family):
    """A residual branch: experts of rank 8, mixed by a router's softmax."""

    name = "bank"

    def tensors(self, model: ModelFile, layer: str, growth: Growth) -> Iterator[Tensor]:
        hidden = Side(model.hidden_size, grows=True)
        yield from norm(model, f"{layer}.pre_mlp_layernorm.", hidden)
        yield Tensor(
            name=f"{layer}.mlp.router",
            shape=(EXPERTS, hidden.size),
            fan_in=hidden,
            fan_out=Side(EXPERTS),
            properties=frozenset({Property.FOLDED}),
        )
        yield Tensor(
            name=f"{layer}.mlp.down",
            shape=(EXPERTS, RANK, hidden.size),
            fan_in=hidden,
            fan_out=Side(RANK),
            properties=frozenset({Property.EXPERT}),
            declared_role=Role.HIDDEN,
        )
        yield Tensor(
            name=f"{layer}.mlp.up",
            shape=(EXPERTS, hidden.size, RANK),
            fan_in=Side(RANK),
            fan_out=hidden,
            properties=frozenset({Property.EXPERT, Property.RESIDUAL}),
            declared_role=Role.HIDDEN,
        )

    def measured(self, model: ModelFile, layer: str) -> Iterator[Measured]:
        norm = f"{layer}.pre_mlp_layernorm"
        yield inside(norm, "Bank output", STREAM)
        yield Measured(f"{layer}.mlp", Kind.BRANCH, "Bank output", (norm,), leads=True)

    def flops(self, model: ModelFile) -> Mapping[str, float]:
        return {"bank": 6.0 * EXPERTS * model.hidden_size * (1 + 2 * RANK)}

    def plain(self, model: ModelFile, softmax_scale: float) -> tuple[str, str, nn.Module]:
        return "pre_mlp_layernorm", "mlp", PlainBank(model.hidden_size)


BANK = Bank()


class PlainBank(nn.Module):
    """[…, hidden] → the same."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.router = nn.Parameter(torch.empty(EXPERTS, hidden))
        self.down = nn.Parameter(torch.empty(EXPERTS, RANK, hidden))
        self.up = nn.Parameter(torch.empty(EXPERTS, hidden, RANK))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        share = (x @ self.router.T).softmax(-1)
        inside = torch.einsum("erh,...h->...er", self.down, x).tanh()
        return torch.einsum("...e,ehr,...er->...h", share, self.up, inside)


class BankArchitecture(Decoder):
    """Every layer is attention and a bank."""

    name: ClassVar[str] = "bank"
    description: ClassVar[str] = "a model of banks"
    file: ClassVar[type[ModelFile]] = BankFile
    live_classes: ClassVar[tuple[str, ...]] = ("BankModel",)
    builder: ClassVar[str] = "support.added_architecture"
    branches: ClassVar[int] = 2

    def layers(self, model: ModelFile) -> Sequence[Sequence[Family]]:
        return [(ATTENTION, BANK)] * model.num_layers

    def with_layers(self, model: ModelFile, kept: Sequence[int]) -> ModelFile:
        return model.model_copy(update={"num_layers": len(kept)})


# ---- live ----------------------------------------------------------------------------------------------------------


def build(model: ModelFile, config: Any, stage: int | None) -> nn.Module:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.spec_utils import ModuleSpec

    from mup_megatron.megatron.builders.common import arguments

    class BankModel(GPTModel):  # type: ignore[misc]
        pass

    spec = get_gpt_layer_local_spec(normalization=model.normalization)
    spec.submodules.mlp = ModuleSpec(module=_live_bank())
    chunk = BankModel(transformer_layer_spec=spec, vp_stage=stage, **arguments(model, config, stage))
    assert isinstance(chunk, nn.Module)
    return chunk


def _live_bank() -> Any:
    from megatron.core.transformer.module import MegatronModule

    class LiveBank(MegatronModule):  # type: ignore[misc]
        def __init__(self, config: Any, **_: Any) -> None:
            super().__init__(config=config)
            bank = PlainBank(config.hidden_size)
            config.init_method(bank.router)
            config.init_method(bank.down)
            config.output_layer_init_method(bank.up)
            self.router, self.down, self.up = bank.router, bank.down, bank.up

        def forward(self, x: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, None]:
            return PlainBank.forward(self, x), None

    return LiveBank
