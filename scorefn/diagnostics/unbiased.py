"""A test of unbiasedness that states its error rates and passes on equivalence only."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import torch
from torch import Tensor

from scorefn.core import ScorefnError
from scorefn.diagnostics.estimation import Estimate, as_parameters
from scorefn.diagnostics.statistics import interleaved, matching

VALIDITY = 1000.0
"""The z-test is trusted from this many repeats per squared skewness: n p_min >= 1000 for an event of probability p."""


@dataclass(frozen=True)
class UnbiasedReport:
    """The outcome of ``check_unbiased``; true only where the verdict is "unbiased".

    Attributes:
        verdict: "unbiased": every coordinate's bias is below the limit at the stated confidence; "biased": a
            coordinate's |z| exceeds the critical value; "inconclusive": neither, and ``reason`` says what is missing.
        reason: one sentence.
        z: per coordinate, flat ``[P]``: (mean - exact) / standard error.
        critical_z: two-sided, corrected for the number of coordinates (Bonferroni).
        false_alarm: probability that an unbiased estimate is called biased, over all coordinates together.
        detectable_bias: the bias, as a share of the largest exact coordinate, that would be found with probability
            0.999; the largest over the coordinates.
        largest_bias: upper confidence limit of the bias, as the same share.
        repeats: independent estimates made.
    """

    verdict: Literal["unbiased", "biased", "inconclusive"]
    reason: str
    z: Tensor
    critical_z: float
    false_alarm: float
    detectable_bias: float
    largest_bias: float
    repeats: int

    def __bool__(self) -> bool:
        """Whether unbiasedness was shown."""
        return self.verdict == "unbiased"


def check_unbiased(
    estimate: Estimate,
    exact: Tensor | Iterable[Tensor],
    params: Tensor | Iterable[Tensor],
    *,
    repeats: int = 10_000,
    bias: float = 0.01,
    false_alarm: float = 1e-6,
    rarest: float | None = None,
) -> UnbiasedReport:
    """Compare the mean of a gradient estimate with the exact gradient, coordinate by coordinate.

    With n repeats, ``z_i = (mean_i - exact_i) / (s_i / sqrt(n))``. The estimate is called *biased* where some |z_i|
    exceeds the two-sided critical value at ``false_alarm / P``; *unbiased* only where, for every coordinate,
    ``|mean_i - exact_i| + critical_z s_i / sqrt(n) <= bias * max_i |exact_i|``: an under-powered run cannot pass. The
    normal approximation fails for rare events, so a verdict needs ``n >= 1000 skewness_i^2`` in every coordinate,
    which for an event of probability p is n p >= 1000.

    Args:
        estimate: zero-argument callable that returns a differentiable scalar; every call draws afresh.
        exact: the true gradient, one tensor per parameter, as from ``exact_gradient``.
        params: the tensors to differentiate.
        repeats: n.
        bias: the bias to exclude, as a share of the largest exact coordinate.
        false_alarm: of the whole test, two-sided.
        rarest: probability of the rarest event that matters, where it is known; it must satisfy n p >= 1000 too,
            because an event that was never drawn leaves no trace in the skewness.

    Raises:
        ScorefnError: an exact gradient of zero (a share of zero excludes nothing), or too few repeats.
        ShapeError: exact and params do not match, or the estimate is no scalar.
    """
    parameters = as_parameters(params)
    truths = matching(exact, parameters)
    truth = torch.cat([t.detach().reshape(-1) for t in truths]).double()
    scale = float(truth.abs().max())
    if scale == 0.0:
        raise ScorefnError(
            "The exact gradient is zero, so no bias is a share of it: check at parameters off the optimum."
        )
    gradients = interleaved({"estimate": estimate}, parameters, repeats)["estimate"][0].double()
    deviation = gradients.mean(0) - truth
    spread = gradients.std(0)
    error = spread / repeats**0.5
    critical = NormalDist().inv_cdf(1.0 - false_alarm / (2 * len(truth)))
    power = NormalDist().inv_cdf(0.999)
    rounding = 32 * torch.finfo(parameters[0].dtype).eps * scale
    z = deviation / error.clamp(min=rounding)
    skewness = ((gradients - gradients.mean(0)) / spread.clamp(min=rounding)).pow(3).mean(0)
    needed = VALIDITY * max(float(skewness.square().max()), 0.0 if rarest is None else 1.0 / rarest)
    largest = float((deviation.abs() + critical * error).max()) / scale

    verdict: Literal["unbiased", "biased", "inconclusive"] = "inconclusive"
    if repeats < needed:
        reason = (
            f"the values are too skewed for a z-test: it needs about {needed:.0f} repeats, and {repeats} were made."
        )
    elif float(z.abs().max()) > critical:
        verdict, reason = (
            "biased",
            f"coordinate {int(z.abs().argmax())} is {float(z.abs().max()):.1f} standard errors off.",
        )
    elif largest <= bias:
        verdict, reason = "unbiased", f"every bias is below {bias:.2%} of the largest coordinate."
    else:
        more = repeats * (critical * float(error.max()) / (bias * scale)) ** 2
        reason = f"biases up to {largest:.2%} cannot be excluded yet; about {more:.0f} repeats would do."
    return UnbiasedReport(
        verdict=verdict,
        reason=reason,
        z=z,
        critical_z=critical,
        false_alarm=false_alarm,
        detectable_bias=(critical + power) * float(error.max()) / scale,
        largest_bias=largest,
        repeats=repeats,
    )
