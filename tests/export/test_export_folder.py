"""The folder that an export makes: whole or not there, in shards, with a tokenizer; and what is refused."""

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.exported import (
    KINDS,
    Kind,
    Trained,
    Weights,
    deviation,
    drawn,
    loaded,
    models,
    recipe_of,
    tokens,
    trained,
)
from support.shapes import gpt

from mup_megatron.errors import InputError
from mup_megatron.export import shards
from mup_megatron.export.architectures.llama import LLAMA
from mup_megatron.export.architectures.registry import choose, targets
from mup_megatron.export.export import export
from mup_megatron.export.tokenizers import read_tokenizer
from mup_megatron.export.weights import Source
from mup_megatron.recipe import PerParameter

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model() -> Trained:
    return trained(KINDS["llama"])


# ---- files ---------------------------------------------------------------------------------------------------------


def test_shards_are_no_larger_than_asked_and_the_index_finds_each_tensor(model: Trained, tmp_path: Path) -> None:
    exported = export(model.source(), tmp_path / "out", largest=200_000)
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert files == sorted(exported.files)
    assert len(files) > 2
    index = json.loads((tmp_path / "out" / shards.INDEX).read_text())
    assert index["metadata"]["total_size"] == exported.size
    assert set(index["weight_map"].values()) == set(files)
    for file in files:
        alone = list(index["weight_map"].values()).count(file) == 1
        assert alone or (tmp_path / "out" / file).stat().st_size < 200_000 + 4096
    assert deviation(model, loaded(tmp_path / "out")) < 1e-5


def test_each_tensor_is_read_once(model: Trained, tmp_path: Path) -> None:
    source = model.source()
    export(source, tmp_path / "out", architecture="llama")
    assert isinstance(source.weights, Weights)
    asked = source.weights.asked
    gated = [name for name in asked if "linear_fc1" in name or "linear_qkv.weight" in name]
    assert len(asked) == len(set(asked)) == len(model.plan.entries)
    assert gated


def test_an_export_takes_the_memory_of_a_tensor_and_not_of_a_shard(tmp_path: Path) -> None:
    program = f"""
import resource, sys
from pathlib import Path
import torch
sys.path.insert(0, {str(ROOT / "tests")!r})
from support.exported import KINDS, recipe_of
from support.shapes import gpt
from mup_megatron.export.export import export
from mup_megatron.export.weights import Source, Stored

model = gpt(16, **KINDS["granite"].keys).model_copy(update={{"num_layers": 12, "ffn_hidden_size": 2048}})
plan = recipe_of(gpt(1, **KINDS["granite"].keys)).plan(model)


class Made:
    stored = {{entry.name: Stored(entry.shape, torch.float32) for entry in plan.entries}}

    def read(self, name):
        return torch.ones(self.stored[name].shape)


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


before = peak()
done = export(Source(model=model, plan=plan, weights=Made(), described="x"), Path("out"), largest=100_000_000)
print(done.size, peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    size, grown = map(int, done.stdout.split())
    assert size > 170_000_000
    assert grown < 50_000_000


def test_weights_are_stored_as_asked(model: Trained, tmp_path: Path) -> None:
    export(model.source(), tmp_path / "half", dtype=torch.bfloat16)
    stock = loaded(tmp_path / "half", dtype=torch.bfloat16)
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    assert {each.dtype for each in stock.parameters()} == {torch.bfloat16}
    assert deviation(model, loaded(tmp_path / "half")) < 2e-2
    export(model.source(torch.bfloat16), tmp_path / "as trained")
    assert json.loads((tmp_path / "as trained" / "config.json").read_text())["dtype"] == "bfloat16"


def test_what_chooses_experts_keeps_its_precision(tmp_path: Path) -> None:
    experts = trained(KINDS["deepseek_v3"])
    export(experts.source(), tmp_path / "out", dtype=torch.bfloat16)
    with (tmp_path / "out" / "model.safetensors").open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    types = {name: told["dtype"] for name, told in header.items() if name != "__metadata__"}
    single = {name for name, dtype in types.items() if dtype == "F32"}
    assert single == {name for name in types if name.endswith("e_score_correction_bias")}
    assert len(single) == 2
    assert set(types.values()) == {"F32", "BF16"}


def test_a_file_that_is_not_what_was_written_is_told(
    model: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = shards._write_file

    def lossy(path: Path, *given: Any) -> None:
        write(path, *given)
        os.truncate(path, path.stat().st_size - 1)

    monkeypatch.setattr(shards, "_write_file", lossy)
    with pytest.raises(InputError, match="is not what was written"):
        export(model.source(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


class Failing:
    """Weights of which one cannot be read."""

    def __init__(self, weights: Any, fails: BaseException) -> None:
        self.stored, self._weights, self._fails = weights.stored, weights, fails

    def read(self, name: str) -> torch.Tensor:
        if "layers.1" in name:
            raise self._fails
        found: torch.Tensor = self._weights.read(name)
        return found


@pytest.mark.parametrize(
    "error",
    [InputError("damaged"), KeyboardInterrupt(), OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))],
    ids=["damaged", "interrupted", "disk full"],
)
def test_an_export_that_ends_early_leaves_nothing(model: Trained, tmp_path: Path, error: BaseException) -> None:
    source = model.source()
    failing = Source(model=source.model, plan=source.plan, weights=Failing(source.weights, error), described="runs/ck")
    wanted = InputError if isinstance(error, OSError) else type(error)
    with pytest.raises(wanted) as ended:
        export(failing, tmp_path / "out")
    if isinstance(error, OSError):
        assert "cannot be written (No space left on device); runs/ck is unchanged" in str(ended.value)
    assert list(tmp_path.iterdir()) == []


def test_a_killed_export_leaves_no_folder_of_that_name(tmp_path: Path) -> None:
    program = f"""
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {str(ROOT / "tests")!r})
from support.exported import KINDS, trained
from mup_megatron.export.export import export

