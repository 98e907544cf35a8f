"""Whether the score averages to zero, as the identity needs: supports that move, densities not of the sampler."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from scorefn.core import PyTree, ScorefnError
from scorefn.diagnostics.audits.report import Finding, Notes
from scorefn.diagnostics.audits.testing import ZeroMean, directions, rounding, slopes, zero_mean
from scorefn.estimators.support import support

_SCORE = "scores that do not average to zero"
_TOTAL = "probabilities that do not add up to one"
_FREQUENCY = "draws at other frequencies than their probabilities"
_MOST_VALUES = 4096
_MOST_COMPARED = 2**28  # values x draws x numbers of each

_REASON = (
    "The identity needs E[grad log p] = 0. It fails where the support moves with a parameter, where log_prob is not "
    "normalised, or where the draws come from another distribution than log_prob scores."
)
_REPAIR = (
    "Detach what sets the support, normalise log_prob (event sums, Jacobians of transforms), and score exactly what "
    "was sampled, before any clipping or rounding."
)


def audit_scores(
    notes: Notes,
    batches: Callable[[], Iterator[tuple[Tensor, Tensor | None]]],
    parameters: Sequence[Tensor],
    false_alarm: float,
) -> None:
    """Test ``E[grad log p] = 0`` on draws, in each parameter.

    Args:
        notes: what is found.
        batches: log-probabilities ``[n, ...]`` whose entries have scores that are martingale differences, and which of
            them are present.
        parameters: what to differentiate.
        false_alarm: of the whole test.
    """
    terms: list[list[Tensor]] = [[] for _ in parameters]
    along = [directions(q) for q in parameters]
    try:
        for log_prob, mask in batches():
            for place, (q, v) in enumerate(zip(parameters, along, strict=True)):
                found = slopes(log_prob, q, v)
                terms[place].append(found[mask] if mask is not None else found.flatten(0, -2))
    except RuntimeError as error:
        notes.unchecked[_SCORE] = f"log_prob cannot be differentiated twice ({str(error).splitlines()[0][:120]})."
        return
    scores = [torch.cat(parts) for parts in terms]
    typical = max(float(s.double().square().mean().sqrt()) for s in scores)
    tests = []
    for q, score in zip(parameters, scores, strict=True):
        unit = 1.0 / max(float(q.detach().square().mean().sqrt()), 1.0)
        size = max(typical, unit)
        tests.append(zero_mean(score, false_alarm / len(parameters), rounding(size, [q]), unmet=10 * size))
    for number, (q, test) in enumerate(zip(parameters, tests, strict=True)):
        if test.off:
            fact = f"The mean score of parameter {number}, of shape {tuple(q.shape)}, is not zero."
            notes.findings.append(Finding(_SCORE, fact, _REASON, _REPAIR, test.evidence))
            return
    _conclude(notes, _SCORE, tests, "a mean score", "what leaves the mean score at zero would not be seen")


def _conclude(notes: Notes, name: str, tests: Sequence[ZeroMean], noun: str, limit: str) -> None:
    """Say what a test without a finding has shown."""
    worst = max(tests, key=lambda test: test.needed - test.count)
    if not worst.valid:
        notes.unchecked[name] = (
            f"the terms are too skewed for a z-test of {worst.count}: about {worst.needed:.0f} would do (repeats=)."
        )
        return
    detectable = max(test.detectable for test in tests)
    notes.checked[name] = (
        f"statistical, {worst.count} terms: {noun} of {detectable:.2g} would have been found; {limit}."
    )


def audit_finite_support(notes: Notes, p: Any, x: PyTree, parameters: Sequence[Tensor], false_alarm: float) -> None:
    """Sum p and its score over a finite support, exactly; compare probabilities with the frequencies of draws.

    Args:
        notes: what is found.
        p: a plain measure.
        x: many draws of it.
        parameters: what to differentiate.
        false_alarm: of the comparison.
    """
    problems = len(getattr(p, "batch_shape", ()))
    try:
        values = support(p, problems)
    except (ScorefnError, NotImplementedError):
        notes.unchecked[_TOTAL] = "the support is not finite, or has no list of values; see the scores for a test."
        return
    if not isinstance(values, Tensor) or len(values) > _MOST_VALUES:
        notes.unchecked[_TOTAL] = f"the support has more than {_MOST_VALUES} values, or they are no tensor."
        return
    log_prob = p.log_prob(values)
    probability = log_prob.exp()
    total = probability.sum(0)
    allowed = 100 * torch.finfo(log_prob.dtype).eps * max(len(values), 1) ** 0.5
    off = float((total.detach() - 1).abs().max())
    slope = 0.0
    for q in parameters:
        try:
            found = slopes(total.sum().reshape(1), q, directions(q))
        except RuntimeError:
            continue
        slope = max(slope, float(found.abs().max()) / max(total.numel(), 1))
    if off > allowed or slope > allowed * 10 * max(1.0, len(values)):
        fact = f"The probabilities of the {len(values)} values of the support do not add up to one."
        evidence = {"largest |sum - 1|": off, "largest slope of the sum": slope}
        notes.findings.append(Finding(_TOTAL, fact, _REASON, _REPAIR, evidence))
        return
    notes.checked[_TOTAL] = f"exact: summed over all {len(values)} values."
    _compare_frequencies(notes, values, probability.detach(), x, false_alarm)


def _compare_frequencies(notes: Notes, values: Tensor, probability: Tensor, x: PyTree, false_alarm: float) -> None:
    if not isinstance(x, Tensor) or x.shape[1:] != values.shape[1:]:
        return
    if len(values) * x.numel() > _MOST_COMPARED:
        notes.unchecked[_FREQUENCY] = f"{len(values)} values and {len(x)} draws of {x[0].numel()} numbers are too many."
        return
    event = tuple(range(probability.ndim, values.ndim))
    worst, tested, skipped = 0.0, 0, 0
    evidence: dict[str, float] = {}
    tests = []
    seen = torch.zeros(len(x), *probability.shape[1:], device=x.device)
    for value, p_value in zip(values, probability, strict=True):
        hit = (x == value).all(event) if event else x == value
        hit = hit.reshape(len(x), *p_value.shape).to(p_value)
        seen += hit
        hits, expected = hit.reshape(len(x), -1), p_value.reshape(-1)
        still = (hits == hits[0]).all(0)  # never met, or always: no spread, but a probability
        chance = torch.where(hits[0] > 0, expected, 1 - expected)[still].double().clamp(0, 1).log() * len(x)
        level = math.log(false_alarm / (2 * len(values) * len(expected)))
        if bool((chance < level).any()):
            worst, evidence = torch.inf, {"log-probability of so many draws alike": float(chance.min())}
        if bool(still.all()):
            skipped += 1
            continue
        tests.append(zero_mean((hits - expected)[:, ~still], false_alarm / (2 * len(values)), 1e-6))
        tested += tests[-1].valid
        skipped += not tests[-1].valid
        if tests[-1].off and abs(tests[-1].z) > worst:
            worst, evidence = abs(tests[-1].z), tests[-1].evidence
    if bool((seen < 1).any()):
        worst, evidence = torch.inf, {"draws outside the support": float((seen < 1).sum())}
    if worst:
        fact = "The draws take values more or less often than log_prob says."
        notes.findings.append(Finding(_FREQUENCY, fact, _REASON, _REPAIR, evidence))
    elif tested:
        size = max(test.detectable for test in tests if test.valid)
        rare = f"; {skipped} rarer ones could not be judged" if skipped else ""
        notes.checked[_FREQUENCY] = (
            f"statistical, {len(x)} draws: a probability that is off by {size:.2g} would have been found, of {tested} "
            f"of {len(values)} values{rare}."
        )
    else:
        notes.unchecked[_FREQUENCY] = f"every value is too rare for {len(x)} draws."
