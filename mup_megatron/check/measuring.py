"""Trains one model for a few steps and measures it, whoever built it and however its ranks share it.

Every number is made of sums over elements, so that ranks that hold shards add theirs up, and ranks that hold copies
change nothing. Spectral norms alone need whole matrices.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from mup_megatron.check import measurements
from mup_megatron.check.measurements import Key, Quantity, Run
from mup_megatron.check.replay import AdamReplay, Replay, SGDReplay, Sums, rms_of, sample

At = Literal["input", "output"]


class Trainee(Protocol):
    """A model with its optimizer, ready to train: this rank's part of it."""

    def modules(self) -> Iterable[tuple[str, nn.Module, At]]:
        """(global name, module, whether its input or output is looked at) of what this rank holds."""

    def parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        """(global name, this rank's shard or whole of it), each once."""

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """As the optimizer saw it in the last step; None where this rank cannot say."""

    def gradient_norm(self) -> float | None:
        """Of all gradients in a step, before they were clipped, the same on all ranks; None if it is not known."""

    def replay(self) -> Replay | None:
        """A new replay of one tensor's optimizer state; None for an optimizer that none is written for."""

    def forward(self) -> None:
        """A forward pass on the batch that activations are compared on; trains nothing."""

    def step(self, step: int) -> float:
        """Forward, backward, update on the batch of a step, counted from 0. Returns the loss, the same on all ranks."""

    def whole(self, name: str, shard: Tensor) -> Tensor | None:
        """A whole matrix from the ranks' shards, on the ranks that can say. Collective among those that hold it."""

    def gathered(self, value: Any) -> list[Any]:
        """The values of all ranks. Collective."""


def measure(trainee: Trainee, protocol: measurements.Protocol, *, width: int, seed: int) -> Run:
    """One run. Collective; every rank returns the same.

    Args:
        trainee: freshly built.
        protocol: how long, and when to look.
        width: that it has.
        seed: that it was built with.
    """
    recorder = Recorder(trainee, protocol)
    problem = recorder.start()
    losses: list[float] = []
    norms: dict[Key, float] = {}
    for step in range(protocol.steps if problem is None else 0):
        recorder.before_step()
        loss = trainee.step(step)
        losses.append(loss)
        if (norm := trainee.gradient_norm()) is not None and step + 1 in protocol.recorded:
            norms[Key(Quantity.NORM, "all gradients", step + 1)] = norm
        problem = recorder.after_step(step + 1, loss)
        if problem is not None:
            break
    values = recorder.values() | norms
    values |= {Key(Quantity.LOSS, "loss", step + 1): loss for step, loss in enumerate(losses)}
    return Run(width, seed, values, tuple(losses), problem)


