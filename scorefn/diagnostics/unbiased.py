"""Whether a gradient estimate is right: by enumeration, or else by a test that states its errors."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from scorefn.core import NonFiniteError, ScorefnError
from scorefn.diagnostics.certificate import Outcomes, gradient_row, outcomes, tolerance
from scorefn.diagnostics.certified import certify, enumerated_gradient, reference_size
from scorefn.diagnostics.estimation import (
    Estimate,
    Estimation,
    Estimator,
    as_estimate,
    checked_parameters,
)
from scorefn.diagnostics.fixed_sample import FixedSample
from scorefn.diagnostics.guards import Unchanged, density_fault, f_fault, refuse_empty
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

    What is not taken on trust: an f that is random, or mixes its rows, has no exact gradient here; an estimator that
    gives two results on the same draws is sampled; and where p's probabilities do not sum to 1, or a sampler or density
    of one's own disagree on 50,000 draws, nothing is called unbiased. What stays unseen: a private generator that shows
    in fewer than about one of 1000 estimates, or is seeded anew by each draw; in a sampled test, events rarer than
    ``1000 / repeats`` unless ``rarest`` names them; and sampler and density of a p that is neither finite nor normal.

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
            sampled (a share of zero excludes nothing); too few repeats; nothing to compare with; an estimate that
            depends on none of the parameters, or changes their values or ``.grad`` (both are put back); a graph of p
            that was freed by an earlier backward; an argument out of range or of another type.
        ShapeError: exact and params do not match, or the estimate is no scalar.
        NonFiniteError: a gradient that is NaN or infinite.

    Example:
        >>> import torch, scorefn as sf
        >>> from functools import partial
        >>> from scorefn.diagnostics import check_unbiased
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
    if not any(q.numel() for q in parameters):
        raise ScorefnError(
            f"params hold no numbers, with shapes {[tuple(q.shape) for q in parameters]}: there is nothing to check. "
            "Give parameters with at least one element."
        )
    check_levels(bias, false_alarm)
    if test is not None and (isinstance(test, type) or not callable(getattr(test, "run", None))):
        raise ScorefnError(
            f"test={test!r} is no sampling test: give an instance, such as FixedSample(10_000), Hotelling() or "
            "Sequential()."
        )
    if test is not None and rarest is not None:
        raise ScorefnError("rarest was given beside test=: give it to the test, such as FixedSample(rarest=0.01).")
    judge = FixedSample(repeats, rarest) if test is None else test
    given, dtypes = None, [q.dtype for q in parameters]
    if exact is not None:
        if not isinstance(exact, Tensor) and hasattr(exact, "__array__"):
            raise ScorefnError(
                f"exact is a {type(exact).__name__}, but an exact gradient is a tensor, or one for each parameter: "
                "give torch.as_tensor(exact)."
            )
        references = matching(exact, parameters)
        given = torch.cat([t.detach().reshape(-1) for t in references]).double()
        dtypes += [t.dtype for t in references if t.is_floating_point()]
        if not bool(given.isfinite().all()):
            raise NonFiniteError("The exact gradient is NaN or infinite: no estimate can be compared with it.")
    coarse = max(dtypes, key=tolerance)  # what rounding is
    if isinstance(subject, Estimation):
        refuse_empty(subject.p)
        with Unchanged(parameters):  # at once, before it is run many times
            gradient_row(subject, parameters)
    elif given is None:
        raise ScorefnError(
            "exact is missing: a callable does not say what it estimates. Give the exact gradient, one tensor per "
            "parameter, or (p, f, estimator) in place of the callable."
        )
    with Unchanged(parameters):
        report = _judged(subject, parameters, given, coarse, test, judge, bias, false_alarm)
    return _named(report, parameters)


def _judged(
    subject: Estimate,
    parameters: tuple[Tensor, ...],
    given: Tensor | None,
    coarse: torch.dtype,
    test: UnbiasedTest | None,
    judge: UnbiasedTest,
    bias: float,
    false_alarm: float,
) -> UnbiasedReport:
    """The verdict, exact or sampled."""
    truth, reason, fault = None, "", ""
    if isinstance(subject, Estimation):
        fault = density_fault(subject.p, tolerance(coarse))
        random = f_fault(subject.p, subject.f)
        truth = None if random else enumerated_gradient(subject, parameters)
        target = truth if given is None else given
        if fault and given is not None:
            truth = None  # of another law than that of the draws: no judge of the reference that was given
        if random:
            reason = f"Not enumerated: {random}"
        elif test is None and target is not None:
            found = outcomes(subject, parameters)
            if isinstance(found, Outcomes):
                size = reference_size(subject, parameters)
                return _distrusted(certify(found, target, bias, coarse, truth, size), fault, given is None)
            reason = f"Not enumerated: {found}"
    report = _sampled(subject, parameters, given, truth, coarse, judge, bias, false_alarm)
    remark = " ".join(filter(None, (reason, report.remark)))
    return _distrusted(replace(report, remark=remark), fault, given is None)


def _distrusted(report: UnbiasedReport, fault: str, whole: bool) -> UnbiasedReport:
    """No verdict where the density is not that of the draws; a bias against a given gradient stays one.

    Args:
        report: the verdict.
        fault: of sampler and density; empty for none.
        whole: whether the reference, too, was made by them.
    """
    if not fault:
        return report
    if report.verdict == "biased" and not whole:
        return replace(report, remark=" ".join(filter(None, (fault, report.remark))))
    reason = f"{fault} Make log_prob the normalised density of what sample draws."
    return replace(report, verdict="inconclusive", reason=reason)


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
        >>> import torch, scorefn as sf
        >>> from functools import partial
        >>> from scorefn.diagnostics import assert_unbiased
        >>> logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        >>> p = torch.distributions.Bernoulli(logits=logits)
        >>> def batch_mean(signal, draws):  # a baseline that has a share in its own draw
        ...     return signal.mean(0).expand_as(signal)
        >>> estimator = partial(sf.expectation, num_samples=2, baseline=batch_mean)
        >>> assert_unbiased((p, lambda x: x.sum(-1), estimator), params=logits)
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
        relative = "This is relative to the library's own estimate, not to an exact gradient."
        report = replace(report, false_alarm=false_alarm, reason=f"{report.reason} {relative}")
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
