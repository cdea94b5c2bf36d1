"""The small models that stand for a target, and the recipe that they are trained with.

sizes.py          how small, whatever they are of; what no check can train
gpt.py            of a GPT: its dimensions at several widths
layers.py         which of a GPT's layers are trained
huggingface.py    of a Hugging Face configuration: its keys at several widths
stress.py         the recipe with values at which a mistake shows
cost.py           what a check costs, and which widths that leaves
"""
