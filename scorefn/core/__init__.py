"""The identity and its parts; imports torch and the standard library only."""

from scorefn.core.checks import check_count, check_detached, refuse_two_fits
from scorefn.core.defaults import Independent, LeaveOneOut, Total
from scorefn.core.draws import Draws, draw, evaluate, joint_log_prob
from scorefn.core.errors import LostRankError, NonFiniteError, ScorefnError, ShapeError, SupportError
from scorefn.core.expectation import estimate, expectation
from scorefn.core.lineage import nearest, overridden
from scorefn.core.process_groups import World
from scorefn.core.protocols import (
    Baseline,
    ControlVariate,
    Coupling,
    Credit,
    Integrand,
    Measure,
    PyTree,
    StatefulBaseline,
    StructuredMeasure,
    in_transform,
    is_stateful,
)
from scorefn.core.support import check_support
from scorefn.core.surrogate import dice, surrogate
from scorefn.core.warnings import DependencyWarning, EvaluationWarning, ScorefnWarning

__all__ = [
    "Baseline",
    "ControlVariate",
    "Coupling",
    "Credit",
    "DependencyWarning",
    "Draws",
    "EvaluationWarning",
    "Independent",
    "Integrand",
    "LeaveOneOut",
    "LostRankError",
    "Measure",
    "NonFiniteError",
    "PyTree",
    "ScorefnError",
    "ScorefnWarning",
    "ShapeError",
    "StatefulBaseline",
    "StructuredMeasure",
    "SupportError",
    "Total",
    "World",
    "check_count",
    "check_detached",
    "check_support",
    "dice",
    "draw",
    "estimate",
    "evaluate",
    "expectation",
    "in_transform",
    "is_stateful",
    "joint_log_prob",
    "nearest",
    "overridden",
    "refuse_two_fits",
    "surrogate",
]