class Recorder:
    """Measures a model whose steps somebody else takes: `start`, then `before_step` and `after_step` around each, then
    `values`. Collective in all that it does.
    """

    def __init__(self, trainee: Trainee, protocol: measurements.Protocol) -> None:
        self._trainee = trainee
        self._protocol = protocol
        self._parameters = list(trainee.parameters())
        self._replays = {name: replay for name, _ in self._parameters if (replay := trainee.replay()) is not None}
        self._first = {name: p.detach().clone() for name, p in self._parameters}
        self._sampled = {name: sample(p) for name, p in self._parameters}
        self._before: dict[str, Tensor] = {}
        self._activations: dict[str, Tensor] = {}
        self._squares: dict[Key, tuple[float, float]] = {}
        """Sum of squares and count."""
        self._shares: dict[Key, tuple[float, float]] = {}
        """Of how many, out of how many."""
        self._overlaps: dict[Key, tuple[float, float]] = {}
        self._equations: dict[tuple[str, int], Sums] = {}
        self._spectral: dict[Key, float] = {}

    def start(self) -> str | None:
        """Looks at the model before training; returns what makes it no use to go on."""
        self._activations = self._recorded()
        again = self._recorded()
        differing = [n for n, x in self._activations.items() if not torch.equal(x, again[n]) and x.isfinite().all()]
        bad = [name for name, x in self._activations.items() if not x.isfinite().all() and not name.endswith(_MASKED)]
        for name, x in self._activations.items():
            self._note(Key(Quantity.ACTIVATION, name, 0), x)
        for name, w in self._first.items():
            self._note(Key(Quantity.INITIAL, name, 0), w)
        differing, bad = self._of_all(differing), self._of_all(bad)
        if bad:
            return f"{bad[0]}: not finite before the first step"
        if differing:
            return f"{differing[0]}: not deterministic, two forward passes on one batch differ"
        return None

    def before_step(self) -> None:
        """Keeps some of each weight as it is."""
        self._before = {name: self._some(name, p.detach()).clone() for name, p in self._parameters}

    def after_step(self, step: int, loss: float) -> str | None:
        """Looks at what a step did; returns what makes it no use to go on."""
        broken = []
        record = step in self._protocol.recorded
        for name, parameter in self._parameters:
            gradient = self._trainee.gradient(parameter)
            now, before = parameter.detach(), self._before[name]
            sampled = self._some(name, now)
            if gradient is not None:
                if record:
                    self._note(Key(Quantity.GRADIENT, name, step), gradient)
                    rows = gradient.reshape(len(gradient), -1) if gradient.dim() else gradient.reshape(1, 1)
                    dead = (rows == 0).all(dim=1)
                    self._shares[Key(Quantity.DEAD, name, step)] = (dead.sum().item(), len(rows))
                if (replay := self._replays.get(name)) is not None:
                    replay.observe(self._some(name, gradient), before)
                    if record or step == 1:
                        self._equations[name, step] = replay.sums(before, sampled - before)
            if not sampled.isfinite().all():
                broken.append(name)
        broken = self._of_all(broken)
        if broken or not math.isfinite(loss):
            what = f"{broken[0]}: not finite" if broken else "loss: not finite"
            return f"{what} after {step} step{'s' if step > 1 else ''}"
        if record:
            for name, x in self._recorded().items():
                self._note(Key(Quantity.UPDATE, name, step), x - self._activations[name])
            for name, parameter in self._parameters:
                first = self._first[name].double()
                both = (parameter.detach().double() * first).sum().item()
                self._overlaps[Key(Quantity.OVERLAP, name, step)] = (both, first.square().sum().item())
        if step == self._protocol.steps and self._protocol.spectral:
            self._take_spectral_norms(step)
        return None

    def _take_spectral_norms(self, step: int) -> None:
        for name, parameter in self._parameters:
            if parameter.dim() != 2:
                continue
            update = self._trainee.whole(name, parameter.detach() - self._first[name])
            if update is not None:
                rows, columns = update.shape
                self._spectral[Key(Quantity.SPECTRAL, name, step)] = _spectral_norm(update) / math.sqrt(rows / columns)

    def values(self) -> dict[Key, float]:
        """Everything that was measured, over all ranks. Collective."""
        squares: dict[Key, Any] = {}
        shares: dict[Key, Any] = {}
        overlaps: dict[Key, Any] = {}
        equations: dict[tuple[str, int], Any] = {}
        spectral: dict[Key, float] = {}
        own = (self._squares, self._shares, self._overlaps, self._equations, self._spectral)
        for of_rank in self._trainee.gathered(own):
            _add(squares, of_rank[0])
            _add(shares, of_rank[1])
            _add(overlaps, of_rank[2])
            _add(equations, of_rank[3])
            spectral |= of_rank[4]
        found = {key: rms_of(*sums) for key, sums in squares.items()}
        found |= {key: float(some / of) for key, (some, of) in shares.items()}
        found |= {key: float(both / itself) for key, (both, itself) in overlaps.items() if itself > 0}
        found |= spectral
        for (name, step), sums in equations.items():
            # Told by their shape: a rank may have seen none of them itself.
            fitted = (AdamReplay if len(sums) == AdamReplay.COLUMNS else SGDReplay).fitted(sums)
            if fitted.lr is not None:
                found[Key(Quantity.LEARNING_RATE, name, step)] = fitted.lr
            found[Key(Quantity.UNEXPLAINED, name, step)] = fitted.unexplained
            if fitted.eps is not None:
                found[Key(Quantity.EPS, name, step)] = fitted.eps
            if fitted.weight_decay is not None:
                found[Key(Quantity.WEIGHT_DECAY, name, step)] = fitted.weight_decay
        return found

    def _recorded(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}

        def keep(name: str, at: At) -> Callable[..., None]:
            def output_hook(_module: nn.Module, _args: Any, output: Any) -> None:
                found[name] = _plain(output)

            def input_hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
                found[name] = _plain(args[0])

            return output_hook if at == "output" else input_hook

        hooks = [
            module.register_forward_hook(keep(name, at))
            if at == "output"
            else module.register_forward_pre_hook(keep(name, at))
            for name, module, at in self._trainee.modules()
        ]
        try:
            with torch.no_grad():
                self._trainee.forward()
        finally:
            for hook in hooks:
                hook.remove()
        return found

    def _some(self, name: str, x: Tensor) -> Tensor:
        return x.flatten()[self._sampled[name]]

    def _note(self, key: Key, x: Tensor) -> None:
        self._squares[key] = (x.double().square().sum().item(), x.numel())

    def _of_all(self, names: list[str]) -> list[str]:
        return [name for of_rank in self._trainee.gathered(names) for name in of_rank]


def _add(total: dict[Any, Any], part: Mapping[Any, Any]) -> None:
    """Adds up sums by key."""
    for key, sums in part.items():
        total[key] = np.asarray(sums) + total[key] if key in total else np.asarray(sums)


_MASKED = "scale_mask_softmax"


def _plain(output: Any) -> Tensor:
    """A copy: Megatron masks attention logits in place. With the bias that its linear layers leave to what follows."""
    if isinstance(output, tuple):
        output, *rest = output
        bias = rest[0] if rest and isinstance(rest[0], Tensor) and rest[0].dim() == 1 else None
        output = output if bias is None else output + bias
    result: Tensor = output.detach().clone()
    return result


def _spectral_norm(matrix: Tensor) -> float:
    """From the smaller Gram matrix, whose eigenvalues cost less than the matrix's singular values."""
    m = matrix.double()
    gram = m @ m.T if m.shape[0] <= m.shape[1] else m.T @ m
    largest: float = torch.linalg.eigvalsh(gram)[-1].clamp(min=0).sqrt().item()
    return largest
