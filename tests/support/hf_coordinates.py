"""How much each activation of a Hugging Face model moves in training, and how large each first gradient is, by width.

The same numbers from a model with a plan and torch's AdamW, and from the same model with microsoft/mup and its MuAdamW,
both from the same weights. One batch is learned by heart: training and comparison use it alone.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import fmean, stdev
from typing import Any

import torch
from support import hf_oracle
from support.coordinates import Sizes, rms, slopes
from support.hf_families import FAMILIES, POSITIONS, VOCABULARY, config, model, recipe_at
from support.hf_models import with_class
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from mup_megatron.huggingface import apply_plan, param_groups, plan_for
from mup_megatron.recipe import Recipe
from mup_megatron.theory import Plan

STEPS = (1, 4)
LEARNING_RATE = 0.003
"""At the base. After four steps a weight that is drawn with 0.02 has moved by half of that."""
BATCH, LENGTH = 8, POSITIONS // 2

_LLAMA = {
    "block": r"model\.layers\.\d+",
    "attention": r"model\.layers\.\d+\.self_attn\.o_proj",
    "mlp": r"model\.layers\.\d+\.mlp\.down_proj",
    "readout": r"lm_head",
}
LOCATIONS: dict[str, dict[str, str]] = {
    "gpt2": {
        "block": r"transformer\.h\.\d+",
        "attention": r"transformer\.h\.\d+\.attn\.c_proj",
        "mlp": r"transformer\.h\.\d+\.mlp\.c_proj",
        "readout": r"lm_head",
    },
    "gpt_neox": {
        "block": r"gpt_neox\.layers\.\d+",
        "attention": r"gpt_neox\.layers\.\d+\.attention\.dense",
        "mlp": r"gpt_neox\.layers\.\d+\.mlp\.dense_4h_to_h",
        "readout": r"lm_head",
    },
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "bert": {
        "block": r"bert\.encoder\.layer\.\d+",
        "attention": r"bert\.encoder\.layer\.\d+\.attention\.output\.dense",
        "mlp": r"bert\.encoder\.layer\.\d+\.output\.dense",
        "readout": r"cls\.predictions\.decoder|cls\.seq_relationship",
    },
    "vit": {
        "block": r"vit\.layers\.\d+",
        "attention": r"vit\.layers\.\d+\.attention\.o_proj",
        "mlp": r"vit\.layers\.\d+\.mlp\.fc2",
        "readout": r"classifier",
    },
    "resnet": {
        "block": r"resnet\.encoder\.stages\.\d+\.layers\.\d+",
        "convolution": r"resnet\..*\.convolution",
        "readout": r"classifier\.1",
    },
    "opt": {
        "block": r"model\.decoder\.layers\.\d+",
        "attention": r"model\.decoder\.layers\.\d+\.self_attn\.out_proj",
        "mlp": r"model\.decoder\.layers\.\d+\.fc2",
        "readout": r"lm_head",
    },
    "t5": {
        "block": r"(en|de)coder\.block\.\d+",
        "attention": r"(en|de)coder\.block\.\d+\.layer\.\d+\.(SelfAttention|EncDecAttention)\.o",
        "mlp": r"(en|de)coder\.block\.\d+\.layer\.\d+\.DenseReluDense\.wo",
        "readout": r"lm_head",
    },
}
"""Family → what is looked at → the names of modules whose outputs those are: every layer has its own."""

LAYERS = {"block": 2, "attention": 2, "mlp": 2, "readout": 1}
COUNTS = {
    **dict.fromkeys(FAMILIES, LAYERS),
    "bert": {**LAYERS, "readout": 2},
    "resnet": {"block": 2, "convolution": 6, "readout": 1},
    "t5": {"block": 4, "attention": 6, "mlp": 4, "readout": 1},
}
"""How many modules there are of each; a pattern that misses some would look at nothing."""

WIDTHS = {**dict.fromkeys(FAMILIES, (64, 128, 256)), "resnet": (32, 64, 128)}


@dataclass(frozen=True)
class Case:
    """A family, or a variant of it, at any width."""

    family: str
    changes: Callable[[int], dict[str, Any]] = lambda _width: {}
    """What its configuration has beside the family's, by width."""

    @property
    def widths(self) -> tuple[int, ...]:
        """The first is the base's."""
        return WIDTHS[self.family]

    def config(self, width: int) -> PretrainedConfig:
        """Its configuration at one width."""
        return config(self.family, width, **self.changes(width))

    def model(self, width: int) -> PreTrainedModel:
        """The model as its library draws it."""
        return model(self.family, width, **self.changes(width))

    def recipe(self, rule: str = "mup") -> Recipe:
        """Tuned at the narrowest model, every multiplier 1."""
        hyperparameters = {"lr": LEARNING_RATE}
        return recipe_at(self.config(self.widths[0]), hyperparameters=hyperparameters, parametrization={"rule": rule})


