"""Hugging Face configurations: which keys are widths, which are depths, and what base and target must share.

No model is built here. To support a family whose configuration names a width in another way, add its key to `WIDTHS`.
"""

import contextlib
import copy
import difflib
import logging
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from transformers import AutoConfig, PretrainedConfig
from transformers.utils import logging as transformers_logging

from mup_megatron.errors import InputError
from mup_megatron.recipe import HuggingFaceBase
from mup_megatron.validation import brief, quoted

_COUNTS = re.compile("vocab|position|length|^max_|^num_|_num_|groups$")
"""What a key has in its name that is a size and no width, where it is not listed below. With more groups of a
convolution each reads less of its input, which is another architecture.
"""

HEADS = frozenset(
    "num_attention_heads n_head num_heads num_key_value_heads num_kv_heads encoder_attention_heads "
    "decoder_attention_heads".split()
)
HEAD_SIZES = frozenset({"head_dim", "d_kv"})
WIDTHS = frozenset(
    "hidden_size n_embd d_model embedding_size hidden_sizes word_embed_proj_dim intermediate_size n_inner ffn_dim d_ff "
    "encoder_ffn_dim decoder_ffn_dim pooler_output_size".split()
)
DEPTHS = frozenset(
    "num_hidden_layers n_layer num_layers num_decoder_layers encoder_layers decoder_layers depths layer_types "
    "max_window_layers stage_names out_features out_indices".split()
)
FIXED = frozenset(
    "vocab_size type_vocab_size n_positions max_position_embeddings num_labels image_size patch_size num_channels "
    "relative_attention_num_buckets".split()
)
"""Sizes that do not grow. A position table of another length is found by its shape; rotary positions have none."""

_MAY_DIFFER = re.compile(
    r".*_token_id|.*dropout.*|.*pdrop|.*layerdrop|use_cache|_.*|architectures|transformers_version|dtype|torch_dtype"
    r"|output_attentions|output_hidden_states|output_router_logits|output_past|return_dict.*|id2label|label2id|problem_type|chunk_size_feed_forward|gradient_checkpointing"
    r"|initializer_range|init_std|rope_parameters|rope_theta|rope_scaling|sliding_window|use_sliding_window"
    r"|max_position_embeddings|n_positions|image_size|task_specific_params|relative_attention_max_distance|name_or_path"
)
"""Keys that say nothing of widths, or that the recipe decides itself. Where one changes a shape, the shape is found."""


_DEFAULT_LABELS = 2


def in_a_line(error: Exception) -> str:
    """Returns what an error says, to stand within a sentence."""
    return brief(error.__cause__ or error, 160) or type(error).__name__


def _shown(value: Any) -> str:
    """A value within a sentence: of a long list its length, of a configuration within a configuration nothing."""
    text = str(value)
    if len(text) <= 40:
        return text
    return f"a list of {len(value)}" if isinstance(value, list | tuple) else brief(text, 40)


@contextlib.contextmanager
def refused(what: str) -> Iterator[None]:
    """Turns whatever transformers or torch raise of a configuration within it into an InputError that begins so.

    Which exceptions these are is open: strict fields, checks of their own, and code that computes with what it gets.
    """
    try:
        with quiet():
            yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{what}: {in_a_line(error)}. Correct it.") from error


_STDS = ("initializer_range", "init_std")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' remarks on configurations, such as token ids beyond a small vocabulary: no model is run."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def config_of_base(base: HuggingFaceBase) -> PretrainedConfig:
    """The configuration that a recipe's base describes.

    Raises:
        InputError: `model_type` is none of the installed transformers', or it does not have one of the keys.
    """
    own = {key: value for key, value in base.model_dump().items() if key not in {"model_type", "architectures"}}
    return config_from(base.model_type, own, architectures=base.architectures, source="base")


