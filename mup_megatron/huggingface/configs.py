"""Hugging Face configurations: which keys are widths, which are depths, and what base and target must share.

No model is built here. To support a family whose configuration names a width in another way, add its key to `WIDTHS`.
More than 400 lines, of which a third are tables of keys.
"""

import contextlib
import copy
import difflib
import logging
import math
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from transformers import AutoConfig, PretrainedConfig
from transformers.utils import logging as transformers_logging

from mup_megatron.errors import InputError
from mup_megatron.recipe import HuggingFaceBase
from mup_megatron.validation import brief, quoted

_COUNTS = re.compile("vocab|position|length|kernel|^max_|^num_|_num_|groups$")
"""What a key has in its name that is a size and no width, where it is not listed below. With more groups of a
convolution each reads less of its input, which is another architecture.
"""

HEADS = frozenset(
    "num_attention_heads n_head num_heads num_key_value_heads num_kv_heads encoder_attention_heads "
    "decoder_attention_heads attention_heads n_heads linear_num_key_heads linear_num_value_heads mamba_num_heads "
    "mamba_n_heads n_mamba_heads num_global_key_value_heads".split()
)
"""Numbers of heads."""
HEAD_SIZES = frozenset(
    "head_dim d_kv linear_key_head_dim linear_value_head_dim mamba_head_dim mamba_headdim mamba_d_head".split()
)
_ATTENTION_HEAD_SIZES = ("head_dim", "d_kv")
WIDTHS = frozenset(
    "hidden_size n_embd d_model embedding_size hidden_sizes word_embed_proj_dim intermediate_size n_inner ffn_dim d_ff "
    "encoder_ffn_dim decoder_ffn_dim pooler_output_size out_hidden_size moe_intermediate_size "
    "shared_expert_intermediate_size moe_shared_expert_intermediate_size shared_intermediate_size "
    "intermediate_size_mlp".split()
)
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
CHOSEN = ("num_experts_per_tok", "top_k_experts", "moe_k", "moe_topk")
"""How many experts there are, and how many of them see a token: the learning rate transfers over both."""
DEPTHS = frozenset(
    "num_hidden_layers n_layer num_layers num_decoder_layers encoder_layers decoder_layers depths layer_types "
    "max_window_layers stage_names out_features out_indices depth layers_block_type cross_attention_layers "
    "deepstack_visual_indexes intermediate_layers_indices num_global_layers attn_layer_indices hybrid_layer_ids "
    "num_encoder_layers mlp_only_layers moe_layers no_rope_layers".split()
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
    """Returns the configuration that a recipe's base describes.

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
    """Returns a configuration from its type and keys; `source` names them in messages.

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
        # Some code reads a size that its configuration does not declare, as Qwen3-MoE its head_dim.
        if key not in known and key not in _SIZES and not _MAY_DIFFER.fullmatch(key):
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
            least = 0 if key in FIXED or "shared" in key else 1
            if not sizes or not all(_is_size(size) and least <= size <= _LARGEST[key] for size in sizes):
                raise InputError(
                    f"{where}: should be a whole number from {least} to {_LARGEST[key]}, found {quoted(value)}. "
                    "Correct it."
                )
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"{where}: must be a finite number, found {value}. Write an ordinary number.")


def value(config: PretrainedConfig, key: str) -> Any:
    """Returns a configuration's value; None where it has none, or one for each layer."""
    try:
        return getattr(config, key, None)
    except RuntimeError:  # transformers refuses to give one value where layers have several
        return None


def inner(config: PretrainedConfig) -> dict[str, PretrainedConfig]:
    """Returns the configurations within a configuration, such as those of a text and a vision model, by key."""
    return {key: value for key, value in vars(config).items() if isinstance(value, PretrainedConfig)}


def require_comparable(base: PretrainedConfig, target: PretrainedConfig, within: str = "") -> None:
    """Raises InputError where two configurations differ in something else than widths and depths; names the key.

    Args:
        base: of the recipe.
        target: of the model that is trained.
        within: the keys under which the two stand in others, each with a dot.
    """
    if base.model_type != target.model_type:
        raise InputError(
            f"{within}model_type is {base.model_type} in the recipe's base but {target.model_type} in the target. "
            "Hyperparameters transfer between widths of one architecture: tune a base that has the target's."
        )
    parts, others = inner(base), inner(target)
    for key in sorted(differing(base, target)):
        if key in parts and key in others:
            require_comparable(parts[key], others[key], f"{within}{key}.")
        else:
            _require_comparable(key, base, target, within)
    if base.num_labels != target.num_labels:
        raise InputError(
            f"{within}num_labels is {base.num_labels} in the recipe's base but {target.num_labels} in the target. Give "
            "the base the target's."
        )


