"""Control variates: the expected gradient by enumeration, what they explain, what they refuse.

A finite problem is enumerated tuple by tuple. For a normal distribution the nodes of a Gauss-Hermite quadrature are
taken for the draws: given the other draws everything is a polynomial in the own one, so the mean over nodes is exact
although c is not a polynomial in all of them.
"""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from torch.distributions import (
    Bernoulli,
    Beta,
    Categorical,
    Gamma,
    Independent,
    Laplace,
    MultivariateNormal,
    Normal,
    OneHotCategorical,
)

import scorefn as sf
from scorefn.reducers import control_variates, cross_fitting
from tests.oracles import EXACT, VISIBLE, Layout, Setting, coordinates, gauss_hermite, near, values


def doubles(value):
    return torch.tensor(value, dtype=torch.float64)


# ------------------------------------------------------------------------------------------------ finite problems

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


# ------------------------------------------------------------------------------------------------ normals

NODES = 5


def normal_tuples(build, parameters, N, D):
    """All N-tuples of nodes of a D-dimensional normal, a problem for each; p with a problem axis in front."""
    nodes, weights = gauss_hermite(NODES)
    index = coordinates(*[NODES] * D)
    z, w = nodes[index], weights[index].prod(-1)
    choice = coordinates(*[len(z)] * N).T
    p = build(*parameters)
    with torch.no_grad():
        factor = p.scale_tril if isinstance(p, MultivariateNormal) else _base(p).scale.diag_embed()
        x = p.mean + (z @ factor.mT)
    p = p.expand((choice.shape[1], *p.batch_shape))
    p.sample = lambda shape: x[choice]
    return p, w[choice].prod(0)


def _base(p):
    return p.base_dist if isinstance(p, Independent) else p


NORMALS = {
    "Independent(Normal)": (
        ([0.7, -0.5], [-0.2, 0.3]), lambda m, s: Independent(Normal(m, s.exp()), 1), 2,
        lambda m, s: (m, (2 * s).exp().diag()),
    ),
    "Normal": (([0.7], [-0.2]), lambda m, s: Normal(m, s.exp()), 1, lambda m, s: (m, (2 * s).exp().diag())),
    "MultivariateNormal": (
        ([0.7, -0.5], [[0.9, 0.0], [0.6, 1.2]]), lambda m, L: MultivariateNormal(m, scale_tril=L.tril()), 2,
        lambda m, L: (m, L.tril() @ L.tril().mT),
    ),
}  # fmt: skip


def cubic(x):
    u = x[..., 0]
    v = x[..., -1]
    return 0.3 * u.pow(3) + u * v - 0.5 * v.square() + 2 * u


def cubic_mean(m, S):
    """E of `cubic`, by the moments of a normal."""
    u, v = m[0], m[-1]
    return 0.3 * (u.pow(3) + 3 * u * S[0, 0]) + u * v + S[0, -1] - 0.5 * (v.square() + S[-1, -1]) + 2 * u


@pytest.mark.parametrize("name", NORMALS)
@pytest.mark.parametrize("baseline", [None, sf.LeaveOneOut()])
@pytest.mark.parametrize("coefficient", [None, 0.7])
def test_delta_method_is_unbiased(name, baseline, coefficient):
    start, build, D, moments = NORMALS[name]
    for N in [1, 2] if coefficient else [4] if D == 1 else []:
        if baseline is not None and N == 1:
            continue
        parameters = [doubles(value).requires_grad_() for value in start]
        p, weight = normal_tuples(build, parameters, N, D)
        cv = sf.DeltaMethod(p, cubic, coefficient=coefficient)
        draws = sf.draw(p, cubic, N)
        assert draws.fx.ndim == 3
        assert (cv(draws).fx - draws.fx).abs().max() > VISIBLE
        expected = (weight * sf.surrogate(cv(draws), baseline=baseline).mean(0)).sum()
        truth = cubic_mean(*moments(*parameters))
        assert near(expected.detach(), truth.detach(), EXACT)
        for mine, true in zip(
            *[torch.autograd.grad(value, parameters, retain_graph=True) for value in (expected, truth)], strict=True
        ):
            assert near(mine, true, EXACT)