def config_from(
    model_type: str,
    own: Mapping[str, Any],
    *,
    architectures: tuple[str, ...] = (),
    source: str,
    strict: bool = True,
) -> PretrainedConfig:
    """A configuration from its type and keys; `source` names them in messages.

    Raises:
        InputError: as `config_of_base`; unknown keys only with `strict`.
    """
    try:
        defaults = AutoConfig.for_model(model_type)
    except (ValueError, KeyError, ImportError):
        raise InputError(
            f"{source}.model_type: {quoted(model_type)} is no model type of the installed transformers. Correct it, or "
            "install a release that has it; code that comes with a checkpoint is not run."
        ) from None
    known = {*defaults.to_dict(), *defaults.attribute_map, "tie_word_embeddings", "is_decoder", "num_labels"}
    for key in own if strict else ():
        if key not in known and not _MAY_DIFFER.fullmatch(key):
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"Did you mean '{near[0]}'?" if near else f"See {type(defaults).__name__} for its keys."
            raise InputError(f"{source}.{brief(key, 60)}: unknown key of model type {model_type}. {hint}")
    _require_possible(own, source)
    with refused(f"{source}: not a possible {model_type} configuration"):
        config = AutoConfig.for_model(model_type, **own)
        config.architectures = list(architectures) or None
        # Everything below reads it so, and what it took without a word may not come out again.
        for read in (config.to_dict, config.to_diff_dict, lambda: config.num_labels):
            read()
        return config


_LAYERS = frozenset(
    "num_hidden_layers n_layer num_layers num_decoder_layers encoder_layers decoder_layers depths".split()
)
_SIZES = WIDTHS | HEADS | HEAD_SIZES | FIXED | _LAYERS
_LARGEST = {**dict.fromkeys(_SIZES, 10**9), **dict.fromkeys(_LAYERS, 1000), "num_labels": 10**5}
"""Key → the largest size. Each layer is built, on the meta device, and each label is given a name."""


def _require_possible(own: Mapping[str, Any], source: str) -> None:
    """Raises InputError for a size that is none, or beyond every model, and for NaN; names the key."""
    for key, value in own.items():
        where = f"{source}.{brief(str(key), 60)}"
        if isinstance(value, Mapping):
            _require_possible(value, where)
        if value is not None and key in _SIZES:
            sizes = value if isinstance(value, list | tuple) else [value]
            least = 0 if key in FIXED else 1
            if not sizes or not all(_is_size(size) and least <= size <= _LARGEST[key] for size in sizes):
                raise InputError(
                    f"{where}: should be a whole number from {least} to {_LARGEST[key]}, found {quoted(value)}. "
                    "Correct it."
                )
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"{where}: must be a finite number, found {value}. Write an ordinary number.")


def require_comparable(base: PretrainedConfig, target: PretrainedConfig) -> None:
    """Raises InputError where two configurations differ in something else than widths and depths; names the key."""
    if base.model_type != target.model_type:
        raise InputError(
            f"model_type is {base.model_type} in the recipe's base but {target.model_type} in the target. "
            "Hyperparameters transfer between widths of one architecture: tune a base that has the target's."
        )
    for key in sorted(differing(base, target)):
        one: Any = getattr(base, key, None)
        other: Any = getattr(target, key, None)
        staged = key in WIDTHS | {"depths"} and isinstance(one, list | tuple) and isinstance(other, list | tuple)
        if staged and len(one) != len(other):
            raise InputError(
                f"{key} has {len(one)} stages in the recipe's base but {len(other)} in the target. Give the base as "
                "many."
            )
        if key in WIDTHS | HEADS | HEAD_SIZES | DEPTHS or _MAY_DIFFER.fullmatch(key):
            continue
        values = (base.to_dict().get(key), target.to_dict().get(key))
        _require_one_model(key, *values, target)
        if key not in FIXED and _is_size(values[0]) and _is_size(values[1]) and not _COUNTS.search(key):
            continue  # a width of a family that is not listed here: `widened` compares it
        raise InputError(
            f"{key} is {_shown(values[0])} in the recipe's base but {_shown(values[1])} in the target. Hyperparameters "
            "transfer between widths of one architecture: give the base the target's."
        )
    if base.num_labels != target.num_labels:
        raise InputError(
            f"num_labels is {base.num_labels} in the recipe's base but {target.num_labels} in the target. Give the "
            "base the target's."
        )


