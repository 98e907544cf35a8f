"""What is read off the turns of a row: figures, and ratios in which above 1 is good for scorefn."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from applications.benchmarks.side_by_side.work import Sample
from applications.over_seeds import bootstrap

Floats = NDArray[np.float64]
FAILED = 1e15  # in place of infinity, which quantiles cannot interpolate
ENDLESS = 1e9  # beyond this, a figure or a ratio is not known to be finite
RESAMPLES = 4000


def columns(samples: Sequence[Sample]) -> Floats:
    """``[turns, 3]``: CPU seconds, work, value; a value that failed or is not there is NaN."""
    return np.array([[s["cpu"], s["work"], math.nan if s.get("value") is None else s["value"]] for s in samples], float)


def _seconds(x: Floats) -> Floats:
    return x[..., 0] / x[..., 1]


def _rate(x: Floats) -> Floats:
    return x[..., 1] / x[..., 0]


def _reached(column: int) -> Callable[[Floats], Floats]:
    return lambda x: np.where(np.isnan(x[..., 2]), FAILED, x[..., column])


def _price(x: Floats) -> Floats:
    product: Floats = x[..., 2].mean(-1) * np.median(_seconds(x), -1)
    return product


@dataclass(frozen=True)
class Measure:
    """A column of a table.

    Attributes:
        key: its name in the record.
        title: its heading.
        each: a turn's figure ``[..., turns, 3] -> [..., turns]``, of which the median counts; None: there is ``all``.
        all: a figure of all turns together, ``[..., turns, 3] -> [...]``.
        paired: the ratio is the median of the ratios within a turn, not the ratio of the two figures.
        scale: what the figure is multiplied with on a page.
        lower: a lower figure is the better one.
        succeeds: turns can fail; their share is shown.
    """

    key: str
    title: str
    each: Callable[[Floats], Floats] | None = None
    all: Callable[[Floats], Floats] | None = None
    paired: bool = True
    scale: float = 1.0
    lower: bool = True
    succeeds: bool = False

    def figure(self, x: Floats) -> Floats:
        """``[..., turns, 3] -> [...]``."""
        if self.all is not None:
            return self.all(x)
        assert self.each is not None
        middle: Floats = np.median(self.each(x), -1)
        return middle

    def ratio(self, own: Floats, other: Floats) -> Floats:
        """How many times better the first is than the second, ``[...]``."""
        if self.paired and self.each is not None:
            first, second = self.each(own), self.each(other)
            found: Floats = np.median(second / first if self.lower else first / second, -1)
            return found
        first, second = self.figure(own), self.figure(other)
        unknown = np.minimum(first, second) >= ENDLESS  # neither arrived
        found = np.where(unknown, math.nan, second / first if self.lower else first / second)
        return found


TIME = Measure("cpu", "CPU ms", _seconds, scale=1e3)
RATE = Measure("rate", "env steps per CPU s", _rate, lower=False)
PRICE = Measure("price", "variance x CPU s", all=_price, paired=False)
SECONDS_UNTIL = Measure("seconds", "CPU s until", _reached(0), paired=False, succeeds=True)
WORK_UNTIL = Measure("work", "env steps until", _reached(1), paired=False)
EVALUATIONS = Measure("evaluations", "evaluations", _reached(1), paired=False, succeeds=True)


def interval(statistic: Callable[[Floats], Floats], turns: int) -> dict[str, float | None]:
    """A statistic of turns ``[..., n]`` (their numbers) and its 95 % bootstrap interval; None: not finite."""

    def of(numbers: Floats, axis: int = -1) -> Floats:
        return statistic(numbers.astype(int))

    found = bootstrap(np.arange(turns), of, resamples=RESAMPLES)
    names = ("value", "low", "high")
    return {name: number if _known(number) else None for name, number in zip(names, found, strict=True)}


def _known(number: float) -> bool:
    return math.isfinite(number) and 1 / ENDLESS < abs(number) < ENDLESS


def figures(measure: Measure, samples: Sequence[Sample]) -> dict[str, float | None]:
    """The figure of a contender with its interval, on the page's scale."""
    x = columns(samples)
    return interval(lambda i: measure.scale * measure.figure(x[i]), len(x))


def ratios(measure: Measure, own: Sequence[Sample], other: Sequence[Sample]) -> dict[str, float | None]:
    """The ratio to another contender with its interval; both are resampled with the same turns."""
    x, y = columns(own), columns(other)
    return interval(lambda i: measure.ratio(x[i], y[i]), len(x))


def successes(samples: Sequence[Sample]) -> dict[str, Any]:
    """How many turns arrived, and the exact binomial interval of their share."""
    arrived, turns = sum(s.get("value") is not None for s in samples), len(samples)
    low, high = binomial_interval(arrived, turns)
    return {"arrived": arrived, "of": turns, "low": low, "high": high}


def binomial_interval(successes: int, trials: int, level: float = 0.95) -> tuple[float, float]:
    """Clopper and Pearson's (1934): all shares that would not be rejected on either side at half the error.

    Args:
        successes: of trials, at least 0.
        trials: at least 1.
        level: of the interval.
    """
    error = (1 - level) / 2

    def at_least(count: int, share: float) -> float:
        return sum(math.comb(trials, k) * share**k * (1 - share) ** (trials - k) for k in range(count, trials + 1))

    def where(crossed: Callable[[float], bool]) -> float:
        low, high = 0.0, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (low, middle) if crossed(middle) else (middle, high)
        return (low + high) / 2

    low = 0.0 if successes == 0 else where(lambda share: at_least(successes, share) > error)
    high = 1.0 if successes == trials else where(lambda share: 1 - at_least(successes + 1, share) < error)
    return low, high
