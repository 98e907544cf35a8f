"""Exact gradients, tests of unbiasedness, gradient variance and comparison of estimators."""

from scorefn.diagnostics.estimation import Estimation
from scorefn.diagnostics.exact import exact_expectation, exact_gradient
from scorefn.diagnostics.statistics import Comparison, GradientStatistics, compare, gradient_statistics
from scorefn.diagnostics.unbiased import UnbiasedReport, check_unbiased

__all__ = [
    "Comparison",
    "Estimation",
    "GradientStatistics",
    "UnbiasedReport",
    "check_unbiased",
    "compare",
    "exact_expectation",
    "exact_gradient",
    "gradient_statistics",
]
