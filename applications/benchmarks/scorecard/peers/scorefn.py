"""scorefn itself, asked like everybody else."""

from __future__ import annotations

import torch
from torch.distributions import Bernoulli, Categorical, Independent, Normal, Uniform

import scorefn as sf
from applications.benchmarks.scorecard import problems
from applications.benchmarks.scorecard import trajectories as sequential
from applications.benchmarks.scorecard.peers import torch_side as side
from applications.benchmarks.scorecard.problems import BRANCHES, Problem
from applications.benchmarks.scorecard.protocol import Answer, Peer

DOCS = "api/index.md"
COINS = ("bernoulli-.5", "bernoulli-.3", "bernoulli-.1")

peer = Peer("scorefn", packages=("scorefn", "torch", "pyro-ppl", "numpy"), seed_all=torch.manual_seed)


def coins(problem: Problem, logits: torch.Tensor):
    """p and f of the Bernoulli problems for logits ``[R]`` or ``[R, 200]``."""
    if problem.name.startswith("shared"):
        return Independent(Bernoulli(logits=logits[:, None].expand(-1, 3)), 1), side.shared_cost
    if problem.name == "independent-200":
        return Independent(Bernoulli(logits=logits), 1), side.independent_cost
    return Bernoulli(logits=logits), lambda b: b


def replicated(problem: Problem, estimate, chunk: int = 20_000) -> Answer:
    """``estimate(leaf [R, ...]) -> [R]``, R problems in one call."""

    def many(count: int):
        parameters = side.leaf(problem, count)
        return side.gradient(estimate(parameters).sum(), parameters)

    return Answer(one=lambda: many(1), many=many, chunk=chunk)


@peer.row((*COINS, "shared-0", "shared-4", "independent-200"), "expectation, 2 draws", link=DOCS, evaluations=2)
def expectation(problem: Problem) -> Answer:
    def estimate(logits):
        p, f = coins(problem, logits)
        return sf.expectation(p, f, num_samples=2)

    return replicated(problem, estimate, chunk=2000)


@peer.row((*COINS, "shared-0", "shared-4", "independent-200"), "DisARM", link=DOCS, evaluations=2)
def disarm(problem: Problem) -> Answer:
    def estimate(logits):
        p, f = coins(problem, logits)
        return sf.DisARM()(p, f)

    return replicated(problem, estimate, chunk=2000)


@peer.row(("shared-0", "shared-4"), "LocalExpectation", link=DOCS, evaluations=4)
def local_expectation(problem: Problem) -> Answer:
    def estimate(logits):
        p, f = coins(problem, logits)
        return sf.LocalExpectation()(p, f)

    return replicated(problem, estimate)


@peer.row("normal", "expectation, 2 draws", link=DOCS, evaluations=2)
def gaussian(problem: Problem) -> Answer:
    return replicated(problem, lambda mean: sf.expectation(Normal(mean, 1.0), lambda x: x**2, num_samples=2))


@peer.row("smoothing", "expectation, antithetic pair", link=DOCS, evaluations=2)
def smoothing(problem: Problem) -> Answer:
    def estimate(mean):
        p = Independent(Normal(mean, problems.SMOOTHING), 1)
        return sf.expectation(p, side.quadratic, num_samples=2, coupling=sf.Antithetic(), baseline=None)

    return replicated(problem, estimate)


@peer.row("elbo", "posteriors.elbo, 2 draws", link=DOCS, evaluations=2)
def elbo(problem: Problem) -> Answer:
    return replicated(problem, lambda logits: sf.posteriors.elbo(side.log_joint, Bernoulli(logits=logits), 2))


@peer.row(("iw-2", "iw-5"), "importance_weighted_elbo", link=DOCS)
def importance_weighted(problem: Problem) -> Answer:
    K = int(problem.name[-1])
    return replicated(
        problem, lambda logits: sf.posteriors.importance_weighted_elbo(side.log_joint, Bernoulli(logits=logits), K)
    )


@peer.row("second-order", "dice, differentiated twice", link=DOCS, evaluations=1)
def second_order(problem: Problem) -> Answer:
    def many(count: int):
        logits = side.leaf(problem, count)
        draws = sf.draw(Bernoulli(logits=logits), lambda z: z, 1)
        (first,) = torch.autograd.grad(sf.dice(draws).sum(), logits, create_graph=True)
        return side.gradient(first.sum(), logits)

    return Answer(one=lambda: many(1), many=many)


