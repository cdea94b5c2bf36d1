"""`python -m mup_megatron`: the command line, as torchrun starts it."""

from mup_megatron.cli.main import main

main()
