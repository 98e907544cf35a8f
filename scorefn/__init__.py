"""Score-function gradient estimators: ``grad E_{x~p}[f(x)] = E[f(x) grad log p(x) + grad f(x)]``.

One core, for any distribution and any black-box f; adapters for trajectories, posteriors and search distributions,
which load on first use; variance reducers that plug in everywhere; diagnostics that prove the gradient right.
"""

from importlib import import_module
from types import ModuleType

from scorefn.core import (
    Draws,
    Independent,
    LeaveOneOut,
    NonFiniteError,
    ScorefnError,
    ShapeError,
    SupportError,
    Total,
    dice,
    draw,
    expectation,
    surrogate,
)
from scorefn.fisher import (
    ConjugateGradients,
    DenseSolve,
    FisherInformation,
    FisherMatrix,
    Woodbury,
    fisher_information,
    natural_gradient,
    register_fisher,
)
from scorefn.reducers import (
    AdaptiveRaoBlackwell,
    Antithetic,
    BlockConstants,
    Constant,
    DeltaMethod,
    Influence,
    LinearControlVariate,
    MovingAverage,
    NaturalControlVariate,
    OptimalConstant,
    OrthogonalGaussian,
    RegressionBaseline,
    RewardToGo,
    Sobol,
    Stratified,
    Systematic,
    ValueFunction,
    linear_recurrence,
    quantile,
    register_quantile,
    register_statistics,
)
from scorefn.shaping import CenteredRank, NESUtilities, Standardize

__version__ = "0.1.0"

__all__ = [
    "AdaptiveRaoBlackwell",
    "Antithetic",
    "BlockConstants",
    "CenteredRank",
    "ConjugateGradients",
    "Constant",
    "DeltaMethod",
    "DenseSolve",
    "Draws",
    "FisherInformation",
    "FisherMatrix",
    "Independent",
    "Influence",
    "LeaveOneOut",
    "LinearControlVariate",
    "MovingAverage",
    "NESUtilities",
    "NaturalControlVariate",
    "NonFiniteError",
    "OptimalConstant",
    "OrthogonalGaussian",
    "RegressionBaseline",
    "RewardToGo",
    "ScorefnError",
    "ShapeError",
    "Sobol",
    "Standardize",
    "Stratified",
    "SupportError",
    "Systematic",
    "Total",
    "ValueFunction",
    "Woodbury",
    "diagnostics",
    "dice",
    "draw",
    "expectation",
    "fisher_information",
    "linear_recurrence",
    "natural_gradient",
    "posteriors",
    "quantile",
    "register_fisher",
    "register_quantile",
    "register_statistics",
    "search",
    "surrogate",
    "tracking",
    "trajectories",
]

_ROOMS = ("diagnostics", "posteriors", "search", "tracking", "trajectories")


def __getattr__(name: str) -> ModuleType:
    """Load a room with its first use."""
    if name in _ROOMS:
        return import_module(f"scorefn.{name}")
    raise AttributeError(f"module 'scorefn' has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names."""
    return __all__
