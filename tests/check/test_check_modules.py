"""Right models pass, in torch and under DeepSpeed's engine at every stage of ZeRO; and what is seen of them."""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support import ds_models, small_nets
from support.ds_ranks import run_ranks
from support.hf_families import FAMILIES, recipe_at
from support.small_nets import OPTIONS, Mixer, Net, recipe_for
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from mup_megatron.check import run_huggingface
from mup_megatron.check.family.huggingface import _shallow, at_width, remarks_on_size, smallest_that_builds, widths_for
from mup_megatron.check.measure.levels import Level
from mup_megatron.check.measure.measurements import Key, Quantity
from mup_megatron.check.report.report import text
from mup_megatron.check.run_huggingface import check_hugging_face
from mup_megatron.check.run_modules import check_modules
from mup_megatron.check.subjects.modules import ModuleTrainee
from mup_megatron.check.subjects.scripts import Task, prepare_by_plan
from mup_megatron.check.subjects.sight import Sight
from mup_megatron.check.verdict.verdict import CheckOutcome, Verdict
from mup_megatron.errors import InputError
from mup_megatron.modules import apply_plan, module_base, param_groups, plan_for_module
from mup_megatron.recipe import Recipe


@pytest.fixture(autouse=True)
def _references(monkeypatch: pytest.MonkeyPatch) -> None:
    small_nets.keep_references(monkeypatch)


def _passes(verdict: Verdict) -> None:
    assert verdict.outcome is CheckOutcome.PASS, text(verdict, title="it", files=())


# ---- right models --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_a_model_that_is_made_by_its_plan_passes(optimizer: str) -> None:
    hyperparameters = {"lr": 0.1, "weight_decay": 0.0} if optimizer == "sgd" else {"output_multiplier": 2.0}
    verdict = check_modules(Net, recipe_for(optimizer=optimizer, hyperparameters=hyperparameters), **OPTIONS)
    _passes(verdict)
    rates = {key.name for key in verdict.comparison if key.quantity is Quantity.LEARNING_RATE}
    assert rates == {name for name, _ in Net(32).named_parameters()}


@pytest.mark.slow
def test_the_late_steps_of_a_right_model_pass() -> None:
    verdict = check_modules(Net, recipe_for(), level=Level.STANDARD, seeds=2, **OPTIONS)
    _passes(verdict)
    assert [section.name for section in verdict.sections][2:] == ["late steps", "wider is better", "bounds"]


def test_what_is_frozen_when_built_is_left_out_and_said() -> None:
    def factory(width: int) -> nn.Module:
        net = Net(width)
        net.embedding.weight.requires_grad_(False)
        return net

    verdict = check_modules(factory, recipe_for(), **OPTIONS)
    _passes(verdict)
    assert verdict.remarks == ("Frozen as it is built, and not checked: embedding.weight.",)