@peer.row(tuple(BRANCHES), "ScoreFunctionELBO, 2 particles", link=DOCS, evaluations=2)
def branch(problem: Problem) -> Answer:
    import pyro
    import pyro.distributions as dist

    logits = side.leaf(problem)

    def model():
        z = pyro.sample("z", dist.Bernoulli(problems.PRIOR))
        if problem.name == "branch":
            loc = 1.0 if z else -1.0
        elif problem.name == "item":
            loc = 2 * z.item() - 1
        else:
            loc = [-1.0, 1.0][int(z)]
        pyro.sample("x", dist.Normal(loc, 1.0), obs=torch.tensor(problems.OBSERVED))

    def guide():
        pyro.sample("z", dist.Bernoulli(logits=logits))

    elbo = sf.posteriors.ScoreFunctionELBO(2, vectorize_particles=False)
    return Answer(one=lambda: -side.gradient(elbo.differentiable_loss(model, guide), logits))


def chain_draws(logits: torch.Tensor, num_samples: int) -> sf.Draws:
    """Episodes of the chain as draws: every step is a decision and has a reward."""
    count = len(logits)
    actions, rewards, mask = side.episodes(logits.detach().repeat(num_samples))
    shape = (num_samples, count, -1)
    actions, rewards, mask = (part.reshape(shape) for part in (actions, rewards, mask))
    log_prob = Bernoulli(logits=logits[:, None]).log_prob(actions)
    return sf.Draws(actions, log_prob, rewards, credit=sf.RewardToGo(), mask=mask)


@peer.row("chain", "surrogate, RewardToGo", link=DOCS, reading="one episode, no baseline", evaluations=1)
def chain(problem: Problem) -> Answer:
    return replicated(problem, lambda logits: sf.surrogate(chain_draws(logits, 1)).mean(0))


@peer.row("chain", "surrogate, RewardToGo, LeaveOneOut", link=DOCS, reading="two episodes", evaluations=2)
def chain_leave_one_out(problem: Problem) -> Answer:
    return replicated(problem, lambda logits: sf.surrogate(chain_draws(logits, 2), baseline=sf.LeaveOneOut()).mean(0))


def two_steps(logits: torch.Tensor, credit: sf.RewardToGo) -> torch.Tensor:
    p = Bernoulli(logits=logits[:, None])
    a = p.sample((1,)).expand(1, -1, 2).clone()
    a[..., 1] = p.sample((1,))[..., 0]
    rewards = torch.stack([a[..., 0], sequential.SECOND * (1 - a[..., 1])], -1)
    return sf.surrogate(sf.Draws(a, p.log_prob(a), rewards, credit=credit)).sum(0)


@peer.row("discount", "RewardToGo(discount)", link=DOCS, evaluations=1)
def discount(problem: Problem) -> Answer:
    return replicated(problem, lambda logits: two_steps(logits, sf.RewardToGo(sequential.DISCOUNT)))


@peer.row(
    "discount",
    "RewardToGo(visitation_discount=False)",
    link=DOCS,
    choice="no gamma^t: not the discounted return's gradient",
    evaluations=1,
)
def usual_discount(problem: Problem) -> Answer:
    credit = sf.RewardToGo(sequential.DISCOUNT, visitation_discount=False)
    return replicated(problem, lambda logits: two_steps(logits, credit))


@peer.row("bandit", "expectation, 4 draws", link=DOCS, evaluations=4)
def bandit(problem: Problem) -> Answer:
    rewards = side.arm_rewards()
    return replicated(problem, lambda logits: sf.expectation(Categorical(logits=logits), lambda a: rewards[a], 4))


@peer.row("bandit", "expectation, Standardize", link=DOCS, choice="normalises by its own batch", evaluations=4)
def standardized(problem: Problem) -> Answer:
    rewards = side.arm_rewards()

    def estimate(logits):
        p = Categorical(logits=logits)
        return sf.expectation(p, lambda a: rewards[a], 4, shape=sf.Standardize(), baseline=None)

    return replicated(problem, estimate)


