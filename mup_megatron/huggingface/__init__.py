"""Hugging Face models: a plan from two configurations, applied to a live model. It holds no theory.

recipe = load_recipe(path)
plan = plan_for(model, recipe)
apply_plan(model, plan)
optimizer = torch.optim.AdamW(param_groups(model.named_parameters(), plan), betas=recipe.moved.betas)
check_optimizer(optimizer, plan, model)
"""

from mup_megatron.huggingface import hooks
from mup_megatron.huggingface.configs import base_content
from mup_megatron.huggingface.folding import start_from
from mup_megatron.huggingface.plan import TESTED, plan_for
from mup_megatron.modules.apply import apply_plan
from mup_megatron.modules.groups import Form, param_groups
from mup_megatron.modules.optimizer_check import check_optimizer
from mup_megatron.modules.weights import Initialize

__all__ = [
    "TESTED",
    "Form",
    "Initialize",
    "apply_plan",
    "base_content",
    "check_optimizer",
    "param_groups",
    "plan_for",
    "start_from",
]

hooks.install()
