"""Sweeps of repeats: each is the single run from the same draws; their law; and what is looped, and why."""

import re
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import distributions as td
from torch import nn

import scorefn as sf
from scorefn.diagnostics import Estimation
from scorefn.diagnostics.estimation import pinned
from scorefn.diagnostics.replicas import Replicas, replicas
from scorefn.diagnostics.statistics import gradient_statistics

F64 = torch.float64


def parameters():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, dtype=F64, generator=generator).requires_grad_() for shape in [(3,), (3,), (2, 3)]]


a, b, c = PARAMETERS = parameters()
LOWER = torch.eye(3, dtype=F64) + torch.randn(3, 3, dtype=F64, generator=torch.Generator().manual_seed(1)).tril(-1)

FAMILIES = {
    "Bernoulli": lambda: td.Bernoulli(logits=c),
    "Bernoulli of probabilities": lambda: td.Bernoulli(c.sigmoid()),
    "Independent": lambda: td.Independent(td.Bernoulli(logits=c), 1),
    "Categorical": lambda: td.Categorical(logits=c),
    "OneHotCategorical": lambda: td.OneHotCategorical(logits=c),
    "Binomial": lambda: td.Binomial(4, logits=c),
    "Poisson": lambda: td.Poisson(c.exp()),
    "Geometric": lambda: td.Geometric(logits=c),
    "Normal": lambda: td.Normal(a, b.exp()),
    "Normal of a batch": lambda: td.Normal(c, 1.0),
    "LogNormal": lambda: td.LogNormal(a, b.exp()),
    "StudentT": lambda: td.StudentT(a.exp(), b, 1.0),
    "Gamma": lambda: td.Gamma(a.exp(), b.exp()),
    "Beta": lambda: td.Beta(a.exp(), b.exp()),
    "Dirichlet": lambda: td.Dirichlet(c.exp()),
    "MultivariateNormal": lambda: td.MultivariateNormal(a, scale_tril=LOWER * b.exp()),
    "MultivariateNormal of a batch": lambda: td.MultivariateNormal(c, scale_tril=LOWER * b.exp()),
    "MultivariateNormal of covariances": lambda: td.MultivariateNormal(
        c, torch.eye(3, dtype=F64) * torch.stack([a.exp(), b.exp()]).unsqueeze(-1)
    ),
    "MixtureSameFamily": lambda: td.MixtureSameFamily(td.Categorical(logits=c), td.Normal(c * a, b.exp().expand(2, 3))),
    "a network": lambda: td.Bernoulli(logits=(c @ a.tanh()).exp() * b[:2]),
    "one tensor twice": lambda: td.Normal(a, a.exp()),
}
DISCRETE = ("Bernoulli", "Bernoulli of probabilities", "Independent", "Categorical", "OneHotCategorical", "a network")
RELAXED = ("Bernoulli", "Independent", "OneHotCategorical", "a network")


def value(p):
    """An integrand of p whose problems are all batch dimensions."""
    events, batch = len(p.event_shape), len(p.batch_shape)

    def f(x):
        x = x.to(F64)
        return ((x + 0.3).square().flatten(1 + batch).sum(-1) if events else (x + 0.3).square()) + 1

    return f


def joint(p):
    """An integrand of p whose batch dimensions are drawn jointly."""
    return lambda x: (x.to(F64).flatten(1) - 0.2).sum(-1).square()


class Given:
    """A coupling that returns given draws."""

    unbiased = True

    def __init__(self, x, block=None):
        self.drawn = x, block

    def sample(self, p, num_samples):
        return self.drawn


