"""relaxit: relaxations of discrete variables, which are biased by design; one of them has samples that are discrete."""

from __future__ import annotations

import torch
from relaxit.distributions import StraightThroughBernoulli

from applications.benchmarks.scorecard.peers import torch_side as side
from applications.benchmarks.scorecard.problems import PROBLEMS, Problem
from applications.benchmarks.scorecard.protocol import Answer, Peer

DOCS = "https://intsystems.github.io/relaxit"
CHOICE = "a relaxation: it differentiates f as if b were its probability"
COINS = ("bernoulli-.5", "bernoulli-.3", "bernoulli-.1", "shared-0", "shared-4")

peer = Peer("relaxit", packages=("relaxit", "torch", "numpy"), seed_all=torch.manual_seed)


@peer.row(COINS, "StraightThroughBernoulli.rsample", link=DOCS, choice=CHOICE, evaluations=1)
def straight_through(problem: Problem) -> Answer:
    shared = problem.name.startswith("shared")

    def many(count: int):
        logits = side.leaf(problem, count)
        distribution = StraightThroughBernoulli(logits=logits[:, None].expand(count, 3 if shared else 1))
        b = distribution.rsample()
        return side.gradient((side.shared_cost(b) if shared else b.sum(-1)).sum(), logits)

    return Answer(one=lambda: many(1), many=many)


peer.lacks(
    tuple(name for name in PROBLEMS if name not in COINS),
    "relaxations only; its REINFORCE and A2C are example agents bound to a gymnasium environment",
)

if __name__ == "__main__":
    peer.main()
