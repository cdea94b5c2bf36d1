"""A trained model → one of transformers, which stock software computes rightly: see docs/export.md.

weights.py        what an export takes: a model file, a plan, and weights that are read one at a time
folds.py          a plan's multipliers → what is multiplied in which weights
architectures/    what a model can become: which models, under what configuration, each tensor from which rows
shards.py         tensors → files; tokenizers.py  what goes with them
export.py         all of it, into a folder that is whole or not there
trained.py        checkpoints of `mup-megatron train`
"""
