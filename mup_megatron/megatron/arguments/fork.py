"""The flags that the fork Megatron-DeepSpeed adds to Megatron-LM's, and what each means to a model file.

Read off its last commit (4efb479d, July 2025). Its programs have the names of Megatron-LM's; a line with `--deepspeed`
is one of its own. Pure data; needs neither.
"""

from collections.abc import Iterator, Sequence

from mup_megatron.architectures.architecture import Architecture
from mup_megatron.architectures.gpt import GPT
from mup_megatron.errors import InputError

MARK = "--deepspeed"
"""The flag without which the fork does not use DeepSpeed, and which no other Megatron has."""

HARMLESS = frozenset(
    """
    --deepspeed --deepspeed_config --deepspeed_mpi --deepscale --deepscale_config --zero-stage --zero-reduce-scatter
    --zero-contigious-gradients --zero-reduce-bucket-size --zero-allgather-bucket-size --remote-device --use-pin-memory
    --deepspeed-activation-checkpointing --partition-activations --contigious-checkpointing --checkpoint-in-cpu
    --synchronize-each-layer --profile-backward --profile_steps --scattered-embeddings --split-transformers
    --memory-centric-tiled-linear --tile-factor --checkpoint-num-layers --distribute-checkpointed-activations
    --fp8-e4m3 --fp8-hybrid --embedding-weights-in-fp32 --kill-switch-file --no-log-learnig-rate-to-tensorboard
    --enable-zbh1-pipeline --enable-zbh1-exact-semantics --no-pipeline-parallel --standalone-embedding-stage
    --ds-sequence-parallel-size --force-ds-sequence-parallel --overlap-p2p-communication --DDP-impl --local_rank
    --no-contiguous-buffers-in-local-ddp --disable-mem-efficient-ln --use-flash-attn-v1 --use-flash-attn-v2
    --use-flash-attn-builder --cpu-optimizer --cpu_torch_adam --ds_fused_adam --load-tag --no-load-lr-state
    --reset-iteration --no-query-key-layer-scaling --use-dataset-only --aml-data-download-path --mmap-warmup
    --data-impl --train-data-exact-num-epochs --return-data-index --data-efficiency-curriculum-learning
    --train-idx-path --train-desc-path --train-doc-idx-path --train-sample-idx-path --train-shuffle-idx-path
    --repeated-dataloader
    """.split()
)
"""Layout, memory, precision, data and logs: parameters and their scale are as without."""

_EXPERTS = "models with experts are not supported yet. Choose a model without."
_TEACHER = "distillation has a second model beside the first, which is not supported. Drop the flag."
_TOKENS = "a recipe's schedule counts iterations or samples, not tokens. Use --train-iters and --lr-*-iters."
_CHANGES = "it changes what is computed in a way that a plan does not know. Drop the flag."
_ENCODER = "models with an encoder and a decoder, or a retriever, are not supported yet. Choose a GPT model."

REFUSED: dict[str, str] = {
    **dict.fromkeys(
        (
            "--mlp-type --topk --expert-interval --num-experts-switch --disable-moe-token-dropping --moe-loss-coeff "
            "--moe-train-capacity-factor --moe-eval-capacity-factor --moe-min-capacity --create-moe-param-group "
            "--disable-moe-top2-2nd-expert-sampling --use-tutel --enable-expert-tensor-parallelism "
            "--moe-expert-parallel-size"
        ).split(),
        _EXPERTS,
    ),
    **dict.fromkeys(
        (
            "--num-layers-teacher --num-experts-teacher --hidden-size-teacher --num-attention-heads-teacher --mos --kd "
            "--kd-alpha-ce --kd-beta-ce --kd-temp --load-teacher"
        ).split(),
        _TEACHER,
    ),
    **dict.fromkeys(("--train-tokens", "--lr-decay-tokens", "--lr-warmup-tokens"), _TOKENS),
    **dict.fromkeys(
        (
            "--random-ltd",
            "--ds-sequence-parallel-fpdt",
            "--ds-sequence-parallel-fpdt-chunk-size",
            "--ds-sequence-parallel-fpdt-offloading",
            "--use-flash-attn-triton",
        ),
        _CHANGES,
    ),
    **dict.fromkeys(("--pipeline-model-parallel-split-rank", "--retriever-seq-length"), _ENCODER),
    **dict.fromkeys(("--inference", "--ds-inference"), "it trains no model. Give the line that trains."),
    "--universal-checkpoint": "groups of parameters would come from the checkpoint. Drop the flag.",
}
"""Flag → why no model file says what it does, and what to do."""

OTHERWISE = {"--num-experts": _EXPERTS}
"""Flags of Megatron-LM's that the fork has for layers of its own → why they are refused there."""

_RENAMED = {
    "--layernorm-epsilon": "--norm-epsilon",
    "--rotary-position-embeddings-theta": "--rotary-base",
    "--num-key-value-heads": "--num-query-groups",
}
"""Flag → Megatron-LM's name for the same."""


def require_gpt(architecture: Architecture, source: str) -> None:
    """Raises InputError for another model than a GPT: the fork has classes of its own for those."""
    if architecture is not GPT:
        raise InputError(
            f"{source}: {MARK}: the line builds {architecture.description}, and of Megatron-DeepSpeed's models only "
            "GPTs are supported. Choose one, or drop the flag for Megatron-Core's model."
        )


def known(name: str) -> bool:
    """Returns whether a flag is one of those that the fork adds."""
    return name in HARMLESS or name in REFUSED or name in _RENAMED


def renamed(words: Sequence[str]) -> Iterator[str]:
    """Yields the words of a line with Megatron-LM's names for what the fork calls otherwise."""
    for word in words:
        name, equals, value = word.partition("=")
        if name == "--num-key-value-heads":
            yield "--group-query-attention"
        yield f"{_RENAMED[name]}{equals}{value}" if name in _RENAMED else word
