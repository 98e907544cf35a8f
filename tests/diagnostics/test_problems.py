"""Draws per problem: against every other allocation, and against the enumeration of all draws."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Bernoulli

import scorefn as sf
from scorefn.diagnostics import draws_per_problem, expectation_per_problem, problem_noise
from scorefn.diagnostics.estimation import pinned

WEIGHT = torch.tensor([1.3, -0.4], dtype=torch.float64)
THETA = torch.tensor([0.3, -0.8], dtype=torch.float64, requires_grad=True)  # shared by both problems


def problems():
    """Two problems of one bit each, whose logits both depend on both parameters."""
    return Bernoulli(logits=torch.stack([THETA[0] + 0.5 * THETA[1], THETA.prod()]))


def f(x, problem):
    """Depends on the parameters, too."""
    return (x - 0.45).square() * WEIGHT[problem] + x * THETA[1] * (1 + problem)


def of_all(x):
    return f(x, torch.arange(2))


def outcomes(N):
    """All draws ``[N, 2]`` of both problems, and their probabilities."""
    p = problems()
    for bits in itertools.product((0.0, 1.0), repeat=2 * N):
        x = torch.tensor(bits, dtype=torch.float64).reshape(N, 2)
        yield x, p.log_prob(x).sum().exp().item()


def gradients(estimate):
    """Of each problem, ``[2, P]``."""
    rows = [torch.autograd.grad(value, THETA, retain_graph=True)[0] for value in estimate]
    return torch.stack(rows)


def exact_gradients():
    p, x = problems(), torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    return gradients((p.log_prob(x).exp() * of_all(x)).sum(0))


def enumerated(counts, baseline="auto"):
    """Mean and total variance ``[2]`` of the gradients, and the mean value, over all draws."""
    mean, square, value = torch.zeros(2, 2).double(), torch.zeros(2).double(), torch.zeros(2).double()
    for x, weight in outcomes(max(counts)):
        p = pinned(problems(), lambda shape, x=x: x)
        estimate = expectation_per_problem(p, f, torch.tensor(counts), baseline=baseline)
        found = gradients(estimate)
        mean += weight * found
        square += weight * found.square().sum(-1)
        value += weight * estimate.detach()
    return mean, square - mean.square().sum(-1), value


@pytest.mark.parametrize("baseline", ["auto", None])
@pytest.mark.parametrize("counts", [(2, 3), (3, 2), (1, 1), (1, 3)])
def test_the_gradient_is_exact(counts, baseline):
    mean, _, value = enumerated(counts, baseline)
    torch.testing.assert_close(mean, exact_gradients(), rtol=1e-12, atol=1e-12)
    x = torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    exact = (problems().log_prob(x).exp() * of_all(x)).sum(0)
    torch.testing.assert_close(value, exact.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("baseline", ["auto", None])
def test_the_measured_noise_is_unbiased_and_its_form_exact(baseline):
    """All draws of the pilot; and the variance of 2, 3 and 4 draws is what v and w say."""
    noise = torch.zeros(2, 2, dtype=torch.float64)
    for x, weight in outcomes(4):
        found = problem_noise(pinned(problems(), lambda shape, x=x: x), of_all, THETA, 4, baseline=baseline)
        noise += weight * torch.stack([found.variance, found.excess])
    exact = sf.diagnostics.ProblemNoise(*noise)
    for counts in [(2, 3), (3, 2), (4, 4)]:
        variance = enumerated(counts, baseline)[1]
        torch.testing.assert_close(exact.at(torch.tensor(counts)), variance, rtol=1e-10, atol=1e-12)


def test_leave_one_out_has_the_noise_that_the_docstring_says():
    """Where f does not depend on the parameters: v = E|(f - Ef) s|^2 - |g|^2 and w = Var f E|s|^2 + |g|^2."""
    logit = torch.tensor([0.7], dtype=torch.float64, requires_grad=True)
    p, total = Bernoulli(logits=logit), torch.zeros(2, dtype=torch.float64)
    for bits in itertools.product((0.0, 1.0), repeat=4):
        x = torch.tensor(bits, dtype=torch.float64).unsqueeze(-1)
        found = problem_noise(pinned(p, lambda shape, x=x: x), lambda x: 3 * x, logit, 4)
        total += p.log_prob(x).sum().exp().detach() * torch.stack([found.variance[0], found.excess[0]])
    q = p.probs.item()
    g, fisher = 3 * q * (1 - q), q * (1 - q)
    fourth = 9 * (q * (1 - q) ** 4 + (1 - q) * q**4)
    torch.testing.assert_close(total.tolist(), [fourth - g**2, 9 * q * (1 - q) * fisher + g**2], rtol=1e-12, atol=0)


def test_a_batch_of_joint_decisions_and_a_network():
    """Draws [n, rest]; one network for all problems; the integrand is called once, on the draws that are wanted."""
    torch.manual_seed(0)
    net = torch.nn.Linear(3, 5).double()
    features, rows = torch.randn(4, 3, dtype=torch.float64), []

    def g(x, problem):
        rows.append((x.shape, problem.tolist()))
        return x.sum(-1) * problem

    counts = torch.tensor([2, 5, 1, 3])
    value = expectation_per_problem(Bernoulli(logits=net(features)), g, counts)
    assert len(rows) == 1
    assert rows[0][0] == (11, 5)
    assert torch.equal(torch.bincount(torch.tensor(rows[0][1])), counts)
    assert value.shape == (4,)
    value.sum().backward()
    assert net.weight.grad.isfinite().all()
    found = problem_noise(Bernoulli(logits=net(features)), lambda x: x.sum(-1), net.parameters(), 6)
    assert found.variance.shape == found.excess.shape == (4,)
    assert (found.draws(40) >= 2).all()


@pytest.mark.parametrize("pathwise", [False, True])
def test_a_table_of_parameters_takes_one_pass_for_all_problems(monkeypatch, pathwise):
    from scorefn.diagnostics import problems as module

    torch.manual_seed(0)
    table = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    x = torch.bernoulli(torch.full((5, 6, 2), 0.5, dtype=torch.float64))
    p = pinned(Bernoulli(logits=table), lambda shape: x)

    def g(x):
        return (x * (table if pathwise else 3.0)).sum(-1).square()

    one = problem_noise(p, g, table, 5)
    monkeypatch.setattr(module, "_is_separate", lambda values, params: False)
    other = problem_noise(p, g, table, 5)
    torch.testing.assert_close(one.variance, other.variance, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(one.excess, other.excess, rtol=1e-11, atol=1e-12)


def test_a_table_that_problems_share_is_not_taken_for_one_that_they_do_not():
    from scorefn.diagnostics.problems import _is_separate

    table = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    x = torch.randn(4, 6, 2, dtype=torch.float64)
    assert _is_separate((x * table).sum(-1), (table,))
    assert not _is_separate((x * table.flip(0)).sum(-1), (table,))
    assert not _is_separate((x * (table + 1e-6 * table[:1])).sum(-1), (table,))
    assert not _is_separate((x * table).sum(-1), (table, torch.zeros(3, requires_grad=True)))


def test_chunks_change_nothing(monkeypatch):
    from scorefn.diagnostics import problems as module

    torch.manual_seed(0)
    logits = torch.randn(7, dtype=torch.float64, requires_grad=True)
    x = torch.bernoulli(torch.full((5, 7), 0.5, dtype=torch.float64))
    p = pinned(Bernoulli(logits=logits + logits.sum()), lambda shape: x)
    whole = problem_noise(p, lambda x: x * logits, logits, 5)
    monkeypatch.setattr(module, "_ELEMENTS", 40)
    parts = problem_noise(p, lambda x: x * logits, logits, 5)
    torch.testing.assert_close(parts.variance, whole.variance, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(parts.excess, whole.excess, rtol=1e-11, atol=1e-12)


# ------------------------------------------------------------------------------------------------------- the allocation


def total(v, w, n):
    return sum(a / k + (b / (k * (k - 1)) if b else 0.0) for a, b, k in zip(v, w, n, strict=True))


def every(B, least, limit, costs):
    """All counts that the limit allows."""
    ranges = [range(least, int(limit / c) + 2) for c in costs[:B]]
    for n in itertools.product(*ranges):
        if sum(c * k for c, k in zip(costs, n, strict=True)) <= limit + 1e-9:
            yield n


numbers = st.floats(0.0, 10.0).map(lambda x: round(x, 2))


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 3), st.integers(1, 2), st.integers(0, 9), st.booleans())
def test_equal_costs_give_the_best_of_all_allocations(data, B, least, spare, with_excess):
    v = data.draw(st.lists(numbers, min_size=B, max_size=B))
    w = data.draw(st.lists(numbers, min_size=B, max_size=B)) if with_excess and least > 1 else [0.0] * B
    excess = torch.tensor(w) if with_excess and least > 1 else None
    budget = B * least + spare
    found = draws_per_problem(torch.tensor(v), budget, excess=excess, least=least).tolist()
    assert min(found) >= least
    assert sum(found) <= budget
    best = min(total(v, w, n) for n in every(B, least, budget, [1.0] * B))
    assert total(v, w, found) == pytest.approx(best, rel=1e-6, abs=1e-12)


def one_by_one(v, c, budget, least):
    """Counts by adding draws in turn, and what the first that did not fit would have removed."""
    n, left, missed, open_ = [least] * len(v), budget * (1 + 1e-9) - least * sum(c), 0.0, set(range(len(v)))
    while open_:
        b = min(open_, key=lambda b: (-v[b] / (n[b] * (n[b] + 1)) / c[b], b))
        if v[b] == 0 or c[b] > left:
            missed = missed or v[b] / (n[b] * (n[b] + 1))
            open_.discard(b)
        else:
            n[b], left = n[b] + 1, left - c[b]
    return n, missed


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 3), st.integers(1, 2), st.floats(0.0, 9.0))
def test_unequal_costs_come_within_one_draw_of_the_best(data, B, least, spare):
    v = data.draw(st.lists(numbers, min_size=B, max_size=B))
    c = data.draw(st.lists(st.sampled_from([0.7, 1.0, 1.9, 3.0]), min_size=B, max_size=B))
    budget = least * sum(c) + spare
    v64, c64 = (torch.tensor(x, dtype=torch.float64) for x in (v, c))
    found = draws_per_problem(v64, budget, cost=c64, least=least).tolist()
    expected, missed = one_by_one(v, c, budget, least)
    assert min(found) >= least
    assert sum(a * b for a, b in zip(c, found, strict=True)) <= budget * (1 + 1e-8)
    none = [0.0] * B
    assert total(v, none, found) == pytest.approx(total(v, none, expected), rel=1e-9, abs=1e-12)
    best = min(total(v, none, n) for n in every(B, least, budget, c))
    assert best - 1e-9 <= total(v, none, found) <= best + missed + 1e-9


def test_unequal_costs_against_the_bound_on_the_first_draw_that_does_not_fit():
    """Costs 1 and 3, 3.5 to spare: the dear draw removes most per cost, and .5 is left."""
    v, c = torch.tensor([1.0, 30.0], dtype=torch.float64), torch.tensor([1.0, 3.0], dtype=torch.float64)
    assert draws_per_problem(v, 11.5, cost=c).tolist() == [2, 3]
    assert draws_per_problem(v, 10.9, cost=c).tolist() == [4, 2]  # it does not fit, others do


def test_large_budgets_approach_neymans_proportions():
    v = torch.tensor([0.2, 7.0, 1.0, 90.0], dtype=torch.float64)
    c = torch.tensor([1.0, 0.5, 4.0, 2.0], dtype=torch.float64)
    found = draws_per_problem(v, 1e7, cost=c, excess=v).double()
    share = (v / c).sqrt()
    exact = 1e7 * share / (c * share).sum()
    assert ((found - exact).abs() <= 3).all()
    assert float((c * found).sum()) == pytest.approx(1e7, abs=4.0)


def test_ties_and_corners():
    assert draws_per_problem(torch.ones(3), 8).tolist() == [3, 3, 2]  # the first of equals
    assert draws_per_problem(torch.ones(3), 6.9).tolist() == [2, 2, 2]
    assert draws_per_problem(torch.zeros(2), 100).tolist() == [2, 2]  # no budget is spent on nothing
    assert draws_per_problem(torch.tensor([0.0, 1.0]), 10, least=1).tolist() == [1, 9]
    tenth = torch.full((3,), 0.1, dtype=torch.float64)
    assert draws_per_problem(torch.ones(3), 0.3, cost=tenth, least=1).tolist() == [1, 1, 1]  # though .1 * 3 > .3
    assert draws_per_problem(torch.ones(2, dtype=torch.float32), 5).dtype == torch.int64


def test_negative_estimates_count_as_nothing():
    noise = sf.diagnostics.ProblemNoise(torch.tensor([-1.0, 2.0]), torch.tensor([-0.5, 0.0]))
    assert noise.draws(10).tolist() == [2, 8]


def test_refusals():
    v = torch.ones(3)
    with pytest.raises(sf.ScorefnError, match="budget is 5, but 2 draws of each of the 3 problems cost 6 already"):
        draws_per_problem(v, 5)
    for bad in (math.nan, math.inf, "9", None):
        with pytest.raises(sf.ScorefnError, match="budget must be a finite number"):
            draws_per_problem(v, bad)
    with pytest.raises(sf.ScorefnError, match=r"cost must be positive, but its least is 0"):
        draws_per_problem(v, 9, cost=torch.tensor([1.0, 0.0, 1.0]))
    with pytest.raises(sf.ScorefnError, match=r"variance must not be negative, but its least is -1"):
        draws_per_problem(-v, 9)
    with pytest.raises(sf.NonFiniteError, match="variance is nan for some problem"):
        draws_per_problem(v * math.nan, 9)
    with pytest.raises(sf.ShapeError, match=r"cost has shape \(2,\), but variance \(3,\)"):
        draws_per_problem(v, 9, cost=torch.ones(2))
    with pytest.raises(sf.ShapeError, match=r"variance has shape \(3, 1\), but it must be a tensor \[B\]"):
        draws_per_problem(v.unsqueeze(-1), 9)
    with pytest.raises(sf.ShapeError, match=r"variance is \[1\.0\], but"):
        draws_per_problem([1.0], 9)
    with pytest.raises(sf.ScorefnError, match="needs least=2 draws, but least is 1"):
        draws_per_problem(v, 9, excess=v, least=1)
    with pytest.raises(sf.ScorefnError, match="least must be an integer of at least 1"):
        draws_per_problem(v, 9, least=0)
    p = problems()
    with pytest.raises(sf.ScorefnError, match="num_samples must be at least 4 to measure the noise of leave-one-out"):
        problem_noise(p, of_all, THETA, 3)
    with pytest.raises(sf.ScorefnError, match="num_samples must be at least 2 to measure the noise without a baseline"):
        problem_noise(p, of_all, THETA, 1, baseline=None)
    with pytest.raises(sf.ScorefnError, match='baseline must be "auto" or None'):
        problem_noise(p, of_all, THETA, baseline=sf.MovingAverage())
    with pytest.raises(sf.ShapeError, match=r"f's values have shape \(32,\), but problems need \[N, B\]"):
        problem_noise(p, lambda x: of_all(x).sum(-1), THETA)
    with pytest.raises(sf.ScorefnError, match="There are no parameters to differentiate"):
        problem_noise(p, of_all, [])
    with pytest.raises(sf.ShapeError, match=r"num_samples is for 3 problems, but a draw of p is \(2,\)"):
        expectation_per_problem(p, f, torch.tensor([2, 2, 2]))
    with pytest.raises(sf.ScorefnError, match="num_samples must be a tensor of integers"):
        expectation_per_problem(p, f, torch.tensor([2.0, 2.0]))
    with pytest.raises(sf.ScorefnError, match="at least 1 for each problem, but the least is 0"):
        expectation_per_problem(p, f, torch.tensor([2, 0]))
    with pytest.raises(sf.ShapeError, match=r"num_samples has shape \(1, 2\), but it must be \[B\]"):
        expectation_per_problem(p, f, torch.tensor([[2, 2]]))
    with pytest.raises(
        sf.ShapeError, match=r"f returned shape \(\) for 5 draws, but it must return one value for each"
    ):
        expectation_per_problem(p, lambda x, b: f(x, b).sum(), torch.tensor([2, 3]))
    with pytest.raises(sf.NonFiniteError, match="f is nan"):
        expectation_per_problem(p, lambda x, b: f(x, b) * math.nan, torch.tensor([2, 3]))
