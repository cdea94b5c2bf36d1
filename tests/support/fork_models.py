"""GPT models laid out as the fork Megatron-DeepSpeed lays out its two, and its arguments, for tests without the fork.

Names, nesting, class names, initial draw, norm factor and the order of the forward pass are the fork's (its last
commit, 4efb479d), written down here from reading it; everything else is plain torch. A tensor-parallel rank is a model
with a rank's shapes: nothing communicates. What the fork's patch calls is called here in the same places.
"""

import argparse
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mup_megatron import megatron_deepspeed
from mup_megatron.architectures.model_file import ModelFile

_NORMS = {"LayerNorm": "layernorm", "RMSNorm": "rmsnorm"}


# ---- arguments -----------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """The flags of the fork that concern a recipe, with its names and defaults."""
    made = argparse.ArgumentParser(allow_abbrev=False)
    for name, kind, default in (
        ("num-layers", int, None), ("hidden-size", int, None), ("ffn-hidden-size", int, None),
        ("num-attention-heads", int, None), ("num-key-value-heads", int, None), ("kv-channels", int, None),
        ("encoder-num-layers", int, None), ("seq-length", int, None), ("max-position-embeddings", int, None),
        ("make-vocab-size-divisible-by", int, 128), ("vocab-size", int, None), ("normalization", str, "layernorm"),
        ("layernorm-epsilon", float, 1e-5), ("rotary-percent", float, 1.0), ("attention-dropout", float, 0.1),
        ("hidden-dropout", float, 0.1), ("init-method-std", float, 0.02), ("num-experts-switch", int, None),
        ("transformer-impl", str, "local"), ("optimizer", str, "adam"), ("lr", float, None), ("min-lr", float, 0.0),
        ("weight-decay", float, 0.01), ("start-weight-decay", float, None), ("end-weight-decay", float, None),
        ("weight-decay-incr-style", str, "constant"), ("clip-grad", float, 1.0), ("adam-beta1", float, 0.9),
        ("adam-beta2", float, 0.999), ("adam-eps", float, 1e-8), ("sgd-momentum", float, 0.9),
        ("train-iters", int, None), ("train-samples", int, None), ("train-tokens", int, None),
        ("lr-decay-style", str, "linear"), ("lr-decay-iters", int, None), ("lr-decay-samples", int, None),
        ("lr-decay-tokens", int, None), ("lr-warmup-fraction", float, None), ("lr-warmup-iters", int, 0),
        ("lr-warmup-samples", int, 0), ("lr-warmup-tokens", int, None), ("tensor-model-parallel-size", int, 1),
        ("pipeline-model-parallel-size", int, 1), ("load", str, None),
    ):  # fmt: skip
        made.add_argument(f"--{name}", type=kind, default=default)
    for name in (
        "use-rotary-position-embeddings", "apply-layernorm-1p", "swiglu", "untie-embeddings-and-output-weights",
        "openai-gelu", "squared-relu", "apply-residual-connection-post-layernorm", "random-ltd",
        "create-moe-param-group", "kd", "mos", "ds-sequence-parallel-fpdt", "retro-add-retriever",
        "universal-checkpoint", "init-method-xavier-uniform", "use-flash-attn-triton", "finetune", "deepspeed",
        "cpu-optimizer", "override-opt_param-scheduler", "use-checkpoint-opt_param-scheduler", "ds_fused_adam",
        "no-pipeline-parallel",
    ):  # fmt: skip
        made.add_argument(f"--{name}", action="store_true")
    made.add_argument("--num-experts", type=int, nargs="+", default=[1])
    made.add_argument("--rotary-position-embeddings-theta", type=int, default=10000, dest="rope_theta")
    made.add_argument("--no-position-embedding", action="store_false", dest="add_position_embedding")
    made.add_argument("--disable-bias-linear", action="store_false", dest="add_bias_linear")
    made.add_argument("--no-initialization", action="store_false", dest="perform_initialization")
    return made