class Unused(Net):
    """With layers that nothing depends on."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.pooler, self.last_norm = nn.Linear(width, width), nn.LayerNorm(width)


def _of_unused() -> Recipe:
    base = module_base(lambda: Unused(32), lambda: Unused(64))
    return Recipe.model_validate({"base": base, "hyperparameters": {"lr": 0.004, "adam_beta2": 0.95}})


@pytest.mark.parametrize("level", [Level.QUICK, pytest.param(Level.STANDARD, marks=pytest.mark.slow)])
def test_what_the_loss_does_not_depend_on_is_left_out_and_said(level: Level) -> None:
    verdict = check_modules(Unused, _of_unused(), level=level, seeds=2, **OPTIONS)
    _passes(verdict)
    [gradients] = [section for section in verdict.sections if section.name == "gradients and updates"]
    said = "Not of last_norm.bias, last_norm.weight, pooler.bias …: no gradient, in the correct reference either"
    assert gradients.lines[-1] == said
    assert gradients.lines[0].startswith(f"learning rate of {len(list(Net(32).parameters()))} parameters")


def test_what_the_reference_alone_trains_fails() -> None:
    def prepare(model: nn.Module, task: Task) -> Any:
        model.get_parameter("blocks.0.up.weight").requires_grad_(False)
        return prepare_by_plan(model, task)

    verdict = check_modules(Unused, _of_unused(), prepare=prepare, seeds=2, **OPTIONS)
    assert (verdict.outcome, verdict.culprit) == (CheckOutcome.FAIL, "blocks.0.up.weight")


def _in_bf16(model: nn.Module, task: Task) -> Any:
    return prepare_by_plan(model.to(torch.bfloat16), task)


@pytest.mark.parametrize(
    ("factory", "options"),
    [
        pytest.param(lambda w: Net(w).to(torch.bfloat16), {}, id="built in bf16"),
        pytest.param(lambda w: Net(w).to(torch.float16), {}, id="built in fp16"),
        pytest.param(Net, {"prepare": _in_bf16, "processes": 1}, id="made bf16 by the script"),
    ],
)
def test_less_than_single_precision_is_refused(factory: Any, options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"is in b?float16.*Build the model in\s*float32 for the check") as told:
        check_modules(factory, recipe_for(), seeds=2, **options, **OPTIONS)
    assert len(str(told.value)) <= 300


def test_double_precision_passes() -> None:
    _passes(check_modules(lambda w: Net(w).double(), recipe_for(), seeds=2, **OPTIONS))


def test_a_factory_that_builds_another_model_the_next_time_is_told_so() -> None:
    built = []

    def factory(width: int) -> nn.Module:
        net = Net(width)
        built.append(width)
        if len(built) > 3 and not next(net.parameters()).is_meta:
            net.added = nn.Linear(4, 4)
        return net

    with pytest.raises(InputError, match=r"added\.weight: the plan has no such parameter"):
        check_modules(factory, recipe_for(), **OPTIONS)


# ---- DeepSpeed -----------------------------------------------------------------------------------------------------


Found = tuple[CheckOutcome, str, set[str]]


def _under_deepspeed(stages: Sequence[int]) -> dict[int, Found]:
    """What becomes of a right model at each stage."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        small_nets.keep_references(monkeypatch)
        return {stage: _at_stage(stage) for stage in stages}


def _at_stage(stage: int) -> Found:
    import deepspeed

    def prepare(model: nn.Module, task: Task) -> Any:
        apply_plan(model, task.plan)
        h = task.recipe.hyperparameters
        params = {"torch_adam": True, "lr": h.lr, "betas": [h.adam_beta1, h.adam_beta2]}
        content = {
            "train_batch_size": small_nets.BATCH,
            "gradient_clipping": h.clip_grad,
            "steps_per_print": 10**9,
            "optimizer": {"type": "AdamW", "params": params},
            "zero_optimization": {"stage": stage},
        }
        groups = param_groups(model.named_parameters(), task.plan)
        return deepspeed.initialize(model=model, model_parameters=groups, config=content)[0]

    # Clipping acts on every step.
    recipe = recipe_for(hyperparameters={"clip_grad": 0.05})
    verdict = check_modules(Net, recipe, prepare=prepare, schedule=_constant, seeds=2, **OPTIONS)
    rates = {key.name for key in verdict.comparison if key.quantity is Quantity.LEARNING_RATE}
    return verdict.outcome, text(verdict, title="it", files=()), rates


def _constant(_step: int, _steps: int) -> float:
    return 1.0


@pytest.mark.parametrize(
    ("ranks", "stages"),
    [
        (1, (3,)),
        *(pytest.param(ranks, stages, marks=pytest.mark.slow) for ranks, stages in ((1, (0, 1, 2)), (2, (1, 3)))),
    ],
)
def test_an_engine_passes_at_every_stage(ranks: int, stages: Sequence[int]) -> None:
    for of_rank in run_ranks(_under_deepspeed, ranks, stages):
        for stage, (outcome, told, rates) in of_rank.items():
            assert outcome is CheckOutcome.PASS, f"stage {stage}: {told}"
            assert rates == {name for name, _ in Net(32).named_parameters()}


# ---- Hugging Face --------------------------------------------------------------------------------------------------


def test_a_configuration_passes_in_plain_torch() -> None:
    config = ds_models.config("gpt2", 4)
    config.n_layer, config.resid_pdrop = 1, 0.1
    verdict = check_hugging_face(config, ds_models.recipe_for("gpt2", lr=0.01), widths=[32, 64, 128], seeds=2)
    _passes(verdict)
    assert any("Dropout is off" in remark for remark in verdict.remarks)
    seen = {key.name for key in verdict.comparison if key.quantity is Quantity.UPDATE}
    assert {"transformer.h.0", "transformer.h.0.attn.attention_logits", "lm_head"} <= seen


