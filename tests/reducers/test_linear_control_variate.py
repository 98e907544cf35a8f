"""Linear control variates: the expected gradient by enumeration, tuple by tuple, and what they explain."""

from dataclasses import replace

import pytest
import torch
from torch.distributions import Bernoulli, Independent, Normal

import scorefn as sf
from scorefn.reducers import control_variates, cross_fitting
from tests.oracles.settings import Layout, Setting
from tests.oracles.tolerances import EXACT, VISIBLE, near
from tests.oracles.toys import values
from tests.reducers.doubles import doubles

SETTINGS = [
    Setting(toy, layout, off_policy)
    for toy, layouts in {
        "single": [
            Layout("N=4", 4),
            Layout("N=4 B=(2,)", 4, batch=(2,)),
            Layout("pairs", 6, block=(3, 3, 0, 1, 1, 0), law="antithetic"),
            Layout("ragged copies", 5, block=(0, 1, 2, 3, 0)),
            Layout("groups", 6, group=(0, 0, 1, 0, 1, 0)),
        ],
        "coins": [Layout("N=4", 4), Layout("groups", 5, group=(0, 0, 1, 0, 0))],
        "ended": [Layout("N=4", 4)],
    }.items()
    for layout in layouts
    for off_policy in (False, True)
]


def one_value(given):
    """The draws of a setting with their values summed, and all decisions charged with the sum."""
    return replace(given.draws, fx=given.draws.fx.sum(-1, keepdim=True), credit=sf.Total())


def tables(given, width):
    """h of each path `[P, H]`."""
    return values((given.toy.state.shape[0], width), 60)


def expectations(given, table, detach=False):
    """E h of each draw, `[N, T, *B, H]`: groups and problems have parameters of their own."""
    expected = (given.paths.probability.unsqueeze(-1) * table).sum(-2)[list(given.layout.groups)].unsqueeze(1)
    expected = expected.expand(*given.choice.shape, table.shape[-1])
    return expected.detach() if detach else expected


def linear(given, width=1, several=True, **options):
    table = tables(given, width)
    if several:
        return sf.LinearControlVariate(lambda x: table[x], lambda: expectations(given, table), **options)
    return sf.LinearControlVariate(
        lambda x: table[x].squeeze(-1), lambda: expectations(given, table).squeeze(-1), **options
    )


def gap(given, cv, baseline=None, entry=sf.surrogate):
    """Deviation of the expected gradient from the true one; the expected value must be right in any case."""
    estimate = entry(cv(one_value(given)), baseline=baseline).mean(0)
    expected = (given.weight * estimate).sum()
    assert abs(float(expected.detach() - given.truth(1.0))) < EXACT
    gradient = torch.autograd.grad(expected, given.parameters, retain_graph=True)
    truth = given.true_gradient(1.0)
    return max(float((g - t).abs().max()) for g, t in zip(gradient, truth, strict=True))


@pytest.mark.parametrize("given", SETTINGS, ids=str)
@pytest.mark.parametrize("baseline", [None, sf.LeaveOneOut(), sf.Constant(0.7)])
def test_linear_is_unbiased(given, baseline):
    for entry in (sf.surrogate, sf.dice):
        assert gap(given, linear(given), baseline, entry) < EXACT
        assert gap(given, linear(given, several=False), baseline, entry) < EXACT
        assert gap(given, linear(given, 2, coefficient=doubles([0.3, -2.0])), baseline, entry) < EXACT


def test_c_is_fitted_there_and_differs_from_draw_to_draw():
    """Otherwise the tests above would compare nothing."""
    for given in SETTINGS:
        draws = one_value(given)
        change = linear(given)(draws).fx - draws.fx
        assert (change.abs() > VISIBLE).double().mean() > 0.3, given


def test_several_h_are_unbiased():
    """Two functions need four other draws."""
    given = Setting("coins", Layout("N=5", 5))
    for baseline in (None, sf.LeaveOneOut()):
        assert gap(given, linear(given, 2), baseline) < EXACT


