"""Megatron-Core's `GPTModel`: every layer is attention and an MLP."""

from collections.abc import Sequence
from typing import ClassVar

from mup_megatron.architectures.command_line import CommandLine
from mup_megatron.architectures.decoder import Decoder
from mup_megatron.architectures.families import ATTENTION, MLP, Family
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
    command_line: ClassVar[CommandLine] = CommandLine(programs=_PROGRAMS)
    branches: ClassVar[int] = 2

    def layers(self, model: ModelFile) -> Sequence[Sequence[Family]]:
        """Returns attention and an MLP for each layer."""
        return [(ATTENTION, MLP)] * model.num_layers

    def with_layers(self, model: ModelFile, kept: Sequence[int]) -> ModelFile:
        """Returns the model with as many layers: all are alike."""
        return model.model_copy(update={"num_layers": len(kept)})


GPT = Gpt()
