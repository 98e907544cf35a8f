"""Nested draws: the analysis of variance against enumeration, the counts against a search over all."""

import itertools
import math
import sys

import pytest
import torch
from torch.distributions import Bernoulli

import scorefn as sf
from scorefn.diagnostics import Allocation, NestedAllocation, nested_variances, value_gradients, variance_split

A = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
B = torch.tensor(-0.3, dtype=torch.float64, requires_grad=True)


def terms(z, h):
    """Surrogate of each h, ``[N, M]``, of z -> h -> cost, without baseline."""
    outer = Bernoulli(logits=A).log_prob(z).unsqueeze(1)
    inner = Bernoulli(logits=B + 2 * z.unsqueeze(1)).log_prob(h)
    return (h - 0.45).square() * (1 + z.unsqueeze(1)) * (outer + inner)


def outcomes(N, M):
    """All nested draws and their probabilities."""
    p, q = torch.sigmoid(A).item(), [torch.sigmoid(B + 2 * z).item() for z in (0, 1)]
    for bits in itertools.product((0, 1), repeat=N * (1 + M)):
        values = torch.tensor(bits, dtype=torch.float64).reshape(N, 1 + M)
        z, h = values[:, 0], values[:, 1:]
        weight = 1.0
        for row in values.int().tolist():
            weight *= p if row[0] else 1 - p
            weight *= math.prod(q[row[0]] if bit else 1 - q[row[0]] for bit in row[1:])
        yield z, h, weight


def exact():
    """V_1 and V_2, from all pairs (z, h)."""
    found = {}
    for z, h, weight in outcomes(1, 1):
        found[int(z.item()), int(h.item())] = weight, value_gradients(terms(z, h), [A, B])[0, 0]
    mean = sum(weight * g for weight, g in found.values())
    between = within = 0.0
    for z in (0, 1):
        rows = [found[z, h] for h in (0, 1)]
        mass = sum(weight for weight, _ in rows)
        given = sum(weight * g for weight, g in rows) / mass
        between += mass * float((given - mean).square().sum())
        within += sum(weight * float((g - given).square().sum()) for weight, g in rows)
    return between, within


def test_the_analysis_of_variance_is_unbiased():
    total = [0.0, 0.0]
    for z, h, weight in outcomes(2, 2):
        found = nested_variances(value_gradients(terms(z, h), [A, B]))
        total = [a + weight * b for a, b in zip(total, found, strict=True)]
    assert total == pytest.approx(list(exact()), rel=1e-12)


@pytest.mark.parametrize(("N", "M"), [(1, 1), (1, 3), (2, 2), (3, 1)])
def test_the_variance_of_nested_draws_is_what_it_says(N, M):
    first, second = torch.zeros(2, dtype=torch.float64), 0.0
    for z, h, weight in outcomes(N, M):
        g = value_gradients(terms(z, h).mean(), [A, B])
        first, second = first + weight * g, second + weight * float(g.square().sum())
    plan = NestedAllocation(exact(), (1.0, 1.0))
    assert plan.variance_at((N, M)) == pytest.approx(second - float(first.square().sum()), rel=1e-11)


def test_the_terms_are_those_of_the_graph():
    """The gradient of their mean is that of ``StochasticGraph`` with nested draws and no baseline."""
    torch.manual_seed(0)
    with sf.StochasticGraph(num_samples=5, baseline=None) as g:
        z = g.sample("z", Bernoulli(logits=A))
        h = g.sample("h", Bernoulli(logits=B + 2 * z), num_samples=3)
        g.cost("c", (h - 0.45).square() * (1 + z.unsqueeze(1)))
    theirs = value_gradients(g.surrogate().mean(), [A, B])
    z, h = g.draws().x["z"], g.draws().x["h"]
    torch.testing.assert_close(value_gradients(terms(z, h).mean(), [A, B]), theirs, rtol=1e-12, atol=1e-14)


def test_two_levels_are_the_split_between_minibatches_and_particles():
    gradients = torch.randn(5, 3, 4, dtype=torch.float64)
    assert nested_variances(gradients) == pytest.approx(variance_split(gradients, 1)[::-1], rel=1e-12)


def test_three_levels_recover_their_components():
    """The expected squares by hand: one coordinate, additive effects whose squares are known."""
    torch.manual_seed(0)
    gradients = torch.randn(4, 3, 5, 2, dtype=torch.float64)
    V = nested_variances(gradients)
    last = gradients.var(2).sum(-1).mean()
    middle = gradients.mean(2).var(1).sum(-1).mean()
    first = gradients.mean((1, 2)).var(0).sum()
    assert pytest.approx([float(first - middle / 3), float(middle - last / 5), float(last)], rel=1e-12) == V


PLANS = [
    ((1.0, 8.0, 4.0), (10.0, 1.0, 0.2)),
    ((1.0, 0.0, 4.0), (1.0, 1.0, 0.2)),
    ((1.0, 30.0, 0.001), (5.0, 0.1, 3.0)),
    ((0.0, 1.0, 2.0), (3.0, 1.0, 1.0)),
    ((2.0, 1.0, 40.0), (0.0, 4.0, 0.1)),
    ((1.0, 9.0), (4.0, 1.0)),
    ((1.0, 9.0), (4.0, 0.0)),
    ((0.3, 1.0, 5.0, 2.0), (7.0, 2.0, 0.5, 0.4)),
    ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    ((1.0,), (1.0,)),
]


