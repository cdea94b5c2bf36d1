"""Model file and recipe ↔ Megatron-LM's arguments: both ways round they agree, and Megatron's own parser agrees too."""

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.lm_arguments import parser_of_megatron, said_once
from support.shapes import gpt, recipe_for

from mup_megatron.architectures.flag import Flag, number, whole_number
from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.architectures.registry import shapes_of
from mup_megatron.errors import InputError
from mup_megatron.megatron.arguments import table
from mup_megatron.megatron.arguments.convert import (
    flags,
    model_from_flags,
    model_from_values,
    not_in_model_file,
    values_from_flags,
)
from mup_megatron.megatron.arguments.launch_script import words_of_launch, words_of_script
from mup_megatron.recipe import Recipe, Schedule

ROOT = Path(__file__).parents[2]
REQUIRED = "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 16 --vocab-size 50257".split()


def model_of(*words: str) -> ModelFile:
    return model_from_flags([*REQUIRED, *words], source="line")


# ---- both ways round -----------------------------------------------------------------------------------------------


@st.composite
def models(draw: st.DrawFn) -> ModelFile:
    """Any model file, every key of it, at its default or not."""
    heads = draw(st.integers(1, 12))
    kv_channels = draw(st.none() | st.integers(1, 64).map(lambda half: 2 * half))
    seq_length = draw(st.integers(1, 4096))
    probability = st.sampled_from([0.0, 0.1]) | st.floats(0, 1, exclude_max=True)
    positive = st.floats(1e-12, 10, exclude_min=True)
    return ModelFile(
        num_layers=draw(st.integers(1, 200)),
        hidden_size=2 * heads * draw(st.integers(12, 64)),
        num_attention_heads=heads,
        vocab_size=draw(st.integers(1, 300_000)),
        seq_length=seq_length,
        ffn_hidden_size=draw(st.none() | st.integers(1, 10_000)),
        kv_channels=kv_channels,
        group_query_attention=draw(st.booleans()),
        num_query_groups=draw(st.sampled_from([n for n in range(1, heads + 1) if heads % n == 0])),
        swiglu=draw(st.booleans()),
        normalization=draw(st.sampled_from(["LayerNorm", "RMSNorm"])),
        norm_epsilon=draw(st.just(1e-5) | positive),
        apply_layernorm_1p=draw(st.booleans()),
        qk_layernorm=draw(st.booleans()),
        position_embedding_type=draw(st.sampled_from(["learned_absolute", "rope", "none"])),
        rotary_base=draw(st.just(10000) | st.integers(1, 10**9)),
        rotary_percent=draw(st.just(1.0) | st.floats(0, 1, exclude_min=True)),
        add_bias_linear=draw(st.booleans()),
        add_qkv_bias=draw(st.booleans()),
        untie_embeddings_and_output_weights=draw(st.booleans()),
        make_vocab_size_divisible_by=draw(st.just(128) | st.integers(1, 1024)),
        max_position_embeddings=draw(st.none() | st.integers(seq_length, 2 * seq_length)),
        init_method_std=draw(st.just(0.02) | positive),
        attention_dropout=draw(probability),
        hidden_dropout=draw(probability),
        transformer_impl=draw(st.sampled_from(["local", "transformer_engine"])),
    )


@given(models())
@settings(deadline=None)
def test_flags_and_model_file_agree(model: ModelFile) -> None:
    assert model_from_flags(flags(model), source="test") == said_once(model)


@pytest.fixture(scope="module")
def parser() -> argparse.ArgumentParser:
    return parser_of_megatron()


@pytest.fixture(scope="module")
def parsed(parser: argparse.ArgumentParser) -> Callable[[list[str]], dict[str, Any]]:
    return lambda words: vars(parser.parse_args(words))


def test_flags_mean_to_megatron_what_they_mean_here(parsed: Callable[[list[str]], dict[str, Any]]) -> None:
    @given(models())
    @settings(deadline=None)
    def agree(model: ModelFile) -> None:
        values = parsed(flags(model))
        assert model_from_values(values, source="test") == said_once(model)
        assert {key: values[key] for key in KNOWN & set(values)} == {
            key: value for key, value in values_from_flags(flags(model), source="test").items() if key in values
        }

    agree()


KNOWN = {flag.key for flag in table.every()}


