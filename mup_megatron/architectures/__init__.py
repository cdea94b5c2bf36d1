"""The parts of models: configuration → parameter names and global shapes. Allocates nothing, needs no torch."""

from mup_megatron.architectures.architecture import Architecture
from mup_megatron.architectures.command_line import CommandLine, Reading
from mup_megatron.architectures.decoder import Decoder
from mup_megatron.architectures.flag import Flag
from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.architectures.registry import architecture_of, load_model_file, model_file, register

__all__ = [
    "Architecture",
    "CommandLine",
    "Decoder",
    "Flag",
    "ModelFile",
    "Reading",
    "architecture_of",
    "load_model_file",
    "model_file",
    "register",
]
