"""Whether a program's claimed dependencies are false: ``scorefn.tracking.audit``, told as findings."""

from __future__ import annotations

from torch import Tensor

from scorefn.diagnostics.audits.report import Finding, Notes
from scorefn.tracking import audit as perturb
from scorefn.tracking.audit import Program

_NAME = "claimed dependencies"


def audit_program(notes: Notes, program: Program, claimed: Tensor, trials: int) -> None:
    """Change one decision of the program at a time, and see which values move that should not."""
    report = perturb(program, claimed, trials=trials)
    for decision, value in report.refuted:
        fact = (
            f"The value {value!r} moved when only the decision {decision!r} was changed, though claimed not to depend."
        )
        reason = "What the decision does to the value is never charged to it, so its gradient is biased."
        repair = f"Set claimed[{report.decisions.index(decision)}, {report.values.index(value)}] = True."
        notes.findings.append(Finding(_NAME, fact, reason, repair, {"runs": report.runs}))
    free = (~claimed).sum()
    notes.checked[_NAME] = (
        f"{trials} perturbed settings: none of the {int(free)} claimed independences was refuted; one that fails in a "
        f"share s of settings escapes with probability (1 - s)^{trials}."
    )
