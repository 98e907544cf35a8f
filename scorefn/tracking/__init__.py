"""Which values depend on which decisions: program order, taint of what passes through torch, a perturbation audit.

Program order is always sound: a value depends on every decision made before it. ``Tracking`` refines it by dynamic
taint analysis, and falls back to order, decision by decision, where a value leaves the tensor graph. ``audit`` tests a
structure, wherever it came from, by changing one decision at a time.
"""

from scorefn.tracking.audit import AuditReport, audit
from scorefn.tracking.escapes import Escape, EscapeWarning
from scorefn.tracking.ledger import Ledger
from scorefn.tracking.tracking import Tracking

__all__ = ["AuditReport", "Escape", "EscapeWarning", "Ledger", "Tracking", "audit"]
