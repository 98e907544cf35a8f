"""Sufficient statistics: their expectations, and the natural gradients that are their coefficients.

The truth is a finite sum: a support that is enumerated, nodes of Gauss-Hermite, or the trapezoid rule on a whole line,
whose error is below rounding.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.distributions import (
    Bernoulli,
    Beta,
    Categorical,
    Chi2,
    Exponential,
    Gamma,
    HalfNormal,
    Independent,
    MultivariateNormal,
    Normal,
    OneHotCategorical,
    Poisson,
)

import scorefn as sf
from scorefn.reducers.sufficient_statistics import families, register_statistics, sufficient_statistics
from tests.oracles.quadrature import gauss_hermite
from tests.oracles.tolerances import EXACT, VISIBLE, near
from tests.oracles.toys import coordinates

pytestmark = pytest.mark.usefixtures("float64")


def finite(support):
    return lambda p: (support, p.log_prob(support).exp())


def normal_nodes(p):
    node, weight = gauss_hermite(8)
    return p.loc + p.scale * node, weight


def plane_nodes(p):
    node, weight = gauss_hermite(8)
    index = coordinates(8, 8)
    return p.loc + node[index] @ p.scale_tril.mT, weight[index].prod(-1)


def positive(p):
    u = torch.arange(-90.0, 8.0, 0.2)
    return u.exp(), (p.log_prob(u.exp()) + u).exp() * 0.2


def unit_interval(p):
    u = torch.arange(-60.0, 30.0, 0.2)
    return u.sigmoid(), p.log_prob(u.sigmoid()).exp() * u.sigmoid() * (-u).sigmoid() * 0.2


@dataclass(frozen=True)
class Case:
    """A family with its parameters, nodes `x [M, *event]` with probabilities, and an f in its sufficient statistics."""

    name: str
    make: Callable
    values: dict
    nodes: Callable
    f: Callable[[Tensor], Tensor]
    rough: bool = False  # torch's trigamma, in the gradient of a digamma, has nine digits

    @property
    def parameters(self) -> dict[str, Tensor]:
        return {name: torch.tensor(value) for name, value in self.values.items()}

    @property
    def tolerance(self) -> float:
        return 2e-8 if self.rough else EXACT


CASES = [
    Case("Bernoulli", Bernoulli, {"logits": 0.4}, finite(torch.tensor([0.0, 1.0]).double()), lambda x: 3 * x + 1),
    Case(
        "Categorical", Categorical, {"logits": [0.4, -1.0, 0.3]}, finite(torch.arange(3)),
        lambda x: torch.tensor([1.0, 2.5, -2.0])[x],
    ),
    Case(
        "OneHotCategorical", OneHotCategorical, {"logits": [0.4, -1.0, 0.3]},
        finite(torch.eye(3, dtype=torch.float64)), lambda x: x @ torch.tensor([1.0, 2.5, -2.0]),
    ),
    Case("Normal", Normal, {"loc": 0.7, "scale": 1.3}, normal_nodes, lambda x: 3 * x - 2 * x.square() + 1),
    Case(
        "MultivariateNormal", MultivariateNormal, {"loc": [0.7, -0.5], "scale_tril": [[0.9, 0.0], [0.6, 1.2]]},
        plane_nodes, lambda x: 3 * x[..., 0] - 2 * x[..., 0] * x[..., 1] + 0.5 * x[..., 1].square() - x[..., 1],
    ),
    Case("Poisson", Poisson, {"rate": 2.3}, finite(torch.arange(60.0, dtype=torch.float64)), lambda x: 3 * x + 1),
    Case("Exponential", Exponential, {"rate": 1.8}, positive, lambda x: 3 * x + 1),
    Case(
        "Gamma", Gamma, {"concentration": 1.7, "rate": 1.4}, positive, lambda x: 3 * x - 2 * x.log() + 1, rough=True
    ),
    Case("Chi2", Chi2, {"df": 2.7}, positive, lambda x: 3 * x - 2 * x.log() + 1, rough=True),
    Case(
        "Beta", Beta, {"concentration1": 1.3, "concentration0": 2.5}, unit_interval,
        lambda x: 3 * x.log() + 2 * (1 - x).log(), rough=True,
    ),
]  # fmt: skip
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def leaves_of(case):
    return {name: value.requires_grad_() for name, value in case.parameters.items()}


def gradient_of(value, leaves, **options):
    """Of a scalar, flat; only the lower triangle of a Cholesky factor can change."""
    options = {"retain_graph": True, "materialize_grads": True, **options}
    parts = torch.autograd.grad(value, list(leaves.values()), **options)
    return torch.cat([
        part[torch.ones_like(part).tril().bool()] if name == "scale_tril" else part.flatten()
        for name, part in zip(leaves, parts, strict=True)
    ])  # fmt: skip


def test_every_family_is_tested():
    ours = {family.__name__ for family in families() if family.__module__.startswith("torch.")}
    assert ours <= {case.name for case in CASES}


@each_case
def test_the_expectation_is_that_of_the_quadrature_and_so_is_its_gradient(case):
    """E T = sum w T and grad E T = sum w T score, T being held."""
    leaves = leaves_of(case)
    p = case.make(**leaves)
    x, weight = case.nodes(case.make(**case.parameters))
    assert abs(weight.sum() - 1) < 1e-12
    t, expected = sufficient_statistics(p, x)
    assert near((weight.unsqueeze(-1) * t).sum(0), expected.detach(), 1e-11)
    score = (weight.unsqueeze(-1) * t.detach() * p.log_prob(x).unsqueeze(-1)).sum(0)
    for entry, derivative in zip(expected, score, strict=True):
        assert near(gradient_of(entry, leaves), gradient_of(derivative, leaves), case.tolerance)


@each_case
def test_the_second_derivatives_of_the_expectation(case):
    """Where `dice` reads them: of sum w T p'/p, T and p being held."""
    leaves = leaves_of(case)
    p = case.make(**leaves)
    x, weight = case.nodes(case.make(**case.parameters))
    t, expected = sufficient_statistics(p, x)
    ratio = (p.log_prob(x) - p.log_prob(x).detach()).exp()
    for ours, truth in zip(expected, (weight.unsqueeze(-1) * t.detach() * ratio.unsqueeze(-1)).sum(0), strict=True):
        pair = [gradient_of(value, leaves, create_graph=True) for value in (ours, truth)]
        for rows in zip(*pair, strict=True):
            own, true = (gradient_of(row, leaves) if row.requires_grad else torch.zeros(len(pair[0])) for row in rows)
            assert near(own, true, 1e-7 if case.rough else 1e-9)


