"""The formulas of Megatron-Core's own μP, for each parameter of a launch line's model."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.architectures.names import READOUT_WEIGHT, WORD_EMBEDDINGS
from mup_megatron.architectures.registry import architecture_of
from mup_megatron.megatron.optimizers import MEGATRON_OPTIMIZERS, MegatronOptimizer
from mup_megatron.theory import PlanEntry
from mup_megatron.theory.rules import softmax_scale


@dataclass(frozen=True, slots=True)
class NativeValues:
    """The values that native μP gives to one parameter; None as in a plan's entry."""

    init_std: float | None
    lr: float
    min_lr: float
    eps: float | None
    weight_decay: float


@dataclass(frozen=True, slots=True)
class Native:
    """Native μP of one launch line: the formulas of Megatron-Core 0.17 to 0.19."""

    model: ModelFile
    values: Mapping[str, Any]

    @property
    def base_hidden_size(self) -> int:
        """The model's own width where none is given."""
        return self.values["mup_base_hidden_size"] or self.model.hidden_size

    @property
    def width_mult(self) -> float:
        """m, the one ratio for all of the model."""
        return self.model.hidden_size / self.base_hidden_size

    @property
    def rules(self) -> MegatronOptimizer:
        """The factors of this optimizer."""
        return MEGATRON_OPTIMIZERS[self.values["optimizer"]]

    def lr_factor(self, *, hidden: bool) -> float:
        """Returns the factor of a learning rate."""
        assert self.rules.native_lr is not None, "refused"
        return self.rules.native_lr(hidden, self.width_mult)

    @property
    def softmax_scale(self) -> float:
        """√base_head_dim / d**power."""
        base = self.values["mup_base_head_dim"]
        return float((1.0 if base is None else base**0.5) / self.model.head_size ** self.values["mup_attn_scale_power"])

    def attention_multiplier(self, base_head_size: int | None = None) -> float:
        """Returns what makes up for another scale of attention than that of a base with this head size.

        By default the base has the model's own.
        """
        own = self.model.head_size
        alone = softmax_scale(base_head_size=base_head_size or own, head_size=own, alpha=1.0)
        ratio = self.softmax_scale / alone
        return 1.0 if math.isclose(ratio, 1.0, rel_tol=1e-12) else ratio

    @property
    def output_multiplier(self) -> float:
        """The factor of the logits: 1/m, or the factor that is given in its place."""
        given = float(self.values["mup_output_mult"])
        return 1.0 / self.width_mult if given == 1.0 else given

    def of(self, entry: PlanEntry) -> NativeValues:
        """Returns the values of a parameter."""
        v, m = self.values, self.width_mult
        hidden = not entry.is_vector and not (entry.is_embedding or entry.is_readout)
        rules, factor = self.rules, self.lr_factor(hidden=hidden)
        lr, min_lr = v["lr"] * factor, v["min_lr"] * factor
        if v["decoupled_lr"] is not None and entry.name in (WORD_EMBEDDINGS, READOUT_WEIGHT):
            # An absolute value, with the floor of all others if it has none of its own.
            lr, min_lr = v["decoupled_lr"], v["min_lr"] if v["decoupled_min_lr"] is None else v["decoupled_min_lr"]
        eps = None if rules.native_eps is None else v["adam_eps"] * rules.native_eps(hidden, m)
        return NativeValues(self._std(entry), lr, min_lr, eps, 0.0 if entry.is_vector else v["weight_decay"])

    def _std(self, entry: PlanEntry) -> float | None:
        sigma = self.values["init_method_std"]
        embedding = self.values["embedding_init_method_std"]
        if entry.is_vector:
            return None
        if entry.is_embedding or entry.is_readout:
            return float(sigma if embedding is None else embedding)
        branches = architecture_of(self.model).branches * self.model.num_layers if entry.is_residual else 1
        return float(sigma / math.sqrt(branches * self.width_mult))
