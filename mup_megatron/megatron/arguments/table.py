"""Megatron-LM's flags as far as they concern a model file or a recipe: name, attribute, default, and what follows.

Data, and how words become values. The four supported releases agree on every entry that they have; a few flags
exist in some of them only. What one architecture's flags are, it says itself (`architectures/command_line.py`).
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Any

from mup_megatron.architectures.flag import Flag, number, whole_number
from mup_megatron.architectures.keys import experts, latent, mtp
from mup_megatron.architectures.registry import architectures
from mup_megatron.errors import InputError
from mup_megatron.validation import brief

FIELDS: dict[str, Flag] = {
    "num_layers": Flag("--num-layers", "num_layers", None, whole_number),
    "hidden_size": Flag("--hidden-size", "hidden_size", None, whole_number),
    "num_attention_heads": Flag("--num-attention-heads", "num_attention_heads", None, whole_number),
    "vocab_size": Flag("--vocab-size", "vocab_size", None, whole_number),
    "seq_length": Flag("--seq-length", "seq_length", None, whole_number),
    "ffn_hidden_size": Flag("--ffn-hidden-size", "ffn_hidden_size", None, whole_number),
    "kv_channels": Flag("--kv-channels", "kv_channels", None, whole_number),
    "group_query_attention": Flag("--group-query-attention", "group_query_attention", False),
    "num_query_groups": Flag("--num-query-groups", "num_query_groups", 1, whole_number),
    "swiglu": Flag("--swiglu", "swiglu", False),
    "normalization": Flag("--normalization", "normalization", "LayerNorm", str),
    "norm_epsilon": Flag("--norm-epsilon", "layernorm_epsilon", 1e-5, number),
    "apply_layernorm_1p": Flag("--apply-layernorm-1p", "layernorm_zero_centered_gamma", False),
    "qk_layernorm": Flag("--qk-layernorm", "qk_layernorm", False),
    "position_embedding_type": Flag("--position-embedding-type", "position_embedding_type", "learned_absolute", str),
    "rotary_base": Flag("--rotary-base", "rotary_base", 10000, whole_number),
    "rotary_percent": Flag("--rotary-percent", "rotary_percent", 1.0, number),
    "add_bias_linear": Flag("--disable-bias-linear", "add_bias_linear", True),
    "add_qkv_bias": Flag("--add-qkv-bias", "add_qkv_bias", False),
    "untie_embeddings_and_output_weights": Flag(
        "--untie-embeddings-and-output-weights", "untie_embeddings_and_output_weights", False
    ),
    "make_vocab_size_divisible_by": Flag(
        "--make-vocab-size-divisible-by", "make_vocab_size_divisible_by", 128, whole_number
    ),
    "max_position_embeddings": Flag("--max-position-embeddings", "max_position_embeddings", None, whole_number),
    "init_method_std": Flag("--init-method-std", "init_method_std", 0.02, number),
    "attention_dropout": Flag("--attention-dropout", "attention_dropout", 0.1, number),
    "hidden_dropout": Flag("--hidden-dropout", "hidden_dropout", 0.1, number),
    "transformer_impl": Flag("--transformer-impl", "transformer_impl", "transformer_engine", str),
    **experts.FLAGS,
    **latent.FLAGS,
    **mtp.FLAGS,
}
"""Key of a model file → the flag that says the same."""

ALSO_READ = (
    Flag("--use-rotary-position-embeddings", "use_rotary_position_embeddings", False),
    Flag("--no-position-embedding", "add_position_embedding", True),
    Flag("--encoder-num-layers", "encoder_num_layers", None, whole_number),
    Flag("--encoder-seq-length", "encoder_seq_length", None, whole_number),
    Flag("--padded-vocab-size", "padded_vocab_size", None, whole_number),
)
"""Other ways to say what a key of a model file says."""


def _refused(reason: str, *flags: Flag) -> Iterator[Flag]:
    for flag in flags:
        yield replace(flag, refusal=reason)


SPEC = Flag(
    "--spec",
    "spec",
    None,
    str,
    refusal="a custom layer can have any parameters. List them as `custom_tensors` in the recipe's base; `model "
    "--from-args` takes them with --custom-tensors. Or drop the flag.",
    many=True,
)
"""Refused, but for the specs that an architecture has."""

CHECKPOINT_ARGS = Flag(
    "--use-checkpoint-args",
    "use_checkpoint_args",
    False,
    refusal="a part of the model comes from the checkpoint's arguments. Say all of it on the line, or let Megatron "
    "read it: the launcher's --mup-write-model-file.",
)
"""Refused where the line leaves a part of the model to it."""

_REFUSED = (
    *_refused(
        "experts that work on a projection of the residual stream are not supported yet. Drop the flag.",
        Flag("--moe-latent-size", "moe_latent_size", None, whole_number),
    ),
    *_refused(
        "experts that are copies of a trained MLP do not start as a recipe says. Drop the flag.",
        Flag("--moe-use-upcycling", "moe_use_upcycling", False),
    ),
    *_refused(
        "it makes one parameter of the experts' matrices, under another name. Drop the flag.",
        Flag("--moe-single-grouped-weight", "moe_single_grouped_weight", False),
        Flag("--moe-single-grouped-bias", "moe_single_grouped_bias", False),
    ),
    *_refused(
        "it makes the groups of experts depend on the expert parallelism. Use --moe-router-num-groups and "
        "--moe-router-group-topk.",
        Flag("--moe-router-topk-limited-devices", "moe_router_topk_limited_devices", None, whole_number),
    ),
    *_refused(
        "the projections of queries, keys and values to their latents become one matrix, which a model file does not "
        "know. Drop the flag.",
        Flag("--mla-down-proj-fusion", "mla_down_proj_fusion", False),
    ),
    *_refused(
        "it is the older form of what is behind '/' in --hybrid-layer-pattern. Write it there, once for each of "
        "--mtp-num-layers: M*M*/MM/MM.",
        Flag("--mtp-hybrid-override-pattern", "mtp_hybrid_override_pattern", None, str),
    ),
    *_refused(
        "one layer that predicts several tokens is not supported yet. Drop the flag.",
        Flag("--mtp-use-repeated-layer", "mtp_use_repeated_layer", False),
    ),
    SPEC,
    *_refused(
        "layers of different sizes are not supported: the width ratio of a layer has to be the same at every depth. "
        "Choose a model whose layers are alike.",
        Flag("--heterogeneous-layers-config-path", "heterogeneous_layers_config_path", None, str),
        Flag("--heterogeneous-layers-config-encoded-json", "heterogeneous_layers_config_encoded_json", None, str),
    ),
    *_refused(
        "this kind of attention is not supported yet. Choose a model with ordinary self-attention.",
        Flag("--experimental-attention-variant", "experimental_attention_variant", None, str),
        Flag("--linear-attention-freq", "linear_attention_freq", None, str),
    ),
    *_refused(
        "the gate is a part of linear_qkv that a model file does not know. Choose a model without.",
        Flag("--attention-output-gate", "attention_output_gate", False),
    ),
    *_refused(
        "only models of Megatron-Core are supported. Drop the flag.",
        Flag("--use-legacy-models", "use_legacy_models", False),
    ),
    *_refused(
        "this MLP is gated, and a model file knows no gated MLP but swiglu. Use --swiglu.",
        Flag("--quick-geglu", "quick_geglu", False),
    ),
    *_refused(
        "the std of initial weights is the recipe's, and this draw has none. Drop the flag.",
        Flag("--init-method-xavier-uniform", "init_method_xavier_uniform", False),
    ),
    *_refused(
        "the std of initial weights is the recipe's. Drop the flag, and give embeddings their own with "
        "`per_parameter: [{match: 'embedding.*', init_mult: …}]` in the recipe.",
        Flag("--embedding-init-method-std", "embedding_init_method_std", None, number),
    ),
    *_refused(
        "the model is described in another file, in another form. Give its flags on the command line, or let "
        "Megatron read it: the launcher's --mup-write-model-file.",
        Flag("--yaml-cfg", "yaml_cfg", None, str),
    ),
    *_refused(
        "frozen weights are not trained, so they have no learning rate. Drop the flag.",
        Flag("--freeze-all-layers", "freeze_all_layers", False),
    ),
    *_refused(
        "vision models are not supported yet. Choose a GPT model.",
        Flag("--vision-pretraining", "vision_pretraining", False),
    ),
)


SOFTMAX_TYPE = Flag("--softmax-type", "softmax_type", "vanilla", str)
ROPE_SCALING = Flag("--use-rope-scaling", "use_rope_scaling", False)

NOT_SAID = (
    Flag("--squared-relu", "squared_relu", False),
    Flag("--openai-gelu", "openai_gelu", False),
    Flag("--glu-linear-offset", "glu_linear_offset", 0.0, number),
    Flag("--activation-func-clamp-value", "activation_func_clamp_value", None, number),
    SOFTMAX_TYPE,
    Flag("--qk-l2-norm", "qk_l2_norm", False),
    Flag("--qk-clip", "qk_clip", False),
    Flag("--window-size", "window_size", None, str),
    Flag("--window-attn-skip-freq", "window_attn_skip_freq", None, str),
    Flag("--no-rope-freq", "no_rope_freq", None, str),
    Flag("--rotary-interleaved", "rotary_interleaved", False),
    Flag("--rotary-seq-len-interpolation-factor", "rotary_seq_len_interpolation_factor", None, whole_number),
    ROPE_SCALING,
    Flag("--rope-scaling-factor", "rope_scaling_factor", 8.0, number),
    Flag("--apply-residual-connection-post-layernorm", "apply_residual_connection_post_layernorm", False),
    Flag("--logits-load-dir", "logits_load_dir", None, str),
    Flag("--mtp-detach-heads", "mtp_detach_heads", False),
    Flag("--moe-apply-probs-on-input", "moe_apply_probs_on_input", False),
    Flag("--moe-input-jitter-eps", "moe_input_jitter_eps", None, number),
    Flag("--moe-expert-capacity-factor", "moe_expert_capacity_factor", None, number),
    Flag("--moe-token-drop-policy", "moe_token_drop_policy", "probs", str),
    Flag("--moe-router-force-load-balancing", "moe_router_force_load_balancing", False),
    Flag("--moe-router-force-biased", "moe_router_force_biased", None, number),
)
"""What a model file cannot say either, but which leaves parameters and their scale as they are."""

HYPERPARAMETERS = {
    "optimizer": Flag("--optimizer", "optimizer", "adam", str),
    "lr": Flag("--lr", "lr", None, number),
    "min_lr": Flag("--min-lr", "min_lr", 0.0, number),
    "init_method_std": FIELDS["init_method_std"],
    "weight_decay": Flag("--weight-decay", "weight_decay", 0.01, number),
    "adam_beta1": Flag("--adam-beta1", "adam_beta1", 0.9, number),
    "adam_beta2": Flag("--adam-beta2", "adam_beta2", 0.999, number),
    "adam_eps": Flag("--adam-eps", "adam_eps", 1e-8, number),
    "sgd_momentum": Flag("--sgd-momentum", "sgd_momentum", 0.9, number),
    "muon_momentum": Flag("--muon-momentum", "muon_momentum", 0.9, number),
    "muon_nesterov": Flag("--muon-nesterov", "muon_nesterov", False),
    "muon_scale_mode": Flag("--muon-scale-mode", "muon_scale_mode", "spectral", str),
    "muon_extra_scale_factor": Flag("--muon-extra-scale-factor", "muon_extra_scale_factor", 1.0, number),
    "muon_num_ns_steps": Flag("--muon-num-ns-steps", "muon_num_ns_steps", 5, whole_number),
    "muon_coefficient_type": Flag("--muon-coefficient-type", "muon_coefficient_type", "quintic", str),
    "muon_tp_mode": Flag("--muon-tp-mode", "muon_tp_mode", "blockwise", str),
    "clip_grad": Flag("--clip-grad", "clip_grad", 1.0, number),
}
"""A recipe's hyperparameter → the flag that says the same."""

