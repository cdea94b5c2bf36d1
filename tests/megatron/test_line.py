"""Launch lines as they are in the world: each is a model file, or a refusal that names the flag or the program."""

import itertools
from pathlib import Path
from typing import Any

import pytest
from support.lines import ACCEPTED, NULL, REFUSED, words

from mup_megatron.architectures import registry
from mup_megatron.architectures.command_line import CommandLine
from mup_megatron.architectures.flag import Flag, whole_number
from mup_megatron.architectures.gpt import Gpt
from mup_megatron.architectures.hybrid import HYBRID, HybridFile
from mup_megatron.architectures.keys.custom import CustomTensor
from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.architectures.registry import model_file
from mup_megatron.errors import InputError
from mup_megatron.megatron import versions
from mup_megatron.megatron.arguments import fork
from mup_megatron.megatron.arguments import line as lines
from mup_megatron.megatron.arguments.convert import flags as write_flags
from mup_megatron.megatron.arguments.effects import Effect, row_of
from mup_megatron.megatron.arguments.line import read_line


@pytest.fixture(autouse=True)
def newest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some tokenizers count otherwise in older releases."""
    monkeypatch.setattr(versions, "core_version", lambda: (0, 19, 0))


def read(flags: str, *, script: str = "pretrain_gpt.py", tokenizer: str = NULL, **options: Any) -> lines.Line:
    return read_line(["torchrun", "--nproc-per-node", "8", script, *words(flags, tokenizer=tokenizer)], **options)


@pytest.mark.parametrize("name", ACCEPTED)
def test_lines_of_a_gpt_are_model_files(name: str) -> None:
    expected: dict[str, Any] = {
        "attention_dropout": 0.1,
        "hidden_dropout": 0.1,
        "vocab_size": 511,
        **ACCEPTED[name].keys,
    }
    plain = ModelFile(num_layers=4, hidden_size=64, num_attention_heads=4, seq_length=32, **expected)
    assert read(ACCEPTED[name].flags).model() == plain


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_such_gpt_is_refused_by_name(name: str) -> None:
    refused = REFUSED[name]
    with pytest.raises(InputError) as raised:
        read(refused.flags, script=refused.script).model()
    assert refused.said in str(raised.value)
    assert all(len(sentence) <= 300 for sentence in str(raised.value).splitlines())


def test_an_optimizer_is_no_part_of_a_model() -> None:
    line = read("--optimizer soap --muon-momentum 0.9")
    assert line.model() == read("").model()
    assert line.remarks == (
        "--optimizer soap: a recipe knows adam, sgd, muon and lion (its step is Adam's in a basis that rotates, for "
        "which no rule has been measured), so a run with one is stopped.",
    )


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--perform-rl-step", "--perform-rl-step: a run with a recipe is stopped: a recipe is for pre-training"),
        (
            "--transformer-impl inference_optimized",
            "--transformer-impl inference_optimized: kernels that",
        ),
    ],
)
def test_what_else_is_done_with_a_model_leaves_it_as_it_is(flags: str, said: str) -> None:
    line = read(flags)
    assert line.model() == read("").model()
    assert len(line.remarks) == 1
    assert line.remarks[0].startswith(said)


def test_what_a_checkpoint_may_say_otherwise_is_remarked() -> None:
    line = read("--use-checkpoint-args --load there")
    assert line.model() == read("").model()
    assert [remark.partition(":")[0] for remark in line.remarks] == ["--use-checkpoint-args"]
    for size in ("--hidden-size", "--num-layers"):
        given = words("--use-checkpoint-args --load there")
        at = given.index(size)
        with pytest.raises(InputError, match="--use-checkpoint-args: a part of the model comes from the checkpoint"):
            read_line(["pretrain_gpt.py", *given[:at], *given[at + 2 :]]).model()


def test_flags_alone_are_read_as_a_gpts() -> None:
    assert read_line(words("")).model() == read("").model()


# ---- hybrid models ---------------------------------------------------------------------------------------------------

LOCAL = "--spec mup_megatron.megatron.builders.hybrid local_stack_spec"
STOCK = "--spec megatron.core.models.hybrid.hybrid_layer_specs hybrid_stack_spec"
OLD_STOCK = "--spec megatron.core.models.mamba.mamba_layer_specs mamba_stack_spec"
SMALL = {"mamba_head_dim": 16, "mamba_num_groups": 2, "mamba_state_dim": 8}
FURTHER = "--mtp-num-layers 2 --position-embedding-type none"
AHEAD = {"mtp_num_layers": 2, "position_embedding_type": "none"}
SMALL_MAMBA = "--mamba-head-dim 16 --mamba-num-groups 2 --mamba-state-dim 8 --disable-mamba-mem-eff-path"
PLAIN = HybridFile(
    hybrid_layer_pattern="*-*-",
    hidden_size=64,
    num_attention_heads=4,
    seq_length=32,
    vocab_size=511,
    attention_dropout=0.1,
    hidden_dropout=0.1,
)


@pytest.mark.parametrize(
    ("script", "flags", "keys"),
    [
        ("pretrain_hybrid.py", "--hybrid-layer-pattern *-*-", {}),
        ("mine/train.py", "--hybrid-layer-pattern=*-*-", {}),
        ("pretrain_hybrid.py", f"--hybrid-layer-pattern *-*- {LOCAL}", {"transformer_impl": "local"}),
        ("pretrain_hybrid.py", f"{STOCK} --swiglu --hybrid-layer-pattern *-*-", {"swiglu": True}),
        ("pretrain_mamba.py", f"{OLD_STOCK} --is-hybrid-model --hybrid-override-pattern *-*-", {}),
        ("pretrain_hybrid.py", "--hybrid-layer-pattern *-|*-", {"hybrid_layer_pattern": "*-|*-"}),
        ("pretrain_hybrid.py", "--hybrid-layer-pattern -**-", {"hybrid_layer_pattern": "-**-"}),
        (
            "pretrain_hybrid.py",
            f"--hybrid-layer-pattern M-M* {SMALL_MAMBA} --model-provider hybrid",
            {"hybrid_layer_pattern": "M-M*", **SMALL},
        ),
        (
            "pretrain_mamba.py",
            f"{OLD_STOCK} --hybrid-attention-ratio 0.25 {SMALL_MAMBA} --mamba-num-heads 4",
            {"hybrid_layer_pattern": "MM*M", **SMALL, "mamba_num_heads": 4},
        ),
        (
            "pretrain_hybrid.py",
            f"--hybrid-layer-pattern M-|M*/M*/M* {SMALL_MAMBA} {FURTHER} --mtp-loss-scaling-factor 0.3",
            {"hybrid_layer_pattern": "M-|M*/M*/M*", **SMALL, **AHEAD, "mtp_loss_scaling_factor": 0.3},
        ),
        (
            "pretrain_hybrid.py",
            "--hybrid-layer-pattern +-+- --kv-lora-rank 16",
            {"hybrid_layer_pattern": "+-+-", "multi_latent_attention": True, "kv_lora_rank": 16},
        ),
    ],
)
def test_lines_of_a_hybrid_model_are_model_files(script: str, flags: str, keys: dict[str, Any]) -> None:
    assert read(flags, script=script).model() == PLAIN.model_copy(update=keys)


def test_a_pattern_decides_how_many_tokens_are_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever else the line says, and in the releases that have it: else it is refused by the release's name."""
    hybrid = {"script": "pretrain_hybrid.py"}
    line = read("--hybrid-layer-pattern *-*-/*-/*- --mtp-num-layers 1 --position-embedding-type none", **hybrid)
    assert line.remarks == ("--mtp-num-layers 1: Megatron takes those of --hybrid-layer-pattern, 2.",)
    assert line.model().mtp_num_layers == 2
    for release, pattern, said in (
        (
            (0, 16, 1),
            "*-*-/*-",
            r"--hybrid-layer-pattern \*-\*-/\*-: Megatron-Core 0\.16 has no multi-token prediction .* Take 0\.17",
        ),
        ((0, 18, 2), "+-+-", r"Megatron-Core 0\.18 has no latent attention \('\+'\) in a pattern\. Take 0\.19"),
    ):
        monkeypatch.setattr(versions, "core_version", lambda release=release: release)
        with pytest.raises(InputError, match=said):
            read(f"--hybrid-layer-pattern {pattern} --position-embedding-type none", **hybrid).model()


