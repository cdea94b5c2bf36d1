"""The parts of models: configuration → parameter names and global shapes. Allocates nothing, needs no torch.

registry.py        model files, and which architectures there are      model_file.py   what a model file says
decoder.py         what an architecture has to say                      families.py     the kinds of layers
command_line.py    its programs and flags, made of flag.py              names.py        names of the parts of all
cost.py            FLOPs and parameters      proxy.py   a proxy         plain.py        the same layers in plain torch
"""

from mup_megatron.architectures.command_line import CommandLine, Reading
from mup_megatron.architectures.decoder import Decoder
from mup_megatron.architectures.flag import Flag
from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.architectures.registry import architecture_of, load_model_file, model_file, register

__all__ = [
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