SCHEDULE = (
    Flag("--train-iters", "train_iters", None, whole_number),
    Flag("--train-samples", "train_samples", None, whole_number),
    Flag("--global-batch-size", "global_batch_size", None, whole_number),
    Flag("--lr-decay-style", "lr_decay_style", "linear", str),
    Flag("--lr-warmup-fraction", "lr_warmup_fraction", None, number),
    Flag("--lr-warmup-iters", "lr_warmup_iters", 0, whole_number),
    Flag("--lr-warmup-samples", "lr_warmup_samples", 0, whole_number),
    Flag("--lr-warmup-init", "lr_warmup_init", 0.0, number),
    Flag("--lr-decay-iters", "lr_decay_iters", None, whole_number),
    Flag("--lr-decay-samples", "lr_decay_samples", None, whole_number),
    Flag("--lr-wsd-decay-style", "lr_wsd_decay_style", "exponential", str),
    Flag("--lr-wsd-decay-iters", "lr_wsd_decay_iters", None, whole_number),
    Flag("--lr-wsd-decay-samples", "lr_wsd_decay_samples", None, whole_number),
    Flag("--weight-decay-incr-style", "weight_decay_incr_style", "constant", str),
    Flag("--start-weight-decay", "start_weight_decay", None, number),
    Flag("--end-weight-decay", "end_weight_decay", None, number),
    Flag("--decoupled-lr", "decoupled_lr", None, number),
    Flag("--decoupled-min-lr", "decoupled_min_lr", None, number),
)
"""What else decides learning rates and weight decay over a run."""

