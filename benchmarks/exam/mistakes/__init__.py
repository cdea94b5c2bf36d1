"""The mistakes of the exam: each a function from a right set-up to one in which somebody has made it.

Each says what was done, and what it breaks: the *plan*, where the run does not do what the recipe says, or the
*transfer*, where the model's own code follows width in a way that no recipe knows.
"""

from exam.mistakes import hugging_face, megatron, model_code, optimizers, recipes, training_loop, weights
from exam.mistakes.entries import MISTAKES, Mistake

__all__ = [
    "MISTAKES",
    "Mistake",
    "hugging_face",
    "megatron",
    "model_code",
    "optimizers",
    "recipes",
    "training_loop",
    "weights",
]
