"""The recipe that does what a native launch line does, as far as a recipe can."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.architectures.names import POSITION_EMBEDDINGS, READOUT_WEIGHT, WORD_EMBEDDINGS
from mup_megatron.architectures.narrowing import narrowed
from mup_megatron.architectures.registry import architecture_of, model_file, shapes_of
from mup_megatron.errors import InputError
from mup_megatron.megatron.arguments.convert import model_from_values, values_from_flags
from mup_megatron.megatron.arguments.native.differences import Difference, differences
from mup_megatron.megatron.arguments.native.formulas import Native
from mup_megatron.megatron.arguments.native.schedule import schedule_of
from mup_megatron.megatron.arguments.table import HYPERPARAMETERS
from mup_megatron.megatron.optimizers import MEGATRON_OPTIMIZERS, require_known
from mup_megatron.recipe import Recipe, recipe
from mup_megatron.theory import Property, optimizers


@dataclass(frozen=True, slots=True)
class NativeRecipe:
    """The recipe of a native launch line, with what differs."""

    recipe: Recipe
    model: ModelFile
    """The line's own model: the target for which the differences hold."""
    differences: tuple[Difference, ...]
    notes: tuple[str, ...]
    """What else to know, in sentences."""


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
    """Returns the recipe that does what a native launch line does, as far as a recipe can.

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
        "schedule": schedule_of(values, source),
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
    return NativeRecipe(carried, model, tuple(differences(native, plan)), (*notes, *_notes(native)))


def _recipe(content: Mapping[str, Any], source: str) -> Recipe:
    """Returns the checked recipe; where it is wrong, the message has the names of flags instead of keys."""
    try:
        return recipe(content, source=source)
    except InputError as error:
        raise InputError(_HYPERPARAMETER.sub(lambda match: HYPERPARAMETERS[match[1]].name, str(error))) from None


_HYPERPARAMETER = re.compile(
    rf"\b(?:hyperparameters[.:] ?)?({'|'.join(sorted(HYPERPARAMETERS, key=len, reverse=True))})\b"
)


def _said(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the base as the line gives it."""
    return {key: value for key, value in values.items() if key.startswith("mup_base_") and value is not None}


# ---- the base ------------------------------------------------------------------------------------------------------


def _base(native: Native, source: str) -> tuple[ModelFile, list[str]]:
    """Returns the model 1/m as wide in every direction, with heads of the base's size where that is given and fits."""
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
    base = narrowed(model, native.base_hidden_size, model.heads(heads, size=head, groups=groups))
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
        "attention_multiplier": native.attention_multiplier(base.head_size),
    }
    return {**{key: v[key] for key in keys}, **multipliers}


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
            f"too. For that the recipe has attention_multiplier {native.attention_multiplier():g}. If you tuned the "
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