NATIVE_MUP = (
    Flag("--use-mup", "use_mup", False),
    Flag("--mup-base-hidden-size", "mup_base_hidden_size", None, whole_number),
    Flag("--mup-width-mult", "mup_width_mult", 1.0, number),
    Flag("--mup-embedding-mult", "mup_embedding_mult", 1.0, number),
    Flag("--mup-output-mult", "mup_output_mult", 1.0, number),
    Flag("--mup-base-head-dim", "mup_base_head_dim", None, number),
    Flag("--mup-attn-scale-power", "mup_attn_scale_power", 1.0, number),
)
"""Megatron-Core's own μP, 0.17 and later."""

STOPPED = (
    *_refused(
        "a recipe is for pre-training, and reinforcement learning is another task",
        Flag("--perform-rl-step", "perform_rl_step", False),
    ),
    *_refused(
        "the weights would be drawn after the plan has scaled them",
        Flag("--init-model-with-meta-device", "init_model_with_meta_device", False),
    ),
    *_refused(
        "weights that are stored in so few bits cannot be scaled without loss",
        Flag("--fp8-param-gather", "fp8_param_gather", False),
        Flag("--fp4-param-gather", "fp4_param_gather", False),
    ),
    *_refused(
        "it cuts weights in a way that the plan does not know",
        Flag("--tensor-parallel-num-weight-shards", "tensor_parallel_num_weight_shards", None, whole_number, fine=(1,)),
    ),
)
"""What leaves the model as it is, and with which a run with a recipe is stopped: `refusal` says why."""

