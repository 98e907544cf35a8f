"""What precision costs: variance x cost, and by how much it may be otherwise (a bootstrap)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scorefn.core import ScorefnError
from scorefn.diagnostics.summary import GradientStatistics, summary

RESAMPLES = 2000
"""Resamples of a bootstrap."""
CELLS = 400
"""A bootstrap resamples so many means of neighbouring repeats, where there are more repeats."""
FEWEST = 8
"""Repeats below which an interval says nothing: it is (0, inf), and the price may be a thousand times another one."""

Cost: TypeAlias = Callable[[GradientStatistics], float]
"""What one estimate costs, in any unit: ``seconds``, ``evaluations``, or your own function of what was measured."""


def seconds(statistics: GradientStatistics) -> float:
    """CPU seconds of one estimate and its gradient: what counts where f is cheap.

    Example:
        >>> import torch, scorefn as sf
        >>> from scorefn.diagnostics import seconds
        >>> logits = torch.zeros(3, requires_grad=True)
        >>> p = torch.distributions.Bernoulli(logits=logits)
        >>> subject = (p, lambda x: x.sum(-1), sf.DisARM(2))
        >>> seconds(sf.diagnostics.gradient_statistics(subject, logits, 4)) > 0
        True
    """
    return statistics.seconds


def evaluations(statistics: GradientStatistics) -> float:
    """Evaluations of f of one estimate: what counts where f is dear.

    Raises:
        ScorefnError: the evaluations of a bare callable, which are not known.

    Example:
        >>> import torch, scorefn as sf
        >>> from scorefn.diagnostics import evaluations
        >>> logits = torch.zeros(3, requires_grad=True)
        >>> p = torch.distributions.Bernoulli(logits=logits)
        >>> subject = (p, lambda x: x.sum(-1), sf.DisARM(2))  # two pairs
        >>> evaluations(sf.diagnostics.gradient_statistics(subject, logits, 4))
        4.0
    """
    if statistics.evaluations is None:
        raise ScorefnError(
            "The evaluations of f are not known for a callable without arguments: give the estimate as (p, f, "
            "estimator), or rank by cost=scorefn.diagnostics.seconds."
        )
    return float(statistics.evaluations)


@dataclass(frozen=True)
class Measurement:
    """What was measured of one estimator.

    Args:
        statistics: of all repeats.
        timings: ``[T]`` CPU seconds of single estimates.
    """

    statistics: GradientStatistics
    timings: NDArray[np.float64]

    @classmethod
    def of(
        cls,
        gradients: Tensor,
        timings: Sequence[float],
        evaluations: int | None,
        parameters: tuple[Tensor, ...],
    ) -> Measurement:
        """From gradients ``[R, P]``."""
        found = summary(gradients, list(timings), parameters, evaluations=evaluations)
        return cls(found, np.maximum(np.asarray(timings, dtype=np.float64), 1e-9))  # a clock may be too coarse


def prices_of(
    measurements: Mapping[str, Measurement], cost: Cost
) -> tuple[dict[str, float], dict[str, NDArray[np.float64]]]:
    """The prices, and for each ``RESAMPLES`` values that spread as its confidence distribution does.

    A variance below the rounding of the largest second moment among them is none: its price is 0.
    """
    generator = np.random.default_rng(0)
    largest = max(float(_second_moment(m.statistics)) for m in measurements.values())
    prices: dict[str, float] = {}
    samples: dict[str, NDArray[np.float64]] = {}
    for name, m in measurements.items():
        s = m.statistics
        one = _checked(cost(s), name)
        noise = s.total_variance if s.total_variance > _rounding(s) * largest else 0.0
        prices[name] = noise * one
        if noise == 0.0:  # or none was met yet
            samples[name] = np.zeros(RESAMPLES)
            continue
        distinct, which = np.unique(resampled_medians(m.timings, generator), return_inverse=True)
        dear = np.array([_checked(cost(replace(s, seconds=float(t))), name) for t in distinct])[which]
        samples[name] = noise * np.exp(_log_errors(_deviations(s), generator)) * dear
    return prices, samples


def resampled_medians(values: NDArray[np.float64], generator: np.random.Generator) -> NDArray[np.float64]:
    """``[RESAMPLES]``: medians of the values drawn anew with replacement, as many as there are.

    Drawn is what the median is of, by its law: of n uniform ranks in (0, 1) the lower middle one, number k + 1 from
    below, is Beta(k + 1, n - k), and where n is even the upper one is the least of n - k - 1 above it.
    """
    n, ordered = len(values), np.sort(values)
    k = (n - 1) // 2
    low = generator.beta(k + 1, n - k, RESAMPLES)
    high = low if n % 2 else 1 - (1 - low) * generator.random(RESAMPLES) ** (1 / (n - k - 1))
    lower, upper = (ordered[np.minimum((n * rank).astype(int), n - 1)] for rank in (low, high))
    found: NDArray[np.float64] = (lower + upper) / 2
    return found


def within(samples: Mapping[str, NDArray[np.float64]], margin: float = 1.1) -> dict[str, float]:
    """By name, the share of resamples in which its price is at most ``margin`` times the least of all."""
    least = np.min(np.stack(list(samples.values())), axis=0)
    return {name: float((s <= margin * least).mean()) for name, s in samples.items()}


def effective_repeats(statistics: GradientStatistics) -> float:
    """``(sum d)^2 / sum d^2``: how many repeats a variance really rests on; small where rare events make it."""
    d = _deviations(statistics)
    fourth = float(np.square(d).sum())
    return float(d.sum()) ** 2 / fourth if fourth > 0 else 0.0


def check_cost(cost: Any) -> None:
    """Refuse what is no function."""
    if not callable(cost) or isinstance(cost, type):
        raise ScorefnError(
            f"cost must be a function of GradientStatistics, but it is {cost!r}: use scorefn.diagnostics.seconds, "
            "scorefn.diagnostics.evaluations or your own."
        )


def _deviations(statistics: GradientStatistics) -> NDArray[np.float64]:
    """``|g_r - mean|^2`` of each repeat."""
    if statistics.squared_deviations is None:
        raise ScorefnError("These statistics lack squared_deviations, so there is no interval: measure them anew.")
    found: NDArray[np.float64] = statistics.squared_deviations.double().cpu().numpy()
    return found


def _log_errors(d: NDArray[np.float64], generator: np.random.Generator) -> NDArray[np.float64]:
    """``[RESAMPLES]``, by how much the logarithm of the true variance may lie above that of the measured one.

    Bootstrap-t: the resampled error in units of its own resampled standard error, times the measured standard error.
    """
    if len(d) < FEWEST:
        return generator.uniform(-math.log(1000.0), math.log(1000.0), RESAMPLES)
    cells = min(len(d), CELLS)
    starts = np.linspace(0, len(d), cells, endpoint=False).astype(int)
    d = np.add.reduceat(d, starts) / np.diff([*starts, len(d)])
    mean, spread = d.mean(), d.std(ddof=1) / cells**0.5
    if spread == 0:  # deviations that are all alike
        return np.zeros(RESAMPLES)
    again = (d - mean)[generator.integers(cells, size=(RESAMPLES, cells))]
    shifts = again.mean(1)
    squares = np.maximum(np.einsum("rc,rc->r", again, again) / cells - shifts**2, 0.0)
    spreads = np.sqrt(squares / (cells - 1))
    means = np.maximum(mean + shifts, 1e-300)
    relative = np.maximum(spreads / means, 1e-3 * spread / mean)
    errors: NDArray[np.float64] = np.clip(-np.log(means / mean) / relative * (spread / mean), -50.0, 50.0)
    return errors


def _checked(value: Any, name: str) -> float:
    try:
        found = math.nan if isinstance(value, str) else float(value)
    except (TypeError, ValueError, RuntimeError):  # None, or an array of several numbers
        found = math.nan
    if not 0 < found < math.inf:
        raise ScorefnError(
            f'The cost of "{name}" is {value!r}, but it must be a finite number above 0, as variance x cost ranks '
            "nothing otherwise: look at the function given as cost."
        )
    return found


def _second_moment(statistics: GradientStatistics) -> float:
    return statistics.total_variance + sum(float(mean.double().square().sum()) for mean in statistics.mean)


def _rounding(statistics: GradientStatistics) -> float:
    """The share of the largest second moment below which a variance is rounding."""
    return (4 * torch.finfo(statistics.mean[0].dtype).eps) ** 2
