"""Launch lines of the kinds that the world has, and what becomes of them: a table that several tests go through.

Sizes are small and names are ours; the flags are those that functional tests, papers' scripts and users' own have.
"""

from typing import NamedTuple

TINY = "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --max-position-embeddings 32"
RUN = (
    "--micro-batch-size 1 --global-batch-size 8 --train-iters 50 --lr 1e-3 --min-lr 1e-5 --lr-decay-style cosine "
    "--lr-decay-iters 320000 --lr-warmup-fraction 0.01 --weight-decay 0.01 --clip-grad 1.0 --log-interval 1 "
    "--eval-interval 100 --eval-iters 2 --split 949,50,1 --distributed-backend nccl --bf16"
)
NULL = "--tokenizer-type NullTokenizer --vocab-size 511"


class Accepted(NamedTuple):
    """A line of a GPT: what it has beside `TINY`, `RUN` and `NULL`, and how its model file differs from theirs."""

    flags: str
    keys: dict[str, object]


ACCEPTED = {
    "plain": Accepted("", {}),
    "llama": Accepted(
        "--swiglu --normalization RMSNorm --position-embedding-type rope --no-rope-fusion --disable-bias-linear "
        "--untie-embeddings-and-output-weights --group-query-attention --num-query-groups 2 --ffn-hidden-size 192 "
        "--rotary-base 500000 --rotary-percent 0.5 --attention-dropout 0.0 --hidden-dropout 0.0",
        {
            "swiglu": True,
            "normalization": "RMSNorm",
            "position_embedding_type": "rope",
            "add_bias_linear": False,
            "untie_embeddings_and_output_weights": True,
            "group_query_attention": True,
            "num_query_groups": 2,
            "ffn_hidden_size": 192,
            "rotary_base": 500000,
            "rotary_percent": 0.5,
            "attention_dropout": 0.0,
            "hidden_dropout": 0.0,
        },
    ),
    "sizes as Megatron fills them in": Accepted("--ffn-hidden-size 256 --kv-channels 16", {}),
    "the old flag of rotary positions": Accepted(
        "--use-rotary-position-embeddings --no-position-embedding", {"position_embedding_type": "rope"}
    ),
    "queries normalised": Accepted(
        "--qk-layernorm --apply-layernorm-1p", {"qk_layernorm": True, "apply_layernorm_1p": True}
    ),
    "squared relu": Accepted("--squared-relu --init-method-std 0.0134", {"init_method_std": 0.0134}),
    "tensor and pipeline parallel": Accepted(
        "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 4 --sequence-parallel "
        "--use-distributed-optimizer --num-layers-per-virtual-pipeline-stage 1 --overlap-grad-reduce",
        {},
    ),
    "context parallel": Accepted(
        "--tensor-model-parallel-size 2 --context-parallel-size 2 --cp-comm-type p2p --calculate-per-token-loss", {}
    ),
    "saved asynchronously": Accepted(
        "--async-save --use-persistent-ckpt-worker --ckpt-format torch_dist --dist-ckpt-strictness log_all "
        "--ckpt-fully-parallel-load --ckpt-assume-constant-structure --use-checkpoint-opt_param-scheduler",
        {},
    ),
    "deterministic": Accepted(
        "--deterministic-mode --no-gradient-accumulation-fusion --attention-softmax-in-fp32 --use-mcore-models "
        "--attention-backend unfused --transformer-impl local",
        {"transformer_impl": "local"},
    ),
    "rates of their own": Accepted("--decoupled-lr 5e-4 --decoupled-min-lr 1e-5 --lr-warmup-init 1e-6", {}),
    "scores divided by the layer": Accepted("--apply-query-key-layer-scaling --fp16", {}),
    "padded otherwise": Accepted("--make-vocab-size-divisible-by 64", {"make_vocab_size_divisible_by": 64}),
    "padded by hand": Accepted("--padded-vocab-size 1024", {"vocab_size": 1024}),
    "FSDP": Accepted("--use-torch-fsdp2 --no-gradient-accumulation-fusion --ckpt-format torch_dist", {}),
    "experts": Accepted(
        "--num-experts 8 --expert-model-parallel-size 4 --moe-ffn-hidden-size 64 --moe-grouped-gemm --swiglu "
        "--moe-router-topk 4 --moe-router-load-balancing-type seq_aux_loss --moe-aux-loss-coeff 1e-3 "
        "--moe-z-loss-coeff 0 --moe-shared-expert-intermediate-size 32 --moe-shared-expert-gate "
        "--disable-bias-linear --moe-router-dtype fp32 --moe-layer-freq ([0]*1+[1]*3) --moe-permute-fusion "
        "--moe-token-dispatcher-type alltoall",
        {
            "num_experts": 8,
            "moe_ffn_hidden_size": 64,
            "moe_grouped_gemm": True,
            "moe_router_topk": 4,
            "moe_router_load_balancing_type": "seq_aux_loss",
            "moe_aux_loss_coeff": 1e-3,
            "moe_shared_expert_intermediate_size": 32,
            "moe_shared_expert_gate": True,
            "moe_layer_freq": (0, 1, 1, 1),
            "swiglu": True,
            "add_bias_linear": False,
        },
    ),
    "experts of an MLP's size, in groups": Accepted(
        "--num-experts 8 --moe-ffn-hidden-size 256 --ffn-hidden-size 256 --moe-router-score-function sigmoid "
        "--moe-router-enable-expert-bias --moe-router-num-groups 4 --moe-router-group-topk 2 --moe-layer-freq 2 "
        "--moe-router-topk-scaling-factor 2.5 --moe-router-load-balancing-type aux_loss global_aux_loss "
        "--moe-aux-loss-coeff 1e-2 1e-3",
        {
            "num_experts": 8,
            "moe_router_score_function": "sigmoid",
            "moe_router_enable_expert_bias": True,
            "moe_router_num_groups": 4,
            "moe_router_group_topk": 2,
            "moe_router_topk_scaling_factor": 2.5,
            "moe_layer_freq": 2,
            "moe_router_load_balancing_type": ("aux_loss", "global_aux_loss"),
            "moe_aux_loss_coeff": (1e-2, 1e-3),
        },
    ),
    "an MLP with a router's flags": Accepted("--moe-router-topk 4 --moe-grouped-gemm --num-experts 0", {}),
    "a rate of no bias": Accepted("--num-experts 8 --moe-router-bias-update-rate 0.01", {"num_experts": 8}),
    "latent attention with the sizes of another": Accepted(
        "--multi-latent-attention --kv-channels 32 --num-query-groups 2 --position-embedding-type rope",
        {"multi_latent_attention": True, "position_embedding_type": "rope"},
    ),
    "off by one": Accepted("--softmax-type off-by-one --window-size 16,0", {}),
}


