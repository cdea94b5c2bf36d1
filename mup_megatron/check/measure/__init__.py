"""Trains one model for a few steps and measures it, whoever built it. What subject and reference share is here.

measurements.py   what is measured: quantities, keys, runs; plain numbers
levels.py         how much is looked at: steps, widths, seeds
trainee.py        what a model has to answer to be measured
measuring.py      trains and measures one
directions.py     Muon and Lion: their steps, an optimizer of them, and how they are read back
replay.py         learning rate, eps and weight decay, read from how weights moved
optimizers.py     what a check asks of a recipe's optimizer
matrices.py       numbers that need whole matrices
names.py          which modules of a GPT are looked at; layers in names
batches.py        what the models learn
dropout.py        off, while torch modules are checked
workers.py        runs in several processes
"""
