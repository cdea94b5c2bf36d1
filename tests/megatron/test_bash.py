"""Bash as it is, where the grammar that parses it has another opinion, or none."""

import subprocess
from pathlib import Path

import pytest

from mup_megatron.errors import InputError
from mup_megatron.megatron.arguments import bash
from mup_megatron.megatron.arguments.bash import UnreadableError, parsed
from mup_megatron.megatron.arguments.launch_script import words_of_script

SCRIPTS = [
    "D=/d\nS=7b\nT $D/x_$S/y.$S.bin --save=$D/$S",
    "if false; then A=1 B=2\nelif true; then A=3\nfi\nT --save x",
    "A=1 B=2 # both\nC=3\nT $A $B $C",
    "D=d\nA=$D/x_$D.b B='c d'\nT $A \"$B\"",
    "T > log --save x 2>&1 --load y",
    "T --save x\\\n 2>&1 | cat",
    'A="  x  "\nT "$A  $A " \'  \'""',
    'A=a\\\nb\nT $A c\\\nd "e\\\nf"',
    "T --save x \\ \n",
    'A=x\\ y\nT \\ $A a\\ b "$A"\\ c',
    "cat <<A <<'B C' > /dev/null; X=1\nX=2 '\nA\nX=3\nB C\nT $X",
    "cat <<E | cat > /dev/null\nX='\nE\nX=4\nT $X",
    'echo "a <<E" > /dev/null # <<E\nX=5\nT $X',
    'A=abc\nB=2\n: "${A:$B+1}" $((10#$B + 1))\nT $A',
    "V=v\nT ${U:-a b}c ${U:-$V/x.$V}",
    'A=(1 # one (\n  \'2 3\' "4"5)\nT "${A[@]}" ${A[@]} x',
    "é=1 2>/dev/null\nT --save éé",
    "f() { A=2; }; function g { A=3; }\nA=1\nT $A",
    "A=1 true\nA=2 > /dev/null\nT $A",
    "T --save x \\",
    # Redirections behind assignments alone.
    "A=1 >/dev/null\nB=2 2>&1 </dev/null # c\n\nfor i in 1; do :; done\nT $A $B",
    "A=1 >/dev/null; B=2 <<<x && T $A $B",
    "if :; then >/dev/null A=1 B=2 2>&1; fi\nA=3 >/dev/null | cat\nA=4 cat </dev/null\nT --save x",
    # No here-documents.
    'echo "usage: run <<E"\nT --save x\necho E\nE() { :; }\n: "\nE\n"',
    "S='cat <<X'\nA=1\n: '\nX\n'\nT $A",
    "A=1\n: $((1 << 4)) \"$((1<<4))\"\n((B = 1 << 4))\nA=2\n: '\n4\n'\nT $A",
    "A=1\n: $'\\'<<E'\nA=2\n: '\nE\n'\nT $A",
    "cat <<<E\nA=1\n: <<<'\nE\n'\nT $A",
    "A=1 # it's <<E\nA=2\n: '\nE\n'\nT $A",
    # Here-documents.
    "A=1\ncat <<-E\n\tA=2\n E\n\tE\ncat <<\\E <<E'F'\nA=3\nE\n'\nEF\nT $A",
    'A=1\nB="$(cat <<"E F"\nA=2 "\nE F\n)"\n(cat <<E)\nA=3 (\nE\nT $A',
    "A=1\ncat <<E \\\n  2>&1\nA=2 '\nE\nT $A",
    # Defaults that are assigned outside of commands.
    '[ -z "${A:=64}" ]; [[ -n ${B:=1} ]]; (( ${C:=2} > 3 ))\nT ${A:-5} ${B:-5} ${C:-5}',
    'A=1\nB=\n[ "${A:=2}${B:=3}" -gt 3 ] || exit 1\nT $A $B',
    "B=$(echo ${A:=3}) C='${A:=4}'\nT ${A:-5}",
    # What is timed.
    "X=64\ntime X=128\ntime -p Y=1\nT $X $Y",
    "X=64\ntime { X=128; Y=1; }\ntime T $X $Y \\\n time -p",
]


