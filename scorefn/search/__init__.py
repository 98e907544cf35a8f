"""Search distributions: black-box minimisation by natural evolution, in one call or by ask and tell."""

from scorefn.search.csanes import CSANES
from scorefn.search.minimize import SearchResult, minimize
from scorefn.search.snes import SNES
from scorefn.search.strategy import Strategy, StrategyResult
from scorefn.search.xnes import XNES

__all__ = ["CSANES", "SNES", "XNES", "SearchResult", "Strategy", "StrategyResult", "minimize"]