def test_the_table_of_flags_is_megatrons(parser: argparse.ArgumentParser) -> None:
    """Name, attribute, default and polarity of every flag that this release has."""
    actions = {name: action for action in parser._actions for name in action.option_strings}
    missing = [flag.name for flag in table.every() if flag.name not in actions]
    # Of earlier releases:
    older = "--hybrid-attention-ratio --hybrid-mlp-ratio --use-legacy-models --moe-use-legacy-grouped-gemm"
    assert set(missing) <= {*older.split(), "--moe-router-topk-limited-devices"}
    for flag in table.every():
        if flag.name not in missing:
            action = actions[flag.name]
            assert (action.dest, action.default) == (flag.key, flag.default), flag.name
            assert (action.nargs == 0) == (flag.parse is None), flag.name
            if action.nargs == 0:
                assert action.const is not flag.default, flag.name


@pytest.mark.parametrize(("given", "words"), [(True, ["--swiglu"]), (False, [])])
def test_a_key_at_megatrons_default_is_left_out(given: bool, words: list[str]) -> None:
    model = ModelFile(
        num_layers=1, hidden_size=192, num_attention_heads=1, vocab_size=9, seq_length=8, swiglu=given,
        attention_dropout=0.1,
    )  # fmt: skip
    required = "--num-layers 1 --hidden-size 192 --num-attention-heads 1 --vocab-size 9 --seq-length 8".split()
    # Megatron asks for positions always, and its dropout is 0.1 where a model file's is 0.
    always = ["--max-position-embeddings", "8", "--hidden-dropout", "0.0"]
    assert flags(model) == [*required, *words, *always]


# ---- recipes -------------------------------------------------------------------------------------------------------


def recipe_with(**schedule: Any) -> Recipe:
    return recipe_for(gpt()).model_copy(update={"schedule": Schedule(**schedule)})


def test_a_recipe_is_written_out_whole(parsed: Callable[[list[str]], dict[str, Any]]) -> None:
    recipe = recipe_for(gpt())
    values = parsed(flags(gpt(4), recipe))
    h = recipe.hyperparameters
    for key in "lr min_lr init_method_std weight_decay adam_beta1 adam_beta2 adam_eps clip_grad".split():
        assert values[key] == getattr(h, key), key
    assert (values["optimizer"], values["lr_decay_style"], values["lr_warmup_init"]) == ("adam", "linear", 0.0)
    assert model_from_values(values, source="test") == said_once(gpt(4, init_method_std=0.05))


def test_values_at_megatrons_default_are_written_out_too() -> None:
    words = flags(gpt(4), recipe_for(gpt(), weight_decay=0.01, adam_beta2=0.999))
    assert words[words.index("--weight-decay") + 1] == "0.01"
    assert words[words.index("--adam-beta2") + 1] == "0.999"
    assert "--sgd-momentum" not in words


def test_sgd_has_its_momentum_and_nothing_of_adam(parsed: Callable[[list[str]], dict[str, Any]]) -> None:
    words = flags(gpt(), recipe_for(gpt(), optimizer="sgd", sgd_momentum=0.8))
    assert parsed(words)["optimizer"] == "sgd"
    assert parsed(words)["sgd_momentum"] == 0.8
    assert not any(word.startswith("--adam") for word in words)


def steps(values: dict[str, Any]) -> tuple[float, float, float | None]:
    """Warm-up, decay and final decay in iterations, as Megatron-LM works them out from its arguments."""
    decay = values["train_iters"] if values["lr_decay_iters"] is None else values["lr_decay_iters"]
    warmup = values["lr_warmup_iters"]
    if values["lr_warmup_fraction"] is not None:
        warmup = values["lr_warmup_fraction"] * decay
    return warmup, decay, values["lr_wsd_decay_iters"]


@given(
    warmup=st.floats(0, 0.4),
    decay=st.just(1.0) | st.floats(0.6, 7000),
    final=st.floats(0.01, 0.2),
    run=st.integers(100, 10**12),
)
@settings(deadline=None)
def test_fractions_of_the_run_become_megatrons_counts(warmup: float, decay: float, final: float, run: int) -> None:
    """Megatron's warm-up is a fraction of the decay, a recipe's of the run."""
    recipe = recipe_with(
        lr_decay_style="WSD", lr_warmup_fraction=warmup, lr_decay_fraction=decay, lr_wsd_decay_fraction=final
    )
    words = [*flags(gpt(), recipe, train_iters=run), "--train-iters", str(run)]
    found = steps(values_from_flags(words, source="test"))
    assert found[0] == pytest.approx(warmup * run, rel=1e-9)  # the warm-up is not rounded
    assert found[1] == pytest.approx(decay * run, abs=0.5, rel=1e-12)  # the others to whole iterations
    assert found[2] == pytest.approx(max(1, final * run), abs=0.5, rel=1e-12)