def test_h_may_have_parameters_of_its_own():
    given = SETTINGS[0]
    table, psi = tables(given, 1), given.parameters[1]
    cv = sf.LinearControlVariate(lambda x: psi.exp() * table[x], lambda: psi.exp() * expectations(given, table))
    assert gap(given, cv, sf.LeaveOneOut()) < EXACT


def test_second_derivatives():
    """`dice` with a control variate is right at the second order as well."""
    given = Setting("coins", Layout("N=4", 4))
    cv = linear(given)
    estimate = (given.weight * sf.dice(cv(one_value(given)), baseline=sf.LeaveOneOut()).mean(0)).sum()
    truth = (given.paths.probability * given.paths.fx.sum(-1)).sum(-1)[0]

    def hessian(value):
        first = torch.autograd.grad(value, given.parameters, create_graph=True)
        flat = torch.cat([g.flatten() for g in first])
        return torch.cat([
            torch.cat([h.flatten() for h in torch.autograd.grad(g, given.parameters, retain_graph=True)]) for g in flat
        ])  # fmt: skip

    assert near(hessian(estimate), hessian(truth), EXACT)


# ------------------------------------------------------------------------------------------------ mutations


def including_itself(v, draws, *, across_groups=False):
    return v.sum(0, keepdim=True).expand(v.shape)


@pytest.mark.parametrize("baseline", [None, sf.LeaveOneOut()])
def test_mutation_c_fitted_on_the_own_draw_as_well(baseline, monkeypatch):
    for module in (control_variates, cross_fitting):
        monkeypatch.setattr(module, "others", including_itself)
    with pytest.raises(AssertionError):  # value or gradient
        assert gap(SETTINGS[0], linear(SETTINGS[0]), baseline) < VISIBLE


def test_mutation_c_fitted_inside_the_own_block():
    given = next(s for s in SETTINGS if s.layout.name == "pairs")
    cv = linear(given)
    with pytest.raises(AssertionError):
        assert gap(given, lambda draws: replace(cv(replace(draws, block=None)), block=draws.block)) < VISIBLE


def test_mutation_expected_h_detached():
    """The value stays right, the gradient misses c grad E h: numbers are believed, tensors are not."""
    given = SETTINGS[0]
    table = tables(given, 1)
    numbers = expectations(given, table, detach=True)[0, 0].tolist()
    assert gap(given, sf.LinearControlVariate(lambda x: table[x], numbers)) > VISIBLE
    with pytest.raises(sf.ScorefnError, match="does not require grad"):
        sf.LinearControlVariate(lambda x: table[x], lambda: expectations(given, table, detach=True))(one_value(given))


def test_a_baseline_that_is_fitted_as_well_is_biased():
    """Why `fitted` meets `fitted` only to be refused; leave-one-out is linear in what is independent, and passes."""
    given = SETTINGS[0]
    fitted = linear(given)
    assert gap(given, lambda draws: replace(fitted(draws), fitted=False), sf.OptimalConstant()) > 1e-5
    assert gap(given, linear(given, coefficient=0.8), sf.OptimalConstant()) < EXACT
    assert gap(given, linear(given), sf.LeaveOneOut()) < EXACT


def test_expectation_refuses_two_that_are_fitted_before_f_is_called():
    p = Bernoulli(logits=torch.zeros(3, dtype=torch.float64, requires_grad=True))
    fitted = sf.LinearControlVariate(lambda x: x.sum(-1), lambda: p.mean.sum())
    known = sf.LinearControlVariate(lambda x: x.sum(-1), lambda: p.mean.sum(), coefficient=1.0)
    calls = []

    def f(x):
        calls.append(1)
        return x.sum(-1)

    for baseline in (sf.OptimalConstant(), sf.RegressionBaseline(lambda draws: torch.ones(8, 1, 1).double())):
        with pytest.raises(sf.ScorefnError, match=r"LinearControlVariate and \w+ are both fitted.*LeaveOneOut\(\)"):
            sf.expectation(p, f, 8, control_variate=fitted, baseline=baseline)
        assert not calls
    for baseline in (None, sf.LeaveOneOut(), sf.Constant(1.0), sf.MovingAverage()):
        sf.expectation(p, f, 8, control_variate=fitted, baseline=baseline)
    sf.expectation(p, f, 8, control_variate=known, baseline=sf.OptimalConstant())


