"""Ways in which μP is known to go wrong in other people's code: the check says so, and where."""

from collections.abc import Callable
from typing import Any

import mup
import pytest
import torch
from support import small_nets
from support.ds_ranks import run_ranks
from support.small_nets import OPTIONS, Net, recipe_for
from torch import Tensor, nn
from torch.nn import functional

from mup_megatron.check.measure.measurements import Quantity
from mup_megatron.check.report.report import text
from mup_megatron.check.run_modules import check_modules
from mup_megatron.check.subjects.scripts import Task, prepare_by_plan
from mup_megatron.check.verdict.verdict import CheckOutcome, Verdict
from mup_megatron.errors import InputError
from mup_megatron.modules import apply_plan, param_groups


@pytest.fixture(autouse=True)
def _references(monkeypatch: pytest.MonkeyPatch) -> None:
    small_nets.keep_references(monkeypatch)


def _findings(verdict: Verdict, quantity: Quantity) -> dict[str, float]:
    """Name → the subject's slope less the reference's, of what was found of a quantity."""
    found: dict[str, float] = {}
    for section in verdict.sections:
        for finding in section.findings:
            if finding.key.quantity is quantity:
                found.setdefault(finding.key.name, finding.compared.slope)
    return found


# ---- scripts that do not do what a plan says -----------------------------------------------------------------------


def test_a_script_that_knows_nothing_of_widths_fails() -> None:
    def prepare(model: nn.Module, task: Task) -> torch.optim.Optimizer:
        h = task.recipe.hyperparameters
        return torch.optim.AdamW(
            model.parameters(), lr=h.lr, betas=(h.adam_beta1, h.adam_beta2), eps=h.adam_eps, weight_decay=h.weight_decay
        )

    verdict = check_modules(Net, recipe_for(), prepare=prepare, **OPTIONS)
    assert verdict.outcome is CheckOutcome.FAIL
    found = _findings(verdict, Quantity.LEARNING_RATE)
    assert found["blocks.0.up.weight"] == pytest.approx(1.0, abs=0.02)
    assert "embedding.weight" not in found


def test_another_optimizer_than_the_recipes_is_known_by_its_steps() -> None:
    def prepare(model: nn.Module, task: Task) -> torch.optim.Optimizer:
        apply_plan(model, task.plan)
        return torch.optim.RMSprop(param_groups(model.named_parameters(), task.plan), lr=task.recipe.hyperparameters.lr)

    verdict = check_modules(Net, recipe_for(), prepare=prepare, **OPTIONS)
    assert verdict.outcome is CheckOutcome.FAIL
    assert verdict.causes[0].name == "optimizer-differs", verdict.causes


def test_microsoft_mup_scales_a_tied_embedding_with_width() -> None:
    """microsoft/mup#55: MuSharedReadout rescales the embedding's weight as if it were a readout's alone."""

    def prepare(model: nn.Module, task: Task) -> torch.optim.Optimizer:
        assert isinstance(model, Net)
        model.readout = mup.MuSharedReadout(model.embedding.weight, bias=False)
        base, delta = Net(32, tied=True), Net(64, tied=True)
        mup.set_base_shapes(model, base, delta=delta, do_assert=False)
        return torch.optim.AdamW(param_groups(model.named_parameters(), task.plan), betas=(0.9, 0.95))

    verdict = check_modules(
        lambda width: Net(width, tied=True),
        recipe_for(tied=True),
        prepare=prepare,
        readout="embedding.weight",
        **OPTIONS,
    )
    assert verdict.outcome is CheckOutcome.FAIL
    assert _findings(verdict, Quantity.INITIAL) == {"embedding.weight": pytest.approx(0.5, abs=0.05)}


@pytest.mark.parametrize("way", ["frozen", "no learning rate"])
def test_a_model_that_does_not_learn_fails(way: str) -> None:
    def prepare(model: nn.Module, task: Task) -> torch.optim.Optimizer | None:
        optimizer = prepare_by_plan(model, task)
        assert optimizer is not None
        if way == "frozen":
            model.requires_grad_(False)
        else:
            for group in optimizer.param_groups:
                group["lr"] = 0.0
        return optimizer

    verdict = check_modules(Net, recipe_for(), prepare=prepare, **OPTIONS)
    assert verdict.outcome is CheckOutcome.FAIL
    assert "does not learn" in text(verdict, title="it", files=())


