"""Replicates beside each other are the runs one by one."""

from dataclasses import replace

import pytest
import torch
from torch import distributions as td
from torch import nn

import scorefn as sf
from scorefn.diagnostics import Estimation
from scorefn.diagnostics.replicas import replicas
from scorefn.diagnostics.statistics import gradient_statistics
from tests.diagnostics.replica_cases import (
    DISCRETE,
    F64,
    FAMILIES,
    PARAMETERS,
    RELAXED,
    a,
    b,
    c,
    check,
    expectation,
    joint,
    value,
)


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