@pytest.mark.parametrize(("variance", "cost"), PLANS)
def test_the_counts_are_the_best_of_all(variance, cost):
    most = 12
    plan = NestedAllocation(variance, cost, most=most)
    every = itertools.product(range(1, most + 1), repeat=len(variance) - 1)

    def price(n):
        m = [1]
        for k in n:
            m.append(m[-1] * k)
        noise = sum(V / k for V, k in zip(variance, m, strict=True))
        return noise * sum(c * k for c, k in zip(cost, m, strict=True))

    prices = {n: price(n) for n in every}
    best = min(prices.values())
    assert plan.price(plan.num_samples) == pytest.approx(best, rel=1e-12)
    assert plan.num_samples == min((math.prod(n), n) for n in prices if prices[n] <= best * (1 + 1e-12))[1]


def test_random_plans_are_the_best_of_all():
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        variance, cost = (torch.rand(3, generator=generator).pow(3).tolist() for _ in range(2))
        plan = NestedAllocation(variance, cost, most=20)
        best = min(plan.price(n) for n in itertools.product(range(1, 21), repeat=2))
        assert plan.price(plan.num_samples) == pytest.approx(best, rel=1e-12)


def test_two_sites_are_the_allocation_of_particles():
    for within, between, fixed, particle in [(5.0, 0.2, 3.0, 0.1), (1.0, 1.0, 1.0, 1.0), (0.1, 2.0, 9.0, 0.3)]:
        plan = NestedAllocation((between, within), (fixed, particle))
        particles = Allocation(within, between, fixed, particle)
        assert plan.num_samples == (particles.num_particles,)
        assert plan.price((7,)) == pytest.approx(particles.price(7))


def test_without_rounding_the_formula_is_stationary():
    V, c = (0.7, 31.0, 190.0), (9.0, 0.8, 0.05)
    plan = NestedAllocation(V, c)
    n = [math.sqrt(V[k] * c[k - 1] / (V[k - 1] * c[k])) for k in (1, 2)]
    assert plan.price(n) == pytest.approx(sum(math.sqrt(a * b) for a, b in zip(V, c, strict=True)) ** 2, rel=1e-12)


def test_most_bounds_what_would_grow_for_ever():
    assert NestedAllocation((0.0, 1.0), (1.0, 1.0)).num_samples == (1024,)
    assert NestedAllocation((1.0, 1.0), (1.0, 0.0), most=50).num_samples == (50,)


def test_the_gradient_of_each_value():
    x = torch.tensor([[1.0, 2.0], [3.0, -1.0]], dtype=torch.float64, requires_grad=True)
    other = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    found = value_gradients(x.square(), [x, other])
    assert found.shape == (2, 2, 7)
    torch.testing.assert_close(found[..., :4].reshape(4, 4), torch.diag(2 * x.flatten()).detach(), rtol=0, atol=0)
    assert not found[..., 4:].any()


def test_sweeps_change_nothing(monkeypatch):
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    whole = value_gradients(x.sin() @ x.T, x)
    monkeypatch.setattr(sys.modules["scorefn.diagnostics.value_gradients"], "_ELEMENTS", 20)
    assert torch.equal(whole, value_gradients(x.sin() @ x.T, x))


def test_refusals():
    with pytest.raises(sf.ShapeError, match=r"shape \(4, 1, 3\), but it must be \[n_1, \.\.\., n_L, P\]"):
        nested_variances(torch.zeros(4, 1, 3))
    with pytest.raises(sf.ShapeError, match=r"shape \(4,\)"):
        nested_variances(torch.zeros(4))
    with pytest.raises(sf.NonFiniteError, match="A gradient is NaN or infinite"):
        nested_variances(torch.full((4, 2, 3), math.nan))
    for bad in (-1.0, math.nan, math.inf, "a", None):
        with pytest.raises(sf.ScorefnError, match=f"variance must be finite and not negative, but one is {bad!r}"):
            NestedAllocation((1.0, bad), (1.0, 1.0))
    with pytest.raises(sf.ScorefnError, match="There are 2 variances and 1 costs"):
        NestedAllocation((1.0, 1.0), (1.0,))
    with pytest.raises(sf.ScorefnError, match="There are 0 variances"):
        NestedAllocation((), ())
    with pytest.raises(sf.ScorefnError, match="Draws cost nothing"):
        NestedAllocation((1.0, 1.0), (0.0, 0.0))
    with pytest.raises(sf.ScorefnError, match="most must be an integer"):
        NestedAllocation((1.0, 1.0), (1.0, 0.0), most=0)
    plan = NestedAllocation((1.0, 1.0), (1.0, 1.0))
    with pytest.raises(sf.ScorefnError, match="There are 3 counts for 2 nested sites"):
        plan.price((1, 2))
    for bad in (0, 0.5, math.inf, "2"):
        with pytest.raises(sf.ScorefnError, match=f"finite and at least 1, but one is {bad!r}"):
            plan.cost_at((1, bad))
    with pytest.raises(sf.ScorefnError, match="There are no parameters to differentiate"):
        value_gradients(A * 2, [])
    with pytest.raises(sf.ScorefnError, match="The values do not require grad"):
        value_gradients(torch.zeros(3), A)
