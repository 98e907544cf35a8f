"""Joint estimators: draws made together, weighed together; value and gradient without bias."""

from scorefn.estimators.antithetic import ARMS, DisARM
from scorefn.estimators.double_control_variate import DoubleControlVariate
from scorefn.estimators.enumeration import Enumerate
from scorefn.estimators.local_expectation import LocalExpectation
from scorefn.estimators.relaxed import REBAR, RELAX
from scorefn.estimators.sum_and_sample import SumAndSample
from scorefn.estimators.unordered_set import UnorderedSet
from scorefn.estimators.without_replacement import sample_without_replacement

__all__ = [
    "ARMS",
    "REBAR",
    "RELAX",
    "DisARM",
    "DoubleControlVariate",
    "Enumerate",
    "LocalExpectation",
    "SumAndSample",
    "UnorderedSet",
    "sample_without_replacement",
]