@pytest.mark.slow
def test_a_mask_token_that_nothing_masks_passes() -> None:
    """It is there in every model that was pretrained with one."""

    def configuration(width: int) -> transformers.PretrainedConfig:
        config = transformers.Dinov2Config(
            hidden_size=width,
            num_attention_heads=width // 16,
            num_hidden_layers=1,
            image_size=16,
            patch_size=4,
            layerscale_value=0.5,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            architectures=["Dinov2ForImageClassification"],
        )
        config.num_labels = 4
        return config

    recipe = recipe_at(configuration(32), hyperparameters={"lr": 0.008, "init_method_std": 0.05, "weight_decay": 0.1})
    verdict = check_hugging_face(configuration(256), recipe, widths=[32, 64, 128], seeds=2)
    _passes(verdict)
    [gradients] = [section for section in verdict.sections if section.name == "gradients and updates"]
    assert any(line.startswith("Not of dinov2.embeddings.mask_token") for line in gradients.lines)


@pytest.mark.slow
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "bert"])
def test_every_family_passes(family: str) -> None:
    """With the values by default. What BERT's pretraining model learns from, its user has to say."""
    of_class, configuration = FAMILIES[family]
    base, target = (configuration(width) for width in (64, 512))
    base.architectures = target.architectures = [of_class.__name__]
    values = {"lr": 0.008, "init_method_std": 0.05, "weight_decay": 0.1}
    _passes(check_hugging_face(target, recipe_at(base, hyperparameters=values)))


def _entry(path: str, recipe_path: str) -> tuple[CheckOutcome, str]:
    from mup_megatron.recipe import load_recipe

    config = ds_models.config("llama", 4)
    config.num_hidden_layers = 1
    recipe = load_recipe(Path(recipe_path))
    verdict = check_hugging_face(config, recipe, deepspeed=Path(path), widths=[32, 64, 128], seeds=2)
    return verdict.outcome, text(verdict, title="it", files=())


