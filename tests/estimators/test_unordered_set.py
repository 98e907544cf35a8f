"""The unordered set estimator: every ordered sample without replacement is enumerated."""

import itertools
from math import factorial

import pytest
import torch
from torch.distributions import Bernoulli, Categorical, Independent, Normal

import scorefn as sf
from scorefn.estimators import unordered_set
from tests.estimators.certificates import PROBLEMS, at, check_unbiased
from tests.test_anchors import CUBE, close, doubles, moments, same_digits, squared_error, three_coins

CASES = [(2, True), (3, True), (1, False), (2, False), (3, False)]


def orders(size, k):
    """Every order of k different numbers, `[k, T]`."""
    return torch.tensor(list(itertools.permutations(range(size), k))).T


def order_probability(log_prob, number):
    """Plackett-Luce: `[S, ...]` at numbers `[k, T]` to `[T, ...]`."""
    probability = log_prob.exp()[number]
    return (probability / (1 - (probability.cumsum(0) - probability))).prod(0)


def certificate(problem, estimator):
    log_prob = problem.log_prob(problem.theta)
    number = orders(len(problem.points), estimator.num_samples)

    def estimate(theta, c):
        x = at(problem, number.unsqueeze(-1).expand(*number.shape, 2))
        return estimator.surrogate(problem.build(theta), x, problem.f(x, c))

    check_unbiased(problem, estimate, order_probability(log_prob, number))


def make(problem, k, baseline):
    return sf.UnorderedSet(k, baseline=baseline, batch_ndim=problem.batch_ndim)


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize(("k", "baseline"), CASES)
def test_the_mean_over_every_ordered_sample_is_exact(name, k, baseline):
    certificate(PROBLEMS[name], make(PROBLEMS[name], k, baseline))


def without_normaliser(original):
    return lambda of_set, rest: torch.zeros_like(original(of_set, rest))


def without_the_rest(original):
    return lambda of_set, rest: original(of_set, torch.full_like(rest, -torch.inf))


def shrunken_set(original):
    return lambda of_set, rest: original(of_set, rest) * 0.99


@pytest.mark.parametrize("mutation", [without_normaliser, without_the_rest, shrunken_set])
@pytest.mark.parametrize("baseline", [True, False])
def test_a_wrong_probability_of_the_set_is_seen(monkeypatch, mutation, baseline):
    monkeypatch.setattr(unordered_set, "log_set_probabilities", mutation(unordered_set.log_set_probabilities))
    problem = PROBLEMS["Categorical"]
    with pytest.raises(AssertionError):
        certificate(problem, make(problem, 3, baseline))


@pytest.mark.parametrize("name", ["the mean of the set", "without the own term"])
def test_a_wrong_baseline_is_seen(monkeypatch, name):
    original = sf.UnorderedSet._weigh

    def weigh(self, log_prob, number):
        weights, baseline = original(self, log_prob, number)
        if name == "the mean of the set":
            return weights, lambda values: values.mean(0, keepdim=True).expand_as(values)
        own = log_prob.movedim(-1, 0).gather(0, number).exp()
        return weights, lambda values: baseline(values) - own * values

    monkeypatch.setattr(sf.UnorderedSet, "_weigh", weigh)
    problem = PROBLEMS["Categorical"]
    with pytest.raises(AssertionError):
        certificate(problem, make(problem, 3, True))


@pytest.mark.parametrize(
    ("eta", "gradient", "variances"),
    [
        (0.0, "-.0450000", {2: ".0061125", 3: ".0022625", 4: ".00113083"}),
        (-4.0, "-.00317929", {2: "2.97824e-5", 3: "8.07115e-6", 4: "1.05549e-6"}),
    ],
)
@pytest.mark.parametrize("k", [2, 3, 4])
def test_the_variance_on_three_bernoullis_with_one_logit(eta, gradient, variances, k):
    """Kool, van Hoof & Welling (2020); a second computation, by permutations, agrees to 1e-12."""
    number = orders(8, k)
    own = doubles(eta).expand(number.shape[1]).clone().requires_grad_()
    x = CUBE[number]
    value = sf.UnorderedSet(k).surrogate(three_coins(own), x, squared_error(x))
    found = torch.autograd.grad(value.sum(), own)[0]
    log_prob = three_coins(doubles(eta)).log_prob(CUBE)
    weight = order_probability(log_prob, number)
    mean, variance = moments(weight, found)
    assert close(mean, torch.sigmoid(doubles(eta)) * torch.sigmoid(doubles(-eta)) * (3 - 2 * 1.59))
    assert same_digits(mean, gradient)
    assert same_digits(variance, variances[k])
    mean, second = moments(weight, by_permutations(eta, number))
    assert same_digits(mean, gradient)
    assert abs(float(variance - second)) <= 1e-8 * float(variance)