@each_case
def test_the_statistics_do_not_move_with_the_parameters(case):
    """Their origin and units are held: otherwise c grad E T would not be what c T has lost."""
    x, _ = case.nodes(case.make(**case.parameters))
    assert not sufficient_statistics(case.make(**leaves_of(case)), x)[0].requires_grad


@pytest.mark.parametrize("name", ["Normal", "MultivariateNormal", "Gamma", "Beta"])
def test_they_are_uncorrelated_at_the_present_parameters(name):
    """So that damping one by one shrinks each coefficient by the same part, whatever the shape of the family."""
    case = next(case for case in CASES if case.name == name)
    p = case.make(**case.parameters)
    x, weight = case.nodes(p)
    t, expected = sufficient_statistics(p, x)
    covariance = (t - expected).mT @ (weight.unsqueeze(-1) * (t - expected))
    size = covariance.diagonal().sqrt()
    assert near(covariance / size / size.unsqueeze(-1), torch.eye(len(size)), case.tolerance)


def filled(p, f, size, **options):
    cv = sf.NaturalControlVariate(p, **options)
    cv.update(sf.draw(p, f, size))
    return cv


@pytest.mark.parametrize("case", [c for c in CASES if "ategorical" not in c.name], ids=lambda case: case.name)
def test_the_coefficient_is_the_natural_gradient_of_what_is_linear_in_them(case):
    """A step of the natural gradient moves the natural parameters of T by ``Cov(T)^-1 dE T F^-1 grad E f``: beta."""
    torch.manual_seed(0)
    leaves = leaves_of(case)
    p = case.make(**leaves)
    x, weight = case.nodes(case.make(**case.parameters))
    beta, r_squared = filled(p, case.f, 40, ridge=1e-12).fit()
    gradient = gradient_of((weight * case.f(x) * p.log_prob(x)).sum(), leaves)
    t, expected = sufficient_statistics(p, x)
    jacobian = torch.stack([gradient_of(entry, leaves) for entry in expected])
    covariance = (t - expected).mT @ (weight.unsqueeze(-1) * (t - expected)).detach()
    assert near(jacobian.mT @ beta, gradient, 1e-7)
    if case.name != "Chi2":  # one parameter, in the statistics of a Gamma
        step = torch.linalg.solve(sf.fisher_information(p).dense(), gradient)
        assert near(beta, torch.linalg.solve(covariance.detach(), jacobian @ step), 1e-7)
    assert r_squared > 1 - 1e-9


