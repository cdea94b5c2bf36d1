"""Some of these files import Megatron to see whether it has what they test. Others of one process need the CPU runtime,
and must not find Megatron imported without it, whatever tests are chosen.
"""

from mup_megatron.megatron import cpu

cpu.enable()
