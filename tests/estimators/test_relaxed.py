"""REBAR and RELAX."""

import pytest
import torch
from torch import nn
from torch.distributions import Bernoulli, Categorical, Independent, Normal, OneHotCategorical
from torch.nn.functional import one_hot

import scorefn as sf
from scorefn.estimators import relaxed
from tests.estimators.discrete_problems import PSI, check_exact, problem
from tests.estimators.relaxed_cases import (
    Given,
    Network,
    bernoulli_cell,
    check,
    grid,
    mean_over_cells,
    rebar_sampler,
    relax_sampler,
    trapezoid,
)
from tests.oracles.toys import coordinates


@pytest.mark.parametrize(("temperature", "scale"), [(0.5, 1.0), (1.0, -0.7)])
def test_rebar_of_one_coin_by_both_uniforms(monkeypatch, temperature, scale):
    """The plain double integral, which takes nothing of the estimate's form for granted."""
    given = problem(Bernoulli, 1)
    t, weight = trapezoid(0.3, 36)
    choice = coordinates(len(t), len(t), 2)
    p = given.logits.sigmoid()  # [B, 1]
    first = bernoulli_cell(p, t[choice[:, 0], None, None], choice[:, 2, None, None])
    cell = torch.where(choice[:, 2, None] > 0, p[:, 0], 1 - p[:, 0])
    monkeypatch.setattr(relaxed, "uniform", Given(first, t[choice[:, 1], None, None]))
    check_exact(given, weight[choice[:, :2]].prod(-1, keepdim=True) * cell, sf.REBAR(temperature, scale))


@pytest.mark.parametrize("joined", [True, False])
@pytest.mark.parametrize(("temperature", "scale"), [(0.5, 1.0), (1.0, -0.7)])
def test_rebar_of_two_coins(monkeypatch, temperature, scale, joined):
    given = problem(Bernoulli, 2, joined=joined)
    sample = rebar_sampler(monkeypatch, given)
    check(given, *mean_over_cells(given, monkeypatch, sf.REBAR(temperature, scale), sample, 0.4, 30), 1e-10)


# what the trapezoid reaches: three dimensions allow of a wide step only
CATEGORICAL = pytest.mark.parametrize(("values", "h", "reach", "tolerance"), [(2, 0.5, 32, 1e-10), (3, 1.0, 20, 3e-6)])


@CATEGORICAL
def test_rebar_of_a_categorical(monkeypatch, values, h, reach, tolerance):
    given = problem(OneHotCategorical, 1, values)
    sample = rebar_sampler(monkeypatch, given)
    check(given, *mean_over_cells(given, monkeypatch, sf.REBAR(0.8, 0.9), sample, h, reach), tolerance)


@pytest.mark.parametrize("sites", [1, 2])
def test_relax_of_coins(monkeypatch, sites):
    given = problem(Bernoulli, sites)
    sample = relax_sampler(monkeypatch, given)
    check(given, *mean_over_cells(given, monkeypatch, sf.RELAX(Network(1)), sample, 0.4, 30), 1e-10)


@CATEGORICAL
@pytest.mark.parametrize("family", [Categorical, OneHotCategorical])
def test_relax_of_a_categorical(monkeypatch, family, values, h, reach, tolerance):
    given = problem(family, 1, values)
    sample = relax_sampler(monkeypatch, given)
    check(given, *mean_over_cells(given, monkeypatch, sf.RELAX(Network(2)), sample, h, reach), tolerance)


@pytest.mark.parametrize("family", [Bernoulli, OneHotCategorical])
def test_the_conditional_draws_follow_the_law_of_z(family):
    """Mixed over the hard values, z given b is logistic, or Gumbel: compared with their closed moments."""
    given = problem(family, 1, 2)
    p = given.distribution(given.logits).base_dist
    moment = torch.zeros(2, dtype=torch.float64)
    if family is Bernoulli:
        t, weight = grid(1, 0.2, 36)
        for b, probability in ((0.0, 1 - p.probs), (1.0, p.probs)):
            z = relaxed._conditional(p, given.logits, torch.tensor(b).double(), t.unsqueeze(1))
            assert ((z > 0) == bool(b)).all()
            moment = moment + (weight[:, None, None] * z.square()).sum(0)[:, 0] * probability[:, 0]
        assert (moment - (given.logits[:, 0].square() + torch.pi**2 / 3)).abs().max() < 1e-10
    else:
        t, weight = grid(2, 0.4, 36)
        for b in range(2):
            hard = one_hot(torch.tensor(b), 2).double()
            z = relaxed._conditional(p, p.logits, hard, t[:, None, None])
            assert (z[..., b] == z.amax(-1)).all()
            moment = moment + (weight[:, None] * z[..., 0, 1]).sum(0) * p.probs[:, 0, b]
        assert (moment - (p.logits[:, 0, 1] + 0.57721566490153286)).abs().max() < 1e-10


