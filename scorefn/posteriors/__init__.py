"""Variational posteriors: the ELBO by score functions, in Pyro and in plain PyTorch.

Pyro loads with the first class that needs it; ``elbo`` and ``PlateCredit`` work without.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from scorefn.diagnostics.allocation import Allocation, allocate, cost_split, variance_split
from scorefn.posteriors.averaging import IterateAverage
from scorefn.posteriors.importance_weighted import ArithmeticMean, BoundOnly, GeometricMean, importance_weighted_elbo
from scorefn.posteriors.pareto import PSIS, draws_needed, khat_threshold, pareto_k, psis
from scorefn.posteriors.plain import elbo
from scorefn.posteriors.plate_credit import PlateCredit
from scorefn.posteriors.site_noise import SignalToNoise, signal_to_noise, site_gradients
from scorefn.posteriors.weights import Bound, Evidence, bound, evidence

if TYPE_CHECKING:
    from scorefn.posteriors.doubly_reparameterized import DoublyReparameterized
    from scorefn.posteriors.fit import FitReport, diagnose
    from scorefn.posteriors.score_function_elbo import ScoreFunctionELBO
    from scorefn.posteriors.vimco import VIMCO

__all__ = [
    "PSIS",
    "VIMCO",
    "Allocation",
    "ArithmeticMean",
    "Bound",
    "BoundOnly",
    "DoublyReparameterized",
    "Evidence",
    "FitReport",
    "GeometricMean",
    "IterateAverage",
    "PlateCredit",
    "ScoreFunctionELBO",
    "SignalToNoise",
    "allocate",
    "bound",
    "cost_split",
    "diagnose",
    "draws_needed",
    "elbo",
    "evidence",
    "importance_weighted_elbo",
    "khat_threshold",
    "pareto_k",
    "psis",
    "signal_to_noise",
    "site_gradients",
    "variance_split",
]

_NEEDS_PYRO = {
    "DoublyReparameterized": "scorefn.posteriors.doubly_reparameterized",
    "FitReport": "scorefn.posteriors.fit",
    "ScoreFunctionELBO": "scorefn.posteriors.score_function_elbo",
    "VIMCO": "scorefn.posteriors.vimco",
    "diagnose": "scorefn.posteriors.fit",
}


def __getattr__(name: str) -> Any:
    """Load a Pyro loss with its first use."""
    if name not in _NEEDS_PYRO:
        raise AttributeError(f"module 'scorefn.posteriors' has no attribute {name!r}")
    try:
        return getattr(import_module(_NEEDS_PYRO[name]), name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "pyro":
            raise
        raise ModuleNotFoundError(
            f"scorefn.posteriors.{name} needs Pyro, which is not installed: pip install 'scorefn[vi]'. "
            "Without Pyro, scorefn.posteriors.elbo takes a log-density and a torch distribution.",
            name=error.name,
        ) from error


def __dir__() -> list[str]:
    """The public names."""
    return __all__
