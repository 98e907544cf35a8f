"""The contracts that measures, credits, baselines, couplings and control variates meet.

Axes, everywhere: N draws, B independent problems, K decisions, J values.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeGuard

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active
from torch.compiler import is_compiling
from torch.utils import _pytree as pytree

from scorefn.core.representation import called

if TYPE_CHECKING:
    from scorefn.core.draws import Draws

PyTree: TypeAlias = Any
"""A tensor, or tensors in nested tuples, lists and dicts."""

Integrand: TypeAlias = Callable[[Any], Any]
"""The f of E[f(x)]: any callable of the draws; differentiable or not."""


def in_transform() -> bool:
    """Whether values cannot be read here: inside ``torch.func`` transforms or while compiling.

    Example:
        >>> import torch, scorefn as sf
        >>> sf.core.in_transform()
        False
        >>> torch.func.vmap(lambda x: x * sf.core.in_transform())(torch.ones(2))
        tensor([1., 1.])
    """
    return is_compiling() or bool(_are_functorch_transforms_active())


def tensor_leaves(x: PyTree) -> list[Tensor]:
    """The tensors of a pytree."""
    return [x] if isinstance(x, Tensor) else [leaf for leaf in pytree.tree_leaves(x) if isinstance(leaf, Tensor)]


class Measure(Protocol):
    """What can be sampled and scored: every ``torch.distributions`` object as it stands.

    Example:
        >>> import torch, scorefn as sf
        >>> class Sign:
        ...     '''+1 with probability sigmoid(logit), else -1.'''
        ...
        ...     def __init__(self, logit):
        ...         self.logit = logit
        ...
        ...     def sample(self, shape):
        ...         up = torch.rand(shape) < self.logit.detach().sigmoid()
        ...         return torch.where(up, 1.0, -1.0)
        ...
        ...     def log_prob(self, x):
        ...         return torch.nn.functional.logsigmoid(x * self.logit)
        >>> logit = torch.tensor(0.0, requires_grad=True)
        >>> sf.expectation(Sign(logit), lambda x: x, 8, baseline=None).backward()
        >>> logit.grad  # of tanh(logit / 2); f times the score, x times x/2, is the same for every draw
        tensor(0.5000)
    """

    def sample(self, sample_shape: torch.Size, /) -> PyTree:
        """Draws without gradient, ``[*sample_shape, *batch, *event]`` in every leaf."""
        ...

    def log_prob(self, x: PyTree, /) -> Tensor:
        """Log-density of each draw, ``[*sample_shape, *batch]``."""
        ...


class StructuredMeasure(Protocol):
    """A measure over several decisions (a trajectory, a guide); it alone may set K or J above 1.

    Example:
        >>> import torch, scorefn as sf
        >>> class Tosses:
        ...     '''Two tosses of a coin, each paid at once.'''
        ...
        ...     def __init__(self, logit):
        ...         self.coin = torch.distributions.Bernoulli(logits=logit.expand(2))
        ...
        ...     def draws(self, f, num_samples, *, coupling=None):
        ...         x = self.coin.sample((num_samples,))
        ...         own = sf.Influence(torch.eye(2, dtype=torch.bool))
        ...         return sf.Draws(x, self.coin.log_prob(x), f(x), credit=own)
        >>> logit = torch.tensor(0.0, requires_grad=True)
        >>> sf.expectation(Tosses(logit), lambda x: 2 * x - 1, 8, baseline=None).backward()
        >>> logit.grad  # (2 x - 1) (x - 1/2) = 1/2 for each of the two tosses
        tensor(1.)
    """

    def draws(self, f: Integrand, num_samples: int, *, coupling: Coupling | None = None) -> Draws:
        """Sample, call f exactly once, and return everything an estimate needs."""
        ...


class Coupling(Protocol):
    """How the N draws of a plain measure share randomness.

    Example:
        >>> import torch, scorefn as sf
        >>> class Mirrored:
        ...     '''A normal draw and its mirror image.'''
        ...
        ...     unbiased = True
        ...
        ...     def sample(self, p, num_samples):
        ...         x = p.sample((num_samples // 2,))
        ...         pairs = torch.stack([x, 2 * p.loc.detach() - x], 1).flatten(0, 1)
        ...         return pairs, torch.arange(num_samples // 2).repeat_interleave(2)
        >>> loc = torch.zeros((), dtype=torch.float64, requires_grad=True)
        >>> p = torch.distributions.Normal(loc, 1.0)
        >>> sf.expectation(p, torch.square, 8, coupling=Mirrored()).backward()
        >>> bool(loc.grad.abs() < 1e-12)  # the score is odd and f is even: all noise cancels
        True
    """

    unbiased: bool

    def sample(self, p: Measure, num_samples: int) -> tuple[PyTree, Tensor | None]:
        """The draws ``[N, *batch, *event]`` and their ``block`` ``[N]`` (None: each its own)."""
        ...


class Credit(ABC):
    """Which value is charged to which decision.

    ``credit(v) = decision_weight * (M @ (value_weight * v))`` with M a 0/1 influence of the K
    decisions (in topological order) on the J values. A credit without a size, such as ``Total``,
    may return a last axis of 1 wherever K or J is written.

    Example:
        >>> import torch, scorefn as sf
        >>> class Own(sf.core.Credit):
        ...     '''Each value is charged to the decision of the same number.'''
        ...
        ...     def influence(self, v):
        ...         return v
        ...
        ...     def influence_adjoint(self, u):
        ...         return u
        ...
        ...     def predecessors(self, log_prob):
        ...         return torch.zeros_like(log_prob)
        >>> v = torch.tensor([[1.0, 10.0, 100.0]])
        >>> Own(), Own()(v), Own().uninfluenced(v)
        (Own(), tensor([[  1.,  10., 100.]]), tensor([[110., 101.,  11.]]))
    """

    unbiased: bool = True

    def __repr__(self) -> str:
        """The class, with what the object holds."""
        return called(self, **{name: value for name, value in vars(self).items() if not name.startswith("_")})

    def value_weight(self, v: Tensor) -> Tensor | None:
        """Weight of each value, broadcastable to v ``[N, *B, J]``; None for ones."""
        return None

    def decision_weight(self, v: Tensor) -> Tensor | None:
        """Weight of each decision, ``[N, *B, K]``; None for ones (anything else is not a gradient)."""
        return None

    @abstractmethod
    def influence(self, v: Tensor) -> Tensor:
        """M @ v: ``[N, *B, J] -> [N, *B, K]``."""

    @abstractmethod
    def influence_adjoint(self, u: Tensor) -> Tensor:
        """M^T u: ``[N, *B, K] -> [N, *B, J]``."""

    @abstractmethod
    def predecessors(self, log_prob: Tensor) -> Tensor:
        """Sum over the decisions whose influence contains k's, k left out: ``[N, *B, K]``."""

    def uninfluenced(self, v: Tensor) -> Tensor:
        """Sum of the values that do not depend on each decision, ``[N, *B, J] -> [N, *B, K]``.

        All that M does not charge to it; fewer where a 0 in M only says that a value is not charged. So any multiple of
        the sum may be charged to the decision as well: ``E[sum_k score_k] = 0``.
        """
        return v.sum(-1, keepdim=True) - self.influence(v)

    def __call__(self, v: Tensor) -> Tensor:
        """The value charged to each decision, ``[N, *B, J] -> [N, *B, K]``."""
        value_weight, decision_weight = self.value_weight(v), self.decision_weight(v)
        charged = self.influence(v if value_weight is None else value_weight * v)
        return charged if decision_weight is None else decision_weight * charged

    def check(self, decisions: int, values: int) -> None:  # noqa: B027 - most credits take any size
        """Raise ShapeError where this credit does not fit K decisions and J values."""

    def bind(self, native: Credit) -> Credit:
        """This credit, completed by what the adapter's own credit knows (where episodes end)."""
        return self

    def __getitem__(self, index: Any) -> Credit:
        """The same credit for some of the draws; only credits that hold per-draw tensors differ."""
        return self


class Baseline(Protocol):
    """What is subtracted from the signal: independent of the draw it is subtracted from.

    Example:
        >>> import torch, scorefn as sf
        >>> class Half:
        ...     unbiased = True
        ...
        ...     def __call__(self, signal, draws):
        ...         return torch.full_like(signal, 0.5)
        >>> logit = torch.tensor(0.0, requires_grad=True)
        >>> coin = torch.distributions.Bernoulli(logits=logit)
        >>> sf.expectation(coin, lambda x: x, 8, baseline=Half()).backward()
        >>> logit.grad  # (x - 1/2) (x - 1/2), whichever side is up
        tensor(0.2500)
    """

    @property
    def unbiased(self) -> bool:
        """Whether the expected gradient is kept; the tests prove the claim."""
        ...

    def __call__(self, signal: Tensor, draws: Draws) -> Tensor:
        """``[N, *B, K]`` (or a last axis of 1), read without side effect."""
        ...


class StatefulBaseline(Protocol):
    """A baseline that learns from past draws: read first, updated afterwards.

    Example:
        >>> import torch, scorefn as sf
        >>> class Last:
        ...     '''The mean of the last batch.'''
        ...
        ...     unbiased, mean = True, 0.0
        ...
        ...     def __call__(self, signal, draws):
        ...         return torch.full_like(signal, self.mean)
        ...
        ...     def update(self, signal, draws):
        ...         self.mean = signal.mean().item()
        >>> baseline, logit = Last(), torch.tensor(0.0, requires_grad=True)
        >>> p = torch.distributions.Bernoulli(logits=logit)
        >>> _ = sf.expectation(p, lambda x: torch.full_like(x, 7.0), 8, baseline=baseline)
        >>> baseline.mean  # from the next step on a constant f is no noise
        7.0
    """

    def update(self, signal: Tensor, draws: Draws) -> None:
        """Learn from one batch; ``expectation`` calls it after the surrogate."""
        ...


def is_stateful(baseline: object) -> TypeGuard[StatefulBaseline]:
    """Whether a baseline learns: by duck typing, because isinstance on a Protocol costs more than the estimate.

    Example:
        >>> import scorefn as sf
        >>> sf.core.is_stateful(sf.LeaveOneOut()), sf.core.is_stateful(sf.MovingAverage())
        (False, True)
    """
    return hasattr(baseline, "update")


class ControlVariate(Protocol):
    """``Draws -> Draws``: fx - c h(x) + c E h, with c fitted on other blocks.

    One that is fitted to the present draws says so by ``fitted = True``; one that learns from past draws has
    ``update(draws)``, which ``expectation`` calls last.

    Example:
        >>> import torch, scorefn as sf
        >>> from dataclasses import replace
        >>> class Twice:
        ...     '''fx - 2 (x - E x).'''
        ...
        ...     unbiased = True
        ...
        ...     def __init__(self, p):
        ...         self.p = p
        ...
        ...     def __call__(self, draws):
        ...         return replace(draws, fx=draws.fx - 2 * (draws.x - self.p.mean)[:, None])
        >>> logit = torch.tensor(0.0, requires_grad=True)
        >>> p = torch.distributions.Bernoulli(logits=logit)
        >>> sf.expectation(p, lambda x: 2 * x, 8, control_variate=Twice(p)).backward()
        >>> logit.grad  # f is linear in x: nothing is left to chance
        tensor(0.5000)
    """

    unbiased: bool

    def __call__(self, draws: Draws) -> Draws:
        """The same draws with values of lower variance and equal expectation."""
        ...
