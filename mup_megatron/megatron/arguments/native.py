"""A launch line with Megatron-Core's own μP (`--use-mup`) → a recipe, and where the two differ on this very model.

Works on flags and shapes; needs no Megatron. What native μP does is in docs/native-mup.md, and is checked against live
models in tests/megatron/test_native_recipe.py. Longer than others, because reading a line, converting it and telling
what differs share every name of native μP and are read side by side.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, get_args

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.architectures.names import POSITION_EMBEDDINGS, READOUT_WEIGHT, WORD_EMBEDDINGS
from mup_megatron.architectures.narrowing import Heads, narrowed
from mup_megatron.architectures.registry import architecture_of, model_file, shapes_of
from mup_megatron.errors import InputError
from mup_megatron.megatron.arguments.convert import model_from_values, values_from_flags
from mup_megatron.megatron.arguments.table import HYPERPARAMETERS
from mup_megatron.megatron.optimizers import MEGATRON_OPTIMIZERS, MegatronOptimizer, require_known
from mup_megatron.recipe import LONGEST_SCHEDULE, Recipe, Schedule, recipe
from mup_megatron.theory import Plan, PlanEntry, Property, Role, family_of, optimizers
from mup_megatron.theory.rules import softmax_scale
from mup_megatron.validation import brief


@dataclass(frozen=True, slots=True)
class Difference:
    """A number that is one under native μP and another under the recipe."""

    quantity: str
    role: str
    """Empty where it is not about parameters."""
    where: tuple[str, ...]
    """The parameters, layers as `*`; or what it is about."""
    native: float
    recipe: float
    why: str

    def __str__(self) -> str:
        """One sentence with both numbers."""
        of = f" of {self.role} parameters" if self.role else ""
        where = ", ".join(self.where)
        return f"{self.quantity}{of} ({where}): {self.native:g} natively, {self.recipe:g} with the recipe. {self.why}"


@dataclass(frozen=True, slots=True)
class NativeRecipe:
    """The recipe of a native launch line, with what differs."""

    recipe: Recipe
    model: ModelFile
    """The line's own model: the target for which the differences hold."""
    differences: tuple[Difference, ...]
    notes: tuple[str, ...]
    """What else to know, in sentences."""


@dataclass(frozen=True, slots=True)
class NativeValues:
    """The values that native μP gives to one parameter; None as in a plan's entry."""

    init_std: float | None
    lr: float
    min_lr: float
    eps: float | None
    weight_decay: float


@dataclass(frozen=True, slots=True)
class Native:
    """Native μP of one launch line: the formulas of Megatron-Core 0.17 to 0.19."""

    model: ModelFile
    values: Mapping[str, Any]

    @property
    def base_hidden_size(self) -> int:
        """The model's own width where none is given."""
        return self.values["mup_base_hidden_size"] or self.model.hidden_size

    @property
    def width_mult(self) -> float:
        """m, the one ratio for all of the model."""
        return self.model.hidden_size / self.base_hidden_size

    @property
    def rules(self) -> MegatronOptimizer:
        """The factors of this optimizer."""
        return MEGATRON_OPTIMIZERS[self.values["optimizer"]]

    def lr_factor(self, *, hidden: bool) -> float:
        """The factor of a learning rate."""
        assert self.rules.native_lr is not None, "refused"
        return self.rules.native_lr(hidden, self.width_mult)

    @property
    def softmax_scale(self) -> float:
        """√base_head_dim / d**power."""
        base = self.values["mup_base_head_dim"]
        return float((1.0 if base is None else base**0.5) / self.model.head_size ** self.values["mup_attn_scale_power"])

    @property
    def output_multiplier(self) -> float:
        """The factor of the logits: 1/m, or the factor that is given in its place."""
        given = float(self.values["mup_output_mult"])
        return 1.0 / self.width_mult if given == 1.0 else given

    def of(self, entry: PlanEntry) -> NativeValues:
        """Returns the values of a parameter."""
        v, m = self.values, self.width_mult
        hidden = not entry.is_vector and not (entry.is_embedding or entry.is_readout)
        rules, factor = self.rules, self.lr_factor(hidden=hidden)
        lr, min_lr = v["lr"] * factor, v["min_lr"] * factor
        if v["decoupled_lr"] is not None and entry.name in (WORD_EMBEDDINGS, READOUT_WEIGHT):
            # An absolute value, with the floor of all others if it has none of its own.
            lr, min_lr = v["decoupled_lr"], v["min_lr"] if v["decoupled_min_lr"] is None else v["decoupled_min_lr"]
        eps = None if rules.native_eps is None else v["adam_eps"] * rules.native_eps(hidden, m)
        return NativeValues(self._std(entry), lr, min_lr, eps, 0.0 if entry.is_vector else v["weight_decay"])

    def _std(self, entry: PlanEntry) -> float | None:
        sigma = self.values["init_method_std"]
        embedding = self.values["embedding_init_method_std"]
        if entry.is_vector:
            return None
        if entry.is_embedding or entry.is_readout:
            return float(sigma if embedding is None else embedding)
        branches = architecture_of(self.model).branches * self.model.num_layers if entry.is_residual else 1
        return float(sigma / math.sqrt(branches * self.width_mult))