def token_draws(tables: torch.Tensor, size: int = 4) -> sf.Draws:
    index, reward, mask, _ = side.token_groups(len(tables), size)
    log_probs = side.token_log_probs(tables, index).flatten(0, 1)
    mask = mask.flatten(0, 1).bool()
    group = torch.arange(len(tables)).repeat_interleave(size)
    return sf.trajectories.sequence_draws(log_probs, reward.flatten(), mask=mask, group=group)


@peer.row("tokens", "trajectories.rloo", link=DOCS)
def rloo(problem: Problem) -> Answer:
    return replicated(problem, lambda tables: sf.trajectories.rloo(token_draws(tables), denominator=4.0).value, 2000)


@peer.row("moving-support", "expectation", link=DOCS)
def support(problem: Problem) -> Answer:
    return replicated(
        problem, lambda ends: sf.expectation(Uniform(ends[:, 0], ends[:, 1]), lambda x: x**2, num_samples=2)
    )


@peer.row(
    "own-draw",
    "expectation with a Baseline of one's own",
    link=DOCS,
    note="an estimate trusts `unbiased = True` of a baseline of one's own; `scorefn.diagnostics.audit` finds this one",
    evaluations=1,
)
def own_draw(problem: Problem) -> Answer:
    class Half:
        unbiased = True

        def __call__(self, signal, draws):
            return draws.x[..., None] / 2

    return replicated(problem, lambda logits: sf.expectation(Bernoulli(logits=logits), lambda b: b, 1, baseline=Half()))


@peer.row("columns", "expectation, f returns [16, 1]", link=DOCS)
def columns(problem: Problem) -> Answer:
    def one():
        logits = side.leaf(problem)
        return side.gradient(sf.expectation(Bernoulli(logits=logits), lambda b: b[:, None], 16), logits)

    return Answer(one=one)


@peer.row("advantages", "trajectories.gae", link=DOCS)
def advantages(problem: Problem) -> Answer:
    rewards, values, next_values, terminated, truncated = (
        torch.tensor(part)[None]
        for part in (
            sequential.REWARD,
            sequential.VALUE,
            sequential.NEXT_VALUE,
            sequential.TERMINATED,
            sequential.TRUNCATED,
        )
    )
    return Answer(
        one=lambda: sf.trajectories.gae(
            rewards,
            values,
            next_values,
            terminated,
            terminated | truncated,
            discount=sequential.GAMMA,
            lambda_=sequential.LAMBDA,
        ),
        exact=True,
    )


SEARCHES = {"XNES": sf.search.XNES, "SNES": sf.search.SNES}


def search_rows(name: str) -> None:
    strategy = SEARCHES[name]

    @peer.row("nan-fitness", name, link=DOCS)
    def hole(problem: Problem) -> Answer:
        def one():
            search = strategy(problem.start, 0.5, popsize=20, seed=int(torch.randint(2**31, ())))
            x = torch.as_tensor(search.ask())
            fitness = torch.where(x[:, 0] > 1, torch.nan, x.square().sum(-1))
            before = float(search.mean[0])
            search.tell(x, fitness)
            return [(float(search.mean[0]) - before) / 0.5]

        return Answer(one=one)

    @peer.row("flat-fitness", name, link=DOCS)
    def flat(problem: Problem) -> Answer:
        def one():
            search = strategy(problem.start, 1.0, seed=int(torch.randint(2**31, ())))
            for _ in range(20):
                x = torch.as_tensor(search.ask())
                search.tell(x, torch.ones(len(x), dtype=torch.float64))
            return [float(torch.as_tensor(search.mean).square().sum())]

        return Answer(one=one)


for _name in SEARCHES:
    search_rows(_name)


@peer.row("correlation", "XNES", link=DOCS)
def correlation(problem: Problem) -> Answer:
    def one():
        search = sf.search.XNES(problem.start, 1.0, seed=int(torch.randint(2**31, ())))
        for _ in range(200):
            x = torch.as_tensor(search.ask())
            search.tell(x, problems.ridge_cost(x))
            if search.stop:
                break
        A = torch.as_tensor(search.factor)
        C = A @ A.T
        return [float(C[0, 1] / (C[0, 0] * C[1, 1]) ** 0.5)]

    return Answer(one=one)


if __name__ == "__main__":
    peer.main()
