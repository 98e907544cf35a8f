"""Search distributions: black-box minimisation by natural evolution, in one call or by ask and tell."""

from scorefn.search.minimize import SearchResult, minimize
from scorefn.search.snes import SNES
from scorefn.search.strategy import Strategy, StrategyResult

__all__ = ["SNES", "SearchResult", "Strategy", "StrategyResult", "minimize"]
