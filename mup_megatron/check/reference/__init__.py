"""The correct runs: plain torch that shares nothing with the adapters but the plan.

gpt.py            of a GPT: a plan carried out by hand, ready to train
plain_gpt.py      what Megatron-Core's GPTModel computes, without Megatron
modules.py        of a torch module: a plan carried out by hand on the model's own code
cache.py          keeps them on disk
"""
