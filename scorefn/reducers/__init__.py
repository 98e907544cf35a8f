"""Variance reducers: they keep the expectation, or declare that they do not, and lower the variance."""

from scorefn.reducers.adaptive import AdaptiveRaoBlackwell
from scorefn.reducers.baselines import Constant, LeaveOneOut, MovingAverage, ValueFunction
from scorefn.reducers.couplings import Independent
from scorefn.reducers.credit import Influence, RewardToGo, Total
from scorefn.reducers.recurrence import linear_recurrence

__all__ = [
    "AdaptiveRaoBlackwell",
    "Constant",
    "Independent",
    "Influence",
    "LeaveOneOut",
    "MovingAverage",
    "RewardToGo",
    "Total",
    "ValueFunction",
    "linear_recurrence",
]
