"""Quantiles of Student's t and of Fisher's F far out in the tails, from the regularised incomplete beta function."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

_TINY = 1e-300


@lru_cache
def student_quantile(tail: float, freedom: float) -> float:
    """t with P(T > t) = tail, tail at most 1/2: ``P(|T| > t) = I_{v / (v + t^2)}(v / 2, 1 / 2)`` for v degrees."""
    return _root(lambda t: beta_probability(freedom / (freedom + t * t), freedom / 2, 0.5), 2 * tail)


@lru_cache
def fisher_quantile(tail: float, first: float, second: float) -> float:
    """F with P(F > f) = tail: ``I_{b / (b + a f)}(b / 2, a / 2)`` for a and b degrees of freedom."""
    return _root(lambda f: beta_probability(second / (second + first * f), second / 2, first / 2), tail)


def beta_probability(x: float, a: float, b: float) -> float:
    """``I_x(a, b)``, the probability that a Beta(a, b) variable is at most x, by its continued fraction.

    Source: Abramowitz & Stegun (1964), 26.5.8, evaluated by the method of Lentz (1976).
    """
    if x <= 0.0 or x >= 1.0:
        return float(x >= 1.0)
    if x > (a + 1) / (a + b + 2):
        return 1.0 - beta_probability(1.0 - x, b, a)
    c, d = 1.0, 1.0 / _nonzero(1.0 - (a + b) * x / (a + 1))
    fraction = d
    for m in range(1, 100_000):
        for step in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1.0 / _nonzero(1.0 + step * d)
            c = _nonzero(1.0 + step / c)
            fraction *= c * d
        if abs(c * d - 1.0) < 1e-15:
            break
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    return math.exp(log_front) * fraction / a


def _nonzero(value: float) -> float:
    return value if abs(value) > _TINY else _TINY


def _root(tail_of: Callable[[float], float], tail: float) -> float:
    """Where a falling function takes the value, by bisection."""
    low, high = 0.0, 1.0
    while tail_of(high) > tail and high < 1e150:
        low, high = high, 2 * high
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if tail_of(middle) > tail else (low, middle)
    return high
