"""The exact side of ``check_unbiased``: the reference, how far it is rounded, and the verdict on all outcomes."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from scorefn.core import ScorefnError, expectation
from scorefn.diagnostics.certificate import FEWEST, Outcomes, outcomes, tolerance
from scorefn.diagnostics.estimation import Estimation
from scorefn.diagnostics.exact import exact_gradient, points
from scorefn.diagnostics.report import UnbiasedReport, Verdict

UNITS = 8
"""Units in the last place of ``sum_x |p f score|`` by which an exact gradient may be rounded."""


def reference_size(estimation: Estimation, parameters: tuple[Tensor, ...]) -> float:
    """The largest coordinate of ``sum_x |p(x) f(x) score(x)|``: how far the exact gradient is rounded; 0: unknown."""
    single = Estimation(estimation.p, estimation.f, partial(expectation, num_samples=1, baseline=None))
    found = outcomes(single, parameters)
    return float(found.size.max()) if isinstance(found, Outcomes) else 0.0


def enumerated_gradient(estimation: Estimation, parameters: tuple[Tensor, ...]) -> Tensor | None:
    """The exact gradient ``[P]``, float64; None where there is none, or quadrature has not converged."""

    def at(nodes: int) -> Tensor:
        found = exact_gradient(estimation.p, estimation.f, parameters, nodes=nodes)
        return torch.cat([g.reshape(-1) for g in found]).double()

    try:
        if points(estimation.p, FEWEST)[1] is None:
            return at(FEWEST)
        fine, coarse = at(64), at(48)
    except (ScorefnError, AttributeError, TypeError, NotImplementedError):
        return None
    close = float((fine - coarse).abs().max()) <= tolerance(parameters[0].dtype) * float(fine.abs().max())
    return fine if close else None


def certify(
    found: Outcomes, exact: Tensor, bias: float, dtype: torch.dtype, truth: Tensor | None, size: float = 0.0
) -> UnbiasedReport:
    """The verdict on an estimate all of whose outcomes are known.

    Args:
        found: the outcomes.
        exact: what the mean is compared with, ``[P]``.
        bias: to exclude, as a share of the largest exact coordinate.
        dtype: of the parameters, which says what rounding is.
        truth: the gradient of E f, where it is known: a reference that differs from it is named.
        size: ``reference_size``.
    """
    deviation = found.mean - exact
    scale = float(exact.abs().max())
    least = UNITS * torch.finfo(dtype).eps * max(size, float(found.size.max()))  # what rounding makes of zero
    rounded = max(tolerance(dtype) * max(float(found.size.max()), scale), least)
    largest = float(deviation.abs().max())
    fine = torch.finfo(dtype).eps < 1e-12  # in float32 a gradient beside a large f is not told from zero
    still = scale == 0 or (fine and scale <= least)
    share = largest / scale if not still else (0.0 if largest <= rounded else float("inf"))
    worst = int(deviation.abs().argmax())
    verdict: Verdict = "unbiased"
    if largest > rounded:
        verdict = "biased"
        reason = (
            f"the exact gradient is zero, and the exact mean is {largest:.3g} in its largest coordinate."
            if still
            else f"the exact mean differs from the exact gradient by {share:.4%} of its largest coordinate."
        )
    elif still:
        reason = "the exact gradient is zero to rounding, and so is the exact mean."
    elif rounded > bias * scale:
        verdict = "inconclusive"
        repair = "check at parameters off the optimum, or subtract a constant from f." if fine else "use float64."
        reason = f"a bias below {rounded / scale:.2%} of the largest coordinate is rounding in {dtype}: {repair}"
    else:
        reason = "the exact mean is the exact gradient, to rounding."
    remark, off = "", None if truth is None else (exact - truth).abs()
    if off is not None and float(off.max()) > rounded:
        at = int(off.argmax())
        remark = (
            f"The reference given is {float(exact[at]):+.6e} in coordinate {at}, where the gradient of E f is "
            f"{float(truth[at]):+.6e}: "  # type: ignore[index]
        ) + (
            "the estimate has exactly the latter, so it is the reference that is wrong."
            if float((found.mean - truth).abs().max()) <= rounded  # type: ignore[operator]
            else "check which of the two the estimate is meant for."
        )
    variance = found.variance
    total = float(variance.sum())
    return UnbiasedReport(
        verdict=verdict,
        reason=reason,
        z=deviation / max(rounded, 1e-300),
        critical_z=1.0,
        false_alarm=0.0,
        detectable_bias=0.0 if still else rounded / scale,
        largest_bias=share,
        repeats=len(found.probability),
        method="exact",
        bias=deviation,
        interval=torch.stack((deviation - rounded, deviation + rounded)),
        variance=variance,
        signal_to_noise=float(exact.square().sum()) / total if total else float("inf"),
        worst=worst,
        remark=remark,
    )