MORE_TOKENS = ("--tokenizer-special-tokens", "--tiktoken-special-tokens", "--tokenizer-metadata")
"""Flags after which a tokenizer has more entries than its file, or is another one."""

TOKENIZER = (
    Flag("--tokenizer-type", "tokenizer_type", None, str),
    Flag("--tokenizer-model", "tokenizer_model", None, str),
    Flag("--vocab-file", "vocab_file", None, str),
    Flag("--merge-file", "merge_file", None, str),
    Flag("--vocab-extra-ids", "vocab_extra_ids", 0, whole_number),
    Flag("--tiktoken-num-special-tokens", "tiktoken_num_special_tokens", 1000, whole_number),
    Flag("--no-pad-vocab-size", "pad_vocab_size", True),
    Flag("--disable-pad-vocab-size", "pad_vocab_size", True),
)
"""What decides the vocabulary where --vocab-size does not."""


def of_architectures() -> tuple[Flag, ...]:
    """Returns the flags that single architectures have, and that are read into their model files."""
    return tuple(dict.fromkeys(flag for each in architectures().values() for flag in each.command_line.flags))


def refused() -> tuple[Flag, ...]:
    """Returns what changes parameters or their scale, and what a model file cannot say."""
    return (*_REFUSED, *(flag for each in architectures().values() for flag in each.command_line.refused))


