"""The rules of μP, in pure Python on plain numbers: no torch, no Megatron, no files. Start with `rules.py`.

rules.py        the page: init, multipliers and attention, by role, each with its source
depth.py        the same for depth: what the layers of a deeper stack get
optimizers.py   one object per optimizer: learning rate, eps, weight decay, folding; matrices.py  Muon and Lion
horizon.py      the page on batch and tokens: how the base's values follow a run of another length
tensors.py      a tensor's sides, role and properties        widths.py  its sizes at base and target, and depths
sites.py        where forward factors act
branches.py     depth and branches, carried out on a plan's entries and places
build.py        shapes and hyperparameters → plan.py, the plan; matching.py finds a tensor's counterpart at the base
folding.py      multipliers into weights, and back
"""

from mup_megatron.theory.build import ModelShape, Override, Rules, Tuned, build_plan
from mup_megatron.theory.depth import CompleteP, Deepening
from mup_megatron.theory.errors import PlanError
from mup_megatron.theory.folding import Fold, fold, fold_attention, fold_branches, unfold
from mup_megatron.theory.horizon import HORIZON_RULES, Factors, HorizonRule, Ratios
from mup_megatron.theory.matching import family_of
from mup_megatron.theory.matrices import DEFAULT_SCALE_MODE, LION, MUON, SCALE_MODES
from mup_megatron.theory.optimizers import ADAM, SGD, Optimizer, optimizers
from mup_megatron.theory.plan import Plan, PlanEntry
from mup_megatron.theory.rules import Rule
from mup_megatron.theory.sites import BRANCH, READOUT, SOFTMAX, Acts, Heads, Place, Site
from mup_megatron.theory.tensors import (
    Constant,
    Kept,
    LibraryDraw,
    Normal,
    Part,
    Property,
    Role,
    Side,
    Start,
    Tensor,
)
from mup_megatron.theory.widths import Scaling, Sizes, Stack

__all__ = [
    "ADAM",
    "BRANCH",
    "DEFAULT_SCALE_MODE",
    "HORIZON_RULES",
    "LION",
    "MUON",
    "READOUT",
    "SCALE_MODES",
    "SGD",
    "SOFTMAX",
    "Acts",
    "CompleteP",
    "Constant",
    "Deepening",
    "Factors",
    "Fold",
    "Heads",
    "HorizonRule",
    "Kept",
    "LibraryDraw",
    "ModelShape",
    "Normal",
    "Optimizer",
    "Override",
    "Part",
    "Place",
    "Plan",
    "PlanEntry",
    "PlanError",
    "Property",
    "Ratios",
    "Role",
    "Rule",
    "Rules",
    "Scaling",
    "Side",
    "Site",
    "Sizes",
    "Stack",
    "Start",
    "Tensor",
    "Tuned",
    "build_plan",
    "family_of",
    "fold",
    "fold_attention",
    "fold_branches",
    "optimizers",
    "unfold",
]