def set_probability(probability, taken=0.0):
    """The probability that the first draws are this set, over all its orders; `taken` was removed before."""
    total = 0.0
    for order in itertools.permutations(probability):
        left, product = 1.0 - taken, 1.0
        for p in order:
            product, left = product * p / left, left - p
        total += product
    return total


def by_permutations(eta, number):
    """The gradient estimate of each ordered sample, from the formula of the paper in plain numbers."""
    p = three_coins(doubles(eta)).log_prob(CUBE).exp().tolist()
    f = squared_error(CUBE).tolist()
    score = (CUBE.sum(-1) - 3 * torch.sigmoid(doubles(eta))).tolist()
    known, found = {}, []
    for sample in number.T.tolist():
        key = tuple(sorted(sample))
        if key not in known:
            whole, total = set_probability([p[i] for i in key]), 0.0
            for s in key:
                without = [i for i in key if i != s]
                alone = set_probability([p[i] for i in without], p[s])
                baseline = p[s] * f[s]
                for i in without:
                    both = set_probability([p[j] for j in without if j != i], p[s] + p[i])
                    baseline += p[i] * both / alone * f[i]
                total += alone / whole * p[s] * score[s] * (f[s] - baseline)
            known[key] = total
        found.append(known[key])
    return doubles(found)


def test_it_is_the_mean_of_the_ordered_estimate_of_the_same_set():
    """Murthy's weights are those of Des Raj, averaged over the orders of the set by their probability."""
    log_prob = doubles([0.4, 0.25, 0.2, 0.1, 0.05]).log()
    number = orders(5, 3)
    probability = log_prob.exp()[number]
    before = probability.cumsum(0) - probability
    later = torch.arange(2, -1, -1).unsqueeze(1)
    ordered = (later * probability + 1 - before) / 3
    weight = order_probability(log_prob, number)
    ours = sf.UnorderedSet(3, batch_ndim=1).weights(Categorical(logits=log_prob.expand(60, 5)), number)
    for t, sample in enumerate(number.T.tolist()):
        same = [u for u, other in enumerate(number.T.tolist()) if set(other) == set(sample)]
        assert len(same) == factorial(3)
        for place, value in enumerate(sample):
            where = [number[:, u].tolist().index(value) for u in same]
            mean = sum(weight[u] * ordered[w, u] for u, w in zip(same, where, strict=True)) / weight[same].sum()
            assert abs(float(ours[place, t] - mean)) < 1e-12


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_the_probabilities_of_all_sets_sum_to_one(k):
    p = doubles([0.4, 0.25, 0.2, 0.1, 0.05])
    total = 0.0
    for chosen in itertools.combinations(range(5), k):
        rest = [i for i in range(5) if i not in chosen]
        log_rest = p[rest].sum().log()
        found = unordered_set.log_set_probabilities(p[list(chosen)].log(), log_rest)[-1].exp()
        assert close(found, set_probability(p[list(chosen)].tolist()))
        total += float(found)
    assert close(total, 1.0)


@pytest.mark.parametrize("k", [4, 5, 16])
def test_with_as_many_draws_as_values_it_is_exact(k):
    problem = PROBLEMS["Independent Bernoulli"]

    def estimate(theta, c):
        return sf.UnorderedSet(k)(problem.build(theta), lambda x: problem.f(x, c))

    check_unbiased(problem, estimate, torch.ones(1, 2, dtype=torch.float64))


