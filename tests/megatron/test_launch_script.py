"""Launch scripts that nobody would write, that take arguments of their own, or that have our own command in them."""

import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.errors import InputError
from mup_megatron.megatron.arguments.convert import model_from_flags
from mup_megatron.megatron.arguments.launch_script import words_of_launch, words_of_script
from mup_megatron.yaml_io import dump_yaml

TORCHRUN = "torchrun x.py --num-layers 2 --num-attention-heads 4 --seq-length 8 --vocab-size 9 --hidden-size"
Script = Callable[[str], Path]


@pytest.fixture
def script(tmp_path: Path) -> Script:
    def write(text: str) -> Path:
        path = tmp_path / "run.sh"
        path.write_text(text, encoding="utf-8")
        return path

    return write


# ---- scripts that nobody would write -------------------------------------------------------------------------------


@pytest.mark.parametrize("blank", ["\u00a0", "\v", "\f", "\u0085", "\u2028", "\u2003", "\ufeff"])
def test_a_word_ends_at_blanks_of_bash_alone(script: Script, blank: str) -> None:
    """Whatever else Unicode takes for a space is a letter of the word, as in bash."""
    text = (
        f"A=1{blank}2\necho {blank} b\nM='--swiglu{blank}--bf16 x'\n{TORCHRUN} 64 --save $A --load {blank} $M c{blank}d"
    )
    path = script(text)
    shown = f"torchrun() {{ printf '%s\\0' \"$@\"; }}\necho() {{ :; }}\n{text}"
    of_bash = subprocess.run(["bash", "-c", shown], capture_output=True, check=True).stdout.decode().split("\0")
    assert words_of_script(path) == of_bash[1:-1]


@pytest.mark.parametrize(
    "text",
    [
        "$(" * 20_000,
        "${" * 20_000,
        "((" * 20_000,
        "(( 1 " * 5_000,
        "`" * 20_001,
        '"' + '\\"' * 20_000,
        "A=(" * 5_000,
        "if x; then " * 2_000,
        "for i in 1; do\nA=$i\n" * 2_000,
        "f() { A=1; }\nf\n" * 3_000,
        "cat <<E\n" * 3_000,
        "A=aaaa\n" + "A=$A$A\n" * 60 + "python x.py $A",
        "A=(a)\n" + 'A=("${A[@]}" "${A[@]}")\n' * 60 + 'python x.py "${A[@]}"',
        "A=" + "${A:-" * 5_000 + "}" * 5_000,
    ],
    ids=range(14),
)
def test_no_script_takes_for_ever_or_all_memory(script: Script, text: str) -> None:
    before = time.process_time()
    with pytest.raises(InputError) as caught:
        words_of_script(script(text))
    assert len(str(caught.value)) <= 300
    assert time.process_time() - before < 60  # it was without end, or the square of the length


def test_a_variable_that_grew_beyond_reading_is_not_known(script: Script) -> None:
    path = script("A=1\n" + "A=$A$A\n" * 60 + f"{TORCHRUN} $A")
    with pytest.raises(InputError, match=r"--hidden-size \$A in line 62: .* longer than 100000 characters"):
        model_from_flags(words_of_script(path), source="run.sh")


# ---- a script's own arguments, and our own command in it -----------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "arguments", "size"),
    [
        ("T $1", ["64"], "64"),
        ("T ${1:-32}", ["64"], "64"),
        ("T ${2:-32}", ["64"], "32"),
        ("H=$1\nshift\nT $H --save $1", ["64", "out"], "64"),
        ("shift\nT $1", ["out", "64"], "64"),
        ("readonly H=$1\nsource other.sh\nT $H", ["64"], "64"),
        ("f() { X=$1; }\nT $1", ["64"], "64"),
    ],
)
def test_arguments_of_a_script_are_put_in(script: Script, text: str, arguments: list[str], size: str) -> None:
    words = words_of_script(script(text.replace("T ", f"{TORCHRUN} ")), arguments)
    assert words[words.index("--hidden-size") + 1] == size


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ("T ${1:-32}", []),
        ("T $2", ["64"]),
        ("if x; then shift; fi\nT $1", ["64", "32"]),
        ("set -- 7\nT $1", ["64"]),
        ("source other.sh\nT $1", ["64"]),
        ("H=$1\nsource other.sh\nT $H", ["64"]),
        ("f() { T $1; }\nf 7", ["64"]),
    ],
)
def test_arguments_that_are_not_known_are_not_guessed(script: Script, text: str, arguments: list[str]) -> None:
    with pytest.raises(InputError, match="stands for is not known here"):
        model_from_flags(words_of_script(script(text.replace("T ", f"{TORCHRUN} ")), arguments), source="run.sh")


