"""What the repeats of a gradient estimate come to: its moments, its signal-to-noise ratio, its noise scale."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import Any

from torch import Tensor

from scorefn.core.representation import representation


@dataclass(frozen=True)
class GradientStatistics:
    """Moments of a gradient estimate over independent repeats.

    Attributes:
        mean: per parameter, its shape.
        variance: per parameter and coordinate, of one estimate (divided by repeats - 1).
        standard_error: of the mean, per parameter: ``sqrt(variance / repeats)``; with ``batches``, of the mean over
            minibatches.
        total_variance: the sum of the variances over all coordinates.
        signal_to_noise: ``|g|^2 / total_variance``, with |g|^2 estimated without bias and floored at 0; infinite
            without noise.
        seconds: CPU seconds of one estimate and its gradient, made by itself; median.
        repeats: how many estimates were made.
        evaluations: rows x that one estimate gives to f, where f is known; None for a bare callable.
        squared_deviations: ``|g_r - mean|^2`` of each repeat, ``[repeats]``, float64.
        within: with ``batches``, the variance of an estimate given its minibatch: Monte Carlo noise.
        between: with ``batches``, the variance of the exact gradient between minibatches: data noise, floored at 0.
        looped: why the repeats were made one after the other; None: they were made in sweeps.

    With ``batches``, ``total_variance = within + between`` up to the noise of the two estimates themselves.

    Example:
        >>> import torch
        >>> import scorefn as sf
        >>> logits = torch.zeros(3, requires_grad=True)
        >>> subject = torch.distributions.Bernoulli(logits=logits), lambda x: x.sum(-1), sf.ARMS(4)
        >>> found = sf.diagnostics.gradient_statistics(subject, logits, repeats=20)
        >>> found.mean[0].shape, found.repeats, found.evaluations
        (torch.Size([3]), 20, 4)
        >>> abs(found.total_variance - float(found.variance[0].sum())) < 1e-6
        True
    """

    mean: tuple[Tensor, ...]
    variance: tuple[Tensor, ...]
    standard_error: tuple[Tensor, ...]
    total_variance: float
    signal_to_noise: float
    seconds: float
    repeats: int
    evaluations: int | None = None
    squared_deviations: Tensor | None = None
    within: float | None = None
    between: float | None = None
    looped: str | None = None

    __repr__ = representation

    @property
    def noise_scale(self) -> float:
        """``total_variance / |g|^2``, the simple noise scale: the mean of so many has as much noise as signal.

        Source: McCandlish, Kaplan, Amodei et al. (2018), "An empirical model of large-batch training", eq. 2.9.
        """
        return 1 / self.signal_to_noise if self.signal_to_noise > 0 else float("inf")

    @property
    def monte_carlo_share(self) -> float | None:
        """``within / (within + between)``: the share of the noise that more draws would remove; NaN without noise."""
        if self.within is None or self.between is None:
            return None
        noise = self.within + self.between
        return self.within / noise if noise > 0 else float("nan")


def summary(
    gradients: Tensor, seconds: list[float], parameters: tuple[Tensor, ...], *, evaluations: int | None = None
) -> GradientStatistics:
    """Statistics of gradients ``[repeats, P]`` of one estimate, and of the CPU seconds of some of them."""
    repeats = gradients.shape[0]
    mean, variance = gradients.mean(0), gradients.var(0)
    found = moment_fields(mean, variance, variance / repeats, parameters)
    return GradientStatistics(
        **found,
        seconds=max(median(seconds), 1e-9),  # a clock may be too coarse
        repeats=repeats,
        evaluations=evaluations,
        squared_deviations=(gradients - mean).double().square().sum(1),
    )


def moment_fields(mean: Tensor, variance: Tensor, of_mean: Tensor, parameters: tuple[Tensor, ...]) -> dict[str, Any]:
    """The fields that follow from mean, variance and the variance of the mean, each ``[P]``."""
    total = float(variance.sum())
    signal = max(float(mean.square().sum()) - float(of_mean.sum()), 0.0)
    return {
        "mean": unflattened(mean, parameters),
        "variance": unflattened(variance, parameters),
        "standard_error": unflattened(of_mean.sqrt(), parameters),
        "total_variance": total,
        "signal_to_noise": signal / total if total > 0 else float("inf"),
    }


def unflattened(flat: Tensor, parameters: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Cut ``[P]`` into the shapes of the parameters."""
    parts = flat.split([q.numel() for q in parameters])
    return tuple(part.reshape(q.shape) for part, q in zip(parts, parameters, strict=True))