def test_a_launch_scripts_pattern_is_read_as_a_shell_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "run.sh"
    path.write_text(
        f"ARGS=(\n{' '.join(words(LOCAL))}\n--hybrid-layer-pattern '*-|*-')\n"
        'torchrun --nproc-per-node 2 pretrain_hybrid.py "${ARGS[@]}"\n'
    )
    changes = {"hybrid_layer_pattern": "*-|*-", "transformer_impl": "local"}
    assert read_line([str(path)]).model() == PLAIN.model_copy(update=changes)


def test_the_number_of_layers_beside_a_pattern_is_what_the_release_makes_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    older = "--is-hybrid-model --hybrid-override-pattern *-"
    for flags in (older, "--hybrid-layer-pattern *-"):
        line = read(flags, script="pretrain_mamba.py")  # and --num-layers 4
        assert line.model().num_layers == 2
        assert f"--num-layers 4: Megatron takes the layers of {flags.split()[-2]}, 2." in line.remarks
    monkeypatch.setattr(versions, "core_version", lambda: (0, 16, 1))
    with pytest.raises(
        InputError, match=r"--hybrid-override-pattern has 2 layers, and --num-layers is 4, which Megatron"
    ):
        read(older, script="pretrain_mamba.py").model()
    [remark] = read("--hybrid-override-pattern *-*-", script="pretrain_mamba.py").remarks
    assert remark.startswith("--is-hybrid-model is missing: without it Megatron 0.16 draws")
    assert read(f"--num-layers 2 {older}", script="pretrain_mamba.py").remarks == ()


