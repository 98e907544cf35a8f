"""Trajectories: whole episodes of a Gymnasium environment under a policy, as a distribution.

Gymnasium loads with the first name that needs it; records and policies work without.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from scorefn.trajectories.policies import CategoricalPolicy
from scorefn.trajectories.record import Trajectories, rewards

if TYPE_CHECKING:
    from scorefn.trajectories.distribution import TrajectoryDistribution
    from scorefn.trajectories.rollouts import rollout

__all__ = ["CategoricalPolicy", "Trajectories", "TrajectoryDistribution", "rewards", "rollout"]

_NEED_GYMNASIUM = {"TrajectoryDistribution": "distribution", "rollout": "rollouts"}


def __getattr__(name: str) -> Any:
    """Load what needs Gymnasium with its first use."""
    if name in _NEED_GYMNASIUM:
        return getattr(import_module(f"{__name__}.{_NEED_GYMNASIUM[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names."""
    return __all__
