"""Hyperparameter search on Optuna. Knows trials and losses; nothing of μP, Megatron or torch."""

from mup_megatron.search.fit import Basin, Fit, fitted
from mup_megatron.search.ladder import Fidelity, Ladder, Rung, choose_ladder
from mup_megatron.search.objective import Interruption, Objective, Objectives, ReportFn, Resumable, TrialOutcome
from mup_megatron.search.results import write_results
from mup_megatron.search.selection import Selection
from mup_megatron.search.space import Space, load_space
from mup_megatron.search.storage import default_storage, shown
from mup_megatron.search.stored import best_trial, find_study, read_study
from mup_megatron.search.study import StudyRecord, StudySpec, Trial
from mup_megatron.search.sweep import SweepResult, run_sweep
from mup_megatron.search.worker import Launch

__all__ = [
    "Basin",
    "Fidelity",
    "Fit",
    "Interruption",
    "Ladder",
    "Launch",
    "Objective",
    "Objectives",
    "ReportFn",
    "Resumable",
    "Rung",
    "Selection",
    "Space",
    "StudyRecord",
    "StudySpec",
    "SweepResult",
    "Trial",
    "TrialOutcome",
    "best_trial",
    "choose_ladder",
    "default_storage",
    "find_study",
    "fitted",
    "load_space",
    "read_study",
    "run_sweep",
    "shown",
    "write_results",
]
