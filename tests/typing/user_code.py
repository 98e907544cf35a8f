"""What users write, for the type checker: strict mode finds nothing here, and knows the type of every result."""

from collections.abc import Callable
from typing import assert_type

import gymnasium
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Independent, Normal

import scorefn as sf


def f(x: Tensor) -> Tensor:
    return (x - 0.45).square().sum(-1)


def front_door(logits: Tensor) -> None:
    p = Bernoulli(logits=logits)
    loss = sf.expectation(p, f, num_samples=100, coupling=sf.Antithetic(), baseline=sf.LeaveOneOut())
    assert_type(loss, Tensor)
    draws = sf.draw(p, f, 100)
    assert_type(draws, sf.Draws)
    assert_type(draws.log_prob, Tensor)
    assert_type(draws[:10].mask, Tensor | None)
    assert_type(sf.surrogate(draws, baseline=sf.MovingAverage(0.9)), Tensor)
    assert_type(sf.dice(draws, credit=sf.Total()), Tensor)
    assert_type(sf.DisARM()(p, f), Tensor)
    assert_type(sf.natural_gradient(p, draws, damping=1e-3), dict[str, Tensor])
    sf.expectation(p, f, 100, control_variate=sf.LinearControlVariate(lambda x: x.sum(-1), 1.5), baseline=None)


class Halves(nn.Module):
    """A measure of one's own: whatever can be sampled and scored."""

    def sample(self, sample_shape: torch.Size) -> Tensor:
        return torch.rand(sample_shape).round()

    def log_prob(self, x: Tensor) -> Tensor:
        return torch.full_like(x, 0.5).log()


class LastValue:
    """A baseline of one's own."""

    unbiased = True

    def __call__(self, signal: Tensor, draws: sf.Draws) -> Tensor:
        return torch.zeros_like(signal)


def parts_of_ones_own() -> None:
    measure: sf.core.Measure = Halves()
    baseline: sf.core.Baseline = LastValue()
    sf.expectation(measure, f, 10, baseline=baseline)


def trajectories() -> None:
    policy = sf.trajectories.CategoricalPolicy(nn.Linear(4, 2))
    tau = sf.trajectories.TrajectoryDistribution(gymnasium.make_vec("CartPole-v1", num_envs=4), policy)
    assert_type(sf.expectation(tau, sf.trajectories.rewards, num_samples=16), Tensor)
    draws = sf.draw(tau, sf.trajectories.rewards, 16)
    loss = -sf.surrogate(draws, credit=sf.RewardToGo(0.99), baseline=sf.ValueFunction(nn.Linear(4, 1))).mean()
    assert_type(loss, Tensor)
    seen = sf.trajectories.rollout(gymnasium.make("CartPole-v1"), policy, 2)
    assert_type(seen, sf.trajectories.Trajectories)
    assert_type(seen.rewards, Tensor)
    tokens = sf.trajectories.sequence_draws(torch.randn(4, 5, requires_grad=True), torch.randn(4))
    assert_type(sf.trajectories.rloo(tokens).value, Tensor)


def posteriors(model: Callable[[Tensor], None], guide: Callable[[Tensor], None], data: Tensor) -> None:
    loss = sf.posteriors.ScoreFunctionELBO(num_particles=16, dependencies="tracked")
    loss.loss_and_grads(model, guide, data)
    q = Independent(Normal(torch.zeros(2, requires_grad=True), 1.0), 1)
    assert_type(sf.posteriors.elbo(lambda z: -z.square().sum(-1), q, 16), Tensor)


def search() -> None:
    result = sf.search.minimize(lambda x: float((x**2).sum()), [1.0, 2.0], sigma0=0.5, ftarget=1e-8)
    assert_type(result, sf.search.SearchResult)
    assert_type(result.success, bool)
    assert_type(result.nfev, int)
    strategy = sf.search.CSANES([1.0, 2.0], sigma0=0.5)
    while not strategy.stop:
        x = strategy.ask()
        assert_type(x, Tensor)
        strategy.tell(x, [float(xi.square().sum()) for xi in x])
    assert_type(strategy.result, sf.search.StrategyResult)


def graph(logits: Tensor) -> None:
    with sf.StochasticGraph(num_samples=8) as g:
        z = g.sample("z", Bernoulli(logits=logits))
        g.cost("loss", (z * logits).sum(-1))
    assert_type(g, sf.StochasticGraph)
    assert_type(g.surrogate(), Tensor)


def diagnostics(logits: Tensor) -> None:
    p = Bernoulli(logits=logits)

    def estimate() -> Tensor:
        return sf.expectation(p, f, 8)

    exact = sf.diagnostics.exact_gradient(p, f, [logits])
    assert_type(exact, tuple[Tensor, ...])
    report = sf.diagnostics.check_unbiased(estimate, exact, [logits], repeats=100)
    assert_type(report, sf.diagnostics.UnbiasedReport)
    statistics = sf.diagnostics.gradient_statistics(estimate, [logits], 20)
    assert_type(statistics.signal_to_noise, float)
    table = sf.diagnostics.compare({"leave-one-out": estimate}, [logits], repeats=20)
    assert_type(table, sf.diagnostics.Comparison)


def habits() -> None:
    assert_type(sf.cite(sf.LeaveOneOut, sf.Total()), sf.Citation)
    assert_type(sf.cite().bibtex, str)
    sf.show_versions()