@pytest.mark.parametrize("release", [(0, 16), (0, 17), (0, 18), (0, 19)])
@pytest.mark.parametrize("impl", ["local", "transformer_engine"])
@pytest.mark.parametrize("pattern", ["*-*-", "*-|*-", "-*", "M-M*", "*-|*-/-/-", "+-M/+"])
def test_what_args_writes_for_a_release_is_read_back(
    monkeypatch: pytest.MonkeyPatch, release: tuple[int, int], impl: str, pattern: str
) -> None:
    monkeypatch.setattr(versions, "core_version", lambda: (*release, 0))
    content = {**dict(PLAIN), "transformer_impl": impl, "hybrid_layer_pattern": pattern}
    content |= SMALL if "M" in pattern else {}
    content |= {"position_embedding_type": "none"} if "/" in pattern else {}
    content |= {"multi_latent_attention": True, "kv_lora_rank": 16} if "+" in pattern else {}
    model = HybridFile(**content | {"num_layers": len(pattern.partition("/")[0].replace("|", ""))})
    older = release < (0, 17)
    if ("+" in pattern and release < (0, 19)) or ("/" in pattern and older):
        with pytest.raises(InputError, match=f"hybrid_layer_pattern .*: Megatron-Core 0.{release[1]} has no"):
            write_flags(model, release=release)
        return
    words = write_flags(model, release=release)
    assert ("--is-hybrid-model" in words, "--hybrid-override-pattern" in words) == (older, older)
    expected = model.letters if older else pattern
    line = read_line(["pretrain_mamba.py", *words])
    assert line.model() == model.model_copy(update={"hybrid_layer_pattern": expected})
    assert line.remarks == ()


SHARES = [
    (4, 0.25, 0.0, "MM*M"),
    (4, 0.5, 0.5, "-**-"),
    (9, 0.0, 0.0, "MMMMMMMMM"),
    (10, 0.3, 0.2, "MM*M-*M*M-"),
    (56, 0.08, 0.5, "M-M-M--M-M*-M-M-M-M--M*-M-M-M-M-M*--M-M-M-M-M*-M--M-M-M-"),
]


@pytest.mark.parametrize(("layers", "attention", "mlps", "pattern"), SHARES)
def test_shares_of_layers_are_the_pattern_that_megatron_makes_of_them(
    layers: int, attention: float, mlps: float, pattern: str
) -> None:
    """As 0.16 does."""
    flags = f"--num-layers {layers} --hybrid-attention-ratio {attention} --hybrid-mlp-ratio {mlps} {SMALL_MAMBA}"
    line = read(f"{flags} --is-hybrid-model", script="mine/train.py")
    if not (attention or mlps):
        with pytest.raises(InputError, match="--is-hybrid-model: no layer is said"):
            line.model()
        return
    assert getattr(line.model(), "hybrid_layer_pattern", None) == pattern
    assert any("Megatron 0.16 makes" in remark for remark in line.remarks)


