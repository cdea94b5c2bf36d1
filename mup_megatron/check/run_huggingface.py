"""A check of a Hugging Face configuration: its family of models at small widths, in plain torch or under DeepSpeed."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from transformers import PretrainedConfig

from mup_megatron.check.family import huggingface as family
from mup_megatron.check.family.cost import affordable
from mup_megatron.check.family.sizes import SEQUENCE, require_trainable
from mup_megatron.check.measure import levels
from mup_megatron.check.measure.levels import Level
from mup_megatron.check.measure.measurements import Report
from mup_megatron.check.run_modules import check_modules
from mup_megatron.check.subjects.deepspeed import PRECISIONS, Engines, fitting_configuration, process_group_of_deepspeed
from mup_megatron.check.subjects.scripts import Prepare, Schedule, prepare_by_plan, warm_up_and_decay
from mup_megatron.check.verdict.verdict import WITHOUT_DROPOUT, Verdict
from mup_megatron.errors import InputError
from mup_megatron.huggingface import configs
from mup_megatron.huggingface.plan import class_of, plan_for
from mup_megatron.recipe import HuggingFaceBase, Recipe


def check_hugging_face(
    config: PretrainedConfig,
    recipe: Recipe,
    *,
    deepspeed: Path | None = None,
    level: Level = Level.QUICK,
    widths: Sequence[int] | None = None,
    seeds: int = levels.SEEDS,
    first_seed: int = 1,
    report: Report | None = None,
    processes: int | None = None,
    tell: Callable[[str], None] | None = None,
) -> Verdict:
    """Returns a verdict on a configuration that is trained with a recipe. Collective under torchrun, with DeepSpeed.

    Args:
        config: what is to be trained; as `targets.hugging_face_config` reads it.
        recipe: with which it is; its base is a configuration too.
        deepspeed: the configuration of the engine that is checked, with a "mup" entry. None: plain torch.
        level: how much is looked at.
        widths: of the models, in the configuration's own key for it; by default `family.huggingface.widths_for`.
        seeds: of each width.
        first_seed: the first of them.
        report: called as models are done.
        processes: how many train at once, in plain torch; by default as many as there are cores.
        tell: called before the first model is trained, with how many there will be and about how long it takes.

    Raises:
        InputError: no model of a width can be built, or configuration and recipe do not go together.
    """
    if not isinstance(recipe.base, HuggingFaceBase):
        raise InputError(
            "the recipe's base is not a Hugging Face configuration, and the target is. Give the recipe a base with a "
            "model_type; `mup-megatron recipe --base config.json` writes one."
        )
    base = configs.config_of_base(recipe.base)
    configs.require_comparable(base, config)
    model_class = class_of(config, base)
    depth = family.depth_of(config)
    whole, whole_base = config, base
    small, base, recipe_here = family.smallest_that_builds(model_class, config, base, recipe)
    small, cut = family.with_few_tokens(small, base, recipe_here)

    def factory(width: int) -> nn.Module:
        constructor: Callable[[PretrainedConfig], nn.Module] = model_class
        with configs.quiet():
            return constructor(family.at_width(small, base, width))

    def shapes(width: int) -> dict[str, torch.Size]:
        with torch.device("meta"), configs.refused(f"{model_class.__name__} cannot be built at width {width}"):
            return {name: parameter.shape for name, parameter in factory(width).named_parameters()}

    remarks = [WITHOUT_DROPOUT] if family.drops(config) else []
    remarks += family.remarks_on_size(small, config, base)
    if widths is None:
        usual = family.widths_for(small, base, levels.WIDTHS)
        chosen, fewer = affordable(usual, lambda width: [*shapes(width).values()], tokens=SEQUENCE)
        remarks += fewer
    else:
        chosen = list(widths)
    if min(chosen) < family.width_of(base):
        cut = family.with_narrow_base(cut, family.at_width(small, base, min(chosen)), family.growing_keys(small, base))
        remarks.append(
            f"The base is {family.width_of(base)} wide; in the check it is as wide as the narrowest model, "
            f"{min(chosen)}: a plan leads from a base to what is wider."
        )

    require_trainable(shapes(max(chosen)), max(chosen))

    def judged(prepare: Prepare, schedule: Schedule) -> Verdict:
        verdict = check_modules(
            factory,
            cut,
            widths=chosen,
            prepare=prepare,
            schedule=schedule,
            level=level,
            seeds=seeds,
            first_seed=first_seed,
            remarks=remarks,
            report=report,
            processes=processes,
            tell=tell,
            deep=None
            if family.depth_of(small) == depth
            else family.of_full_depth(model_class, whole, whole_base, recipe),
        )
        return replace(verdict, fingerprint=recipe.fingerprint)

    if deepspeed is None:
        return judged(prepare_by_plan, warm_up_and_decay)
    content = fitting_configuration(deepspeed, recipe, plan_for(config, recipe))
    if any(key in content for key in PRECISIONS):
        remarks.append("The engine of the check computes in single precision, so that differences are not rounding.")
    with process_group_of_deepspeed(), tempfile.TemporaryDirectory() as folder:
        engines = Engines(content, Path(folder), recipe)
        return judged(engines.prepare, engines.schedule)
