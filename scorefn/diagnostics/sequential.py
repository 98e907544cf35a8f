"""A test of unbiasedness that may be looked at after every batch, and stops as soon as it is decided."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from scorefn.core import ScorefnError, check_count
from scorefn.core.representation import representation
from scorefn.diagnostics.fixed_sample import worst_coordinate
from scorefn.diagnostics.moments import Moments
from scorefn.diagnostics.report import Given, Stream, UnbiasedReport, check_levels, check_rarest, conclude


@dataclass(frozen=True)
class Sequential:
    """Confidence sequences of the bias, one per coordinate: valid at all looks together, so it stops once decided.

    In each coordinate the evidence against bias 0 after n estimates, with ``t = sqrt(n) (mean - exact) / s``, is::

        E_n = (1 + n g)^(-1/2) [(1 + t^2 / (n - 1)) / (1 + t^2 / ((n - 1) (1 + n g)))]^(n / 2)

    the likelihood ratio of a normal sample whose bias in standard deviations is N(0, g), against none, with the
    unknown variance integrated out. Under no bias it is a martingale of mean 1, so that it ever exceeds
    ``P / false_alarm`` in one of P coordinates with probability ``false_alarm`` at most (Ville's inequality), however
    often it is looked at. *Biased* where it does; *unbiased* where all confidence sequences (the biases with E_n below
    ``P / false_alarm``) lie within ``+- bias * max_i |exact_i|``; inconclusive after ``most_repeats``.

    The martingale is exact for normal gradients. For others it is asymptotic, E_n then being the normal mixture of an
    asymptotic confidence sequence; so nothing is decided before ``burn_in`` repeats, nor before
    ``n >= 1000 skewness_i^2`` in every coordinate. It is conservative by construction: where it stops, the evidence has
    passed its level, and it is looked at after whole batches only. Sources: Robbins (1970), "Statistical methods
    related to the law of the iterated logarithm"; Lai (1976), "On confidence sequences"; Gonen, Johnson, Lu & Westfall
    (2005), "The Bayesian two-sample t test", for E_n; Waudby-Smith, Arbour, Sinha, Kennedy & Ramdas (2024),
    "Time-uniform central limit theory and asymptotic confidence sequences", for its asymptotic form and for g.

    Args:
        most_repeats: after so many it gives up.
        batch: repeats between two looks.
        burn_in: repeats before the first verdict.
        rarest: see ``FixedSample``.

    Raises:
        ScorefnError: a number below 1, a burn-in below 2, or more of it than ``most_repeats``.

    Example:
        >>> import torch
        >>> from scorefn.diagnostics import Sequential
        >>> generator = torch.Generator().manual_seed(0)
        >>> gradients = 1.05 + 0.1 * torch.randn(100_000, 2, generator=generator)
        >>> report = Sequential().judge(gradients, torch.ones(2))
        >>> report.verdict, report.repeats
        ('biased', 1000)
    """

    most_repeats: int = 1_000_000
    batch: int = 1000
    burn_in: int = 1000
    rarest: float | None = None

    __repr__ = representation

    def __post_init__(self) -> None:
        """Refuse numbers out of range."""
        for name in ("most_repeats", "batch", "burn_in"):
            check_count(name, getattr(self, name))
        if not 2 <= self.burn_in <= self.most_repeats:
            raise ScorefnError(
                f"burn_in={self.burn_in} must lie between 2 and most_repeats={self.most_repeats}: the first verdict "
                "comes after the burn-in."
            )
        check_rarest(self.rarest)

    def judge(self, gradients: Tensor, exact: Tensor, bias: float = 0.01, false_alarm: float = 1e-6) -> UnbiasedReport:
        """The verdict on gradients in hand ``[n, P]``, read in their order until it is decided.

        Raises:
            ShapeError: gradients and exact do not fit.
            NonFiniteError: a gradient that is NaN or infinite.
            ScorefnError: fewer than 2 rows, or an exact gradient of zero.
        """
        given = Given(gradients, exact)
        if len(gradients) < 2:
            raise ScorefnError(f"gradients has {len(gradients)} rows: at least 2 are needed to have a variance.")
        return self.run(given, bias, false_alarm)

    def run(self, stream: Stream, bias: float, false_alarm: float) -> UnbiasedReport:
        """The verdict on as many rows of a stream as it takes."""
        check_levels(bias, false_alarm)
        moments = Moments()
        while True:
            asked = self.burn_in if moments.count < self.burn_in else self.batch
            rows = stream.take(min(asked, self.most_repeats - moments.count))
            moments.add(rows)
            report = self._look(stream, moments, bias, false_alarm)
            if report.verdict != "inconclusive" or moments.count >= self.most_repeats or not len(rows):
                return report

    def _look(self, stream: Stream, moments: Moments, bias: float, false_alarm: float) -> UnbiasedReport:
        level = false_alarm / len(moments.mean)
        g = mixture(level, (self.burn_in * self.most_repeats) ** 0.5)
        critical = critical_value(moments.count, g, level)

        def margin(of: Moments) -> Tensor:
            return critical * of.error if math.isfinite(critical) else torch.full_like(of.error, math.inf)

        return conclude(
            "sequential",
            stream,
            moments,
            margin,
            worst_coordinate(stream, moments, critical, stream.scale(margin)),
            bias=bias,
            false_alarm=false_alarm,
            rarest=self.rarest,
            least=self.burn_in,
        )


def log_evidence(t: float, count: int, g: float) -> float:
    """log E_n at Student's t after ``count`` values; its exponential has mean 1 under the law of t."""
    freedom, growth = count - 1, 1 + count * g
    square = t * t / freedom
    return count / 2 * (math.log1p(square) - math.log1p(square / growth)) - 0.5 * math.log(growth)


def critical_value(count: int, g: float, level: float) -> float:
    """The |t| at which E_n = 1 / level; infinite where ``count`` values cannot reach it."""
    growth = 1 + count * g
    ratio = math.expm1((math.log(growth) - 2 * math.log(level)) / count)  # (sqrt(growth) / level)^(2 / n) - 1
    slope = 1 - (1 + ratio) / growth
    return math.sqrt((count - 1) * ratio / slope) if slope > 0 else math.inf


def mixture(level: float, horizon: float) -> float:
    """g for which the confidence sequence is tightest at about so many repeats (Waudby-Smith et al., 2024)."""
    log_level = -2 * math.log(level)
    return (log_level + math.log(log_level + 1)) / horizon
