"""What Megatron-LM's own loop saves with the plug-in on: exported from every layout, folded for it, and unfolded."""

import argparse
import functools
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzz_mutators import RunsCode
from safetensors.torch import load_file
from support.lm_checkpoints import kind, train
from support.processes import RankFailure, run_ranks
from support.training_runs import Finished, assert_refused, command_line
from torch.nn import functional

from mup_megatron.recipe import save_recipe

pytest.importorskip("megatron.training", reason="megatron-core 0.16 has no megatron.training in its wheel")

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "llama": (
        4,
        {
            "tensor_model_parallel_size": 2,
            "pipeline_model_parallel_size": 2,
            "num_layers_per_virtual_pipeline_stage": 1,
        },
    ),
    "mixtral": (
        2,
        {
            "tensor_model_parallel_size": 2,
            "sequence_parallel": True,
            "expert_model_parallel_size": 2,
            "expert_tensor_parallel_size": 1,
        },
    ),
    "gpt2": (2, {"pipeline_model_parallel_size": 2}),
}
"""Kinds of models, and the ranks and layout that each is saved in besides one process. The last one's head is tied."""
FP32 = 1e-5
"""Absolute, of a loss of about 6 in single precision."""


@dataclass(frozen=True)
class Made:
    """A run, `one` of one process in torch_dist, and `ranks/torch`, the same of many; and what became of them."""

    folder: Path
    name: str
    losses: dict[int, float]
    """Of four iterations; the checkpoints are of the second."""
    said: dict[str, Finished]

    def require(self, *steps: str) -> None:
        for step in steps:
            assert self.said[step].code == 0, self.said[step]


def _made(folder: Path, name: str) -> Made:
    ranks, layout = LAYOUTS[name]
    recipe, model = kind(name)
    form: dict[str, Any] = {"ckpt_format": "torch_dist", "recipe": recipe}
    whole = train(folder, "one", model, save=folder / "one", save_interval=2, train_iters=4, **form)
    (folder / "one" / "latest_checkpointed_iteration.txt").write_text("2")
    to = {"load": folder / "one", "ckpt_convert_format": "torch", "ckpt_convert_save": folder / "ranks"}
    train(folder, "ranks", model, ranks=ranks, no_load_optim=True, no_load_rng=True, **form, **to, **layout)
    return Made(folder, name, whole.losses, run_ranks(_commands, 1, folder)[0])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """Makes each kind when it is first asked for."""
    return functools.cache(lambda name: _made(tmp_path_factory.mktemp(name), name))


KINDS_HERE = ("llama", "mixtral", pytest.param("gpt2", marks=pytest.mark.slow))


def _commands(folder: Path) -> dict[str, Finished]:
    """What the commands say, in this rank."""
    os.chdir(folder)
    recipe = ["--recipe", "recipe.yaml"]
    return {
        "export one": command_line("export", "one", *recipe, "--to", "hf-one"),
        "export ranks": command_line("export", "ranks/torch", *recipe, "--to", "hf-ranks"),
        "check": command_line("check", "--exported", "hf-one", "--against", "ranks/torch", *recipe),
        "fold one": command_line("fold", "one", *recipe, "--to", "folded-one"),
        "fold ranks": command_line("fold", "ranks/torch", *recipe, "--to", "folded-ranks"),
        "unfold one": command_line("unfold", "folded-one", *recipe, "--to", "unfolded-one"),
        "unfold ranks": command_line("unfold", "folded-ranks", *recipe, "--to", "unfolded-ranks"),
        "export folded": command_line("export", "folded-ranks", *recipe, "--to", "no"),
        "export folded one": command_line("export", "folded-one", *recipe, "--to", "no"),
        "export unfolded": command_line("export", "unfolded-ranks", *recipe, "--to", "hf-unfolded"),
        "not folded": command_line("unfold", "one", *recipe, "--to", "no"),
    }


