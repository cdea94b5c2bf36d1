"""Megatron-Core's `GPTModel`: every layer is attention, and an MLP or experts."""

from collections.abc import Sequence
from typing import Any, ClassVar

from mup_megatron.architectures.command_line import CommandLine
from mup_megatron.architectures.decoder import Decoder
from mup_megatron.architectures.families import ATTENTION, EXPERTS, LATENT_ATTENTION, MLP, Family
from mup_megatron.architectures.model_file import ModelFile

_PROGRAMS = (
    "pretrain_gpt.py",
    "pretrain_gpt_core.py",
    "finetune_gpt.py",
    "finetune_llama.py",
    "generate_samples_gpt.py",
    "gpt_dynamic_inference.py",
    "gpt_dynamic_inference_with_coordinator.py",
    "gpt_static_inference.py",
    "offline_inference.py",
    "launch_inference_server.py",
    "run_text_generation_server.py",
    "run_dynamic_text_generation_server.py",
    "run_inference_performance_test.py",
    "report_theoretical_memory.py",
)


class Gpt(Decoder):
    """The architecture of a model file that says no other."""

    name: ClassVar[str] = "gpt"
    description: ClassVar[str] = "a GPT"
    file: ClassVar[type[ModelFile]] = ModelFile
    live_classes: ClassVar[tuple[str, ...]] = ("GPTModel",)
    builder: ClassVar[str] = "mup_megatron.megatron.builders.gpt"
    command_line: ClassVar[CommandLine] = CommandLine(programs=_PROGRAMS, providers=("gpt",))
    branches: ClassVar[int] = 2

    def layers(self, model: ModelFile) -> Sequence[Sequence[Family]]:
        """Returns attention, and an MLP or experts, for each layer."""
        attention: Family = LATENT_ATTENTION if model.multi_latent_attention else ATTENTION
        return [(attention, EXPERTS if model.has_experts(layer) else MLP) for layer in range(model.num_layers)]

    def with_layers(self, model: ModelFile, kept: Sequence[int]) -> ModelFile:
        """Returns the model with these of its layers."""
        changes: dict[str, Any] = {"num_layers": len(kept)}
        if model.num_experts is not None and model.moe_layer_freq != 1:
            changes["moe_layer_freq"] = tuple(int(model.has_experts(layer)) for layer in kept)
        return model.model_copy(update=changes)

    def with_depth(self, model: ModelFile, layers: int) -> ModelFile:
        """Returns the model with as many of its layers, evenly spread, and at least one of each kind if there is room.

        Those of all layers that are alike, and of a pattern that repeats itself, are its first. A layer of multi-token
        prediction is of the last one's kind, which stays: of a pattern there may be fewer layers for that.
        """
        last = model.num_layers - 1
        if model.num_experts is None or isinstance(model.moe_layer_freq, int):
            if model.mtp_num_layers:
                alike = (n for n in range(layers, 0, -1) if model.has_experts(n - 1) is model.has_experts(last))
                layers = next(alike, layers)
            return model.model_copy(update={"num_layers": layers})
        kept = [index * model.num_layers // layers for index in range(layers)]
        if model.mtp_num_layers:
            kept[-1] = last
        for kind in (False, True):
            of_kind = [layer for layer in range(model.num_layers) if model.has_experts(layer) is kind]
            if of_kind and not any(layer in of_kind for layer in kept):
                kept[0 if of_kind[0] <= kept[0] else -1] = of_kind[0]
        return self.with_layers(model, sorted(kept))


GPT = Gpt()
