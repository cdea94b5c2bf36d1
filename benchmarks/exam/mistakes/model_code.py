"""Mistakes in the code of a model or of its loss, which the check's reference has too."""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from exam import models
from exam.mistakes.entries import mistake
from exam.setups import Modules, Setup


class _LengthNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * functional.normalize(x, dim=-1)


@mistake("lm", "model code", "norm", "norm.*", "readout*", breaks="transfer")
def final_norm_of_unit_length(setup: Modules) -> Setup:
    """The final norm divides by the length of a vector and not by its root mean square."""
    return setup.with_model("final-norm-of-unit-length", lambda w: models.Lm(w, final=_LengthNorm))


@mistake("lm", "model code", "blocks.*.attention*", breaks="transfer")
def heads_averaged(setup: Modules) -> Setup:
    """The outputs of the heads, of which a wider model has more, are averaged, and every head's place gets the mean."""

    class Averaged(models.SelfAttention):
        def attended(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = super().attended(q, k, v)
            return out.mean(1, keepdim=True).expand_as(out)

    return setup.with_model("heads-averaged", lambda w: models.Lm(w, attention=Averaged))


@mistake("lm", "model code", "blocks.*", breaks="transfer")
def branch_gains_from_width(setup: Modules) -> Setup:
    """What attention and MLP add is multiplied by a trained gain for each channel that starts at 1/√width."""

    class Scaled(nn.Module):
        def __init__(self, width: int, branch: Any) -> None:
            super().__init__()
            self.branch, self.scale = branch(width), nn.Parameter(torch.full((width,), width**-0.5))

        def forward(self, x: Tensor) -> Tensor:
            scaled: Tensor = self.scale * self.branch(x)
            return scaled

    parts = {"attention": models.SelfAttention, "mlp": models.Mlp}
    changed = {key: partial(Scaled, branch=part) for key, part in parts.items()}
    return setup.with_model("branch-gains-from-width", lambda w: models.Lm(w, **changed))


@mistake("lm", "model code", "blocks.*.attention*", breaks="transfer")
def logits_over_root_of_width(setup: Modules) -> Setup:
    """Attention logits are divided by the root of the model's width, where the size of heads belongs."""

    class OverWidth(models.SelfAttention):
        def attended(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            scale = self.out.in_features**-0.5
            return functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)

    return setup.with_model("logits-over-root-of-width", lambda w: models.Lm(w, attention=OverWidth))


@mistake("lm", "model code", "blocks.0*", "tokens*", breaks="transfer")
def positions_of_unit_length(setup: Modules) -> Setup:
    """Fixed sinusoidal positions are vectors of length 1 at every width, and are added to embeddings that grow."""

    class Fixed(models.Lm):
        def __init__(self, width: int) -> None:
            super().__init__(width, positions=False)
            angles = torch.outer(torch.arange(models.LENGTH), 100.0 ** -(torch.arange(width // 2) * 2 / width))
            table = torch.cat([angles.sin(), angles.cos()], dim=1)
            self.register_buffer("table", functional.normalize(table, dim=-1))

        def embedded(self, tokens: Tensor) -> Tensor:
            table: Any = self.table
            return super().embedded(tokens) + table[: tokens.shape[1]]

    return setup.with_model("positions-of-unit-length", Fixed)


@mistake("lm", "model code", "blocks.0*", "tokens*", breaks="transfer")
def tokens_of_unit_length(setup: Modules) -> Setup:
    """The vectors of tokens are divided by their length before they enter the residual stream."""

    class Normalised(models.Lm):
        def embedded(self, tokens: Tensor) -> Tensor:
            return functional.normalize(super().embedded(tokens), dim=-1)

    return setup.with_model("tokens-of-unit-length", Normalised)


@mistake("lm-tied", "model code", "readout*", "tokens*", breaks="transfer")
def tied_logits_over_root_of_width(setup: Modules) -> Setup:
    """A model with a tied table divides its logits by √width in its code, and the plan by the ratio of widths."""

    class Divided(models.Lm):
        def predicted(self, x: Tensor) -> Tensor:
            return super().predicted(x / x.shape[-1] ** 0.5)

    return setup.with_model("tied-logits-over-root-of-width", lambda w: Divided(w, tied=True))


@mistake("lm", "model code", "blocks.*.mlp*", breaks="transfer")
def layers_divided_by_root_of_fan_in(setup: Modules) -> Setup:
    """The MLP's layers have weights of std 1 and divide what they compute by √fan_in in their code."""

    class Divided(nn.Linear):
        def reset_parameters(self) -> None:
            nn.init.normal_(self.weight)
            nn.init.zeros_(self.bias)

        def forward(self, x: Tensor) -> Tensor:
            return functional.linear(x / self.in_features**0.5, self.weight, self.bias)

    changed = setup.with_model(
        "layers-divided-by-root-of-fan-in", lambda w: models.Lm(w, mlp=partial(models.Mlp, linear=Divided))
    )
    return replace(changed, hyperparameters={**setup.hyperparameters, "lr": 0.02})


@mistake("lm", "model code", "blocks.*.attention*", breaks="transfer")
def window_from_width(setup: Modules) -> Setup:
    """Attention sees as many positions back as width/16: more in a wider model."""

    class Windowed(models.SelfAttention):
        def attended(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            n = torch.arange(q.shape[-2])
            back = n[:, None] - n
            seen = (back >= 0) & (back < self.out.in_features // 16)
            return functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=self.scaling)

    return setup.with_model("window-from-width", lambda w: models.Lm(w, attention=Windowed))


@mistake("lm-gated", "model code", "blocks.*.mlp*", breaks="transfer")
def gate_by_softmax(setup: Modules) -> Setup:
    """The MLP's gate is a softmax over its channels, so that all of them together let through 1."""

    class Soft(models.GatedMlp):
        def gated(self, x: Tensor) -> Tensor:
            return x.softmax(-1)

    return setup.with_model("gate-by-softmax", lambda w: models.Lm(w, mlp=Soft))


@mistake("lm-gated", "model code", "blocks.*.mlp*", breaks="transfer")
def gate_by_sum(setup: Modules) -> Setup:
    """One gate for all channels is the sigmoid of their sum, not of their mean."""

    class Summed(models.GatedMlp):
        def gated(self, x: Tensor) -> Tensor:
            return x.sum(-1, keepdim=True).sigmoid() * functional.silu(x)

    return setup.with_model("gate-by-sum", lambda w: models.Lm(w, mlp=Summed))


@mistake("lm", "model code", "temperature", "readout*", breaks="transfer")
def temperature_from_width(setup: Modules) -> Setup:
    """A trained temperature of the logits starts at width/32."""

    class Tempered(models.Lm):
        def __init__(self, width: int) -> None:
            super().__init__(width)
            self.temperature = nn.Parameter(torch.full((1,), width / models.BASE))

        def predicted(self, x: Tensor) -> Tensor:
            return self.temperature * super().predicted(x)

    return setup.with_model("temperature-from-width", Tempered)


@mistake("lm", "model code", "blocks.*.attention*", breaks="transfer")
def values_scaled_by_a_buffer(setup: Modules) -> Setup:
    """Values are multiplied by a buffer that holds 1/√(number of heads)."""

    class Buffered(models.SelfAttention):
        def __init__(self, width: int) -> None:
            super().__init__(width)
            self.register_buffer("factor", torch.full((1,), (width / models.HEAD) ** -0.5))

        def attended(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            factor: Any = self.factor
            return super().attended(q, k, v * factor)

    return setup.with_model("values-scaled-by-a-buffer", lambda w: models.Lm(w, attention=Buffered))


@mistake("towers", "model code", breaks="transfer")
def product_of_towers_over_root_of_width(setup: Modules) -> Setup:
    """The score of a pair is the product of two vectors over √width, as if they stayed independent in training."""

    class Rooted(models.Towers):
        def scored(self, u: Tensor, v: Tensor) -> Tensor:
            return u @ v.T * u.shape[-1] ** -0.5

    return setup.with_model("product-of-towers-over-root-of-width", Rooted)


@mistake("lm", "training loop", breaks="transfer")
def activations_punished_by_their_sum(setup: Modules) -> Setup:
    """The loss has a penalty on squared activations that is summed over channels."""

    def loss(model: Any, tokens: Tensor) -> Tensor:
        x = model.embedded(tokens[:, :-1])
        for block in model.blocks:
            x = block(x)
        logits = model.predicted(model.norm(x))
        penalty = 0.02 * x.square().sum(-1).mean()
        return functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()) + penalty

    return setup.with_loss("activations-punished-by-their-sum", loss)


@mistake("lm", "training loop", breaks="transfer")
def weights_punished_in_the_loss(setup: Modules) -> Setup:
    """The loss has the sum of all squared weights in it, beside the optimizer's own weight decay."""

    def loss(model: Any, tokens: Tensor) -> Tensor:
        return setup.loss(model, tokens) + 1e-3 * sum(p.square().sum() for p in model.parameters())

    return setup.with_loss("weights-punished-in-the-loss", loss)


@mistake("convnet", "model code", breaks="transfer")
def channels_summed(setup: Modules) -> Setup:
    """What a convolutional block adds is weighted by one sigmoid of all channels' sum, where their mean belongs."""

    class Weighted(models.ConvBlock):
        def forward(self, x: Tensor) -> Tensor:
            added = self.conv(torch.relu(self.norm(x)))
            return x + added * 2 * added.mean((2, 3), keepdim=True).sum(1, keepdim=True).sigmoid()

    def factory(width: int) -> nn.Module:
        net = models.ConvNet(width)
        norm = partial(nn.GroupNorm, 4)
        net.blocks = nn.ModuleList(Weighted(width, norm=norm) for _ in range(2))
        return net

    return setup.with_model("channels-summed", factory)
