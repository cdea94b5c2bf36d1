"""The plan that tuned values make for the shapes of a base and a target."""

from collections.abc import Mapping, Sequence
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
    optimizer_values: Mapping[str, Any],
    fingerprint: str,
) -> theory.Plan:
    """Returns what every parameter of `target` gets.

    Args:
        base: at which the values were tuned.
        target: what is to be trained.
        values: as the target's run has them.
        parametrization: the rules in use.
        per_parameter: overrides of single tensors.
        optimizer_values: those of them that not every optimizer reads, for whoever looks at a live one.
        fingerprint: of the recipe that says all this.

    Raises:
        PlanError: the shapes do not fit each other, or an override matches nothing.
    """
    depth = parametrization.depth
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
            optimizer=theory.optimizers()[parametrization.optimizer].given(values.model_dump()),
            weight_decay_exponent=parametrization.weight_decay_exponent,
            router=theory.Role(parametrization.router),
            depth=None if depth is None else theory.CompleteP(depth.alpha),
        ),
        overrides=[theory.Override(**own.model_dump()) for own in per_parameter],
        optimizer_values=optimizer_values,
        fingerprint=fingerprint,
    )
