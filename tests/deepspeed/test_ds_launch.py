"""`python -m mup_megatron.launch --deepspeed SCRIPT`: a plain script trains by the recipe of its configuration, or
not."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.ds_models import ds_config, recipe_for, write
from support.processes import HANGS_AFTER_S

SCRIPT = """
import json, os, sys
import deepspeed, torch
from support.ds_models import build, train_engine
deepspeed.init_distributed("gloo")
assert "mup_megatron.deepspeed" in sys.modules
config = json.load(open(sys.argv[-1]))
how = config.pop("how", None)
if how == "evaluation":
    del config["optimizer"]
    model = build("gpt2", 4)
    deepspeed.initialize(model=model, config=config)
elif how == "by hand":
    from pathlib import Path
    from mup_megatron.deepspeed import param_groups, plan_for
    from mup_megatron.modules import apply_plan
    from mup_megatron.recipe import load_recipe
    model = build("gpt2", 4)
    plan = plan_for(model, load_recipe(Path(config.pop("by"))))
    apply_plan(model, plan)
    del config["optimizer"]
    config["zero_allow_untested_optimizer"] = True
    optimizer = torch.optim.AdamW(param_groups(model, plan))
    deepspeed.initialize(model=model, optimizer=optimizer, config=config)
elif config:
    engine, *_ = deepspeed.initialize(model=build("gpt2", 4), config=config)
    print("lrs", sorted({group["lr"] for group in engine.optimizer.param_groups}), sys.argv[1:-1])
    train_engine(engine, "gpt2", range(1))
torch.distributed.destroy_process_group()
"""


def launch(folder: Path, config: object, *before: str) -> subprocess.CompletedProcess[str]:
    (folder / "train.py").write_text(SCRIPT)
    (folder / "ds.json").write_text(json.dumps(config))
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "mup_megatron.launch", *before, "--deepspeed", "train.py", "ds.json"]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=HANGS_AFTER_S
    )


def test_the_entry_alone_is_enough_also_behind_the_launchers_own_word(tmp_path: Path) -> None:
    recipe = write(recipe_for("gpt2"), tmp_path)
    done = launch(tmp_path, ds_config() | {"mup": {"recipe": recipe}}, "--local_rank=0")
    assert done.returncode == 0, done.stderr
    assert "lrs [0.001, 0.004] ['--local_rank=0']" in done.stdout


@pytest.mark.slow
def test_a_script_that_only_evaluates_by_a_recipe_has_used_it(tmp_path: Path) -> None:
    done = launch(tmp_path, ds_config() | {"mup": {"recipe": write(recipe_for("gpt2"), tmp_path)}, "how": "evaluation"})
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_script_that_applies_the_plan_itself_has_used_it(tmp_path: Path) -> None:
    done = launch(tmp_path, ds_config() | {"by": write(recipe_for("gpt2"), tmp_path), "how": "by hand"})
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("config", "message"),
    [
        pytest.param(
            ds_config() | {"optimizer": {"type": "AdamW", "params": {"torch_adam": True}}},
            '"mup": missing in the config',
            id="no entry",
        ),
        pytest.param({}, 'the script built no engine with a "mup" entry', id="no engine", marks=pytest.mark.slow),
    ],
)
def test_a_script_that_would_train_without_a_recipe_is_stopped(
    tmp_path: Path, config: dict[str, object], message: str
) -> None:
    done = launch(tmp_path, config)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


PLAIN = """
import json, sys
import deepspeed, torch
import mup_megatron.deepspeed
from support.ds_models import build
deepspeed.init_distributed("gloo")
deepspeed.initialize(model=build("gpt2", 4), config=json.load(open("ds.json")))
"""


def test_without_the_launcher_one_rank_says_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(PLAIN)
    content = ds_config(world_size=2) | {"mup": {"recipe": "none.recipe.yaml"}}
    (tmp_path / "ds.json").write_text(json.dumps(content))
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
    }
    logs = tmp_path / "logs"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--redirects=3"]
    done = subprocess.run(
        [sys.executable, *torchrun, f"--log-dir={logs}", "train.py"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=HANGS_AFTER_S,
    )
    said = [path.read_text() for path in sorted(logs.rglob("stderr.log"))]
    assert len(said) == 2, done.stderr
    assert "Traceback" not in "".join(said), said
    assert len(re.findall("^mup-megatron: none.recipe.yaml: ", "".join(said), re.MULTILINE)) == 1, said
    assert re.search(r"exitcode\s*: 2 ", done.stderr), done.stderr