@pytest.mark.skipif(
    versions.core_version() >= (0, 17, 0),
    reason="megatron-core {}.{} has patterns alone".format(*versions.core_version()),
)
def test_shares_of_all_sizes_are_megatrons_where_a_release_knows_them() -> None:
    from megatron.core.ssm import mamba_hybrid_layer_allocation as allocation

    for layers, tenths, others in itertools.product((1, 7, 24, 57), range(11), range(11)):
        if 0 < tenths + others <= 10:
            expected = "".join(allocation.allocate_layers(layers, tenths / 10, others / 10))
            values = {"num_layers": layers, "hybrid_attention_ratio": tenths / 10, "hybrid_mlp_ratio": others / 10}
            assert HYBRID.command_line.read(values, None).content["hybrid_layer_pattern"] == expected


def test_a_spec_of_ones_own_needs_the_tensors_of_its_layers() -> None:
    flags = "--spec mine.layers spec --transformer-impl local"
    with pytest.raises(InputError, match=r"--spec: a custom layer can have any parameters\. List them as"):
        read(flags).model()
    tensor = CustomTensor(name="decoder.scale", fan_out="hidden_size", start=1.0)
    model = read(flags).model([tensor])
    assert (model.custom_tensors, model.transformer_impl) == ((tensor,), "local")
    assert model_file(model.model_dump(mode="json", exclude_defaults=True), source="file") == model


# ---- an architecture that is defined elsewhere -----------------------------------------------------------------------


class StreamsFile(ModelFile):
    streams: int


class Streams(Gpt):
    name = "streams"
    description = "a model of streams"
    file = StreamsFile
    command_line = CommandLine(
        programs=("pretrain_streams.py",), keys={"streams": (Flag("--streams", "streams", None, whole_number),)}
    )


def test_an_architectures_own_flags_need_no_edit_here() -> None:
    registry.register(Streams())
    try:
        line = read("--streams 3", script="pretrain_streams.py")
        expected = {**dict(read("").model()), "streams": 3}
        assert line.model() == StreamsFile(**expected)
        assert line.remarks == ()
        assert read_line(write_flags(line.model())).model() == line.model()
        row = row_of("--streams")
        assert row is not None
        assert row.effect is Effect.MODEL
        with pytest.raises(InputError, match=r"pretrain_streams\.py builds .*, and --streams is missing"):
            read("", script="pretrain_streams.py")
        with pytest.raises(InputError, match=r"--streams: a flag of a model of streams, and pretrain_gpt\.py builds"):
            read("--streams 3")
    finally:
        del registry._ARCHITECTURES["streams"]
    assert row_of("--streams") is None


# ---- remarks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--squared-relu", "--squared-relu: a model file has no key for it"),
        ("--softmax-type off-by-one", "--softmax-type: a model file has no key for it"),
        ("--init-model-with-meta-device", "--init-model-with-meta-device: a run with a recipe is stopped: the weights"),
        ("--fp8-param-gather", "--fp8-param-gather: a run with a recipe is stopped: weights that are stored"),
        ("--use-mup", "--use-mup: a run with a recipe is stopped. `mup-megatron from-native`"),
    ],
)
def test_what_the_model_file_lacks_is_said(flags: str, said: str) -> None:
    assert [remark for remark in read(flags).remarks if remark.startswith(said)] != []


def test_an_ordinary_line_needs_no_remark() -> None:
    for name in ("plain", "llama", "tensor and pipeline parallel", "saved asynchronously", "deterministic"):
        assert read(ACCEPTED[name].flags).remarks == ()


def test_a_program_of_ones_own_is_taken_for_a_gpts_and_its_flags_are_named() -> None:
    line = read("--my-flag 3", script="mine/train.py")
    assert line.model() == read("").model()
    assert "mine/train.py: no program of Megatron-LM's" in line.remarks[0]
    assert "--my-flag: no flag of Megatron-LM 0.16 to 0.19" in line.remarks[1]
    assert "--my-flag: no flag" in read_line(words("--my-flag=3")).remarks[0]


def test_the_deepspeed_fork_has_flags_of_its_own() -> None:
    assert read("--deepspeed --zero-stage 1 --deepspeed_config ds.json").remarks == ()


