"""Score-function gradient estimators: ``grad E_{x~p}[f(x)] = E[f(x) grad log p(x) + grad f(x)]``.

One core, for any distribution and any black-box f; adapters for trajectories, posteriors and search distributions,
which load on first use; variance reducers that plug in everywhere; diagnostics that prove the gradient right.
"""

import typing
from importlib import import_module

from scorefn.core import (
    Draws,
    Independent,
    LeaveOneOut,
    LostRankError,
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
from scorefn.estimators import (
    ARMS,
    REBAR,
    RELAX,
    DisARM,
    DoubleControlVariate,
    Enumerate,
    LocalExpectation,
    SumAndSample,
    UnorderedSet,
    sample_without_replacement,
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

if typing.TYPE_CHECKING:
    from scorefn.graph import StochasticGraph

__version__ = "0.1.0"

__all__ = [
    "ARMS",
    "REBAR",
    "RELAX",
    "AdaptiveRaoBlackwell",
    "Antithetic",
    "BlockConstants",
    "CenteredRank",
    "ConjugateGradients",
    "Constant",
    "DeltaMethod",
    "DenseSolve",
    "DisARM",
    "DoubleControlVariate",
    "Draws",
    "Enumerate",
    "FisherInformation",
    "FisherMatrix",
    "Independent",
    "Influence",
    "LeaveOneOut",
    "LinearControlVariate",
    "LocalExpectation",
    "LostRankError",
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
    "StochasticGraph",
    "Stratified",
    "SumAndSample",
    "SupportError",
    "Systematic",
    "Total",
    "UnorderedSet",
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
    "sample_without_replacement",
    "scale",
    "search",
    "surrogate",
    "tracking",
    "trajectories",
]

_ROOMS = ("diagnostics", "posteriors", "scale", "search", "tracking", "trajectories")


def __getattr__(name: str) -> typing.Any:
    """Load a room with its first use."""
    if name in _ROOMS:
        return import_module(f"scorefn.{name}")
    if name == "StochasticGraph":
        return import_module("scorefn.graph").StochasticGraph
    raise AttributeError(f"module 'scorefn' has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names."""
    return __all__
