"""Baselines: subtracted from the signal, independent of the draw they are subtracted from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from scorefn.core import Draws, LeaveOneOut, NonFiniteError, ScorefnError, ShapeError, in_transform
from scorefn.core.representation import called, representation

__all__ = ["Constant", "LeaveOneOut", "MovingAverage", "ValueFunction"]


@dataclass(frozen=True, eq=False)
class Constant:
    """A baseline that is given: ``b``, unbiased because it does not look at the draws.

    ``Constant(f(mode))`` is the self-critical baseline (Rennie et al., 2017); a baseline computed once on a whole
    batch and sliced with the draws makes microbatches add up exactly.

    Args:
        b: a number, or a tensor that broadcasts (from the right) to ``[N, *B, K]``; it is detached.

    Raises:
        ShapeError: b does not fit ``[N, *B, K]``.
        NonFiniteError: b is NaN or infinite.
        ScorefnError: b is neither a number nor a tensor.

    Example:
        >>> import torch, scorefn as sf
        >>> logit = torch.tensor(0.0, requires_grad=True)
        >>> coin = torch.distributions.Bernoulli(logits=logit)
        >>> sf.expectation(coin, lambda x: x, 8, baseline=sf.Constant(0.5)).backward()
        >>> logit.grad  # (x - 1/2) (x - 1/2), whichever side is up
        tensor(0.2500)
    """

    b: Tensor | float
    unbiased = True

    __repr__ = representation

    def __post_init__(self) -> None:
        """Check that b is made of finite numbers."""
        if not isinstance(self.b, Tensor | float | int):
            raise ScorefnError(f"Constant takes a number or a tensor, but b is a {type(self.b).__name__}.")
        if not in_transform() and not bool(torch.as_tensor(self.b).isfinite().all()):
            raise NonFiniteError("Constant was given a NaN or infinite b, which would make the whole gradient NaN.")

    def __call__(self, signal: Tensor, draws: Draws) -> Tensor:
        """``[N, *B, K] -> [N, *B, K]``."""
        b = torch.as_tensor(self.b, dtype=signal.dtype, device=signal.device).detach()
        full = draws.log_prob.shape
        target = full if b.ndim and b.shape[-1] == full[-1] else signal.shape
        try:
            return b.expand(target)
        except RuntimeError as error:
            raise ShapeError(
                f"Constant baseline {tuple(b.shape)} does not fit the signal [N, *B, K] = {tuple(full)}: give a "
                "number, or up to one value per draw, problem and decision."
            ) from error


class MovingAverage:
    """Exponentially decaying mean of past signals, of each decision, bias-corrected and 0 before the first update.

    ``m <- decay m + (1 - decay) mean_N(signal)``, read as ``m / (1 - decay^t)`` *before* it is updated: an average that
    already contains the present draw shrinks the gradient. Sources: Williams (1992); Mnih & Gregor (2014), section 2.3.

    Decisions beyond those seen before start afresh, so that episodes may grow; absent ones do not count.

    Args:
        decay: in [0, 1).

    Raises:
        ScorefnError: decay outside [0, 1).
        ShapeError: the batch shape ``*B`` changed between two updates.
        NonFiniteError: an average overflows; nothing was updated then.

    Example:
        >>> import torch, scorefn as sf
        >>> fx = torch.tensor([[4.0], [8.0]])
        >>> draws = sf.Draws(torch.arange(2), torch.zeros(2, 1, requires_grad=True), fx)
        >>> baseline = sf.MovingAverage(decay=0.5)
        >>> read = []
        >>> for scale in (1.0, 2.0, 4.0):  # means of 6, 12 and 24
        ...     read.append(round(baseline(draws.signal(), draws)[0].item(), 4))
        ...     baseline.update(scale * draws.signal(), draws)
        >>> read  # 0, 6, and (1/4 6 + 1/2 12) / (3/4): never the present batch
        [0.0, 6.0, 10.0]
    """

    unbiased = True

    def __init__(self, decay: float = 0.9) -> None:
        self.decay = checked_decay(decay)
        self.mean: Tensor | None = None  # [*B, K], not yet corrected
        self.weight: Tensor | None = None  # [*B, K], 1 - decay^t: how much of the mean is filled

    def __repr__(self) -> str:
        """As it was called."""
        return f"MovingAverage({self.decay})"

    def __call__(self, signal: Tensor, draws: Draws) -> Tensor:
        """``[N, *B, K] -> [N, *B, K]``."""
        mean, weight = (state[..., : signal.shape[-1]] for state in self._states(signal))
        return torch.where(weight > 0, mean / weight.clamp(min=1e-12), 0.0).expand(signal.shape)

    def update(self, signal: Tensor, draws: Draws) -> None:
        """Take in the mean signal of the valid draws; decisions without one stay as they are."""
        mean, weight = self._states(signal)
        present = valid(signal, draws)
        count = present.sum(0)
        batch_mean = torch.where(present, signal, 0.0).sum(0) / count.clamp(min=1)
        rate = widened((count > 0).to(signal) * (1.0 - self.decay), mean)
        mean = mean + rate * (widened(batch_mean, mean) - mean)
        check_moments("MovingAverage", mean)
        self.mean = mean
        self.weight = weight + rate * (1.0 - weight)

    def _states(self, signal: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and weight, widened to the number of decisions of the signal."""
        if self.mean is None or self.weight is None:
            return torch.zeros_like(signal[0]), torch.zeros_like(signal[0])
        check_problems("MovingAverage", self.mean.shape[:-1], signal.shape[1:-1])
        return widened(self.mean.to(signal), signal), widened(self.weight.to(signal), signal)