_POSITIVE = (
    "lr",
    "decoupled_lr",
    "init_method_std",
    "embedding_init_method_std",
    "mup_base_hidden_size",
    "mup_base_head_dim",
    "mup_embedding_mult",
    "mup_output_mult",
)
"""Of these a recipe has quotients, or a key of another name: what is wrong is said before."""


def recipe_from_native(
    line: Sequence[str] | Mapping[str, Any],
    *,
    vocab_size: int | None = None,
    source: str,
    script: str | None = None,
) -> NativeRecipe:
    """The recipe that does what a native launch line does, as far as a recipe can.

    On the line's own model every number is native's, but for the differences that come with it.

    Args:
        line: the words of a launch line, or Megatron's parsed arguments (`vars(args)`).
        vocab_size: the tokenizer's, where the line does not say it.
        source: names them in messages.
        script: the program, which decides what is built where it is one of Megatron-LM's.

    Raises:
        InputError: the line is not native μP, its model is none that is supported, or its optimizer or schedule is
            none that a recipe knows; names the flag.
    """
    values = dict(line) if isinstance(line, Mapping) else values_from_flags(line, source=source)
    if not values.get("use_mup"):
        raise InputError(
            f"{source}: --use-mup is missing, so this is not Megatron's own μP. Write a recipe by hand with "
            "`mup-megatron recipe`."
        )
    require_known(values["optimizer"], source)
    if MEGATRON_OPTIMIZERS[values["optimizer"]].native_lr is None:
        raise InputError(
            f"{source}: --optimizer {values['optimizer']} beside --use-mup: Megatron's own μP does not scale matrices "
            "as the rules of this optimizer do, so no recipe does the same. Tune a base with `mup-megatron recipe "
            f"--optimizer {values['optimizer']}`."
        )
    if values["lr"] is None:
        raise InputError(f"{source}: --lr is missing. Give it.")
    for key in _POSITIVE:
        if values.get(key) is not None and values[key] <= 0:
            raise InputError(f"{source}: --{key.replace('_', '-')} {values[key]:g}: must be positive. Correct it.")
    # The recipe says it with per_parameter, the model file need not.
    plain = {**values, "embedding_init_method_std": None}
    model = model_from_values(plain, vocab_size=vocab_size, source=source, script=script)
    if problem := architecture_of(model).native_problem(model):
        raise InputError(f"{source}: {problem}")
    native = Native(model, values)
    base, notes = _base(native, source)
    has_router = any(Property.ROUTER in tensor.properties for tensor in shapes_of(model, model)[1].tensors)
    content: dict[str, Any] = {
        "base": base.model_dump(mode="json"),
        "hyperparameters": _hyperparameters(native, base),
        "schedule": _schedule(values, source),
        "per_parameter": _per_parameter(native),
        # Native μP leaves weight decay alone, and takes a router for hidden.
        "parametrization": {
            "optimizer": values["optimizer"],
            "weight_decay_exponent": 0.0,
            **({"router": "hidden"} if has_router else {}),
        },
        "provenance": {"from": "Megatron-Core's own μP", **_said(values)},
    }
    carried = _recipe(content, source)
    plan = carried.plan(model)
    differences = (*_differences(native, plan), *_run_differences(values))
    notes = [*notes, *_notes(native)]
    return NativeRecipe(carried, model, differences, tuple(notes))


def _recipe(content: Mapping[str, Any], source: str) -> Recipe:
    """The checked recipe; where it is wrong, the message has the names of flags instead of keys."""
    try:
        return recipe(content, source=source)
    except InputError as error:
        raise InputError(_HYPERPARAMETER.sub(lambda match: HYPERPARAMETERS[match[1]].name, str(error))) from None