def test_both_phases_are_the_call():
    logits = torch.randn(3, 4, 2, requires_grad=True, dtype=torch.float64)
    p, estimator = Independent(Bernoulli(logits=logits), 1), sf.UnorderedSet(3)

    def f(x):
        return x.cumsum(-1).sum(-1).square()

    torch.manual_seed(3)
    once = estimator(p, f)
    torch.manual_seed(3)
    x = estimator.sample(p)
    assert x.shape == (3, 3, 4, 2)
    twice = estimator.surrogate(p, x, f(x))
    assert once.shape == (3, 4)
    assert torch.equal(once, twice)
    assert torch.equal(*[torch.autograd.grad(v.sum(), logits, retain_graph=True)[0] for v in (once, twice)])
    torch.testing.assert_close((estimator.weights(p, x) * f(x)).sum(0), once.detach(), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("scale", [30.0, 200.0, 5000.0, torch.inf])
@pytest.mark.parametrize("baseline", [True, False])
def test_no_nan_in_single_precision_as_probabilities_go_to_zero(scale, baseline):
    logits = torch.tensor([0.0, -1.0, -2.0, -2.5, -3.0]) * scale
    logits[0] = 0.0
    logits.requires_grad_()
    p = Categorical(logits=logits.expand(50, 5))
    value = sf.UnorderedSet(3, baseline=baseline, batch_ndim=1)(p, lambda x: x.float() + 1)
    value.sum().backward()
    torch.testing.assert_close(value, torch.ones(50), rtol=0, atol=1e-5)
    assert torch.isfinite(logits.grad).all()
    wide = torch.tensor([[200.0, -200.0, 90.0], [-120.0, 0.0, 0.3]], requires_grad=True)
    sf.UnorderedSet(3, baseline=baseline, batch_ndim=1)(Bernoulli(logits=wide), lambda x: x.sum(-1)).sum().backward()
    assert torch.isfinite(wide.grad).all()


def test_rare_sets_are_weighed_as_in_double_precision():
    logits = torch.tensor([0.0, -20.0, -40.0, -60.0, -300.0])
    number = orders(5, 3)
    single, double = (
        sf.UnorderedSet(3, batch_ndim=1).weights(Categorical(logits=logits.to(dtype).expand(60, 5)), number)
        for dtype in (torch.float32, torch.float64)
    )
    torch.testing.assert_close(single.double(), double, rtol=1e-4, atol=1e-37)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: sf.UnorderedSet(1), sf.ScorefnError, "baseline=False"),
        (lambda: sf.UnorderedSet(0), sf.ScorefnError, "num_samples must be an integer of at least 1.*0"),
        (lambda: sf.UnorderedSet(2.5), sf.ScorefnError, "2.5"),
        (lambda: sf.UnorderedSet(17), sf.ScorefnError, "17.*16"),
        (lambda: sf.UnorderedSet(2, batch_ndim=-1), sf.ScorefnError, "batch_ndim=-1"),
        (lambda: sf.UnorderedSet(2, batch_ndim=True), sf.ScorefnError, "batch_ndim=True"),
        (
            lambda: sf.UnorderedSet(2)(Normal(torch.zeros(3), 1.0), lambda x: x.sum(-1)),
            sf.ScorefnError,
            "UnorderedSet does not serve Normal.*Bernoulli, Categorical",
        ),
        (
            lambda: sf.UnorderedSet(2)(Bernoulli(torch.full((21,), 0.5)), lambda x: x.sum(-1)),
            sf.ScorefnError,
            r"2\^21 joint values.*1048576",
        ),
        (
            lambda: sf.UnorderedSet(2)(Bernoulli(torch.full((3,), 0.5)), lambda x: x),
            sf.ShapeError,
            r"\(2, 3\).*\(2,\).*UnorderedSet\(\.\.\., batch_ndim=1\).*Independent",
        ),
        (
            lambda: sf.UnorderedSet(2)(Independent(Bernoulli(torch.full((3, 2), 0.5)), 1), lambda x: x.sum((-1, -2))),
            sf.ShapeError,
            r"\(2,\).*\(2, 3\).*batch_ndim=0",
        ),
        (
            lambda: sf.UnorderedSet(2, batch_ndim=2)(Bernoulli(torch.full((3,), 0.5)), lambda x: x),
            sf.ShapeError,
            r"batch_ndim=2.*\(3,\)",
        ),
        (
            lambda: sf.UnorderedSet(2).surrogate(Categorical(torch.ones(5)), torch.arange(3), torch.ones(3)),
            sf.ShapeError,
            "3 points.*2 of the 5",
        ),
        (
            lambda: sf.UnorderedSet(2)(Categorical(torch.ones(5)), lambda x: x / 0),
            sf.NonFiniteError,
            "f is (inf|nan) at draw 0 of 2",
        ),
    ],
)
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
