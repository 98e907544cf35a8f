"""Whether a baseline that reads parts of its own draw is unbiased all the same: they may have been known before."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from scorefn.core import Draws
from scorefn.diagnostics.audits.own_draw import OWN_FEATURES
from scorefn.diagnostics.audits.preservation import Snapshot
from scorefn.diagnostics.audits.report import Finding, Notes
from scorefn.diagnostics.audits.testing import directions, rounding, slopes, zero_mean


def audit_own_features(
    notes: Notes,
    baseline: Any,
    batches: Iterable[Draws],
    parameters: Sequence[Tensor],
    snapshot: Snapshot,
    false_alarm: float,
) -> None:
    """Test ``E[b_k grad log p_k] = 0`` for each decision: what it takes for b to keep the expectation."""
    along = [directions(q) for q in parameters]
    terms: list[list[Tensor]] = [[] for _ in parameters]
    try:
        for draws in batches:
            value = baseline(draws.signal(), draws).detach().expand(draws.log_prob.shape)
            snapshot.restore()
            for place, (q, v) in enumerate(zip(parameters, along, strict=True)):
                found = slopes(value * draws.log_prob, q, v)
                terms[place].append(found.flatten(0, -2) if draws.mask is None else found[draws.mask])
    except RuntimeError as error:
        notes.unchecked[OWN_FEATURES] += f" It was not tested: {str(error).splitlines()[0][:120]}"
        return
    parts = [torch.cat(several) for several in terms]
    typical = max(float(part.abs().max()) for part in parts)
    tests = [
        zero_mean(part, false_alarm / len(parts), rounding(typical, [q]))
        for part, q in zip(parts, parameters, strict=True)
    ]
    for number, test in enumerate(tests):
        if test.off:
            fact = (
                f"{type(baseline).__name__} reads its own draw, and its product with the score of parameter {number} "
            )
            reason = (
                "A baseline keeps the expectation only where it does not know the decision or what follows from it."
            )
            repair = "Give it features that were known before the decision (context, an observation), never the action."
            finding = Finding(OWN_FEATURES, f"{fact}does not average to zero.", reason, repair, test.evidence)
            notes.findings.append(finding)
            del notes.unchecked[OWN_FEATURES]
            return
    worst = max(tests, key=lambda test: test.needed - test.count)
    if worst.valid:
        del notes.unchecked[OWN_FEATURES]
        notes.checked[OWN_FEATURES] = (
            f"statistical, {worst.count} terms: a mean of b grad log p of {max(t.detectable for t in tests):.2g} would "
            "have been found; it reads its own draw, so make sure that what it reads was known before the decision."
        )
    else:
        notes.unchecked[OWN_FEATURES] += f" A test of that would need about {worst.needed:.0f} decisions."