_HYPERPARAMETER = re.compile(
    rf"\b(?:hyperparameters[.:] ?)?({'|'.join(sorted(HYPERPARAMETERS, key=len, reverse=True))})\b"
)


def _said(values: Mapping[str, Any]) -> dict[str, Any]:
    """The base as the line gives it."""
    return {key: value for key, value in values.items() if key.startswith("mup_base_") and value is not None}


# ---- the base ------------------------------------------------------------------------------------------------------


def _base(native: Native, source: str) -> tuple[ModelFile, list[str]]:
    """The model 1/m as wide in every direction, with heads of the base's size where that is given and fits."""
    model, m, notes = native.model, native.width_mult, []
    if native.values["mup_base_hidden_size"] is None:
        notes.append(
            "--mup-base-hidden-size is missing: natively that turns the width rules off without a word, and here the "
            "base is the model itself. Give it the width at which you tuned."
        )
    attended = model.num_attention_heads * model.head_size / m
    wanted = native.values["mup_base_head_dim"]
    fits = wanted is not None and wanted > 0 and attended % wanted == 0 and float(wanted).is_integer()
    head = int(wanted) if fits else model.head_size
    if wanted is not None and not fits:
        notes.append(
            f"--mup-base-head-dim {wanted:g} does not divide the base's {attended:g} attention channels: its heads "
            f"keep the size {head}, and attention_multiplier makes up for it."
        )
    heads = max(1, round(attended / head))
    groups = min(
        (divisor for divisor in range(1, heads + 1) if heads % divisor == 0),
        key=lambda divisor: abs(divisor - model.query_groups * heads / model.num_attention_heads),
    )
    base = narrowed(model, native.base_hidden_size, Heads(number=heads, groups=groups, size=head))
    for key, exact, rounded in (
        ("num_attention_heads", attended / head, heads),
        ("num_query_groups", model.query_groups * heads / model.num_attention_heads, groups),
        *((each.key, float(each.exact), each.size) for each in base.rounded),
    ):
        if exact != rounded:
            notes.append(f"the base's {key} would be {exact:g} and is rounded to {rounded}, so its ratio is not m.")
    notes += base.notes
    return model_file(base.model.model_dump(mode="json"), source=f"{source}: the base of native μP"), notes


# ---- what was tuned ------------------------------------------------------------------------------------------------


def _hyperparameters(native: Native, base: ModelFile) -> dict[str, Any]:
    v = native.values
    keys = (
        "lr",
        "min_lr",
        "init_method_std",
        "weight_decay",
        "clip_grad",
        *optimizers()[v["optimizer"]].hyperparameters,
    )
    given = float(v["mup_output_mult"])
    multipliers = {
        "embedding_multiplier": v["mup_embedding_mult"],
        # A factor that is given replaces 1/m natively; a recipe's multiplies it.
        "output_multiplier": 1.0 if given == 1.0 else given * native.width_mult,
        "attention_multiplier": _attention_multiplier(native, base.head_size),
    }
    return {**{key: v[key] for key in keys}, **multipliers}


def _attention_multiplier(native: Native, base_head_size: int | None = None) -> float:
    """What makes up for another scale of attention than that of a base with this head size, by default the model's."""
    alone = softmax_scale(
        base_head_size=base_head_size or native.model.head_size, head_size=native.model.head_size, alpha=1.0
    )
    ratio = native.softmax_scale / alone
    return 1.0 if math.isclose(ratio, 1.0, rel_tol=1e-12) else ratio


def _per_parameter(native: Native) -> list[dict[str, Any]]:
    v, model = native.values, native.model
    std, lr = v["embedding_init_method_std"], v["decoupled_lr"]
    init_mult = 1.0 if std is None else std / v["init_method_std"]
    # Natively, SGD multiplies the rate of embedding and readout by m, which a decoupled rate leaves out.
    scaled = v["lr"] * native.lr_factor(hidden=False)
    lr_mult = 1.0 if lr is None else lr / scaled
    entries: list[dict[str, Any]] = [{"match": WORD_EMBEDDINGS, "init_mult": init_mult, "lr_mult": lr_mult}]
    if model.position_embedding_type == "learned_absolute":
        entries.append({"match": POSITION_EMBEDDINGS, "init_mult": init_mult})
    if not model.tied:
        entries.append({"match": READOUT_WEIGHT, "init_mult": init_mult, "lr_mult": lr_mult})
    return [entry for entry in entries if any(factor != 1.0 for key, factor in entry.items() if key != "match")]


