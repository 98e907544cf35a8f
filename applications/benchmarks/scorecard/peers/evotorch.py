"""EvoTorch: the gradients of its search distributions, and what its searchers do with odd fitness."""

from __future__ import annotations

import logging

import torch
from evotorch import Problem as Task
from evotorch.algorithms import CMAES, PGPE, SNES, XNES
from evotorch.distributions import SeparableGaussian, SymmetricSeparableGaussian

from applications.benchmarks.scorecard import problems
from applications.benchmarks.scorecard.peers import torch_side as side
from applications.benchmarks.scorecard.problems import PROBLEMS, Problem
from applications.benchmarks.scorecard.protocol import Answer, Peer

logging.disable(logging.WARNING)
DOCS = "https://docs.evotorch.ai"
SEARCHERS = {
    "SNES": lambda task, stdev, popsize: SNES(task, stdev_init=stdev, popsize=popsize),
    "XNES": lambda task, stdev, popsize: XNES(task, stdev_init=stdev, popsize=popsize),
    "CMAES": lambda task, stdev, popsize: CMAES(task, stdev_init=stdev, popsize=popsize),
    "PGPE": lambda task, stdev, popsize: PGPE(
        task, popsize=popsize or 20, center_learning_rate=0.5, stdev_learning_rate=0.1, stdev_init=stdev
    ),
}

peer = Peer("evotorch", packages=("evotorch", "torch", "numpy"), seed_all=torch.manual_seed)


def smoothing_gradient(problem: Problem, distribution, factor: float, solutions: int, **options) -> Answer:
    """``compute_gradients`` with raw fitness, ``factor`` making its units those of the gradient in the mean."""
    mean = torch.tensor(problem.start)
    search = distribution(
        {"mu": mean, "sigma": torch.full((2,), problems.SMOOTHING, dtype=torch.float64), **options},
        dtype=torch.float64,
    )

    def one():
        x = search.sample(solutions)
        found = search.compute_gradients(x, side.quadratic(x), objective_sense="max", ranking_method="raw")
        return (factor * found["mu"]).numpy()

    return Answer(one=one)


UNITS = "divided by sigma^2: its gradient is natural in the mean, a documented choice of units"


@peer.row("smoothing", "SymmetricSeparableGaussian.compute_gradients", link=DOCS, note=UNITS, evaluations=2)
def pgpe_gradient(problem: Problem) -> Answer:
    options = {"divide_mu_grad_by": "num_directions", "divide_sigma_grad_by": "num_directions"}
    return smoothing_gradient(problem, SymmetricSeparableGaussian, 1 / problems.SMOOTHING**2, 2, **options)


@peer.row(
    "smoothing",
    "SeparableGaussian.compute_gradients, 10 solutions",
    link=DOCS,
    note=UNITS,
    choice="fitness is centred by its population's own mean: (N - 1)/N of the gradient",
    evaluations=10,
)
def separable_gradient(problem: Problem) -> Answer:
    options = {"divide_mu_grad_by": "num_solutions", "divide_sigma_grad_by": "num_solutions"}
    return smoothing_gradient(problem, SeparableGaussian, 1 / problems.SMOOTHING**2, 10, **options)


def task(f, sense: str, start, **options) -> Task:
    low = torch.as_tensor(start, dtype=torch.float64)
    return Task(
        sense, f, solution_length=len(low), initial_bounds=(low, low), dtype=torch.float64, vectorized=True, **options
    )


def center(searcher) -> torch.Tensor:
    return searcher.status["center"].detach().clone()


def rows_of(name: str) -> None:
    make = SEARCHERS[name]

    def hole(problem: Problem, **options) -> Answer:
        start = torch.tensor(problem.start)

        def f(x):
            return torch.where(x[:, 0] > 1, torch.nan, -x.square().sum(-1))

        def one():
            searcher = make(task(f, "max", start, **options), 0.5, 20)
            for _ in range(1 if name == "CMAES" else 2):  # the others only sample in their first step
                searcher.step()
            return [float(center(searcher)[0] - start[0]) / 0.5]

        return Answer(one=one)

    @peer.row("nan-fitness", name, link=DOCS, reading="with its default statistics", evaluations=20)
    def with_statistics(problem: Problem) -> Answer:
        return hole(problem)

    @peer.row("nan-fitness", name, link=DOCS, reading="store_solution_stats=False", evaluations=20)
    def without_statistics(problem: Problem) -> Answer:
        return hole(problem, store_solution_stats=False)

    @peer.row("flat-fitness", name, link=DOCS)
    def flat(problem: Problem) -> Answer:
        def one():
            searcher = make(task(lambda x: torch.ones(len(x), dtype=torch.float64), "max", problem.start), 1.0, None)
            for _ in range(20):
                searcher.step()
            return [float(center(searcher).square().sum())]

        return Answer(one=one)


for _name in SEARCHERS:
    rows_of(_name)


@peer.row("correlation", "XNES", link=DOCS)
def correlation(problem: Problem) -> Answer:
    def one():
        searcher = XNES(task(problems.ridge_cost, "min", problem.start), stdev_init=1.0)
        for _ in range(200):
            searcher.step()
        A = searcher._distribution.parameters["sigma"]
        C = A @ A.T
        return [float(C[0, 1] / (C[0, 0] * C[1, 1]) ** 0.5)]

    return Answer(one=one)


_asked = ("smoothing", "nan-fitness", "flat-fitness", "correlation")
peer.lacks(tuple(name for name in PROBLEMS if name not in _asked), "search only")

if __name__ == "__main__":
    peer.main()