def test_the_length_of_the_run_is_asked_for_only_where_it_is_needed() -> None:
    words = flags(gpt(), recipe_with(lr_warmup_fraction=0.01))
    assert words[words.index("--lr-warmup-fraction") + 1] == "0.01"
    assert "--lr-decay-iters" not in words
    with pytest.raises(InputError, match=r"lr_decay_fraction 0\.9 of the run .* Give --train-iters\."):
        flags(gpt(), recipe_with(lr_decay_fraction=0.9))
    with pytest.raises(InputError, match=r"lr_wsd_decay_fraction 0\.1 of the run .* Give --train-iters\."):
        flags(gpt(), recipe_with(lr_decay_style="WSD"))


def test_no_warm_up_is_no_flag() -> None:
    assert not any(word.startswith("--lr-warmup") for word in flags(gpt(), recipe_with()))


# ---- flags by themselves -------------------------------------------------------------------------------------------


def test_other_flags_are_skipped_with_their_values() -> None:
    words = "--lr 1e-4 --data-path 0.5 a_text --bf16 --tensor-model-parallel-size 8 --save x".split()
    assert model_of(*words) == model_of()


def test_a_value_may_stand_behind_an_equals_sign_and_the_last_of_a_repeated_flag_wins() -> None:
    model = model_of("--hidden-size=128", "--ffn-hidden-size", "100", "--ffn-hidden-size=200")
    assert (model.hidden_size, model.ffn_size) == (128, 200)


def test_polarity() -> None:
    assert model_of().tied
    assert model_of().add_bias_linear
    assert not model_of("--untie-embeddings-and-output-weights").tied
    assert not model_of("--disable-bias-linear").add_bias_linear


def test_rotary_positions_by_their_older_flag() -> None:
    assert model_of("--use-rotary-position-embeddings").position_embedding_type == "rope"
    assert model_of("--use-rotary-position-embeddings", "--no-position-embedding").position_embedding_type == "rope"


def test_megatrons_dropout_is_not_a_model_files() -> None:
    assert model_of().attention_dropout == model_of().hidden_dropout == 0.1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--num-layers"], "--num-layers: its value is missing"),
        (["--hidden-size", "--swiglu"], "--hidden-size: its value is missing"),
        (["--num-layers", "two"], "--num-layers: 'two' is not a whole number"),
        (["--num-layers", "2.0"], "--num-layers: '2.0' is not a whole number"),
        (["--num-layers", "0"], "--num-layers: should be greater than 0, found 0"),
        (["--norm-epsilon", "nan"], "--norm-epsilon: 'nan' is not a finite number"),
        (["--norm-epsilon", "small"], "--norm-epsilon: 'small' is not a number"),
        (["--swiglu=1"], "--swiglu: takes no value, found '1'"),
        (["--hidden-size", "65"], "--hidden-size 65 is not divisible by --num-attention-heads 4"),
        (["--position-embedding-type", "relative"], "--position-embedding-type: should be 'learned_absolute'"),
        (["--transformer-impl", "inference_optimized"], "--transformer-impl: should be 'local'"),
        (["--max-position-embeddings", "8"], "--max-position-embeddings 8 is smaller than --seq-length 16"),
        (["--no-position-embedding"], "Use --position-embedding-type none"),
        (["--softmax-type", "learnable"], "--softmax-type learnable: it adds a parameter"),
        (["--encoder-num-layers", "4"], "--encoder-num-layers 4 beside --num-layers 2"),
        (["--hidden-size", "$HIDDEN"], "--hidden-size $HIDDEN: what $HIDDEN stands for is not known here"),
    ],
)
def test_what_is_wrong_is_said_with_the_flags_name(words: list[str], said: str) -> None:
    with pytest.raises(InputError) as raised:
        model_of(*words)
    assert said in str(raised.value)
    assert str(raised.value).startswith("line: ")


def test_a_missing_vocabulary_is_the_tokenizers() -> None:
    with pytest.raises(InputError, match=r"missing: --vocab-size\. Give it\. .* the tokenizer.s size before padding"):
        model_from_flags(REQUIRED[:-2], source="line")
    with pytest.raises(InputError, match="missing: --num-layers, --hidden-size, "):
        model_from_flags([], source="line")


# ---- what a model file cannot say ----------------------------------------------------------------------------------

WORDS: dict[Any, list[str]] = {None: [], whole_number: ["2"], number: ["0.5"], str: ["something"]}