def singly(p, f, estimator, x, block=None, parameters=PARAMETERS):
    """Gradients ``[R, P]`` of the single runs from the draws x ``[N, R, ...]``: the oracle."""
    rows = []
    for r in range(x.shape[1]):
        one = x[:, r].detach().clone()
        if isinstance(estimator, partial):
            options = {**estimator.keywords, "coupling": Given(one, block)}
            estimate = sf.expectation(p, f, **options)
        else:
            one.requires_grad_(isinstance(estimator, sf.REBAR | sf.DoubleControlVariate))
            estimate = estimator.surrogate(p, one, f(one))
        found = torch.autograd.grad(
            estimate.sum(), parameters, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        rows.append(torch.cat([g.reshape(-1) for g in found]))
    return torch.stack(rows)


def check(p, f, estimator, parameters=PARAMETERS, moves=True):
    torch.manual_seed(3)
    found = replicas(Estimation(p, f, estimator), tuple(parameters))
    assert isinstance(found, Replicas), found
    x = found.draws(5)
    gradients = found.gradients_at(x)
    expected = singly(p, f, estimator, x, getattr(found._work, "_block", None), parameters)
    torch.testing.assert_close(gradients, expected, rtol=1e-10, atol=1e-10 * float(expected.abs().max()) + 1e-15)
    assert not moves or bool(expected.any())
    found._sweep = 2  # the last sweep is smaller
    torch.testing.assert_close(found.gradients_at(x), gradients, rtol=1e-10, atol=1e-10)
    values, again = found.estimates(5)
    assert values.shape == (5,)
    assert again.shape == gradients.shape
    assert all(q.grad is None for q in parameters)


def expectation(n=4, **options):
    return partial(sf.expectation, num_samples=n, **options)


@pytest.mark.parametrize("f", [value, joint])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_replicate_is_the_single_run(family, f):
    p = FAMILIES[family]()
    check(p, f(p), expectation())


@pytest.mark.parametrize("f", [value, joint])
@pytest.mark.parametrize(
    "options",
    [
        {"baseline": None},
        {"baseline": sf.Constant(0.7)},
        {"baseline": sf.LeaveOneOut()},
        {"coupling": sf.Antithetic()},
        {"coupling": sf.Stratified()},
        {"coupling": sf.Systematic()},
        {"coupling": sf.Sobol()},
        {"coupling": sf.Independent()},
        {"shape": sf.Standardize()},
        {"shape": sf.CenteredRank()},
    ],
    ids=lambda o: "-".join(f"{k}-{type(v).__name__}" for k, v in o.items()),
)
@pytest.mark.parametrize("family", ["Bernoulli", "Normal of a batch", "Independent"])
def test_reducers(family, options, f):
    p = FAMILIES[family]()
    check(p, f(p), expectation(**options))


@pytest.mark.parametrize("family", ["Normal", "MultivariateNormal", "MultivariateNormal of a batch"])
def test_orthogonal_directions(family):
    p = FAMILIES[family]()
    check(p, value(p), expectation(coupling=sf.OrthogonalGaussian()))


@pytest.mark.parametrize("coefficient", [None, 0.8])
@pytest.mark.parametrize("baseline", [None, "auto"])
def test_linear_control_variates(coefficient, baseline):
    p = td.Independent(td.Bernoulli(logits=c), 1)
    several = sf.LinearControlVariate(lambda x: x, lambda: p.mean, coefficient=coefficient)
    check(p, value(p), expectation(8, control_variate=several, baseline=baseline))
    single = sf.LinearControlVariate(lambda x: x.sum(-1), p.mean.sum(-1), coefficient=coefficient)
    check(p, value(p), expectation(8, control_variate=single, baseline=baseline))
    flat = td.Independent(td.Bernoulli(logits=c), 2)
    whole = sf.LinearControlVariate(lambda x: x.flatten(1).sum(-1), lambda: flat.mean.sum(), coefficient=coefficient)
    check(flat, joint(flat), expectation(8, control_variate=whole, baseline=baseline))
    numbers = sf.LinearControlVariate(lambda x: 0 * x.sum(-1), 0.0, coefficient=coefficient)
    check(p, value(p), expectation(8, control_variate=numbers, baseline=baseline))


@pytest.mark.parametrize("coefficient", [None, 1.0])
def test_the_delta_method(coefficient):
    p = td.Normal(c, b.exp())
    f = lambda x: x.exp() + x.square()  # noqa: E731
    check(p, f, expectation(6, control_variate=sf.DeltaMethod(p, f, coefficient=coefficient)))
    other = td.Normal(c, b.exp())
    reason = replicas(Estimation(p, f, expectation(6, control_variate=sf.DeltaMethod(other, f))), tuple(PARAMETERS))
    assert "another distribution" in reason


@pytest.mark.parametrize("f", [value, joint])
@pytest.mark.parametrize("family", DISCRETE)
@pytest.mark.parametrize(
    "estimator",
    [sf.DisARM(2), sf.ARMS(3), sf.Enumerate(), sf.LocalExpectation(2), sf.SumAndSample(2, 2), sf.UnorderedSet(3)],
    ids=lambda e: type(e).__name__,
)
def test_joint_estimators(estimator, family, f):
    p = FAMILIES[family]()
    if hasattr(estimator, "batch_ndim"):
        problems = len(p.batch_shape) if f is value else 0
        estimator = replace(estimator, batch_ndim=None if isinstance(p, td.Independent) == (f is value) else problems)
    check(p, f(p), estimator, moves=False)


@pytest.mark.parametrize("family", RELAXED)
@pytest.mark.parametrize("estimator", [sf.REBAR(), sf.DoubleControlVariate(3)], ids=lambda e: type(e).__name__)
def test_estimators_that_differentiate_f(estimator, family):
    p = FAMILIES[family]()
    weight = torch.ones((), dtype=F64, requires_grad=True)
    inner = value(p)
    check(p, lambda x: (inner(x) * weight).sin(), estimator, [*PARAMETERS, weight])


class Once(torch.autograd.Function):
    """The sine, whose gradient has none of its own."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.sin()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, slope):
        return slope * ctx.saved_tensors[0].cos()


@pytest.mark.parametrize("most", [0, 48])
@pytest.mark.parametrize("family", ["Normal", "Bernoulli", "MultivariateNormal of a batch", "a network"])
def test_an_f_with_a_gradient_of_its_own(family, most, monkeypatch):
    """An evidence bound: f contains log p, and a network of its own; by replicates, and by coordinates."""
    monkeypatch.setattr("scorefn.diagnostics.replicas._DIRECT", most)
    p = FAMILIES[family]()
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(1, 3, dtype=F64), nn.Tanh(), nn.Linear(3, 1, dtype=F64))
    inner = value(p)

    def f(x):
        log_prob = p.log_prob(x)
        return log_prob * inner(x) - network(log_prob.unsqueeze(-1)).squeeze(-1)

    for estimator in (expectation(), expectation(baseline=None)):
        check(p, f, estimator, [*PARAMETERS, *network.parameters()])


def test_a_gradient_of_f_that_cannot_be_differentiated_again():
    p = td.Normal(a, b.exp())
    check(p, lambda x: Once.apply(p.log_prob(x)), expectation())


def test_an_f_of_many_parameters():
    p, table = td.Categorical(logits=c), torch.randn(3, 100, dtype=F64, requires_grad=True)
    check(p, lambda x: table[x].square().sum(-1), expectation(), [*PARAMETERS, table])


def test_parameters_of_f_alone():
    p, weight = td.Bernoulli(torch.full((2,), 0.3, dtype=F64)), torch.ones((), dtype=F64, requires_grad=True)
    with pytest.raises(sf.ScorefnError, match="no score"):
        gradient_statistics((p, lambda x: weight * x.sum(-1), expectation()), weight, 40)


def test_values_are_those_of_the_estimates():
    p = td.Normal(c, 1.0)
    found = replicas(Estimation(p, value(p), expectation()), tuple(PARAMETERS))
    torch.manual_seed(5)
    values, _ = found.estimates(3)
    torch.manual_seed(5)
    x = found.draws(3)
    torch.testing.assert_close(values, torch.stack([value(p)(x[:, r]).mean(0).sum() for r in range(3)]))


def test_f_may_return_numbers_and_integers():
    p = td.Bernoulli(logits=a)
    for f in (lambda x: x.sum(-1).numpy(), lambda x: x.sum(-1).tolist(), lambda x: x.sum(-1).long()):
        check(p, f, expectation())


# --------------------------------------------------------------------------------------------------------------- laws


def deviation(sample, exact):
    """How many standard errors a sample variance is off the exact one, by the fourth moment of the sample."""
    centred = (sample - sample.mean()).square()
    return abs(float((centred.mean() - exact) / (centred.std() / len(sample) ** 0.5)))


@pytest.mark.parametrize(
    ("probability", "loo", "disarm"), [(0.5, 0.0625, 0.0), (0.3, 0.0609, 0.0294), (0.1, 0.0369, 0.0324)]
)
def test_the_law_in_one_bernoulli(probability, loo, disarm):
    """Exact variances of leave-one-out and DisARM; a false alarm has a probability below 1e-6 each."""
    torch.manual_seed(0)
    eta = torch.tensor(probability, dtype=F64).logit().requires_grad_()
    p = td.Bernoulli(logits=eta)
    for estimator, exact in ((expectation(2), loo), (sf.DisARM(), disarm)):
        found = replicas(Estimation(p, lambda x: x, estimator), (eta,)).gradients(20_000)[:, 0]
        if exact == 0.0:
            assert float(found.var()) < 1e-30
        else:
            assert deviation(found, exact) < 5
        assert abs(float(found.mean()) - probability * (1 - probability)) <= 5 * float(found.std()) / 141 + 1e-15


@pytest.mark.parametrize(
    ("k", "loo", "unordered"), [(2, 0.0072750, 0.0061125), (3, 0.0032, 0.0022625), (4, 0.0019875, 0.00113083)]
)
def test_the_law_in_three_bernoullis_of_one_logit(k, loo, unordered):
    torch.manual_seed(1)
    eta = torch.zeros((), dtype=F64, requires_grad=True)
    p, target = td.Bernoulli(logits=eta.expand(3)), torch.tensor([0.6, 0.51, 0.48], dtype=F64)
    for estimator, exact in ((expectation(k), loo), (sf.UnorderedSet(k), unordered)):
        found = replicas(Estimation(p, lambda x: (x - target).square().sum(-1), estimator), (eta,)).gradients(20_000)
        assert deviation(found[:, 0], exact) < 5


@pytest.mark.parametrize(("baseline", "exact"), [(None, 30.0), (sf.Constant(2.0), 18.0), (sf.Constant(4.0), 14.0)])
def test_the_law_in_a_normal(baseline, exact):
    torch.manual_seed(2)
    mean = torch.ones((), dtype=F64, requires_grad=True)
    estimator = expectation(1, baseline=baseline)
    found = replicas(Estimation(td.Normal(mean, 1.0), torch.square, estimator), (mean,)).gradients(100_000)
    assert deviation(found[:, 0], exact) < 5


@pytest.mark.parametrize("coupling", [None, sf.Antithetic(), sf.Stratified(), sf.Sobol()])
def test_replicates_are_independent_of_each_other(coupling):
    """The correlation of neighbours is that of independent draws."""
    torch.manual_seed(4)
    p = td.Normal(a, 1.0)
    found = replicas(Estimation(p, lambda x: x.exp().sum(-1), expectation(4, coupling=coupling)), (a,)).gradients(4000)
    z = (found - found.mean(0)) / found.std(0)
    for lag in (1, 2, 7):
        assert float((z[lag:] * z[:-lag]).mean(0).abs().max()) < 5 / 4000**0.5 * float(z.square().std())


# ----------------------------------------------------------------------------------------------------------- refusals


def mine(p, f):
    x = p.sample((4,))
    return (f(x) * p.log_prob(x).sum(-1)).mean()


def noisy(x):
    return x.sum(-1) + torch.rand(len(x), dtype=F64)


class Coin(td.Bernoulli):
    def expand(self, batch_shape, _instance=None):
        raise NotImplementedError


class Hiding(td.Distribution):
    arg_constraints = {}

    def __init__(self, logits):
        self.held = [logits]
        super().__init__(logits.shape, validate_args=False)

    def expand(self, batch_shape, _instance=None):
        return Hiding(self.held[0].expand(batch_shape))

    def sample(self, sample_shape=()):
        return td.Bernoulli(logits=self.held[0]).sample(sample_shape)

    def log_prob(self, x):
        return td.Bernoulli(logits=self.held[0]).log_prob(x)


class Closed(Hiding):
    """A tensor in a closure, where nobody looks for it."""

    def __init__(self, logits):
        super().__init__(logits.detach())
        self.read = lambda: logits

    def expand(self, batch_shape, _instance=None):
        return Closed(self.read().expand(batch_shape))

    def log_prob(self, x):
        return td.Bernoulli(logits=self.read()).log_prob(x)


def total(x):
    return x.sum(-1)


LOOPED = {
    "an own function": (td.Bernoulli(logits=a), total, mine, "mine is not among the estimators"),
    "a baseline that learns": (
        td.Bernoulli(logits=a),
        total,
        expectation(baseline=sf.MovingAverage()),
        "MovingAverage learns",
    ),
    "an f that mixes draws": (
        td.Bernoulli(logits=a),
        lambda x: x.sum(-1) - 0.5 * x.sum(-1).mean(0) * x[:, 0],
        expectation(),
        "made alone from the same draws.*looks beyond its own draws",
    ),
    "a random f": (td.Bernoulli(logits=a), noisy, expectation(), "made alone from the same draws"),
    "an f that knows N": (
        td.Bernoulli(logits=a),
        lambda x: x.sum(-1) * torch.arange(4),
        expectation(),
        "the sweep raised RuntimeError",
    ),
    "a random baseline": (
        td.Bernoulli(logits=a),
        lambda x: (x * torch.arange(1, 4)).sum(-1).square(),
        expectation(8, baseline=sf.OptimalConstant()),
        "made alone from the same draws",
    ),
    "no expand": (Coin(logits=a), total, expectation(), "Coin has no expand"),
    "hidden tensors": (Hiding(a), total, expectation(), "Hiding keeps parameters that require grad in its held"),
    "a closure": (Closed(a), total, expectation(), "made alone|does not require grad|log_prob"),
    "transforms with parameters": (td.Gumbel(a, b.exp()), total, expectation(), "Gumbel.* in its transforms"),
    "a sampler of its own": (
        pinned(td.Bernoulli(logits=a), td.Bernoulli(logits=a).sample),
        total,
        expectation(),
        "sample of its own",
    ),
    "a control that draws": (
        td.Bernoulli(logits=a),
        total,
        sf.RELAX(nn.Linear(3, 1)),
        "RELAX is not among the estimators",
    ),
}


@pytest.mark.parametrize("name", LOOPED)
def test_what_is_looped_and_why(name):
    p, f, estimator, reason = LOOPED[name]
    torch.manual_seed(0)
    found = replicas(Estimation(p, f, estimator), (a, b))
    assert isinstance(found, str)

    assert re.search(reason, found), found


def test_what_is_wrong_with_the_estimation_is_said_by_the_loop():
    p = td.Bernoulli(logits=a)
    with pytest.raises(sf.ShapeError, match=r"f returned shape \(4, 1\)"):
        gradient_statistics((p, lambda x: x.sum(-1, keepdim=True), expectation()), a, 50)
    with pytest.raises(sf.NonFiniteError, match="f is nan"):
        gradient_statistics((p, lambda x: x.sum(-1) * torch.nan, expectation()), a, 50)


def test_nothing_is_left_behind():
    logits = (2 * c).clone()
    p = td.Bernoulli(logits=logits)
    held, before = dict(vars(p)), [q.clone() for q in PARAMETERS]
    found = replicas(Estimation(p, value(p), expectation()), tuple(PARAMETERS))
    found.gradients(50)
    assert all(vars(p)[name] is held[name] for name in held)
    assert all(torch.equal(x, y) for x, y in zip(before, PARAMETERS, strict=True))
    assert all(q.grad is None for q in PARAMETERS)
    sf.expectation(p, value(p), 4).sum().backward(inputs=[c])  # the graph of p is there still
    assert c.grad is not None
    c.grad = None


def test_memory_is_bounded_by_sweeps(monkeypatch):
    monkeypatch.setattr("scorefn.diagnostics.replicas._ELEMENTS", 100)
    rows = []

    def f(x):
        rows.append(len(x))
        return x.sum(-1)

    found = replicas(Estimation(td.Bernoulli(logits=a), f, expectation()), (a,))
    rows.clear()
    assert found.gradients(20).shape == (20, 3)
    assert rows == [4 * 8, 4 * 8, 4 * 4]
