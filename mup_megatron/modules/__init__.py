"""The adapter to any `torch.nn.Module`: its shapes, a plan for it, and applying that plan. It holds no theory.

    recipe base     mup_megatron.modules.module_base(small_model, wider_model)
    plan            mup_megatron.modules.plan_for_module(large_model, recipe)
    live module     mup_megatron.modules.apply_plan(model, plan)
    optimizer       torch.optim.AdamW(mup_megatron.modules.param_groups(…, plan), betas=recipe.moved.betas)
    its kind        mup_megatron.modules.check_optimizer(optimizer, plan, model)

Hugging Face models have their own way to a plan (`huggingface/`), since their configurations say what grows.
"""

from mup_megatron.modules.applied import applied_plan
from mup_megatron.modules.apply import apply_plan
from mup_megatron.modules.groups import Form, param_groups
from mup_megatron.modules.optimizer_check import check_optimizer
from mup_megatron.modules.plan import module_base, plan_for_module
from mup_megatron.modules.weights import Initialize

__all__ = [
    "Form",
    "Initialize",
    "applied_plan",
    "apply_plan",
    "check_optimizer",
    "module_base",
    "param_groups",
    "plan_for_module",
]
