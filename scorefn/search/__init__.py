"""Search distributions: black-box minimisation by natural evolution, in one call or by ask and tell."""

from scorefn.search.asynchronous import run_asynchronously
from scorefn.search.bernoulli import BernoulliSearch
from scorefn.search.bounds import Bounds, ResampledBounds, SmoothBounds
from scorefn.search.by_seeds import run_by_seeds
from scorefn.search.categorical import CategoricalSearch
from scorefn.search.clip_up import ClipUp
from scorefn.search.coordinates import CoordinateSearch
from scorefn.search.csanes import CSANES
from scorefn.search.distribution_search import DistributionSearch
from scorefn.search.evaluation import Evaluator
from scorefn.search.integer import IntegerSearch
from scorefn.search.invariances import (
    check_monotone_transform,
    check_neutral_selection,
    check_rotation,
    check_scale,
    check_score_mean,
    check_translation,
)
from scorefn.search.minimize import chosen, minimize
from scorefn.search.noise import SignalToNoise
from scorefn.search.openai_es import OpenAIES
from scorefn.search.penalized_bounds import PenalizedBounds
from scorefn.search.pgpe import PGPE
from scorefn.search.product import ProductSearch
from scorefn.search.rank_one import RankOneCSANES
from scorefn.search.restarts import BIPOP, IPOP, Arm, Portfolio, Restarts
from scorefn.search.run import History, SearchResult, run
from scorefn.search.separable import SeparableCSANES
from scorefn.search.snes import SNES
from scorefn.search.stopping import Limits
from scorefn.search.strategy import Strategy
from scorefn.search.strategy_result import StrategyResult
from scorefn.search.xnes import XNES

__all__ = [
    "BIPOP",
    "CSANES",
    "IPOP",
    "PGPE",
    "SNES",
    "XNES",
    "Arm",
    "BernoulliSearch",
    "Bounds",
    "CategoricalSearch",
    "ClipUp",
    "CoordinateSearch",
    "DistributionSearch",
    "Evaluator",
    "History",
    "IntegerSearch",
    "Limits",
    "OpenAIES",
    "PenalizedBounds",
    "Portfolio",
    "ProductSearch",
    "RankOneCSANES",
    "ResampledBounds",
    "Restarts",
    "SearchResult",
    "SeparableCSANES",
    "SignalToNoise",
    "SmoothBounds",
    "Strategy",
    "StrategyResult",
    "check_monotone_transform",
    "check_neutral_selection",
    "check_rotation",
    "check_scale",
    "check_score_mean",
    "check_translation",
    "chosen",
    "minimize",
    "run",
    "run_asynchronously",
    "run_by_seeds",
]
