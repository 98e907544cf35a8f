"""The number of particles: against a search over all, and against enumeration of what was measured."""

import itertools
import math

import pytest
import torch
from torch.distributions import Bernoulli

import scorefn as sf
from scorefn.diagnostics import Allocation, allocate, allocation, cost_split, variance_split

LOGIT = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
DATA = torch.tensor([0.3, 1.1, -0.7], dtype=torch.float64)  # each alone is a minibatch


def estimates():
    """The score-function gradient of each datum's bound at each value of its latent, and the probability of the value.

    z ~ Bernoulli(.3), x ~ Normal(2z - 1, 1), q(z) = Bernoulli(logit), without baseline.
    """
    z = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    q = Bernoulli(logits=LOGIT)
    log_joint = Bernoulli(torch.tensor(0.3).double()).log_prob(z) - 0.5 * (DATA - 2 * z + 1) ** 2
    score = z - q.probs
    return ((log_joint - q.log_prob(z)) * score).detach(), q.log_prob(z).exp().flatten().detach()


def exact_split():
    """V_w and V_b, of one particle, enumerated."""
    g, probability = estimates()
    mean = probability @ g
    return float((probability @ (g - mean) ** 2).mean()), float(((mean - mean.mean()) ** 2).mean())


def exact_variance(K):
    """Of the mean over K particles of one datum taken at random: all data, all K-tuples."""
    g, probability = estimates()
    first = second = 0.0
    for datum, values in itertools.product(range(len(DATA)), itertools.product(range(2), repeat=K)):
        weight = float(probability[list(values)].prod()) / len(DATA)
        mean = float(g[list(values), datum].mean())
        first, second = first + weight * mean, second + weight * mean**2
    return second - first**2


def test_the_variance_of_k_particles_is_what_it_says():
    allocation = Allocation(*exact_split(), fixed_cost=1.0, particle_cost=0.1)
    for K in range(1, 8):
        assert allocation.variance(K) == pytest.approx(exact_variance(K), rel=1e-12)


@pytest.mark.parametrize("costs", [(1.0, 0.1), (5.0, 0.01), (0.1, 1.0), (0.0, 1.0), (3e-3, 1.4e-5)])
def test_the_recommended_number_is_the_best_of_all(costs):
    allocation = Allocation(*exact_split(), *costs)
    within, between = exact_split()
    prices = {K: (between + within / K) * (costs[0] + costs[1] * K) for K in range(1, 2000)}
    assert allocation.num_particles == min(prices, key=prices.get)
    assert allocation.price(7) == pytest.approx(prices[7], rel=1e-12)
    K = allocation.optimum
    if K > 0:
        slope = (allocation.price(K * (1 + 1e-5)) - allocation.price(K * (1 - 1e-5))) / allocation.price(K)
        assert abs(slope) < 1e-9
    assert math.isclose(K, math.sqrt(costs[0] * within / (costs[1] * between)))


def test_the_measured_split_is_unbiased():
    """Two minibatches taken at random, two estimates on each of one particle: every outcome, weighted."""
    g, probability = estimates()
    outcomes = [(datum, *pair) for datum in range(3) for pair in itertools.product(range(2), repeat=2)]
    total = torch.zeros(2, dtype=torch.float64)
    for first, second in itertools.product(outcomes, repeat=2):
        weight, rows = 1.0, []
        for datum, *pair in (first, second):
            weight *= float(probability[pair].prod()) / 3
            rows.append(g[pair, datum].unsqueeze(-1))
        total += weight * torch.tensor(variance_split(torch.stack(rows), 1), dtype=torch.float64)
    torch.testing.assert_close(total, torch.tensor(exact_split(), dtype=torch.float64), rtol=1e-11, atol=0)


def test_the_split_sums_over_coordinates_and_counts_particles():
    gradients = torch.randn(5, 3, 4, dtype=torch.float64)
    found = variance_split(gradients, 8)
    each = [variance_split(gradients[..., i : i + 1], 1) for i in range(4)]
    assert found[0] == pytest.approx(8 * sum(within for within, _ in each))
    assert found[1] == pytest.approx(sum(between for _, between in each))
    assert variance_split(gradients[:1], 1)[1] == 0.0


def test_without_minibatches_particles_cost_as_much_as_the_rest():
    allocation = Allocation(within=2.0, between=0.0, fixed_cost=3.0, particle_cost=0.1)
    assert allocation.optimum == math.inf
    assert allocation.num_particles == 30
    assert allocation.price(30) == pytest.approx(2 * allocation.price(1e9))


def test_the_posteriors_show_the_same_names():
    for name in ("Allocation", "allocate", "cost_split", "variance_split"):
        assert getattr(sf.posteriors, name) is getattr(sf.diagnostics, name)


def test_corners():
    assert Allocation(0.0, 0.0, 1.0, 1.0).num_particles == 1
    assert Allocation(0.0, 2.0, 1.0, 1.0, least=2).num_particles == 2
    assert Allocation(8.0, 2.0, 1.0, 0.0).num_particles == 4  # particles for nothing, as noisy as minibatches
    assert Allocation(8.0, 0.0, 1.0, 0.0, least=2).num_particles == 2