@pytest.mark.parametrize("text", SCRIPTS)
def test_words_are_those_of_bash(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.sh"
    path.write_text(text.replace("T ", "torchrun x.py --num-layers 2 "), encoding="utf-8")
    shown = f"exec 3>&1 1>/dev/null\ntorchrun() {{ printf '%s\\0' \"$@\" >&3; }}\n{path.read_text(encoding='utf-8')}"
    of_bash = subprocess.run(["bash", "-c", shown], cwd=tmp_path, capture_output=True, check=True)
    assert words_of_script(path) == of_bash.stdout.decode().split("\0")[1:-1]


@pytest.mark.parametrize(
    "text",
    [
        "for i in ${A:=1}; do :; done",
        "case ${A:=1} in *) ;; esac",
        "case $((A = 1)) in *) ;; esac",
        "if [ ${A:=1} ]; then :; fi",
        "[[ -z $B || -n ${A:=1} ]]",
        "[ $((${A:=1})) ]",
        ": ${B:+${A:=1}} ${A[0]:=2}",
        ": > ${A:=/dev/null}",
        "{ :; } > ${A:=/dev/null}",
        "cat <<<${A:=4}",
        "cat <<E\n${A:=1}\nE",
        "cat <<E\n$((A = 1))\nE",
        ": && time A=1",
        ": && time { A=1; }",
        "command -p export A=1",
        "B[0]=1 A=2",
    ],
)
def test_what_may_set_a_variable_makes_it_unknown(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.sh"
    path.write_text(f"{text}\ntorchrun x.py --num-layers 2 --save ${{A:-5}}")
    assert words_of_script(path) == ["--num-layers", "2", "--save", "${A:-5}"]


def test_an_expansion_in_a_here_document_in_quotes_sets_nothing(tmp_path: Path) -> None:
    path = tmp_path / "run.sh"
    path.write_text("cat <<'E'\n${A:=1}\nE\ntorchrun x.py --num-layers 2 --save ${A:-5}")
    assert words_of_script(path)[-1] == "5"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("A=1\nif true; then\nT\n", 4),
        ("A=1\n\nT ${A --save x\n", 3),
        ("A=1\nT )\n", 2),
        ('A=1\n\n\nB="x\nT\n', 5),  # as bash says it
        ("A=1\ncat <<E\nT", 2),
    ],
)
def test_a_script_that_bash_does_not_understand_is_refused_by_its_line(tmp_path: Path, text: str, line: int) -> None:
    path = tmp_path / "run.sh"
    path.write_text(text.replace("T", "torchrun x.py --num-layers 2"))
    with pytest.raises(InputError, match=rf"run\.sh: line {line} is no bash that can be read"):
        words_of_script(path)


@pytest.mark.parametrize("text", ["a" * 200_001, "a|" * 3_001, "{ " * 3_001, "<<a\n" * 1_501], ids=range(4))
def test_what_would_take_the_parser_minutes_is_refused_before_it(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("without_heredocs", "_tree"):
        monkeypatch.setattr(bash, name, lambda _: pytest.fail("it is read"))
    with pytest.raises(UnreadableError):
        parsed(text)


@pytest.mark.parametrize("text", ["f() " * 1_450, "a|" * 2_900, "".join(f"<<a{i}\n" for i in range(500))], ids=range(3))
def test_what_is_just_short_enough_is_refused_for_what_it_is(text: str) -> None:
    with pytest.raises(UnreadableError):
        parsed(text)


def test_deep_nesting_is_read_or_refused() -> None:
    for text in ("A=" + "$(a " * 2_000 + ")" * 2_000, "{ " * 2_000 + "A=1;" + " };" * 2_000):
        with pytest.raises(UnreadableError):
            parsed(text)
    commands, _ = parsed("{ " * 20 + "A=1;" + " };" * 20)
    assert [command.words[0].text for command in commands] == ["A=1"]


def test_commands_know_where_they_stand() -> None:
    commands, functions = parsed("A=1\nf() {\n  B=2 && C=3\n}\nfor i in 1; do\n  D=4 &\ndone\nE=5 | F=6\n! G=7\n")
    assert functions == {"f"}
    assert [(c.words[0].text, c.line, c.conditional, bool(c.function), len(c.loops)) for c in commands] == [
        ("A=1", 1, False, False, 0),
        ("B=2", 3, False, True, 0),
        ("C=3", 3, True, True, 0),
        ("i=$", 5, True, False, 1),
        ("D=4", 6, True, False, 1),
        ("E=5", 8, True, False, 0),
        ("F=6", 8, True, False, 0),
        ("G=7", 9, False, False, 0),
    ]


def test_a_path_that_is_to_be_filled_in_leaves_its_variable_unset(tmp_path: Path) -> None:
    path = tmp_path / "run.sh"
    path.write_text("A=<path to the data>\nB=$A/<name>_text # here\ntorchrun x.py --num-layers 2 --save $A --load $B\n")
    assert words_of_script(path) == ["--num-layers", "2", "--save", "$A", "--load", "$B"]
