"""`model --from-args`: the model file that Megatron-LM's flags, or a launch script, describe."""

import json
from pathlib import Path

import pytest
from support.commands import Command, contents
from support.lm_arguments import parser_of_megatron

from mup_megatron.architectures.registry import load_model_file
from mup_megatron.cli.model import command

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


def test_flags_need_no_dashes_before_them(run: Command, here: Path) -> None:
    """An error message advises to add a flag after the script: so it works there, with or without `--`."""
    assert run("model", "--from-args", *FLAGS) == (0, YAML, "")
    (here / "run.sh").write_text(f"python pretrain_gpt.py {' '.join(FLAGS)} --vocab-size $V\n")
    assert "or add --vocab-size with its value after the script" in run("model", "--from-args", "run.sh").err
    assert run("model", "--from-args", "run.sh", "--vocab-size", "300") == (0, YAML, "")
    assert run("model", "--from-args", "run.sh", "--", "--vocab-size=300") == (0, YAML, "")


@pytest.mark.parametrize("own", [["-o", "m.yaml"], ["-om.yaml"], ["--output", "m.yaml"], ["--output=m.yaml"]])
def test_options_of_our_own_stand_before_between_or_after_flags(run: Command, here: Path, own: list[str]) -> None:
    for words in ([*own, "--from-args", *FLAGS], ["--from-args", *FLAGS[:4], *own, *FLAGS[4:]],
                  [*FLAGS, "--from-args", *own]):  # fmt: skip
        assert run("model", *words, "--force") == (0, "m.yaml\n", "")
        assert (here / "m.yaml").read_text() == YAML
        (here / "m.yaml").write_text("")


def test_no_flag_of_megatrons_is_taken_for_a_misspelt_option() -> None:
    for action in parser_of_megatron()._actions:
        # --vocab-size is an option as well, which the flag becomes where there is no --.
        for name in set(action.option_strings) - {"-h", "--help", "--vocab-size"}:
            assert command.make_context("model", ["--from-args", name]).params["flags"] == (name,)


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
        (
            ["--from-args", "--", *FLAGS, "--num-experts", "1"],
            "flags: --moe-router-topk 2 is more than --num-experts 1.",
        ),
        (["--from-args", *FLAGS, "--forse"], "No such option '--forse'. Did you mean '--force'?"),
        (["--from-args", "--outptu=m.yaml", *FLAGS], "No such option '--outptu'. Did you mean '--output'?"),
        (["--from-arg", *FLAGS], "No such option '--from-arg'. Did you mean '--from-args'?"),
        (["--from-args", "-O", "m.yaml", *FLAGS], "No such option '-O'."),
        (["--from-args", "--", "none.sh"], "none.sh: no such file. Check the path."),
    ],
)
def test_bad_input_writes_nothing(run: Command, here: Path, words: list[str], said: str) -> None:
    before = contents(here)
    code, out, err = run("model", *(["-o", "m.yaml"] if "--" in words else []), *words)
    assert (code, out) == (2, "")
    assert said in err
    assert contents(here) == before


WITHOUT_SIZE = [word for word in FLAGS if word not in ("--vocab-size", "300")]


def test_the_vocabulary_is_answered_before_the_dashes_or_read_from_a_file(run: Command, here: Path) -> None:
    code, out, err = run("model", "--from-args", "--", *WITHOUT_SIZE)
    assert (code, out) == (2, "")
    assert "missing: --vocab-size. Give it. --vocab-size N, also before the --" in err
    assert run("model", "--from-args", "--vocab-size", "300", "--", *WITHOUT_SIZE) == (0, YAML, "")
    entries = {f"w{index}": index for index in range(299)}
    (here / "vocab.json").write_text(json.dumps(entries))
    assert run("model", "--from-args", "--", *WITHOUT_SIZE, "--vocab-file", "vocab.json") == (0, YAML, "")


def test_without_dashes_the_vocabulary_is_the_lines(run: Command, here: Path) -> None:
    """TikTokenizer takes the line's, so it must not be taken for an answer about a tokenizer that says another."""
    assert run("model", "--from-args", "--tokenizer-type", "TikTokenizer", *FLAGS) == (0, YAML, "")


@pytest.mark.parametrize("size", ["0", "-1", "x", "1e99"])
def test_an_answer_that_is_no_number_of_entries(run: Command, here: Path, size: str) -> None:
    code, out, err = run("model", "--from-args", f"--vocab-size={size}", "--", *WITHOUT_SIZE)
    assert (code, out) == (2, "")
    assert "--vocab-size" in err


def test_another_programs_line_is_refused(run: Command, here: Path) -> None:
    code, out, err = run("model", "--from-args", "--", "torchrun", "pretrain_vlm.py", *FLAGS)
    assert (code, out) == (2, "")
    assert "pretrain_vlm.py: multimodal models are not supported yet" in err