def test_the_line_of_costs():
    assert cost_split({4: 3.0, 16: 9.0}) == pytest.approx((1.0, 0.5))
    assert cost_split({1: 1.0, 2: 2.5, 3: 4.0, 10: 14.5}) == pytest.approx((0.0, 14.5 * 10 / 114 + 18 / 114))
    assert cost_split({4: 3.0, 16: 2.0}) == (2.5, 0.0)


def bound(batch, num_particles):
    q = Bernoulli(logits=LOGIT)
    data = DATA[batch]

    def log_joint(z):
        return Bernoulli(torch.tensor(0.3).double()).log_prob(z) - 0.5 * (data - 2 * z + 1) ** 2

    return sf.posteriors.elbo(log_joint, q, num_particles, baseline=None)


def test_it_measures_the_split_and_the_costs(monkeypatch):
    """Gradients from a table, and a clock that a step of K particles moves on by 3 + K/2 seconds."""
    table, clock, met = torch.randn(5, 3, 2, dtype=torch.float64), [0.0], []
    left = {batch: list(range(3)) for batch in range(5)}
    theta = torch.zeros(2, dtype=torch.float64, requires_grad=True)

    def estimate(batch, num_particles):
        met.append((batch, num_particles))
        clock[0] += 3 + num_particles / 2
        return (table[batch, left[batch].pop()] * theta).sum() if num_particles == 8 else theta.sum()

    monkeypatch.setattr(allocation.time, "process_time", lambda: clock[0])
    found = allocate(estimate, theta, list(range(5)), num_particles=8, repeats=3, overhead=2.0)
    within, between = variance_split(table, 8)
    assert found.within == pytest.approx(within, rel=1e-12)
    assert found.between == pytest.approx(max(between, 0.0), rel=1e-12)
    assert (found.fixed_cost, found.particle_cost) == pytest.approx((5.0, 0.5))
    assert met == [(batch, K) for batch in range(5) for K in (8, 8, 8, 32)]
    assert found.least == 2


def test_one_batch_is_all_data():
    found = allocate(bound, [LOGIT], [0], num_particles=4, repeats=20, overhead=1.0)
    assert found.between == 0.0
    assert found.fixed_cost >= 1.0
    assert LOGIT.grad is None


def test_a_parameter_that_is_not_reached_has_no_noise():
    other = torch.zeros(3, requires_grad=True)
    found = allocate(bound, [LOGIT, other], [0, 1], num_particles=4)
    assert math.isfinite(found.within)


def test_refusals():
    with pytest.raises(sf.ScorefnError, match=r"between must be finite and not negative, but it is -1\.0"):
        Allocation(1.0, -1.0, 1.0, 1.0)
    for name, value in [("within", "a"), ("between", None), ("fixed_cost", 1j), ("particle_cost", math.inf)]:
        numbers = {"within": 1.0, "between": 1.0, "fixed_cost": 1.0, "particle_cost": 1.0, name: value}
        with pytest.raises(sf.ScorefnError, match=f"{name} must be finite and not negative, but it is {value!r}"):
            Allocation(**numbers)
    plan = Allocation(1.0, 1.0, 1.0, 1.0)
    for asked in (plan.variance, plan.cost, plan.price):
        for number in (0, -1, math.nan, math.inf, "2"):
            with pytest.raises(sf.ScorefnError, match=f"num_particles must be .* above 0, but it is {number!r}"):
                asked(number)
    for number in (0, -2, 1.5):
        with pytest.raises(sf.ScorefnError, match=f"Each number of particles must .* at least 1, but it is {number}"):
            cost_split({number: 1.0, 4: 1.0})
    with pytest.raises(sf.ScorefnError, match=r"must be positive, but they are \{4: 'x'\}"):
        cost_split({4: "x", 8: 1.0})
    with pytest.raises(sf.ScorefnError, match="A step costs nothing"):
        Allocation(1.0, 1.0, 0.0, 0.0)
    with pytest.raises(sf.ScorefnError, match="least must be an integer"):
        Allocation(1.0, 1.0, 1.0, 0.0, least=0)
    with pytest.raises(sf.ShapeError, match=r"shape \(4, 1, 3\), but it must be \[R, M, P\] with M at least 2"):
        variance_split(torch.zeros(4, 1, 3), 2)
    with pytest.raises(sf.NonFiniteError, match="A gradient is NaN or infinite"):
        variance_split(torch.full((4, 2, 3), math.nan), 2)
    with pytest.raises(sf.ScorefnError, match=r"with \[4\] particles only"):
        cost_split({4: 1.0})
    with pytest.raises(sf.ScorefnError, match=r"must be positive, but they are \{8: 0\.0\}"):
        cost_split({4: 1.0, 8: 0.0})
    with pytest.raises(sf.ScorefnError, match="repeats must be at least 2"):
        allocate(bound, LOGIT, [0], repeats=1)
    with pytest.raises(sf.ScorefnError, match="There are no batches"):
        allocate(bound, LOGIT, [])
    with pytest.raises(sf.ScorefnError, match="There are no parameters"):
        allocate(bound, [], [0])
    with pytest.raises(sf.ScorefnError, match=r"it returned shape \(2,\)"):
        allocate(lambda batch, K: LOGIT.expand(2), LOGIT, [0])
    with pytest.raises(sf.ScorefnError, match="it returned float"):
        allocate(lambda batch, K: 0.5, LOGIT, [0])