source = trained(KINDS["llama"]).source()
read = source.weights.read
source.weights.read = lambda name: os.kill(os.getpid(), signal.SIGKILL) if "layers.1" in name else read(name)
export(source, Path("out"))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("there", ["file", "folder"])
def test_what_is_there_is_not_replaced(model: Trained, tmp_path: Path, there: str) -> None:
    to = tmp_path / "out"
    if there == "file":
        to.write_text("mine")
    else:
        to.mkdir()
        (to / "notes").write_text("mine")
    with pytest.raises(InputError, match="exists already"):
        export(model.source(), to)


def test_a_link_to_nowhere_is_told_before_anything_is_written(model: Trained, tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match="exists already"):
        export(model.source(), tmp_path / "out")


def test_nothing_is_written_into_the_checkpoint(model: Trained, tmp_path: Path) -> None:
    checkpoint = tmp_path / "ck" / "iter_0000001"
    checkpoint.mkdir(parents=True)
    source = dataclasses.replace(model.source(), folder=checkpoint)
    (tmp_path / "link").symlink_to(checkpoint)
    for to in (checkpoint, checkpoint / "mup" / "out", tmp_path / "link" / "out"):
        with pytest.raises(InputError, match="within the checkpoint"):
            export(source, to)
    assert list(checkpoint.iterdir()) == []
    export(source, tmp_path / "ck" / "out")


def test_the_record_has_every_fold_of_what_is_there(tmp_path: Path) -> None:
    keys = {**KINDS["llama"].keys, "mtp_num_layers": 1}
    base, target = models(Kind("llama", keys, KINDS["llama"].wider))
    own = (PerParameter(match="decoder.*.linear_qkv.weight", multiplier=1.5),)
    plan = recipe_of(base).model_copy(update={"per_parameter": own}).plan(target)
    exported = export(drawn(target, plan), tmp_path / "out", architecture="llama")
    record = json.loads((tmp_path / "out" / "mup_megatron.json").read_text())
    of_queries = [
        each for each in record["folded"] if each["tensor"].endswith("layers.0.self_attention.linear_qkv.weight")
    ]
    assert [(each["factor"], "rows" in each) for each in of_queries] == [(1.5, False), (1.6, True)]
    assert of_queries[1]["rows"][0] == [0, 16]
    assert [name for name in exported.folded if name.startswith("mtp.")] == []


