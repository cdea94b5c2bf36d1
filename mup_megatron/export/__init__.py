"""A trained model → one of transformers, which stock software computes rightly: see docs/export.md.

weights.py        what an export takes: a model file, a plan, and weights that are read one at a time
folds.py          a plan's multipliers → what is multiplied in which weights
architectures/    what a model can become: which models, under what configuration, each tensor from which rows
shards.py         tensors → files; tokenizers.py  what goes with them; staging.py  a folder that is whole or not there
export.py         all of it
folding.py        the folds of a checkpoint that stays in its format, and what says so beside it
kinds.py          which kind of checkpoint is at a path; trained.py  those of `mup-megatron train`
"""
