"""Define-by-run graphs: sample and cost in plain PyTorch code, with the dependencies found by tracking."""

from scorefn.graph.stochastic_graph import StochasticGraph

__all__ = ["StochasticGraph"]
