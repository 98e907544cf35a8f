"""What a table says of several seeds: the interquartile mean and its bootstrap interval.

Source: Agarwal, Schwarzer, Castro, Courville & Bellemare (2021), "Deep reinforcement learning at the edge of the
statistical precipice".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray


class Interval(NamedTuple):
    """An estimate and the interval around it."""

    estimate: float
    low: float
    high: float

    def __str__(self) -> str:
        """With as many digits as the estimate has meaning for."""
        digits = 0 if abs(self.estimate) >= 1000 else 1 if abs(self.estimate) >= 10 else 3
        return f"{self.estimate:,.{digits}f} [{self.low:,.{digits}f}, {self.high:,.{digits}f}]"


def interquartile_mean(scores: ArrayLike, axis: int = -1) -> NDArray[np.float64]:
    """Mean of what is left when the lowest and the highest ``floor(n / 4)`` of n scores are dropped.

    Args:
        scores: any shape.
        axis: along which they are sorted; it disappears.
    """
    ordered = np.sort(np.asarray(scores, dtype=np.float64), axis=axis)
    count = ordered.shape[axis]
    if count == 0:
        raise ValueError("The interquartile mean of no scores is not defined: give one or more.")
    dropped = count // 4
    middle: NDArray[np.float64] = ordered.take(range(dropped, count - dropped), axis).mean(axis)
    return middle


def bootstrap(
    strata: ArrayLike | Sequence[ArrayLike],
    statistic: Callable[..., NDArray[np.float64]] = interquartile_mean,
    *,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """A statistic of all scores together, and its percentile interval of a stratified bootstrap.

    Scores are drawn anew, with replacement, within each stratum (a task; then scores must be comparable between tasks),
    so that every resample has as many scores of each stratum as there are. With 5 scores the interval is a rough one:
    there are 126 resamples that differ, and none leaves the range of what was seen.

    Args:
        strata: one row of scores, ``[runs]``, or several rows, which may be of different lengths.
        statistic: ``(scores [..., n], axis=-1) -> [...]``.
        level: of the interval, between 0 and 1.
        resamples: how many.
        seed: of the resamples.
    """
    if not 0.0 < level < 1.0:
        raise ValueError(f"level must lie between 0 and 1, but it is {level}.")
    one = all(np.ndim(row) == 0 for row in strata)  # type: ignore[union-attr]
    rows = [np.asarray(row, dtype=np.float64) for row in ([strata] if one else strata)]  # type: ignore[union-attr]
    if not all(row.size and np.isfinite(row).all() for row in rows):
        raise ValueError("Every stratum needs one finite score or more: leave out what was not run.")
    generator = np.random.default_rng(seed)
    again = np.concatenate([row[generator.integers(len(row), size=(resamples, len(row)))] for row in rows], -1)
    low, high = np.quantile(statistic(again, axis=-1), [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(statistic(np.concatenate(rows), axis=-1)), float(low), float(high))
