"""Score-function gradient estimators: ``grad E_{x~p}[f(x)] = E[f(x) grad log p(x) + grad f(x)]``.

One core, for any distribution and any black-box f; adapters for trajectories, posteriors and search distributions,
which load on first use; variance reducers that plug in everywhere; diagnostics that prove the gradient right.
"""

import typing
from importlib import import_module

from scorefn.core import (
    DependencyWarning,
    Draws,
    EvaluationWarning,
    Independent,
    LeaveOneOut,
    LostRankError,
    NonFiniteError,
    ScorefnError,
    ScorefnWarning,
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
    from scorefn import diagnostics, posteriors, scale, search, tracking, trajectories
    from scorefn.citation import Citation, cite
    from scorefn.graph import StochasticGraph
    from scorefn.versions import show_versions

__version__ = "0.1.0"

__all__ = [
    "ARMS",
    "REBAR",
    "RELAX",
    "AdaptiveRaoBlackwell",
    "Antithetic",
    "BlockConstants",
    "CenteredRank",
    "Citation",
    "ConjugateGradients",
    "Constant",
    "DeltaMethod",
    "DenseSolve",
    "DependencyWarning",
    "DisARM",
    "DoubleControlVariate",
    "Draws",
    "Enumerate",
    "EvaluationWarning",
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
    "ScorefnWarning",
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
    "cite",
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
    "show_versions",
    "surrogate",
    "tracking",
    "trajectories",
]

_ROOMS = ("diagnostics", "posteriors", "scale", "search", "tracking", "trajectories")
_LATE = {"Citation": "citation", "StochasticGraph": "graph", "cite": "citation", "show_versions": "versions"}


if not typing.TYPE_CHECKING:  # type checkers see the names above, and refuse any other

    def __getattr__(name: str) -> typing.Any:
        """Load a room, or what stands in one that loads late, with its first use."""
        if name in _ROOMS:
            return import_module(f"scorefn.{name}")
        if name in _LATE:
            return getattr(import_module(f"scorefn.{_LATE[name]}"), name)
        raise AttributeError(f"module 'scorefn' has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names."""
    return __all__