def test_one_frozen_parameter_is_named() -> None:
    def prepare(model: nn.Module, task: Task) -> torch.optim.Optimizer | None:
        model.get_parameter("blocks.1.up.weight").requires_grad_(False)
        return prepare_by_plan(model, task)

    verdict = check_modules(Net, recipe_for(), prepare=prepare, **OPTIONS)
    assert verdict.outcome is CheckOutcome.FAIL
    assert set(_findings(verdict, Quantity.LEARNING_RATE)) == {"blocks.1.up.weight"}


# ---- models that are wrong themselves ------------------------------------------------------------------------------


def test_a_scale_of_attention_in_the_code_is_found_though_the_reference_shares_it() -> None:
    verdict = check_modules(lambda width: Net(width, mixes=True), recipe_for(mixes=True), seeds=2, **OPTIONS)
    assert verdict.outcome is CheckOutcome.FAIL
    assert [section.name for section in verdict.sections if section.outcome is CheckOutcome.FAIL] == ["bounds"]
    assert verdict.culprit is not None
    assert verdict.culprit.endswith("mixer.attention_logits")


class _Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 0.01 * torch.randn_like(x)


class _Noisy(Net):
    """Adds noise where another model has dropout."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        for block in self.blocks:
            block.dropout = _Noise()


class _Dropping(Net):
    """Drops with torch's function, and not with its module."""

    def forward(self, tokens: Tensor) -> Tensor:
        return functional.dropout(super().forward(tokens), 0.1, self.training)


def test_dropout_is_off_and_that_is_said() -> None:
    verdict = check_modules(lambda width: Net(width, dropout=0.1), recipe_for(), seeds=2, **OPTIONS)
    assert verdict.outcome is CheckOutcome.PASS, text(verdict, title="it", files=())
    assert "Dropout is off in the check, so that differences are not its own." in verdict.remarks
    assert check_modules(_Dropping, recipe_for(), seeds=2, **OPTIONS).outcome is CheckOutcome.PASS
    assert (functional.dropout(torch.ones(1000), 0.5) == 0).any(), "afterwards it drops as before"


def test_other_noise_allows_no_verdict_and_is_named() -> None:
    verdict = check_modules(_Noisy, recipe_for(), **OPTIONS)
    assert verdict.outcome is CheckOutcome.NO_VERDICT
    told = text(verdict, title="it", files=())
    assert "not deterministic, two forward passes on one batch differ" in told
    assert told.startswith(
        "NO VERDICT it: Turn off what is random in it for the check: differences would be its own.\n"
    )


