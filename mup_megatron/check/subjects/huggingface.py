"""A check of a Hugging Face configuration: its family of models at small widths, in plain torch or under DeepSpeed.

Every ratio of widths is the target's; what base and target share stays fixed. The size of heads, the number of groups
and the depth are cut in both where the configuration's keys allow it, and vocabulary and positions always.
"""

import contextlib
import copy
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import distributed, nn
from transformers import PretrainedConfig

from mup_megatron.check.measure import levels
from mup_megatron.check.measure.cost import affordable
from mup_megatron.check.measure.measurements import Report
from mup_megatron.check.measure.sizes import require_trainable
from mup_megatron.check.subjects.family import DEPTH, FLOOR, HEAD, SMALLEST
from mup_megatron.check.subjects.modules import (
    LENGTH,
    VOCABULARY,
    Prepare,
    Schedule,
    Task,
    check_modules,
    prepare_by_plan,
    warm_up_and_decay,
)
from mup_megatron.check.verdict.verdict import WITHOUT_DROPOUT, Level, Verdict
from mup_megatron.errors import InputError
from mup_megatron.huggingface import configs
from mup_megatron.huggingface.plan import plan_for
from mup_megatron.json_io import read_json
from mup_megatron.recipe import HuggingFaceBase, Recipe, save_recipe
from mup_megatron.theory import Plan
from mup_megatron.training.ranks import process_group
from mup_megatron.validation import brief

_WIDTH_KEYS = ("hidden_size", "n_embd", "d_model", "embedding_size")
_DROPOUT = re.compile(r".*dropout.*|.*pdrop|.*layerdrop")
_POSITIONS = ("max_position_embeddings", "n_positions")
_PRECISIONS = ("fp16", "bf16", "amp", "data_types")
_SHORT = {"total_num_steps": 1.0, "warmup_num_steps": 0.25, "cycle_first_step_size": 0.5, "cycle_second_step_size": 0.5}
"""Keys of DeepSpeed's schedulers that are numbers of steps → their part of a run of the check."""
_RATES = ("warmup_min_lr", "warmup_max_lr", "cycle_min_lr", "cycle_max_lr", "lr_range_test_min_lr")


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
    """A verdict on a configuration that is trained with a recipe. Collective under torchrun, with DeepSpeed.

    Args:
        config: what is to be trained; as `targets.hugging_face_config` reads it.
        recipe: with which it is; its base is a configuration too.
        deepspeed: the configuration of the engine that is checked, with a "mup" entry. None: plain torch.
        level: how much is looked at.
        widths: of the models, in the configuration's own key for it; by default `widths_for`.
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
    model_class = _class_of(config, base)
    depth = _depth(config)
    whole, whole_base = config, base
    small, base, recipe_here = _smallest(model_class, config, base, recipe)
    small, cut = _cut(small, base, recipe_here)

    def factory(width: int) -> nn.Module:
        constructor: Callable[[PretrainedConfig], nn.Module] = model_class
        with configs.quiet():
            return constructor(at_width(small, base, width))

    def shapes(width: int) -> dict[str, torch.Size]:
        with torch.device("meta"), configs.refused(f"{model_class.__name__} cannot be built at width {width}"):
            return {name: parameter.shape for name, parameter in factory(width).named_parameters()}

    remarks = [WITHOUT_DROPOUT] if _drops(config) else []
    remarks += _uncut(small, config, base)
    if widths is None:
        usual = widths_for(small, base, levels.WIDTHS)
        chosen, fewer = affordable(usual, lambda width: [*shapes(width).values()], tokens=LENGTH)
        remarks += fewer
    else:
        chosen = list(widths)
    if min(chosen) < width_of(base):
        cut = _narrowed(cut, at_width(small, base, min(chosen)), _grown(small, base))
        remarks.append(
            f"The base is {width_of(base)} wide; in the check it is as wide as the narrowest model, {min(chosen)}: a "
            "plan leads from a base to what is wider."
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
            deep=None if _depth(small) == depth else _deep(model_class, whole, whole_base, recipe),
        )
        return replace(verdict, fingerprint=recipe.fingerprint)

    if deepspeed is None:
        return judged(prepare_by_plan, warm_up_and_decay)
    content = _deepspeed_content(deepspeed, recipe, plan_for(config, recipe))
    if any(key in content for key in _PRECISIONS):
        remarks.append("The engine of the check computes in single precision, so that differences are not rounding.")
    with _ranks(), tempfile.TemporaryDirectory() as folder:
        engines = _Engines(content, Path(folder), recipe)
        return judged(engines.prepare, engines.schedule)


# ---- what is cut ---------------------------------------------------------------------------------------------------

_LAYER = re.compile(r"^(.*?\.)(\d+)(\..*)$")
_PERIODS = re.compile(r".*_(?:period|interval|step|pattern)")
"""Keys that say after how many layers another kind of layer comes."""
_OTHER_HEADS = re.compile(r".*head_dim|.*_rank|.*head_size|.*kv_channels|num_kv_heads|multi_query")
"""Keys of attention that the rules below do not know: its heads are then left as they are."""


def _smallest(
    model_class: Any, config: PretrainedConfig, base: PretrainedConfig, recipe: Recipe
) -> tuple[PretrainedConfig, PretrainedConfig, Recipe]:
    """Target, base and recipe with as few layers and as small heads as a model can be built with."""
    for change in (lambda *of: _with_small_heads(*_shallow(*of)), _shallow):
        try:
            small, small_base, small_recipe = change(config, base, recipe)
            width = widths_for(small, small_base, 1)[0]
            with torch.device("meta"), configs.quiet():
                model_class(at_width(small, small_base, width))
        except _NOT_BUILT:
            continue
        return small, small_base, small_recipe
    return config, base, recipe


def _uncut(small: PretrainedConfig, config: PretrainedConfig, base: PretrainedConfig) -> list[str]:
    """What is to be said of what is as large as the target's."""
    remarks = []
    if (layers := _depth(small)) > DEPTH:
        remarks.append(
            f"{layers} of {_depth(config)} layers are trained, not {DEPTH}: recipe or configuration tell so many "
            "apart, or the model cannot be built with fewer."
        )
    own, left, size = config.to_dict(), small.to_dict(), configs.head_size(config)
    counts = [own[key] for key in configs.HEADS if isinstance(own.get(key), int)]
    cut = any(own.get(key) != left.get(key) for key in configs.HEADS | configs.HEAD_SIZES)
    grow = size != configs.head_size(base)
    if counts and not cut and not grow and (size is None or size > HEAD):
        of_size = "" if size is None else f", of size {size}"
        remarks.append(f"Heads are the target's own{of_size}: the model cannot be built with smaller ones.")
    return remarks