CASES = {
    **{family: Case(family) for family in FAMILIES},
    "gpt2, untied": Case("gpt2", lambda _width: {"tie_word_embeddings": False}),
    # As OPT-350M is: norms after the sums, none before the readout, embeddings narrower than the blocks.
    "opt, post-norm": Case("opt", lambda width: {"do_layer_norm_before": False, "word_embed_proj_dim": width // 2}),
}


@dataclass(frozen=True)
class Run:
    """A model with its optimizer."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    inputs: Mapping[str, Tensor]

    def forward(self) -> Any:
        """The model's output on the batch."""
        return self.model(**self.inputs)

    def step(self) -> None:
        """One step of training."""
        self.optimizer.zero_grad()
        self.forward().loss.backward()
        self.optimizer.step()


def inputs(family: str) -> dict[str, Tensor]:
    """The batch: random, and the same at every width."""
    generator = torch.Generator().manual_seed(1)

    def integers(bound: int, *shape: int) -> Tensor:
        return torch.randint(bound, shape, generator=generator)

    if family in {"vit", "resnet"}:
        side = 16 if family == "vit" else 32
        return {
            "pixel_values": torch.randn(BATCH, 3, side, side, generator=generator),
            "labels": integers(10, BATCH),
        }
    batch = {name: integers(VOCABULARY, BATCH, LENGTH) for name in ("input_ids", "labels")}
    return {**batch, "next_sentence_label": integers(2, BATCH)} if family == "bert" else batch


# ---- two ways to the same run --------------------------------------------------------------------------------------


def planned(case: Case, width: int, seed: int, plan: Plan) -> Run:
    """The model with a plan, and torch's AdamW with the plan's groups."""
    built = _drawn(case, width, seed)
    apply_plan(built, plan)
    optimizer = torch.optim.AdamW(param_groups(built.named_parameters(), plan))
    return Run(built, optimizer, inputs(case.family))


def with_mup(case: Case, width: int, seed: int, plan: Plan) -> Run:
    """The model as microsoft/mup's user would change it, from the weights of `planned`."""
    base = case.widths[0]
    built = _drawn(case, width, seed)
    hf_oracle.mup_shapes(case.family, built, case.config(base), case.config(2 * base))
    # T5's own 1/√d_model stays what it is at the base, which mup leaves to its user.
    readout: Any = built.get_submodule(hf_oracle.READOUTS[case.family][0])
    readout.output_mult = 1.0 / plan.stock_readout_ratio
    built.load_state_dict(planned(case, width, seed, plan).model.state_dict())
    optimizer = hf_oracle.optimizer_of(built, "adam", lr=plan.lr, weight_decay=plan.weight_decay, eps=plan.adam_eps)
    return Run(built, optimizer, inputs(case.family))


def _drawn(case: Case, width: int, seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    built = case.model(width)
    built.train()  # batch norms look at the batch; nothing drops out
    return built


# ---- sizes ---------------------------------------------------------------------------------------------------------


@contextmanager
def recorded(run: Run, family: str) -> Iterator[dict[str, Tensor]]:
    """The outputs of forward passes inside, as "location: module"."""
    found: dict[str, Tensor] = {}

    def keep(key: str, _module: nn.Module, _args: Any, output: Any) -> None:
        found[key] = (output[0] if isinstance(output, tuple) else output).detach().clone()

    hooks = [
        module.register_forward_hook(partial(keep, f"{location}: {name}"))
        for name, module in run.model.named_modules()
        for location, pattern in LOCATIONS[family].items()
        if re.fullmatch(pattern, name)
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def updates(run: Run, family: str) -> dict[int, Sizes]:
    """After each of STEPS, how far each activation is from where it started."""

    def activations() -> dict[str, Tensor]:
        with recorded(run, family) as found, torch.no_grad():
            run.forward()
        return found

    start = activations()
    assert counted(start) == COUNTS[family], list(start)
    sizes = {}
    for step in range(1, STEPS[-1] + 1):
        run.step()
        if step in STEPS:
            sizes[step] = {name: rms(now - start[name]) for name, now in activations().items()}
    return sizes


def counted(names: Iterable[str]) -> dict[str, int]:
    """Location → how many."""
    found: dict[str, int] = {}
    for name in names:
        found[location_of(name)] = found.get(location_of(name), 0) + 1
    return found


def location_of(name: str) -> str:
    """Of a name that `recorded` gives."""
    return name.partition(": ")[0]


def gradients(run: Run, after: int) -> Sizes:
    """Root mean squares of the gradients after so many steps, by parameter."""
    for _ in range(after):
        run.step()
    run.optimizer.zero_grad()
    run.forward().loss.backward()
    return {name: rms(p.grad) for name, p in run.model.named_parameters() if p.grad is not None}


# ---- slopes --------------------------------------------------------------------------------------------------------

Slopes = dict[tuple[int, str], float]
"""(step, "location: module") → slope."""

Plans = Mapping[int, Plan]
"""Width → its plan."""

Start = Callable[[Case, int, int, Plan], Run]


def plans_of(case: Case, rule: str = "mup") -> Plans:
    """The plans of a recipe that was tuned at the narrowest model."""
    return _plans(case, rule, case.widths)


def plans_of_extremes(case: Case, rule: str = "mup") -> Plans:
    """Those of the narrowest and of the widest model: what goes wrong with width shows in two."""
    return _plans(case, rule, case.widths[::2])


def _plans(case: Case, rule: str, widths: Iterable[int]) -> Plans:
    recipe = case.recipe(rule)
    return {width: plan_for(with_class(case.family, case.config(width)), recipe) for width in widths}


def update_slopes(case: Case, plans: Plans, seed: int, *, start: Start = planned) -> Slopes:
    """Of log(size of an activation's update) over log(width), after each of STEPS."""
    runs = {width: updates(start(case, width, seed, plan), case.family) for width, plan in plans.items()}
    return {
        (step, name): slope
        for step in STEPS
        for name, slope in slopes({width: [run[step]] for width, run in runs.items()}).items()
    }


def gradient_slopes(case: Case, plans: Plans, seeds: Iterable[int], *, after: int = 0) -> dict[str, float]:
    """Of log(size of the gradient after so many steps) over log(width), by parameter."""
    return slopes({w: [gradients(planned(case, w, seed, plan), after) for seed in seeds] for w, plan in plans.items()})


def eps_slopes(plans: Plans) -> dict[str, float]:
    """The slope of the plans' eps, by parameter."""
    return slopes({width: [_eps(plan)] for width, plan in plans.items()})


def _eps(plan: Plan) -> dict[str, float]:
    return {entry.name: entry.eps for entry in plan.entries if entry.eps is not None}


def mean(of_seeds: Sequence[Slopes]) -> Slopes:
    """The slopes of the seeds' geometric means."""
    return {key: fmean(found[key] for found in of_seeds) for key in of_seeds[0]}


def standard_error(of_seeds: Sequence[Slopes]) -> Slopes:
    """That of `mean`."""
    return {key: stdev(found[key] for found in of_seeds) / math.sqrt(len(of_seeds)) for key in of_seeds[0]}
