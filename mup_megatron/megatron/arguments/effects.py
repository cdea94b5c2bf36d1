"""The one table of what every flag of Megatron-LM 0.16 to 0.19 means to a model file and a recipe.

`table.py` has the flags whose values are read. This adds all others, each with the reason why it need not be, and says
in a page for people (`page`, docs/flags.md) what becomes of each. Pure data and text, and long for that; needs no
Megatron.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from mup_megatron.architectures.registry import architectures
from mup_megatron.megatron.arguments.table import (
    ALSO_READ,
    CHECKPOINT_ARGS,
    FIELDS,
    HYPERPARAMETERS,
    MORE_TOKENS,
    NATIVE_MUP,
    NOT_SAID,
    SCHEDULE,
    SPEC,
    STOPPED,
    TOKENIZER,
    of_architectures,
    refused,
)
from mup_megatron.megatron.optimizers import MEGATRON_OPTIMIZERS

OLDEST, NEWEST = (0, 16), (0, 19)
"""The releases of Megatron-Core (major, minor) whose flags these are."""


class Effect(Enum):
    """The effect of a flag. The value is the heading of its part of the page."""

    MODEL = "Read into the model file"
    RECIPE = "The recipe's"
    REFUSED = "Refused"
    STOPPED = "Refused in a run with a recipe"
    ALIKE = "The same for base and target"
    HARMLESS = "Without effect on a model file or a plan"


_ABOUT = {
    Effect.MODEL: "They are keys of a model file, or decide one.",
    Effect.RECIPE: "`from-native` reads them, and a run with a recipe takes them from there; a line that says "
    "something else is an error, unless it has `--mup-override`.",
    Effect.REFUSED: "They change parameters or their scale in a way that a model file cannot say. `model --from-args` "
    "and `from-native` refuse them. So does a run with a recipe, but for these: `--model-provider` stops the run once "
    "the model is built and is none of the plan's; and flags that only other programs have (ModelOpt's, multimodal, "
    "Flextron's and retrieval ones, the last six rows or a part of them) are not looked at.",
    Effect.STOPPED: "The model file is right; the run is stopped, because the plan would not hold in it. `model "
    "--from-args` says so.",
    Effect.ALIKE: "A model file has no key for them. They change what is computed, but no parameter and nothing that "
    "depends on width, so hyperparameters transfer from a base that was tuned with them as well. `model --from-args` "
    "and a run say so.",
    Effect.HARMLESS: "",
}


@dataclass(frozen=True, slots=True)
class Row:
    """A flag, or all flags that begin with a name that ends in `*`, and what becomes of it."""

    name: str
    effect: Effect
    reason: str


_LAYER_KINDS = "read only with a kind of layer that is refused by its own flag"
_OTHER_PROGRAMS = "read by programs that are refused by their name, and by no model that is supported"
_PRECISION = "precision of arithmetic or of what is stored: the same numbers but for rounding"

_HARMLESS: tuple[tuple[str, str], ...] = (
    (
        "how the work is divided among ranks; a plan is for the whole model, and every parameter is found by its name",
        """
        --tensor-model-parallel-size --pipeline-model-parallel-size --pipeline-model-parallel-layout
        --pipeline-model-parallel-comm-backend
        --num-layers-per-virtual-pipeline-stage --num-virtual-stages-per-pipeline-rank
        --microbatch-group-size-per-virtual-pipeline-stage --decoder-first-pipeline-num-layers
        --decoder-last-pipeline-num-layers --account-for-embedding-in-pipeline-split
        --account-for-loss-in-pipeline-split --mtp-standalone --sequence-parallel --context-parallel-size --cp-comm-type
        --hierarchical-context-parallel-sizes --hybrid-context-parallel --max-seqlen-per-dp-cp-rank
        --expert-model-parallel-size --expert-tensor-parallel-size --expert-tensor-parallel-num-weight-shards
        --model-parallel-size --use-tp-pp-dp-mapping --use-distributed-optimizer --num-distributed-optimizer-instances
        --data-parallel-sharding-strategy --outer-dp-sharding-strategy --no-data-sharding --create-all-gather-group
        --enable-full-sharding-in-hsdp --use-megatron-fsdp --use-torch-fsdp2 --torch-fsdp2-no-reshard-after-forward
        --use-mp-args-from-checkpoint-args
        --fake-process-group --lazy-mpu-init --local-rank
        """,
    ),
    (
        "how ranks communicate, and when",
        """
        --overlap-grad-reduce --overlap-param-gather --overlap-param-gather-with-optimizer-step
        --no-overlap-p2p-communication --overlap-p2p-communication-warmup-flush --overlap-moe-expert-parallel-comm
        --overlap-dispatch-backward-with-experts-wgrad --delay-wgrad-compute --ep-overlap-early-attn-memory-release
        --no-align-grad-reduce --disable-align-grad-reduce --no-align-param-gather
        --no-scatter-gather-tensors-in-pipeline --defer-embedding-wgrad-compute --wgrad-deferral-limit
        --ddp-bucket-size --ddp-num-buckets --ddp-pad-buckets-for-high-nccl-busbw --ddp-average-in-collective
        --no-gradient-reduce-div-fusion --suggested-communication-unit-size --tp-comm-overlap --tp-comm-overlap-cfg
        --tp-comm-overlap-rs-dgrad --tp-comm-bootstrap-backend --no-tp-comm-* --disable-tp-comm-* --symmetric-ar-type
        --disable-async-tensor-model-parallel-allreduce --no-async-tensor-model-parallel-allreduce
        --disable-clone-scatter-output-in-embedding --no-clone-scatter-output-in-embedding --use-sharp
        --sharp-enabled-group --use-nccl-ub --disable-symmetric-registration --nccl-communicator-config-path
        --nccl-all-reduce-for-prefill --high-priority-a2a-comm-stream --high-priority-stream-groups
        --use-ring-exchange-p2p --distributed-backend --distributed-timeout-minutes
        --distributed-timeout-seconds-after-init --disable-gloo-process-groups --no-use-layer-wise-param-layout
        --fsdp-* --megatron-fsdp-* --keep-fp8-transpose-cache --disable-strict-fsdp-dtensor-load
        --no-strict-fsdp-dtensor-load --flight-recorder-* --no-flight-recorder-* --disable-flight-recorder-*
        """,
    ),
    (
        "memory, and what is computed again or moved to save it",
        """
        --recompute-activations --recompute-granularity --recompute-method --recompute-modules --recompute-num-layers
        --checkpoint-activations --distribute-saved-activations --moe-layer-recompute --cpu-offloading-num-layers
        --cpu-offloading-retain-pinned-cpu-buffers --fine-grained-activation-offloading
        --fine-grained-offloading-max-inflight-offloads --activation-offload-fraction --offload-modules
        --min-offloaded-tensor-size --delta-offload-bytes-across-pp-ranks --delay-offload-until-cuda-graph
        --optimizer-cpu-offload --optimizer-offload-fraction --use-torch-optimizer-for-cpu-offload
        --overlap-cpu-optimizer-d2h-h2d --no-pin-cpu-grads --no-pin-cpu-params --empty-unused-memory-level
        --mlp-chunks-for-prefill --mlp-chunks-for-training
        """,
    ),
    (
        "which kernel computes it: the same function",
        """
        --attention-backend --flash-attention-version --use-flash-attn --use-kitchen-attention
        --kitchen-attention-backend --no-masked-softmax-fusion --no-bias-gelu-fusion
        --no-bias-swiglu-fusion --no-bias-dropout-fusion --no-rope-fusion --cross-entropy-loss-fusion
        --cross-entropy-fusion-impl --no-persist-layer-norm --fused-residual-rmsnorm --no-gradient-accumulation-fusion
        --use-te-activation-func --use-transformer-engine-op-fuser --use-fused-weighted-squared-relu
        --use-grouped-gemm-for-dense-mlp --use-grouped-gemm-for-shared-expert --disable-jit-fuser --enable-experimental
        --deterministic-mode --batch-invariant-mode --cuda-graph-impl --cuda-graph-modules --cuda-graph-scope
        --cuda-graph-warmup-steps --enable-cuda-graph --external-cuda-graph --optimizer-cuda-graph --te-rng-tracker
        --onnx-safe --use-mcore-models
        """,
    ),
    (
        "divides the scores by the layer's number and multiplies them back within the softmax",
        "--apply-query-key-layer-scaling",
    ),
    (
        _PRECISION,
        """
        --bf16 --fp16 --fp32-residual-connection --attention-softmax-in-fp32 --fp16-lm-cross-entropy
        --accumulate-allreduce-grads-in-fp32 --grad-reduce-in-bf16 --ddp-reduce-scatter-with-fp32-accumulation
        --ddp-param-name-patterns-for-fp32-local-accumulation --disable-bf16-reduced-precision-matmul --loss-scale
        --initial-loss-scale --min-loss-scale --loss-scale-window --hysteresis --fp8-format --fp8-recipe --fp8-margin
        --fp8-interval --fp8-amax-history-len --fp8-amax-compute-algo --fp8-output-proj --fp8-quantizer-factory
        --no-fp8-wgrad --disable-fp8-wgrad --fp4-format --fp4-recipe --fp4-quantizer-factory
        --reuse-grad-buf-for-mxfp8-param-ag --first-last-layers-bf16 --num-layers-at-start-in-bf16
        --num-layers-at-end-in-bf16 --te-precision-config-file
        --use-precision-aware-optimizer --main-params-dtype --main-grads-dtype --exp-avg-dtype --exp-avg-sq-dtype
        --muon-fp32-matmul-prec
        """,
    ),
    (
        "where the first weights come from, not how large they are: drawn elsewhere or otherwise seeded, with the same "
        "std, or loaded",
        """
        --seed --data-parallel-random-init --use-cpu-initialization --no-initialization --inference-rng-tracker
        """,
    ),
    (
        "how many sequences a step takes, and how long the run is",
        """
        --micro-batch-size --batch-size --rampup-batch-size --step-batch-size-schedule
        --decrease-batch-size-if-needed --phase-transition-iterations --iterations-to-skip --skip-train
        --exit-interval --exit-duration-in-mins --exit-signal --exit-signal-handler --exit-signal-handler-for-dataloader
        --exit-signal-handler-for-training --train-sync-interval
        """,
    ),
    (
        "averages the loss over tokens in place of micro-batches, alike at every width",
        "--calculate-per-token-loss",
    ),
    (
        "limits for the size that weights of queries and keys may reach; the flag itself, --qk-clip, is the same for "
        "base and target",
        "--qk-clip-alpha --qk-clip-threshold",
    ),
    (
        "which data is read, and how",
        """
        --data-path --data-args-path --per-split-data-args-path --train-data-path --valid-data-path --test-data-path
        --per-dataset-sequences-path --data-cache-path --object-storage-cache-path --split --mock-data --sample-rate
        --multiple-validation-sets --validation-set-names --full-validation --mid-level-dataset-surplus
        --num-dataset-builder-threads --dataloader-type --dataloader-* --num-workers --no-mmap-bin-files
        --no-create-attention-mask-in-dataloader --reset-position-ids --reset-attention-mask --eod-mask-loss
        --allow-ambiguous-pad-tokens --sft --sft-tokenizer-prompt-format --chat-template --fim-* --enable-msc
        --disable-msc --logits-save-* --logits-load-decode-threads --logits-load-ignore-errors
        --logits-load-kd-loss-alpha --logits-load-msc-prefetch-depth --logits-load-prefetch-factor
        """,
    ),
    (
        "how text becomes tokens, not how many there are",
        """
        --legacy-tokenizer --null-tokenizer-eod-id --null-tokenizer-pad-id --tiktoken-pattern --trust-remote-code
        --tokenizer-hf-* --tokenizer-sentencepiece-legacy --no-tokenizer-sentencepiece-ignore-extra-whitespaces
        --disable-tokenizer-sentencepiece-ignore-extra-whitespaces --no-use-tokenizer-model-from-checkpoint-args
        --disable-use-tokenizer-model-from-checkpoint-args
        """,
    ),
    (
        "how checkpoints are written and read",
        """
        --save --load --load-main-params-from-ckpt --pretrained-checkpoint --finetune --ckpt-step --ckpt-format
        --ckpt-fully-parallel-* --no-ckpt-fully-parallel-save --disable-ckpt-fully-parallel-save
        --no-ckpt-load-validate-sharding-integrity --disable-ckpt-load-validate-sharding-integrity
        --ckpt-assume-constant-structure --ckpt-convert-* --use-dist-ckpt --dist-ckpt-* --auto-detect-ckpt-format
        --distrib-optim-fully-reshardable-mem-efficient --no-stream-ckpt-dequant --disable-stream-ckpt-dequant
        --override-ckpt-iteration --exit-on-missing-checkpoint --save-interval --persistent-save-interval
        --save-retain-interval --non-persistent-* --replication --replication-factor --replication-jump
        --no-load-optim --no-load-rng --no-save-optim --no-save-rng --async-save --async-strategy --async-ckpt-*
        --use-persistent-ckpt-worker --verify-integrity --check-weight-hash-across-dp-replicas-interval
        """,
    ),
    (
        "what of a schedule a checkpoint decides; a run with a recipe has the recipe's again after every load",
        """
        --override-opt-param-scheduler --override-opt_param-scheduler --use-checkpoint-opt-param-scheduler
        --use-checkpoint-opt_param-scheduler
        """,
    ),
    (
        "logs, profiles and checks",
        """
        --log-* --logging-level --no-log-loss-scale-to-tensorboard --disable-log-loss-scale-to-tensorboard
        --timing-log-level --timing-log-option --no-barrier-with-level-1-timing --tensorboard-* --wandb-*
        --one-logger-* --no-one-logger --app-tag-run-name --app-tag-run-version --profile --profile-ranks
        --profile-step-start --profile-step-end --use-pytorch-profiler --pytorch-profiler-* --nvtx-ranges
        --record-memory-history --record-shapes --memory-snapshot-path --run-workload-inspector-server
        --config-logger-dir --dump-param-to-param-group-map --save-activations-interval --save-dgrads-interval
        --save-params-interval --save-wgrads-interval --save-tokens-per-expert-interval
        --no-check-for-nan-in-loss-and-grad --check-for-large-grads --check-for-spiky-loss --gpu-sniff-test-interval
        --straggler-ctrlr-port --straggler-minmax-count --disable-straggler-on-startup --test-mode
        --eval-interval --eval-iters --eval-global-batch-size --eval-micro-batch-size --start-eval-at-iter -h --help
        """,
    ),
    (
        "restarts, injected faults and garbage collection",
        """
        --adlr-autoresume --adlr-autoresume-interval --inprocess-* --enable-ft-package --calc-ft-timeouts
        --ft-num-warmup-iters --fault-injector-* --error-injection-rate --error-injection-type --rerun-mode
        --result-rejected-tracker-filename --manual-gc --manual-gc-interval --no-manual-gc-eval
        --disable-manual-gc-eval
        """,
    ),
    (
        "how text is generated with the trained model",
        """
        --inference-* --no-inference-* --max-tokens-to-oom --enable-chunked-prefill --disable-chunked-prefill
        --flash-decode --cache-mla-latents --decode-only-cuda-graphs --use-legacy-static-engine --num-speculative-tokens
        --use-same-sampling-seed-across-dp-ranks
        """,
    ),
    (
        "of Megatron-LM's programs that generate text, in no parser but theirs",
        """
        --prompts --prompt-file --prompt-file-num-truncate --num-tokens-to-generate --return-log-probs --output-path
        --output-every-n-results --incoming-requests-per-sec --incoming-requests-per-step
        --incoming-requests-duration --temperature --top_k --top_p --stop-words --termination-id --async-mode
        --use-coordinator --no-record-throughput --suspend-resume-interval --suspend-timeout
        --use-flashinfer-fused-rope
        """,
    ),
    (
        "how tokens come to experts, and how what those compute is arranged: the same function",
        """
        --moe-deepep-num-sms --moe-enable-deepep --moe-enable-routing-replay --moe-expert-rank-capacity-factor
        --moe-extended-tp --moe-flex-dispatcher-backend --moe-flex-dispatcher-num-sms --moe-hybridep-*
        --moe-mlp-glu-interleave-size --moe-ncclep-static-shape --moe-ncclep-zero-copy
        --moe-pad-expert-input-to-capacity --moe-pad-experts-for-cuda-graph-inference --moe-paged-stash
        --moe-paged-stash-* --moe-per-layer-logging --moe-permute-fusion --moe-permute-fusion-into-hybridep
        --moe-router-dtype --moe-router-fusion --moe-router-padding-for-* --moe-routing-trace-*
        --moe-shared-expert-glu-interleave-size --moe-shared-expert-overlap --moe-token-dispatcher-type
        """,
    ),
    (
        "read only with a way of balancing experts that a model file refuses (`quantile_balancing`)",
        "--moe-router-quantile-balancing-ema",
    ),
    (
        "read only with `--moe-use-upcycling`, which is refused",
        "--moe-upcycling-granularity",
    ),
    (
        "read only with positions that a model file refuses (`--position-embedding-type yarn`, `mrope`)",
        """
        --yarn-beta-fast --yarn-beta-slow
        --yarn-correction-range-round-to-int --no-yarn-correction-range-round-to-int
        --yarn-original-max-position-embeddings --mrope-section
        """,
    ),
    (
        _LAYER_KINDS + " (`--experimental-attention-variant`, `--linear-attention-freq`)",
        """
        --linear-conv-kernel-dim --linear-key-head-dim --linear-num-key-heads --linear-num-value-heads
        --linear-value-head-dim --dsa-* --no-dsa-* --disable-dsa-*
        """,
    ),
    (
        "how a Mamba layer's state is stored and computed",
        """
        --mamba-training-ssm-states-dtype --mamba-inference-conv-states-dtype --mamba-inference-ssm-states-dtype
        --disable-mamba-mem-eff-path
        """,
    ),
    (
        "read only with `--optimizer muon` of releases before 0.19, with which a run with a recipe is stopped",
        "--muon-use-nesterov",
    ),
    (
        "read only with `--muon-scalar-optimizer lion`, which a recipe does not know; `--optimizer lion` takes Adam's "
        "betas",
        "--lion-beta1 --lion-beta2",
    ),
    (
        "read only with `--perform-rl-step`, with which a run with a recipe is stopped",
        "--rl-* --no-rl-* --grpo-* --langrl-* --no-langrl-external-server --refit-method",
    ),
    (
        "how a BERT's and a T5's data are masked and cut",
        "--mask-prob --short-seq-prob",
    ),
    (
        _OTHER_PROGRAMS + ": retrieval",
        """
        --bert-load --bert-embedder-type --output-bert-embeddings
        --biencoder-projection-dim --biencoder-shared-query-context-model --block-data-path --embedding-path
        --evidence-data-path --ict-head-size --ict-load --indexer-batch-size --indexer-log-interval
        --query-in-block-prob --retriever-report-topk-accuracies --retriever-score-scaling --titles-data-path
        --use-one-sent-docs
        """,
    ),
    (
        _OTHER_PROGRAMS + ": vision",
        """
        --vision-backbone-type --vision-pretraining-type --swin-backbone-type --num-classes --num-channels --img-h
        --img-w --patch-dim --classes-fraction --data-per-class-fraction --iter-per-epoch --head-lr-mult --mask-factor
        --mask-type --dino-*
        """,
    ),
    ("an old name, at which Megatron stops", "--warmup"),
    (
        "flags of this plug-in",
        """
        --mup-recipe --mup-override --mup-print-plan --mup-no-verify --mup-accept-recipe-change
        --mup-coordinates-interval --mup-observe --mup-write-model-file
        """,
    ),
)

_OF_OTHERS: tuple[tuple[str, str], ...] = (
    (
        "ModelOpt changes the model (quantised, pruned, distilled), which is not supported yet. Drop the flag.",
        "--export-* --modelopt-*",
    ),
    (
        "multimodal models are not supported yet. Choose a GPT model.",
        """
        --language-model-type --language-model-checkpoint --vision-model-type --dataset-provider --freeze-LM
        --freeze-ViT --image-tag-type --disable-vision-class-token --total-seq-length
        """,
    ),
    (
        "hybrid models whose layers have several sizes are not supported. Drop the flag.",
        "--flextron --mamba-int-list --emb-int-list --mlp-int-list --moe-expert-int-list --enable-router",
    ),
    (
        "retrieval models, of several encoders, are not supported yet. Choose a GPT model.",
        "--retro-*",
    ),
)
"""Refused flags of Megatron-LM's other programs: in no parser but theirs."""