_NOT_BUILT = (ValueError, TypeError, AssertionError, AttributeError, KeyError, IndexError, RuntimeError, InputError)
"""What a model's own code raises where a size is none that it is made for."""


def _with_small_heads(
    config: PretrainedConfig, base: PretrainedConfig, recipe: Recipe
) -> tuple[PretrainedConfig, PretrainedConfig, Recipe]:
    """With small heads and few groups: see `family.condensed`."""
    own = config.to_dict()
    size, other = configs.head_size(config), configs.head_size(base)
    counts = {key: own[key] for key in configs.HEADS if own.get(key) is not None}
    queries = {key: value for key, value in counts.items() if key != _GROUPS}
    if size is None or other is None or not all(isinstance(value, int) for value in counts.values()):
        return config, base, recipe
    if any(_OTHER_HEADS.fullmatch(key) and key not in configs.HEAD_SIZES for key, x in own.items() if x):
        return config, base, recipe
    there = base.to_dict()
    per_group = (
        {
            sides[key] // sides.get(_GROUPS, sides[key])
            for sides in (own | counts, there)
            for key in queries
            if sides.get(key)
        }
        if own.get(_GROUPS)
        else {1}
    )
    few, many = min(per_group), max(per_group)
    least = min(few, 2)
    cut_per_group = {many: min(many, 2 * least), few: least}
    sizes = [d for d in range(min(HEAD, size), size) if d % 2 == 0 and _turns(own, d)]
    fixed_heads = math.lcm(*cut_per_group.values()) * 2
    changed = []
    for model, keys, head in ((config, own, size), (base, there, other)):
        changes: dict[str, Any] = {}
        for key in queries:
            if size != other:
                heads = min(fixed_heads, keys[key])
            else:
                heads = next((keys[key] * head // d for d in sizes if keys[key] * head % d == 0), keys[key])
            changes[key] = heads
            new = keys[key] * head // heads
            changes |= {name: new for name in configs.HEAD_SIZES if isinstance(keys.get(name), int)}
            if isinstance(keys.get(_GROUPS), int):
                as_base = own[_GROUPS] == there.get(_GROUPS) and own[key] != there.get(key)
                changes[_GROUPS] = (
                    min(keys[_GROUPS], 2) if as_base else heads // cut_per_group[keys[key] // keys[_GROUPS]]
                )
        small = copy.deepcopy(model)
        for key, value in changes.items():
            setattr(small, key, value)
        changed.append((small, changes))
    (small, _), (small_base, of_base) = changed
    return small, small_base, _with_base(recipe, of_base, there)


_GROUPS = "num_key_value_heads"


def _turns(own: Mapping[str, Any], head_size: int) -> bool:
    """Whether rotary embeddings of a part of each head turn whole pairs."""
    rope = own.get("rope_parameters") or {}
    part = own.get("partial_rotary_factor") or own.get("rotary_pct") or rope.get("partial_rotary_factor") or 1.0
    rotated = int(head_size * part)
    return rotated > 0 and rotated % 2 == 0


def _with_base(recipe: Recipe, changes: Mapping[str, Any], there: Mapping[str, Any]) -> Recipe:
    assert isinstance(recipe.base, HuggingFaceBase)
    known = {key: value for key, value in changes.items() if key in there}
    return recipe.model_copy(update={"base": recipe.base.model_copy(update=known)})


def _shallow(
    config: PretrainedConfig, base: PretrainedConfig, recipe: Recipe
) -> tuple[PretrainedConfig, PretrainedConfig, Recipe]:
    """With few layers, of which every kind that configuration and recipe tell apart is there."""
    own = config.to_dict()
    depths = {key: own[key] for key in configs.DEPTHS if isinstance(own.get(key), int)}
    if not depths:
        return config, base, recipe
    deepest = max(depths.values())
    periods = [value for key, value in own.items() if _PERIODS.fullmatch(key) and isinstance(value, int)]
    lists = {key: value for key, value in own.items() if isinstance(value, list | tuple) and len(value) == deepest}
    count = max([DEPTH, *(period for period in periods if period <= deepest)])
    count = max(count, 1 + (own.get("first_k_dense_replace") or 0))
    for value in lists.values():
        count = max([count, *(value.index(item) + 1 for item in value)])
    if count >= deepest or _names_layers(recipe):
        return config, base, recipe
    there = base.to_dict()
    changes: dict[str, Any] = {key: min(value, count) for key, value in depths.items()}
    changes |= {key: list(value[:count]) for key, value in lists.items()}
    of_base = {key: value for key, value in changes.items() if there.get(key) is not None}
    changed = []
    for model, values in ((config, changes), (base, of_base)):
        small = copy.deepcopy(model)
        for key, value in values.items():
            setattr(small, key, value)
        changed.append(small)
    return changed[0], changed[1], _with_base(recipe, of_base, there)


def _depth(config: PretrainedConfig) -> int:
    """How many layers there are, of the deepest stack."""
    own = config.to_dict()
    return max([own[key] for key in configs.DEPTHS if isinstance(own.get(key), int)], default=0)


def _deep(
    model_class: Any, config: PretrainedConfig, base: PretrainedConfig, recipe: Recipe
) -> tuple[Callable[[int], nn.Module], Recipe, list[int]]:
    """What builds narrow models of all layers, with which recipe, and how wide they can be."""
    small, small_base, own = config, base, recipe
    with contextlib.suppress(*_NOT_BUILT):
        found = _with_small_heads(config, base, recipe)
        with torch.device("meta"), configs.quiet():
            model_class(at_width(found[0], found[1], widths_for(found[0], found[1], 1)[0]))
        small, small_base, own = found
    small, own = _cut(small, small_base, own)
    widths = widths_for(small, small_base, 4)
    own = _narrowed(own, at_width(small, small_base, widths[0]), _grown(small, small_base))

    def factory(width: int) -> nn.Module:
        with configs.quiet():
            model: nn.Module = model_class(at_width(small, small_base, width))
        return model

    return factory, own, widths


def _names_layers(recipe: Recipe) -> bool:
    """Whether a pattern of the recipe means some layers alone: all of them are trained then."""
    return any(re.search(r"\.[\d\[?]", own.match) for own in recipe.per_parameter)


# ---- the family ----------------------------------------------------------------------------------------------------


def width_of(config: PretrainedConfig) -> int:
    """A configuration's width, in its own key for it."""
    own = config.to_dict()
    found: int | None = next((own[key] for key in _WIDTH_KEYS if isinstance(own.get(key), int)), None)
    if found is None:
        raise InputError(f"model type {config.model_type}: none of {', '.join(_WIDTH_KEYS)} says how wide it is.")
    return found


def _grown(config: PretrainedConfig, base: PretrainedConfig) -> dict[str, Any]:
    """The keys that grow with width, with the target's values: those that differ from the base's, or all of them where
    the base is as wide.
    """
    own, other = config.to_dict(), base.to_dict()
    as_wide = width_of(config) == width_of(base)
    sizes_grow = configs.head_size(config) != configs.head_size(base)
    keys = configs.WIDTHS | (configs.HEAD_SIZES if sizes_grow else configs.HEADS)
    grown = {
        key: value
        for key, value in own.items()
        if key in keys and value is not None and (as_wide or value != other.get(key))
    }
    # A configuration may leave its head size to be computed, and its number of heads then keeps it.
    return {key: value for key, value in grown.items() if isinstance(value, int | list | tuple)}


def widths_for(config: PretrainedConfig, base: PretrainedConfig, count: int) -> list[int]:
    """The widths of a check: small multiples of the least that keeps whole heads."""
    unit = _unit(config, base)
    smallest = -(-SMALLEST // unit) * unit
    return [smallest * 2**i for i in range(count)]


def _unit(config: PretrainedConfig, base: PretrainedConfig) -> int:
    """The width with the least number of whole heads and groups."""
    own, grown, width = config.to_dict(), _grown(config, base), width_of(config)
    counts = [value for key, value in grown.items() if key in configs.HEADS and isinstance(value, int)]
    shared = [own[key] for key in configs.HEADS - set(grown) if isinstance(own.get(key), int)]
    if counts and shared:
        # A number of groups that does not grow has to divide the number of heads.
        return Fraction(width * math.lcm(*shared), max(counts)).numerator
    return width // math.gcd(width, *counts)


def at_width(config: PretrainedConfig, base: PretrainedConfig, width: int) -> PretrainedConfig:
    """The configuration at another width.

    Raises:
        InputError: heads would not be whole; says what would fit.
    """
    unit = _unit(config, base)
    if width < unit or width % unit:
        raise InputError(f"--widths {width}: whole heads and groups of the target need multiples of {unit}.")
    whole = width_of(config)

    def scaled(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [scaled(item) for item in value]
        return max(1, round(value * width / whole))

    changed = copy.deepcopy(config)
    for key, value in _grown(config, base).items():
        setattr(changed, key, scaled(value))
    return changed


def _cut(config: PretrainedConfig, base: PretrainedConfig, recipe: Recipe) -> tuple[PretrainedConfig, Recipe]:
    """Target and recipe with a small vocabulary, few positions and no dropout."""
    assert isinstance(recipe.base, HuggingFaceBase)
    own = config.to_dict()
    changes: dict[str, Any] = {key: min(own[key], 2 * LENGTH) for key in _POSITIONS if isinstance(own.get(key), int)}
    vocabulary = own.get("vocab_size")
    if isinstance(vocabulary, int):
        changes["vocab_size"] = min(vocabulary, VOCABULARY)
    small = copy.deepcopy(config)
    for key, value in changes.items():
        setattr(small, key, value)
    for key, value in own.items():
        if _DROPOUT.fullmatch(key) and isinstance(value, int | float) and not isinstance(value, bool):
            setattr(small, key, 0.0)
        if key.endswith("_token_id") and isinstance(value, int) and value >= changes.get("vocab_size", value + 1):
            setattr(small, key, 0)
    there = base.to_dict()
    at_base = {key: min(value, there[key]) for key, value in changes.items() if isinstance(there.get(key), int)}
    cut_base = recipe.base.model_copy(update=at_base)
    return small, recipe.model_copy(update={"base": cut_base})


def _narrowed(recipe: Recipe, narrowest: PretrainedConfig, grown: Mapping[str, Any]) -> Recipe:
    """The recipe with a base that is as wide as the narrowest model."""
    own = narrowest.to_dict()
    base = recipe.base.model_copy(update={key: own[key] for key in grown})
    return recipe.model_copy(update={"base": base})


def _drops(config: PretrainedConfig) -> bool:
    return any(
        _DROPOUT.fullmatch(key) and isinstance(value, int | float) and value > 0
        for key, value in config.to_dict().items()
    )


def _class_of(config: PretrainedConfig, base: PretrainedConfig) -> Any:
    names = config.architectures or base.architectures
    found = getattr(transformers, names[0], None) if names else None
    if found is None:
        raise InputError(
            f"architectures: {(names or ['nothing'])[0]} says no model class of the installed transformers. Add for "
            "example architectures: [GPT2LMHeadModel]."
        )
    return found


# ---- DeepSpeed -----------------------------------------------------------------------------------------------------


def _deepspeed_content(path: Path, recipe: Recipe, plan: Plan) -> dict[str, Any]:
    """The content of a DeepSpeed configuration, which has to fit the recipe as it is.

    Raises:
        InputError: it is no JSON object, has no "mup" entry, or says something else than the recipe.
    """
    from mup_megatron.deepspeed import entry
    from mup_megatron.deepspeed.config import require_fitting_scheduler

    content = read_json(path)
    typed = entry.configuration(content, source=str(path))
    assert isinstance(content, dict)
    if not entry.has_entry(content):
        raise InputError(
            f'{path}: no "{entry.KEY}" entry, so an engine would train without μP. Write "{entry.KEY}": '
            '{"recipe": "…"}; `mup-megatron ds-config` does.'
        )
    try:
        entry.entry_of(content)
        entry.require_supported(typed)
        entry.optimizer_params(typed.made_optimizer.type, typed.made_optimizer.params, recipe)
        entry.gradient_clipping(typed.gradient_clipping, recipe)
        require_fitting_scheduler(typed, plan)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return content


class _Engines:
    """Makes the engine of each run, with the recipe of the check in place of the user's."""

    def __init__(self, content: Mapping[str, Any], folder: Path, recipe: Recipe) -> None:
        h = recipe.hyperparameters
        self._content, self._folder, self._lr = content, folder, h.lr
        self._floor = max(h.min_lr / h.lr, FLOOR)
        """Of the schedule, relative to its peak, where it has one: that of the recipe under stress."""

    def prepare(self, model: nn.Module, task: Task) -> Any:
        """The engine of one run."""
        import deepspeed

        import mup_megatron.deepspeed  # noqa: F401  # takes its place in the engine

        path = self._folder / f"{task.recipe.fingerprint}.{os.environ.get('RANK', '0')}.recipe.yaml"
        save_recipe(task.recipe, path)
        try:
            engine, *_ = deepspeed.initialize(model=model, config=self._config(path, task))
        except InputError:
            raise
        except Exception as error:  # it validates its configuration by whatever its parts raise
            raise InputError(
                f"--deepspeed: DeepSpeed refuses the configuration ({brief(error, 200)}). Correct it."
            ) from error
        return engine

    def schedule(self, step: int, steps: int) -> float:
        """What the configuration's scheduler does with one learning rate."""
        from mup_megatron.deepspeed.schedulers import for_one_group

        scheduler = self._scheduler(steps, self._lr)
        if scheduler is None:
            return 1.0
        made = for_one_group(scheduler, self._lr)
        for _ in range(step):
            made.optimizer.step()
            made.step()
        return float(made.optimizer.param_groups[0]["lr"]) / self._lr

    def _scheduler(self, steps: int, lr: float) -> dict[str, Any] | None:
        own = self._content.get("scheduler")
        if not own:
            return None
        given = dict(own.get("params") or {})
        params = {key: value for key, value in given.items() if value != "auto"}
        for key in [key for key in _SHORT if key in given or (key == "total_num_steps" and "Decay" in own["type"])]:
            params[key] = max(1, round(_SHORT[key] * steps))
        if own["type"] == "WarmupCosineLR":
            params["cos_min_ratio"] = self._floor
        for key in [key for key in _RATES if isinstance(params.get(key), int | float)]:
            params[key] *= lr / self._lr
        return {"type": own["type"], "params": params}

    def _config(self, recipe: Path, task: Task) -> dict[str, Any]:
        size, ranks = levels.EARLY.batch_size, distributed.get_world_size()
        if size % ranks:
            raise InputError(
                f"{ranks} processes: a check's batch of {size} has to be shared out among them. Use fewer."
            )
        from mup_megatron.deepspeed import entry

        content = {key: value for key, value in copy.deepcopy(dict(self._content)).items() if key not in _PRECISIONS}
        for key in ("gradient_clipping", "train_batch_size", "train_micro_batch_size_per_gpu", "scheduler"):
            content.pop(key, None)
        optimizer = content["optimizer"]
        own = ("lr", "betas", "eps", "weight_decay", "momentum")
        optimizer["params"] = {k: v for k, v in dict(optimizer.get("params") or {}).items() if k not in own}
        scheduler = self._scheduler(task.steps, task.recipe.hyperparameters.lr)
        return {
            **content,
            **({} if scheduler is None else {"scheduler": scheduler}),
            "train_batch_size": size,
            "train_micro_batch_size_per_gpu": size // ranks,
            "gradient_accumulation_steps": 1,
            "steps_per_print": 10**9,
            entry.KEY: {**content[entry.KEY], "recipe": str(recipe), "initialize": True, "target": None},
        }


@contextmanager
def _ranks() -> Iterator[None]:
    """The process group of a run, which DeepSpeed finds, and what it wants to read of it in the environment."""
    with process_group("nccl" if torch.cuda.is_available() else "gloo"):
        said = {k: v for k, v in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items() if k not in os.environ}
        os.environ.update(said)
        try:
            yield
        finally:
            for key in said:
                del os.environ[key]
