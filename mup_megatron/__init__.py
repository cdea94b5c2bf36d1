"""μP for Megatron: tune a small model, train a large one with the same hyperparameters."""

__version__ = "0.2.0"
