"""Work as a contender offers it; a contender's module imports this and its own library."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

Sample = Mapping[str, float | None]
"""One turn: ``cpu`` seconds, how much ``work`` they did, and a ``value`` where the measure reads one (None: failed)."""


@dataclass(frozen=True)
class Answer:
    """What the work computes, so that contenders can be compared before they are timed.

    Attributes:
        mean: ``[P]``.
        error: standard errors ``[P]`` of estimates; 0 for what is not random, or drawn alike from one seed.
    """

    mean: list[float]
    error: list[float]


@dataclass(frozen=True)
class Work:
    """What a factory returns.

    Attributes:
        run: does the work of a turn, whose number it is told, once. It returns None where the worker is to take the
            time, and a ``Sample`` otherwise: with ``cpu`` if it looked at the clock itself, because a part of what it
            does is not to be counted.
        answer: what it computes; None: nothing that could be compared.
    """

    run: Callable[[int], Sample | None]
    answer: Callable[[], Answer] | None = None


def exactly(values: ArrayLike) -> Answer:
    """Without randomness."""
    mean = np.asarray(values, dtype=np.float64).ravel()
    return Answer(mean.tolist(), np.zeros_like(mean).tolist())


def on_average(one: Callable[[], ArrayLike], count: int) -> Answer:
    """The mean of so many estimates and its standard error."""
    rows = np.stack([np.asarray(one(), dtype=np.float64).ravel() for _ in range(count)])
    return Answer(rows.mean(0).tolist(), (rows.std(0, ddof=1) / count**0.5).tolist())


def digest(values: ArrayLike) -> np.ndarray:
    """Four sums of many numbers, with weights that treat no two of them alike."""
    flat = np.asarray(values, dtype=np.float64).ravel()
    sums: np.ndarray = np.cos(np.outer([1.0, 2.0, 3.0, 5.0], np.arange(len(flat)))) @ flat
    return sums


def agree(one: Mapping[str, Any], other: Mapping[str, Any], tolerance: float = 1e-3) -> bool:
    """Whether two answers are the same: within 5 standard errors and a share of the largest number."""
    mine, theirs = np.array(one["mean"]), np.array(other["mean"])
    if mine.shape != theirs.shape:
        return False
    noise = np.hypot(one["error"], other["error"])
    allowed = 5 * noise + tolerance * np.maximum(np.abs(mine).max(), np.abs(theirs).max())
    return bool((np.abs(mine - theirs) <= allowed).all())