def _require_comparable(key: str, base: PretrainedConfig, target: PretrainedConfig, within: str) -> None:
    one, other = value(base, key), value(target, key)
    staged = key in WIDTHS | {"depths"} and isinstance(one, list | tuple) and isinstance(other, list | tuple)
    if staged and len(one) != len(other):
        raise InputError(
            f"{within}{key} has {len(one)} stages in the recipe's base but {len(other)} in the target. Give the base "
            "as many."
        )
    if key in {*WIDTHS, *HEADS, *HEAD_SIZES} or _follows_depth(key, base, target) or _MAY_DIFFER.fullmatch(key):
        return
    if key in {*EXPERTS, *CHOSEN} and _share_of_tokens(base) is not None and _share_of_tokens(target) is not None:
        return
    one, other = base.to_dict().get(key), target.to_dict().get(key)
    if key == _PER_LAYER and isinstance(one, Mapping) and isinstance(other, Mapping):
        changed = {own for at in other for own in other[at] if one.get(at, other[at]).get(own) != other[at][own]}
        if changed <= {*WIDTHS, *HEADS, *HEAD_SIZES}:
            return
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        first = next((own for own in sorted(other) if one.get(own) != other[own]), "…")
        raise InputError(
            f"{within}{key}.{first} differs between the recipe's base and the target, and widths in such a table are "
            "not transferred. Give the base the target's."
        )
    if key not in FIXED and _is_size(one) and _is_size(other) and not _COUNTS.search(key):
        return  # a width of a family that is not listed here: `widened` compares it
    raise InputError(
        f"{within}{key} is {_shown(one)} in the recipe's base but {_shown(other)} in the target. Hyperparameters "
        "transfer between widths of one architecture: give the base the target's."
    )


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def differing(base: PretrainedConfig, target: PretrainedConfig) -> set[str]:
    """The keys in which two configurations differ; not those that their type does not have, as old files may."""
    one, other = base.to_dict(), target.to_dict()
    known = _known(base)
    return {key for key in one if key in known and one[key] != other.get(key)}


def differing_states(base: PretrainedConfig, target: PretrainedConfig) -> list[str]:
    """Returns the keys of the size of a state space's state, of those in which two configurations differ."""
    within = [key for name, part in inner(base).items() for key in differing_states(part, inner(target)[name])]
    return sorted(differing(base, target) & _STATE_SIZES) + within


def differing_groups(base: PretrainedConfig, target: PretrainedConfig) -> list[tuple[int, int]]:
    """Returns the query heads of each key/value head at base and target, of those parts in which they differ."""
    within = [each for name, part in inner(base).items() for each in differing_groups(part, inner(target)[name])]
    before, now = (_heads_per_group(config) for config in (base, target))
    return [(before, now), *within] if before and now and before != now else within


def _heads_per_group(config: PretrainedConfig) -> int | None:
    keys = ("num_key_value_heads", "num_kv_heads")
    heads = value(config, "num_attention_heads")
    groups = next((found for key in keys if isinstance(found := value(config, key), int)), None)
    return heads // groups if isinstance(heads, int) and groups else None


_STATE_SIZES = frozenset({"state_size", "ssm_state_size", "mamba_d_state"})


def _known(config: PretrainedConfig) -> Collection[str]:
    """Returns the keys that a configuration's type has, where they can be told: its code passes over others."""
    kind = type(config)
    try:
        return {*kind().to_dict(), *kind.attribute_map, _PER_LAYER}
    except Exception:  # some types have no defaults
        return config.to_dict()


_PER_LAYER = "per_layer_config"
"""The key under which layers have values of their own."""


def at_depth_of(base: PretrainedConfig, target: PretrainedConfig) -> PretrainedConfig:
    """Returns the base with the target's depth, so that every layer of the target has its counterpart.

    A library's own scaling of initial weights with depth is then the target's. So are the ids of tokens, one of which
    may be a row of zeros in the embedding, and the positions, whose stretching may be a part of attention's scale.
    """
    return _changed(base, _depth_of(base, target))


def _depth_of(base: PretrainedConfig, target: PretrainedConfig) -> dict[str, Any]:
    own, others = target.to_dict(), inner(target)
    kept = {
        key: own[key]
        for key in differing(base, target)
        if key in own and (_follows_depth(key, base, target) or key.endswith("_token_id") or key == "rope_parameters")
    }
    return kept | {key: _depth_of(part, others[key]) for key, part in inner(base).items() if key in others}


def _follows_depth(key: str, base: PretrainedConfig, target: PretrainedConfig) -> bool:
    """Returns whether a key is a number of layers, or names the kind of each in lists as long as the depths."""
    if key in DEPTHS:
        return True
    depths = [value(config, "num_hidden_layers") for config in (base, target)]
    lists = [config.to_dict().get(key) for config in (base, target)]
    return depths[0] != depths[1] and all(
        isinstance(kinds, list | tuple) and len(kinds) == depth and all(isinstance(kind, str) for kind in kinds)
        for kinds, depth in zip(lists, depths, strict=True)
    )