@pytest.mark.parametrize("name", KINDS_HERE)
def test_the_layout_and_the_format_of_the_run_change_no_byte(runs: Callable[[str], Made], name: str) -> None:
    made = runs(name)
    made.require("export one", "export ranks", "check")
    one, ranks = made.folder / "hf-one", made.folder / "hf-ranks"
    assert (one / "model.safetensors").read_bytes() == (ranks / "model.safetensors").read_bytes()
    assert (one / "config.json").read_bytes() == (ranks / "config.json").read_bytes()
    assert '"vocab_size": 512' in (one / "config.json").read_text()
    assert len(list((made.folder / "ranks/torch/iter_0000002").glob("mp_rank_*"))) > 1


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("llama", "one"),
        *(pytest.param(name, "ranks", marks=pytest.mark.slow) for name in ("llama", "mixtral", "gpt2")),
        pytest.param("mixtral", "one", marks=pytest.mark.slow),
    ],
)
def test_stock_megatron_lm_computes_a_folded_checkpoint_as_it_was_trained(
    runs: Callable[[str], Made], name: str, form: str
) -> None:
    """The next loss, of Megatron-LM without the plug-in."""
    made = runs(name)
    made.require(f"fold {form}")
    _, model = kind(name)
    ranks, layout = LAYOUTS[name]
    here: dict[str, Any] = {"ckpt_format": "torch_dist"} if form == "one" else {"ckpt_format": "torch", **layout}
    stock = train(
        made.folder, f"stock-{form}", model, ranks=1 if form == "one" else ranks,
        load=made.folder / f"folded-{form}", train_iters=3, no_load_optim=True, no_load_rng=True, **here,
    )  # fmt: skip
    assert stock.losses == pytest.approx({3: made.losses[3]}, abs=FP32)


@pytest.mark.parametrize("name", ["llama", pytest.param("mixtral", marks=pytest.mark.slow)])
def test_what_is_unfolded_goes_on_as_if_it_had_not_been_folded(runs: Callable[[str], Made], name: str) -> None:
    made = runs(name)
    made.require("fold one", "unfold one")
    assert "the optimizer's state goes along" in made.said["fold one"].stdout
    recipe, model = kind(made.name)
    load = {"load": made.folder / "unfolded-one", "ckpt_format": "torch_dist"}
    rest = train(made.folder, "rest", model, recipe=recipe, train_iters=4, **load)
    assert rest.losses == pytest.approx({step: made.losses[step] for step in (3, 4)}, abs=FP32)


@pytest.mark.parametrize("name", KINDS_HERE)
def test_files_of_ranks_come_back_to_rounding_without_the_optimizers_state(
    runs: Callable[[str], Made], name: str
) -> None:
    made = runs(name)
    made.require("fold ranks", "unfold ranks", "export unfolded")
    assert (
        "without the optimizer's state, which the format torch does not keep by name" in made.said["fold ranks"].stdout
    )
    one, back = (load_file(made.folder / each / "model.safetensors") for each in ("hf-one", "hf-unfolded"))
    assert one.keys() == back.keys()
    for key, tensor in one.items():
        torch.testing.assert_close(back[key], tensor, rtol=1e-6, atol=1e-7)
    contents = [torch.load(path, weights_only=False) for path in (made.folder / "unfolded-ranks").rglob("*.pt")]
    assert contents
    assert not any("optimizer" in content or hasattr(content["args"], "mup_folded") for content in contents)
    assert (made.folder / "unfolded-ranks" / "mup.recipe.yaml").is_file()
    assert not (made.folder / "folded-ranks" / "mup.recipe.yaml").exists()


@pytest.mark.slow
def test_a_folded_checkpoint_is_not_trained_on(runs: Callable[[str], Made]) -> None:
    made = runs("llama")
    recipe, model = kind(made.name)
    load = {"load": made.folder / "folded-one", "ckpt_format": "torch_dist", "mup_accept_recipe_change": True}
    with pytest.raises(RankFailure, match=r"--load: the checkpoint's multipliers are folded .*`mup-megatron unfold`"):
        train(made.folder, "no", model, recipe=recipe, train_iters=4, **load)


