"""The correct runs: plain torch that shares nothing with the adapters but the plan.

gpt.py            of a GPT: a plan carried out by hand, ready to train
modules.py        of a torch module: a plan carried out by hand on the model's own code
cache.py          keeps them on disk
"""