def test_two_fits_are_refused_wherever_they_meet():
    p = Bernoulli(logits=torch.zeros(3, dtype=torch.float64, requires_grad=True))
    draws = sf.draw(p, lambda x: x.sum(-1), 8)
    first, second = (
        sf.LinearControlVariate(lambda x, i=i: x[:, i], lambda i=i: p.mean[i], coefficient=c)
        for i, c in ((0, None), (1, None))
    )
    known = sf.LinearControlVariate(lambda x: x[:, 1], lambda: p.mean[1], coefficient=1.0)
    with pytest.raises(
        sf.ScorefnError, match=r"control variate of these draws and LinearControlVariate.*several functions"
    ):
        second(first(draws))
    with pytest.raises(sf.ScorefnError, match="control variate of these draws and OptimalConstant are both fitted"):
        sf.surrogate(first(draws), baseline=sf.OptimalConstant())
    with pytest.raises(sf.ScorefnError, match="both fitted"):
        sf.expectation(p, lambda x: x.sum(-1), 8, control_variate=lambda d: first(d), baseline=sf.OptimalConstant())
    assert known(first(draws)).fitted
    assert first(known(draws))[:4].fitted
    assert not known(draws).fitted
    sf.surrogate(known(first(draws)), baseline=sf.LeaveOneOut())


def test_a_buffer_that_can_never_be_fitted_names_its_capacity():
    p = Independent(Normal(torch.zeros(6, requires_grad=True), 1.0), 1)
    draws = sf.draw(p, lambda x: x.sum(-1), 8)
    with pytest.raises(sf.ScorefnError, match=r"capacity = 10 past draws, but 12 statistics take 14"):
        sf.NaturalControlVariate(p, capacity=10).update(draws)


def test_expectation_lets_a_control_variate_learn_from_the_raw_draws():
    p = Bernoulli(logits=torch.zeros(3, dtype=torch.float64, requires_grad=True))
    natural = sf.NaturalControlVariate(p, gate=0.0)
    seen = []
    learn = natural.update
    natural.update = lambda draws: (seen.append(draws.fx.clone()), learn(draws))
    for _ in range(3):
        sf.expectation(p, lambda x: x.sum(-1), 8, control_variate=natural)
    with torch.no_grad():
        sf.expectation(p, lambda x: x.sum(-1), 8, control_variate=natural)
    assert len(seen) == 3
    assert all(torch.equal(fx, fx.round()) for fx in seen)  # counts of coins, not what was left of them


# ------------------------------------------------------------------------------------------------ what c is


@pytest.mark.parametrize("off_policy", [False, True])
@pytest.mark.parametrize("labels", [{}, {"block": (0, 1, 1, 2, 3, 4, 5, 6, 6)}, {"group": (0, 0, 1, 0, 0, 1, 0, 1, 1)}])
def test_c_against_the_loop(labels, off_policy):
    """Least squares of w f on w and w h over the other blocks of the group."""
    generator = torch.Generator().manual_seed(3)
    h, fx, log_prob = (torch.randn(9, width, generator=generator, dtype=torch.float64) for width in (2, 1, 1))
    behaviour = log_prob + 0.4 * values((9, 1), 4)
    draws = sf.Draws(
        h, log_prob.requires_grad_(), fx,
        behaviour_log_prob=behaviour if off_policy else None,
        **{name: torch.tensor(label) for name, label in labels.items()},
    )  # fmt: skip
    ours = sf.LinearControlVariate(lambda x: x, [0.0, 0.0], ridge=1e-12)(draws).fx
    weight = (log_prob - behaviour).exp().detach() if off_policy else torch.ones(9, 1).double()
    block, group = labels.get("block", range(9)), labels.get("group", [0] * 9)
    for i in range(9):
        keep = [j for j in range(9) if block[j] != block[i] and group[j] == group[i]]
        c = doubles([0.0, 0.0])
        if len(keep) >= 4:
            design = weight[keep] * torch.cat([torch.ones(len(keep), 1).double(), h[keep]], -1)
            c = torch.linalg.lstsq(design, weight[keep] * fx[keep]).solution[1:, 0]
        assert near(ours[i, 0].detach(), fx[i, 0] - c @ h[i], 1e-8), i


