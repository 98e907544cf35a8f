"""TorchOpt: ``torchopt.diff.zero_order``, the gradient of a Gaussian-smoothed function."""

from __future__ import annotations

import torch
import torchopt
from torch.distributions import Normal

from applications.benchmarks.scorecard import problems
from applications.benchmarks.scorecard.peers import torch_side as side
from applications.benchmarks.scorecard.problems import PROBLEMS, Problem
from applications.benchmarks.scorecard.protocol import Answer, Peer

DOCS = "https://torchopt.readthedocs.io/en/latest/zero_order_diff/zero_order_diff.html"

peer = Peer("torchopt", packages=("torchopt", "torch", "numpy"), seed_all=torch.manual_seed)


def zero_order(problem: Problem, method: str, num_samples: int) -> Answer:
    distribution = Normal(loc=0, scale=1)
    decorate = torchopt.diff.zero_order.zero_order(
        distribution=distribution, method=method, argnums=0, num_samples=num_samples, sigma=problems.SMOOTHING
    )
    f = decorate(side.quadratic)
    mean = side.leaf(problem)
    return Answer(one=lambda: side.gradient(f(mean), mean))


@peer.row("smoothing", "zero_order, naive", link=DOCS, evaluations=2)
def naive(problem: Problem) -> Answer:
    return zero_order(problem, "naive", 1)


@peer.row("smoothing", "zero_order, forward", link=DOCS, evaluations=2)
def forward(problem: Problem) -> Answer:
    return zero_order(problem, "forward", 1)


@peer.row("smoothing", "zero_order, forward, 4 samples", link=DOCS, evaluations=5)
def forward_four(problem: Problem) -> Answer:
    return zero_order(problem, "forward", 4)


@peer.row("smoothing", "zero_order, antithetic", link=DOCS, evaluations=3)
def antithetic(problem: Problem) -> Answer:
    return zero_order(problem, "antithetic", 1)


peer.lacks(tuple(name for name in PROBLEMS if name != "smoothing"), "Gaussian smoothing only")

if __name__ == "__main__":
    peer.main()
