"""Variance reducers: they keep the expectation, or declare that they do not, and lower the variance."""

from scorefn.reducers.adaptive import AdaptiveRaoBlackwell
from scorefn.reducers.baselines import Constant, LeaveOneOut, MovingAverage, ValueFunction
from scorefn.reducers.block_constants import BlockConstants
from scorefn.reducers.control_variates import DeltaMethod, LinearControlVariate
from scorefn.reducers.couplings import Antithetic, Independent, OrthogonalGaussian, Sobol, Stratified, Systematic
from scorefn.reducers.credit import Influence, RewardToGo, Total
from scorefn.reducers.natural_control_variate import NaturalControlVariate
from scorefn.reducers.optimal_constant import OptimalConstant, RegressionBaseline
from scorefn.reducers.quantiles import quantile, register_quantile
from scorefn.reducers.recurrence import linear_recurrence
from scorefn.reducers.sufficient_statistics import register_statistics

__all__ = [
    "AdaptiveRaoBlackwell",
    "Antithetic",
    "BlockConstants",
    "Constant",
    "DeltaMethod",
    "Independent",
    "Influence",
    "LeaveOneOut",
    "LinearControlVariate",
    "MovingAverage",
    "NaturalControlVariate",
    "OptimalConstant",
    "OrthogonalGaussian",
    "RegressionBaseline",
    "RewardToGo",
    "Sobol",
    "Stratified",
    "Systematic",
    "Total",
    "ValueFunction",
    "linear_recurrence",
    "quantile",
    "register_quantile",
    "register_statistics",
]