def widened(base: PretrainedConfig, target: PretrainedConfig) -> PretrainedConfig:
    """Returns the base with every width doubled: what has another size then, grows with width.

    The size of heads grows where it differs between base and target; else their number does.
    """
    return _changed(base, _wider(base, target))


def _wider(base: PretrainedConfig, target: PretrainedConfig) -> dict[str, Any]:
    own, changed, others = base.to_dict(), differing(base, target), inner(target)
    sized = {key for key in HEAD_SIZES & changed if _is_size(own.get(key))}
    if head_size(base) != head_size(target):
        sized |= set(_ATTENTION_HEAD_SIZES)
    # Where the heads of a kind of layer grow in size, they do not in number.
    grow = set(WIDTHS) | sized | {key for key in HEADS if _kind(key) not in set(map(_kind, sized))}
    unlisted = {
        key
        for key in changed - WIDTHS - HEADS - HEAD_SIZES - DEPTHS - FIXED - {*EXPERTS, *CHOSEN}
        if _is_size(own.get(key)) and not _MAY_DIFFER.fullmatch(key) and not _COUNTS.search(key)
    }
    found = {key: _doubled(own[key]) for key in grow | unlisted if own.get(key) is not None}
    if isinstance(layers := own.get(_PER_LAYER), Mapping):
        found[_PER_LAYER] = {
            at: {key: _doubled(size) if key in grow else size for key, size in each.items()}
            for at, each in layers.items()
        }
    return found | {key: _wider(part, others[key]) for key, part in inner(base).items() if key in others}


def _kind(key: str) -> str:
    """Returns which of the layers of a hybrid model have heads of a key's size or number."""
    return next((kind for kind in ("mamba", "linear") if kind in key), "attention")


def head_size(config: PretrainedConfig) -> int | None:
    """Returns the size of attention's heads; None where a configuration has none."""
    for key in _ATTENTION_HEAD_SIZES:
        if isinstance(size := value(config, key), int):
            return size
    hidden, heads = value(config, "hidden_size"), value(config, "num_attention_heads")
    return hidden // heads if isinstance(hidden, int) and isinstance(heads, int) and heads else None


def share_of_tokens(config: PretrainedConfig) -> float:
    """Returns the part of the tokens that one expert sees, k/E; 1 without experts, and where it is not known."""
    shares = (_share_of_tokens(own) for own in (config, *inner(config).values()))
    return next((share for share in shares if share is not None), 1.0)


def _share_of_tokens(config: PretrainedConfig) -> float | None:
    count, chosen = (_first_size(config, keys) for keys in (EXPERTS, CHOSEN))
    return chosen / count if count and chosen else None


def _first_size(config: PretrainedConfig, keys: tuple[str, ...]) -> int | None:
    found: list[int] = [size for key in keys if _is_size(size := value(config, key))]
    return found[0] if found else None


def reference_std(config: PretrainedConfig) -> float:
    """Returns the std that a recipe's `init_method_std` stands for at the base: the configuration's own, else 0.02.

    A library's draws that do not follow from it (T5, ResNet) are in proportion to it all the same.
    """
    for own in (config, *inner(config).values()):
        for key in _STDS:
            if isinstance(std := value(own, key), float) and std > 0:
                return float(std)
    return 0.02


def base_content(config: PretrainedConfig) -> dict[str, Any]:
    """Returns a configuration as the `base` of a recipe: everything that is not a default, without what has no meaning
    there.
    """
    known, parts = AutoConfig.for_model(config.model_type).to_dict(), inner(config)
    kept = {
        key: value
        for key, value in config.to_diff_dict().items()
        if (key in known or key in _SIZES) and (not _MAY_DIFFER.fullmatch(key) or key in FIXED or key in _STDS)
    }
    # A default may follow from other keys, and from those of the default configuration it then is another one.
    again = AutoConfig.for_model(**kept | {"model_type": config.model_type}).to_dict()
    own = config.to_dict()
    kept |= {key: own[key] for key in own if (key in _SIZES or key in parts) and again.get(key) != own[key]}
    classes = {"architectures": list(config.architectures)} if config.architectures else {}
    labels = (
        {"num_labels": config.num_labels} if "num_labels" not in kept and config.num_labels != _DEFAULT_LABELS else {}
    )
    return {**classes, **kept, **labels, "model_type": config.model_type}


def _doubled(value: Any) -> Any:
    return [2 * item for item in value] if isinstance(value, list | tuple) else 2 * value


def _changed(config: PretrainedConfig, changes: Mapping[str, Any]) -> PretrainedConfig:
    """Returns a copy with other values; those of a configuration within it stand under its key."""
    changed = copy.deepcopy(config)
    with refused(f"the {config.model_type} configuration at another size"):
        _set(changed, changes)
    return changed


def _set(config: PretrainedConfig, changes: Mapping[str, Any]) -> None:
    for key, new in changes.items():
        within = vars(config).get(key)
        if isinstance(within, PretrainedConfig):
            _set(within, new)
        else:
            setattr(config, key, new)
