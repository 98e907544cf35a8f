"""The audit of a user's own problem: one check a module, composed by ``audit``."""

from scorefn.diagnostics.audits.composed import audit
from scorefn.diagnostics.audits.report import AuditReport, Finding

__all__ = ["AuditReport", "Finding", "audit"]
