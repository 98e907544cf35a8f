"""The natural control variate: unbiased with every baseline, and what its coefficient is."""

import copy

import pytest
import torch
from torch.distributions import Bernoulli, Categorical, Independent, Normal, OneHotCategorical

import scorefn as sf
from tests.oracles.tolerances import EXACT, VISIBLE, near
from tests.oracles.toys import coordinates
from tests.reducers.control_variate_cases import filled
from tests.reducers.doubles import doubles

MEASURES = {
    "Bernoulli": (0.4, lambda eta: Bernoulli(logits=eta)),
    "Bernoullis": ([0.4, -0.3], lambda eta: Independent(Bernoulli(logits=eta), 1)),
    "Categorical": ([0.4, -1.0, 0.3], lambda eta: Categorical(logits=eta)),
    "OneHotCategorical": ([0.4, -1.0, 0.3], lambda eta: OneHotCategorical(logits=eta)),
}


def points_of(name):
    if name == "Bernoulli":
        return doubles([0.0, 1.0])
    if name == "Bernoullis":
        return coordinates(2, 2).double()
    return torch.arange(3) if name == "Categorical" else torch.eye(3, dtype=torch.float64)


def some_f(name):
    """Some f of each kind of draw."""
    if name in ("Bernoulli", "Categorical"):
        return lambda x: (x.double() - 0.4).square() + x
    return lambda x: (x * doubles([1.0, 2.5, -2.0])[: x.shape[-1]]).sum(-1).pow(2)


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize("gate", [0.0, 0.999])
@pytest.mark.parametrize("baseline", [None, sf.LeaveOneOut(), sf.OptimalConstant()])
def test_natural_is_unbiased_with_every_baseline(name, gate, baseline):
    """By enumeration of the present draws; the past is any past, here one of another distribution."""
    start, build = MEASURES[name]
    eta = doubles(start).requires_grad_()
    points, f = points_of(name), some_f(name)
    weight = build(eta.detach()).log_prob(points).exp()
    choice = coordinates(*[len(points)] * 3).T
    own = eta.expand(choice.shape[1], *eta.shape)
    p = build(own)
    p.sample = lambda shape: points[choice]
    cv = sf.NaturalControlVariate(lambda: p, gate=gate)
    past = build(torch.zeros_like(eta)).sample((12,))  # the same one for every tuple
    past = past.unsqueeze(1).expand(12, choice.shape[1], *past.shape[1:])
    cv.update(sf.Draws(past, p.log_prob(past).unsqueeze(-1), f(past).unsqueeze(-1)))
    draws = sf.draw(p, f, 3)
    changed = (cv(draws).fx - draws.fx).abs().amax((0, 2)) > VISIBLE
    assert changed.any() == (gate < 0.5 or name in ("Bernoulli", "Categorical", "OneHotCategorical")), "linear, or not"
    probability = weight[choice].prod(0)
    expected = (probability * sf.surrogate(cv(draws), baseline=baseline).mean(0)).sum()
    truth = (build(eta).log_prob(points).exp() * f(points)).sum()
    assert near(expected.detach(), truth.detach(), EXACT)
    pair = [torch.autograd.grad(value, eta, retain_graph=True)[0] for value in (expected, truth)]
    assert near(*pair, EXACT)


def test_mutation_fitted_on_the_present_draws():
    """An update before the use turns the certificate red."""
    eta = doubles(0.4).requires_grad_()
    choice = coordinates(2, 2, 2, 2).T.double()
    p = Bernoulli(logits=eta.expand(16))
    p.sample = lambda shape: choice
    weight = torch.where(choice > 0, eta.sigmoid(), 1 - eta.sigmoid()).prod(0).detach()
    f = lambda x: 3 * x + 1  # noqa: E731
    draws = sf.draw(p, f, 4)
    cv = sf.NaturalControlVariate(p, gate=0.0)
    cv.update(draws)
    gradient = torch.autograd.grad((weight * sf.surrogate(cv(draws)).mean(0)).sum(), eta)[0]
    truth = 3 * eta.sigmoid() * (1 - eta.sigmoid())
    assert abs(float((gradient - truth).detach())) > VISIBLE


def test_the_coefficient_is_the_natural_gradient_of_a_quadratic():
    """N(0, 1), f = 3 x + 2 x^2: beta = Fisher^-1 grad E f in the natural parameters, (3, 2), whatever the draws."""
    cv = filled(Normal(torch.zeros((), dtype=torch.float64, requires_grad=True), 1.0), lambda x: 3 * x + 2 * x**2, 9,
                ridge=1e-12)  # fmt: skip
    beta, r_squared = cv.fit()
    eta = doubles([0.0, -0.5]).requires_grad_()  # of T = (x, x^2)

    def log_normaliser(eta):
        return -eta[0].square() / (4 * eta[1]) - (-2 * eta[1]).log() / 2

    fisher = torch.autograd.functional.hessian(log_normaliser, eta)
    mean = torch.autograd.grad(log_normaliser(eta), eta, create_graph=True)[0]  # E T
    gradient = torch.autograd.grad(3 * mean[0] + 2 * mean[1], eta)[0]
    assert near(beta, torch.linalg.solve(fisher, gradient), 1e-8)
    assert near(beta, doubles([3.0, 2.0]), 1e-8)
    assert r_squared > 1 - 1e-9