def _require_one_model(key: str, base: Any, target: Any, config: PretrainedConfig) -> None:
    """Raises InputError where a key holds a configuration of its own: its widths are compared nowhere."""
    if not (isinstance(base, Mapping) and isinstance(target, Mapping)):
        return
    inner = next((own for own in sorted(target) if base.get(own) != target[own]), "…")
    hint = (
        f"make base and target of {key} alone, which is a configuration of its own ({target['model_type']})"
        if "model_type" in target and "text" in key
        else "give the base the target's"
    )
    raise InputError(
        f"{key}.{inner} differs between the recipe's base and the target. {config.model_type} has configurations "
        f"within its configuration, and there widths are not transferred: {hint}."
    )


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def differing(base: PretrainedConfig, target: PretrainedConfig) -> set[str]:
    """The keys in which two configurations differ; not those that their type does not have, as old files may."""
    one, other = base.to_dict(), target.to_dict()
    return {key for key in one if one[key] != other.get(key)}


def at_depth_of(base: PretrainedConfig, target: PretrainedConfig) -> PretrainedConfig:
    """The base with the target's depth, so that every layer of the target has its counterpart.

    A library's own scaling of initial weights with depth is then the target's. So are the ids of tokens, one of which
    may be a row of zeros in the embedding, and the positions, whose stretching may be a part of attention's scale.
    """
    own = target.to_dict()
    kept = {key for key in own if key in DEPTHS or key.endswith("_token_id") or key == "rope_parameters"}
    return _changed(base, {key: own[key] for key in kept})


def widened(base: PretrainedConfig, target: PretrainedConfig) -> PretrainedConfig:
    """The base with every width doubled: what has another size then, grows with width.

    The size of heads grows where it differs between base and target; else their number does.
    """
    own = base.to_dict()
    head_grows = head_size(base) != head_size(target)
    grow = set(WIDTHS) | (set(HEAD_SIZES) if head_grows else set(HEADS))
    unlisted = {
        key
        for key in differing(base, target) - WIDTHS - HEADS - HEAD_SIZES - DEPTHS - FIXED
        if _is_size(own.get(key)) and not _MAY_DIFFER.fullmatch(key) and not _COUNTS.search(key)
    }
    return _changed(base, {key: _doubled(own[key]) for key in grow | unlisted if own.get(key) is not None})


def head_size(config: PretrainedConfig) -> int | None:
    """The size of attention's heads; None where a configuration has none."""
    for key in HEAD_SIZES:
        if isinstance(size := getattr(config, key, None), int):
            return size
    hidden, heads = getattr(config, "hidden_size", None), getattr(config, "num_attention_heads", None)
    return hidden // heads if isinstance(hidden, int) and isinstance(heads, int) and heads else None


def reference_std(config: PretrainedConfig) -> float:
    """The std that a recipe's `init_method_std` stands for at the base: the configuration's own, else 0.02.

    A library's draws that do not follow from it (T5, ResNet) are in proportion to it all the same.
    """
    for key in _STDS:
        if isinstance(std := getattr(config, key, None), float) and std > 0:
            return std
    return 0.02


def base_content(config: PretrainedConfig) -> dict[str, Any]:
    """A configuration as the `base` of a recipe: everything that is not a default, without what has no meaning
    there.
    """
    known = AutoConfig.for_model(config.model_type).to_dict()
    kept = {
        key: value
        for key, value in config.to_diff_dict().items()
        if key in known and (not _MAY_DIFFER.fullmatch(key) or key in FIXED or key in _STDS)
    }
    classes = {"architectures": list(config.architectures)} if config.architectures else {}
    labels = (
        {"num_labels": config.num_labels} if "num_labels" not in kept and config.num_labels != _DEFAULT_LABELS else {}
    )
    return {**classes, **kept, **labels, "model_type": config.model_type}


def _doubled(value: Any) -> Any:
    return [2 * item for item in value] if isinstance(value, list | tuple) else 2 * value


def _changed(config: PretrainedConfig, changes: Mapping[str, Any]) -> PretrainedConfig:
    changed = copy.deepcopy(config)
    with refused(f"the {config.model_type} configuration at another size"):
        for key, value in changes.items():
            setattr(changed, key, value)
    return changed
