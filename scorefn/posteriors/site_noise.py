"""What each site of a guide contributes to the gradient, and how noisy that is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from scorefn.core import Baseline, Credit, Draws, LeaveOneOut, NonFiniteError, ScorefnError, ShapeError, surrogate


@dataclass(frozen=True)
class SignalToNoise:
    """Of a gradient estimate.

    Attributes:
        signal: ``|g|^2`` of the expected gradient, estimated without bias: it may be below 0 where noise rules.
        variance: of one estimate, summed over coordinates.
        repeats: how many estimates there were.

    Example:
        >>> import torch
        >>> from scorefn.posteriors import signal_to_noise
        >>> found = signal_to_noise(
        ...     torch.tensor([[1.0, 0.0], [3.0, 0.0]])
        ... )  # mean (2, 0), variance 2
        >>> found
        SignalToNoise(signal=3.0, variance=2.0, repeats=2)
        >>> found.ratio
        1.5
    """

    signal: float
    variance: float
    repeats: int

    @property
    def ratio(self) -> float:
        """``|g|^2 / variance``, floored at 0; infinite without noise, NaN where there is no gradient either."""
        signal = max(self.signal, 0.0)
        if self.variance > 0:
            return signal / self.variance
        return float("inf") if signal > 0 else float("nan")


def signal_to_noise(gradients: Tensor) -> SignalToNoise:
    """Signal and noise of independent estimates of one gradient.

    With mean g and total variance ``V = sum_r |g_r - g|^2/(R - 1)``, the signal is ``|g|^2 - V/R``: both are unbiased.

    Args:
        gradients: ``[R, P]``, R at least 2.

    Raises:
        ShapeError: another shape, or fewer than two estimates.
        NonFiniteError: a gradient that is NaN or infinite.

    Example:
        >>> import torch
        >>> from scorefn.posteriors import signal_to_noise
        >>> _ = torch.manual_seed(0)
        >>> gradients = torch.tensor([3.0, 4.0]) + 2 * torch.randn(5000, 2)  # |g|^2 = 25, V = 2 * 4
        >>> found = signal_to_noise(gradients)
        >>> abs(found.signal - 25) < 1 and abs(found.variance - 8) < 1
        True
        >>> signal_to_noise(
        ...     torch.tensor([[1.0], [-1.0]])
        ... ).signal  # nothing but noise: |g|^2 = 0 less V/R = 1
        -1.0
    """
    if gradients.ndim != 2 or len(gradients) < 2:
        raise ShapeError(
            f"gradients has shape {tuple(gradients.shape)}, but it must be [R, P] with R at least 2: one estimate says "
            "nothing about its own noise."
        )
    if not bool(gradients.isfinite().all()):
        raise NonFiniteError("A gradient is NaN or infinite, so it has no variance. Look at log p and log q there.")
    values = gradients.detach().double()
    mean, R = values.mean(0), len(values)
    variance = float((values - mean).square().sum()) / (R - 1)
    return SignalToNoise(float(mean.square().sum()) - variance / R, variance, R)


def site_gradients(
    draws: Draws,
    sites: Mapping[str, Tensor | slice],
    params: Tensor | Iterable[Tensor],
    *,
    credit: Credit | None = None,
    baseline: Baseline | Literal["auto"] | None = "auto",
) -> dict[str, Tensor]:
    """The score-function gradient, site by site: ``(1/N) sum_nk (signal_nk - b_nk) grad log q_nk`` over k in the site.

    Their sum over the sites, and the pathwise gradient of fx, make the gradient of ``surrogate(draws).mean()``. One
    backward pass for each site; graph, ``.grad`` and baseline stay as they are.

    Args:
        draws: log_prob ``[N, K]``, of a guide.
        sites: by name, the columns of log_prob that belong to it.
        params: the tensors to differentiate.
        credit: see ``scorefn.surrogate``.
        baseline: see ``scorefn.expectation``; read, never updated.

    Returns:
        By name ``[P]``, the gradient for all parameters, flat and in their order.

    Raises:
        ShapeError: draws with batch dimensions.
        ScorefnError: draws without a graph, or no parameters.

    Example:
        >>> import torch
        >>> from scorefn import Draws
        >>> from scorefn.posteriors import site_gradients
        >>> logits = torch.zeros(
        ...     2, requires_grad=True
        ... )  # of two coins, so that grad log q = z - 1/2
        >>> z = torch.tensor([[0.0, 1.0], [1.0, 1.0]])
        >>> fx = torch.tensor([[2.0], [4.0]])
        >>> draws = Draws(z, torch.distributions.Bernoulli(logits=logits).log_prob(z), fx)
        >>> site_gradients(draws, {"a": slice(0, 1), "b": slice(1, 2)}, logits, baseline=None)
        {'a': tensor([0.5000, 0.0000]), 'b': tensor([0.0000, 1.5000])}
    """
    parameters = (params,) if isinstance(params, Tensor) else tuple(params)
    if not parameters:
        raise ScorefnError("There are no parameters to differentiate: pass tensors that require grad.")
    if draws.log_prob.ndim != 2:
        raise ShapeError(
            f"log_prob has shape {tuple(draws.log_prob.shape)}, but sites are columns of [N, K]: sum a guide's draws "
            "over independent problems, or look at one of them."
        )
    if not draws.log_prob.requires_grad:
        raise ScorefnError(
            "log_prob does not require grad, so there is no score: make the draws outside torch.no_grad()."
        )
    chosen = (LeaveOneOut() if draws.num_blocks > 1 else None) if isinstance(baseline, str) else baseline
    value = surrogate(draws, credit=credit, baseline=chosen).mean()
    (weight,) = torch.autograd.grad(value, draws.log_prob, retain_graph=True)
    found = {}
    for name, columns in sites.items():
        parts = torch.autograd.grad(
            draws.log_prob[:, columns],
            parameters,
            weight[:, columns],
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        found[name] = torch.cat([part.reshape(-1) for part in parts])
    return found
