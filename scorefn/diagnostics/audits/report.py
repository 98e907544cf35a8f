"""What an audit says: what it found, what it examined and how strongly, and what it could not examine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from scorefn.core.representation import representation


@dataclass(frozen=True)
class Finding:
    """One fault of a problem, as ``audit`` found it.

    Attributes:
        name: of the fault, such as "interacting draws".
        fact: what was seen.
        reason: why it makes an estimate wrong.
        repair: what to do.
        evidence: the numbers that were seen, by name.

    Example:
        >>> import torch
        >>> from scorefn.diagnostics import audit
        >>> p = torch.distributions.Bernoulli(logits=torch.zeros(3, requires_grad=True))
        >>> finding = audit(p, lambda x: x.sum(-1) - x.sum(-1).mean(), repeats=1000).findings[0]
        >>> finding.name
        'interacting draws'
        >>> finding.fact
        'f of a draw changed when other draws beside it were replaced.'
    """

    name: str
    fact: str
    reason: str
    repair: str
    evidence: Mapping[str, float] = field(default_factory=dict)

    __repr__ = representation

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

    Example:
        >>> import torch
        >>> from scorefn.diagnostics import audit
        >>> _ = torch.manual_seed(0)
        >>> p = torch.distributions.Bernoulli(logits=torch.zeros(3, requires_grad=True))
        >>> report = audit(p, lambda x: x.sum(-1), repeats=2000)
        >>> bool(report), report.checked["probabilities that do not add up to one"]
        (True, 'exact: summed over all 2 values.')
        >>> report.unchecked["control variate"]  # has not been looked at
        'none was given.'
    """

    findings: tuple[Finding, ...]
    checked: Mapping[str, str]
    unchecked: Mapping[str, str]

    __repr__ = representation

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
