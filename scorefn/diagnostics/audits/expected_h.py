"""Whether a control variate keeps the expectation and its gradient: both of its corrections have mean zero."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from scorefn.core import Draws, ScorefnError
from scorefn.diagnostics.audits.preservation import Snapshot
from scorefn.diagnostics.audits.report import Finding, Notes
from scorefn.diagnostics.audits.testing import ZeroMean, directions, rounding, slopes, zero_mean

_NAME = "expectation of the control variate"


def audit_expected_h(
    notes: Notes,
    control_variate: Any,
    draws: Draws,
    parameters: Sequence[Tensor],
    snapshot: Snapshot,
    false_alarm: float,
) -> None:
    """Test ``E[fx' - fx] = 0`` and ``E[(fx' - fx) grad log p + grad (fx' - fx)] = 0``, on many draws."""
    name = type(control_variate).__name__
    tests: list[tuple[str, ZeroMean]] = []
    try:
        change = control_variate(draws).fx - draws.fx
        scale = rounding(max(float(change.detach().abs().max()), float(draws.fx.detach().abs().max())), [draws.fx])
        tests.append(("value", zero_mean(change.flatten(1), false_alarm / 2, scale)))
        values = (change.detach() * draws.log_prob + change).flatten(1).sum(1)
        for number, q in enumerate(parameters):
            found = slopes(values, q, directions(q))
            floor = rounding(max(float(found.abs().max()), scale), [q])
            tests.append(
                (f"gradient in parameter {number}", zero_mean(found, false_alarm / 2 / len(parameters), floor))
            )
    except (ScorefnError, RuntimeError) as error:
        notes.unchecked[_NAME] = f"{name} could not be followed: {str(error).splitlines()[0][:150]}"
        return
    finally:
        snapshot.restore()
    for what, test in tests:
        if test.off:
            fact = f"{name} changes the mean of the {what}: c (h - E h) does not average to zero."
            reason = "What a control variate takes from the expectation has to be given back, with its gradient."
            repair = (
                "Compute expected_h from the same parameters as p, differentiably, for the same h and distribution."
            )
            notes.findings.append(Finding(_NAME, fact, reason, repair, test.evidence))
            return
    if void := [test for _, test in tests if not test.valid]:
        notes.unchecked[_NAME] = (
            f"too skewed for {void[0].count} draws: about {max(t.needed for t in void):.0f} needed."
        )
        return
    notes.checked[_NAME] = (
        f"statistical, {len(draws)} draws: a change of the mean value by {tests[0][1].detectable:.2g} would have been "
        "found; that of the gradient likewise."
    )