@pytest.mark.slow
def test_a_configuration_passes_with_the_entry_and_a_schedule_of_deepspeeds(tmp_path: Path) -> None:
    recipe_path = ds_models.write(ds_models.recipe_for("llama", lr=0.01), tmp_path)
    content = {
        "mup": {"recipe": recipe_path},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "torch_adam": True}},
        "scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": 5000, "warmup_num_steps": 100}},
        "zero_optimization": {"stage": 3},
        "bf16": {"enabled": True},
        "train_micro_batch_size_per_gpu": 32,
    }
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(content))
    outcome, told = run_ranks(_entry, 1, str(path), recipe_path)[0]
    assert outcome is CheckOutcome.PASS, told
    assert "single precision" in told


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("{", "not JSON"),
        ({"optimizer": {"type": "AdamW"}}, 'no "mup" entry'),
        ({"mup": {"recipe": "x"}, "optimizer": {"type": "AdamW", "params": {"lr": 0.5}}}, "optimizer.params.lr"),
        ({"mup": {"recipe": "x"}, "optimizer": {"type": "MuAdam"}}, "microsoft/mup"),
    ],
)
def test_a_deepspeed_file_that_does_not_fit_the_recipe_is_refused(content: Any, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(InputError, match=complaint):
        check_hugging_face(ds_models.config("gpt2", 4), ds_models.recipe_for("gpt2"), deepspeed=path)


def _llama(width: int, heads: int, groups: int, ffn: int) -> transformers.PretrainedConfig:
    return transformers.LlamaConfig(
        hidden_size=width, num_attention_heads=heads, num_key_value_heads=groups, intermediate_size=ffn
    )


def test_a_family_has_the_targets_ratios() -> None:
    base, target = _llama(256, 4, 1, 688), _llama(4096, 64, 16, 11008)
    assert widths_for(target, base, 4) == [256, 512, 1024, 2048]
    small = at_width(target, base, 512)
    assert (small.num_attention_heads, small.num_key_value_heads, small.intermediate_size) == (8, 2, 1376)
    assert small.num_hidden_layers == target.num_hidden_layers


def test_what_base_and_target_share_stays_fixed() -> None:
    base, target = _llama(256, 4, 2, 1024), _llama(4096, 64, 2, 1024)
    assert widths_for(target, base, 3) == [128, 256, 512]
    small = at_width(target, base, 128)
    assert (small.num_attention_heads, small.num_key_value_heads, small.intermediate_size) == (2, 2, 1024)


def test_heads_groups_and_depth_are_cut_where_they_can_be() -> None:
    large, narrow = _llama(8192, 64, 8, 28672), _llama(1024, 8, 1, 3584)
    for config in (large, narrow):
        config.num_hidden_layers, config.head_dim = 80, 128
    recipe = recipe_at(narrow, hyperparameters={"lr": 0.004})
    small, base, here = smallest_that_builds(transformers.LlamaForCausalLM, large, narrow, recipe)
    assert widths_for(small, base, 4) == [32, 64, 128, 256]
    at_64 = at_width(small, base, 64)
    assert (at_64.num_hidden_layers, at_64.head_dim) == (4, 16)
    assert (at_64.num_attention_heads, at_64.num_key_value_heads, at_64.intermediate_size) == (4, 2, 224)
    assert here.base.model_dump()["num_key_value_heads"] == base.num_key_value_heads


def test_every_kind_of_layer_of_a_pattern_is_left() -> None:
    kinds = ["sliding_attention"] * 5 + ["full_attention"]
    large, narrow = (
        transformers.Gemma3TextConfig(
            hidden_size=width, num_attention_heads=width // 128, num_hidden_layers=24, layer_types=kinds * 4
        )
        for width in (2048, 512)
    )
    small, base, _ = _shallow(large, narrow, recipe_at(narrow, hyperparameters={"lr": 0.004}))
    assert (small.num_hidden_layers, small.layer_types, base.num_hidden_layers) == (6, kinds, 6)


class _Stubborn(transformers.LlamaForCausalLM):
    """A model whose code knows its own sizes."""

    def __init__(self, config: transformers.LlamaConfig) -> None:
        assert config.head_dim == 128
        assert config.num_hidden_layers == 8
        super().__init__(config)


def test_what_a_model_cannot_be_built_without_is_said() -> None:
    large, narrow = _stubborn(8192), _stubborn(1024)
    small, base, _ = smallest_that_builds(_Stubborn, large, narrow, recipe_at(narrow, hyperparameters={"lr": 0.004}))
    assert [remark.partition(":")[0] for remark in remarks_on_size(small, large, base)] == [
        "8 of 8 layers are trained, not 4",
        "Heads are the target's own, of size 128",
    ]
    cut, base, _ = smallest_that_builds(
        transformers.LlamaForCausalLM, large, narrow, recipe_at(narrow, hyperparameters={"lr": 1})
    )
    assert remarks_on_size(cut, large, base) == []


def test_heads_that_cannot_be_cut_and_take_far_too_long_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    large, narrow = _stubborn(8192), _stubborn(1024)
    monkeypatch.setattr(run_huggingface, "class_of", lambda *_: _Stubborn)
    tuned = recipe_at(narrow, hyperparameters={"lr": 0.004})
    with pytest.raises(InputError, match=r"cannot be built smaller .* a core about \d+ min.*--widths 1024,2048,4096"):
        check_hugging_face(large, tuned)


def _stubborn(width: int) -> transformers.LlamaConfig:
    config = _llama(width, width // 128, width // 1024, 7 * width // 2)
    config.num_hidden_layers, config.head_dim, config.architectures = 8, 128, ["LlamaForCausalLM"]
    return config


def test_the_number_of_processes_changes_nothing() -> None:
    verdicts = [check_modules(Net, recipe_for(), seeds=2, processes=count, **OPTIONS) for count in (1, 2)]
    assert verdicts[0].subject.to_json() == verdicts[1].subject.to_json()
    assert verdicts[0].comparison == verdicts[1].comparison


def test_what_is_to_come_is_told_before() -> None:
    told: list[str] = []
    check_modules(Net, recipe_for(), seeds=2, tell=told.append, **OPTIONS)
    assert len(told) == 1
    assert re.fullmatch(
        r"6 \+ 18 models, widths 32, 64, 128, in \d+ process(es)?: about \d+ (s|min) on this machine", told[0]
    ), told


def test_a_width_without_whole_heads_is_refused() -> None:
    base, target = _llama(256, 4, 4, 1024), _llama(4096, 64, 64, 4096)
    with pytest.raises(InputError, match="multiples of 64"):
        at_width(target, base, 96)


@pytest.mark.slow
def test_a_base_that_is_wider_than_the_models_is_made_as_narrow() -> None:
    config, recipe = ds_models.config("gpt2", 8), ds_models.recipe_for("gpt2", base=4, lr=0.01)
    config.n_layer = 1
    verdict = check_hugging_face(config, recipe, widths=[32, 64, 128])
    _passes(verdict)
    assert any("The base is 128 wide" in remark for remark in verdict.remarks)
    assert verdict.fingerprint == recipe.fingerprint
    assert verdict.control_comparison[Key(Quantity.LEARNING_RATE, "transformer.h.0.mlp.c_fc.weight", 3)].slope > 0.9


# ---- what is said of what is missing -------------------------------------------------------------------------------


def test_a_model_of_which_nobody_says_what_it_learns_is_refused() -> None:
    with pytest.raises(InputError, match="batch"):
        check_modules(Net, recipe_for(), widths=[32, 64, 128])


def test_two_widths_are_refused() -> None:
    with pytest.raises(InputError, match="at least three"):
        check_modules(Net, recipe_for(), **OPTIONS | {"widths": [32, 64]})


# ---- what is seen --------------------------------------------------------------------------------------------------


def test_every_layer_and_block_and_the_logits_are_seen() -> None:
    net = Net(32, mixes=True)
    own = recipe_for(mixes=True)
    plan = plan_for_module(lambda: Net(32, mixes=True), own)
    trainee = ModuleTrainee(net, [], own, plan, width=32, batch=small_nets.batch, loss=small_nets.loss)
    seen = [name for name, _, _ in trainee.modules()]
    layers = [f"blocks.{i}.{name}" for i in range(2) for name in ("norm", "up", "down", "mixer.q", "mixer.o")]
    assert set(seen) > {"embedding", "blocks.0", "blocks.1", "norm", "readout", *layers}
    assert {"blocks.0.mixer.attention_logits", "blocks.1.mixer.attention_logits"} < set(seen)
    assert "blocks" not in seen
    assert "blocks.0.mixer" not in seen
    assert trainee.head_sizes() == {f"blocks.{i}.mixer.attention_logits": 16 for i in range(2)}


def _logits(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    sight, found = Sight(model), {}

    def forward() -> None:
        with sight:
            model(x)

    taps = [(name, module) for name, module, at in sight.seen(forward) if at == "input"]
    for name, module in taps:
        module.register_forward_pre_hook(lambda _m, args, name=name: found.update({name: args[0]}))
    forward()
    return found


def test_logits_of_written_out_attention_are_those_before_the_mask() -> None:
    torch.manual_seed(0)
    mixer, x = Mixer(32), torch.randn(2, 5, 32)
    q, k = (f(x).unflatten(-1, (2, 16)).transpose(1, 2) for f in (mixer.q, mixer.k))
    expected = (q @ k.transpose(-2, -1) / math.sqrt(16)).tril()
    assert torch.allclose(_logits(mixer, x)["attention_logits"], expected, atol=1e-6)


class _Fused(nn.Module):
    """Four heads that share two groups, with a scale of their own."""

    def forward(self, x: Tensor) -> Tensor:
        keys = x[:, :2]
        return scaled_dot_product_attention(x, keys, keys, is_causal=True, scale=0.3, enable_gqa=True)


def test_logits_of_fused_attention_have_its_scale_and_groups() -> None:
    x = torch.randn(2, 4, 5, 8)
    keys = x[:, [0, 0, 1, 1]]
    assert torch.allclose(_logits(_Fused(), x)["attention_logits"], 0.3 * x @ keys.transpose(-2, -1), atol=1e-6)


def test_the_heads_of_an_einsum_are_seen() -> None:
    class Summed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("bhqd,bhkd->bhqk", x, x).softmax(-1)

    net = Summed()
    sight = Sight(net)
    with sight:
        net(torch.randn(2, 3, 5, 7))
    assert sight.head_sizes == {"attention_logits": 7}
