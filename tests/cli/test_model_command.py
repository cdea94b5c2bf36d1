"""`model --from-args`: the model file that Megatron-LM's flags, or a launch script, describe."""

from pathlib import Path

import pytest
from support.commands import Command, contents

from mup_megatron.models.model_file import load_model_file

FLAGS = (
    "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 16 --max-position-embeddings 16 "
    "--vocab-size 300 --swiglu --attention-dropout 0 --hidden-dropout 0 --lr 1e-4 --bf16"
).split()
YAML = "num_layers: 2\nhidden_size: 64\nnum_attention_heads: 4\nvocab_size: 300\nseq_length: 16\nswiglu: true\n"


def test_flags_as_a_model_file_on_standard_output(run: Command, here: Path) -> None:
    assert run("model", "--from-args", "--", *FLAGS) == (0, YAML, "")


def test_a_launch_script_is_as_good(run: Command, here: Path) -> None:
    (here / "run.sh").write_text(f'ARGS="{" ".join(FLAGS)}"\ntorchrun pretrain_gpt.py $ARGS "$@"\n')
    assert run("model", "--from-args", "--", "run.sh") == (0, YAML, "")
    changed = run("model", "--from-args", "--", "run.sh", "--num-layers", "3").out
    assert changed == YAML.replace("num_layers: 2", "num_layers: 3")


def test_written_to_a_file_once(run: Command, here: Path) -> None:
    assert run("model", "--from-args", "-o", "m.yaml", "--", *FLAGS) == (0, "m.yaml\n", "")
    assert load_model_file(here / "m.yaml").swiglu
    before = contents(here)
    code, out, err = run("model", "--from-args", "-o", "m.yaml", "--", *FLAGS, "--num-layers", "3")
    assert (code, out) == (2, "")
    assert "m.yaml: exists already. Give --force" in err
    assert contents(here) == before
    assert run("model", "--from-args", "-o", "m.yaml", "--force", "--", *FLAGS, "--num-layers", "3").code == 0
    assert load_model_file(here / "m.yaml").num_layers == 3


def test_what_a_model_file_cannot_say_is_a_warning(run: Command, here: Path) -> None:
    code, out, err = run("model", "--from-args", "--", *FLAGS, "--window-size", "(128,0)")
    assert (code, out) == (0, YAML)
    assert err == "Warning: --window-size: a model file has no key for it. Give it to the proxy's runs as well.\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--from-args"], "give Megatron's flags, or a launch script"),
        (["--", *FLAGS], "give Megatron's flags, or a launch script"),
        (["--from-args", "--", *FLAGS[2:]], "flags: missing: --num-layers. Give it."),
        (["--from-args", "--", *FLAGS, "--num-experts", "8"], "flags: --num-experts: models with experts are not"),
        (["--from-args", "--", "none.sh"], "none.sh: cannot be read (No such file or directory)"),
    ],
)
def test_bad_input_writes_nothing(run: Command, here: Path, words: list[str], said: str) -> None:
    before = contents(here)
    code, out, err = run("model", *(["-o", "m.yaml"] if "--" in words else []), *words)
    assert (code, out) == (2, "")
    assert said in err
    assert contents(here) == before