@pytest.mark.parametrize("flag", table.refused(), ids=lambda flag: flag.name)
def test_what_changes_parameters_is_refused_by_the_flags_name(flag: Flag) -> None:
    with pytest.raises(InputError) as raised:
        model_of(flag.name, *WORDS[flag.parse])
    assert str(raised.value).startswith(f"line: {flag.name}: ")
    assert model_from_values({**values_from_flags(REQUIRED, source="line"), flag.key: flag.default}, source="line")


@pytest.mark.parametrize("flag", table.NOT_SAID, ids=lambda flag: flag.name)
def test_what_leaves_parameters_alone_is_only_named(flag: Flag) -> None:
    words = [*REQUIRED, flag.name, *WORDS[flag.parse], *(["--use-rope-scaling"] if "rope-scaling" in flag.name else [])]
    assert flag.name in not_in_model_file(values_from_flags(words, source="line"))
    assert model_from_flags(words, source="line") == model_of()


def test_nothing_is_named_at_megatrons_defaults(parsed: Callable[[list[str]], dict[str, Any]]) -> None:
    assert not_in_model_file(parsed(REQUIRED)) == not_in_model_file({}) == []
    # Not read without --use-rope-scaling.
    assert not_in_model_file({"rope_scaling_factor": 4.0}) == []


# ---- parsed values -------------------------------------------------------------------------------------------------


def values(**changes: Any) -> dict[str, Any]:
    return {**values_from_flags(REQUIRED, source="line"), **changes}


def test_the_vocabulary_of_the_tokenizer_takes_the_place_of_the_flag() -> None:
    assert model_from_values(values(), vocab_size=32000, source="line").vocab_size == 32000
    assert model_from_values(values(vocab_size=None), vocab_size=32000, source="line").vocab_size == 32000


@pytest.mark.parametrize(
    ("padded", "tensor_parallel", "expected"),
    [
        (None, 1, (50257, 128)),
        (50304, 1, (50257, 128)),
        (50688, 4, (50257, 128)),  # padded for four ranks
        (50432, 1, (50432, 128)),  # by a tokenizer with more entries than the flag says
        (50000, 1, (50000, 1)),  # given by hand, and used as it is
    ],
)
def test_a_padded_vocabulary(padded: int | None, tensor_parallel: int, expected: tuple[int, int]) -> None:
    model = model_from_values(
        values(padded_vocab_size=padded, tensor_model_parallel_size=tensor_parallel), source="line"
    )
    assert (model.vocab_size, model.make_vocab_size_divisible_by) == expected
    if padded is not None:
        assert model.padded_vocab_size(tensor_parallel) == padded


def test_what_validation_fills_in_changes_nothing() -> None:
    """Megatron's `validate_args` writes derived sizes and a qkv bias among the arguments."""
    before = model_from_values(values(), source="line")
    filled = {"ffn_hidden_size": 256, "kv_channels": 16, "add_qkv_bias": True, "encoder_num_layers": 2}
    after = model_from_values(values(**filled, encoder_seq_length=16, max_position_embeddings=16), source="line")
    assert shapes_of(before, before) == shapes_of(before, after)
    assert after.max_position_embeddings is None


