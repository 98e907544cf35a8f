"""The delta method: the expected gradient by quadrature.

For a normal distribution the nodes of a Gauss-Hermite quadrature are taken for the draws: given the other draws
everything is a polynomial in the own one, so the mean over nodes is exact although c is no polynomial in all of them.
"""

import pytest
import torch
from torch.distributions import Independent, MultivariateNormal, Normal

import scorefn as sf
from tests.oracles.quadrature import gauss_hermite
from tests.oracles.tolerances import EXACT, VISIBLE, near
from tests.oracles.toys import coordinates, values
from tests.reducers.doubles import doubles

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