def flags(model: ModelFile) -> list[str]:
    """The fork's flags of a model file."""
    words = [
        *("--num-layers", model.num_layers, "--hidden-size", model.hidden_size, "--ffn-hidden-size", model.ffn_size),
        *("--num-attention-heads", model.num_attention_heads, "--kv-channels", model.head_size),
        *("--num-key-value-heads", model.query_groups, "--seq-length", model.seq_length),
        *("--max-position-embeddings", model.positions, "--normalization", _NORMS[model.normalization]),
        *("--make-vocab-size-divisible-by", model.make_vocab_size_divisible_by),
        *("--attention-dropout", model.attention_dropout, "--hidden-dropout", model.hidden_dropout),
        *("--rotary-percent", model.rotary_percent, "--rotary-position-embeddings-theta", model.rotary_base),
    ]
    switches = {
        "--swiglu": model.swiglu,
        "--untie-embeddings-and-output-weights": not model.tied,
        "--disable-bias-linear": not model.add_bias_linear,
        "--apply-layernorm-1p": model.apply_layernorm_1p,
        "--use-rotary-position-embeddings": model.position_embedding_type == "rope",
        "--no-position-embedding": model.position_embedding_type == "none",
    }
    return [str(word) for word in words] + [flag for flag, on in switches.items() if on]


def validated(args: argparse.Namespace, model: ModelFile) -> argparse.Namespace:
    """What the fork's `validate_args` and its tokenizer add to parsed arguments, as far as it matters here."""
    args.encoder_num_layers = args.num_layers
    args.encoder_seq_length = args.seq_length
    args.start_weight_decay = args.end_weight_decay = args.weight_decay
    if args.use_rotary_position_embeddings:
        args.add_position_embedding = False
    args.compression_training = False
    args.padded_vocab_size = model.padded_vocab_size(args.tensor_model_parallel_size)
    return args


# ---- layers --------------------------------------------------------------------------------------------------------


class ParallelLinear(nn.Module):
    """[…, fan_in] → ([…, fan_out], bias or None): the bias is added by the caller, as with `skip_bias_add`."""

    def __init__(self, fan_in: int, fan_out: int, std: float, *, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(fan_out, fan_in).normal_(0.0, std))
        self.bias = nn.Parameter(torch.zeros(fan_out)) if bias else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return functional.linear(x, self.weight), self.bias


def added(output: tuple[Tensor, Tensor | None]) -> Tensor:
    return output[0] if output[1] is None else output[0] + output[1]


class FusedScaleMaskSoftmax(nn.Module):
    def __init__(self, scale: float | None) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, scores: Tensor) -> Tensor:
        scores = scores if self.scale is None else scores * self.scale
        later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        return scores.masked_fill(later, -math.inf).softmax(-1)


class CoreAttention(nn.Module):
    """Query, key, value [sequence, batch, head, channel] → [sequence, batch, hidden]."""

    def __init__(self, layer_number: int, head_size: int, *, layer_scaling: bool) -> None:
        super().__init__()
        coefficient = max(1, layer_number) if layer_scaling else None
        self.norm_factor = math.sqrt(head_size) * (coefficient or 1)
        self.scale_mask_softmax = FusedScaleMaskSoftmax(coefficient)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.permute(1, 2, 0, 3) for t in (q, k, v))
        probabilities = self.scale_mask_softmax((q @ k.transpose(-1, -2)) * (1.0 / self.norm_factor))
        return (probabilities @ v).permute(2, 0, 1, 3).flatten(2)


class FlashSelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.softmax_scale: float | None = None

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.permute(1, 2, 0, 3) for t in (q, k, v))
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.softmax_scale)
        return out.permute(2, 0, 1, 3).flatten(2)


class FlashSelfAttentionTriton(FlashSelfAttention):
    """Stores a scale and never uses it."""


class DistributedAttention(nn.Module):
    """DeepSpeed's sequence parallelism around another attention."""

    def __init__(self, local_attention: nn.Module) -> None:
        super().__init__()
        self.local_attn = local_attention

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.local_attn(q, k, v)