def _schedule(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Megatron's counts as fractions of the run; its own conditions on them in the line's own words."""
    unit, other = ("samples", "iters") if values["train_samples"] is not None else ("iters", "samples")

    def text(key: str) -> str:
        return f"--{key.replace('_', '-')} {values[key]}"

    def refuse(what: str, remedy: str) -> NoReturn:
        raise InputError(f"{source}: {what}. {remedy}")

    mixed = [key for key in (f"train_{other}", f"lr_decay_{other}", f"lr_warmup_{other}") if values[key]]
    if mixed and values[f"train_{unit}"] is not None:
        refuse(f"{text(mixed[0])} beside {text(f'train_{unit}')}", "Megatron counts a run in one unit: drop one.")
    if values["lr_warmup_fraction"] is not None and values[f"lr_warmup_{unit}"]:
        refuse(
            f"{text('lr_warmup_fraction')} beside {text(f'lr_warmup_{unit}')}", "Megatron takes one: drop the other."
        )
    run = values[f"train_{unit}"]
    for key, least in (
        (f"train_{unit}", 1),
        (f"lr_decay_{unit}", 1),
        (f"lr_wsd_decay_{unit}", 1),
        (f"lr_warmup_{unit}", 0),
        ("lr_warmup_fraction", 0),
    ):
        if values[key] is not None and values[key] < least:
            refuse(f"{text(key)} is below {least}", "Correct this value.")

    def fraction(key: str, count: float) -> float:
        if run is None:
            refuse(f"{text(key)}: a recipe counts in fractions of the run", "Give --train-iters.")
        if count > LONGEST_SCHEDULE * run:
            refuse(f"{text(key)} is too long for {text(f'train_{unit}')}", "A recipe reaches a million runs.")
        return count / int(run)

    style, decay_key, warmup_key = values["lr_decay_style"], f"lr_decay_{unit}", f"lr_warmup_{unit}"
    if style not in get_args(Schedule.model_fields["lr_decay_style"].annotation):
        refuse(f"--lr-decay-style {brief(style, 60)}: a recipe does not know it", "Choose another.")
    decay = 1.0 if values[decay_key] is None else fraction(decay_key, values[decay_key])
    end = text(decay_key) if values[decay_key] is not None else text(f"train_{unit}") if run is not None else "the run"
    if values["lr_warmup_fraction"] is not None:
        warmup_key = "lr_warmup_fraction"
        # Megatron's is a fraction of the decay.
        warmup = values["lr_warmup_fraction"] * decay
    else:
        warmup = fraction(warmup_key, values[warmup_key]) if values[warmup_key] else 0.0
    if warmup >= decay:
        what = "is no part of" if warmup_key == "lr_warmup_fraction" else "does not end before"
        refuse(f"{text(warmup_key)} {what} {end}, which Megatron refuses", "Shorten the warm-up.")
    if style == "inverse-square-root" and not warmup:
        refuse("--lr-decay-style inverse-square-root is measured from the end of the warm-up", "Give one.")
    schedule = {"lr_decay_style": style, "lr_warmup_fraction": warmup, "lr_decay_fraction": decay}
    if style == "WSD":
        key = f"lr_wsd_decay_{unit}"
        if values[key] is None:
            refuse(f"--{key.replace('_', '-')} is missing, which --lr-decay-style WSD needs", "Give it.")
        final = fraction(key, values[key])
        if final > decay - warmup:
            beside = f", of which {text(warmup_key)} are the warm-up" if warmup else ""
            refuse(f"{text(key)} is longer than {end}{beside}", "Shorten it.")
        schedule["lr_wsd_decay_fraction"] = final
        schedule["lr_wsd_decay_style"] = values["lr_wsd_decay_style"]
    return schedule


# ---- differences ---------------------------------------------------------------------------------------------------

_ONE_RATIO = "Native μP has one ratio for all widths, and this weight's own side grows by another."
_WHY = {
    "init_std": _ONE_RATIO,
    "lr": _ONE_RATIO,
    "min_lr": _ONE_RATIO,
    "eps": "Native μP scales eps of hidden weights only; the gradients of these shrink with width as well.",
    "weight_decay": "Native μP leaves λ alone where it changes the learning rate, so that their product grows.",
}
_DECOUPLED = "A decoupled learning rate has a floor of its own; a recipe's floor follows the learning rate."


def _differences(native: Native, plan: Plan) -> Iterator[Difference]:
    found: dict[tuple[str, Role, float, float, str], list[str]] = {}
    for entry in plan.entries:
        values = native.of(entry)
        for quantity in _WHY:
            one, other = getattr(values, quantity), getattr(entry, quantity)
            if one is None or other is None or math.isclose(one, other, rel_tol=1e-9):
                continue
            why = _why(quantity, entry, native)
            names = found.setdefault((quantity, entry.role, one, other, why), [])
            name = family_of(entry.name)
            names += [] if name in names else [name]
    for (quantity, role, one, other, why), names in found.items():
        yield Difference(quantity, str(role), tuple(names), one, other, why)
    for quantity, one, other, why in (
        ("softmax scale", native.softmax_scale, plan.softmax_scale, "The recipe's base has other heads."),
        ("output multiplier", native.output_multiplier, plan.output_multiplier, _ONE_RATIO),
        ("embedding multiplier", native.values["mup_embedding_mult"], plan.embedding_multiplier, _ONE_RATIO),
    ):
        if not math.isclose(one, other, rel_tol=1e-9):
            yield Difference(quantity, "", ("the model",), one, other, why)


def _why(quantity: str, entry: PlanEntry, native: Native) -> str:
    if quantity == "eps" and entry.role is Role.HIDDEN:
        return _ONE_RATIO
    decoupled = native.values["decoupled_lr"] is not None and entry.name in (WORD_EMBEDDINGS, READOUT_WEIGHT)
    if quantity == "min_lr" and decoupled:
        return _DECOUPLED
    return _WHY[quantity]


def _run_differences(values: Mapping[str, Any]) -> Iterator[Difference]:
    if values["lr_warmup_init"]:
        yield Difference(
            "first learning rate",
            "",
            ("the warm-up",),
            values["lr_warmup_init"],
            0.0,
            "One value for all parameters starts wide layers above their own peak; every group starts at 0.",
        )
    if values["weight_decay_incr_style"] != "constant":
        for key in ("start_weight_decay", "end_weight_decay"):
            if values[key] is not None and values[key] != values["weight_decay"]:
                yield Difference(
                    key.replace("_", " "),
                    "",
                    ("the run",),
                    values[key],
                    values["weight_decay"],
                    "A recipe's is constant.",
                )


def _notes(native: Native) -> Iterator[str]:
    v, m = native.values, native.width_mult
    if m != 1.0:
        yield (
            "The base is the line's model with every width divided by m. If the one that you tuned has another ffn, "
            "number of heads or depth, write that into the recipe: natively it makes no difference, here it does."
        )
    if v["weight_decay"] and native.lr_factor(hidden=True) != 1.0:
        yield (
            "weight_decay_exponent is 0, as natively: the product of learning rate and weight decay of hidden weights "
            "falls as 1/m. Set it to 1 to keep AdamW's averaging time at every width; tune weight_decay anew then."
        )
    if v["mup_output_mult"] != 1.0:
        yield (
            f"--mup-output-mult {v['mup_output_mult']:g} replaces 1/m natively, at every width. In the recipe it "
            f"became output_multiplier {v['mup_output_mult'] * m:g}, which is divided by the ratio: equal on this "
            "model, and the width rule holds on others."
        )
    if v["mup_base_head_dim"] is None:
        yield (
            "--mup-base-head-dim is missing, so native attention scores are divided by the head size d, at the base "
            f"too. For that the recipe has attention_multiplier {_attention_multiplier(native):g}. If you tuned the "
            "base as standard parametrization, set it to 1."
        )
    if v["mup_attn_scale_power"] != 1.0:
        yield (
            f"--mup-attn-scale-power {v['mup_attn_scale_power']:g}: a recipe's attention always goes with 1/d beyond "
            "the base's head size. Equal on this model, not at another head size."
        )
    if v["decoupled_lr"] is not None:
        yield (
            "--decoupled-lr became lr_mult in per_parameter. Drop the flag: the plug-in refuses it. Natively it knows "
            "nothing of width."
        )
    if v["embedding_init_method_std"] is not None:
        yield "--embedding-init-method-std became init_mult in per_parameter. Drop the flag."
    if v["mup_width_mult"] != 1.0:
        yield f"--mup-width-mult {v['mup_width_mult']:g} has no effect natively: it is computed, as {m:g}."