class _Broken(Net):
    """Divides by zero in its second block."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.blocks[1].register_forward_hook(lambda _module, _args, output: output * (0.0 / torch.zeros(1)))


def test_a_model_that_computes_no_numbers_fails_where_it_does() -> None:
    verdict = check_modules(_Broken, recipe_for(), **OPTIONS)
    assert verdict.outcome is CheckOutcome.FAIL
    assert verdict.culprit == "blocks.1"


def test_a_width_that_cannot_be_built_is_named() -> None:
    def factory(width: int) -> nn.Module:
        if width % 64:
            raise ValueError("heads of 64")
        return Net(width)

    with pytest.raises(InputError, match=r"width 32: .*heads of 64"):
        check_modules(factory, recipe_for(), **OPTIONS)


@pytest.mark.parametrize("where", ["inside a block", "on what a block adds"])
def test_a_power_of_width_in_the_code_is_found_though_the_reference_shares_it(where: str) -> None:
    def factory(width: int) -> nn.Module:
        net, factor = Net(width), (width / 32) ** 0.5
        if where == "inside a block":
            net.blocks[1].up.register_forward_pre_hook(lambda _module, args: (args[0] * factor,))
        else:
            net.blocks[1].register_forward_hook(lambda _module, args, out: args[0] + factor * (out - args[0]))
        return net

    verdict = check_modules(factory, recipe_for(), seeds=2, **OPTIONS)
    assert verdict.outcome is CheckOutcome.FAIL
    assert [section.name for section in verdict.sections if section.outcome is CheckOutcome.FAIL] == ["bounds"]
    found = set(_findings(verdict, Quantity.UPDATE))
    assert "blocks.1.added" in found
    assert all(name.startswith("blocks.1") for name in found)


# ---- DeepSpeed -----------------------------------------------------------------------------------------------------

Found = tuple[CheckOutcome, str | None, dict[str, float], str]


def _config(optimizer: dict[str, Any], *, stage: int = 0, **more: Any) -> dict[str, Any]:
    return {
        "train_batch_size": small_nets.BATCH,
        "train_micro_batch_size_per_gpu": small_nets.BATCH,
        "gradient_clipping": 1.0,
        "steps_per_print": 10**9,
        "optimizer": optimizer,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        **more,
    }


def _judged(prepare: Callable[[nn.Module, Task], Any], **options: Any) -> Found:
    verdict = check_modules(Net, recipe_for(), prepare=prepare, seeds=2, **OPTIONS, **options)
    found = _findings(verdict, Quantity.LEARNING_RATE)
    return verdict.outcome, verdict.culprit, found, text(verdict, title="it", files=())


def _constant(_step: int, _steps: int) -> float:
    return 1.0


def _mu_adam_under_zero_init(kind: str) -> Found:
    import deepspeed

    def prepare(model: nn.Module, task: Task) -> Any:
        # Initial weights and multipliers are right: what is looked for is what becomes of the learning rates.
        apply_plan(model, task.plan)
        h = task.recipe.hyperparameters
        params = {"lr": h.lr, "betas": [h.adam_beta1, h.adam_beta2], "eps": h.adam_eps, "weight_decay": h.weight_decay}
        content = _config({"type": kind, "params": params}, stage=3)
        deepspeed.zero.Init(module=model, config_dict_or_path=content)
        mup.set_base_shapes(model, Net(32), delta=Net(64), do_assert=False, rescale_params=False)
        return deepspeed.initialize(model=model, model_parameters=model.parameters(), config=content)[0]

    return _judged(prepare, schedule=_constant)


@pytest.mark.slow
def test_deepspeeds_mu_adam_loses_its_ratios_under_zero_init() -> None:
    outcome, _, found, told = run_ranks(_mu_adam_under_zero_init, 1, "MuAdamW")[0]
    assert outcome is CheckOutcome.FAIL
    hidden = {name for name in found if name.startswith("blocks.") and name.endswith(("up.weight", "down.weight"))}
    assert set(found) == hidden
    assert len(hidden) == 4
    assert all(slope == pytest.approx(1.0, abs=0.05) for slope in found.values())
    assert "learning rate" in told


def _scheduler_with_one_maximum() -> Found:
    import deepspeed

    def prepare(model: nn.Module, task: Task) -> Any:
        apply_plan(model, task.plan)
        h = task.recipe.hyperparameters
        scheduler = {"warmup_max_lr": h.lr, "warmup_num_steps": 2, "warmup_type": "linear"}
        optimizer = {"type": "AdamW", "params": {"torch_adam": True, "lr": h.lr, "betas": [h.adam_beta1, h.adam_beta2]}}
        content = _config(optimizer, scheduler={"type": "WarmupLR", "params": scheduler})
        groups = param_groups(model.named_parameters(), task.plan)
        return deepspeed.initialize(model=model, model_parameters=groups, config=content)[0]

    return _judged(prepare, schedule=lambda step, _steps: min(1.0, max(0, step - 1) / 2))


def test_a_scheduler_with_one_maximum_flattens_the_groups() -> None:
    outcome, culprit, found, _ = run_ranks(_scheduler_with_one_maximum, 1)[0]
    assert outcome is CheckOutcome.FAIL
    assert culprit in found
    assert found["blocks.0.up.weight"] == pytest.approx(1.0, abs=0.05)
    assert "embedding.weight" not in found


def test_rows_that_the_backward_pass_forgets_are_seen() -> None:
    def prepare(model: nn.Module, task: Task) -> torch.optim.Optimizer | None:
        def forget(gradient: torch.Tensor) -> torch.Tensor:
            gradient = gradient.clone()
            gradient[: len(gradient) // 8] = 0.0
            return gradient

        model.get_parameter("blocks.0.up.weight").register_hook(forget)
        return prepare_by_plan(model, task)

    verdict = check_modules(Net, recipe_for(), prepare=prepare, **OPTIONS)
    assert verdict.outcome is CheckOutcome.FAIL
    assert (verdict.causes[0].name, verdict.culprit) == ("gradient", "blocks.0.up.weight")
    assert "rows of it have no gradient" in verdict.causes[0].sentence