def test_the_conditional_of_a_coin_is_the_textbook_one():
    """`log p - log(1 - p) + log v' - log(1 - v')`, in the middle where it loses no digits."""
    logits = torch.tensor([-1.0, 0.3, 2.0], dtype=torch.float64)
    v, p = torch.tensor([0.2, 0.9, 0.5], dtype=torch.float64), logits.sigmoid()
    for b, moved in ((0.0, v * (1 - p)), (1.0, v * p + 1 - p)):
        textbook = p.log() - (1 - p).log() + moved.log() - (1 - moved).log()
        ours = relaxed._conditional(Bernoulli(logits=logits), logits, torch.full((3,), b).double(), v)
        assert (ours - textbook).abs().max() < 1e-14


def rebar_setting(family, sites=2):
    given = problem(family, sites)
    return given, given.logits.clone().requires_grad_(), PSI.clone().requires_grad_()


@pytest.mark.parametrize("family", [Bernoulli, OneHotCategorical])
def test_the_gradient_of_the_variance_is_right_and_reaches_nothing_else(family):
    """REBAR: with the noise held, that of the squared gradient by central differences in temperature and scale."""
    given, logits, psi = rebar_setting(family)

    def squared(log_temperature, scale):
        torch.manual_seed(5)
        estimator = sf.REBAR()
        with torch.no_grad():
            estimator.log_temperature.fill_(log_temperature)
            estimator.scale.fill_(scale)
        p = given.distribution(logits)
        x = estimator.sample(p)
        fx = given.f(x, psi, logits)
        value = estimator.surrogate(p, x, fx).sum() - fx[0].sum()
        (gradient,) = torch.autograd.grad(value, logits, retain_graph=True)
        loss = estimator.variance_loss(p, x, fx)
        assert abs(loss - gradient.square().sum()) < 1e-12
        loss.backward()
        assert logits.grad is None
        assert psi.grad is None
        return loss.item(), [parameter.grad.item() for parameter in estimator.parameters()]

    _, slopes = squared(-0.5, 0.8)
    h = 1e-5
    assert abs((squared(-0.5 + h, 0.8)[0] - squared(-0.5 - h, 0.8)[0]) / (2 * h) - slopes[0]) < 1e-8
    assert abs((squared(-0.5, 0.8 + h)[0] - squared(-0.5, 0.8 - h)[0]) / (2 * h) - slopes[1]) < 1e-8


def test_the_gradient_of_the_variance_of_a_network():
    """RELAX: the same, in each weight of the control."""
    given, logits, psi = rebar_setting(Bernoulli)
    control = Network(1)
    estimator, p = sf.RELAX(control), given.distribution(logits)
    x = estimator.sample(p)
    fx = given.f(x, psi, logits)

    def loss():
        torch.manual_seed(2)
        return estimator.variance_loss(p, x, fx)

    loss().backward()
    assert logits.grad is None
    assert psi.grad is None
    for index in range(2):
        h, ends = 1e-5, []
        for step in (h, -h):
            with torch.no_grad():
                control.weight[index] += step
                ends.append(loss().item())
                control.weight[index] -= step
        assert abs((ends[0] - ends[1]) / (2 * h) - control.weight.grad[index]) < 1e-8


def test_the_estimate_gives_the_control_no_gradient():
    given, logits, psi = rebar_setting(Bernoulli)
    for estimator in (sf.REBAR(), sf.RELAX(Network(1))):
        estimator(given.distribution(logits), lambda x: given.f(x, psi, logits)).sum().backward()
        assert not any(parameter.grad is not None and parameter.grad.any() for parameter in estimator.parameters())


def test_f_in_the_direct_gradient_is_the_hard_one():
    given, logits, psi = rebar_setting(Bernoulli)
    p, estimator = given.distribution(logits), sf.REBAR()
    x = estimator.sample(p)
    fx = given.f(x, psi, logits)
    value = estimator.surrogate(p, x, fx)
    assert torch.equal(value, fx[0])
    (ours,) = torch.autograd.grad(value.sum(), psi, retain_graph=True)
    (hard,) = torch.autograd.grad(fx[0].sum(), psi)
    assert torch.equal(ours, hard)
    assert torch.equal(estimator.weights(p, x), torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64))


