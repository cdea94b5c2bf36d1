"""A training script in which somebody has made a mistake; MISTAKE in the environment says which one.

Everything else is examples/pretrain.py. Each mistake is one that a real script could hold, and that trains on without a
word where nobody looks.
"""

import os
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import megatron.training.arguments as arguments
import megatron.training.training as training
import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.optimizer import ParamKey
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.dot_product_attention import DotProductAttention

SCRIPT = Path(__file__).parents[2] / "examples" / "pretrain.py"
MODELS = (GPTModel, HybridModel)


def after(owner: type, name: str, change: Callable[..., None]) -> None:
    original = getattr(owner, name)

    def changed(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        change(self)
        return result

    setattr(owner, name, changed)


def attention_ignores_its_scale() -> None:
    original = DotProductAttention.forward

    def forward(self: Any, query: Any, key: Any, *args: Any, **kwargs: Any) -> Any:
        own = self.softmax_scale
        self.softmax_scale = 1.0 / query.shape[-1] ** 0.5
        try:
            return original(self, query, key, *args, **kwargs)
        finally:
            self.softmax_scale = own

    DotProductAttention.forward = forward


def unknown_parameter() -> None:
    def add(model: Any) -> None:
        model.decoder.layers[0].gate = torch.nn.Parameter(torch.ones(3))

    for kind in MODELS:
        after(kind, "__init__", add)


def frozen_parameter() -> None:
    def freeze(model: Any) -> None:
        model.decoder.layers[1].mlp.linear_fc1.weight.requires_grad = False

    for kind in MODELS:
        after(kind, "__init__", freeze)


def flattening_scheduler() -> None:
    def flatten(scheduler: Any) -> None:
        groups = scheduler.optimizer.param_groups
        for group in groups:
            group["lr"] = groups[0]["lr"]

    after(OptimizerParamScheduler, "step", flatten)


def scheduler_that_flattens_later() -> None:
    def flatten(scheduler: Any) -> None:
        if scheduler.num_steps > 0:
            for group in scheduler.optimizer.param_groups:
                group["lr"] = 1e-3

    after(OptimizerParamScheduler, "step", flatten)


def overriding_as_on_the_main_branch() -> None:
    """After 0.19, with --override-opt-param-scheduler, a load writes the schedule's rates into every group."""
    original = OptimizerParamScheduler.load_state_dict

    def load(self: Any, state: Any) -> None:
        original(self, state)
        for group in self.optimizer.param_groups:
            group["max_lr"], group["min_lr"] = self.max_lr, self.min_lr

    OptimizerParamScheduler.load_state_dict = load


def own_overrides() -> None:
    original = training.get_megatron_optimizer_config

    def with_own(args: Any) -> Any:
        config, overrides = original(args)
        return config, {**overrides, ParamKey(name="*embedding*"): {"max_lr": 1.0}}

    training.get_megatron_optimizer_config = with_own


def lost_group() -> None:
    original = training.get_optimizer_param_scheduler

    def losing(optimizer: Any) -> Any:
        scheduler = original(optimizer)
        for part in getattr(optimizer, "chained_optimizers", [optimizer]):
            part.optimizer.param_groups[-1]["params"] = []
        return scheduler

    training.get_optimizer_param_scheduler = losing


def dropped_multiplier() -> None:
    original = training.get_optimizer_param_scheduler

    def dropping(optimizer: Any) -> Any:
        import gc

        for model in gc.get_objects():
            if isinstance(model, MODELS) and hasattr(model, "output_layer"):
                model.output_layer._forward_pre_hooks.clear()
        return original(optimizer)

    training.get_optimizer_param_scheduler = dropping


def weights_drawn_again() -> None:
    original = training.get_optimizer_param_scheduler

    def drawing(optimizer: Any) -> Any:
        import gc

        for model in gc.get_objects():
            if isinstance(model, MODELS):
                for name, parameter in model.named_parameters():
                    if name.endswith("linear_fc1.weight"):
                        torch.nn.init.normal_(parameter.data, std=0.02)
        return original(optimizer)

    training.get_optimizer_param_scheduler = drawing


def after_parsing(**values: Any) -> None:
    original = arguments.parse_and_validate_args

    def parse(*args: Any, **kwargs: Any) -> Any:
        parsed = original(*args, **kwargs)
        vars(parsed).update(values)
        return parsed

    arguments.parse_and_validate_args = parse


def betas_after_parsing() -> None:
    after_parsing(adam_beta2=0.5)


def clipping_after_parsing() -> None:
    after_parsing(clip_grad=0.01)


def schedule_after_parsing() -> None:
    after_parsing(lr_decay_style="cosine")


def defaults_of_its_own() -> None:
    original = arguments.parse_and_validate_args

    def parse(*args: Any, args_defaults: Any, **kwargs: Any) -> Any:
        own = {"lr_decay_iters": 1, "lr_warmup_fraction": 0.5, "start_weight_decay": 0.5}
        return original(*args, args_defaults={**args_defaults, **own}, **kwargs)

    arguments.parse_and_validate_args = parse


def another_kind_of_model() -> None:
    from megatron.core.transformer.module import MegatronModule
    from megatron.training.models.gpt import GPTModelBuilder

    class Wrapping(MegatronModule):
        def __init__(self, model: Any) -> None:
            super().__init__(model.config)
            self.gpt = model

    original = GPTModelBuilder.build_model
    GPTModelBuilder.build_model = lambda self, *args, **kwargs: Wrapping(original(self, *args, **kwargs))


def nothing() -> None:
    pass


def never_trains() -> None:
    raise SystemExit(0)


if __name__ == "__main__":
    globals()[os.environ["MISTAKE"]]()
    runpy.run_path(str(SCRIPT), run_name="__main__")
