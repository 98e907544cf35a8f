"""The loop that everybody writes: torch.distributions, as its documentation teaches the score function."""

from __future__ import annotations

import torch
from torch.distributions import Bernoulli, Categorical, Normal, Uniform

from applications.benchmarks.scorecard import trajectories as sequential
from applications.benchmarks.scorecard.peers import torch_side as side
from applications.benchmarks.scorecard.problems import BRANCHES, Problem
from applications.benchmarks.scorecard.protocol import Answer, Peer

DOCS = "https://docs.pytorch.org/docs/stable/distributions.html"
EXAMPLES = "https://github.com/pytorch/examples/blob/main/reinforcement_learning/reinforce.py"
COINS = ("bernoulli-.5", "bernoulli-.3", "bernoulli-.1")

peer = Peer("hand_written", packages=("torch", "numpy"), seed_all=torch.manual_seed)


@peer.row(COINS, "log_prob(action) * reward", link=DOCS, evaluations=1)
def score_function(problem: Problem) -> Answer:
    def many(count: int):
        logits = side.leaf(problem, count)
        m = Bernoulli(logits=logits)
        action = m.sample()
        return side.gradient((m.log_prob(action) * action).sum(), logits)

    return Answer(one=lambda: many(1), many=many)


@peer.row((*COINS, "shared-0", "shared-4", "independent-200"), "leave-one-out by hand", link=DOCS, evaluations=2)
def leave_one_out(problem: Problem) -> Answer:
    cost = {"shared-0": side.shared_cost, "shared-4": side.shared_cost, "independent-200": side.independent_cost}
    f = cost.get(problem.name, lambda b: b.sum(-1))
    size = {"shared-0": 3, "shared-4": 3, "independent-200": 200}.get(problem.name, 1)

    def many(count: int):
        logits = side.leaf(problem, count)
        m = Bernoulli(logits=logits.reshape(count, -1).expand(count, size))
        b = m.sample((2,))
        fb = f(b)
        advantage = fb - fb.flip(0)
        return side.gradient((m.log_prob(b).sum(-1) * advantage).mean(0).sum(), logits)

    return Answer(one=lambda: many(1), many=many, chunk=2000)


@peer.row("normal", "log_prob(x) * f, 2 draws, leave-one-out by hand", link=DOCS, evaluations=2)
def gaussian(problem: Problem) -> Answer:
    def many(count: int):
        mean = side.leaf(problem, count)
        m = Normal(mean, 1.0)
        x = m.sample((2,))
        f = x**2
        return side.gradient((m.log_prob(x) * (f - f.flip(0))).mean(0).sum(), mean)

    return Answer(one=lambda: many(1), many=many)


@peer.row("smoothing", "antithetic evolution strategy by hand", link=DOCS, evaluations=2)
def smoothing(problem: Problem) -> Answer:
    def many(count: int):
        mean = torch.tensor(problem.start, dtype=torch.float64)
        noise = torch.randn(count, 2, dtype=torch.float64)
        difference = side.quadratic(mean + 0.1 * noise) - side.quadratic(mean - 0.1 * noise)
        return (difference / 0.2)[:, None] * noise

    return Answer(one=lambda: many(1).numpy(), many=lambda count: many(count).numpy())


@peer.row(("elbo", *BRANCHES), "log_prob(z) * (log p - log q)", link=DOCS, evaluations=1)
def elbo(problem: Problem) -> Answer:
    def one():
        logits = side.leaf(problem)
        q = Bernoulli(logits=logits)
        z = q.sample()
        log_q = q.log_prob(z)
        f = (
            side.log_joint(z) if problem.name == "elbo" else side.log_joint_of_number(problem.name, z)
        ) - log_q.detach()
        return side.gradient(log_q * f, logits)

    def many(count: int):
        logits = side.leaf(problem, count)
        q = Bernoulli(logits=logits)
        z = q.sample()
        log_q = q.log_prob(z)
        return side.gradient((log_q * (side.log_joint(z) - log_q.detach())).sum(), logits)

    return Answer(one=one, many=many if problem.name == "elbo" else None)


