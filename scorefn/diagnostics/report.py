"""What a test of unbiasedness says, and where it gets its numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from numbers import Real
from typing import Literal, Protocol, TypeGuard

import torch
from torch import Tensor

from scorefn.core import NonFiniteError, ScorefnError, ShapeError
from scorefn.core.representation import representation
from scorefn.diagnostics.moments import Moments

Verdict = Literal["unbiased", "biased", "inconclusive"]
Method = Literal["exact", "fixed sample", "Hotelling", "sequential"]
VALIDITY = 1000.0
"""The normal approximation is trusted from this many repeats per squared skewness: n p >= 1000 for an event of
probability p."""
ROUNDING = 32
"""Differences of this many units in the last place are not told from none."""


@dataclass(frozen=True)
class UnbiasedReport:
    """The outcome of ``check_unbiased``; true only where the verdict is "unbiased", and ``str`` says all of it.

    Attributes:
        verdict: "unbiased": every coordinate's bias is below the limit, by enumeration or at the stated confidence;
            "biased": a coordinate's is not zero; "inconclusive": neither, and ``reason`` says what is missing.
        reason: one sentence.
        z: per coordinate, flat ``[P]``: bias / standard error; by enumeration bias / tolerance.
        critical_z: two-sided, corrected for the number of coordinates (Bonferroni), and for all looks where the test is
            sequential; 1 by enumeration.
        false_alarm: probability that an unbiased estimate is called biased, over all coordinates together; 0 by
            enumeration.
        detectable_bias: the bias, as a share of the largest exact coordinate, that would be found with probability
            0.999; the largest over the coordinates.
        largest_bias: upper confidence limit of the bias, as the same share; the bias itself by enumeration.
        repeats: independent estimates made, or outcomes enumerated.
        method: how it was found.
        bias: mean less exact gradient, ``[P]``: exact, or estimated.
        interval: simultaneous limits of the bias, ``[2, P]``.
        variance: of one estimate, ``[P]``: exact, or that of the sample.
        signal_to_noise: ``|g|^2 / sum of the variances``.
        worst: the flat coordinate of the largest bias: in standard errors, or in size by enumeration.
        where: the same in words.
        remark: why no exact answer was possible, or what was noticed beside; "" for nothing.

    Example:
        >>> import torch, scorefn as sf
        >>> logits = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        >>> p, f = torch.distributions.Bernoulli(logits=logits), lambda x: x.sum(-1)
        >>> report = sf.diagnostics.check_unbiased((p, f, sf.DisARM(1)), params=logits)
        >>> bool(report), report.verdict, report.method
        (True, 'unbiased', 'exact')
        >>> report.bias.abs().max().item() < 1e-12, report.variance.shape
        (True, torch.Size([2]))
    """

    verdict: Verdict
    reason: str
    z: Tensor
    critical_z: float
    false_alarm: float
    detectable_bias: float
    largest_bias: float
    repeats: int
    method: Method = "fixed sample"
    bias: Tensor = field(default_factory=lambda: torch.zeros(0))
    interval: Tensor = field(default_factory=lambda: torch.zeros(2, 0))
    variance: Tensor = field(default_factory=lambda: torch.zeros(0))
    signal_to_noise: float = float("nan")
    worst: int = 0
    where: str = ""
    remark: str = ""

    __repr__ = representation

    def __bool__(self) -> bool:
        """Whether unbiasedness was shown."""
        return self.verdict == "unbiased"

    def __str__(self) -> str:
        """The verdict, the worst coordinate, and what to do."""
        what = "outcomes enumerated" if self.method == "exact" else "repeats"
        bias, (low, high) = float(self.bias[self.worst]), self.interval[:, self.worst].tolist()
        lines = [
            f"{self.verdict} ({self.method}, {self.repeats} {what}): {self.reason}",
            f"worst: {self.where or f'coordinate {self.worst}'}, bias {bias:+.3e} in [{low:+.3e}, {high:+.3e}]; "
            f"largest bias {self.largest_bias:.2%} of the largest coordinate, signal to noise of one estimate "
            f"{self.signal_to_noise:.2e}.",
        ]
        if self.verdict != "unbiased":
            lines.append(_ADVICE[self.verdict])
        return "\n".join([*lines, *([self.remark] if self.remark else [])])


_ADVICE = {
    "biased": "To do: look for a baseline that sees its own draw (or a coupled one), a factor such as 1/K in place of "
    "1/(K - 1), values standardised by their own draws, or a term of the gradient that is missing or doubled.",
    "inconclusive": "To do: raise repeats, lower the variance (more draws or a baseline), allow a larger bias=, or "
    "check a smaller instance as (p, f, estimator), where p can be enumerated; where states are rarely visited, let "
    "them share a few parameters.",
}


class Stream(Protocol):
    """Independent rows whose mean is the bias.

    Attributes:
        raw: moments of the estimates themselves.
        epsilon: the relative rounding of one estimate.
    """

    raw: Moments
    epsilon: float

    def take(self, count: int) -> Tensor:
        """The next rows ``[at most count, P]``, float64; none left: ``[0, P]``."""

    def scale(self, margin: Callable[[Moments], Tensor]) -> float:
        """The largest exact coordinate; where it is not known, its lower limit by ``margin``."""


class Given:
    """The rows of gradients that are in hand."""

    def __init__(self, gradients: Tensor, exact: Tensor):
        for name, part in (("gradients", gradients), ("exact", exact)):
            if not isinstance(part, Tensor) or not part.is_floating_point():
                kind = f"of {part.dtype}" if isinstance(part, Tensor) else f"a {type(part).__name__}"
                raise ScorefnError(
                    f"{name} must be a tensor of real floating-point numbers, but it is {kind}: give "
                    f"torch.as_tensor({name}, dtype=torch.float64)."
                )
        if gradients.ndim != 2 or not gradients.shape[1] or exact.shape != gradients.shape[1:]:
            raise ShapeError(
                f"The gradients have shape {tuple(gradients.shape)} and the exact one {tuple(exact.shape)}: give one "
                "row per repeat, [repeats, P], and one exact value per coordinate, [P], with P at least 1."
            )
        refuse_non_finite(gradients, 0)
        self.epsilon = torch.finfo(gradients.dtype).eps
        self._exact = refuse_zero(exact.detach().double())
        self._rows = gradients.detach().double()
        self._taken, self.raw = 0, Moments()

    def take(self, count: int) -> Tensor:
        """The next rows less the exact gradient."""
        rows = self._rows[self._taken : self._taken + count]
        self._taken += len(rows)
        self.raw.add(rows)
        return rows - self._exact

    def scale(self, margin: Callable[[Moments], Tensor]) -> float:
        """The largest exact coordinate."""
        return float(self._exact.abs().max())


def refuse_zero(exact: Tensor) -> Tensor:
    """The exact gradient, refused where it is zero or not a number."""
    if not bool(exact.isfinite().all()):
        raise NonFiniteError("The exact gradient is NaN or infinite: no estimate can be compared with it.")
    if not bool(exact.any()):
        raise ScorefnError(
            "The exact gradient is zero, so no bias is a share of it: check at parameters off the optimum."
        )
    return exact


def refuse_non_finite(gradients: Tensor, made: int) -> None:
    """Refuse rows that are not finite, by their number."""
    finite = gradients.isfinite().all(1)
    if not bool(finite.all()):
        raise NonFiniteError(
            f"The gradient of the estimate is NaN or infinite (repeat {made + int((~finite).nonzero()[0]) + 1}): such "
            "an estimate has neither mean nor variance. Make it finite before it is checked."
        )


@dataclass(frozen=True)
class Alarm:
    """What a test has found.

    Args:
        biased: whether its null hypothesis is rejected.
        reason: the sentence, where it is.
        critical: the intervals are ``bias +- critical * standard error``.
    """

    biased: bool
    reason: str
    critical: float


def conclude(
    method: Method,
    stream: Stream,
    moments: Moments,
    margin: Callable[[Moments], Tensor],
    alarm: Alarm,
    *,
    bias: float,
    false_alarm: float,
    rarest: float | None = None,
    least: int = 2,
    alone: tuple[int, str] | None = None,
) -> UnbiasedReport:
    """The verdict that every sampling test comes to: guard, alarm, equivalence, in this order.

    Where the guard fails, ``alone`` is a coordinate that passes it and suffices for *biased*, with its sentence; None:
    there is none.
    """
    n, mean, error = moments.count, moments.mean, moments.error
    scale = stream.scale(margin)
    floor = rounding(stream, scale)
    half = margin(moments).clamp(min=alarm.critical * floor)
    z = mean / error.clamp(min=floor)
    wanted = VALIDITY * moments.squared_skewness(floor)
    unseen = 0.0 if rarest is None else VALIDITY / rarest
    needed = max(float(wanted.max()), unseen)
    largest = float((mean.abs() + half).max()) / scale if scale else float("inf")
    verdict: Verdict = "inconclusive"
    worst = int(z.abs().argmax())
    if n < least:
        reason = f"{n} repeats were made, and no verdict is given on fewer than {least}."
    elif n < needed and n >= unseen and alone is not None:
        verdict, (worst, reason) = "biased", alone
    elif n < needed:
        reason = f"the values are too skewed for this test: it needs about {needed:.0f} repeats, and {n} were made"
        some = int((wanted > n).sum())
        reason += f" ({some} of {len(wanted)} coordinates)." if 0 < some < len(wanted) else "."
    elif alarm.biased:
        verdict, reason = "biased", alarm.reason
    elif largest <= bias:
        verdict, reason = "unbiased", f"every bias is below {bias:.2%} of the largest coordinate."
        if rarest is None:
            rare = min(VALIDITY / n, 1.0)
            reason += f" Events rarer than about {rare:.2g} in one estimate were not excluded: give rarest=."
    elif scale == 0.0:
        reason = "the gradient cannot be told from zero yet, so no bias is a share of it; give more repeats or exact=."
    else:
        more = n * (float(half.max()) / (bias * scale)) ** 2
        reason = f"biases up to {largest:.2%} cannot be excluded yet; about {more:.0f} repeats would do."
    total, square = float(stream.raw.variance.sum()), float(stream.raw.mean.square().sum())
    signal = max(square - total / stream.raw.count, 0.0)
    return UnbiasedReport(
        verdict=verdict,
        reason=reason,
        z=z,
        critical_z=alarm.critical,
        false_alarm=false_alarm,
        detectable_bias=(alarm.critical + NORMAL_999) * float(error.max()) / scale if scale else float("inf"),
        largest_bias=largest,
        repeats=n,
        method=method,
        bias=mean,
        interval=torch.stack((mean - half, mean + half)),
        variance=stream.raw.variance,
        signal_to_noise=signal / total if total else float("inf"),
        worst=worst,
    )


NORMAL_999 = 3.090232306167813
"""The normal quantile at 0.999."""


def rounding(stream: Stream, scale: float) -> Tensor:
    """The error of a mean by rounding alone, ``[P]``."""
    raw = stream.raw
    size = (raw.mean.square() + raw.variance).sqrt().clamp(min=scale)
    return ROUNDING * stream.epsilon * size.clamp(min=torch.finfo(torch.float64).tiny)


def check_levels(bias: float, false_alarm: float) -> None:
    """Refuse what is no share and no probability."""
    if not _number(bias) or not bias > 0:
        raise ScorefnError(
            f"bias={bias!r} must be positive: the share of the largest coordinate that is to be excluded, below 1."
        )
    if not bias < 1:
        raise ScorefnError(
            f"bias={bias!r} must be below 1: a bias of the size of the gradient itself excludes nothing. Give a share "
            "such as 0.01."
        )
    if not _number(false_alarm) or not 0 < false_alarm < 1:
        raise ScorefnError(f"false_alarm={false_alarm!r} must be a probability between 0 and 1, such as 1e-6.")


def check_rarest(rarest: object) -> None:
    """Refuse what is neither None nor a probability."""
    if rarest is not None and not (_number(rarest) and 0 < rarest <= 1):
        raise ScorefnError(
            f"rarest={rarest!r} must be a probability, the one of the rarest event that matters, such as 0.01."
        )


def _number(value: object) -> TypeGuard[float]:
    return isinstance(value, Real) and not isinstance(value, bool)
