"""Whether a gradient estimate is right: by enumeration, or else by a test that states its errors."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from scorefn.core import NonFiniteError, ScorefnError
from scorefn.diagnostics.certificate import Outcomes, certify, enumerated_gradient, outcomes, tolerance
from scorefn.diagnostics.estimation import Estimate, Estimation, Estimator, as_estimate, checked_parameters
from scorefn.diagnostics.fixed_sample import FixedSample
from scorefn.diagnostics.repeats import Repeats
from scorefn.diagnostics.report import Stream, UnbiasedReport, check_levels, refuse_zero
from scorefn.diagnostics.statistics import matching

__all__ = ["UnbiasedReport", "UnbiasedTest", "assert_unbiased", "check_unbiased"]


class UnbiasedTest(Protocol):
    """A sampling test: ``FixedSample``, ``Hotelling`` or ``Sequential``."""

    def run(self, stream: Stream, bias: float, false_alarm: float) -> UnbiasedReport:
        """The verdict on rows whose mean is the bias."""


def check_unbiased(
    estimate: Estimate | Estimation | tuple[object, object, Estimator],
    exact: Tensor | Iterable[Tensor] | None = None,
    params: Tensor | Iterable[Tensor] | None = None,
    *,
    repeats: int = 10_000,
    bias: float = 0.01,
    false_alarm: float = 1e-6,
    rarest: float | None = None,
    test: UnbiasedTest | None = None,
) -> UnbiasedReport:
    """Compare the mean of a gradient estimate with the exact gradient, coordinate by coordinate.

    What is given as ``(p, f, estimator)`` is *enumerated* where that can be done: the estimator is run on every tuple
    of draws that it can make, weighed by its probability, so that its mean and variance are exact and no error is left
    but rounding. It is for finite supports with at most 10^5 tuples, for normals by quadrature, where the draws are
    made by ``p.sample``, and for joint estimators that list their outcomes. Everything else is *sampled*, by
    ``FixedSample(repeats, rarest)`` unless another test is given: "biased" at ``false_alarm``, "unbiased" only where
    every bias is below ``bias`` of the largest exact coordinate at confidence ``1 - false_alarm``, so that an
    under-powered run cannot pass, and "inconclusive" otherwise. A sampled ``(p, f, estimator)`` is compared on the same
    draws with the library's own estimate of the same gradient, which removes the noise that they share (all of it where
    the two are the same estimate: the test is then whether they are).

    Args:
        estimate: ``(p, f, estimator)`` or an ``Estimation``; or a callable without arguments that returns a
            differentiable scalar, every call of which draws afresh.
        exact: the true gradient, one tensor per parameter. None, for ``(p, f, estimator)`` alone: ``exact_gradient``
            where p has one; otherwise the mean is compared with that of ``scorefn.expectation``, leave-one-out, on the
            same draws where they are seen.
        params: the tensors to differentiate.
        repeats: independent estimates for ``FixedSample``.
        bias: the bias to exclude, as a share of the largest exact coordinate.
        false_alarm: of the whole test, two-sided.
        rarest: for ``FixedSample``: probability of the rarest event that matters.
        test: ``FixedSample``, ``Hotelling`` or ``Sequential``: sample, and judge by it. None: enumerate, or sample by
            ``FixedSample``.

    Returns:
        The report; ``print`` it for the verdict in words.

    Raises:
        ScorefnError: no parameters; a bare callable without ``exact``; an exact gradient of zero where the estimate is
            sampled (a share of zero excludes nothing); too few repeats; nothing to compare with; an estimate that is
            constant in the parameters.
        ShapeError: exact and params do not match, or the estimate is no scalar.
        NonFiniteError: a gradient that is NaN or infinite.

    Example:
        >>> from functools import partial
        >>> import scorefn as sf
        >>> logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        >>> p = torch.distributions.Bernoulli(logits=logits)
        >>> estimator = partial(sf.expectation, num_samples=2)
        >>> report = check_unbiased((p, lambda x: x.sum(-1).square(), estimator), params=logits)
        >>> report.verdict, report.method, report.repeats
        ('unbiased', 'exact', 64)
    """
    subject = as_estimate(estimate)
    if params is None:
        raise ScorefnError(
            "params is missing: name the tensors to differentiate, check_unbiased(estimate, params=...)."
        )
    parameters = checked_parameters(params)
    check_levels(bias, false_alarm)
    if test is not None and rarest is not None:
        raise ScorefnError("rarest was given beside test=: give it to the test, such as FixedSample(rarest=0.01).")
    judge = FixedSample(repeats, rarest) if test is None else test
    given, dtypes = None, [q.dtype for q in parameters]
    if exact is not None:
        references = matching(exact, parameters)
        given = torch.cat([t.detach().reshape(-1) for t in references]).double()
        dtypes += [t.dtype for t in references if t.is_floating_point()]
        if not bool(given.isfinite().all()):
            raise NonFiniteError("The exact gradient is NaN or infinite: no estimate can be compared with it.")
    coarse = max(dtypes, key=tolerance)  # what rounding is
    truth, reason = None, ""
    if isinstance(subject, Estimation):
        truth = enumerated_gradient(subject, parameters)
        target = truth if given is None else given
        if test is None and target is not None:
            found = outcomes(subject, parameters)
            if isinstance(found, Outcomes):
                return _named(certify(found, target, bias, coarse, truth), parameters)
            reason = f"Not enumerated: {found}"
    elif given is None:
        raise ScorefnError(
            "exact is missing: a callable does not say what it estimates. Give the exact gradient, one tensor per "
            "parameter, or (p, f, estimator) in place of the callable."
        )
    report = _sampled(subject, parameters, given, truth, coarse, judge, bias, false_alarm)
    return _named(replace(report, remark=" ".join(filter(None, (reason, report.remark)))), parameters)


def assert_unbiased(
    estimate: Estimate | Estimation | tuple[object, object, Estimator],
    exact: Tensor | Iterable[Tensor] | None = None,
    params: Tensor | Iterable[Tensor] | None = None,
    *,
    repeats: int = 10_000,
    bias: float = 0.01,
    false_alarm: float = 1e-6,
    rarest: float | None = None,
    test: UnbiasedTest | None = None,
) -> UnbiasedReport:
    """``check_unbiased`` for a test suite: the report, or AssertionError where unbiasedness was not shown.

    Args:
        estimate: see ``check_unbiased``, as are the others.
        exact: the true gradient.
        params: the tensors to differentiate.
        repeats: independent estimates.
        bias: the bias to exclude.
        false_alarm: of the whole test.
        rarest: probability of the rarest event that matters.
        test: the sampling test.

    Raises:
        AssertionError: the verdict is "biased" or "inconclusive"; its text is the report, with the worst coordinate,
            the size of its bias, and what to do.
        ScorefnError: as ``check_unbiased``.

    Example:
        >>> logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        >>> p = torch.distributions.Bernoulli(logits=logits)
        >>> def shrunk(p, f):  # the baseline has a share in its own draw
        ...     x = p.sample((2,))
        ...     return ((f(x) - f(x).mean(0)) * p.log_prob(x).sum(-1)).mean(0)
        >>> assert_unbiased((p, lambda x: x.sum(-1), shrunk), params=logits)
        Traceback (most recent call last):
        AssertionError: biased (exact, 64 outcomes enumerated): the exact mean differs from the exact gradient by ...
    """
    report = check_unbiased(
        estimate, exact, params, repeats=repeats, bias=bias, false_alarm=false_alarm, rarest=rarest, test=test
    )
    if not report:
        raise AssertionError(str(report))
    return report


def _sampled(
    subject: Estimate,
    parameters: tuple[Tensor, ...],
    given: Tensor | None,
    truth: Tensor | None,
    dtype: torch.dtype,
    test: UnbiasedTest,
    bias: float,
    false_alarm: float,
) -> UnbiasedReport:
    target = truth if given is None else given
    if target is not None:
        refuse_zero(target)
    known = False
    if truth is not None and target is not None:
        known = float((target - truth).abs().max()) <= tolerance(dtype) * float(truth.abs().max())
    stream = Repeats(subject, parameters, target, known)
    stream.epsilon = torch.finfo(dtype).eps
    if not stream.ready:
        raise ScorefnError(
            "There is nothing to compare the estimate with: p has no exact gradient, and scorefn.expectation cannot "
            "make many estimates at once of this p and f. Give exact=, one tensor per parameter."
        )
    # where the size of the gradient is estimated too, each of the two statements has half of the error
    report = test.run(stream, bias, false_alarm / 2 if stream.paired else false_alarm)
    remark = stream.remark
    if stream.paired:
        report = replace(report, false_alarm=false_alarm)
        whose = "draws of its own" if stream.apart else "the same draws"
        remark = f"Compared with the library's estimate on {whose}, as p has no exact gradient. " + remark
    elif truth is not None and not known and given is not None:
        at = int((given - truth).abs().argmax())
        remark = (
            f"The reference given is {float(given[at]):+.6e} in coordinate {at}, where the gradient of E f is "
            f"{float(truth[at]):+.6e}: check which of the two the estimate is meant for. " + remark
        )
    return replace(report, remark=remark)


def _named(report: UnbiasedReport, parameters: tuple[Tensor, ...]) -> UnbiasedReport:
    """The report with its worst coordinate in words."""
    flat = report.worst
    for index, q in enumerate(parameters):
        if flat < q.numel():
            place = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), q.shape)) if q.ndim else ()
            return replace(report, where=f"parameter {index}" + (f" at {place}" if place else ""))
        flat -= q.numel()
    return report
