"""Nothing changes without an entry, nor at the base; and an entry that had no effect does not stay unseen.

Nothing of the plug-in is imported at the top: the ranks import this module.
"""

import gc
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.ds_models import build, ds_config, recipe_for, train_engine, write
from support.ds_ranks import run_ranks

from mup_megatron.errors import InputError

STEPS = range(4)

# ---- nothing changes -----------------------------------------------------------------------------------------------


def _split(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Decay and no decay, as the plan has them."""
    weights = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    return [{"params": weights, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def _runs(recipe_path: str, zero: int) -> dict[str, list[float]]:
    import deepspeed

    assert "mup_megatron.deepspeed" not in sys.modules
    params = {"torch_adam": True, "lr": 0.003, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}
    given = {"gradient_clipping": 0.5, "optimizer": {"type": "AdamW", "params": params}}

    def train(entry: dict[str, Any], *, groups: bool) -> list[float]:
        model = build("gpt2")
        parameters = _split(model, 0.1) if groups else None
        config = ds_config(zero, world_size=2, **given) | entry
        engine, *_ = deepspeed.initialize(model=model, model_parameters=parameters, config=config)
        losses = train_engine(engine, "gpt2", STEPS)
        engine.destroy()
        return losses

    found = {"not imported": train({}, groups=True)}
    import mup_megatron.deepspeed  # noqa: F401

    found["imported"] = train({}, groups=True)
    found["at the base"] = train({"mup": {"recipe": recipe_path}}, groups=False)
    return found


@pytest.mark.parametrize("zero", [0, 1, 3])
def test_nothing_changes_without_an_entry_nor_at_the_base(zero: int, tmp_path: Path) -> None:
    ones = {"embedding_multiplier": 1.0, "output_multiplier": 1.0, "init_method_std": 0.02}
    recipe = recipe_for("gpt2", lr=0.003, adam_eps=1e-8, clip_grad=0.5, **ones)
    found = run_ranks(_runs, 2, write(recipe, tmp_path), zero)[0]
    assert len(set(found["not imported"])) == len(STEPS)
    assert found["imported"] == found["not imported"]
    assert found["at the base"] == found["not imported"]


def test_importing_it_does_not_import_deepspeed() -> None:
    code = "import sys, mup_megatron.deepspeed; sys.exit('deepspeed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---- an engine that the hooks did not reach ------------------------------------------------------------------------


def _import_too_late(recipe_path: str) -> list[str]:
    import deepspeed

    said = []

    assert "mup_megatron.deepspeed" not in sys.modules
    config = ds_config(optimizer={"type": "AdamW", "params": {"torch_adam": True}}, mup={"recipe": recipe_path})
    engine, *_ = deepspeed.initialize(model=build("gpt2"), config=config)
    for _ in range(2):  # a notebook's cell is run again
        try:
            import mup_megatron.deepspeed

            said.append("")
        except InputError as error:
            said.append(str(error))
    del engine
    gc.collect()
    import mup_megatron.deepspeed

    engine, *_ = deepspeed.initialize(model=build("gpt2"), config=config)
    method = type(engine).__init__
    said.append(str([hasattr(method, "__wrapped__"), hasattr(method.__wrapped__, "_self_wrapper")]))
    said.append(str(mup_megatron.deepspeed.plan_of(engine) is not None))
    return said


def test_an_entry_that_had_no_effect_is_found_by_a_late_import(tmp_path: Path) -> None:
    (said,) = run_ranks(_import_too_late, 1, write(recipe_for("gpt2"), tmp_path))
    assert "had no effect" in said[0]
    assert said[1] == said[0]
    assert said[2:] == ["[True, False]", "True"]


# ---- another release -----------------------------------------------------------------------------------------------


def _in_another_release(recipe_path: str) -> tuple[bool, str]:
    """Whether an engine without an entry is built, and what one with an entry says."""
    import accelerate.utils.dataclasses
    import deepspeed

    assert "mup_megatron.deepspeed" not in sys.modules
    del accelerate.utils.dataclasses.DeepSpeedPlugin.deepspeed_config_process
    import mup_megatron.deepspeed  # noqa: F401

    plain = deepspeed.initialize(model=build("gpt2"), config=ds_config())
    try:
        deepspeed.initialize(model=build("gpt2"), config=ds_config() | {"mup": {"recipe": recipe_path}})
    except InputError as error:
        return plain is not None, str(error)
    return plain is not None, ""


def test_a_missing_method_of_another_release_matters_to_an_entry_alone(tmp_path: Path) -> None:
    ((built, said),) = run_ranks(_in_another_release, 1, write(recipe_for("gpt2"), tmp_path))
    assert built
    assert "DeepSpeedPlugin.deepspeed_config_process" in said
    assert "accelerate" in said


# ---- a model that was trained with a recipe, saved and loaded ------------------------------------------------------


def _forgotten() -> list[str]:
    import deepspeed

    import mup_megatron.deepspeed  # noqa: F401

    model = build("gpt2")
    model.config.mup_megatron = {"fingerprint": "1234567890abcdef", "softmax_scale": None, "multipliers": {}}
    said, config = [], ds_config(optimizer={"type": "AdamW", "params": {"torch_adam": True}})
    try:
        deepspeed.initialize(model=model, config=config)
    except InputError as error:
        said.append(str(error))
    del config["optimizer"]
    deepspeed.initialize(model=model, config=config)  # it does not train
    return said


def test_a_saved_model_is_not_trained_without_its_recipe() -> None:
    (message,) = run_ranks(_forgotten, 1)[0]
    assert "trained with the recipe 1234567890ab" in message
    assert '"initialize": "keep"' in message
    assert len(message) <= 300