def test_what_is_folded_and_what_is_not_are_told_apart(runs: Callable[[str], Made]) -> None:
    said = runs("llama").said
    for what in ("export folded", "export folded one"):
        assert said[what].code == 2
        assert "its multipliers are folded into its weights" in said[what].stderr
    assert (said["not folded"].code, said["not folded"].stderr) == (
        2,
        "mup-megatron: one: is not folded. Go on with it as it is.\n",
    )


# ---- GELU ------------------------------------------------------------------------------------------------------------


def _fused_gelu() -> tuple[float, float]:
    """How far Megatron's fused GELU is from the approximation with tanh, and from the exact one, in this rank."""
    from megatron.core.fusions.fused_bias_gelu import bias_gelu_impl

    given, bias = torch.linspace(-4, 4, 101, dtype=torch.float64), torch.full((101,), 0.1, dtype=torch.float64)
    found = bias_gelu_impl(given, bias)
    wanted = (functional.gelu(given + bias, approximate=way) for way in ("tanh", "none"))
    tanh, exact = (float((found - each).abs().max()) for each in wanted)
    return tanh, exact


def test_megatrons_fused_gelu_is_the_approximation_with_tanh() -> None:
    tanh, exact = run_ranks(_fused_gelu, 1)[0]
    assert tanh < 1e-8
    assert exact > 1e-4


def _gelus() -> list[bool]:
    from mup_megatron.export.megatron_lm import tanh_gelu

    fused = {"bias_gelu_fusion": True, "add_bias_linear": True, "swiglu": False}
    return [
        tanh_gelu(fused),
        tanh_gelu({**fused, "bias_gelu_fusion": False}),
        tanh_gelu({**fused, "add_bias_linear": False}),
        tanh_gelu({**fused, "swiglu": True}),
        tanh_gelu({**fused, "bias_gelu_fusion": False, "use_te_activation_func": True}),
    ]


def test_the_arguments_say_which_gelu_it_was() -> None:
    assert run_ranks(_gelus, 1)[0] == [True, False, False, False, True]


def _vocabularies() -> list[int]:
    from mup_megatron.export.megatron_lm import vocabulary

    values = {"make_vocab_size_divisible_by": 128, "tensor_model_parallel_size": 2, "vocab_size": None}
    return [
        vocabulary(values, 500, padded=512),
        vocabulary(values, 200, padded=512),
        vocabulary({**values, "vocab_size": 499}, 500, padded=512),
        vocabulary({**values, "vocab_size": 501}, 500, padded=512),
    ]


def test_no_token_that_the_run_is_said_to_have_is_taken_for_padding() -> None:
    assert run_ranks(_vocabularies, 1)[0] == [500, 512, 500, 512]


# ---- what is refused -------------------------------------------------------------------------------------------------