@pytest.mark.parametrize(
    ("flags", "plain"),
    [
        ("--num-key-value-heads 2", "--group-query-attention --num-query-groups 2"),
        ("--layernorm-epsilon=1e-3", "--norm-epsilon 1e-3"),
        ("--rotary-position-embeddings-theta 500000", "--rotary-base 500000"),
    ],
)
def test_what_the_fork_calls_otherwise_is_read(flags: str, plain: str) -> None:
    assert read(f"--deepspeed {flags}").model() == read(plain).model() != read("").model()


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--mlp-type residual", "--mlp-type: models with experts"),
        ("--num-experts 4", "--num-experts: models with experts"),
        ("--kd", "--kd: distillation"),
        ("--random-ltd", "--random-ltd: it changes"),
        ("--embed-layernorm", "--embed-layernorm: no flag of pretrain_gpt.py"),
        ("--glu-activation geglu", "--glu-activation: no flag of pretrain_gpt.py"),
        ("--no-such-flag 3", "or of Megatron-DeepSpeed"),
    ],
)
def test_what_the_fork_cannot_say_either_is_refused(flag: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        read(f"--deepspeed {flag}")


def test_every_flag_of_the_fork_means_one_thing() -> None:
    assert not fork.HARMLESS & set(fork.REFUSED)
    assert not [name for name in (*fork.HARMLESS, *fork.REFUSED) if row_of(name) is not None]


# ---- which program -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "start",
    [
        "python bind.py pretrain_vlm.py",
        "python wrapper.py --nproc 3 -- python pretrain_vlm.py",
        "torchrun --log-dir x.py pretrain_vlm.py",
        "nsys profile -o a.py torchrun pretrain_vlm.py",
        "python -u -m accelerate.commands.launch pretrain_vlm.py",
        "python -m pretrain_vlm",
        "python -mpretrain_vlm",
        "python -m torch.distributed.run --module examples.pretrain_vlm",
        "torchrun PRETRAIN_VLM.PY",
        "torchrun pretrain_vlm.pyc",
        "torchrun ./pretrain_vlm",
        "torchrun pretrain_gpt.py pretrain_vlm.py",
    ],
)
def test_another_program_is_found_behind_what_starts_it(start: str, tmp_path: Path) -> None:
    script = tmp_path / "run.sh"
    script.write_text(f"{start} {' '.join(words(''))}\n", encoding="utf-8")
    for given in ([*start.split(), *words("")], [str(script)]):
        with pytest.raises(InputError, match=r"pretrain_vlm\.py: multimodal"):
            read_line(given)


@pytest.mark.parametrize("start", ["python bind.py pretrain_gpt.py", "python w.py -n 3 -- python pretrain_gpt.py"])
def test_a_gpt_behind_what_starts_it_is_one(start: str) -> None:
    line = read_line([*start.split(), *words("--use-mcore-models")])
    assert line.model() == read("").model()
    assert line.remarks == ()


def test_a_value_that_looks_like_a_program_is_a_value(tmp_path: Path) -> None:
    script = tmp_path / "run.sh"
    script.write_text(f"torchrun pretrain_gpt.py --no-such-flag x.py {' '.join(words(''))}\n", encoding="utf-8")
    for given in ([str(script)], ["torchrun", "pretrain_gpt.py", "--no-such-flag", "x.py", *words("")]):
        with pytest.raises(InputError, match="--no-such-flag"):
            read_line(given)


@pytest.mark.parametrize("start", ["torchrun $PROG", "torchrun pretrain_${M}.py", "torchrun --nproc 2 train"])
def test_a_program_that_is_not_known_is_remarked(start: str) -> None:
    (remark,) = (each for each in read_line([*start.split(), *words("")]).remarks if "--nproc" not in each)
    assert remark.startswith(f"{start.split()[-1]}: which program this is, is not known here")


def test_a_berts_line_is_its_programs() -> None:
    found = read("", script="examples/bert/pretrain_bert.py").model()
    assert dict(found) == {**dict(read("").model()), "architecture": "bert", "bert_binary_head": True}
    # Its layers are Transformer Engine's, unless the spec says otherwise.
    assert read("--transformer-impl local", script="pretrain_bert.py").model() == found
    local = read("--spec local --bert-no-binary-head", script="pretrain_bert.py").model()
    assert dict(local) == {**dict(found), "transformer_impl": "local", "bert_binary_head": False}
    assert read_line(["python", "pretrain_bert.py", *write_flags(local)]).model() == local


