"""cmaes (CyberAgent): the traps of search, asked through ask, tell and should_stop."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from applications.benchmarks.scorecard.problems import Problem, ridge_cost
from applications.benchmarks.scorecard.protocol import Answer, Peer

LINK = "https://github.com/CyberAgentAILab/cmaes"
GENERATIONS = {"flat-fitness": 20, "nan-fitness": 1, "correlation": 200}
TRAPS = ("flat-fitness", "nan-fitness", "correlation")
peer = Peer("cmaes", packages=("cmaes", "numpy"))


def fitness(problem: Problem, x: np.ndarray) -> float:
    """cmaes minimises."""
    if problem.name == "flat-fitness":
        return 1.0
    if problem.name == "nan-fitness":
        return math.nan if x[0] > 1 else float(x @ x)
    return float(ridge_cost(x))


def search(problem: Problem, optimizer: Any) -> Answer:
    sigma = 0.5 if problem.name == "nan-fitness" else 1.0
    options = {"population_size": 20} if problem.name == "nan-fitness" else {}

    def one() -> Any:
        seed = int(np.random.randint(1, 2**31))
        search = optimizer(mean=np.array(problem.start), sigma=sigma, seed=seed, **options)
        for _ in range(GENERATIONS[problem.name]):
            if search.should_stop():
                break
            told = []
            for _ in range(search.population_size):
                x = search.ask()
                told.append((x, fitness(problem, x)))
            search.tell(told)
        mean = search.mean if hasattr(search, "mean") else search._mean
        if problem.name == "flat-fitness":
            return ((mean - problem.start) ** 2).sum() / sigma**2
        if problem.name == "nan-fitness":
            return (mean - problem.start)[0] / sigma
        covariance = search._C if hasattr(search, "_C") else search._B @ search._B.T  # x = mean + sigma B z
        return covariance[0, 1] / math.sqrt(covariance[0, 0] * covariance[1, 1])

    return Answer(one)


@peer.row(TRAPS, "CMA", link=LINK)
def cma(problem: Problem) -> Answer:
    from cmaes import CMA

    return search(problem, CMA)


@peer.row(TRAPS, "XNES", link=LINK, note="a module that the documentation does not mention")
def xnes(problem: Problem) -> Answer:
    from cmaes._xnes import XNES

    return search(problem, XNES)


peer.lacks("smoothing", "has no gradient of the smoothed objective: its steps are of ranks")

if __name__ == "__main__":
    peer.main()
