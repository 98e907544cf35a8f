"""What importance sampling makes of a fitted guide."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from torch import Tensor

import scorefn as sf
from scorefn.posteriors import FitReport


@dataclass(frozen=True)
class Corrected:
    """Estimates from log weights of a guide's own draws, with their standard errors.

    Attributes:
        draws: how many.
        bound: the ELBO, estimated.
        bound_error: of it.
        log_evidence: from the Pareto-smoothed weights.
        log_evidence_error: of it.
        effective_sample_size: of the smoothed weights.
        khat: of the weights.
        threshold: below which k-hat trusts the estimate.
    """

    draws: int
    bound: float
    bound_error: float
    log_evidence: float
    log_evidence_error: float
    effective_sample_size: float
    khat: float
    threshold: float

    def __str__(self) -> str:
        """In a line."""
        return (
            f"log evidence from {self.draws} draws {self.log_evidence:.5f} +- {self.log_evidence_error:.5f}, k-hat "
            f"{self.khat:.2f}"
        )


def corrected(log_weights: Tensor) -> Corrected:
    """Of log p - log q, ``[S]``, Pareto-smoothed (Vehtari, Simpson, Gelman, Yao & Gabry 2024)."""
    smoothed = sf.posteriors.psis(log_weights)
    bound, evidence = sf.posteriors.bound(log_weights), sf.posteriors.evidence(smoothed.log_weights)
    return Corrected(
        len(log_weights),
        float(bound.value),
        float(bound.standard_error),
        float(evidence.value),
        float(evidence.standard_error),
        float(evidence.effective_sample_size),
        float(smoothed.k),
        smoothed.threshold,
    )


def summary(report: FitReport) -> dict[str, Any]:
    """What ``result.json`` says of a report on a model without subsampling."""
    assert report.psis is not None
    assert report.evidence is not None
    return {
        "khat": report.psis.k.item(),
        "threshold": report.psis.threshold,
        "corrected_log_evidence": report.evidence.value.item(),
        "standard_error": report.evidence.standard_error.item(),
        "gradient_snr": {name: found.ratio for name, found in report.sites.items()},
    }


@torch.no_grad()
def pyro_log_weights(
    model: Callable[..., Any], guide: Callable[..., Any], num_draws: int, *, together: int = 5000
) -> Tensor:
    """log p - log q of the guide's draws, ``[num_draws]``, so many of them together."""
    loss = sf.posteriors.ScoreFunctionELBO(min(num_draws, together), max_plate_nesting=1)
    with pyro.get_param_store().scope():
        rounds = math.ceil(num_draws / loss.num_particles)
        return torch.cat([loss.draws(model, guide).fx.sum(-1) for _ in range(rounds)])[:num_draws]
