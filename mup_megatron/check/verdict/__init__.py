"""A verdict: what is off, why, and what it comes to. Plain numbers and plans; who trains is passed in.

verdict.py        the verdict and its parts
comparison.py     subject against reference: slopes and levels, beyond seeds
bounds.py         what holds of every right model, for those that share their code with the reference
causes/           which mistake looks like that
depth.py          every layer of the target, once, without training
later.py          the steps beyond those of a quick check
wider.py          the loss over widths
basins.py         the best learning rate over widths
judge.py          all of it together
"""