def _rows() -> Iterator[Row]:
    for flag in (*FIELDS.values(), *ALSO_READ):
        yield Row(flag.name, Effect.MODEL, "says what a key of a model file says")
    for flag in of_architectures():
        yield Row(flag.name, Effect.MODEL, "says what layers the model has, where they are not a GPT's")
    yield Row(
        CHECKPOINT_ARGS.name,
        Effect.MODEL,
        "the checkpoint's arguments take the place of the line's: a remark says so, and a line that leaves a size to "
        "them is refused",
    )
    for flag in TOKENIZER:
        yield Row(flag.name, Effect.MODEL, "decides the vocabulary where `--vocab-size` does not")
    for name in MORE_TOKENS:
        yield Row(name, Effect.MODEL, "adds to the vocabulary; `model --from-args` then asks for its size")
    for name in ("--model-provider", "--model-type"):
        said = (
            "another model is built than the flags describe, unless it is `gpt` or, with a pattern, `hybrid`, `mamba`."
        )
        yield Row(name, Effect.REFUSED, said)
    for flag in HYPERPARAMETERS.values():
        if flag.name not in {field.name for field in FIELDS.values()}:
            more = (
                f", which knows {MEGATRON_OPTIMIZERS.names}; a run with another one is stopped"
                if flag.name == "--optimizer"
                else ""
            )
            yield Row(flag.name, Effect.RECIPE, f"a hyperparameter of the recipe{more}")
    for flag in SCHEDULE:
        yield Row(flag.name, Effect.RECIPE, "learning rate or weight decay over the run")
    for name in ("--muon-no-split-qkv", "--muon-scalar-optimizer"):
        said = "with a recipe Muon takes queries, keys and values one by one, and leaves what is no matrix to Adam"
        yield Row(name, Effect.RECIPE, said)
    for name in ("--apply-wd-to-qk-layernorm", "--no-weight-decay-cond-type"):
        yield Row(name, Effect.RECIPE, "a recipe has no weight decay on norms")
    for flag in NATIVE_MUP:
        yield Row(flag.name, Effect.RECIPE, "Megatron-Core's own μP, which `from-native` carries over")
    specs = [f"`{spec}`" for each in architectures().values() for spec in each.command_line.specs]
    for flag in refused():
        more = f" With a model's own flags these are accepted: {', '.join(specs)}." if flag is SPEC else ""
        yield Row(flag.name, Effect.REFUSED, flag.refusal + more)
    for reason, names in _OF_OTHERS:
        yield from (Row(name, Effect.REFUSED, reason) for name in names.split())
    for flag in STOPPED:
        yield Row(flag.name, Effect.STOPPED, flag.refusal)
    for flag in NOT_SAID:
        yield Row(flag.name, Effect.ALIKE, "")
    for reason, names in _HARMLESS:
        yield from (Row(name, Effect.HARMLESS, reason) for name in names.split())