@peer.row(("iw-2", "iw-5"), "score function of the bound, by hand", link=DOCS)
def bound(problem: Problem) -> Answer:
    K = int(problem.name[-1])

    def many(count: int):
        logits = side.leaf(problem, count)
        q = Bernoulli(logits=logits)
        z = q.sample((K,))
        log_q = q.log_prob(z)
        L = torch.logsumexp(side.log_joint(z) - log_q, 0)
        return side.gradient(
            (L + L.detach() * log_q.sum(0) - log_q.sum(0) * torch.log(torch.tensor(float(K)))).sum(), logits
        )

    return Answer(one=lambda: many(1), many=many)


@peer.row(
    "second-order",
    "log_prob(z) * f, differentiated twice",
    link=DOCS,
    note="the surrogate is right once only: its second derivative misses the square of the score",
)
def twice(problem: Problem) -> Answer:
    def many(count: int):
        logits = side.leaf(problem, count)
        m = Bernoulli(logits=logits)
        z = m.sample()
        (first,) = torch.autograd.grad((m.log_prob(z) * z).sum(), logits, create_graph=True)
        return side.gradient(first.sum(), logits)

    return Answer(one=lambda: many(1), many=many)


@peer.row("chain", "reward-to-go by hand", link=EXAMPLES)
def chain(problem: Problem) -> Answer:
    def many(count: int):
        logits = side.leaf(problem, count)
        actions, rewards, mask = side.episodes(logits)
        to_go = rewards.flip(-1).cumsum(-1).flip(-1)
        log_prob = Bernoulli(logits=logits[:, None]).log_prob(actions)
        return side.gradient((log_prob * to_go * mask).sum(), logits)

    return Answer(one=lambda: many(1), many=many)


@peer.row("discount", "reward-to-go by hand", link=EXAMPLES, choice="no gamma^t: not the discounted return's gradient")
def discount(problem: Problem) -> Answer:
    def many(count: int):
        logits = side.leaf(problem, count)
        m = Bernoulli(logits=logits)
        a = m.sample((2,))
        r0, r1 = a[0], sequential.SECOND * (1 - a[1])
        log_prob = m.log_prob(a)
        return side.gradient((log_prob[0] * (r0 + sequential.DISCOUNT * r1) + log_prob[1] * r1).sum(), logits)

    return Answer(one=lambda: many(1), many=many)


@peer.row("bandit", "(R - mean) / (std + eps)", link=EXAMPLES, choice="normalises by its own batch", evaluations=4)
def bandit(problem: Problem) -> Answer:
    def many(count: int):
        logits = side.leaf(problem, count)
        m = Categorical(logits=logits)
        action = m.sample((4,))
        returns = side.arm_rewards()[action]
        returns = (returns - returns.mean(0)) / (returns.std(0) + 1e-8)
        return side.gradient((m.log_prob(action) * returns).mean(0).sum(), logits)

    return Answer(one=lambda: many(1), many=many)


@peer.row("moving-support", "log_prob(x) * f", link=DOCS, evaluations=1)
def support(problem: Problem) -> Answer:
    def many(count: int):
        ends = side.leaf(problem, count)
        m = Uniform(ends[:, 0], ends[:, 1])
        x = m.sample()
        return side.gradient((m.log_prob(x) * x**2).sum(), ends)

    return Answer(one=lambda: many(1), many=many)


@peer.row("own-draw", "log_prob(b) * (f - b / 2)", link=DOCS, evaluations=1)
def own_draw(problem: Problem) -> Answer:
    def many(count: int):
        logits = side.leaf(problem, count)
        m = Bernoulli(logits=logits)
        b = m.sample()
        return side.gradient((m.log_prob(b) * (b - b / 2)).sum(), logits)

    return Answer(one=lambda: many(1), many=many)


@peer.row("columns", "(log_prob * reward).mean()", link=DOCS, evaluations=16)
def columns(problem: Problem) -> Answer:
    def one():
        logits = side.leaf(problem)
        m = Bernoulli(logits=logits)
        b = m.sample((16,))
        return side.gradient((m.log_prob(b) * b[:, None]).mean(), logits)

    return Answer(one=one)


if __name__ == "__main__":
    peer.main()
