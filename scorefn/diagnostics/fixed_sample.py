"""Tests of unbiasedness on a number of repeats that is fixed beforehand: per coordinate, and Hotelling's."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from scorefn.core import ScorefnError, check_count
from scorefn.core.representation import representation
from scorefn.diagnostics.moments import Moments
from scorefn.diagnostics.report import (
    VALIDITY,
    Alarm,
    Given,
    Stream,
    UnbiasedReport,
    check_levels,
    check_rarest,
    conclude,
    rounding,
)
from scorefn.diagnostics.tails import fisher_quantile, student_quantile

CHUNK = 2**22
"""Numbers that are held at once."""
SINGULAR = 1e-10
"""A share of the variance below which a direction counts as one without variance."""


@dataclass(frozen=True)
class FixedSample:
    """Student's t in every coordinate, corrected for their number P (Bonferroni), after n = repeats estimates.

    ``z_i = (mean_i - exact_i) / (s_i / sqrt(n))``. *Biased* where some |z_i| exceeds the quantile of Student's t with
    n - 1 degrees of freedom at the tail ``false_alarm / (2 P)``; *unbiased* only where in every coordinate
    ``|mean_i - exact_i| + critical s_i / sqrt(n) <= bias * max_i |exact_i|``: an under-powered run cannot pass. The law
    is exact for normal gradients; others need ``n >= 1000 skewness_i^2`` in every coordinate, which for an event of
    probability p is n p >= 1000. A coordinate that never varies must match exactly.

    Where some coordinates are too skewed, as those of states that are hardly ever visited, nothing is *unbiased*, and
    *biased* only what one of the others shows at the same quantile, that of all P, and by more than draws that were
    never met could make up for: ``|mean_i - exact_i| > critical s_i / sqrt(n) + L log(2 P / false_alarm) / n``, with L
    the largest deviation of any row in any coordinate: an event that n repeats miss with probability
    ``false_alarm / (2 P)`` or more is rarer than the factor of L. Sources: Student (1908), "The probable error of a
    mean", for the law; Dunn (1961), "Multiple comparisons among means", for the correction.

    Args:
        repeats: n, at least 2.
        rarest: probability of the rarest event that matters, where it is known; it must satisfy n p >= 1000 too,
            because an event that was never drawn leaves no trace in the skewness.

    Raises:
        ScorefnError: fewer than 2 repeats, or a ``rarest`` that is no probability.

    Example:
        >>> import torch
        >>> from scorefn.diagnostics import FixedSample
        >>> generator = torch.Generator().manual_seed(0)
        >>> gradients = 1.0 + 0.1 * torch.randn(10_000, 2, generator=generator)
        >>> FixedSample().judge(gradients, torch.ones(2)).verdict
        'unbiased'
    """

    repeats: int = 10_000
    rarest: float | None = None

    __repr__ = representation

    def __post_init__(self) -> None:
        """Refuse numbers out of range."""
        _check_repeats(self.repeats, 2)
        check_rarest(self.rarest)

    def judge(self, gradients: Tensor, exact: Tensor, bias: float = 0.01, false_alarm: float = 1e-6) -> UnbiasedReport:
        """The verdict on gradients in hand, one row per independent repeat; all of them are used.

        Args:
            gradients: ``[n, P]``; n takes the place of ``repeats``.
            exact: ``[P]``.
            bias: to exclude, as a share of the largest exact coordinate.
            false_alarm: of the whole test, two-sided.

        Raises:
            ShapeError: gradients and exact do not fit.
            NonFiniteError: a gradient that is NaN or infinite.
            ScorefnError: fewer than 2 rows, or an exact gradient of zero.
        """
        given = Given(gradients, exact)
        return FixedSample(len(gradients), self.rarest).run(given, bias, false_alarm)

    def run(self, stream: Stream, bias: float, false_alarm: float) -> UnbiasedReport:
        """The verdict on ``repeats`` rows of a stream."""
        check_levels(bias, false_alarm)
        moments = Moments()
        rows = stream.take(min(self.repeats, 1000))
        while len(rows):
            moments.add(rows)
            rows = stream.take(min(self.repeats - moments.count, max(1000, CHUNK // rows.shape[1])))
        critical = student_quantile(false_alarm / (2 * len(moments.mean)), moments.count - 1)

        def margin(of: Moments) -> Tensor:
            return critical * of.error

        scale = stream.scale(margin)
        return conclude(
            "fixed sample",
            stream,
            moments,
            margin,
            worst_coordinate(stream, moments, critical, scale),
            alone=_sound_coordinate(stream, moments, critical, scale, false_alarm),
            bias=bias,
            false_alarm=false_alarm,
            rarest=self.rarest,
        )


def worst_coordinate(stream: Stream, moments: Moments, critical: float, scale: float) -> Alarm:
    """An alarm where a coordinate is more than ``critical`` standard errors off."""
    z = (moments.mean / moments.error.clamp(min=rounding(stream, scale))).abs()
    largest = float(z.max())
    return Alarm(largest > critical, f"coordinate {int(z.argmax())} is {largest:.3g} standard errors off.", critical)


def _sound_coordinate(
    stream: Stream, moments: Moments, critical: float, scale: float, false_alarm: float
) -> tuple[int, str] | None:
    """The worst of the coordinates that are not too skewed, where it is off beyond doubt, and the sentence."""
    floor = rounding(stream, scale)
    count = len(moments.mean)
    sound = moments.count >= VALIDITY * moments.squared_skewness(floor)
    unmet = moments.largest * math.log(2 * count / false_alarm) / moments.count
    error = moments.error.clamp(min=floor)
    z = moments.mean.abs() / error
    off = sound & (moments.mean.abs() > critical * error + unmet)
    if not bool(off.any()):
        return None
    worst = int((z * off).argmax())
    return worst, (
        f"coordinate {worst} is {float(z[worst]):.3g} standard errors off; {int((~sound).sum())} of {count} "
        "coordinates are too skewed to be judged, and were left out."
    )


@dataclass(frozen=True)
class Hotelling:
    """Hotelling's T^2 of batch means: one test of all P coordinates, which sees a bias that is spread over them.

    The n = repeats estimates are averaged in m batches, whose means are nearly normal, with covariance S of rank r::

        T^2 = m d' S^+ d,   d = mean - exact;   T^2 (m - r) / (r (m - 1)) ~ F(r, m - r)

    *Biased* where T^2 exceeds the quantile at ``false_alarm``. Directions in which the estimate never varies (r < P)
    must match exactly. The intervals, and so the verdict *unbiased*, are those of ``FixedSample``, as is the guard.
    Source: Hotelling (1931), "The generalization of Student's ratio".

    Args:
        repeats: n.
        batches: m, at most n; None: as many as there are repeats up to 1000, or 10 P if that is more.
        rarest: see ``FixedSample``.

    Raises:
        ScorefnError: fewer than 2 repeats or batches, or more batches than repeats.

    Example:
        >>> import torch
        >>> from scorefn.diagnostics import Hotelling
        >>> generator = torch.Generator().manual_seed(0)
        >>> exact = torch.ones(20)  # and a bias of 0.5 % in each of 20 coordinates
        >>> gradients = exact + 0.005 + 0.1 * torch.randn(10_000, 20, generator=generator)
        >>> Hotelling().judge(gradients, exact).verdict
        'biased'
    """

    repeats: int = 10_000
    batches: int | None = None
    rarest: float | None = None

    __repr__ = representation

    def __post_init__(self) -> None:
        """Refuse numbers out of range."""
        FixedSample(self.repeats, self.rarest)
        if self.batches is not None and check_count("batches", self.batches) not in range(2, self.repeats + 1):
            raise ScorefnError(
                f"batches={self.batches} of {self.repeats} repeats: give 2 or more, and at most one batch per repeat."
            )

    def judge(self, gradients: Tensor, exact: Tensor, bias: float = 0.01, false_alarm: float = 1e-6) -> UnbiasedReport:
        """The verdict on gradients in hand ``[n, P]``; arguments and errors are those of ``FixedSample.judge``."""
        given = Given(gradients, exact)
        return Hotelling(len(gradients), self.batches, self.rarest).run(given, bias, false_alarm)

    def run(self, stream: Stream, bias: float, false_alarm: float) -> UnbiasedReport:
        """The verdict on ``repeats`` rows of a stream."""
        check_levels(bias, false_alarm)
        coordinates = stream.take(0).shape[1]
        count = self.batches or min(self.repeats, max(1000, 10 * coordinates))
        if count < coordinates + 2:
            raise ScorefnError(
                f"T^2 of {coordinates} coordinates needs {coordinates + 2} batches or more, but repeats={self.repeats} "
                f"and batches={self.batches} make {count}: raise repeats, or use FixedSample."
            )
        moments, means, size = Moments(), [], self.repeats // count
        together = max(1, CHUNK // (size * coordinates))  # batches that are held at once
        for start in range(0, count, together):
            rows = stream.take(size * min(together, count - start))
            moments.add(rows)
            means.append(rows.unflatten(0, (-1, size)).mean(1))
        critical = student_quantile(false_alarm / (2 * coordinates), moments.count - 1)

        def margin(of: Moments) -> Tensor:
            return critical * of.error

        alarm = _quadratic(torch.cat(means), rounding(stream, stream.scale(margin)), false_alarm, critical)
        return conclude(
            "Hotelling", stream, moments, margin, alarm, bias=bias, false_alarm=false_alarm, rarest=self.rarest
        )


def _quadratic(means: Tensor, floor: Tensor, false_alarm: float, critical: float) -> Alarm:
    """T^2 of the batch means ``[m, P]``."""
    count = len(means)
    deviation, spread = means.mean(0), means.std(0)
    still = spread <= floor
    if bool((deviation.abs() > critical * floor)[still].any()):
        worst = int((deviation.abs() * still).argmax())
        return Alarm(True, f"coordinate {worst} never varies and is {float(deviation[worst]):+.3e} off.", critical)
    floor, spread = floor[~still], spread[~still]
    units = (means - deviation)[:, ~still] / spread
    values, vectors = torch.linalg.eigh(units.T @ units / (count - 1))
    kept = values > len(values) * SINGULAR
    rank = int(kept.sum())
    if rank == 0:
        return Alarm(False, "", critical)
    scaled = (deviation[~still] / spread) @ vectors
    # along the others the estimate never varies: their part of the deviation is rounding, or a bias
    slack = critical * ((floor / spread).norm() + (len(values) * SINGULAR / count) ** 0.5)
    if bool((scaled[~kept].abs() > slack).any()):
        return Alarm(True, "a combination of the coordinates that never varies is not the exact one.", critical)
    statistic = float(count * (scaled[kept].square() / values[kept]).sum())
    limit = rank * (count - 1) / (count - rank) * fisher_quantile(false_alarm, rank, count - rank)
    return Alarm(statistic > limit, f"T^2 = {statistic:.1f} exceeds {limit:.1f}.", critical)


def _check_repeats(repeats: int, least: int) -> None:
    if check_count("repeats", repeats) < least:
        raise ScorefnError(f"repeats must be at least {least} to have a variance, but it is {repeats}.")
