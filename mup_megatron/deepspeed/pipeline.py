"""Two things that DeepSpeed's pipeline does in its own way: readouts that are functions, and the norm of gradients."""

from collections.abc import Callable
from functools import partial
from typing import Any

from mup_megatron.deepspeed.names import named_parameters
from mup_megatron.modules.parameters import TABLES
from mup_megatron.theory import Plan


def scale_tied_readout(stage: Any, plan: Plan) -> bool:
    """Scales a tied readout that is a function of the embedding module, not a module of its own.

    Returns:
        Whether it is one, so that no module is to be looked for: also where another stage computes it.
    """
    readout = dict(named_parameters(stage)).get(plan.readout or "")
    if readout is None or not plan.tied:
        return False
    owners = [m for m in stage.modules() if any(p is readout for p in m.parameters(recurse=False))]
    if not all(isinstance(module, TABLES) for module in owners):
        return False
    tied = [module for module in stage.tied_modules.values() if any(p is readout for p in module.parameters())]
    for index, function in enumerate(stage.forward_funcs):
        if isinstance(function, partial) and any(argument is module for argument in function.args for module in tied):
            stage.forward_funcs[index] = partial(_scaled_readout, function, plan.output_multiplier)
    return True


def _scaled_readout(function: Callable[[Any], Any], factor: float, inputs: Any) -> Any:
    """Returns a tied layer's function; token ids mean that it looks up embeddings."""
    first, *rest = inputs if isinstance(inputs, tuple) else (inputs,)
    scaled = factor * first if first.is_floating_point() else first
    return function((scaled, *rest) if isinstance(inputs, tuple) else scaled)


def count_once(stage: Any) -> None:
    """Marks what the norm of the gradients counts on this stage, for ZeRO 0.

    There DeepSpeed counts, on all but the first of the ranks that share a model, only what is marked as model-parallel:
    it would leave out the later stages, and count a tied weight twice.
    """
    first = stage.mpu().get_tensor_model_parallel_rank() == 0
    for parameter in stage.parameters():
        if getattr(parameter, "ds_pipe_replicated", False):
            parameter.model_parallel = parameter.tensor_model_parallel = False
        elif first:
            parameter.model_parallel = True
