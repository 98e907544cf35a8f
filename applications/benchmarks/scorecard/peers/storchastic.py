"""storchastic: its methods, as its documentation samples, adds a cost and goes backward."""

from __future__ import annotations

import storch
import torch
from storch.method import ARM, LAX, RELAX, DisARM, Expect, ScoreFunction, ScoreFunctionWOR, UnorderedSetEstimator
from torch.distributions import Bernoulli, Normal, OneHotCategorical, Uniform

from applications.benchmarks.scorecard import problems
from applications.benchmarks.scorecard.peers import torch_side as side
from applications.benchmarks.scorecard.problems import Problem
from applications.benchmarks.scorecard.protocol import Answer, Peer

DOCS = "https://storchastic.readthedocs.io"
COINS = ("bernoulli-.5", "bernoulli-.3", "bernoulli-.1")

peer = Peer("storchastic", packages=("storchastic", "torch", "numpy"), seed_all=torch.manual_seed)


def steps(problem: Problem, make, distribution, cost) -> Answer:
    """Sample with a method, add the cost, go backward: one estimate."""
    method, parameters = make(), side.leaf(problem)

    def one():
        storch.reset()
        x = method(distribution(parameters))
        storch.add_cost(cost(x), "f")
        parameters.grad = None
        storch.backward()
        return parameters.grad.detach().double().numpy().copy()

    return Answer(one=one)


def replicas(problem: Problem, make, distribution, cost, chunk: int = 5000) -> Answer:
    """Besides, many at once: a plate of independent copies, whose mean storchastic differentiates."""
    answer, method = steps(problem, make, distribution, cost), make()

    def many(count: int):
        storch.reset()
        parameters = side.leaf(problem, count)
        plated = storch.denote_independent(parameters, 0, "replicas")
        x = method(distribution(plated))
        storch.add_cost(cost(x), "f")
        storch.backward()
        return count * parameters.grad.detach().double().numpy().copy()

    answer.many, answer.chunk = many, chunk
    return answer


def coin(logits):
    return Bernoulli(logits=logits)


METHODS = {
    "ScoreFunction": (lambda: ScoreFunction("b"), 1),
    "ScoreFunction, batch_average, 2 samples": (
        lambda: ScoreFunction("b", n_samples=2, baseline_factory="batch_average"),
        2,
    ),
    "ARM": (lambda: ARM("b"), 2),
    "Expect": (lambda: Expect("b"), 2),
}


def coin_rows(name: str) -> None:
    make, evaluations = METHODS[name]

    @peer.row(COINS, name, link=DOCS, evaluations=evaluations)
    def row(problem: Problem) -> Answer:
        method = replicas if name.startswith("ScoreFunction") else steps
        return method(problem, make, coin, lambda b: b * 1.0)


for _name in METHODS:
    coin_rows(_name)


@peer.row(COINS, "DisARM", link=DOCS, reading="a logit without dimensions", evaluations=2)
def disarm(problem: Problem) -> Answer:
    return steps(problem, lambda: DisARM("b"), coin, lambda b: b * 1.0)


@peer.row(COINS, "DisARM", link=DOCS, reading="a logit of shape [1], f sums over it", evaluations=2)
def disarm_of_vector(problem: Problem) -> Answer:
    return steps(problem, lambda: DisARM("b"), lambda v: Bernoulli(logits=v.reshape(1)), lambda b: (b * 1.0).sum(-1))


@peer.row(COINS, "ScoreFunction, moving_average", link=DOCS, evaluations=1)
def moving_average(problem: Problem) -> Answer:
    return steps(problem, lambda: ScoreFunction("b", baseline_factory="moving_average"), coin, lambda b: b * 1.0)


@peer.row(("shared-0", "shared-4"), "ScoreFunction, batch_average, 2 samples", link=DOCS, evaluations=2)
def shared(problem: Problem) -> Answer:
    make = METHODS["ScoreFunction, batch_average, 2 samples"][0]
    target = torch.tensor(problems.SHARED, dtype=torch.float32)
    return steps(problem, make, lambda logit: Bernoulli(logits=logit.expand(3)), lambda b: ((b - target) ** 2).sum(-1))


@peer.row("independent-200", "ScoreFunction, batch_average, 2 samples", link=DOCS, evaluations=2)
def independent(problem: Problem) -> Answer:
    make = METHODS["ScoreFunction, batch_average, 2 samples"][0]
    return steps(problem, make, coin, lambda b: ((b - problems.T) ** 2).mean(-1))


