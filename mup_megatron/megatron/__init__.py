"""The adapter to Megatron-Core: applies a plan to a live model and optimizer. It holds no theory.

Importing it in a script that trains with `megatron.training`, when the command line has one of the `--mup-*` flags of
`pretrain/flags.py`, is all that the script needs. Without such a flag nothing of Megatron is touched, and in no case is
it imported here: the CPU runtime has to come before.
"""

import sys

from mup_megatron.megatron.pretrain import hooks

hooks.install_if_asked(sys.argv[1:])
