"""Variational posteriors: the ELBO by score functions, in Pyro and in plain PyTorch.

Pyro loads with the first class that needs it; ``elbo`` and ``PlateCredit`` work without.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from scorefn.posteriors.plain import elbo
from scorefn.posteriors.plates import PlateCredit

if TYPE_CHECKING:
    from scorefn.posteriors.score_function_elbo import ScoreFunctionELBO

__all__ = ["PlateCredit", "ScoreFunctionELBO", "elbo"]

_NEEDS_PYRO = {"ScoreFunctionELBO": "scorefn.posteriors.score_function_elbo"}


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
            f"scorefn.posteriors.{name} is a loss for Pyro, which is not installed: pip install 'scorefn[vi]'. "
            "Without Pyro, scorefn.posteriors.elbo takes a log-density and a torch distribution.",
            name=error.name,
        ) from error


def __dir__() -> list[str]:
    """The public names."""
    return __all__
