"""A plan → the fork's parameter groups, as ratios to the base's learning rate and weight decay. Holds no theory.

The fork's scheduler gives each group `lr_mult` times one learning rate and `wd_mult` times one weight decay at every
step, so the ratios hold during warm-up, at the peak and at the floor. An absolute `lr` in a group it would overwrite.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch

from mup_megatron.errors import InputError
from mup_megatron.megatron_deepspeed.names import named_parameters, unwrapped
from mup_megatron.modules.groups import Form, Group, members, values
from mup_megatron.modules.groups import param_groups as groups_of
from mup_megatron.theory import Plan


def param_groups(chunks: Sequence[torch.nn.Module], plan: Plan, *, every_group: bool) -> list[Group]:
    """Groups as the fork's `get_param_groups` returns them: name, params, lr_mult, wd_mult; and eps.

    Args:
        chunks: what this rank holds, wrapped or not.
        plan: for the whole model.
        every_group: give a group of which this rank holds nothing one element of its own, for DeepSpeed's pipeline.
    """
    held = ((name, parameter) for _, name, parameter in named_parameters(chunks))
    return groups_of(held, plan, form=Form.RATIO, pad_on=unwrapped(chunks[0]) if every_group else None)


def problems(chunks: Sequence[torch.nn.Module], plan: Plan, given: Iterable[Group]) -> list[str]:
    """Lists why the plan's groups cannot take the place of those that the fork made, if they cannot."""
    found = []
    given_of = {id(parameter): group for group in given for parameter in group["params"]}
    for fork_name, name, parameter in named_parameters(chunks):
        if not parameter.requires_grad:
            found.append(f"{fork_name}: it is frozen. Only training of all parameters is supported.")
            continue
        own = given_of.get(id(parameter), {})
        # Under ZeRO-3 the fork itself takes every parameter for a vector, because what is left of one is.
        decays = own.get("wd_mult", 1.0) != 0.0
        other_decay = not hasattr(parameter, "ds_shape") and decays == plan[name].is_vector
        if own.get("lr_mult", 1.0) != 1.0 or (own and other_decay):
            found.append(
                f"{fork_name}: the script gives it a learning rate or weight decay of its own, which the plan would "
                "replace. Say it with per_parameter in the recipe."
            )
    return found


def restore(groups: Iterable[Group], plan: Plan) -> None:
    """Gives the groups of a live optimizer the plan's values again, which a load replaces by those that were saved.

    Raises:
        InputError: the groups are not the plan's.
    """
    by_name = values(plan)
    for group in groups:
        if group.get("name") not in by_name:
            raise InputError(
                f"--load: the optimizer has a group {group.get('name')!r} now, which is not the plan's. Load the "
                "weights alone with --finetune."
            )
        group.update(by_name[group["name"]].as_keys(plan, Form.RATIO))


def tell_apart_the_same(before: Plan, now: Plan) -> bool:
    """Says if two plans for one model put the same parameters together."""
    left: Mapping[str, tuple[str, ...]] = members(before)
    return left == members(now)