class ParallelAttention(nn.Module):
    def __init__(self, model: ModelFile, layer_number: int, std: float, residual_std: float, layout: "Layout") -> None:
        super().__init__()
        self.head_size = model.head_size
        queries = model.num_attention_heads * model.head_size // layout.tensor_parallel
        keys = model.query_groups * model.head_size // layout.tensor_parallel
        bias = model.add_bias_linear
        self.query_key_value = ParallelLinear(model.hidden_size, queries + 2 * keys, std, bias=bias)
        local: nn.Module = {
            "core": lambda: CoreAttention(layer_number, model.head_size, layer_scaling=layout.layer_scaling),
            "flash": FlashSelfAttention,
            "triton": FlashSelfAttentionTriton,
        }[layout.attention]()
        if layout.sequence_parallel_of_deepspeed:
            self.dist_attn = DistributedAttention(local)
        elif layout.attention == "core":
            self.core_attention = local
        else:
            self.core_attention_flash = local
        self.dense = ParallelLinear(queries, model.hidden_size, residual_std, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        length, batch, _ = x.shape
        thirds = added(self.query_key_value(x)).chunk(3, dim=-1)
        attention = next(module for name, module in self.named_children() if "attn" in name or "attention" in name)
        return added(self.dense(attention(*(t.reshape(length, batch, -1, self.head_size) for t in thirds))))


class ParallelMLP(nn.Module):
    def __init__(self, model: ModelFile, std: float, residual_std: float, tensor_parallel: int) -> None:
        super().__init__()
        self.gated = model.swiglu
        ffn, bias = model.ffn_size // tensor_parallel, model.add_bias_linear
        self.dense_h_to_4h = ParallelLinear(model.hidden_size, 2 * ffn if self.gated else ffn, std, bias=bias)
        self.dense_4h_to_h = ParallelLinear(ffn, model.hidden_size, residual_std, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        x = added(self.dense_h_to_4h(x))
        if self.gated:
            gate, up = x.chunk(2, dim=-1)
            x = functional.silu(gate) * up
        else:
            x = functional.gelu(x)
        return added(self.dense_4h_to_h(x))


class ParallelTransformerLayer(nn.Module):
    """`layer_number` counts from 1 in GPTModel and from 0 in GPTModelPipe."""

    def __init__(self, model: ModelFile, layer_number: int, std: float, layout: "Layout") -> None:
        super().__init__()
        self.layer_number = layer_number
        residual_std = std / math.sqrt(2.0 * model.num_layers)
        self.input_layernorm = norm(model)
        self.self_attention = ParallelAttention(model, layer_number, std, residual_std, layout)
        self.post_attention_layernorm = norm(model)
        self.mlp = ParallelMLP(model, std, residual_std, layout.tensor_parallel)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attention(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class ParallelTransformerLayerPipe(ParallelTransformerLayer):
    pass


def norm(model: ModelFile) -> nn.Module:
    return {"LayerNorm": nn.LayerNorm, "RMSNorm": nn.RMSNorm}[model.normalization](
        model.hidden_size, eps=model.norm_epsilon
    )


class VocabParallelEmbedding(nn.Module):
    def __init__(self, rows: int, hidden: int, std: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, hidden).normal_(0.0, std))

    def forward(self, tokens: Tensor) -> Tensor:
        return functional.embedding(tokens, self.weight)


class SequenceParallelPositionEmbedding(nn.Module):
    def __init__(self, rows: int, hidden: int) -> None:
        super().__init__()
        self.local_embeddings = nn.Embedding(rows, hidden)

    def forward(self, positions: Tensor) -> Tensor:
        return self.local_embeddings(positions)


class Embedding(nn.Module):
    """Tokens [batch, sequence] → [sequence, batch, hidden]."""

    def __init__(self, model: ModelFile, std: float, layout: "Layout") -> None:
        super().__init__()
        ranks = layout.tensor_parallel
        self.word_embeddings = VocabParallelEmbedding(model.padded_vocab_size(ranks) // ranks, model.hidden_size, std)
        self.position_embeddings: nn.Module | None = None
        if model.position_embedding_type == "learned_absolute":
            if layout.sequence_parallel:
                self.position_embeddings = SequenceParallelPositionEmbedding(
                    model.positions // ranks, model.hidden_size
                )
                nn.init.normal_(self.position_embeddings.local_embeddings.weight, 0.0, std)
            else:
                self.position_embeddings = nn.Embedding(model.positions, model.hidden_size)
                nn.init.normal_(self.position_embeddings.weight, 0.0, std)
        self.embedding_dropout = nn.Dropout(model.hidden_dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.word_embeddings(tokens)
        if self.position_embeddings is not None:
            x = x + self.position_embeddings(torch.arange(tokens.shape[1]).expand_as(tokens))
        return self.embedding_dropout(x.transpose(0, 1).contiguous())


class EmbeddingPipe(Embedding):
    @property
    def word_embeddings_weight(self) -> Tensor:
        return self.word_embeddings.weight


class LMHeadPipe(nn.Module):
    def __init__(self, model: ModelFile, std: float, tensor_parallel: int) -> None:
        super().__init__()
        rows = model.padded_vocab_size(tensor_parallel) // tensor_parallel
        self.lm_head = ParallelLinear(model.hidden_size, rows, std, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return added(self.lm_head(x))


def parallel_lm_logits(x: Tensor, weight: Tensor) -> Tensor:
    """As patched."""
    x = megatron_deepspeed.scale_head_input(x)
    return functional.linear(x, weight)


# ---- models --------------------------------------------------------------------------------------------------------


class Layout(argparse.Namespace):
    """How a model is built and split; a rank of it is what the models below are."""

    tensor_parallel: int = 1
    sequence_parallel: bool = False
    """Megatron's: each tensor-parallel rank holds the embeddings of its own positions."""
    sequence_parallel_of_deepspeed: bool = False
    attention: str = "core"
    layer_scaling: bool = False


class Encoder(nn.Module):
    def __init__(self, layers: Sequence[nn.Module], final_layernorm: nn.Module | None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        if final_layernorm is not None:
            self.final_layernorm = final_layernorm


class LanguageModel(nn.Module):
    pass


class GPTModel(nn.Module):
    """Tokens [batch, sequence] → logits [batch, sequence, vocabulary of the rank]; or one stage of it.

    Args:
        stage: which of `stages` equal parts; a stage alone cannot run forward.
    """

    def __init__(
        self, model: ModelFile, layout: Layout | None = None, *, std: float = 0.02, stages: int = 1, stage: int = 0
    ) -> None:
        super().__init__()
        layout = layout or Layout()
        first, last = stage == 0, stage == stages - 1
        self.language_model: Any = LanguageModel()
        if first:
            self.language_model.embedding = Embedding(model, std, layout)
        each = model.num_layers // stages
        layers = [ParallelTransformerLayer(model, stage * each + i + 1, std, layout) for i in range(each)]
        self.language_model.encoder = Encoder(layers, norm(model) if last else None)
        rows = model.padded_vocab_size(layout.tensor_parallel) // layout.tensor_parallel
        if last and not model.tied:
            self.language_model.output_layer = ParallelLinear(model.hidden_size, rows, std, bias=False)
        self.tied = model.tied
        if last and not first and model.tied:
            self.word_embeddings = VocabParallelEmbedding(rows, model.hidden_size, std)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.language_model.embedding(tokens)
        for layer in self.language_model.encoder.layers:
            x = layer(x)
        x = self.language_model.encoder.final_layernorm(x)
        head = self.language_model.embedding.word_embeddings if self.tied else self.language_model.output_layer
        return parallel_lm_logits(x, head.weight).transpose(0, 1)


class LayerSpec:
    """DeepSpeed's: what to build, once it is known which stage builds it."""

    def __init__(self, typename: type[nn.Module], *args: Any, **kwargs: Any) -> None:
        self.typename, self.args, self.kwargs = typename, args, kwargs

    def build(self) -> nn.Module:
        return self.typename(*self.args, **self.kwargs)


class TiedLayerSpec(LayerSpec):
    def __init__(self, key: str, typename: type[nn.Module], *args: Any, forward_fn: Any = None) -> None:
        super().__init__(typename, *args)
        self.key, self.forward_fn = key, forward_fn


def _logits_helper(embedding: Any, x: Tensor) -> Tensor:
    return parallel_lm_logits(x, embedding.word_embeddings_weight)


def _to_float16(inputs: Any) -> Any:
    return inputs


class GPTModelPipe(nn.Module):
    """As GPTModel; each module is called by its place among the specs of all stages, but for a tied one."""

    def __init__(
        self, model: ModelFile, layout: Layout | None = None, *, std: float = 0.02, stages: int = 1, stage: int = 0
    ) -> None:
        super().__init__()
        layout = layout or Layout()
        embedding = (EmbeddingPipe, model, std, layout)
        self.specs: list[Any] = [
            _to_float16,
            TiedLayerSpec("embed", *embedding) if model.tied else LayerSpec(*embedding),
            *(LayerSpec(ParallelTransformerLayerPipe, model, i, std, layout) for i in range(model.num_layers)),
            LayerSpec(type(norm(model)), model.hidden_size, eps=model.norm_epsilon),
            TiedLayerSpec("embed", *embedding, forward_fn=_logits_helper)
            if model.tied
            else LayerSpec(LMHeadPipe, model, std, layout.tensor_parallel),
        ]
        # Layers in equal parts; the embedding goes with the first, norm and head with the last.
        each = model.num_layers // stages
        start = 0 if stage == 0 else 2 + stage * each
        stop = len(self.specs) if stage == stages - 1 else 2 + (stage + 1) * each
        self.forward_funcs: list[Any] = []
        self.tied_modules = nn.ModuleDict()
        for place in range(start, stop):
            spec = self.specs[place]
            if isinstance(spec, TiedLayerSpec):
                if spec.key not in self.tied_modules:
                    self.tied_modules[spec.key] = spec.build()
                tied, forward = self.tied_modules[spec.key], spec.forward_fn
                self.forward_funcs.append(tied if forward is None else lambda x, t=tied, f=forward: f(t, x))
            elif isinstance(spec, LayerSpec):
                self.add_module(str(place), spec.build())
                self.forward_funcs.append(self.get_submodule(str(place)))
            else:
                self.forward_funcs.append(spec)

    def forward(self, tokens: Tensor) -> Tensor:
        x: Any = tokens
        for function in self.forward_funcs:
            x = function(x)
        return x.transpose(0, 1)


MODELS = (GPTModel, GPTModelPipe)


# ---- optimizer -----------------------------------------------------------------------------------------------------


def get_param_groups(modules: Sequence[nn.Module]) -> list[dict[str, Any]]:
    """The fork's groups, before the plan's take their place: by weight decay alone."""
    decayed, plain = [], []
    for module in modules:
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                (plain if name.endswith(".bias") or parameter.dim() == 1 else decayed).append(parameter)
    return [
        {"name": "wd_no_scale_lr", "params": decayed, "wd_mult": 1.0, "lr_mult": 1.0},
        {"name": "no_wd_no_scale_lr", "params": plain, "wd_mult": 0.0, "lr_mult": 1.0},
    ]


class OptimizerParamScheduler:
    """The fork's arithmetic: one learning rate and one weight decay for all, times each group's ratios."""

    def __init__(self, optimizer: Any, *, max_lr: float, min_lr: float, weight_decay: float, steps: int, warmup: int):
        self.optimizer = optimizer
        self.max_lr, self.min_lr, self.weight_decay = max_lr, min_lr, weight_decay
        self.steps, self.warmup = steps, warmup
        self.num_steps, self.num_tokens = 0, 0
        self.step(0, 0)

    def get_lr(self) -> float:
        if self.warmup > 0 and self.num_steps <= self.warmup:
            return self.max_lr * self.num_steps / self.warmup
        if self.num_steps > self.steps:
            return self.min_lr
        left = 1.0 - (self.num_steps - self.warmup) / (self.steps - self.warmup)
        return self.min_lr + left * (self.max_lr - self.min_lr)

    def step(self, increment: int, token_num: int) -> None:
        self.num_tokens = token_num
        self.num_steps += increment
        new_lr = self.get_lr()
        for group in self.optimizer.param_groups:
            group["lr"] = new_lr * group.get("lr_mult", 1.0)
            group["weight_decay"] = self.weight_decay * group.get("wd_mult", 1.0)
