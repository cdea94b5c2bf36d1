"""The rules of μP on one page: what every parameter gets, by its role, relative to the base.

The aim: at any width, what each layer computes, and how much one step of training changes it, keep their size. Then
what is best for one width is best for all.

- A layer sums over its fan_in n inputs. At initialisation the terms are independent and the sum grows as √n, so hidden
  weights start with σ/√r_in.
- A step of Adam moves every weight by about η, and all terms in the direction that helps: coherent, so what it changes
  in the sum grows as n. Hidden weights get η/r_in.
- The readout is trained from the first step on to agree with its input, so its sum is coherent as well: it is
  multiplied by 1/r_in. Through that multiplier its gradient is 1/r_in as large, which Adam does not see: its η stays.
- An embedding is looked up, not summed, and a bias or gain is added or multiplied: nothing grows, nothing changes.
- The gradient of every weight shrinks as its fan_out grows, because each of more outputs matters less. Adam's eps
  stands beside it, and SGD's step is made of it.

                         embedding, bias, gain    hidden             readout
    role                 input                    hidden             output
    init std             σ                        σ / √r_in          σ
    multiplier           α_in                     1                  α_out / r_in
    learning rate, Adam  η                        η / r_in           η
                   SGD   η · r_out                η · r_out / r_in   η · r_in
    eps (Adam)           ε / r_out                ε / r_out          ε / r_in
    weight decay, AdamW  λ                        λ · r_in           λ
                  SGD    λ / r_out                λ · r_in / r_out   λ / r_in
    attention logits: α_attn · √d_base / d instead of 1/√d, since queries and keys become coherent too

At the base r_in = r_out = 1, every factor is 1, and μP is standard parametrization. A tensor's role decides the
factors; its properties (`tensors.py`) decide whether it carries α, Megatron's 1/√(2L), or no weight decay, and whether
its multiplier is folded into it (`folding.py`).

    r_in   fan_in(target) / fan_in(base) of this tensor if that side grows with width, else 1; r_out likewise
    σ, η, ε, λ, α   init std, learning rate, Adam's epsilon, weight decay and multipliers as tuned at the base

Sources
    TP5   Tensor Programs V, arXiv 2203.03466: Table 8 (with every width taken relative to the base), App. B.3 (eps)
    SC    A Spectral Condition for Feature Learning, arXiv 2310.17813
    WA    How to set AdamW's weight decay as you scale model and dataset size, arXiv 2405.13698
    M     Megatron-Core's own conventions, which hold at any width

Here are the rules of init and forward pass; those of learning rate, eps and weight decay are `optimizers.py`'s, one
object for each optimizer. Applying all of them to a model is in `build.py`.
"""

import math
from collections.abc import Mapping
from enum import StrEnum

from mup_megatron.theory.optimizers import EVERYWHERE, Factor, Power
from mup_megatron.theory.tensors import Property, Role
from mup_megatron.theory.widths import Scaling


class Rule(StrEnum):
    """A way in which hyperparameters follow width."""

    MUP = "mup"
    STANDARD = "standard"
    """Every tensor gets the base's values, whatever its width: the comparison that shows what μP does."""


# TP5 Table 8: variance 1/fan_in for hidden weights, constant elsewhere.
INIT_STD: Mapping[Role, Factor] = {**EVERYWHERE, Role.HIDDEN: Power(r_in=-0.5)}

# TP5 Table 8: the readout's 1/fan_in.
MULTIPLIER: Mapping[Role, Factor] = {**EVERYWHERE, Role.OUTPUT: Power(r_in=-1)}


def init_std(role: Role, properties: frozenset[Property], s: Scaling, *, sigma: float) -> float:
    """Returns the std of the initial draw (TP5 Table 8).

    A matrix that writes into the residual stream keeps Megatron's further 1/√(2L), 2L being the target's branches (M).
    """
    std = sigma * INIT_STD[role](s)
    return std / math.sqrt(s.depth.target) if Property.RESIDUAL in properties else std


def carried_init_std(role: Role, s: Scaling, *, std_at_base: float) -> float:
    """Returns the std of a library's own initial draw: the base's, carried to the target by the role's power."""
    return std_at_base * INIT_STD[role](s)


def multiplier(
    role: Role, properties: frozenset[Property], s: Scaling, *, embedding: float = 1.0, output: float = 1.0
) -> float:
    """Returns the forward multiplier: α_in for embeddings, α_out/r_in for the readout, 1 elsewhere (TP5 Table 8)."""
    tuned = embedding if Property.EMBEDDING in properties else output if Property.READOUT in properties else 1.0
    return tuned * MULTIPLIER[role](s)


def default_softmax_scale(head_size: int) -> float:
    """Returns 1/√d, the scale of attention logits where nothing else is said."""
    # The same expression as Megatron's, so that an unchanged scale is bitwise unchanged.
    return 1.0 / math.sqrt(head_size)


def stock_scale(head_size: int, stock: float | None) -> float:
    """Returns what an attention multiplies logits by if nothing is said: `stock`, or 1/√d where that is None."""
    return default_softmax_scale(head_size) if stock is None else stock


def softmax_scale(*, base_head_size: int, head_size: int, alpha: float, stock: float | None = None) -> float:
    """Returns the scale of attention logits, α·√d_base/d: 1/d in the head size (TP5 §5, Def. 4.1), 1/√d at the base's.

    `stock` is what a library uses at the base where that is not 1/√d_base; it then falls as 1/d from there.
    """
    if head_size == base_head_size:
        return alpha * stock_scale(head_size, stock)
    if stock is not None:
        return alpha * stock * base_head_size / head_size
    return alpha * math.sqrt(base_head_size) / head_size
