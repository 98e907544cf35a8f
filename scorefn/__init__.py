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
from scorefn.reducers import (
    AdaptiveRaoBlackwell,
    Constant,
    Influence,
    MovingAverage,
    RewardToGo,
    ValueFunction,
    linear_recurrence,
)

__version__ = "0.1.0"

__all__ = [
    "AdaptiveRaoBlackwell",
    "Constant",
    "Draws",
    "Independent",
    "Influence",
    "LeaveOneOut",
    "MovingAverage",
    "NonFiniteError",
    "RewardToGo",
    "ScorefnError",
    "ShapeError",
    "SupportError",
    "Total",
    "ValueFunction",
    "diagnostics",
    "dice",
    "draw",
    "expectation",
    "linear_recurrence",
    "posteriors",
    "search",
    "surrogate",
    "trajectories",
]

_ROOMS = ("diagnostics", "posteriors", "search", "trajectories")


def __getattr__(name: str) -> ModuleType:
    """Load a room with its first use."""
    if name in _ROOMS:
        return import_module(f"scorefn.{name}")
    raise AttributeError(f"module 'scorefn' has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names."""
    return __all__
