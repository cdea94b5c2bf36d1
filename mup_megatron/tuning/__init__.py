"""Tuning joins search and training: a trial is a training of the proxy, and the best one becomes a recipe.

Knows neither how trials are run (`search/`) nor what the hyperparameters do (`theory/`).
"""

from mup_megatron.tuning.cost import Target, rung_names, whole_trial_cost
from mup_megatron.tuning.fidelities import at_rung, ladder_for, narrower, settings_of
from mup_megatron.tuning.objective import DEFAULT_SPACE, SEARCHABLE, ProxyTraining, fixed_content
from mup_megatron.tuning.setup import SearchSetup, best_of
from mup_megatron.tuning.transfer import TargetRun, transferred

__all__ = [
    "DEFAULT_SPACE",
    "SEARCHABLE",
    "ProxyTraining",
    "SearchSetup",
    "Target",
    "TargetRun",
    "at_rung",
    "best_of",
    "fixed_content",
    "ladder_for",
    "narrower",
    "rung_names",
    "settings_of",
    "transferred",
    "whole_trial_cost",
]
