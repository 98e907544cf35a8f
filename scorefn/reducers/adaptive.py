"""Adaptive Rao-Blackwellisation: the values that a decision does not influence, as a control variate for it."""

from __future__ import annotations

import torch
from torch import Tensor

from scorefn.core import Credit, Draws, LeaveOneOut, Total
from scorefn.reducers.baselines import check_moments, check_problems, checked_decay, valid, widened


class AdaptiveRaoBlackwell:
    """Charge decision i with ``D_i + c_i N_i``: N_i, the values it does not influence, have no part in its gradient.

    D_i is the signal (reward-to-go, the factors below a guide site) and N_i the sum of all values that do not depend on
    decision i, as the credit says (``Credit.uninfluenced``); along time, those before it. They are no part of D_i, and
    adding any multiple that is fixed beforehand is unbiased, because ``E[N_i score_i] = 0``. Where D_i and
    N_i vary together (a global site, of whose D_i most of the noise is somebody else's), the coefficient
    ``c_i = -Cov(D_i, N_i) / Var(N_i)`` takes that noise out. Covariance and variance are of leave-one-out-centred
    values, decaying averages over *past* steps, so that c_i does not look at the draws it is applied to; before the
    first update it is 0. What remains is centred by leave-one-out: the baseline is
    ``leave_one_out(D + c N)_i - c_i N_i``.

    Sources: Ranganath, Gerrish & Blei (2014), section 3, for the two parts (they drop N and control D by the score);
    Glynn & Szechtman (2002) for regression on a control of mean zero.

    Args:
        decay: of the averages, in [0, 1).

    Raises:
        ScorefnError: decay outside [0, 1); all draws in one block.
        ShapeError: the batch shape ``*B`` changed between two updates.
        NonFiniteError: an average overflows; nothing was updated then.

    Example:
        >>> import torch, scorefn as sf
        >>> noise = torch.tensor([[1.0], [2.0], [4.0]]).expand(3, 2)  # of both values, alike
        >>> own = sf.Influence(torch.eye(2, dtype=torch.bool))
        >>> draws = sf.Draws(torch.arange(3), torch.zeros(3, 2, requires_grad=True), noise, own)
        >>> baseline = sf.AdaptiveRaoBlackwell()
        >>> baseline.update(draws.signal(), draws)
        >>> baseline.coefficient(draws.signal())  # of the value that is the other decision's
        tensor([-1., -1.])
        >>> (draws.signal() - baseline(draws.signal(), draws)).abs().max()  # no noise is left
        tensor(0.)
    """

    unbiased = True

    def __init__(self, decay: float = 0.95) -> None:
        self.decay = checked_decay(decay)
        self.covariance: Tensor | None = None  # [*B, K], of D and N
        self.variance: Tensor | None = None  # [*B, K], of N

    def __repr__(self) -> str:
        """As it was called."""
        return f"AdaptiveRaoBlackwell({self.decay})"

    def coefficient(self, signal: Tensor) -> Tensor:
        """c for each decision of a signal ``[N, *B, K]``: ``[*B, K]``."""
        covariance, variance = self._states(signal)
        if covariance.shape[-1] > (decisions := signal.shape[-1]):
            covariance, variance = covariance[..., :decisions], variance[..., :decisions]
        return torch.where(variance > 0, -covariance / variance.clamp(min=torch.finfo(signal.dtype).tiny), 0.0)

    def __call__(self, signal: Tensor, draws: Draws) -> Tensor:
        """``[N, *B, K] -> [N, *B, K]``."""
        if self.covariance is None or isinstance(draws.credit, Total):  # nothing is learned, or nothing is left out
            return LeaveOneOut()(signal, draws)
        return controlled(self.coefficient(signal), signal, draws)

    def update(self, signal: Tensor, draws: Draws) -> None:
        """Take in the covariances of one batch; a decision that no other draw has to be centred by does not count."""
        if isinstance(draws.credit, Total):
            return
        covariance, variance = self._states(signal)
        found, present = batch_moments(signal, draws)
        rate = 1.0 - self.decay
        rates = torch.full_like(covariance, rate) if present is None else widened(present.to(signal) * rate, covariance)
        covariance, variance = (
            state.lerp(widened(batch, state), rates)
            for state, batch in zip((covariance, variance), found.unbind(), strict=True)
        )
        check_moments("AdaptiveRaoBlackwell", covariance, variance)
        self.covariance, self.variance = covariance, variance

    def _states(self, signal: Tensor) -> tuple[Tensor, Tensor]:
        if self.covariance is None or self.variance is None:
            return torch.zeros_like(signal[0]), torch.zeros_like(signal[0])
        check_problems("AdaptiveRaoBlackwell", self.covariance.shape[:-1], signal.shape[1:-1])
        return widened(self.covariance.to(signal), signal), widened(self.variance.to(signal), signal)


def controlled(coefficient: Tensor, signal: Tensor, draws: Draws) -> Tensor:
    """The baseline ``leave_one_out(D + c N) - c N`` for these coefficients, ``[N, *B, K]``."""
    control = coefficient * _uninfluenced(signal, draws)
    return LeaveOneOut()(signal + control, draws) - control


def batch_moments(signal: Tensor, draws: Draws) -> tuple[Tensor, Tensor | None]:
    """Covariance of D and N and variance of N over the draws of one batch, ``[2, *B, K]``.

    The second result says, ``[*B, K]``, which decisions have another draw to be centred by; None: all.
    """
    others, number = LeaveOneOut(), len(draws)
    both = torch.stack((signal, _uninfluenced(signal, draws).expand(signal.shape)))
    everywhere = draws.mask is None and draws.group is None
    if everywhere and draws.block is None and number > 1:
        centred = both - both.sum(1, keepdim=True) / number
        found = (centred * centred[1]).sum(1) * (number / (number - 1) ** 2)
    else:
        centred = torch.stack([v - others(v, draws) for v in both])
        found, present = centred * centred[1], valid(signal, draws) & (others(torch.ones_like(signal), draws) > 0)
        count = present.sum(0)
        found = torch.where(present, found, 0.0).sum(1) / count.clamp(min=1)
    # Where a decision influences all values, what remains of them is their rounding, which knows the decision.
    rounding = draws.fx.detach().abs().sum(-1, keepdim=True).amax(0) * (16 * torch.finfo(signal.dtype).eps)
    found = found * (found[1] > rounding.square())
    return found, None if everywhere else count > 0


def _uninfluenced(signal: Tensor, draws: Draws) -> Tensor:
    """Sum of the values that do not depend on each decision, ``[N, *B, K]``.

    Where these are all that are not charged to it, and nothing is weighed, the signal is the sum of those that are, and
    the product with the influence is saved.
    """
    fx, credit = draws.fx.detach(), draws.credit
    weighs = credit.value_weight(fx) is not None or credit.decision_weight(fx) is not None
    if weighs or draws.behaviour_log_prob is not None or type(credit).uninfluenced is not Credit.uninfluenced:
        return draws.uninfluenced
    return fx.sum(-1, keepdim=True) - signal