def test_neither_torch_nor_megatron_is_needed() -> None:
    program = (
        "import sys, mup_megatron.megatron.arguments.native\n"
        "import mup_megatron.cli.args, mup_megatron.cli.model, mup_megatron.cli.from_native\n"
        "print(sorted({'torch', 'megatron'} & {name.split('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# ---- launch scripts ------------------------------------------------------------------------------------------------

SCRIPT = r"""#!/bin/bash
#SBATCH --num-layers 99
# don't be confused by the apostrophe
set -euo pipefail
export CUDA_DEVICE_MAX_CONNECTIONS=1
CHECKPOINT_PATH=$1 #<path>
readonly HIDDEN=64
LAYERS=${LAYERS:-2}
NAME="it's ${HIDDEN#x} $(basename "$0")"
if [ -z "$WORLD" ]; then WORLD=2; fi
DISTRIBUTED_ARGS=(
    --nproc_per_node ${GPUS:-8} # eight (8
    --nnodes "$(scontrol show hostnames | wc -l)"
)
MODEL_ARGS=(
    --num-layers ${LAYERS}
    --hidden-size=$HIDDEN
    --num-attention-heads 4 \
    --seq-length 16
    # --swiglu
    --vocab-size "50257"
)
TRAIN_ARGS="--lr 1e-4 \
 --normalization RMSNorm"
TRAIN_ARGS+=" --disable-bias-linear"
cat <<EOF > job.txt
it's --num-layers 3
EOF
case $X in
  7b) FOO=1 ;;
  *) FOO=2;;
esac
echo "--num-layers 5"
mkdir -p $CHECKPOINT_PATH && cd $CHECKPOINT_PATH
torchrun ${DISTRIBUTED_ARGS[@]} /path/to/pretrain_gpt.py \
    "${MODEL_ARGS[@]}" \
    $TRAIN_ARGS --save "$CHECKPOINT_PATH" "$@" 2>&1 | tee log
"""


@pytest.fixture
def script(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        path = tmp_path / "run.sh"
        path.write_text(text, encoding="utf-8")
        return path

    return write


Script = Callable[[str], Path]


def test_a_script_is_read_as_bash_would_run_it(script: Script) -> None:
    words = words_of_script(script(SCRIPT))
    assert (
        words
        == (
            "--num-layers 2 --hidden-size=64 --num-attention-heads 4 --seq-length 16 --vocab-size 50257 "
            "--lr 1e-4 --normalization RMSNorm --disable-bias-linear --save $1 $@"
        ).split()
    )
    model = model_from_flags(words, source="run.sh")
    assert (model.num_layers, model.hidden_size, model.normalization) == (2, 64, "RMSNorm")
    assert not model.add_bias_linear


COMMANDS = [
    "H=32\npython pretrain_gpt.py {} --hidden-size $H",
    "H=32; H=16; python pretrain_gpt.py {} --hidden-size ${{H}}",
    "python pretrain_gpt.py {} --hidden-size ${{H:-16}}",
    "H=32\npython pretrain_gpt.py {} --hidden-size ${{H:-16}}",
    "H=\npython pretrain_gpt.py {} --hidden-size ${{H:-16}}",
    "D=8\npython pretrain_gpt.py {} --hidden-size ${{H:-${{D}}}}",
    "python pretrain_gpt.py {} --hidden-size ${{H:=16}} --ffn-hidden-size $H",
    "A=(--hidden-size 16)\nA+=(--swiglu)\npython pretrain_gpt.py {} ${{A[*]}}",
    "A=(\n  --hidden-size 16 # sixteen\n)\npython x.py {} ${{A[@]}}",
    "A='--hidden-size 16'\npython x.py {} $A",
    "A='--hidden-size 16'\nB=\"$A --swiglu\"\npython x.py {} ${{B}}",
    'export A="--hidden-size 16"\npython x.py {} $A',
    'CMD="python x.py {} --hidden-size 16"\necho $CMD > /dev/null\neval $CMD',
    'CMD="python x.py {} --hidden-size 16"\nbash -c "true; $CMD"',
    'main() {{\n  local H=16\n  python x.py {} --hidden-size $H\n}}\nmain "$@"',
    "if true; then\n  python x.py {} --hidden-size 16\nfi",
    "H=16\nif true; then H=16; fi\npython x.py {} --hidden-size $H",
    "A='{} --hidden-size 16'\nif true; then A+=' --bf16'; fi\npython x.py $A",
    "A='{} --hidden-size 16'\nif true; then A=\"$A --fp8-format hybrid\"; fi\npython x.py $A",
    "A='{} --hidden-size 16'\ntrue && A=\"--fp8-format hybrid ${{A}}\"\npython x.py $A",
    "A='{} --hidden-size 16'\nif true; then A=$A' --bf16'; fi\nexport A=\"$A --swiglu\"\npython x.py $A",
    'A=({} --hidden-size 16)\nif true; then A=("${{A[@]}}" --bf16); fi\npython x.py ${{A[@]}}',
    "A=({} --hidden-size 16)\nif true; then A=(--bf16 ${{A[@]}}); fi\npython x.py ${{A[@]}}",
    'A=({} --hidden-size 16)\nif true; then A=("${{A[@]}}"); fi\npython x.py ${{A[@]}}',
    "(H=16 python x.py {} --hidden-size 16) 2>&1",
    "true &&\n  python x.py {} --hidden-size 16 | cat",
    "P=--hidden\npython x.py {} ${{P}}-size=16 --normalization \"RMS\"'Norm'",
    "cat > /dev/null <<-'END'\n\tdon't --hidden-size 3\n\tEND\npython x.py {} --hidden-size 16",
]


@pytest.mark.parametrize("text", COMMANDS)
def test_a_script_means_what_bash_makes_of_it(script: Script, text: str, tmp_path: Path) -> None:
    rest = "--num-layers 2 --num-attention-heads 4 --seq-length 16 --vocab-size 512 --ffn-hidden-size 64"
    path = script(text.format(rest))
    python = tmp_path / "python"
    python.write_text("#!/bin/bash\nprintf '%s\\n' \"${@:2}\"\n", encoding="utf-8")
    python.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    run = subprocess.run(["bash", str(path)], env=environment, capture_output=True, text=True, check=True)
    model = model_from_flags(run.stdout.splitlines(), source="bash")
    assert model_from_flags(words_of_script(path), source="run.sh") == model


def test_a_file_that_only_sets_a_variable_is_read_too(script: Script) -> None:
    words = words_of_script(script(f'export MODEL_ARGS=" {" ".join(REQUIRED)} "\n'))
    assert model_from_flags(words, source="run.sh") == model_of()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("\nA=(\n--num-layers $1\n)\npython x.py ${A[@]}", "--num-layers $1 in line 3: what $1 stands for"),
        ("python x.py \\\n --num-layers=$N", "--num-layers $N in line 2: what $N stands for"),
        ("N=$(nproc --all)\npython x.py --num-layers $N", "--num-layers $(nproc…)"),
        ("if $A; then N=2; else N=4; fi\npython x.py --num-layers $N", "what $N stands for"),
        ("N=2\n$A && N=4\npython x.py --num-layers $N", "what $N stands for"),
        ("for N in 1 2; do\npython x.py --num-layers $N\ndone", "what $N stands for"),
        ("N=2\ncase $A in\n a) N=4;;\nesac\npython x.py --num-layers $N", "what $N stands for"),
        ("if $A; then N=2; fi\npython x.py --num-layers ${N:-4}", "what ${N:-4} stands for"),
        ("python x.py --num-layers '$N'", "what $N stands for"),
        ("if $A; then\nB=(--swiglu)\nfi\npython x.py --num-layers 2 ${B[@]}", "--swiglu ${B[@]} in line 2"),
        ("B='--bf16'\nif $A; then\nB+=' --swiglu'\nfi\npython x.py --num-layers 2 $B", "--swiglu $B in line 3"),
        ("A='--num-layers 2'\nif $B; then\nA=\"$A --swiglu\"\nfi\npython x.py $A", "--swiglu $A in line 3"),
        ("A='--num-layers 2'\n$B &&\nA=\"--swiglu ${A:-}\"\npython x.py $A", "--swiglu $A in line 3"),
        ("A=(--num-layers 2)\nif $B; then\nA=(${A[@]} --swiglu)\nfi\npython x.py ${A[@]}", "--swiglu $A in line 3"),
        ('if $B; then A=--swiglu; fi\nA="$A --bf16"\npython x.py --num-layers 2 $A', "--swiglu $A in line 1"),
        ('if $B; then A=--swiglu; fi\n$B && C+=" $A"\npython x.py --num-layers 2 $C', "--swiglu $C in line 2"),
        ("if $B; then\nA='--num-layers 2'; fi\npython x.py $A", "--num-layers $A in line 2"),
        ("A='--num-layers 2'\n$B && A=\"\\$A --bf16\"\npython x.py $A", "--num-layers $A in line 2"),
        ("A='--num-layers 2'\n$B && A=\"$AB --bf16\"\npython x.py $A", "--num-layers $A in line 2"),
        ("python x.py --num-layers 2 $MODEL_ARGS", "They may be in $MODEL_ARGS, which is not known here"),
    ],
)
def test_what_the_model_depends_on_and_cannot_be_read_off_is_named(script: Script, text: str, said: str) -> None:
    with pytest.raises(InputError) as raised:
        model_from_flags(words_of_script(script(text)), source="run.sh")
    assert said in str(raised.value)