@pytest.mark.parametrize("make", [lambda: sf.REBAR(), lambda: sf.RELAX(Network(1))])
def test_tuning_lowers_the_variance(make):
    """One coin with the anchor's f, 150 steps, fixed seed: less than leave-one-out's two evaluations at first."""
    torch.manual_seed(0)
    estimator = make()
    tuner = torch.optim.Adam(estimator.parameters(), 0.03)
    logits = torch.zeros(100, 1, dtype=torch.float64, requires_grad=True)
    losses = []
    for _ in range(150):
        p = Independent(Bernoulli(logits=logits), 1)
        x = estimator.sample(p)
        loss = estimator.variance_loss(p, x, (x - 0.1).square().sum(-1)) / 100
        tuner.zero_grad()
        loss.backward()
        tuner.step()
        losses.append(loss.item())
    truth = (0.25 * 0.8) ** 2
    assert sum(losses[-20:]) / 20 - truth < 0.5 * (losses[0] - truth)


@pytest.mark.parametrize("family", [Bernoulli, OneHotCategorical, Categorical])
def test_extremes_in_float32(family):
    logits = torch.tensor([-100.0, 100.0, -40.0, 40.0], requires_grad=True)
    impossible = torch.full((4,), -torch.inf)

    def distribution():
        last = logits if family is Bernoulli else torch.stack((logits, -logits, impossible), -1)
        return Independent(family(logits=last), 1)

    estimators = [sf.RELAX(Network(2 if family is not Bernoulli else 1).float())]
    estimators[0].control.weight = nn.Parameter(torch.full((12,) if family is not Bernoulli else (4,), 0.3))
    if family is not Categorical:
        estimators.append(sf.REBAR(0.1))
    for estimator in estimators:
        for _ in range(20):
            p = distribution()
            x = estimator.sample(p)
            fx = x.float().flatten(1).sum(-1).sin()
            value = estimator.surrogate(p, x, fx)
            loss = estimator.variance_loss(p, x, fx)
            (gradient,) = torch.autograd.grad(value, logits, retain_graph=True)
            assert x.isfinite().all()
            assert gradient.isfinite().all()
            assert loss.isfinite()
            loss.backward()
            assert all(q.grad is None or q.grad.isfinite().all() for q in estimator.parameters())


def coin():
    return Bernoulli(logits=torch.zeros(3, requires_grad=True))


def test_other_families_are_refused():
    with pytest.raises(
        sf.ScorefnError, match="REBAR does not serve Categorical: it serves Bernoulli, OneHotCategorical"
    ):
        sf.REBAR()(Categorical(logits=torch.zeros(3)), lambda x: x)
    with pytest.raises(sf.ScorefnError, match="RELAX does not serve Normal: it serves Bernoulli, Categorical"):
        sf.RELAX(Network(1))(Normal(0.0, 1.0), lambda x: x)


def test_a_black_box_is_refused_by_rebar():
    with pytest.raises(sf.ScorefnError, match="REBAR differentiates f with respect to the draws"):
        sf.REBAR()(coin(), lambda x: (x > 0.5).sum(-1))


@pytest.mark.parametrize("temperature", [0, -1.0, float("nan"), float("inf"), "0.5", True, None])
def test_bad_temperatures_are_refused(temperature):
    with pytest.raises(sf.ScorefnError, match="temperature must be"):
        sf.REBAR(temperature)


def test_a_bad_scale_is_refused():
    with pytest.raises(sf.ScorefnError, match="scale must be a finite number"):
        sf.REBAR(scale=float("nan"))


def test_bad_controls_are_refused():
    class Shaped(nn.Module):
        def forward(self, z):
            return z

    class Constant(Network):
        def forward(self, z):
            return self.weight[0].expand(2)

    with pytest.raises(sf.ScorefnError, match=r"is no torch.nn.Module"):
        sf.RELAX(lambda z: z.sum(-1))
    with pytest.raises(sf.ShapeError, match=r"The control returned \(2, 3\) for z of shape \(2, 3\)"):
        sf.RELAX(Shaped())(coin(), lambda x: x.sum(-1))
    with pytest.raises(sf.ScorefnError, match="Constant does not depend on z differentiably"):
        sf.RELAX(Constant(1))(coin(), lambda x: x.sum(-1))


def test_cost_and_no_grad():
    for estimator, cost in ((sf.REBAR(), 3), (sf.RELAX(Network(1)), 1)):
        assert estimator.evaluations == cost == len(estimator.sample(coin()))
        assert estimator.unbiased
        with torch.no_grad():
            assert not estimator(coin(), lambda x: x.sum(-1)).requires_grad
    assert repr(sf.REBAR()) == "REBAR(temperature=0.5, scale=1)"
    assert repr(sf.RELAX(Network(1))) == "RELAX(Network)"