def of_models() -> tuple[Flag, ...]:
    """Returns every flag that concerns a model."""
    return (*FIELDS.values(), *ALSO_READ, CHECKPOINT_ARGS, *of_architectures(), *refused(), *NOT_SAID)


def every() -> tuple[Flag, ...]:
    """Returns every flag whose value is read. Functions all, because an architecture may be registered at any time."""
    return tuple(dict.fromkeys((*of_models(), *STOPPED, *HYPERPARAMETERS.values(), *SCHEDULE, *NATIVE_MUP)))


def parsed(words: Sequence[str], known: Sequence[Flag]) -> dict[str, Any]:
    """Attribute → value of the known flags among words, as argparse would have it; those not given are left out.

    Both `--a b` and `--a=b`; the last of a repeated flag wins; what is not known is skipped.

    Raises:
        InputError: a value is missing, not of its type, or contains a variable that nothing sets; names the flag.
    """
    by_name = {flag.name: flag for flag in known}
    given: dict[Flag, str | None] = {}
    for index, word in enumerate(words):
        name, equals, attached = word.partition("=")
        flag = by_name.get(name)
        if flag is None:
            continue
        if equals:
            # A part of a script's word knows its line no more.
            given[flag] = _Located(attached, getattr(word, "line", None), getattr(word, "why", ""))
        elif flag.parse is None:
            given[flag] = None
        else:
            values = [*takewhile(lambda each: not each.startswith("--"), words[index + 1 :])]
            if not values:
                raise InputError(f"{name}: its value is missing. Write it after the flag.")
            given[flag] = values[0]
            if flag.many and len(values) > 1:
                origin = getattr(values[0], "line", None), getattr(values[0], "why", "")
                given[flag] = _Located(" ".join(values), *origin)
    return {flag.key: _value(flag, text) for flag, text in given.items()}


class _Located(str):
    line: int | None
    why: str

    def __new__(cls, text: str, line: int | None, why: str) -> "_Located":
        located = super().__new__(cls, text)
        located.line = line
        located.why = why
        return located


def _value(flag: Flag, text: str | None) -> Any:
    if text is None:
        return not flag.default
    variable = unresolved(text)
    if variable is not None:
        line, why = getattr(text, "line", None), getattr(text, "why", "")
        added = flag.name if flag.parse is None else f"{flag.name} with its value"
        raise InputError(
            f"{flag.name} {brief(text, 60)}{f' in line {line}' if line else ''}: what {brief(variable, 40)} stands for "
            f"is not known here{f', because {brief(why, 60)}' if why else ''}. "
            f"Write the value itself, or add {added} after the script."
        )
    if flag.parse is None:
        raise InputError(f"{flag.name}: takes no value, found '{brief(text, 60)}'. Write the flag alone.")
    return flag.value(text)


_VARIABLE = re.compile(r"\$\{[^}]*\}?|\$\(.*|\$\w+|\$[@*#?!$-]|`.*", re.DOTALL)


def unresolved(word: str) -> str | None:
    """Returns the first shell variable or substitution that a word still contains, as it is written there."""
    found = _VARIABLE.search(word)
    return found[0] if found else None
