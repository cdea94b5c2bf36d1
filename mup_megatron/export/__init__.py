"""A trained model → one of transformers, which stock software computes rightly: see docs/export.md.

weights.py        what an export takes: a plan, weights that are read one at a time, and what becomes of them
folds.py          a plan's multipliers → what is multiplied in which weights
architectures/    what a model can become: which models, under what configuration, each tensor from which rows
shards.py         tensors → files; tokenizers.py  what goes with them; staging.py  a folder that is whole or not there
export.py         all of it
folding.py        the folds of a checkpoint that stays in its format, and what says so beside it
opened.py         the trained model of a checkpoint, whoever saved it
kinds.py          which kind of Megatron's is at a path; trained.py  those of `mup-megatron train`
megatron_lm.py    those of Megatron-LM: distributed.py  in torch_dist, as train's; ranks.py  in torch, one file a rank
folded_….py       both formats written once more, folded or unfolded
hugging_face.py   a model of transformers that stays what it is; saved.py  as save_pretrained saves it, zero.py  as
                  DeepSpeed does, whose folders tags.py knows
"""
