"""Trains one model for a few steps and measures it, whoever built it and however its ranks share it.

Every number is made of sums over elements, so that ranks that hold shards add theirs up, and ranks that hold copies
change nothing. Spectral norms alone need whole matrices.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mup_megatron.check.measure import measurements
from mup_megatron.check.measure.matrices import likeness_of_rows, spectral_norm, turning
from mup_megatron.check.measure.measurements import TURNING, Key, MeasuredRun, Quantity
from mup_megatron.check.measure.replay import FEWEST, Sums, rms_of, sample
from mup_megatron.check.measure.trainee import At, Trainee

_MEANS = (Quantity.CONSTANT, Quantity.SUMMED, Quantity.PLACE)
_PREFIX = 512
"""Elements of a draw that are compared with other draws."""
_REPEATED = (0, 2, 4, 6)
"""Which tokens of each sequence stand for all of it: they differ from sequence to sequence."""
DISTANCES = (1, 2, 4, 8, 16)
ALL = "all queries"


def measure(trainee: Trainee, protocol: measurements.RunProtocol, *, width: int, seed: int) -> MeasuredRun:
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
    for step in range(protocol.steps if problem is None else 0):
        recorder.before_step()
        loss = trainee.step(step)
        losses.append(loss)
        problem = recorder.after_step(step + 1, loss)
        if problem is not None:
            break
    values = recorder.values()
    values |= {Key(Quantity.LOSS, "loss", step + 1): loss for step, loss in enumerate(losses)}
    return MeasuredRun(width, seed, values, tuple(losses), problem)


class Recorder:
    """Measures a model whose steps somebody else takes: `start`, then `before_step` and `after_step` around each, then
    `values`. Collective in all that it does.
    """

    def __init__(self, trainee: Trainee, protocol: measurements.RunProtocol) -> None:
        self._trainee = trainee
        self._protocol = protocol
        self._parameters = list(trainee.parameters())
        self._replays = {name: replay for name, _ in self._parameters if (replay := trainee.replay(name)) is not None}
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
        self._whole: dict[Key, float] = {}
        """What is taken of whole matrices, on the ranks that have them."""
        self._moments: dict[str, NDArray[np.float64]] = {}
        """Of draws: how many elements, and the sums of their first, second and fourth powers."""
        self._beside: dict[tuple[Quantity, str], tuple[float, float]] = {}
        self._evaluated: dict[Key, tuple[float, float]] = {}
        """Squares of what evaluation makes different, and of what training has."""
        self._norms: dict[Key, float] = {}
        self._turned: dict[tuple[int, int], NDArray[np.float64]] = {}
        """Of queries of so many channels, so far apart: sums of products of the earlier ones, of later with earlier
        ones, and of the later ones."""

    def start(self) -> str | None:
        """Looks at the model before training; returns what makes it no use to go on."""
        if not self._protocol.activations:
            return None
        self._activations = self._recorded(self._trainee.forward)
        self._beside = dict(self._trainee.beside())
        # What evaluation repeats to the last bit is deterministic; else it takes another pass to tell.
        again = self._evaluate(0, self._activations)
        if self._of_all([name for name, x in self._activations.items() if not _is_same(x, again.get(name))]):
            again = self._recorded(self._trainee.forward)
        differing = [n for n, x in self._activations.items() if x.isfinite().all() and not _is_same(x, again.get(n))]
        masked = {name for name, _, at in self._trainee.modules() if at == "masked input"}
        bad = [name for name, x in self._activations.items() if not x.isfinite().all() and name not in masked]
        for name, x in self._activations.items():
            self._note(Key(Quantity.ACTIVATION, name, 0), x)
        for name, w in self._first.items():
            self._note(Key(Quantity.INITIAL, name, 0), w)
        self._take_draws()
        self._take_positions()
        differing, bad = self._of_all(differing), self._of_all(bad)
        if differing:
            # What evaluation differs from is not one thing.
            self._evaluated.clear()
        if bad:
            return f"{bad[0]}: not finite before the first step"
        if differing:
            return f"{differing[0]}: not deterministic, two forward passes on one batch differ"
        return None

    def before_step(self) -> None:
        """Keeps what is looked at of each weight as it is."""
        self._before = {name: self._looked_at(name, p.detach()).clone() for name, p in self._parameters}

    def after_step(self, step: int, loss: float) -> str | None:
        """Looks at what a step did; returns what makes it no use to go on."""
        broken = []
        record = step in self._protocol.recorded
        for name, parameter in self._parameters:
            gradient = self._trainee.gradient(parameter)
            now, before = parameter.detach(), self._before[name]
            looked_at = self._looked_at(name, now)
            if gradient is not None:
                if record:
                    self._note(Key(Quantity.GRADIENT, name, step), gradient)
                    rows = gradient.reshape(len(gradient), -1) if gradient.dim() else gradient.reshape(1, 1)
                    dead = (rows == 0).all(dim=1)
                    self._shares[Key(Quantity.DEAD, name, step)] = (dead.sum().item(), len(rows))
                if (replay := self._replays.get(name)) is not None:
                    shown = self._gathered(name, before)
                    replay.observe(self._gathered(name, self._looked_at(name, gradient)), shown)
                    if (record or step == 1) and looked_at.numel() >= FEWEST:
                        self._equations[name, step] = replay.sums(shown, self._gathered(name, looked_at) - shown)
            if not _is_finite(looked_at):
                broken.append(name)
        broken = self._of_all(broken)
        if broken or not math.isfinite(loss):
            what = f"{broken[0]}: not finite" if broken else "loss: not finite"
            return f"{what} after {step} step{'s' if step > 1 else ''}"
        if record and self._protocol.activations:
            now_computed = self._recorded(self._trainee.forward)
            for name, x in now_computed.items():
                self._note(Key(Quantity.UPDATE, name, step), x - self._activations[name])
            if step == self._protocol.steps:
                self._evaluate(step, now_computed)
            if (norm := self._trainee.gradient_norm()) is not None:
                self._norms[Key(Quantity.NORM, "all parameters", step)] = norm
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
            update = self._trainee.gathered_matrix(name, parameter.detach() - self._first[name])
            if update is not None:
                rows, columns = update.shape
                self._whole[Key(Quantity.SPECTRAL, name, step)] = spectral_norm(update) / math.sqrt(rows / columns)

    def _evaluate(self, step: int, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns what evaluation computes; nothing where it is not asked."""
        asked: list[bool] = []
        with torch.no_grad():
            found = self._recorded(lambda: asked.append(self._trainee.evaluate()), training=False)
        if not asked or not asked[0]:
            return {}
        for name, x in trained.items():
            other = found.get(name)
            if other is None or other.shape != x.shape:
                continue
            difference, there = (other - x).double(), x.double()
            known = difference.isfinite()
            squares = [y[known].square().sum().item() for y in (difference, there)]
            self._evaluated[Key(Quantity.EVALUATION, name, step)] = (squares[0], squares[1])
        return found

    def _take_draws(self) -> None:
        drawn = {name: w.double() for name, w in self._first.items() if w.numel() > 1 and bool((w != w.min()).any())}
        for name, w in drawn.items():
            square = w.square()
            sums = [float(w.numel()), *(x.sum().item() for x in (w, square, square.square()))]
            self._moments[name] = np.asarray(sums)
        long = {name: w.flatten()[:_PREFIX] for name, w in drawn.items() if w.numel() >= _PREFIX}
        if len(long) > 1:
            prefixes = torch.stack(list(long.values()))
            prefixes = prefixes - prefixes.mean(dim=1, keepdim=True)
            prefixes = prefixes / prefixes.norm(dim=1, keepdim=True).clamp(min=1e-30)
            largest = (prefixes @ prefixes.T).fill_diagonal_(0.0).abs().amax(dim=1)
            for name, value in zip(long, largest.tolist(), strict=True):
                self._whole[Key(Quantity.ALIKE, name, 0)] = value
        for name, w in self._first.items():
            if w.dim() < 2:
                continue
            matrix = self._trainee.gathered_matrix(name, w.reshape(len(w), -1))
            if matrix is not None and name in drawn and (value := likeness_of_rows(matrix)) is not None:
                self._whole[Key(Quantity.ROWS, name, 0)] = value

    def _take_positions(self) -> None:
        def see(name: str, dim: int) -> Callable[..., None]:
            def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
                q = args[0].detach().double().movedim(dim, 0)
                for distance in DISTANCES:
                    if distance < len(q):
                        both = (q[distance:] * q[:-distance]).sum().item()
                        itself = q[:-distance].square().sum().item()
                        self._turn(distance, q[:-distance], q[distance:])
                        for where in (name, ALL):
                            key = Key(Quantity.POSITION, f"{where}, {distance} apart", 0)
                            sums = self._overlaps.get(key, (0.0, 0.0))
                            self._overlaps[key] = (sums[0] + both, sums[1] + itself)

            return hook

        hooks = [module.register_forward_pre_hook(see(name, dim)) for name, module, dim in self._trainee.queries()]
        try:
            with torch.no_grad():
                for index in _REPEATED:
                    if not self._trainee.repeat(index):
                        break
        finally:
            for hook in hooks:
                hook.remove()

    def _turn(self, distance: int, earlier: Tensor, later: Tensor) -> None:
        channels = earlier.shape[-1]
        one, other = (x.reshape(-1, channels) for x in (earlier, later))
        sums = torch.stack([one.T @ one, other.T @ one, other.T @ other]).cpu().numpy()
        self._turned[channels, distance] = self._turned.get((channels, distance), 0.0) + sums

    def values(self) -> dict[Key, float]:
        """Everything that was measured, over all ranks. Collective."""
        squares: dict[Key, Any] = {}
        shares: dict[Key, Any] = {}
        overlaps: dict[Key, Any] = {}
        equations: dict[tuple[str, int], Any] = {}
        moments: dict[str, Any] = {}
        evaluated: dict[Key, Any] = {}
        beside: dict[tuple[Quantity, str], Any] = {}
        found: dict[Key, float] = {}
        turned: dict[tuple[int, int], Any] = {}
        summed: list[dict[Any, Any]] = [squares, shares, overlaps, equations, moments, evaluated, beside, turned]
        own = (self._squares, self._shares, self._overlaps, self._equations, self._moments, self._evaluated)
        for of_rank in self._trainee.gathered((*own, self._beside, self._turned, {**self._whole, **self._norms})):
            for total, part in zip(summed, of_rank[:-1], strict=True):
                _add(total, part)
            found |= of_rank[-1]
        found |= {key: rms_of(*sums) for key, sums in squares.items()}
        found |= {key: float(some / of) for key, (some, of) in shares.items()}
        found |= {key: float(both / itself) for key, (both, itself) in overlaps.items() if itself > 0}
        found |= {key: math.sqrt(of / itself) for key, (of, itself) in evaluated.items() if itself > 0}
        if len({channels for channels, _ in turned}) == 1:
            for (_, distance), sums in turned.items():
                if (value := turning(*sums)) is not None:
                    found[Key(Quantity.POSITION, f"{TURNING}, {distance} apart", 0)] = value
        for name, (count, first, second, fourth) in moments.items():
            found[Key(Quantity.MEAN, name, 0)] = float(first / math.sqrt(count * second))
            found[Key(Quantity.TAILS, name, 0)] = float(fourth * count / second**2)
        for (quantity, name), (total, count) in beside.items():
            found[Key(quantity, name, 0)] = float(total / count) if quantity in _MEANS else rms_of(total, count)
        # A rank may have seen none of a tensor itself, but it has the same optimizer.
        for (name, step), sums in equations.items():
            replay = self._trainee.replay(name)
            assert replay is not None
            of_step = replay.fitted(sums)
            if of_step.lr is not None:
                found[Key(Quantity.LEARNING_RATE, name, step)] = of_step.lr
            found[Key(Quantity.UNEXPLAINED, name, step)] = of_step.unexplained
            if of_step.eps is not None:
                found[Key(Quantity.EPS, name, step)] = of_step.eps
            if of_step.weight_decay is not None:
                found[Key(Quantity.WEIGHT_DECAY, name, step)] = of_step.weight_decay
        return found

    def _recorded(self, forward: Callable[[], object], *, training: bool = True) -> dict[str, Tensor]:
        """Returns what modules give in a forward pass, in the order in which they are done."""
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
            # With gradients where training has them: a model may ask.
            with torch.set_grad_enabled(training):
                forward()
        finally:
            for hook in hooks:
                hook.remove()
        return found

    def _looked_at(self, name: str, x: Tensor) -> Tensor:
        """Returns those of a tensor's elements that its optimizer's steps are read from."""
        return x if self._is_whole(name) else x.flatten()[self._sampled[name]]

    def _gathered(self, name: str, x: Tensor) -> Tensor:
        """Returns what a replay is shown of them: shards of what it has to see all of are put together."""
        whole = self._trainee.gathered_matrix(name, x) if self._is_whole(name) else x
        assert whole is not None
        return whole

    def _is_whole(self, name: str) -> bool:
        replay = self._replays.get(name)
        return replay is not None and replay.whole

    def _note(self, key: Key, x: Tensor) -> None:
        self._squares[key] = (x.double().square().sum().item(), x.numel())

    def _of_all(self, names: list[str]) -> list[str]:
        return [name for of_rank in self._trainee.gathered(names) for name in of_rank]


def _add(total: dict[Any, Any], part: Mapping[Any, Any]) -> None:
    """Adds up sums by key."""
    for key, sums in part.items():
        total[key] = np.asarray(sums) + total[key] if key in total else np.asarray(sums)


def _is_finite(x: Tensor) -> bool:
    # A sum is finite only where all of its terms are: most often that is all there is to compute.
    return math.isfinite(x.sum().item()) or bool(x.isfinite().all())


def _is_same(x: Tensor, other: Tensor | None) -> bool:
    return other is not None and x.shape == other.shape and torch.equal(x.nan_to_num(), other.nan_to_num())


def _plain(output: Any) -> Tensor:
    """A copy: Megatron masks attention logits in place. With the bias that its linear layers leave to what follows."""
    if isinstance(output, tuple):
        output, *rest = output
        bias = rest[0] if rest and isinstance(rest[0], Tensor) and rest[0].dim() == 1 else None
        output = output if bias is None else output + bias
    result: Tensor = output.detach().clone()
    return result
