"""What control variates refuse, and what they declare."""

import pickle
from dataclasses import replace

import pytest
import torch
from torch.distributions import Bernoulli, Beta, Gamma, Laplace, Normal

import scorefn as sf
from tests.oracles.settings import Layout, Setting
from tests.reducers.control_variate_cases import coin, filled, refused
from tests.reducers.doubles import doubles


def test_linear_refuses():
    p, draws = coin()
    refused(sf.LinearControlVariate(lambda x: x[:3], lambda: p.mean), draws, r"h returned shape \(3,\)", sf.ShapeError)
    refused(sf.LinearControlVariate(lambda x: x.sum(), lambda: p.mean), draws, "h returned", sf.ShapeError)
    refused(sf.LinearControlVariate(lambda x: x / 0, lambda: p.mean), draws, "h is ", sf.NonFiniteError)
    refused(sf.LinearControlVariate(lambda x: x, lambda: p.mean / 0), draws, "expected_h is inf", sf.NonFiniteError)
    refused(sf.LinearControlVariate(lambda x: x, lambda: [p.mean, p.mean]), draws, r"torch\.stack")
    refused(sf.LinearControlVariate(lambda x: x, [0.5, 0.5]), draws, r"shape \(2,\)", sf.ShapeError)
    refused(sf.LinearControlVariate(lambda x: x, "half"), draws, "a str")
    refused(sf.LinearControlVariate(lambda x: x.double(), lambda: p.mean), draws, "float64")
    refused(sf.LinearControlVariate(lambda x: x.mul_(2), lambda: p.mean), draws, "in place")
    refused(sf.LinearControlVariate(lambda x: x, lambda: p.mean), draws[:3], "takes 3 draws there")
    refused(
        sf.LinearControlVariate(lambda x: x, lambda: p.mean, coefficient=doubles([1.0, 2.0])), draws, "coefficient",
        sf.ShapeError,
    )  # fmt: skip
    for bad in (0.0, -1.0, float("nan")):
        with pytest.raises(sf.ScorefnError, match="ridge"):
            sf.LinearControlVariate(lambda x: x, 0.0, ridge=bad)
    with pytest.raises(sf.ScorefnError, match="must be a function"):
        sf.LinearControlVariate(3.0, 0.0)
    with pytest.raises(sf.NonFiniteError, match="coefficient"):
        sf.LinearControlVariate(lambda x: x, 0.0, coefficient=float("nan"))


def test_values_charged_to_some_decisions_are_refused():
    """h would be charged to those alone, while E h moves with all."""
    draws = Setting("chain", Layout("N=4", 4)).draws
    cvs = [sf.LinearControlVariate(lambda x: x, 0.0), sf.DeltaMethod(Normal(0.0, 1.0), lambda x: x)]
    for cv in [*cvs, sf.NaturalControlVariate(Bernoulli(0.5))]:
        refused(cv, draws, "Sum the values into one", sf.ShapeError)
    _, draws = coin()
    mask = torch.tensor([[True], [False], [True], [True], [True]])
    refused(cvs[0], replace(draws, mask=mask), "absent")


def test_delta_method_refuses():
    p = Normal(torch.zeros(2, requires_grad=True), 1.0)
    draws = sf.draw(p, lambda x: x.sum(-1), 5)
    refused(sf.DeltaMethod(p, lambda x: x.sum(-1).detach()), draws, "differentiably")
    refused(sf.DeltaMethod(p, lambda x: x.detach().numpy().sum(-1)), draws, "differentiably")
    refused(sf.DeltaMethod(p, lambda x: x), draws, "the mean", sf.ShapeError)
    refused(sf.DeltaMethod(p, lambda x: x.sum(-1) / 0), draws, "f is ", sf.NonFiniteError)
    refused(sf.DeltaMethod(p, lambda x: x.abs().sqrt().sum(-1)), draws, "f' is ", sf.NonFiniteError)
    refused(sf.DeltaMethod(Normal(0.0, 1.0), lambda x: x), draws, "distribution that is sampled", sf.ShapeError)
    with pytest.raises(sf.ScorefnError, match="Beta"):
        sf.DeltaMethod(Beta(1.0, 1.0), lambda x: x)


def test_natural_refuses():
    p, _ = coin()
    cv = filled(p, lambda x: x, 6)
    _, other = coin(batch=(2,))
    refused(cv, other, "distribution that is sampled", sf.ShapeError)
    refused(cv, other, "distribution that is sampled", sf.ShapeError, use=cv.update)
    cv.measure = Bernoulli(logits=torch.zeros(2, requires_grad=True))
    refused(cv, other, "buffer", sf.ShapeError)
    refused(cv, other, "buffer", sf.ShapeError, use=cv.update)
    laplace = Laplace(torch.ones((), requires_grad=True), 1.0)
    refused(
        sf.NaturalControlVariate(laplace),
        sf.draw(laplace, lambda x: x, 3),
        "of Laplace are not known.*Bernoulli, Beta, .*register_statistics",
    )
    gamma = Gamma(torch.ones((), requires_grad=True), 1.0)
    zero = torch.tensor([[0.5], [0.0]])  # what is left of a draw that underflows
    draws = sf.Draws(zero.squeeze(-1), zero.clone().requires_grad_(), zero)
    cv = sf.NaturalControlVariate(gamma)
    for use in (None, cv.update):
        refused(cv, draws, "sufficient statistic of Gamma is -inf", sf.NonFiniteError, use=use)
    with pytest.raises(sf.ScorefnError, match=r"F \+ 2"):
        sf.NaturalControlVariate(p).fit()
    for options in ({"capacity": 2}, {"capacity": 3.0}, {"gate": 1.0}, {"gate": -0.1}, {"ridge": 0.0}):
        with pytest.raises(sf.ScorefnError):
            sf.NaturalControlVariate(p, **options)


def test_a_control_variate_inside_a_transform():
    x, table = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0]), torch.tensor([1.0, 3.0])

    def loss(theta, cv):
        p = Bernoulli(logits=theta, validate_args=False)
        draws = sf.Draws(x, p.log_prob(x).unsqueeze(-1), (2 * x).unsqueeze(-1))
        return sf.surrogate(cv(p)(draws)).mean()

    def linear_of(p):
        return sf.LinearControlVariate(lambda x: table[x.long()], lambda: table[0] + 2 * p.mean)

    theta = torch.tensor(0.3)
    ours = torch.func.grad(lambda t: loss(t, linear_of))(theta)
    leaf = theta.clone().requires_grad_()
    torch.testing.assert_close(ours, torch.autograd.grad(loss(leaf, linear_of), leaf)[0])
    with pytest.raises(sf.ScorefnError, match=r"torch\.func"):
        torch.func.grad(lambda t: loss(t, sf.NaturalControlVariate))(theta)


@pytest.mark.parametrize(
    "cv",
    [
        sf.LinearControlVariate(torch.sum, 0.0),
        sf.DeltaMethod(Normal(0.0, 1.0), torch.sum),
        sf.NaturalControlVariate(Bernoulli(0.5)),
    ],
)
def test_each_declares_what_it_is(cv):
    assert cv.unbiased is True
    assert cv.fitted is not isinstance(cv, sf.NaturalControlVariate)
    assert pickle.loads(pickle.dumps(cv)).unbiased is True