def test_the_coefficient_is_the_natural_gradient_on_the_cube():
    """Two Bernoullis, any f: on draws in their own proportions beta is Fisher^-1 grad E f, f not being linear."""
    eta = doubles([0.0, 0.0]).requires_grad_()
    p = Independent(Bernoulli(logits=eta), 1)
    f = lambda x: x[..., 0] * x[..., 1] + 3 * x[..., 0]  # noqa: E731
    x = coordinates(2, 2).double().repeat(3, 1)
    cv = sf.NaturalControlVariate(p, ridge=1e-12)
    cv.update(sf.Draws(x, p.log_prob(x).unsqueeze(-1), f(x).unsqueeze(-1)))
    weight = p.log_prob(x[:4]).exp()
    gradient = torch.autograd.grad((weight * f(x[:4])).sum(), eta)[0]
    fisher = (p.mean * (1 - p.mean)).detach()
    assert near(cv.fit()[0], gradient / fisher, 1e-9)


def test_the_gate_shuts_where_the_model_explains_nothing():
    p = Normal(torch.zeros((), dtype=torch.float64, requires_grad=True), 1.0)
    noise = filled(p, lambda x: torch.randn_like(x), 200)
    draws = sf.draw(p, lambda x: x, 5)
    assert noise.fit()[1] < noise.gate
    assert torch.equal(noise(draws).fx, draws.fx)
    told = filled(p, lambda x: x + 0.1 * torch.randn_like(x), 200)
    assert told.fit()[1] > 0.9
    deviation = 0.1 / 200**0.5 * (draws.x.abs() + (draws.x.square() - 1).abs() / 2**0.5)  # of both coefficients
    assert (told(draws).fx.squeeze(-1).abs() < 5 * deviation).all()
    constant = filled(p, lambda x: torch.ones_like(x), 20)
    assert torch.equal(constant(draws).fx, draws.fx)


def test_r_squared_against_leaving_out_one_by_one():
    p = Normal(torch.zeros((), dtype=torch.float64, requires_grad=True), 1.0)
    cv = filled(p, lambda x: x.sin() + x**2, 8, ridge=1e-12)
    t, y = torch.stack([torch.ones_like(cv.x), cv.x, cv.x**2], -1), cv.fx
    left = []
    for i in range(8):
        keep = [j for j in range(8) if j != i]
        left.append(y[i] - t[i] @ torch.linalg.lstsq(t[keep], y[keep].unsqueeze(-1)).solution.squeeze(-1))
    null = sum((y[i] - y[[j for j in range(8) if j != i]].mean()) ** 2 for i in range(8))
    assert near(cv.fit()[1], 1 - torch.stack(left).square().sum() / null, 1e-7)


def test_the_buffer_keeps_the_newest_and_is_copied():
    p = Independent(Bernoulli(logits=torch.zeros(2, requires_grad=True)), 1)
    cv, draws = sf.NaturalControlVariate(lambda: p, capacity=5), sf.draw(p, lambda x: x.sum(-1), 4)
    identity = cv(draws)
    assert identity is draws
    cv.update(draws)
    later = sf.draw(p, lambda x: x.sum(-1), 3)
    twin = copy.deepcopy(cv)
    cv.update(later)
    assert torch.equal(cv.x, torch.cat([draws.x[-2:], later.x]))
    assert torch.equal(cv.fx, torch.cat([draws.fx[-2:], later.fx]).squeeze(-1))
    assert len(twin.fx) == 4
    assert not cv.fx.requires_grad


def test_variance_with_a_well_fed_buffer():
    """Logistic likelihood in 5 dimensions, N = 16, 400 past draws: measured on 300 estimates."""
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(40, 5, generator=generator, dtype=torch.float64)
    m, s = torch.zeros(5, dtype=torch.float64, requires_grad=True), torch.full((5,), 0.3, dtype=torch.float64)
    p = Independent(Normal(m, s), 1)
    f = lambda x: torch.nn.functional.logsigmoid(x @ data.T).sum(-1)  # noqa: E731
    cv = filled(p, f, 400)

    def spread(control):
        every = [torch.autograd.grad(sf.expectation(p, f, 16, control_variate=control), m)[0] for _ in range(300)]
        return float(torch.stack(every).var(0).sum())

    assert spread(cv) < 0.5 * spread(None)