def checked_decay(decay: float) -> float:
    """The decay of an average over past steps, refused outside [0, 1)."""
    if isinstance(decay, bool) or not isinstance(decay, Real):
        raise ScorefnError(
            f"decay is the share of an average that a step keeps, but it is {decay!r}: use a number in [0, 1), such as "
            "0.9."
        )
    if not 0.0 <= decay < 1.0:
        raise ScorefnError(f"decay must lie in [0, 1), but it is {decay}: at 1 nothing would ever be learned.")
    return decay


def check_problems(name: str, learned: torch.Size, met: torch.Size) -> None:
    """Refuse another batch shape ``*B`` than that of the averages that are kept."""
    if learned != met:
        raise ShapeError(
            f"{name} was learned on batch shape {tuple(learned)} but meets {tuple(met)}: its entries belong to "
            "particular problems. Use a new one."
        )


def check_moments(name: str, *moments: Tensor) -> None:
    """Refuse averages that overflowed, before they take the place of those that are kept."""
    if math.isfinite(sum(moment.sum() for moment in moments)):  # one read; a sum that merely overflows passes below
        return
    if not all(bool(moment.isfinite().all()) for moment in moments):
        raise NonFiniteError(
            f"{name} met values so large that their average, or that of their squares, overflows in "
            f"{moments[0].dtype}, and would stay infinite or NaN for ever: nothing was updated. Bound f, give failures "
            "a value of the size of the others, or use float64."
        )


def widened(state: Tensor, like: Tensor) -> Tensor:
    """The state with zeros up to the number of decisions of another tensor."""
    missing = like.shape[-1] - state.shape[-1]
    return nn.functional.pad(state, (0, missing)) if missing > 0 else state


def valid(signal: Tensor, draws: Draws) -> Tensor:
    """Which entries of the signal belong to a decision that is present, bool ``[N, *B, K]``."""
    if draws.mask is None or draws.mask.shape != signal.shape:
        return torch.ones_like(signal, dtype=torch.bool)
    return draws.mask