@peer.row("normal", "ScoreFunction, batch_average, 2 samples", link=DOCS, evaluations=2)
def gaussian(problem: Problem) -> Answer:
    make = METHODS["ScoreFunction, batch_average, 2 samples"][0]
    return replicas(problem, make, lambda mean: Normal(mean, torch.ones_like(mean)), lambda x: x**2)


@peer.row("normal", "LAX", link=DOCS, reading="with a control variate of the user's: c(x) = x^2 / 2")
def lax(problem: Problem) -> Answer:
    return steps(problem, lambda: LAX("b", c_phi=lambda x: x**2 / 2), lambda mean: Normal(mean, 1.0), lambda x: x**2)


@peer.row("bernoulli-.3", "RELAX", link=DOCS, reading="with a control variate of the user's: c(z) = z / 2")
def relax(problem: Problem) -> Answer:
    return steps(problem, lambda: RELAX("b", c_phi=lambda z: z / 2), coin, lambda b: b * 1.0)


@peer.row("bandit", "ScoreFunction, batch_average, 4 samples", link=DOCS, evaluations=4)
def bandit(problem: Problem) -> Answer:
    rewards = side.arm_rewards()
    return steps(
        problem,
        lambda: ScoreFunction("b", n_samples=4, baseline_factory="batch_average"),
        lambda logits: OneHotCategorical(logits=logits),
        lambda a: (a * rewards).sum(-1),
    )


@peer.row("bandit", "UnorderedSetEstimator, 2 of 3", link=DOCS, evaluations=2)
def unordered(problem: Problem) -> Answer:
    rewards = side.arm_rewards()
    return steps(
        problem,
        lambda: UnorderedSetEstimator("b", k=2),
        lambda logits: OneHotCategorical(logits=logits),
        lambda a: (a * rewards).sum(-1),
    )


@peer.row("bandit", "ScoreFunctionWOR, 2 of 3", link=DOCS, reading="biased=False", evaluations=2)
def without_replacement(problem: Problem) -> Answer:
    rewards = side.arm_rewards()
    return steps(
        problem,
        lambda: ScoreFunctionWOR("b", k=2, biased=False),
        lambda logits: OneHotCategorical(logits=logits),
        lambda a: (a * rewards).sum(-1),
    )


@peer.row("elbo", "ScoreFunction", link=DOCS, evaluations=1)
def elbo(problem: Problem) -> Answer:
    logits = side.leaf(problem)
    method = ScoreFunction("z")

    def one():
        storch.reset()
        q = Bernoulli(logits=logits)
        z = method(q)
        log_prior = torch.log(torch.tensor(problems.PRIOR)) * z + torch.log(torch.tensor(1 - problems.PRIOR)) * (1 - z)
        log_p = log_prior - 0.5 * (problems.OBSERVED - (2 * z - 1)) ** 2 - 0.5 * torch.log(torch.tensor(2 * torch.pi))
        storch.add_cost(log_p - q.log_prob(z), "elbo")
        logits.grad = None
        storch.backward()
        return logits.grad.double().numpy().copy()

    return Answer(one=one)


@peer.row("second-order", "ScoreFunction, create_graph", link=DOCS, evaluations=1)
def second_order(problem: Problem) -> Answer:
    logits = side.leaf(problem)
    method = ScoreFunction("z")

    def one():
        storch.reset()
        z = method(Bernoulli(logits=logits))
        storch.add_cost(z * 1.0, "f")
        logits.grad = None
        storch.backward(create_graph=True)
        (second,) = torch.autograd.grad(logits.grad, logits)
        logits.grad = None
        storch.reset()
        return second.double().numpy().copy()

    return Answer(one=one)


@peer.row("branch", "ScoreFunction", link=DOCS)
def branch(problem: Problem) -> Answer:
    logits = side.leaf(problem)
    method = ScoreFunction("z")

    def one():
        storch.reset()
        q = Bernoulli(logits=logits)
        z = method(q)
        loc = 1.0 if z else -1.0
        storch.add_cost(side.log_joint(z * 0 + (loc + 1) / 2) - q.log_prob(z), "elbo")
        logits.grad = None
        storch.backward()
        return logits.grad.double().numpy().copy()

    return Answer(one=one)


@peer.row("moving-support", "ScoreFunction", link=DOCS, evaluations=1)
def support(problem: Problem) -> Answer:
    return steps(problem, lambda: ScoreFunction("x"), lambda ends: Uniform(ends[0], ends[1]), lambda x: x**2)


peer.lacks(("iw-2", "iw-5"), "no multi-sample bound")
peer.lacks(("chain", "discount", "tokens", "advantages"), "no trajectories")
peer.lacks(("nan-fitness", "flat-fitness", "correlation"), "no search")

if __name__ == "__main__":
    peer.main()