def _refused(folder: Path, to: Path, other: Path) -> dict[str, Finished]:
    """What is said, in this rank, of checkpoints that are damaged, of others, and of what no model file says."""

    def told(
        name: str, form: str, change: Any, *, recipe: Path = folder / "recipe.yaml", way: str = "export"
    ) -> Finished:
        copy = to / name
        shutil.copytree(folder / form, copy)
        change(copy / "iter_0000002")
        return command_line(way, str(copy), "--recipe", str(recipe), "--to", str(to / f"{name} out"))

    def changed(**values: Any) -> Any:
        def change(inside: Path) -> None:
            for path in inside.glob("mp_rank_*/model_optim_rng.pt"):
                content = torch.load(path, weights_only=False)
                for key, value in values.items():
                    setattr(content["args"], key, value)
                torch.save(content, path)

        return change

    def plain(inside: Path) -> None:
        for path in inside.glob("mp_rank_*/model_optim_rng.pt"):
            content = torch.load(path, weights_only=False)
            content["args"] = argparse.Namespace(**{k: v for k, v in vars(content["args"]).items() if "mup_" not in k})
            torch.save(content, path)

    def cut(inside: Path) -> None:
        path = inside / "mp_rank_01_001" / "model_optim_rng.pt"
        path.write_bytes(path.read_bytes()[:-1000])

    def of_another_iteration(inside: Path) -> None:
        path = inside / "mp_rank_01_001" / "model_optim_rng.pt"
        torch.save({**torch.load(path, weights_only=False), "iteration": 1}, path)

    def folded(inside: Path) -> None:
        name = "mp_rank_01_001"
        shutil.copytree(folder / "folded-ranks" / inside.name / name, inside / name, dirs_exist_ok=True)

    ranks = "ranks/torch"
    return {
        "a rank of another iteration": told("iteration", ranks, of_another_iteration),
        "a rank that is folded": told("folded", ranks, folded),
        "a norm behind the queries": told("l2", ranks, changed(qk_l2_norm=True), way="fold"),
        "another recipe": told("other", ranks, lambda _: None, recipe=other),
        "no recipe": told("plain", ranks, plain),
        "a rank that is missing": told("missing", ranks, lambda inside: shutil.rmtree(inside / "mp_rank_01_001")),
        "a rank that is cut": told("cut", ranks, cut),
        "code as a rank": told(
            "code", ranks, lambda it: torch.save(RunsCode(), it / "mp_rank_00_000" / "model_optim_rng.pt")
        ),
        "code as another rank": told(
            "code later", ranks, lambda it: torch.save({"model": RunsCode()}, it / "mp_rank_01_000/model_optim_rng.pt")
        ),
        "code as metadata": told(
            "metadata", "one", lambda inside: (inside / ".metadata").write_bytes(pickle.dumps(RunsCode()))
        ),
        "another format": told("dcp", "one", lambda inside: (inside / "metadata.json").unlink()),
        "a flag": told("flag", ranks, changed(rotary_interleaved=True)),
    }


@pytest.fixture(scope="module")
def refused(runs: Callable[[str], Made], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Finished]]:
    to = tmp_path_factory.mktemp("refused")
    save_recipe(kind("gpt2")[0], to / "other.yaml")
    return to, run_ranks(_refused, 1, runs("llama").folder, to, to / "other.yaml")[0]


@pytest.mark.parametrize(
    ("what", "words"),
    {
        "another recipe": ["other.yaml: its fingerprint is", "trained with another recipe", "mup.recipe.yaml"],
        "no recipe": ["iter_0000002: trained without a recipe"],
        "a rank of another iteration": [
            "mp_rank_01_001/model_optim_rng.pt: of another iteration or run than mp_rank_00"
        ],
        "a rank that is folded": ["mp_rank_01_001/model_optim_rng.pt: of another iteration or run than mp_rank_00"],
        "a norm behind the queries": ["--qk-l2-norm gives queries one length", "cannot be folded"],
        "a rank that is missing": ["is of 2 tensor-parallel ranks, and that of rank 1 is missing"],
        "a rank that is cut": ["mp_rank_01_001/model_optim_rng.pt: damaged"],
        "code as a rank": ["mp_rank_00_000/model_optim_rng.pt: holds", "mkdir"],
        "code as another rank": ["mp_rank_01_000/model_optim_rng.pt: holds", "mkdir"],
        "code as metadata": [".metadata: holds", "mkdir"],
        "another format": ["not in the format torch or torch_dist"],
        "a flag": ["trained with --rotary-interleaved, which the exported model would compute without"],
    }.items(),
)
def test_what_cannot_be_exported_is_refused_and_leaves_nothing(
    refused: tuple[Path, dict[str, Finished]], what: str, words: list[str]
) -> None:
    folder, said = refused
    assert_refused(said[what], words, folder)
    assert [path for path in folder.iterdir() if path.name.endswith("out")] == []