def rows() -> tuple[Row, ...]:
    """Returns what becomes of each flag; anew each time, because an architecture may be registered at any time."""
    return tuple(_rows())


@functools.cache
def _table(known: frozenset[str]) -> tuple[dict[str, Row], dict[str, Row]]:
    """Returns the rows by whole name, and those by its beginning, while these architectures are known."""
    whole = {row.name: row for row in rows() if not row.name.endswith("*")}
    return whole, {row.name[:-1]: row for row in rows() if row.name.endswith("*")}


def row_of(name: str) -> Row | None:
    """Returns the row of a flag; None for one that no release from 0.16 to 0.19 has, nor a program of Megatron-LM's."""
    whole, beginnings = _table(frozenset(architectures()))
    if name in whole:
        return whole[name]
    found = [beginning for beginning in beginnings if name.startswith(beginning)]
    return beginnings[max(found, key=len)] if found else None


# ---- the page ------------------------------------------------------------------------------------------------------

_HEAD = """<!-- Made by tools/flags-page from mup_megatron/megatron/arguments/effects.py: change it there. -->

# Megatron-LM's flags

What becomes of every flag of Megatron-LM core_v0.16 to core_v0.19: in `mup-megatron model --from-args`, in
`from-native`, and in a run with `--mup-recipe`. A star stands for all flags that begin so.

A flag that is not here is an error on a line of one of Megatron-LM's own programs, whose parser has no such flag
either, and a remark on the line of a program of your own. Programs of Megatron-LM that build another model than a GPT,
a hybrid model, a BERT or a T5 (`pretrain_vlm.py`, `train_rl.py`, …) are refused by name.
"""


def page() -> str:
    """Returns the table as a page of Markdown."""
    parts = [_HEAD]
    for effect in Effect:
        parts.append(f"\n## {effect.value}\n\n" + (f"{_ABOUT[effect]}\n\n" if _ABOUT[effect] else ""))
        reasons: dict[str, list[str]] = {}
        for row in rows():
            if row.effect is effect:
                reasons.setdefault(row.reason, []).append(f"`{row.name}`")
        if list(reasons) == [""]:
            parts.append(", ".join(dict.fromkeys(reasons[""])) + "\n")
            continue
        parts.append("| flags | |\n|---|---|\n")
        parts += [f"| {', '.join(dict.fromkeys(names))} | {reason} |\n" for reason, names in reasons.items()]
    return "".join(parts)