TORCHRUN = "torchrun x.py --num-layers 2 --num-attention-heads 4 --seq-length 8 --vocab-size 9 --hidden-size"


@pytest.mark.parametrize(
    ("between", "why"),
    [
        ("source ./cluster.sh", "line 2 (source ./cluster.sh) may set it"),
        ("source ./cluster.sh; H=${H:-2048}", "line 2 (source ./cluster.sh) may set it"),
        (". ./cluster.sh", "line 2 (. ./cluster.sh) may set it"),
        ("[ -f cluster.sh ] && source ./cluster.sh", "line 2 (source ./cluster.sh) may set it"),
        ("command source ./cluster.sh", "line 2 (command source) may set it"),
        ('eval "$SETTINGS"', "line 2 (eval $SETTINGS) may set it"),
        ('let "H=H*2"', "line 2 (let H=H*2) may set it"),
        ("let H++", "line 2 (let H++) may set it"),
        ("(( H *= 2 ))", "line 2 ((( H *= 2 ))) may set it"),
        ("((H<<=1))", "may set it"),
        ("echo $((H *= 2))", "may set it"),
        ("for ((H=1; H<3; H++)); do true; done", "may set it"),
        ("for ((i=1; i<3; i++)); do H=$((H*2)); done", "not known here"),
        ("read -r H <<< 2048", "line 2 (read -r) may set it"),
        ("read -r -a H < <(echo 2048)", "may set it"),
        ('read -r "$NAME" <<< 2048', "may set it"),
        ("printf -v H %d 2048", "line 2 (printf -v) may set it"),
        ("printf -vH %d 2048", "may set it"),
        ("unset H", "line 2 (unset H) may set it"),
        ("mapfile -t H < sizes", "may set it"),
        ("readarray -t H < sizes", "may set it"),
        ("while getopts h: H; do true; done", "may set it"),
        ("H[0]=2048", "may set it"),
        ("export $(grep -v '#' .env | xargs)", "may set it"),
        ('declare "H=2048"', "may set it"),
        ("declare -i H=1024*2", "may set it"),
        ("declare -n R=H\nR=2048", "may set it"),
        ("if $B; then H+=0; fi", "what $H stands for"),
        ("$B && H=${H}0", "what $H stands for"),
        ("unset H; $B && : ${H:=4096}", "may set it"),
        ("(H=2048)", "what $H stands for"),
        ("H=2048 | cat", "what $H stands for"),
        ("true | H=2048", "what $H stands for"),
        ("true |\nH=2048", "what $H stands for"),
        ("{ H=2048; W=1; } | cat", "what $H stands for"),
        ("$B && { W=1; H=2048; }", "what $H stands for"),
        ("H=2048 &", "what $H stands for"),
        ("f() { H=2048; }; f", "line 2 (H=2048) may set it"),
        ("f() { H=2048; }\nH=512\nf", "line 2 (H=2048) may set it"),
        ("function f {\n  export H=2048\n}\nH=512\nif f; then true; fi", "line 3 (H=2048) may set it"),
        ("f() { source ./cluster.sh; }\nH=512\nf", "line 2 (source ./cluster.sh) may set it"),
        ("f() {\n  local H=2048\n}\nf", "line 3 (H=2048) may set it"),
        ("f()\n(\n  H=2048\n)", "line 4 (H=2048) may set it"),
        ("f() { eval x; }\nH=512\n$F", "line 2 (eval x) may set it"),
    ],
)
def test_what_may_have_changed_a_variable_is_named(script: Script, between: str, why: str) -> None:
    path = script(f"H=1024\n{between}\n{TORCHRUN} $H\n")
    with pytest.raises(InputError) as raised:
        model_from_flags(words_of_script(path), source="run.sh")
    assert re.search(r"--hidden-size \$\{?H", str(raised.value))
    assert why in str(raised.value)
    words, source = words_of_launch([str(path), "--hidden-size", "64"])
    assert model_from_flags(words, source=source).hidden_size == 64


