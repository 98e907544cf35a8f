"""Exact gradients, tests of unbiasedness, gradient variance and comparison of estimators."""

from scorefn.diagnostics.allocation import Allocation, allocate, cost_split, variance_split
from scorefn.diagnostics.audits import AuditReport, Finding, audit
from scorefn.diagnostics.compare import Comparison, compare
from scorefn.diagnostics.estimation import Estimation
from scorefn.diagnostics.exact import exact_expectation, exact_gradient
from scorefn.diagnostics.fixed_sample import FixedSample, Hotelling
from scorefn.diagnostics.halves import SplitHalves, split_halves
from scorefn.diagnostics.nested import NestedAllocation, nested_variances
from scorefn.diagnostics.prices import evaluations, seconds
from scorefn.diagnostics.problem_expectation import expectation_per_problem
from scorefn.diagnostics.problems import ProblemNoise, draws_per_problem, problem_noise
from scorefn.diagnostics.recommend import Recommendation, recommend
from scorefn.diagnostics.sample_size import SampleSize
from scorefn.diagnostics.second_moments import GradientMeter, GradientMoments
from scorefn.diagnostics.sequential import Sequential
from scorefn.diagnostics.shortlist import Candidate, Shortlist, shortlist
from scorefn.diagnostics.statistics import gradient_statistics, sample_gradients
from scorefn.diagnostics.summary import GradientStatistics
from scorefn.diagnostics.unbiased import UnbiasedReport, assert_unbiased, check_unbiased
from scorefn.diagnostics.value_gradients import value_gradients

__all__ = [
    "Allocation",
    "AuditReport",
    "Candidate",
    "Comparison",
    "Estimation",
    "Finding",
    "FixedSample",
    "GradientMeter",
    "GradientMoments",
    "GradientStatistics",
    "Hotelling",
    "NestedAllocation",
    "ProblemNoise",
    "Recommendation",
    "SampleSize",
    "Sequential",
    "Shortlist",
    "SplitHalves",
    "UnbiasedReport",
    "allocate",
    "assert_unbiased",
    "audit",
    "check_unbiased",
    "compare",
    "cost_split",
    "draws_per_problem",
    "evaluations",
    "exact_expectation",
    "exact_gradient",
    "expectation_per_problem",
    "gradient_statistics",
    "nested_variances",
    "problem_noise",
    "recommend",
    "sample_gradients",
    "seconds",
    "shortlist",
    "split_halves",
    "value_gradients",
    "variance_split",
]
