"""The plug-in stands beside the fork's own `megatron` package: it imports and replaces nothing in it."""

import subprocess
import sys
from pathlib import Path

from support.processes import HANGS_AFTER_S

from mup_megatron.megatron.pretrain import hooks

ROOT = Path(__file__).parents[2]

PROGRAM = """
import sys, types

def of_megatron():
    return [module for name, module in sorted(sys.modules.items()) if name.split(".")[0] == "megatron"]

sys.modules["deepspeed"] = None
import mup_megatron.megatron_deepspeed
print([module.__name__ for module in of_megatron()])
import mup_megatron.megatron_deepspeed.model
print([module.__name__ for module in of_megatron()])
import megatron.training, megatron.arguments, megatron.initialize, megatron.checkpointing
print({type(f) for module in of_megatron() for f in vars(module).values() if callable(f)} == {types.FunctionType})
"""


def test_nothing_of_the_forks_own_megatron_is_replaced_and_nothing_of_it_needed(tmp_path: Path) -> None:
    # Its modules lie elsewhere than Megatron-LM's, and have functions of the same names.
    names = sorted({name for functions in hooks._PLACES.values() for name in functions})
    functions = "".join(f"def {name}(*args): return '{name}'\n" for name in names)
    for module in ("training", "arguments", "initialize", "checkpointing"):
        path = tmp_path / "megatron" / f"{module}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(functions)
    (tmp_path / "megatron" / "__init__.py").write_text("")
    # With a flag of ours on the line, by which the plug-in for Megatron-LM, which this one imports parts of, wakes up.
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "--mup-recipe", "R.yaml"], cwd=tmp_path,
        env={"PYTHONPATH": f"{tmp_path}:{ROOT}"}, capture_output=True, text=True, check=False, timeout=HANGS_AFTER_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    at_import, with_a_model, untouched = done.stdout.splitlines()
    assert at_import == with_a_model == "[]"
    assert untouched == "True"