@each_case
def test_what_is_linear_in_them_has_no_variance_left(case):
    """With leave-one-out, two draws have the gradient of E f itself."""
    torch.manual_seed(0)
    leaves = leaves_of(case)
    p = case.make(**leaves)
    x, weight = case.nodes(case.make(**case.parameters))
    cv = filled(p, case.f, 40, ridge=1e-9)
    draws = sf.draw(p, case.f, 2)
    assert near(cv(draws).fx.detach(), (weight * case.f(x)).sum().expand(2, 1), 1e-6)
    value = sf.surrogate(cv(draws), baseline=sf.LeaveOneOut()).mean()
    truth = gradient_of((weight * case.f(x) * p.log_prob(x)).sum(), leaves)
    assert near(gradient_of(value, leaves), truth, 1e-6)


@each_case
@pytest.mark.parametrize("baseline", [None, sf.Constant(0.7)])
def test_it_is_unbiased_whatever_the_past(case, baseline):
    """Each node is a draw of a problem of its own; the past belongs to other parameters, and f is not linear in T."""
    torch.manual_seed(1)
    x, weight = case.nodes(case.make(**case.parameters))
    leaves = leaves_of(case)
    many = case.make(**{name: value.expand(len(x), *value.shape) for name, value in leaves.items()})
    f = lambda x: case.f(x) + 0.3 * case.f(x).sin()  # noqa: E731
    past = case.make(**{name: 0.8 * value for name, value in case.parameters.items()}).sample((20,))
    past = past.unsqueeze(1).expand(20, len(x), *x.shape[1:])
    cv = sf.NaturalControlVariate(many, gate=0.0)
    cv.update(sf.Draws(past, many.log_prob(past).unsqueeze(-1), f(past).unsqueeze(-1)))
    x = x.unsqueeze(0)
    draws = sf.Draws(x, many.log_prob(x).unsqueeze(-1), f(x).unsqueeze(-1))
    assert (cv(draws).fx - draws.fx).abs().max() > VISIBLE
    expected = (weight * sf.surrogate(cv(draws), baseline=baseline).mean(0)).sum()
    p = case.make(**leaves)
    truth = (weight * f(x).squeeze(0) * p.log_prob(x.squeeze(0))).sum()
    assert near(expected.detach(), (weight * f(x)).sum(), 1e-9)
    assert near(gradient_of(expected, leaves), gradient_of(truth, leaves), 10 * case.tolerance)