@pytest.mark.parametrize(
    "text",
    [
        "H=1024; main() { T $H; }; H=2048; main",
        "H=1024\nmain() {\n  T $H\n}\nfor H in 1 2; do main; done",
        "H=1024\nmain() {\n  T $H\n}\nsource ./cluster.sh\nmain",
        "H=1024\nf() { H=2048; }\nmain() {\n  H=64\n  f\n  T $H\n}\nmain",
        "H=1024\nmain() { T $H; H=2048; }\nmain; main",
        "H=1024\nfor i in 1 2; do T $H; H=2048; done",
        "source ./cluster.sh\nT ${H:-1024}",
        "source ./cluster.sh\nH+=0\nT $H",
    ],
)
def test_a_command_sees_as_unknown_what_is_set_before_it_runs(script: Script, text: str) -> None:
    with pytest.raises(InputError, match=r"--hidden-size \$.*: what \$.* stands for is not known here"):
        model_from_flags(words_of_script(script(text.replace("T ", f"{TORCHRUN} "))), source="run.sh")


@pytest.mark.parametrize(
    "between",
    [
        "f() { G=2048; }; f",
        "source ./cluster.sh; H=1024",
        "unset G; read -r G <<< 2; let G=H*2; (( G = H )); printf '%s' -v; mapfile -t G < x",
        "(( H == 2048 )) || [ $((H <= 4096)) = 1 ]",
        "export H; readonly H",
        "declare H=1024",
        "main() { true; }; main",
        "(cd x; G=2) | cat",
        "cat <<'END-OF' > x\nH=4096\nEND-OF",
        "cat <<-END > x\n\tH=4096\n\tEND",
        "cat <<END > x\n\tEND\nH=4096\nEND",
        'cat <<"A B" > x\nH=4096\nA B',
        "cat <<A <<'B.C' > x\nH=4096\nA\nH=4096\nB.C",
        "case $X in\n source) G=1 ;;\n eval) G=2 ;;\nesac",
    ],
)
def test_what_does_not_change_a_variable_leaves_it_known(script: Script, between: str) -> None:
    words = words_of_script(script(f"H=1024\n{between}\n{TORCHRUN} $H\n"))
    assert model_from_flags(words, source="run.sh").hidden_size == 1024