class ValueFunction:
    """A learned baseline ``b_k = V(features_k)``, fitted by least squares on past signals.

    Unbiased as long as the features of decision k do not contain decision k or what follows from it: an observation
    before the action, the datum of an amortised guide. Sources: Williams (1992); Sutton et al. (2000); Mnih & Gregor
    (2014).

    Args:
        module: maps features to ``[N, *B, K]``, ``[*B, K]`` or ``[N, *B, K, 1]``. It may share no parameter with the
            measure.
        features: ``Draws -> features``; None: the adapter's ``draws.context``, never the draw itself.
        optimizer: stepped once by every ``update``; None: minimise ``loss`` yourself.

    Raises:
        ScorefnError: no features and no context, or a parameter shared with the measure.
        ShapeError: the module's output fits none of the shapes above.
        NonFiniteError: a loss that is NaN or infinite; the optimiser is then not stepped.

    Example:
        >>> import torch, scorefn as sf
        >>> seen = torch.tensor([0.0, 1.0, 2.0, 3.0]).reshape(4, 1, 1)  # before the decision
        >>> log_prob = torch.zeros(4, 1, requires_grad=True)
        >>> draws = sf.Draws(torch.arange(4), log_prob, 2 * seen[..., 0], context=seen)
        >>> module = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.zeros_(module.weight)
        >>> sgd = torch.optim.SGD(module.parameters(), lr=1 / 7)
        >>> baseline = sf.ValueFunction(module, optimizer=sgd)
        >>> baseline.update(draws.signal(), draws)  # one step of least squares, here the last
        >>> baseline(draws.signal(), draws).T
        tensor([[0., 2., 4., 6.]])
    """

    unbiased = True

    def __init__(
        self,
        module: nn.Module,
        features: Callable[[Draws], Any] | None = None,
        *,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        own = {id(parameter) for parameter in module.parameters()}
        held = [] if optimizer is None else [q for group in optimizer.param_groups for q in group["params"]]
        if strangers := sum(id(q) not in own for q in held):
            raise ScorefnError(
                f"The value function's optimizer holds {strangers} parameter(s) that are not its module's: an update "
                "would clear their gradients and move them. Give the module an optimizer of its own."
            )
        self.module, self.features, self.optimizer = module, features, optimizer

    def __repr__(self) -> str:
        optimizer = None if self.optimizer is None else type(self.optimizer)
        return called(self, self.module, features=self.features, optimizer=optimizer)

    def __call__(self, signal: Tensor, draws: Draws) -> Tensor:
        """``[N, *B, K] -> [N, *B, K]``."""
        _refuse_shared(self.module, draws.log_prob)
        with torch.no_grad(), _evaluating(self.module):
            return self._value(draws)

    def loss(self, signal: Tensor, draws: Draws) -> Tensor:
        """Mean squared error over the decisions that are present, on detached inputs; a scalar."""
        value = self._value(draws)
        present = valid(value, draws)
        error = torch.where(
            present, value - signal.detach(), 0.0
        )  # before the square: 0 x NaN would stay in its gradient
        return error.square().sum() / present.sum().clamp(min=1)

    def update(self, signal: Tensor, draws: Draws) -> None:
        """One step of the optimiser, where one was given."""
        if self.optimizer is None:
            return
        buffers = [(buffer, buffer.clone()) for buffer in self.module.buffers()]
        loss = self.loss(signal, draws)
        self.optimizer.zero_grad()
        if bool(torch.isfinite(loss)):
            loss.backward()
        gradients = [q.grad for q in self.module.parameters() if q.grad is not None]
        if not bool(torch.isfinite(loss)) or not all(bool(g.isfinite().all()) for g in gradients):
            self.optimizer.zero_grad()
            with torch.no_grad():
                for buffer, before in buffers:  # running statistics of the forward pass
                    buffer.copy_(before)
            raise NonFiniteError(
                f"The loss of the value function is {loss.item()}, or its gradient is not finite: its optimiser was "
                "not stepped. Look at the features and at the scale of the signal."
            )
        self.optimizer.step()

    def _value(self, draws: Draws) -> Tensor:
        features = draws.context if self.features is None else self.features(draws)
        if features is None:
            raise ScorefnError(
                "ValueFunction has no features: these draws carry no context, and a value function of the draw itself "
                "would be biased. Pass features=, a function of what was known before each decision."
            )
        value: Tensor = self.module(pytree.tree_map(lambda leaf: _present(leaf, draws.mask), features))
        full = draws.log_prob.shape
        if value.shape == (*full, 1):
            return value.squeeze(-1)
        if value.shape == full[1:]:
            return value.expand(full)
        if value.shape != full:
            raise ShapeError(
                f"The value function returned {tuple(value.shape)} for decisions [N, *B, K] = {tuple(full)}: return "
                f"{tuple(full)}, {tuple(full[1:])} or {(*full, 1)}."
            )
        return value


def _present(leaf: Any, mask: Tensor | None) -> Any:
    """A leaf of the features, detached, with 0 in place of whatever pads absent decisions."""
    if not isinstance(leaf, Tensor):
        return leaf
    if mask is None or leaf.shape[: mask.ndim] != mask.shape:
        return leaf.detach()
    return torch.where(mask.reshape(*mask.shape, *[1] * (leaf.ndim - mask.ndim)), leaf.detach(), leaf.new_zeros(()))


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode, so that reading updates no running statistics; afterwards every part is as it was."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


def _refuse_shared(module: nn.Module, log_prob: Tensor) -> None:
    """Refuse a module with a parameter from which log_prob was computed."""
    own = {id(parameter) for parameter in module.parameters()}
    seen: set[Any] = set()
    stack = [log_prob.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if id(getattr(node, "variable", None)) in own:
            raise ScorefnError(
                "The value function shares a parameter with the measure: fitting it would move the distribution that "
                "is being differentiated. Give it parameters of its own."
            )
        stack += [parent for parent, _ in node.next_functions]
