"""The architectures of transformers that a trained model can become, one file each; `target.py` is what one has to say.

One is a file and a line in `registry.py`. They know Megatron's names from `layers.py`, and nothing of checkpoints.
"""