class Refused(NamedTuple):
    """A line, of a GPT's program if it is not said, and what its refusal names."""

    flags: str
    said: str
    script: str = "pretrain_gpt.py"


REFUSED = {
    "latent experts": Refused("--num-experts 8 --moe-latent-size 64 --disable-bias-linear", "--moe-latent-size"),
    "experts from an MLP": Refused("--num-experts 8 --moe-use-upcycling", "--moe-use-upcycling"),
    "experts as one parameter": Refused("--num-experts 8 --moe-single-grouped-weight", "--moe-single-grouped-weight"),
    "groups by rank": Refused("--num-experts 8 --moe-router-topk-limited-devices 2", "--moe-router-topk-limited"),
    "too many experts a token": Refused("--num-experts 2 --moe-router-topk 4", "--moe-router-topk 4 is more than"),
    "a pattern that is none": Refused("--num-experts 8 --moe-layer-freq [0]*x", "--moe-layer-freq"),
    "latent attention with fused projections": Refused(
        "--multi-latent-attention --mla-down-proj-fusion", "--mla-down-proj-fusion"
    ),
    "YaRN of ordinary attention": Refused("--rope-type yarn", "--rope-type"),
    "multi-token prediction": Refused("--mtp-num-layers 1", "--mtp-num-layers"),
    "learnable sinks": Refused("--softmax-type learnable", "--softmax-type learnable"),
    "another gated MLP": Refused("--quick-geglu --glu-linear-offset 1.0", "--quick-geglu"),
    "the gate of attention": Refused("--attention-output-gate", "--attention-output-gate"),
    "linear attention": Refused("--experimental-attention-variant gated_delta_net", "--experimental-attention-variant"),
    "a YAML file": Refused("--yaml-cfg model.yaml", "--yaml-cfg"),
    "another draw": Refused("--init-method-xavier-uniform", "--init-method-xavier-uniform"),
    "an embedding's own std": Refused("--embedding-init-method-std 1.0", "--embedding-init-method-std"),
    "yarn": Refused("--position-embedding-type yarn", "--position-embedding-type"),
    "yarn's factor": Refused("--position-embedding-type rope --rope-type yarn", "--rope-type"),
    "frozen": Refused("--freeze-all-layers", "--freeze-all-layers"),
    "a spec": Refused("--spec local", "--spec"),
    "a flag that no release has": Refused("--no-such-flag 3", "--no-such-flag: no flag of pretrain_gpt.py"),
    "distilled": Refused("--export-kd-teacher-load there", "--export-kd-teacher-load: ModelOpt"),
    "another model's builder": Refused("--model-provider mamba", "--model-provider mamba"),
    "a BERT's flag on a GPT": Refused(
        "--bert-no-binary-head", "--bert-no-binary-head: a flag of a BERT", "m/pretrain_gpt.py"
    ),
    "a T5's flag on a GPT": Refused(
        "--decoder-seq-length 8", "--decoder-seq-length: a flag of a T5", "m/pretrain_gpt.py"
    ),
    "a BERT of rotary positions": Refused(
        "--position-embedding-type rope", "--position-embedding-type rope: Megatron's BERT", "pretrain_bert.py"
    ),
    "a BERT of other layers": Refused("--spec some.module spec", "--spec: a custom layer", "pretrain_bert.py"),
    "a T5 of two depths": Refused("--decoder-num-layers 9", "--decoder-num-layers 9 beside", "pretrain_t5.py"),
    "the fork's BERT": Refused("--deepspeed", "--deepspeed: the line builds a BERT", "pretrain_bert.py"),
    "a hybrid model's builder of a GPT": Refused(
        "--hybrid-layer-pattern *-*- --model-provider gpt", "--model-provider gpt", "pretrain_hybrid.py"
    ),
    "gated delta net": Refused(
        "--hybrid-layer-pattern G*M-", "--hybrid-layer-pattern: 'G' is a layer of gated delta net", "pretrain_hybrid.py"
    ),
    "gated delta net, as 0.16 says it": Refused(
        "--is-hybrid-model --hybrid-override-pattern G*M-",
        "--hybrid-override-pattern: 'G' is a layer of gated delta net",
        "pretrain_mamba.py",
    ),
    "Mamba layers in groups that they cannot make": Refused(
        "--hybrid-layer-pattern M*-- --mamba-num-heads 12",
        "--mamba-num-groups 8 does not divide the 12 heads of a Mamba layer",
        "pretrain_hybrid.py",
    ),
    "further tokens, of which the pattern says nothing": Refused(
        "--hybrid-layer-pattern *-*- --mtp-num-layers 1 --position-embedding-type rope",
        "--mtp-num-layers: --hybrid-layer-pattern says these layers, behind '/', and has none",
        "pretrain_hybrid.py",
    ),
    "further tokens, as was said before": Refused(
        "--hybrid-layer-pattern *-*- --mtp-num-layers 1 --mtp-hybrid-override-pattern *-",
        "--mtp-hybrid-override-pattern: it is the older form of what is behind '/' in --hybrid-layer-pattern",
        "pretrain_hybrid.py",
    ),
    "latent attention, of which the pattern has none": Refused(
        "--hybrid-layer-pattern *-*- --multi-latent-attention",
        "--multi-latent-attention: --hybrid-layer-pattern has no layer +",
        "pretrain_hybrid.py",
    ),
    "two kinds of attention": Refused(
        "--hybrid-layer-pattern *-+-",
        "--hybrid-layer-pattern: a model of Megatron's has '*' or '+'",
        "pretrain_hybrid.py",
    ),
    "shares beside another pattern": Refused(
        "--hybrid-attention-ratio 0.5 --hybrid-override-pattern *-*-",
        "--hybrid-attention-ratio beside --hybrid-override-pattern, whose layers are others",
        "pretrain_mamba.py",
    ),
    "shares of more than all": Refused(
        "--hybrid-attention-ratio 0.5 --hybrid-mlp-ratio 0.75",
        "--hybrid-attention-ratio 0.5 and --hybrid-mlp-ratio 0.75 are no parts of a whole",
        "pretrain_mamba.py",
    ),
    "a hybrid model without a pattern": Refused("", "--hybrid-layer-pattern is missing", "pretrain_hybrid.py"),
    "a GPT with a pattern": Refused("--hybrid-layer-pattern *-*-", "--hybrid-layer-pattern: a flag of a hybrid model"),
    "a spec without a pattern": Refused(
        "--spec megatron.core.models.hybrid.hybrid_layer_specs hybrid_stack_spec", "--spec: a custom layer"
    ),
    "another spec with a pattern": Refused(
        "--hybrid-layer-pattern *-*- --spec local", "--spec: a custom layer", "pretrain_hybrid.py"
    ),
    "multimodal": Refused(
        "--img-h 336 --patch-dim 14", "multimodal/train.py: multimodal", "examples/multimodal/train.py"
    ),
    "reinforcement learning": Refused("--perform-rl-step", "train_rl.py: reinforcement learning", "train_rl.py"),
}


def words(flags: str, *, tokenizer: str = NULL) -> list[str]:
    """A line's flags, those of the table last."""
    return [*TINY.split(), *RUN.split(), *tokenizer.split(), *flags.split()]