@pytest.mark.parametrize("name", NORMALS)
def test_delta_method_of_a_quadratic_leaves_no_variance(name):
    """With c = 1 each draw has the gradient of E f itself."""
    start, build, _, moments = NORMALS[name]
    parameters = [doubles(value).requires_grad_() for value in start]
    p = build(*parameters)
    if name == "Normal":
        p = Independent(p, 1)
    f = lambda x: x[..., 0] * x[..., -1] - 0.5 * x[..., -1].square() + 2 * x[..., 0]  # noqa: E731
    value = sf.expectation(p, f, 3, control_variate=sf.DeltaMethod(p, f, coefficient=1.0))
    m, S = moments(*parameters)
    truth = m[0] * m[-1] + S[0, -1] - 0.5 * (m[-1].square() + S[-1, -1]) + 2 * m[0]
    assert near(value.detach(), truth.detach())
    for mine, true in zip(*[torch.autograd.grad(v, parameters) for v in (value, truth)], strict=True):
        assert near(mine, true)


def test_delta_method_keeps_problems_apart():
    """A batch of problems, each with a tail of the batch: as if each were alone."""
    m, s = values((3, 2), 1).requires_grad_(), values((3, 2), 2).requires_grad_()
    p = Normal(m, s.exp())
    f = lambda x: (x[..., 0] * x[..., 1]).sin() + x[..., 0].exp()  # noqa: E731
    draws = sf.draw(p, f, 6)
    assert draws.fx.shape == (6, 3, 1)
    together = sf.DeltaMethod(p, f)(draws)
    for b in range(3):
        q = Independent(Normal(m[b], s[b].exp()), 1)
        alone = sf.Draws(draws.x[:, b], q.log_prob(draws.x[:, b]).unsqueeze(-1), draws.fx[:, b])
        assert near(sf.DeltaMethod(q, f)(alone).fx, together.fx[:, b])
    tail = MultivariateNormal(m, scale_tril=torch.diag_embed(s.exp()))  # two of its three problems are one
    g = lambda x: x.sin().prod(-1).sum(-1)  # noqa: E731
    whole = sf.draw(tail, g, 6)
    flat = Independent(Normal(m.flatten(), s.flatten().exp()), 1)
    same = sf.Draws(whole.x.flatten(1), whole.log_prob, whole.fx)
    assert near(sf.DeltaMethod(tail, g)(whole).fx, sf.DeltaMethod(flat, lambda x: g(x.unflatten(-1, (3, 2))))(same).fx)


def test_delta_method_of_a_linear_f_and_under_no_grad():
    p = Normal(torch.zeros((), requires_grad=True), 1.0)
    value = sf.expectation(p, lambda x: 3 * x, 5, control_variate=sf.DeltaMethod(p, lambda x: 3 * x, coefficient=1.0))
    assert value.detach().abs() < 1e-5
    with torch.no_grad():
        value = sf.expectation(p, lambda x: 3 * x, 5, control_variate=sf.DeltaMethod(p, lambda x: 3 * x))
    assert not value.requires_grad


def test_delta_method_lowers_the_variance_of_a_smooth_f():
    """f = log(1 + exp x) about N(.5, .5^2), 2000 estimates of 16 draws."""
    m = torch.full((2000,), 0.5, dtype=torch.float64, requires_grad=True)
    p = Normal(m, 0.5)
    f = torch.nn.functional.softplus
    spread = [
        float(torch.autograd.grad(sf.expectation(p, f, 16, control_variate=cv).sum(), m)[0].var())
        for cv in (None, sf.DeltaMethod(p, f), sf.DeltaMethod(p, f, coefficient=1.0))
    ]
    assert max(spread[1:]) < 0.01 * spread[0]


# ------------------------------------------------------------------------------------------------ past draws


def filled(measure, f, size, **options):
    cv = sf.NaturalControlVariate(measure, **options)
    p = measure() if callable(measure) else measure
    cv.update(sf.draw(p, f, size))
    return cv


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


# ------------------------------------------------------------------------------------------------ refusals


def fingerprint(cv):
    return {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in vars(cv).items()}


def refused(cv, draws, match, kind=sf.ScorefnError, use=None):
    before, parameter = fingerprint(cv), draws.log_prob.detach().clone()
    with pytest.raises(kind, match=match):
        (cv if use is None else use)(draws)
    after = fingerprint(cv)
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(value, after[name]) if isinstance(value, torch.Tensor) else value is after[name]
    assert torch.equal(parameter, draws.log_prob.detach())


def coin(N=5, batch=()):
    p = Bernoulli(logits=torch.zeros(batch, requires_grad=True))
    return p, sf.draw(p, lambda x: x + 1, N)


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
