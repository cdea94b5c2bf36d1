"""Keys of model files that only some kinds of layers have, one file each, with the flags of Megatron's that say them.

A model file's class takes a kind's keys by deriving from it, and its command line takes the flags.
"""