@pytest.mark.parametrize(
    "folder",
    [
        '$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)',
        '$(cd -- "$(dirname -- "$0")" &> /dev/null && pwd -P)',
        "$(cd $(dirname $0); pwd)",
    ],
)
@pytest.mark.parametrize(
    "line",
    [
        "python x.py $(mup-megatron args {0}/m.yaml) --lr 1",
        'A=($(python -m mup_megatron args --recipe r {0}/m.yaml))\npython x.py "${{A[@]}}"',
    ],
)
def test_the_flags_of_a_model_file_in_a_script_are_those_of_the_file(
    script: Script, tmp_path: Path, folder: str, line: str
) -> None:
    model = ModelFile(num_layers=3, hidden_size=64, num_attention_heads=4, vocab_size=300, seq_length=16, swiglu=True)
    (tmp_path / "m.yaml").write_text(dump_yaml(model.model_dump(exclude_defaults=True)))
    path = script(f"root={folder}\n" + line.format("$root"))
    assert model_from_flags(words_of_launch([str(path)])[0], source="run.sh") == model


def test_a_model_file_that_is_not_known_yet_is_named(script: Script) -> None:
    with pytest.raises(InputError, match=r"in \$\(mup-megatron…\) \(line 1\)"):
        words_of_script(script("python x.py $(mup-megatron args $MODEL)"))


# ---- a command in a variable ---------------------------------------------------------------------------------------

SIZES = "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 8 --vocab-size 9"
PARTS = f'GPT_ARGS="{SIZES}"\nexport CMD="`pwd`/pretrain_gpt.py $GPT_ARGS --embed-layernorm"\n'


@pytest.mark.parametrize(
    "text",
    [
        PARTS + "srun --jobid $ID bash -c '$LAUNCHER $CMD' 2>&1 | tee log\n",
        PARTS + "srun bash -c 'exec \"$LAUNCHER\" $CMD'\n",
        PARTS + 'srun bash -lc "$LAUNCHER \\$CMD"\n',
        PARTS + "sbatch job.slurm\n",
        PARTS.replace("export CMD=", "export ALL=1\nexport CMD="),
        f"export GPT_ARGS='{SIZES}'\nsrun bash -c 'torchrun pretrain_gpt.py $GPT_ARGS --embed-layernorm'\n",
    ],
)
def test_a_command_in_a_variable_is_read_whole(script: Script, text: str) -> None:
    assert words_of_script(script(text))[-1] == "--embed-layernorm"


@pytest.mark.parametrize("more", ["--model-provider mamba", "--optimizer muon", "--freeze-LM", "--embed-layernorm"])
def test_variables_that_differ_in_more_than_sizes_are_two_commands(script: Script, more: str) -> None:
    apart = script(f'A="pretrain_gpt.py {SIZES}"\nB="pretrain_gpt.py {SIZES} {more}"\n')
    with pytest.raises(InputError, match=f"two commands .*{more.split()[0]}"):
        words_of_script(script(apart.read_text().replace("--seq", "--bf16 --seq", 1)))
    with pytest.raises(InputError, match=f"two commands .*{more.split()[0]}"):
        words_of_script(script(f"torchrun pretrain_gpt.py {SIZES}\ntorchrun pretrain_gpt.py {SIZES} {more}\n"))


def test_a_variable_within_one_that_is_not_known_is_no_command(script: Script) -> None:
    path = script(f'A="{SIZES}"\nif x; then CMD="pretrain_gpt.py $A --embed-layernorm"; fi\nsbatch job.slurm\n')
    with pytest.raises(InputError, match=r"CMD \(line 2\)"):
        words_of_script(path)
