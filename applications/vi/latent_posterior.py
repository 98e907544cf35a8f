"""The exact answer to a model of discrete states under continuous globals: its posterior, by quadrature.

Since sums over the states are cheap given x, and the posterior of x is close to a Gaussian, Gauss-Hermite quadrature
gives what a fit is judged by: the posterior's means, the marginals of its states, the evidence.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from applications.vi.fitting import ascend
from applications.vi.latent_states import TOGETHER, Program, hermite


@dataclass(frozen=True)
class Posterior:
    """A posterior by quadrature.

    Attributes:
        log_evidence: of the data.
        means: of the globals, ``[G]``.
        sds: their standard deviations, ``[G]``.
        states: P(state = 1 | y), ``[S]``.
        loc: mean of x, ``[D]``.
        covariance: of x, ``[D, D]``.
    """

    log_evidence: float
    means: Tensor
    sds: Tensor
    states: Tensor
    loc: Tensor
    covariance: Tensor


@torch.no_grad()
def posterior(program: Program, per_dim: int = 9) -> Posterior:
    """Quadrature over x with the posterior's own mean and covariance, found from its mode in two rounds."""
    loc, covariance = _mode(program)
    standard, weight = hermite(len(loc), per_dim)
    for _ in range(3):
        tril = torch.linalg.cholesky(covariance)
        x = loc + standard @ tril.mT
        log_q = torch.distributions.MultivariateNormal(loc, scale_tril=tril).log_prob(x)
        log_joint = torch.cat([program.log_joint(part) for part in x.split(TOGETHER)])
        # A weight of 1e-30 times a ratio that is not Gaussian is still nothing, but its logarithm is finite.
        log_weight = weight.log() + log_joint - log_q
        share = log_weight.softmax(0)
        loc = share @ x
        covariance = torch.einsum("m,md,me->de", share, x - loc, x - loc)
    values = program.values(x)
    means = share @ values
    kept = share > 1e-13 * share.max()  # the states are the dear part
    shares = (share[kept] / share[kept].sum()).split(TOGETHER)
    states = sum(own @ program.states(part) for own, part in zip(shares, x[kept].split(TOGETHER), strict=True))
    assert isinstance(states, Tensor)
    sds = (share @ (values - means).square()).sqrt()
    return Posterior(log_weight.logsumexp(0).item(), means, sds, states, loc, covariance)


def _mode(program: Program) -> tuple[Tensor, Tensor]:
    """Mode of x and inverse Hessian there."""
    with torch.enable_grad():
        x = program.start().requires_grad_()
        ascend([x], lambda: program.log_joint(x.unsqueeze(0)).sum())
        hessian = torch.autograd.functional.hessian(lambda u: -program.log_joint(u.unsqueeze(0)).sum(), x.detach())
    return x.detach(), torch.linalg.inv(hessian)
