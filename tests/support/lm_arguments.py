"""Megatron-LM's own argument parser, where the installed Megatron-Core brings it along."""

import argparse

import pytest


def parser_of_megatron() -> argparse.ArgumentParser:
    """The parser as `megatron.training` makes it, before anything of ours is added."""
    arguments = pytest.importorskip("megatron.training.arguments", reason="megatron-core 0.16 has no megatron.training")
    parser = argparse.ArgumentParser(description="Megatron-LM Arguments", allow_abbrev=False)
    added: argparse.ArgumentParser = arguments.add_megatron_arguments(parser)
    return added
