"""Ratios of policy and behaviour: at which level they are taken, how they are transformed, and what that biases."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from scorefn.core import Draws, ScorefnError, ShapeError
from scorefn.core.checks import importance_weight
from scorefn.core.representation import representation


class Level(Protocol):
    """Over which decisions a ratio is taken."""

    @property
    def unbiased(self) -> bool:
        """Whether the untransformed ratio keeps the expected gradient."""
        ...

    @property
    def bias(self) -> str:
        """What it does instead, in a sentence."""
        ...

    def __call__(self, draws: Draws) -> Tensor:
        """The log-ratio ``[N, *B, K]``, or ``[N, *B, 1]`` for one ratio a draw; differentiable."""
        ...


class Transform(Protocol):
    """What becomes of ratio times advantage."""

    @property
    def unbiased(self) -> bool:
        """Whether ratio times advantage stays as it is."""
        ...

    @property
    def bias(self) -> str:
        """What it does instead, in a sentence."""
        ...

    def __call__(self, ratio: Tensor, advantage: Tensor) -> Tensor:
        """``[N, *B, K]``."""
        ...

    def clips(self, ratio: Tensor) -> Tensor:
        """Which ratios lie beyond the bounds, bool."""
        ...


def _log_ratio(draws: Draws) -> Tensor:
    """Of each decision; 0 where absent. On-policy its value is 0 and its gradient the score."""
    behaviour = draws.log_prob.detach() if draws.behaviour_log_prob is None else draws.behaviour_log_prob
    return draws.log_prob - behaviour


@dataclass(frozen=True)
class PerDecision:
    """``w_k = p_k / b_k``, of each decision alone; called with draws, its logarithm ``[N, *B, K]``.

    On-policy, without ``behaviour_log_prob``, its value is 0 and its gradient the score. ``bias`` says what it does to
    the expected gradient. Sources: Schulman et al. (2017), "Proximal policy optimization algorithms"; Shao et al.
    (2024), "DeepSeekMath".

    Example:
        >>> import torch
        >>> from scorefn.trajectories import PerDecision, sequence_draws
        >>> logp = torch.tensor([[0.5, 0.5], [0.5, 0.25]]).log().requires_grad_()
        >>> behaviour = torch.tensor([[0.25, 0.5], [0.5, 0.5]]).log()
        >>> draws = sequence_draws(logp, [1.0, 0.0], behaviour_logp=behaviour)
        >>> PerDecision()(draws).detach().exp().round(decimals=3)  # one ratio for each token
        tensor([[2.0000, 1.0000],
                [1.0000, 0.5000]])
    """

    @property
    def unbiased(self) -> bool:
        """Not where there are several decisions."""
        return False

    @property
    def bias(self) -> str:
        """The declared bias."""
        return (
            "Exact for a single decision; with several, the states and values that other decisions lead to are "
            "those of the behaviour, to first order in the distance of the two policies."
        )

    def __call__(self, draws: Draws) -> Tensor:
        """``[N, *B, K]``."""
        return _log_ratio(draws)


@dataclass(frozen=True)
class Sequence:
    """``w = prod_k p_k / b_k``, of all decisions of a draw together; called with draws, its logarithm ``[N, *B, 1]``.

    Unbiased, with a variance that grows exponentially with K. Source: Precup, Sutton & Singh (2000), "Eligibility
    traces for off-policy policy evaluation".

    Example:
        >>> import torch
        >>> from scorefn.trajectories import Sequence, sequence_draws
        >>> logp = torch.tensor([[0.5, 0.5], [0.5, 0.25]]).log().requires_grad_()
        >>> behaviour = torch.tensor([[0.25, 0.25], [0.5, 0.5]]).log()
        >>> draws = sequence_draws(logp, [1.0, 0.0], behaviour_logp=behaviour)
        >>> # one ratio for each draw: 2 times 2, 1 times a half
        >>> Sequence()(draws).detach().exp().round(decimals=3)
        tensor([[4.0000],
                [0.5000]])
    """

    @property
    def unbiased(self) -> bool:
        """Always."""
        return True

    @property
    def bias(self) -> str:
        """The declared bias."""
        return "None; its variance grows exponentially with the number of decisions."

    def __call__(self, draws: Draws) -> Tensor:
        """``[N, *B, 1]``."""
        return _log_ratio(draws).sum(-1, keepdim=True)


@dataclass(frozen=True)
class Geometric:
    """``w = (prod_k p_k / b_k)^(1/K)`` over the decisions that are present; with draws, its logarithm ``[N, *B, 1]``.

    Biased, as ``bias`` says. Source: Zheng et al. (2025), "Group sequence policy optimization", eq. 7.

    Example:
        >>> import torch
        >>> from scorefn.trajectories import Geometric, sequence_draws
        >>> logp = torch.tensor([[0.5, 0.5], [0.5, 0.5]]).log().requires_grad_()
        >>> behaviour = torch.tensor([[0.25, 0.25], [0.5, 0.5]]).log()
        >>> draws = sequence_draws(logp, [1.0, 0.0], behaviour_logp=behaviour)
        >>> # the geometric mean of 2 and 2, and of 1 and 1
        >>> Geometric()(draws).detach().exp().round(decimals=3)
        tensor([[2.],
                [1.]])
    """

    @property
    def unbiased(self) -> bool:
        """Not where there are several decisions."""
        return False

    @property
    def bias(self) -> str:
        """The declared bias."""
        return (
            "A root of the exact weight, so that off-policy the values are weighted too little; one advantage for the "
            "whole draw is divided by the number of its decisions even on-policy, which favours short ones."
        )

    def __call__(self, draws: Draws) -> Tensor:
        """``[N, *B, 1]``."""
        log_ratio = _log_ratio(draws)
        if draws.mask is None:
            return log_ratio.mean(-1, keepdim=True)
        return log_ratio.sum(-1, keepdim=True) / draws.mask.sum(-1, keepdim=True).clamp(min=1)


@dataclass(frozen=True)
class Raw:
    """``w A``, from ratios and advantages ``[N, *B, K]``, or ``[N, *B, 1]``, as all transforms: nothing is changed.

    Example:
        >>> import torch
        >>> from scorefn.trajectories import Raw
        >>> Raw()(torch.tensor([0.5, 3.0]), torch.tensor([1.0, -1.0]))
        tensor([ 0.5000, -3.0000])
    """

    @property
    def unbiased(self) -> bool:
        """Always."""
        return True

    @property
    def bias(self) -> str:
        """The declared bias."""
        return "None beside that of the level."

    def __call__(self, ratio: Tensor, advantage: Tensor) -> Tensor:
        """``[N, *B, K]``."""
        return ratio * advantage

    def clips(self, ratio: Tensor) -> Tensor:
        """None."""
        return torch.zeros_like(ratio, dtype=torch.bool)


@dataclass(frozen=True)
class Truncated:
    """``min(w, cap) A`` (Ionides, 2008, "Truncated importance sampling"): beyond the cap there is no gradient.

    Ratios and advantages are ``[N, *B, K]``, or ``[N, *B, 1]`` where all decisions of a draw share one.

    Args:
        cap: at least 1, so that on-policy, where every ratio is 1, all draws have their gradient.

    Raises:
        ScorefnError: a cap below 1.

    Example:
        >>> import torch
        >>> from scorefn.trajectories import Truncated
        >>> Truncated(2.0)(torch.tensor([0.5, 3.0]), torch.tensor([1.0, -1.0]))
        tensor([ 0.5000, -2.0000])
        >>> Truncated(2.0).clips(torch.tensor([0.5, 3.0]))
        tensor([False,  True])
    """

    cap: float

    __repr__ = representation

    def __post_init__(self) -> None:
        """Check the cap."""
        if not hasattr(self.cap, "__float__") or not self.cap >= 1.0:
            raise ScorefnError(
                f"cap must be a number of at least 1, but it is {self.cap!r}: draws of the present policy, whose ratio "
                "is 1, would have no gradient."
            )

    @property
    def unbiased(self) -> bool:
        """Only without a cap."""
        return self.cap == math.inf

    @property
    def bias(self) -> str:
        """The declared bias."""
        return f"Draws that the policy makes more than {self.cap:g} times as likely as the behaviour teach nothing."

    def __call__(self, ratio: Tensor, advantage: Tensor) -> Tensor:
        """``[N, *B, K]``."""
        return ratio.clamp(max=self.cap) * advantage

    def clips(self, ratio: Tensor) -> Tensor:
        """Those above the cap."""
        return ratio > self.cap


@dataclass(frozen=True)
class Clipped:
    """``min(w A, clip(w, 1 - low, 1 + high) A)`` (Schulman et al., 2017, "Proximal policy optimization", eq. 7).

    There is no gradient where the ratio has left the interval in the direction in which the advantage pushes it; where
    it has left it in the other direction there is. Ratios and advantages are ``[N, *B, K]``, or ``[N, *B, 1]`` where
    all decisions of a draw share one. Two bounds: Yu et al. (2025), "DAPO", eq. 8.

    Args:
        low: in [0, 1].
        high: at least 0; None: as low.

    Raises:
        ScorefnError: a bound outside its interval.

    Example:
        >>> import torch
        >>> from scorefn.trajectories import Clipped
        >>> ratio = torch.tensor([0.5, 1.0, 1.5])
        >>> Clipped(0.25)(ratio, torch.ones(3))  # a good action: nothing more is gained above 1.25
        tensor([0.5000, 1.0000, 1.2500])
        >>> Clipped(0.25)(ratio, -torch.ones(3))  # a bad one: nothing more below 0.75
        tensor([-0.7500, -1.0000, -1.5000])
    """

    low: float
    high: float | None = None

    __repr__ = representation

    def __post_init__(self) -> None:
        """Check the bounds."""
        for name, bound in (("low", self.low), ("high", self.low if self.high is None else self.high)):
            if not hasattr(bound, "__float__"):
                raise ScorefnError(f"{name} must be a number, but it is {bound!r}: how far a ratio may move from 1.")
        if not 0.0 <= self.low <= 1.0:
            raise ScorefnError(f"low must lie in [0, 1], but it is {self.low}: ratios are clipped to 1 - low.")
        if not self.upper >= 1.0:
            raise ScorefnError(f"high must be at least 0, but it is {self.high}: ratios are clipped to 1 + high.")

    @property
    def upper(self) -> float:
        """``1 + high``."""
        return 1.0 + (self.low if self.high is None else self.high)

    @property
    def unbiased(self) -> bool:
        """Never off-policy; on-policy nothing is clipped."""
        return False

    @property
    def bias(self) -> str:
        """The declared bias."""
        return (
            f"Decisions whose ratio has left [{1 - self.low:g}, {self.upper:g}] in the direction of their advantage "
            "have no gradient; on-policy there are none."
        )

    def __call__(self, ratio: Tensor, advantage: Tensor) -> Tensor:
        """``[N, *B, K]``."""
        return torch.minimum(ratio * advantage, ratio.clamp(1.0 - self.low, self.upper) * advantage)

    def clips(self, ratio: Tensor) -> Tensor:
        """Those outside the interval, whatever their advantage."""
        return (ratio < 1.0 - self.low) | (ratio > self.upper)


def ratio_surrogate(
    draws: Draws,
    advantage: Tensor,
    *,
    level: Level = PerDecision(),
    transform: Transform = Clipped(0.2),
) -> Tensor:
    """Transformed ratio times advantage, summed over the decisions, ``[N, *B]``: differentiate it, or its mean.

    Its gradient is what autograd makes of it: ``grad w = w grad log p``. Without ``behaviour_log_prob`` the behaviour
    is the present policy: all ratios are 1, none of the transforms here changes them, and the gradient is that of the
    score function, ``sum_k A_k grad log p_k`` (divided by the number of decisions where ``Geometric`` has one advantage
    for the whole draw).

    The level decides what the ratio weighs. With one advantage for each decision, a ratio of the whole draw weighs all
    of them, and each decision keeps the score that belongs to it (GSPO-token: Zheng et al., 2025, eq. 13). With one
    advantage for the whole draw, ``[N, *B, 1]``, it is ``w A`` once, with the gradient of the ratio itself: for
    ``Geometric`` that of the whole draw divided by the number of decisions. ``PerDecision`` gives that one advantage to
    every decision.

    The expected gradient is kept if ``level.unbiased and transform.unbiased``, that is by ``Sequence()`` with
    ``Raw()``; otherwise each says in ``bias`` what it does. The exact weights of single decisions, where each value is
    carried by the ratio of the decisions that influence it, are those of ``surrogate(draws)`` (``Draws.weighted``):
    less variance than ``Sequence()``, and no bias.

    Args:
        draws: with ``behaviour_log_prob`` where they are off-policy.
        advantage: ``[N, *B, K]`` or ``[N, *B, 1]``, a constant: gradients through it are cut. Not read where a decision
            is absent.
        level: ``PerDecision()``, ``Sequence()`` or ``Geometric()``.
        transform: ``Raw()``, ``Truncated(cap)`` or ``Clipped(low, high)``.

    Raises:
        ShapeError: the advantage has another shape.
        NonFiniteError: a ratio overflows.

    Example:
        >>> import torch
        >>> from scorefn.trajectories import ratio_surrogate, sequence_draws
        >>> logp = torch.full((2, 3), -1.0, requires_grad=True)
        >>> draws = sequence_draws(logp, [1.0, 0.0])
        >>> ratio_surrogate(draws, torch.tensor([[0.5], [-0.5]])).sum().backward()
        >>> logp.grad  # on-policy: A grad log p
        tensor([[ 0.5000,  0.5000,  0.5000],
                [-0.5000, -0.5000, -0.5000]])
    """
    full = draws.log_prob.shape
    whole = (*full[:-1], 1)
    if advantage.shape != full and advantage.shape != whole:
        raise ShapeError(
            f"advantage has shape {tuple(advantage.shape)}, but beside log_prob [N, *B, K] = {tuple(full)} it must be "
            f"{tuple(full)}, one for each decision, or {whole}, one for each draw."
        )
    log_ratio = level(draws)
    if log_ratio.shape != full == advantage.shape:  # one ratio, several advantages
        log_ratio = log_ratio.detach() + (draws.log_prob - draws.log_prob.detach())
    advantage = advantage.detach()
    if draws.mask is not None:
        present = draws.mask if log_ratio.shape == full else draws.mask.any(-1, keepdim=True)
        log_ratio, advantage = log_ratio.where(present, 0.0), advantage.where(present, 0.0)
    return transform(importance_weight(log_ratio), advantage).sum(-1)