@each_case
def test_problems_and_coordinates_are_kept_apart(case):
    """Six of them in a batch: as problems, or as the coordinates of one or of two problems."""
    scale = 1 + 0.05 * torch.arange(6.0).reshape(2, 3)
    each = {name: value * scale.reshape(2, 3, *[1] * value.ndim) for name, value in case.parameters.items()}
    p = case.make(**each)
    x = p.sample((4,))
    t, expected = sufficient_statistics(p, x)
    for index in coordinates(2, 3).tolist():
        place = tuple(index)
        single = case.make(**{name: value[place] for name, value in each.items()})
        own_t, own_expected = sufficient_statistics(single, x[:, place[0], place[1]])
        assert near(t[:, place[0], place[1]], own_t)
        assert near(expected[place], own_expected)
    width = t.shape[-1]
    for joined, shape in ((0, (2, 3, width)), (1, (2, 3 * width)), (2, (6 * width,))):
        q = Independent(p, joined)
        fx = torch.randn(60, *q.batch_shape)
        draws = sf.Draws(y := q.sample((60,)), q.log_prob(y).unsqueeze(-1).requires_grad_(), fx.unsqueeze(-1))
        cv = sf.NaturalControlVariate(q)
        cv.update(draws)
        assert cv.fit()[0].shape == shape


def test_the_fit_keeps_what_a_concentrated_gamma_or_beta_nearly_repeats():
    """log x and x are correlated to 0.9998 there, and a plain basis would lose nearly all of their difference."""
    torch.manual_seed(0)
    for p, f in (
        (Gamma(torch.tensor(2000.0, requires_grad=True), 2000.0), lambda x: x.log() - x),
        (Beta(torch.tensor(900.0, requires_grad=True), 600.0), lambda x: 900 * x.log() + 600 * (1 - x).log()),
    ):
        cv = filled(p, f, 400)
        draws = sf.draw(p, f, 400)
        assert cv(draws).fx.detach().var() < 1e-4 * draws.fx.var()


def test_the_registry_is_open():
    class OneSided(HalfNormal):
        """T = x^2, of which the expectation is scale^2."""

    @register_statistics(OneSided)
    def one_sided(p: OneSided, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.square().unsqueeze(-1), p.scale.square().unsqueeze(-1)

    assert callable(one_sided)
    scale = torch.tensor(1.3, requires_grad=True)
    f = lambda x: 3 * x.square() + 1  # noqa: E731
    cv = filled(OneSided(scale), f, 9, ridge=1e-12)
    assert near(cv.fit()[0], torch.tensor([3.0]), 1e-9)
    value = sf.expectation(OneSided(scale), f, 2, control_variate=cv)
    assert near(torch.autograd.grad(value, scale)[0], 6 * scale.detach(), 1e-8)
    with pytest.raises(sf.ScorefnError, match="HalfNormal.*register_statistics"):
        sufficient_statistics(HalfNormal(1.0), torch.ones(2))


def test_a_subclass_with_another_density_has_no_statistics_of_its_parent():
    class Truncated(Normal):
        def log_prob(self, x):
            return super().log_prob(x) + 0.7

    p = Truncated(torch.zeros(2, requires_grad=True), 1.0)
    draws = sf.draw(p, lambda x: x, 9)
    with pytest.raises(sf.ScorefnError, match=r"Truncated overrides log_prob.*register_statistics"):
        sf.NaturalControlVariate(p)(draws)
    with pytest.raises(sf.ScorefnError, match=r"Truncated overrides log_prob.*LinearControlVariate"):
        sf.DeltaMethod(p, lambda x: x)


def test_a_rule_belongs_to_a_class():
    with pytest.raises(sf.ScorefnError, match=r"register_statistics.*class itself"):
        sf.register_statistics(Normal(0.0, 1.0))


@pytest.mark.parametrize("measure", [3, Normal])
def test_a_measure_that_is_none_is_refused(measure):
    with pytest.raises(sf.ScorefnError, match=r"measure is (3|the class Normal).*callable of nothing"):
        sf.NaturalControlVariate(measure)
