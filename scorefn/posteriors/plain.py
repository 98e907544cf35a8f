"""The ELBO of a log-density and a torch distribution, without Pyro."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from scorefn.core import (
    Baseline,
    ControlVariate,
    Coupling,
    Measure,
    PyTree,
    ShapeError,
    draw,
    estimate,
    expectation,
)


def elbo(
    log_joint: Callable[[Any], Any],
    q: Measure,
    num_samples: int,
    *,
    coupling: Coupling | None = None,
    baseline: Baseline | Literal["auto"] | None = "auto",
    control_variate: ControlVariate | None = None,
) -> Tensor:
    """Evidence lower bound ``E_q[log_joint(z) - log q(z)]``, ``[*B]``, to be maximised.

    Its gradient is ``E[(log_joint - log q) grad log q + grad log_joint]``: the score function for the parameters of q,
    autograd for those inside ``log_joint``. The gradient of ``-log q`` itself has expectation zero and is left out.
    Sources: Ranganath, Gerrish & Blei (2014), "Black box variational inference", eq. 2; Kool, van Hoof & Welling
    (2019) for the default baseline.

    Args:
        log_joint: log p(x, z) up to a constant, z ``[N, *batch, *event]`` to ``[N, *B]``, where B is a leading part of
            q's batch shape.
        q: a torch distribution; the log-probabilities of batch dimensions beyond B are summed.
        num_samples: N, on which ``log_joint`` is called once.
        coupling: as in ``expectation``.
        baseline: as in ``expectation``; "auto" is leave-one-out from two draws on.
        control_variate: as in ``expectation``.

    Raises:
        ShapeError: log_joint's shape is not ``[N, *B]``.
        ScorefnError: as ``expectation``.

    Example:
        >>> import torch
        >>> from scorefn.posteriors import elbo
        >>> _ = torch.manual_seed(0)
        >>> logits = torch.zeros(3, requires_grad=True)
        >>> log_joint = lambda z: torch.tensor([0.1, 0.5, 0.9]).log()[z]
        >>> bound = elbo(log_joint, torch.distributions.Categorical(logits=logits), 100)
        >>> bool(bound < torch.tensor(1.5).log())
        True
    """

    def values(z: PyTree) -> Tensor:
        with torch.no_grad():
            log_q = q.log_prob(z)
        return log_ratio(torch.as_tensor(log_joint(z)), log_q)[0]

    if control_variate is not None:
        return expectation(
            q, values, num_samples, coupling=coupling, baseline=baseline, control_variate=control_variate
        )

    def joint(z: PyTree) -> Tensor:
        value, batch = torch.as_tensor(log_joint(z)), getattr(q, "batch_shape", None)
        if batch is not None and (value.ndim == 0 or value.shape[1:] != batch[: value.ndim - 1]):
            log_ratio(value, q.log_prob(z))  # says what is wrong
        return value

    draws = draw(q, joint, num_samples, coupling=coupling)  # their log q is not evaluated twice
    return estimate(replace(draws, fx=draws.fx - draws.log_prob.detach()), None, baseline)


def log_ratio(value: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """``log_joint - log q`` and ``log q``, both ``[N, *B]``: log q is summed over the dimensions beyond B.

    Raises:
        ShapeError: log_joint's value is not ``[N, *B]`` with B a leading part of q's batch shape.
    """
    if value.ndim == 0 or value.shape != log_q.shape[: value.ndim]:
        raise ShapeError(
            f"log_joint returned shape {tuple(value.shape)}, but log q(z) has shape {tuple(log_q.shape)}: it must "
            f"return one value per draw, [N, *B], B a leading part of batch shape {tuple(log_q.shape[1:])}. "
            "Sum over the dimensions of one draw only, for instance .sum(-1)."
        )
    if log_q.ndim > value.ndim:
        log_q = log_q.flatten(value.ndim).sum(-1)
    return value - log_q, log_q
