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

if TYPE_CHECKING:
    from scorefn.core.draws import Draws

PyTree: TypeAlias = Any
"""A tensor, or tensors in nested tuples, lists and dicts."""

Integrand: TypeAlias = Callable[[Any], Any]
"""The f of E[f(x)]: any callable of the draws; differentiable or not."""


def in_transform() -> bool:
    """Whether values cannot be read here: inside ``torch.func`` transforms or while compiling."""
    return is_compiling() or bool(_are_functorch_transforms_active())


def tensor_leaves(x: PyTree) -> list[Tensor]:
    """The tensors of a pytree."""
    return [x] if isinstance(x, Tensor) else [leaf for leaf in pytree.tree_leaves(x) if isinstance(leaf, Tensor)]


class Measure(Protocol):
    """What can be sampled and scored: every ``torch.distributions`` object as it stands."""

    def sample(self, sample_shape: torch.Size, /) -> PyTree:
        """Draws without gradient, ``[*sample_shape, *batch, *event]`` in every leaf."""
        ...

    def log_prob(self, x: PyTree, /) -> Tensor:
        """Log-density of each draw, ``[*sample_shape, *batch]``."""
        ...


class StructuredMeasure(Protocol):
    """A measure over several decisions (a trajectory, a guide); it alone may set K or J above 1."""

    def draws(self, f: Integrand, num_samples: int, *, coupling: Coupling | None = None) -> Draws:
        """Sample, call f exactly once, and return everything an estimate needs."""
        ...


class Coupling(Protocol):
    """How the N draws of a plain measure share randomness."""

    unbiased: bool

    def sample(self, p: Measure, num_samples: int) -> tuple[PyTree, Tensor | None]:
        """The draws ``[N, *batch, *event]`` and their ``block`` ``[N]`` (None: each its own)."""
        ...


class Credit(ABC):
    """Which value is charged to which decision.

    ``credit(v) = decision_weight * (M @ (value_weight * v))`` with M a 0/1 influence of the K
    decisions (in topological order) on the J values. A credit without a size, such as ``Total``,
    may return a last axis of 1 wherever K or J is written.
    """

    unbiased: bool = True

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
    """What is subtracted from the signal: independent of the draw it is subtracted from."""

    @property
    def unbiased(self) -> bool:
        """Whether the expected gradient is kept; the tests prove the claim."""
        ...

    def __call__(self, signal: Tensor, draws: Draws) -> Tensor:
        """``[N, *B, K]`` (or a last axis of 1), read without side effect."""
        ...


class StatefulBaseline(Protocol):
    """A baseline that learns from past draws: read first, updated afterwards."""

    def update(self, signal: Tensor, draws: Draws) -> None:
        """Learn from one batch; ``expectation`` calls it after the surrogate."""
        ...


def is_stateful(baseline: object) -> TypeGuard[StatefulBaseline]:
    """Whether a baseline learns: by duck typing, because isinstance on a Protocol costs more than the estimate."""
    return hasattr(baseline, "update")


class ControlVariate(Protocol):
    """``Draws -> Draws``: fx - c h(x) + c E h, with c fitted on other blocks.

    One that is fitted to the present draws says so by ``fitted = True``; one that learns from past draws has
    ``update(draws)``, which ``expectation`` calls last.
    """

    unbiased: bool

    def __call__(self, draws: Draws) -> Draws:
        """The same draws with values of lower variance and equal expectation."""
        ...
