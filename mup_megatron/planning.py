"""The plan that tuned values make for the shapes of a base and a target."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from mup_megatron import theory
from mup_megatron.hyperparameters import Hyperparameters, Parametrization, PerParameter


def planned(
    base: theory.ModelShape,
    target: theory.ModelShape,
    values: Hyperparameters,
    parametrization: Parametrization,
    per_parameter: Sequence[PerParameter],
    *,
    fingerprint: str,
) -> theory.Plan:
    """Returns what every parameter of `target` gets.

    Args:
        base: at which the values were tuned.
        target: what is to be trained.
        values: as the target's run has them.
        parametrization: the rules in use.
        per_parameter: overrides of single tensors.
        fingerprint: of the recipe that says all this.

    Raises:
        PlanError: the shapes do not fit each other, or an override matches nothing.
    """
    depth = parametrization.depth
    optimizer = theory.optimizers()[parametrization.optimizer].given(values.model_dump())
    return theory.build_plan(
        base,
        target,
        theory.Tuned(
            lr=values.lr,
            min_lr=values.min_lr,
            init_method_std=values.init_method_std,
            embedding_multiplier=values.embedding_multiplier,
            output_multiplier=values.output_multiplier,
            attention_multiplier=values.attention_multiplier,
            weight_decay=values.weight_decay,
            adam_eps=values.adam_eps,
            residual_multiplier=values.residual_multiplier,
        ),
        rules_used=theory.Rules(
            rule=theory.Rule(parametrization.rule),
            optimizer=optimizer,
            weight_decay_exponent=parametrization.weight_decay_exponent,
            router=theory.Role(parametrization.router),
            depth=None if depth is None else theory.CompleteP(depth.alpha),
        ),
        overrides=[theory.Override(**own.model_dump()) for own in per_parameter],
        settings=_settings(values, optimizer),
        fingerprint=fingerprint,
    )


def _settings(values: Hyperparameters, optimizer: theory.Optimizer) -> Mapping[str, Any]:
    """Returns what a recipe says of an optimizer, and of those that it leaves tensors to, beside `Tuned`."""
    read = {each.name for each in fields(theory.Tuned)}
    keys = [key for each in (optimizer, *optimizer.others) for key in each.hyperparameters if key not in read]
    return {key: getattr(values, key) for key in keys}
