"""Deliberate mistakes: what a check has to find, each as somebody might make it. Loaded only where one is asked for.

    mutant.py         one mistake, and of which run it is made
    live.py           the tensors and groups of a live run, as mistakes choose them
    conditions.py     when a mistake can be made, and changes anything
    forward.py        in the forward pass
    rules.py          of several rules at once: a wrong plan
    experts.py        about experts and their router
    latent.py         about latents, and what keeps its size between two sides that grow
    matrices.py       about optimizers that step matrices and leave the rest to another
    horizon.py        in how values are moved over batch and tokens
    depth.py          about depth, under a rule of it
    rates.py          in learning rates and their schedule
    optimizer.py      in eps, betas, clipping and weight decay
    initial.py        in initial weights

Most change a live run after it was built: its weights, its hooks, its optimizer's groups, its schedule.
`benchmarks/check_rates.py` counts how many are caught, and how many are named rightly. Importing this package imports
neither torch nor Megatron: the CPU runtime has to come before both.
"""

from mup_megatron.check.mutants.depth import DEPTH
from mup_megatron.check.mutants.experts import EXPERTS
from mup_megatron.check.mutants.forward import FORWARD
from mup_megatron.check.mutants.horizon import HORIZON
from mup_megatron.check.mutants.initial import INITIAL
from mup_megatron.check.mutants.latent import LATENT
from mup_megatron.check.mutants.matrices import MATRICES
from mup_megatron.check.mutants.mutant import Context, Mutant
from mup_megatron.check.mutants.optimizer import OPTIMIZER
from mup_megatron.check.mutants.rates import RATES
from mup_megatron.check.mutants.rules import RULES

__all__ = ["MUTANTS", "Context", "Mutant"]

MUTANTS: dict[str, Mutant] = {
    mutant.name: mutant
    for mutant in (*FORWARD, *RULES, *EXPERTS, *LATENT, *MATRICES, *HORIZON, *DEPTH, *RATES, *OPTIMIZER, *INITIAL)
}
"""By name."""
