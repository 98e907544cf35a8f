"""pycma: the traps of search, asked through ask, tell and stop."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from applications.benchmarks.scorecard.problems import Problem, ridge_cost
from applications.benchmarks.scorecard.protocol import Answer, Peer

LINK = "https://cma-es.github.io/apidocs-pycma/cma.evolution_strategy.CMAEvolutionStrategy.html"
GENERATIONS = {"flat-fitness": 20, "nan-fitness": 1, "correlation": 200}
peer = Peer("pycma", packages=("cma", "numpy"))


def fitness(problem: Problem, x: np.ndarray) -> float:
    """pycma minimises."""
    if problem.name == "flat-fitness":
        return 1.0
    if problem.name == "nan-fitness":
        return math.nan if x[0] > 1 else float(x @ x)
    return float(ridge_cost(x))


def search(problem: Problem, **options: Any) -> Answer:
    import cma

    sigma = 0.5 if problem.name == "nan-fitness" else 1.0
    if problem.name == "nan-fitness":
        options["popsize"] = 20

    def one() -> Any:
        seed = int(np.random.randint(1, 2**31))
        es = cma.CMAEvolutionStrategy(problem.start, sigma, {"verbose": -9, "seed": seed, **options})
        for _ in range(GENERATIONS[problem.name]):
            if es.stop():
                break
            x = es.ask()
            es.tell(x, [fitness(problem, point) for point in x])
        np.random.seed(seed)  # pycma seeds numpy's generator
        if problem.name == "flat-fitness":
            return ((es.mean - problem.start) ** 2).sum() / sigma**2
        if problem.name == "nan-fitness":
            return (es.mean - problem.start)[0] / sigma
        return es.sm.correlation_matrix[0, 1]

    return Answer(one)


@peer.row(
    "flat-fitness", "CMAEvolutionStrategy", link=LINK, note="es.stop() ends it after the first generation (tolfun)"
)
def flat(problem: Problem) -> Answer:
    return search(problem)


@peer.row("nan-fitness", "CMAEvolutionStrategy", link=LINK, note="tell puts the median in the place of NaN and warns")
def hole(problem: Problem) -> Answer:
    return search(problem)


@peer.row("correlation", "CMAEvolutionStrategy", link=LINK)
def ridge(problem: Problem) -> Answer:
    return search(problem)


peer.lacks("smoothing", "has no gradient of the smoothed objective: its steps are of ranks")

if __name__ == "__main__":
    peer.main()
