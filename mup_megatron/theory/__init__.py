"""What μP says: roles, rules, plan. Pure Python on plain numbers: no torch, no Megatron, no files.

Start with `rules.py`.
"""

from mup_megatron.theory.errors import PlanError
from mup_megatron.theory.plan import (
    Hyperparameters,
    ModelShape,
    Override,
    Parametrization,
    Plan,
    PlanEntry,
    build_plan,
    family_of,
)
from mup_megatron.theory.roles import Dimension, Kind, Parameter, Role
from mup_megatron.theory.rules import Optimizer, Rule

__all__ = [
    "Dimension",
    "Hyperparameters",
    "Kind",
    "ModelShape",
    "Optimizer",
    "Override",
    "Parameter",
    "Parametrization",
    "Plan",
    "PlanEntry",
    "PlanError",
    "Role",
    "Rule",
    "build_plan",
    "family_of",
]
