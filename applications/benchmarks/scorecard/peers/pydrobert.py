"""pydrobert-pytorch: its functions ``reinforce`` and ``relax``."""

from __future__ import annotations

import torch
from pydrobert.torch.estimators import REBARControlVariate, reinforce, relax, to_b, to_fb, to_z

from applications.benchmarks.scorecard.peers import torch_side as side
from applications.benchmarks.scorecard.problems import Problem
from applications.benchmarks.scorecard.protocol import Answer, Peer

DOCS = "https://pydrobert-pytorch.readthedocs.io"
COINS = ("bernoulli-.5", "bernoulli-.3", "bernoulli-.1")
OTHERS = ("normal", "smoothing", "moving-support")
VARIATIONAL = ("elbo", "iw-2", "iw-5", "branch", "item", "index")
SEQUENTIAL = ("chain", "discount", "tokens", "advantages")

peer = Peer("pydrobert", packages=("pydrobert-pytorch", "torch", "numpy"), seed_all=torch.manual_seed)


@peer.row(COINS, "reinforce", link=DOCS, evaluations=1)
def score_function(problem: Problem) -> Answer:
    def many(count: int):
        logits = side.leaf(problem, count)
        b = to_b(to_z(logits, "bern"), "bern")
        return reinforce(to_fb(lambda b: b, b), b, logits, "bern").detach().numpy()

    return Answer(one=lambda: many(1), many=many)


@peer.row(COINS, "relax, REBARControlVariate", link=DOCS, evaluations=3)
def rebar(problem: Problem) -> Answer:
    control = REBARControlVariate(lambda b: b, "bern")

    def many(count: int):
        logits = side.leaf(problem, count)
        z = to_z(logits, "bern")
        b = to_b(z, "bern")
        return relax(to_fb(lambda b: b, b), b, logits, z, control, "bern").detach().numpy()

    return Answer(one=lambda: many(1), many=many)


@peer.row("bandit", "reinforce", link=DOCS, reading="the mean over 4 draws", evaluations=4)
def bandit(problem: Problem) -> Answer:
    rewards = side.arm_rewards()

    def many(count: int):
        logits = side.leaf(problem, count, 4)
        b = to_b(to_z(logits, "cat"), "cat")
        return reinforce(rewards[b.long()], b, logits, "cat").mean(1).detach().numpy()

    return Answer(one=lambda: many(1), many=many)


@peer.row("bandit", "relax, REBARControlVariate", link=DOCS, reading="the mean over 4 draws", evaluations=12)
def rebar_bandit(problem: Problem) -> Answer:
    rewards = side.arm_rewards()
    control = REBARControlVariate(lambda b: (b * rewards).sum(-1), "onehot")

    def many(count: int):
        logits = side.leaf(problem, count, 4)
        z = to_z(logits, "onehot")
        b = to_b(z, "onehot")
        return relax((b * rewards).sum(-1), b, logits, z, control, "onehot").mean(1).detach().numpy()

    return Answer(one=lambda: many(1), many=many)


@peer.row("columns", "reinforce", link=DOCS, reading="the mean over 16 draws")
def columns(problem: Problem) -> Answer:
    def one():
        logits = side.leaf(problem, 16)
        b = to_b(to_z(logits, "bern"), "bern")
        return reinforce(b[:, None], b, logits, "bern").mean().detach().numpy()

    return Answer(one=one)


peer.lacks(OTHERS, "Bernoulli and categorical logits only")
peer.lacks("second-order", "the gradient of reinforce is a number")
peer.lacks(("shared-0", "shared-4", "independent-200"), "f is per element in this version")
peer.lacks(VARIATIONAL, "no bounds")
peer.lacks("own-draw", "its documentation says that a baseline must be independent; the user subtracts it")
peer.lacks(SEQUENTIAL, "no trajectories")
peer.lacks(("nan-fitness", "flat-fitness", "correlation"), "no search")

if __name__ == "__main__":
    peer.main()