def test_a_parameter_without_a_place_is_refused(
    model: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces = LLAMA.pieces
    monkeypatch.setattr(
        "mup_megatron.export.architectures.llama.Llama.pieces",
        lambda _, given: (piece for piece in pieces(given) if not piece.name.endswith("layers.1.mlp.down_proj.weight")),
    )
    with pytest.raises(InputError, match=r"llama has no place for decoder\.layers\.1\.mlp\.linear_fc2\.weight"):
        export(model.source(), tmp_path / "out", architecture="llama")


@pytest.mark.parametrize(
    ("value", "dtype", "words"),
    [
        (1e5, torch.float16, "norm.weight: has values that are too large for float16. Choose --dtype bfloat16"),
        (float("nan"), None, "runs/ck: .*norm.weight holds infinities or what is no number"),
        (float("inf"), torch.float16, "runs/ck: .*norm.weight holds infinities or what is no number"),
    ],
)
def test_what_is_no_finite_number_is_refused(
    model: Trained, tmp_path: Path, value: float, dtype: torch.dtype | None, words: str
) -> None:
    source = model.source()
    held = {name: source.weights.read(name) for name in source.weights.stored}
    held["decoder.final_layernorm.weight"] = held["decoder.final_layernorm.weight"].clone()
    held["decoder.final_layernorm.weight"][7] = value
    wrong = dataclasses.replace(source, weights=Weights(held))
    with pytest.raises(InputError, match=words):
        export(wrong, tmp_path / "out", dtype=dtype)
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_is_filled(model: Trained, tmp_path: Path) -> None:
    export(model.source(), tmp_path / "sub" / "out")
    (tmp_path / "empty").mkdir()
    export(model.source(), tmp_path / "empty")
    names = {path.name for path in (tmp_path / "empty").iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors", "mup_megatron.json"}
    record = json.loads((tmp_path / "empty" / "mup_megatron.json").read_text())
    assert record["fingerprint"] == model.plan.fingerprint


def test_stock_transformers_runs_it_where_this_package_is_not_installed(model: Trained, tmp_path: Path) -> None:
    export(model.source(), tmp_path / "out")
    given = tokens(model.model)[:1]
    program = f"""
import sys
sys.modules["mup_megatron"] = None
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("out")
print(model(torch.tensor({given.tolist()})).logits.double().flatten().tolist())
"""
    run = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    found = torch.tensor(json.loads(run.stdout), dtype=torch.float64)
    wanted = model.live(given)[..., : model.model.vocab_size].flatten()
    assert (found - wanted).abs().max() < 1e-5


# ---- tokenizers ----------------------------------------------------------------------------------------------------


def tokenizer_file(path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.WordLevel({"one": 0, "two": 1, "?": 2}, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens(["<|endoftext|>", "<pad>"])
    made.save(str(path))


def test_a_tokenizer_goes_with_it_and_its_special_tokens_are_the_models(model: Trained, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    (tmp_path / "tok").mkdir()
    tokenizer_file(tmp_path / "tok" / "tokenizer.json")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": {"__type": "AddedToken", "content": "<pad>"},
        "pad_token": "<pad>",
    }
    (tmp_path / "tok" / "tokenizer_config.json").write_text(json.dumps(settings))
    export(model.source(), tmp_path / "of folder", tokenizer=read_tokenizer(tmp_path / "tok"))
    export(model.source(), tmp_path / "of file", tokenizer=read_tokenizer(tmp_path / "tok" / "tokenizer.json"))
    for name, end in (("of folder", 4), ("of file", 3)):
        assert json.loads((tmp_path / name / "config.json").read_text())["eos_token_id"] == end
        own = AutoTokenizer.from_pretrained(tmp_path / name)
        assert own("two one").input_ids == [1, 0]
        assert (own.eos_token_id, loaded(tmp_path / name).generation_config.eos_token_id) == (end, end)


def test_special_tokens_may_be_in_a_file_of_their_own_and_in_the_vocabulary_itself(tmp_path: Path) -> None:
    tokenizer_file(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<pad>", "bos_token": "?"}))
    assert read_tokenizer(tmp_path).special_ids == {"eos_token_id": 4, "bos_token_id": 2}


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.json", {"model": {"vocab": {"one": 0, "two": 45}}}),
        ("tokenizer.json", {"model": {"vocab": [["piece", 0.0]] * 46}}),
        ("tokenizer.json", {"model": {"vocab": {}}, "added_tokens": [{"content": "<end>", "id": 45}]}),
        ("vocab.json", {"one": 45}),
    ],
    ids=["a vocabulary", "a list", "an added token", "vocab.json"],
)
def test_a_tokenizer_of_more_tokens_than_the_model_has_is_refused(
    model: Trained, tmp_path: Path, file: str, content: dict[str, Any]
) -> None:
    (tmp_path / file).write_text(json.dumps(content))
    tokenizer = read_tokenizer(tmp_path)
    with pytest.raises(InputError, match=r"--tokenizer: its tokens have numbers up to 45, and the model.*is 45\."):
        export(model.source(), tmp_path / "out", tokenizer=tokenizer)
    assert not (tmp_path / "out").exists()
    tokenizer.require_within(46)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--tokenizer .*: no tokenizer\.json"):
        read_tokenizer(tmp_path)


# ---- what is refused -----------------------------------------------------------------------------------------------


def _with(name: str, **changes: Any) -> Kind:
    return Kind(KINDS[name].architecture, {**KINDS[name].keys, **changes}, KINDS[name].wider)


@pytest.mark.parametrize(
    ("kind", "architecture", "words"),
    [
        (KINDS["gpt2"], "llama", ["llama: it has no normalization LayerNorm", "Export to gpt2."]),
        (KINDS["llama"], "gpt2", ["gpt2: it has no normalization RMSNorm", "Export to llama, granite."]),
        (KINDS["qwen3"], "llama", ["llama: it has no qk_layernorm true", "Export to qwen3."]),
        (KINDS["mixtral"], "llama", ["llama: it has no num_experts 4", "Export to mixtral."]),
        (KINDS["llama"], "mixtral", ["mixtral: it has no an MLP in place of experts", "Export to llama, granite."]),
        (KINDS["llama"], "bloom", ["bloom: not known", "llama, qwen3, gpt2, mixtral, deepseek_v3, granite"]),
        (_with("llama", position_embedding_type="none"), None, ["no architecture has all", "lacks position_embedding"]),
        (_with("llama", rotary_percent=0.5), "llama", ["it has no rotary_percent 0.5", "No other that is known"]),
        (
            _with("deepseek_v3", moe_router_load_balancing_type="sinkhorn"),
            "deepseek_v3",
            ["it has no moe_router_load_balancing_type sinkhorn"],
        ),
        (_with("mixtral", moe_router_pre_softmax=True), "mixtral", ["it has no moe_router_pre_softmax true"]),
        (_with("deepseek_v3", q_lora_rank=None, qk_layernorm=False), "deepseek_v3", ["it has no qk_layernorm false"]),
        (
            _with("deepseek_v3 with YaRN", moe_router_topk=3),
            "deepseek_v3",
            ["it has no moe_router_topk 3 of moe_router_group_topk 2"],
        ),
    ],
)
def test_what_an_architecture_has_not_is_refused_with_those_that_have_it(
    kind: Kind, architecture: str | None, words: list[str]
) -> None:
    base, target = models(kind)
    with pytest.raises(InputError) as refused:
        choose(target, recipe_of(base).plan(target), architecture)
    assert [word for word in words if word not in str(refused.value)] == [], str(refused.value)
    assert len(str(refused.value)) <= 300


def test_a_model_whose_multipliers_are_1_becomes_the_plainest() -> None:
    from support.shapes import recipe_for

    model = models(KINDS["llama"])[0]
    one = dict.fromkeys(("embedding_multiplier", "output_multiplier", "attention_multiplier"), 1.0)
    assert choose(model, recipe_for(model, **one).plan(model)).name == "llama"
    assert list(targets()) == ["llama", "qwen3", "gpt2", "mixtral", "deepseek_v3", "granite"]


def test_a_checkpoint_of_another_model_is_refused(model: Trained, tmp_path: Path) -> None:
    source = model.source()
    for change, words in (
        (lambda held: held.pop("decoder.final_layernorm.weight"), "has no decoder.final_layernorm.weight"),
        (lambda held: held.update({"output_layer.weight": torch.zeros(32, 128)}), "has the shape"),
        (lambda held: held.update({"decoder.final_layernorm.weight": torch.zeros(64)}), "has the shape"),
    ):
        held = {name: source.weights.read(name) for name in source.weights.stored}
        change(held)
        wrong = Source(model=source.model, plan=source.plan, weights=Weights(held), described="runs/ck")
        with pytest.raises(InputError, match=f"runs/ck: .*{words}"):
            export(wrong, tmp_path / "out")


def test_another_padding_of_the_vocabulary_is_accepted(model: Trained, tmp_path: Path) -> None:
    source = model.source()
    held = {name: source.weights.read(name) for name in source.weights.stored}
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        held[name] = torch.cat([held[name], torch.ones(16, held[name].shape[1])])
    padded = Source(model=source.model, plan=source.plan, weights=Weights(held), described="runs/ck")
    export(padded, tmp_path / "out")
    assert deviation(model, loaded(tmp_path / "out")) < 1e-5


def test_what_is_not_a_gpt_is_refused() -> None:
    from support.shapes import hybrid, recipe_for

    model = hybrid(gpt(1))
    with pytest.raises(InputError, match="it has no architecture hybrid"):
        choose(model, recipe_for(model).plan(model), "gpt2")
