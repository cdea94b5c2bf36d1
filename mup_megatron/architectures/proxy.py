"""Choosing a proxy: a narrow model whose tuned hyperparameters are the target's."""

from dataclasses import dataclass

from mup_megatron.architectures.cost import training_flops
from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.architectures.narrowing import narrowed
from mup_megatron.architectures.registry import architecture_of
from mup_megatron.errors import InputError

MIN_DEPTH = 4
"""Below these sizes TP5 (Table 1 and §6.1) found transfer to get worse."""
MIN_WIDTH = 256
_BRANCHES = 2
"""Residual branches of a layer there: other layers count by theirs."""


@dataclass(frozen=True, slots=True)
class Search:
    """The extent of a search on the proxy for one run of the target."""

    trials: int
    trial_tokens: float
    target_tokens: float

    def fraction(self, proxy: ModelFile, target: ModelFile) -> float:
        """Cost of the search relative to that of the target's run."""
        spent = self.trials * self.trial_tokens * training_flops(proxy).total
        return spent / (self.target_tokens * training_flops(target).total)


@dataclass(frozen=True, slots=True)
class Proxy:
    """A proxy, and in words what differs from the target in more than width."""

    model: ModelFile
    notes: tuple[str, ...]


def choose_proxy(
    target: ModelFile, search: Search, *, width: int = MIN_WIDTH, budget: float = 0.1, depth_rule: bool = False
) -> Proxy:
    """A model of about `width` with the target's head sizes, ranks, ffn ratios, heads per group, experts and layers.

    The depth is the target's, or as much of it as keeps the search within `budget` times the target's cost, but at
    least 4 layers of a GPT or as many residual branches; a pattern of layers keeps whole periods. With a rule of depth
    it is the least, whatever the cost.

    Raises:
        InputError: the target is not wider than the proxy would be.
    """
    # Whole heads of the target's size, in whole key/value groups where the width allows; the target's width per head.
    width_per_head = target.hidden_size / target.num_attention_heads
    heads_per_group = target.num_attention_heads // target.query_groups
    wanted = max(1, round(width / width_per_head))
    groups = max(1, round(wanted / heads_per_group))
    heads = groups * heads_per_group if wanted >= heads_per_group else wanted
    hidden = round(heads * width_per_head)
    if hidden >= target.hidden_size:
        raise InputError(
            f"hidden_size {target.hidden_size}: the target is not wider than a proxy of width {width} would be. "
            "Tune the target itself, or give a smaller --hidden-size."
        )
    notes = []
    if heads // groups != heads_per_group:
        notes.append(
            f"{heads // groups} heads share a key/value group, in the target {heads_per_group}: updates of keys and "
            f"values grow a little with width. Width {round(heads_per_group * width_per_head)} would keep the ratio."
        )
    found = narrowed(target, hidden, target.heads(heads, size=target.head_size, groups=groups))
    notes += [
        f"{each.key} {each.size} is rounded; the target's ratio to hidden_size is "
        f"{each.wider / target.hidden_size:.4g}."
        for each in found.rounded
    ]
    notes += found.notes
    stack = architecture_of(target)
    least = -(-_BRANCHES * MIN_DEPTH // stack.branches)
    model = deep = stack.with_depth(found.model, target.num_layers)
    for depth in range(target.num_layers - 1, least - 1, -1):
        shallower = stack.with_depth(deep, depth)
        if (search.fraction(model, target) <= budget and not depth_rule) or shallower.num_layers < least:
            break
        model = shallower
    depth = model.num_layers
    if depth < target.num_layers and depth_rule:
        before, after = (search.fraction(each, target) for each in (deep, model))
        notes.append(
            f"{depth} of the target's {target.num_layers} layers, which parametrization.depth carries over "
            f"(`recipe --depth-alpha 1`): the search costs {after:.2%} of the target's run in place of {before:.2%}."
        )
    elif depth < target.num_layers:
        notes.append(
            f"{depth} of the target's {target.num_layers} layers, for the cost: transfer over depth is empirical "
            "(TP5 §6.1) and does not cover the init std."
        )
    if search.fraction(model, target) > budget:
        notes.append(f"the search costs more than {budget:.0%} of the target even at {depth} layers: use fewer trials.")
    if hidden < MIN_WIDTH:
        notes.append(f"width {hidden} is below the {MIN_WIDTH} at which transfer was good (TP5): for trying out only.")
    kept = [(size.key, size.of(target) or 0) for size in stack.sizes(target) if size.kept]
    if large := [f"{key} {size}" for key, size in kept if size > hidden]:
        notes.append(
            f"{' and '.join(large)}: kept, as in models of one kind at several widths, and above the proxy's "
            f"hidden_size {hidden}: no bottleneck there. A wider proxy would be more like the target."
        )
    if target.head_size < 32:
        notes.append(f"head size {target.head_size} is below 32: TP5 App. D.4 advises larger heads for the proxy.")
    return Proxy(model, tuple(notes))
