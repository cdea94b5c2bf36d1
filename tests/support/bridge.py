"""The places of Megatron-Bridge's configuration, used in the order of its `pretrain` around stock Megatron-Core.

Bridge itself is not installed where tests run: `tools/megatron-bridge-check` runs the real one. Everything here is
called inside a rank. Values are those with which Bridge's recipes come. Of weights that a checkpoint brings nothing is
here: an `edit` before the first step stands for them.
"""

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

from support import planned, stock
from support.stock import Layout, Run, Training

from mup_megatron.architectures.model_file import ModelFile

ITERATIONS = 8


class OptimizerConfigOverrideProvider:
    """The stock one, which a plan's takes the place of."""

    def build_config_overrides(self, context: Any) -> Any:
        from megatron.core.optimizer import get_standard_config_overrides

        return get_standard_config_overrides(context.optimizer_config)


def container(model: ModelFile, *, provider: bool = True, layout: Layout | None = None) -> Any:
    """A `ConfigContainer` for a model: of a provider, which is a TransformerConfig, or of a configuration with one."""
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.transformer import TransformerConfig

    layout = layout or Layout()
    stock.init_parallel(layout)
    transformer = stock.transformer_config(planned.sizes_of(model, layout.tp), layout)

    class GPTModelProvider(TransformerConfig):  # type: ignore[misc]
        def register_pre_wrap_hook(self, hook: Callable[[Any], Any], prepend: bool = False) -> None:
            self._pre_wrap_hooks.insert(0 if prepend else len(self._pre_wrap_hooks), hook)

    if provider:
        transformer.__class__ = GPTModelProvider
        transformer._pre_wrap_hooks = []
        transformer.seq_length = model.seq_length
    return SimpleNamespace(
        model=transformer
        if provider
        else SimpleNamespace(transformer=transformer, seq_length=model.seq_length, pre_wrap_hooks=[]),
        optimizer=OptimizerConfig(
            optimizer="adam", lr=3e-4, min_lr=3e-5, weight_decay=0.1, adam_beta1=0.9, adam_beta2=0.95, adam_eps=1e-8
        ),
        optimizer_config_override_provider=OptimizerConfigOverrideProvider(),
        scheduler=SimpleNamespace(
            lr_decay_style="cosine",
            lr_decay_iters=None,
            lr_decay_samples=None,
            lr_wsd_decay_style="exponential",
            lr_wsd_decay_iters=None,
            lr_wsd_decay_samples=None,
            lr_warmup_fraction=None,
            lr_warmup_iters=500,
            lr_warmup_samples=0,
            lr_warmup_init=0.0,
            start_weight_decay=0.033,
            end_weight_decay=0.033,
            weight_decay_incr_style="constant",
            override_opt_param_scheduler=True,
            use_checkpoint_opt_param_scheduler=False,
        ),
        train=SimpleNamespace(train_iters=ITERATIONS, train_samples=None, global_batch_size=8),
        checkpoint=SimpleNamespace(finetune=False, pretrained_checkpoint=None),
        dist=SimpleNamespace(use_megatron_fsdp=False, use_torch_fsdp2=False),
        peft=None,
        of=(model, layout),
    )


def set_up(config: Any) -> Run:
    """Model, hooks, wrapping, overrides, optimizer and schedule, as Bridge's `setup` makes them of a container."""
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    model, layout = config.of
    sizes = planned.sizes_of(model, layout.tp)
    transformer = getattr(config.model, "transformer", config.model)
    chunks = stock.build_chunks(sizes, layout, transformer)
    for hook in getattr(config.model, "_pre_wrap_hooks", None) or getattr(config.model, "pre_wrap_hooks", []):
        chunks = hook(chunks)
    o, s = config.optimizer, config.scheduler

    def overrides(wrapped: list[Any], optimizer_config: Any) -> Any:
        context = SimpleNamespace(scheduler_config=s, optimizer_config=optimizer_config, model=wrapped)
        return config.optimizer_config_override_provider.build_config_overrides(context)

    told = {key: getattr(o, key) for key in ("lr", "min_lr", "weight_decay", "adam_beta1", "adam_beta2", "adam_eps")}
    run = stock.finish(sizes, layout, Training(clip_grad=o.clip_grad, **told), transformer, chunks, overrides)
    samples = config.train.train_iters * config.train.global_batch_size
    decay = (s.lr_decay_iters or config.train.train_iters) * config.train.global_batch_size
    warm_up = min(s.lr_warmup_iters * config.train.global_batch_size, decay - 1)  # Bridge cuts it with a warning
    run.scheduler = OptimizerParamScheduler(
        run.optimizer,
        init_lr=s.lr_warmup_init,
        max_lr=o.lr,
        min_lr=o.min_lr,
        lr_warmup_steps=warm_up if s.lr_warmup_fraction is None else s.lr_warmup_fraction * decay,
        lr_decay_steps=decay,
        lr_decay_style=s.lr_decay_style,
        start_wd=s.start_weight_decay,
        end_wd=s.end_weight_decay,
        wd_incr_steps=samples,
        wd_incr_style=s.weight_decay_incr_style,
        use_checkpoint_opt_param_scheduler=s.use_checkpoint_opt_param_scheduler,
        override_opt_param_scheduler=s.override_opt_param_scheduler,
    )
    return run


def pretrain(
    config: Any, callbacks: list[Any], edit: Callable[[Run, int], None] | None = None, *, resumed_at: int = 0
) -> Iterator[float]:
    """Yields the losses of the run. `edit(run, step)` changes it behind Bridge's back, before the callbacks of a step.

    Steps are the run's own, from 0 on; Bridge's counter begins at `resumed_at`.
    """
    run = set_up(config)
    user_state: dict[str, Any] = {}
    for step in range(ITERATIONS + 1):
        if step:
            yield from stock.train(run, 1)
        if edit is not None:
            edit(run, step)
        context = SimpleNamespace(
            state=SimpleNamespace(cfg=config, train_state=SimpleNamespace(step=resumed_at + step)),
            model=run.chunks,
            optimizer=run.optimizer,
            scheduler=run.scheduler,
            user_state=user_state,
        )
        for callback in callbacks:
            (callback.on_train_step_end if step else callback.on_train_start)(context)