def test_a_function_that_is_never_called_sets_nothing(script: Script) -> None:
    with pytest.raises(InputError, match=r"line 2 \(H=4096\) may set it"):
        model_from_flags(words_of_script(script(f"H=1024\nf() {{ H=4096; }}\n{TORCHRUN} $H")), source="run.sh")
    words = words_of_script(script(f"f() {{ H=4096; }}\nH=1024\n{TORCHRUN} $H"))
    assert model_from_flags(words, source="run.sh").hidden_size == 1024


@pytest.mark.parametrize("change", ["if $B; then A=--bf16; fi", "source ./cluster.sh", "A+=x; f() { A=; }; f"])
def test_flags_that_a_variable_may_have_lost_are_not_known(script: Script, change: str) -> None:
    with pytest.raises(InputError, match=r"--swiglu \$A in line 2: what \$A stands for is not known"):
        model_from_flags(words_of_script(script(f"A='--swiglu '\n{change}\n{TORCHRUN} 64 $A")), source="run.sh")


def test_what_the_model_does_not_depend_on_may_be_unknown(script: Script) -> None:
    words = words_of_script(script(f'python x.py {" ".join(REQUIRED)} --save $1 --seed $SEED "$@"'))
    assert model_from_flags(words, source="run.sh") == model_of()


def test_a_flag_after_the_script_settles_what_it_leaves_open(script: Script) -> None:
    path = script(f"python x.py {' '.join(REQUIRED)} --num-layers $N")
    words, source = words_of_launch([str(path), "--num-layers", "6"])
    assert source == str(path)
    assert model_from_flags(words, source=source).num_layers == 6


def test_flags_that_are_appended_under_a_condition_leave_the_rest_known(script: Script) -> None:
    path = script(f'A="{" ".join(REQUIRED)}"\nif $B; then A="$A --swiglu"; fi\npython x.py $A')
    words, source = words_of_launch([str(path), "--swiglu"])
    assert model_from_flags(words, source=source) == model_of("--swiglu")


def test_flags_are_no_script() -> None:
    assert words_of_launch(REQUIRED) == (REQUIRED, "flags")
    assert words_of_launch(["pretrain_gpt.py", *REQUIRED])[0][1:] == REQUIRED


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "echo hello",
            r"no command with a model's flags, such as --num-layers, was found\. Give the script that starts",
        ),
        ('\npython x.py $A --bf16 "$@"', r"was found\. They may be in \$A \(line 2\), \$@ \(line 2\), which"),
        (
            "A=--bf16\nif $B; then\nA=$C\nfi\ntorchrun $X ${A} --save $Y",
            r"in \$X \(line 5\), \$\{A\} \(line 3\) and others",
        ),
        (
            "A=$(cat x)\neval python x.py $A",
            r"They may be in \$\(cat…\) \(line 1\), which cannot be read off the script",
        ),
        ("python a.py --num-layers 2\npython b.py --num-layers 3", "two commands describe different models"),
    ],
)
def test_a_script_without_one_model_is_refused(script: Script, text: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        words_of_script(script(text))


def test_two_commands_with_one_model_are_one(script: Script) -> None:
    text = "python a.py --num-layers 2 --save x\npython b.py --num-layers 2 --load x"
    assert words_of_script(script(text)) == ["--num-layers", "2", "--save", "x"]


def test_nothing_of_a_script_is_run(script: Script, tmp_path: Path) -> None:
    words_of_script(script(f"touch {tmp_path}/made\nA=$(touch {tmp_path}/made)\npython x.py --num-layers 2 $A"))
    assert not (tmp_path / "made").exists()


def test_a_script_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.sh: no such file\. Check the path"):
        words_of_script(tmp_path / "none.sh")
    (tmp_path / "binary.sh").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"binary\.sh: not UTF-8 text \(byte 0\)\. Save it as UTF-8"):
        words_of_script(tmp_path / "binary.sh")
