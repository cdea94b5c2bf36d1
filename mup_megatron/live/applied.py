"""The registry of which plan was applied to which live model, for all adapters. It keeps no model alive."""

import weakref

import torch

from mup_megatron.theory import Plan

_applied: "weakref.WeakKeyDictionary[torch.nn.Module, Plan]" = weakref.WeakKeyDictionary()


def note_applied(model: torch.nn.Module, plan: Plan) -> None:
    """Notes that a plan was applied to a model, which is not wrapped."""
    _applied[model] = plan


def plan_applied_to(model: torch.nn.Module) -> Plan | None:
    """Returns the plan that was applied to a model, which is not wrapped; None if none was."""
    return _applied.get(model)
