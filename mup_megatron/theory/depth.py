"""Depth as an axis: what the layers of a deeper stack get, relative to a base of fewer, times the rules of width.

The aim is that of width: at any depth the residual stream, and what one step of training changes in it, keep their
size. A stream is a sum over its branches. At initialisation its terms are independent and it grows as √L; what steps
change in them is coherent, and grows as L.

    m_L = layers(target) / layers(base), of a tensor's own stack

                            in blocks                      embedding, final norm, readout, what stands behind
    multiplier of a branch  m_L^−α                         –
    learning rate, Adam     m_L^(α−1)                      1
                   SGD      m_L^(2α−1)                     1
    eps (Adam)              m_L^−α                         1
    weight decay, AdamW     m_L^(1−α), matrices alone      1
                  SGD       m_L^(1−2α), matrices alone     1
    init std                that of the base's depth       likewise

- Each branch is multiplied, and so its weights' gradient: eps follows it. A step of Adam changes a branch by its
  learning rate times the multiplier, m_L^(α−1) · m_L^−α = 1/m_L, and L of them by a constant. SGD's step is made of
  the gradient, so it is that much smaller by itself.
- α = 1 keeps what every layer learns as nonlinear as at the base, and moves no learning rate. α = ½ lets the branches'
  starts add up to a constant, and each layer's change become linear.
- Norm gains, biases and routers in blocks have the factors too: their gradient passes the same branch.
- Weight decay keeps its product with the learning rate (WA, as `optimizers.py` has it). Vectors have none.
- Megatron's own 1/√(2L) in the start of what writes into the stream is for the base's L: the branch multiplier stands
  for the rest, and with both depth would be counted twice.
- An orthogonalised update does not see the branch multiplier either: its learning rate has Adam's factor.

Sources
    CP    Don't be lazy: CompleteP enables compute-efficient deep transformers, arXiv 2505.01618: Table 1 (α, LR, eps,
          weight decay; tuned at 2 layers, measured to 128)
    TP6   Tensor Programs VI, arXiv 2310.02244: α = ½, and SGD's learning rate
    WA    arXiv 2405.13698, as in `rules.py`
"""

from dataclasses import dataclass

from mup_megatron.theory.optimizers import power


@dataclass(frozen=True, slots=True)
class CompleteP:
    """The rule of depth, with its exponent α of the branches."""

    alpha: float = 1.0

    def branch(self, ratio: float) -> float:
        """Returns the multiplier of a residual branch in a stack so many times as deep as the base's (CP Table 1)."""
        return power(ratio, -self.alpha)

    def learning_rate(self, ratio: float, *, step: int) -> float:
        """Returns the factor of a learning rate; `step` says how an optimizer's step grows with the gradient."""
        return power(ratio, self.alpha - 1.0 + self.alpha * step)

    def epsilon(self, ratio: float) -> float:
        """Returns the factor of eps, which follows the gradient."""
        return power(ratio, -self.alpha)

    def weight_decay(self, ratio: float, *, step: int) -> float:
        """Returns the factor of weight decay, which keeps its product with the learning rate."""
        return 1.0 / self.learning_rate(ratio, step=step)

    def stack(self, base: int, target: int, *, step: int) -> "Deepening":
        """Returns what a stack of `target` layers gets if the base's has `base`."""
        ratio = target / base
        return Deepening(
            base_layers=base,
            layers=target,
            branch=self.branch(ratio),
            lr=self.learning_rate(ratio, step=step),
            eps=self.epsilon(ratio),
            weight_decay=self.weight_decay(ratio, step=step),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Deepening:
    """A stack at base and target, and the factors that its depth gives: for people, and for what has no entry."""

    base_layers: int
    layers: int
    branch: float
    lr: float
    """Under the plan's optimizer."""
    eps: float
    weight_decay: float
    """Of matrices."""

    @property
    def ratio(self) -> float:
        """The ratio of the two depths, m_L."""
        return self.layers / self.base_layers
