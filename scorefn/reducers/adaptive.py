"""Adaptive Rao-Blackwellisation: the values that a decision does not influence, as a control variate for it."""

from __future__ import annotations

import torch
from torch import Tensor

from scorefn.core import Draws, LeaveOneOut, ScorefnError, ShapeError
from scorefn.reducers.baselines import valid, widened


class AdaptiveRaoBlackwell:
    """Charge decision i with ``D_i + c_i N_i``: N_i, the values it does not influence, have no part in its gradient.

    D_i is the signal (reward-to-go, the factors below a guide site) and N_i the sum of all other values. Dropping N_i
    is unbiased, and so is adding any multiple that is fixed beforehand, because ``E[N_i score_i] = 0``. Where D_i and
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
    """

    unbiased = True

    def __init__(self, decay: float = 0.95) -> None:
        if not 0.0 <= decay < 1.0:
            raise ScorefnError(f"decay must lie in [0, 1), but it is {decay}: at 1 nothing would ever be learned.")
        self.decay = decay
        self.covariance: Tensor | None = None  # [*B, K], of D and N
        self.variance: Tensor | None = None  # [*B, K], of N

    def __repr__(self) -> str:
        """As it was called."""
        return f"AdaptiveRaoBlackwell({self.decay})"

    def coefficient(self, signal: Tensor) -> Tensor:
        """c for each decision of a signal ``[N, *B, K]``: ``[*B, K]``."""
        covariance, variance = (state[..., : signal.shape[-1]] for state in self._states(signal))
        return torch.where(variance > 0, -covariance / variance.clamp(min=torch.finfo(signal.dtype).tiny), 0.0)

    def __call__(self, signal: Tensor, draws: Draws) -> Tensor:
        """``[N, *B, K] -> [N, *B, K]``."""
        control = self.coefficient(signal) * draws.uninfluenced
        return LeaveOneOut()(signal + control, draws) - control

    def update(self, signal: Tensor, draws: Draws) -> None:
        """Take in the covariances of one batch; decisions without a valid draw stay as they are."""
        covariance, variance = self._states(signal)
        others = LeaveOneOut()
        rest = draws.uninfluenced.expand(signal.shape)
        centred, control = signal - others(signal, draws), rest - others(rest, draws)
        # Where a decision influences all values, what remains of them is their rounding, which knows the decision.
        size = draws.fx.detach().abs().sum(-1, keepdim=True).amax(0)
        control = torch.where(control.abs() > 16 * torch.finfo(signal.dtype).eps * size, control, 0.0)
        present = valid(signal, draws)
        count = present.sum(0)
        rate = widened((count > 0).to(signal) * (1.0 - self.decay), covariance)
        found = [torch.where(present, control * v, 0.0).sum(0) / count.clamp(min=1) for v in (centred, control)]
        self.covariance = covariance + rate * (widened(found[0], covariance) - covariance)
        self.variance = variance + rate * (widened(found[1], variance) - variance)

    def _states(self, signal: Tensor) -> tuple[Tensor, Tensor]:
        if self.covariance is None or self.variance is None:
            return torch.zeros_like(signal[0]), torch.zeros_like(signal[0])
        if self.covariance.shape[:-1] != signal.shape[1:-1]:
            raise ShapeError(
                f"AdaptiveRaoBlackwell was learned on batch shape {tuple(self.covariance.shape[:-1])} but meets "
                f"{tuple(signal.shape[1:-1])}: its entries belong to particular problems. Use a new one."
            )
        return widened(self.covariance.to(signal), signal), widened(self.variance.to(signal), signal)