def test_a_t5s_line_is_its_programs() -> None:
    layers = read("").model().num_layers
    said = f"--decoder-seq-length 8 --decoder-num-layers {layers} --position-embedding-type relative"
    own = {"encoder_num_layers": layers, "decoder_num_layers": layers, "decoder_seq_length": 8}
    relative = {"relative_attention_num_buckets": 16, "relative_attention_max_distance": 128}
    found = read(f"{said} --relative-attention-num-buckets 16", script="pretrain_t5.py").model()
    expected = {**dict(read("").model()), "architecture": "t5", **own, **relative}
    assert dict(found) == {**expected, "position_embedding_type": "relative"}
    # Its own flags say what it is in a script of another name.
    assert read(f"{said} --relative-attention-num-buckets 16", script="mine.py").model() == found
    assert read_line(write_flags(found)).model() == found
    # Flags for both stacks, in place of those for one.
    words = [word.replace("--num-layers", "--encoder-num-layers") for word in write_flags(found)]
    assert read_line([word.replace("--seq-length", "--encoder-seq-length") for word in words]).model() == found


@pytest.mark.parametrize("flag", ["--model-type BERT", "--model-type=T5"])
def test_another_type_of_model_is_refused(flag: str) -> None:
    assert read("--model-type GPT").model() == read("").model()
    with pytest.raises(InputError, match=r"--model-type [BT]"):
        read(flag)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("-- --hidden-size 128", "flags: --: Megatron takes no words"),
        ("@args.txt", "@args.txt: Megatron reads no flags from a file"),
        ("--swiglu @args.txt", "@args.txt: Megatron reads no flags from a file"),
        ("--swiglu --squared-relu", "--swiglu beside --squared-relu"),
        ("--make-vocab-size-divisible-by 0", "--make-vocab-size-divisible-by"),
        ("--make-vocab-size-divisible-by 0 --padded-vocab-size 512", "--make-vocab-size-divisible-by"),
    ],
)
def test_what_megatron_stops_at_is_no_model(flags: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        read(flags).model()
    assert read("--wandb-exp-name @args.txt").model() == read("").model()


LONG = "9" * 600


@pytest.mark.parametrize(
    "flags",
    [
        f"--hidden-size {LONG}",
        f"--hidden-size {LONG * 10}",
        f"--{LONG}",
        f"--optimizer o{LONG}",
        f"--train-iters 0xf{LONG}",
        f"--init-method-std x{LONG}",
        f"--hidden-size $A{LONG}",
        f"--swiglu=x{LONG}",
        f"--normalization x{LONG}",
        f"--model-provider x{LONG}",
        f"--tokenizer-type HuggingFaceTokenizer --tokenizer-model {LONG}/{LONG}",
        f"@{LONG}",
    ],
)
def test_no_word_of_a_line_is_told_at_length(flags: str) -> None:
    said = ""
    try:
        line = read(flags)
        line.model()
        said = "\n".join(line.remarks)
    except InputError as error:
        said = str(error)
    assert all(len(sentence) <= 300 for sentence in said.splitlines())


ARGS = "${A_ARGS[@]} ${MODEL_ARGS[@]} $MY_ARGS ${DISTRIBUTED_ARGS[@]} $DATA_ARGS --save $CHECKPOINT_PATH"


def test_where_flags_may_be_is_told_of_two_variables() -> None:
    with pytest.raises(InputError) as raised:
        read_line(["torchrun", "pretrain_gpt.py", *ARGS.split()]).model()
    assert "--vocab-size" in str(raised.value)
    assert len(str(raised.value)) <= 300
    assert "They may be in $DATA_ARGS, $MY_ARGS and 2 more, which" in str(raised.value)
    with pytest.raises(InputError, match=r"Give it\.$"):
        read_line(["torchrun", "pretrain_gpt.py", *words("")[2:], "$DATA_ARGS", *ARGS.split()[-2:]]).model()


@pytest.mark.parametrize("name", ["folder", "dangling", "missing", "a" * 300])
def test_a_single_word_is_a_file(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises(InputError, match=r"no such file|cannot be read"):
        read_line([str(tmp_path / name)])


def test_what_generates_text_passes() -> None:
    assert read("--prompts a --num-tokens-to-generate 4 --model-provider gpt").model() == read("").model()


@pytest.mark.parametrize(("core", "said"), [((0, 20, 1), True), ((0, 15, 0), True), ((0, 16, 1), False)])
def test_a_release_outside_the_tested_range_gets_one_remark(
    monkeypatch: pytest.MonkeyPatch, core: tuple[int, int, int], said: bool
) -> None:
    monkeypatch.setattr(versions, "core_version", lambda: core)
    remarks = [remark for remark in read("").remarks if "outside the tested range 0.16 to 0.19" in remark]
    assert len(remarks) == said


# ---- launch scripts ------------------------------------------------------------------------------------------------


def script(folder: Path, command: str, flags: str = "") -> list[str]:
    path = folder / "run.sh"
    path.write_text(f"SCRIPT={command}\ntorchrun $SCRIPT {' '.join(words(flags))}\n")
    return [str(path)]


def test_a_launch_scripts_program_is_known_as_well(tmp_path: Path) -> None:
    assert read_line(script(tmp_path, "$M/pretrain_gpt.py")).model() == read("").model()
    with pytest.raises(InputError, match=r"run\.sh: pretrain_vlm\.py: multimodal models"):
        read_line(script(tmp_path, "$M/pretrain_vlm.py"))
    with pytest.raises(InputError, match="--no-such-flag: no flag of"):
        read_line(script(tmp_path, "pretrain_gpt.py", "--no-such-flag"))


def test_a_launch_script_may_start_a_module(tmp_path: Path) -> None:
    path = tmp_path / "run.sh"
    path.write_text(f"torchrun --nproc-per-node 8 -m tools.run_text_generation_server {' '.join(words(''))}\n")
    line = read_line([str(path)])
    assert (line.model(), line.remarks) == (read("").model(), ())


def test_a_script_may_prepare_its_data_as_well(tmp_path: Path) -> None:
    path = tmp_path / "run.sh"
    path.write_text(f"python tools/preprocess_data.py --input x\ntorchrun pretrain_gpt.py {' '.join(words(''))}\n")
    assert read_line([str(path)]).model() == read("").model()


# ---- the vocabulary ------------------------------------------------------------------------------------------------


def test_a_missing_vocabulary_is_asked_for_in_both_ways() -> None:
    with pytest.raises(InputError) as raised:
        read("", tokenizer="--tokenizer-type HuggingFaceTokenizer --tokenizer-model not/here").model()
    for said in ("missing: --vocab-size", "before the --", "--tokenizer-type with --tokenizer-model or --vocab-file"):
        assert said in str(raised.value)
    assert len(str(raised.value)) <= 300


def test_a_model_that_is_refused_is_not_asked_for_its_vocabulary() -> None:
    with pytest.raises(InputError) as raised:
        read("--moe-latent-size 8", tokenizer="").model()
    assert "--vocab-size" not in str(raised.value)


def test_the_answer_stands_where_the_line_has_none() -> None:
    assert read("", tokenizer="", vocab_size=300).model().vocab_size == 300
    assert read("", tokenizer="--vocab-size $V --tokenizer-model $T", vocab_size=300).model().vocab_size == 300


def test_where_the_line_has_one_the_answer_is_not_used() -> None:
    line = read("", vocab_size=300)
    assert line.model().vocab_size == 511
    assert "--vocab-size 300 is not used" in line.remarks[0]
    assert read("", vocab_size=511).remarks == ()


def test_a_tokenizers_file_counts_more_than_a_flag_that_megatron_does_not_look_at(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text('{"<|endoftext|>": 0, "a": 1}')
    line = read("--vocab-size 77", tokenizer=f"--vocab-file {tmp_path}/vocab.json")
    assert line.model().vocab_size == 2
    assert "Megatron takes the size of its tokenizer, 2" in line.remarks[0]


def test_a_flag_beside_a_tokenizer_that_is_not_here_is_taken_and_said() -> None:
    line = read("", tokenizer="--tokenizer-type HuggingFaceTokenizer --tokenizer-model not/here --vocab-size 99")
    assert line.model().vocab_size == 99
    assert "which cannot be read here" in line.remarks[0]


def test_tokens_that_a_flag_adds_leave_the_size_open(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text('{"<|endoftext|>": 0, "a": 1}')
    with pytest.raises(InputError, match="missing: --vocab-size"):
        read("--tokenizer-special-tokens <x>", tokenizer=f"--vocab-file {tmp_path}/vocab.json").model()


def test_variables_that_the_model_does_not_depend_on_may_be_unknown() -> None:
    assert read("--lr $LR --tokenizer-model $T --tensor-model-parallel-size $TP").model() == read("").model()
    with pytest.raises(InputError, match=r"--hidden-size \$H: what \$H stands for is not known here"):
        read("--hidden-size $H")