def test_a_linear_f_leaves_no_variance():
    """And with it the anchor of 200 Bernoullis: f is linear on the cube."""
    logits = (0.1 * values((200,), 8)).requires_grad_()
    p = Independent(Bernoulli(logits=logits), 1)
    weight = values((200,), 9)
    f = lambda x: (weight * x).sum(-1)  # noqa: E731
    cv = sf.LinearControlVariate(f, lambda: (weight * p.mean).sum())
    exact = sf.LinearControlVariate(f, cv.expected_h, coefficient=1.0)
    truth = torch.autograd.grad((weight * p.mean).sum(), logits, retain_graph=True)[0]
    for control, tolerance in ((cv, 1e-4), (exact, 1e-11)):  # the damping is 1e-6
        value = sf.expectation(p, f, 8, control_variate=control)
        assert near(torch.autograd.grad(value, logits, retain_graph=True)[0], truth, tolerance)


def test_functions_that_repeat_each_other_share_c():
    p = Bernoulli(logits=torch.zeros((), dtype=torch.float64, requires_grad=True))
    draws = sf.draw(p, lambda x: 3 * x + 1, 30)
    one = sf.LinearControlVariate(lambda x: x, lambda: p.mean)(draws)
    two = sf.LinearControlVariate(
        lambda x: torch.stack([x, 1 - x], -1), lambda: torch.stack([p.mean, 1 - p.mean])
    )(draws)  # fmt: skip
    assert near(one.fx, two.fx, 1e-5)


def test_where_the_others_do_not_vary_c_is_zero():
    """What rounding makes of a constant is no slope."""
    h = doubles([0.1] * 6 + [5.0]).unsqueeze(-1)
    draws = sf.Draws(h, values((7, 1), 1).requires_grad_(), values((7, 1), 2))
    fx = sf.LinearControlVariate(lambda x: x, [0.0])(draws).fx
    assert fx[6] == draws.fx[6]
    assert (fx != draws.fx)[:6].all()


def test_less_variance_for_a_curved_f():
    """f = exp(x/4) under N(0, 1), h = (x, x^2): measured on 2000 estimates of 32 draws."""
    m = torch.zeros(2000, dtype=torch.float64, requires_grad=True)
    p = Normal(m, 1.0)
    f = lambda x: (x / 4).exp()  # noqa: E731
    cv = sf.LinearControlVariate(
        lambda x: torch.stack([x, x.square()], -1), lambda: torch.stack([p.mean, p.mean.square() + 1], -1)
    )
    spread = {}
    for control in (None, cv):
        value = sf.expectation(p, f, 32, control_variate=control)
        spread[control] = float(torch.autograd.grad(value.sum(), m)[0].var())
    assert spread[cv] < 0.1 * spread[None]


@pytest.mark.parametrize("shape", [(), (3,)])
def test_expected_h_in_each_shape(shape):
    logits = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    p = Bernoulli(logits=logits)
    draws = sf.draw(p, lambda x: 2 * x, 5)
    fine = [lambda: p.mean, p.mean, lambda: p.mean.expand(5, *shape)]
    fx = [sf.LinearControlVariate(lambda x: x, e)(draws).fx for e in fine]
    assert all(torch.equal(fx[0], other) for other in fx)
    several = lambda x: torch.stack([x, x], -1)  # noqa: E731
    for expected in (lambda: torch.stack([p.mean] * 2, -1), lambda: torch.stack([p.mean] * 2, -1).expand(5, *shape, 2)):
        assert near(sf.LinearControlVariate(several, expected)(draws).fx, fx[0], 1e-4)
    with pytest.raises(sf.ShapeError, match="expected_h has shape"):
        sf.LinearControlVariate(several, lambda: p.mean.unsqueeze(-1))(draws)
    with pytest.raises(sf.ShapeError, match="expected_h has shape"):
        sf.LinearControlVariate(lambda x: x, lambda: p.mean.expand(4, *shape))(draws)
