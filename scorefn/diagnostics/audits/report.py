"""What an audit says: what it found, what it examined and how strongly, and what it could not examine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Finding:
    """One fault of a problem, as ``audit`` found it.

    Attributes:
        name: of the fault, such as "interacting draws".
        fact: what was seen.
        reason: why it makes an estimate wrong.
        repair: what to do.
        evidence: the numbers that were seen, by name.
    """

    name: str
    fact: str
    reason: str
    repair: str
    evidence: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        """One paragraph."""
        numbers = ", ".join(f"{name} {number:.4g}" for name, number in self.evidence.items())
        return f"{self.name}: {self.fact} {self.reason} {self.repair}{f' [{numbers}]' if numbers else ''}"


@dataclass(frozen=True)
class AuditReport:
    """The outcome of ``scorefn.diagnostics.audit``; true only without findings. ``print`` shows it.

    Not to be confused with ``scorefn.tracking.AuditReport``, which tells which decisions of one program moved which of
    its values.

    Attributes:
        findings: the faults.
        checked: what was examined, by name, and how strongly: by exact replay or enumeration, or by a test with the
            effect that it would have found.
        unchecked: what could not be examined, by name, and why. It may be wrong all the same.
    """

    findings: tuple[Finding, ...]
    checked: Mapping[str, str]
    unchecked: Mapping[str, str]

    def __bool__(self) -> bool:
        """Whether nothing was found; what is ``unchecked`` has not been looked at."""
        return not self.findings

    def __str__(self) -> str:
        """Findings, then what was checked, then what was not."""
        lines = [f"{len(self.findings)} finding(s)"]
        lines += [f"  {number}. {finding}" for number, finding in enumerate(self.findings, 1)]
        for title, entries in (("checked", self.checked), ("not checked", self.unchecked)):
            lines += [title, *(f"  - {name}: {what}" for name, what in entries.items())] if entries else []
        return "\n".join(lines)


@dataclass
class Notes:
    """A report in the making."""

    findings: list[Finding] = field(default_factory=list)
    checked: dict[str, str] = field(default_factory=dict)
    unchecked: dict[str, str] = field(default_factory=dict)

    def report(self) -> AuditReport:
        """What was noted; a check that found something has not passed."""
        found = {finding.name for finding in self.findings}
        checked = {name: how for name, how in self.checked.items() if name not in found}
        return AuditReport(tuple(self.findings), checked, dict(self.unchecked))
