"""Which families are served, and how: the registry, subclasses, and the families of Pyro."""

from functools import partial

import numpy as np
import pytest
import torch
from torch.distributions import (
    Bernoulli,
    Categorical,
    Gumbel,
    HalfCauchy,
    Independent,
    MultivariateNormal,
    NegativeBinomial,
    Normal,
    OneHotCategorical,
)

import scorefn as sf
from scorefn.reducers.quantiles import uniform_shape
from scorefn.reducers.sufficient_statistics import sufficient_statistics
from tests.fisher.cases import TRIL, Walk, refused

pytestmark = pytest.mark.usefixtures("float64")


def test_a_multivariate_normal_is_taken_in_its_triangle_whatever_it_was_made_with():
    L = torch.tensor(TRIL)
    loc, covariance = torch.zeros(3), L @ L.mT
    for p in (MultivariateNormal(loc, covariance), MultivariateNormal(loc, precision_matrix=covariance.inverse())):
        fisher = sf.fisher_information(p)
        assert list(fisher.parameters) == ["loc", "scale_tril"]
        assert torch.allclose(fisher.dense(), sf.fisher_information(MultivariateNormal(loc, scale_tril=L)).dense())


def test_pyro_distributions_are_taken_as_they_are():
    dist = pytest.importorskip("pyro.distributions")
    loc, scale = torch.zeros(2, requires_grad=True), torch.tensor([1.0, 2.0])
    p = dist.Normal(loc, scale).to_event(1)
    ours = sf.natural_gradient(p, sf.draw(p, lambda x: x.sum(-1), 5))
    assert {name: value.shape for name, value in ours.items()} == {"loc": (2,), "scale": (2,)}
    assert torch.equal(
        sf.fisher_information(p).dense(), sf.fisher_information(Independent(Normal(loc, scale), 1)).dense()
    )


def test_a_count_that_requires_grad_is_refused():
    count = torch.tensor(3.5, requires_grad=True)
    for name in ("probs", "logits"):
        p = NegativeBinomial(count, **{name: torch.tensor(0.3)})
        refused(lambda p=p: sf.fisher_information(p), "total_count", "Detach", "params=")
        ours = sf.fisher_information(NegativeBinomial(count.detach(), **{name: torch.tensor(0.3)}))
        assert ours.rebuild(**ours.parameters).total_count == 3.5


def test_an_unregistered_family():
    p = HalfCauchy(torch.ones(2, requires_grad=True))
    for call in (
        lambda: sf.fisher_information(p),
        lambda: sf.fisher_information(Independent(p, 1)),
        lambda: sf.natural_gradient(p, sf.draw(p, lambda x: x, 5)),
    ):
        refused(call, "HalfCauchy", "register_fisher", "params=", "Woodbury()")
    walk = Walk(torch.zeros(3, requires_grad=True))
    refused(lambda: sf.natural_gradient(walk, sf.draw(walk, lambda x: x, 5)), "Walk", "params=")


def test_the_registry_is_open():
    @sf.register_fisher(Gumbel)
    def gumbel(p):
        matrix = p.scale.square().reciprocal()[..., None, None]
        return sf.FisherMatrix(
            parameters={"loc": p.loc}, batch_shape=p.batch_shape, rebuild=partial(Gumbel, scale=p.scale), matrix=matrix
        )

    assert callable(gumbel)
    p = Gumbel(torch.zeros(2, requires_grad=True), torch.tensor([1.0, 2.0]))
    draws = sf.draw(p, lambda x: x, 5)
    (gradient,) = torch.autograd.grad(sf.surrogate(draws).mean(0).sum(), p.loc)
    assert torch.allclose(sf.natural_gradient(p, draws)["loc"], gradient * torch.tensor([1.0, 4.0]))
    refused(lambda: sf.register_fisher(p), "class", "register_fisher")
    refused(
        lambda: sf.FisherMatrix(parameters={"loc": p.loc}, batch_shape=p.batch_shape, rebuild=Gumbel, matrix=p.scale),
        "(2,)", "(2, 1, 1)", error=sf.ShapeError,
    )  # fmt: skip


def test_a_subclass_with_other_parameters():
    class StandardScale(Normal):
        def __init__(self, loc):
            super().__init__(loc, 1.0)

    p = StandardScale(torch.zeros(2, requires_grad=True))
    refused(lambda: sf.natural_gradient(p, sf.draw(p, lambda x: x, 5)), "StandardScale", "register_fisher")


@pytest.mark.parametrize("family", [Bernoulli, Categorical, OneHotCategorical])
def test_a_probability_of_0_is_refused_whatever_the_damping(family):
    p = family(probs=torch.tensor([0.0, 0.5, 0.5]))
    fisher = sf.fisher_information(p)
    for call in (lambda: fisher.solve(fisher.parameters), lambda: fisher.solve(fisher.parameters, 1e-3), fisher.dense):
        with pytest.raises(sf.ScorefnError, match="boundary.*no damping repairs this"):
            call()


def test_a_subclass_with_another_density_does_not_inherit_a_closed_form():
    class Truncated(Normal):
        def log_prob(self, x):
            return torch.where(x > self.loc, super().log_prob(x) + np.log(2), -torch.inf)

    class Renamed(Truncated):
        pass

    class Counted(Normal):
        calls = 0

    for cls in (Truncated, Renamed):
        refused(
            lambda cls=cls: sf.fisher_information(cls(0.0, 1.0)),
            cls.__name__, "Normal", "Truncated overrides log_prob", "register_fisher",
        )  # fmt: skip
    assert sf.fisher_information(Counted(0.0, 1.0)).dense().tolist() == [[1.0, 0.0], [0.0, 2.0]]
    assert sf.fisher_information(Independent(Counted(torch.zeros(2), 1.0), 1)).dense().shape == (4, 4)


PYRO = {
    "Bernoulli": lambda d: d.Bernoulli(torch.tensor(0.3)),
    "Beta": lambda d: d.Beta(torch.tensor(2.0), 3.0),
    "Binomial": lambda d: d.Binomial(3, torch.tensor(0.3)),
    "Categorical": lambda d: d.Categorical(torch.tensor([0.3, 0.7])),
    "Cauchy": lambda d: d.Cauchy(torch.tensor(0.0), 1.0),
    "Chi2": lambda d: d.Chi2(torch.tensor(2.0)),
    "Dirichlet": lambda d: d.Dirichlet(torch.tensor([2.0, 3.0])),
    "Exponential": lambda d: d.Exponential(torch.tensor(2.0)),
    "Gamma": lambda d: d.Gamma(torch.tensor(2.0), 3.0),
    "Geometric": lambda d: d.Geometric(torch.tensor(0.3)),
    "HalfCauchy": lambda d: d.HalfCauchy(torch.tensor(1.0)),
    "HalfNormal": lambda d: d.HalfNormal(torch.tensor(1.0)),
    "Independent": lambda d: d.Independent(d.Normal(torch.zeros(2), 1.0), 1),
    "Laplace": lambda d: d.Laplace(torch.tensor(0.0), 1.0),
    "LogNormal": lambda d: d.LogNormal(torch.tensor(0.0), 1.0),
    "LowRankMultivariateNormal": lambda d: d.LowRankMultivariateNormal(torch.zeros(2), torch.ones(2, 1), torch.ones(2)),
    "MixtureSameFamily": lambda d: d.MixtureSameFamily(
        d.Categorical(torch.tensor([0.3, 0.7])), d.Normal(torch.zeros(2), 1.0)
    ),
    "MultivariateNormal": lambda d: d.MultivariateNormal(torch.zeros(2), torch.eye(2)),
    "NegativeBinomial": lambda d: d.NegativeBinomial(torch.tensor(3.0), torch.tensor(0.3)),
    "Normal": lambda d: d.Normal(torch.tensor(0.0), 1.0),
    "OneHotCategorical": lambda d: d.OneHotCategorical(torch.tensor([0.3, 0.7])),
    "OneHotCategoricalStraightThrough": lambda d: d.OneHotCategoricalStraightThrough(torch.tensor([0.3, 0.7])),
    "Poisson": lambda d: d.Poisson(torch.tensor(2.0)),
    "Uniform": lambda d: d.Uniform(torch.tensor(0.0), 1.0),
}


@pytest.mark.parametrize("name", PYRO)
def test_each_family_of_pyro_is_served_as_that_of_torch(name):
    """Some of Pyro's classes override sample or log_prob, for speed or for masks; none of these is another family."""
    pyro_distributions = pytest.importorskip("pyro.distributions")
    ours, theirs = PYRO[name](pyro_distributions), PYRO[name](torch.distributions)
    for question in (
        lambda p: sf.fisher_information(p).dense(),
        lambda p: sf.quantile(p, torch.full((5, *uniform_shape(p)), 0.3, dtype=torch.float64)),
        lambda p: sufficient_statistics(p, p.sample((2,)).fill_(1))[1],
    ):
        try:
            answer = question(theirs)
        except sf.ScorefnError:  # not served, whoever made it
            continue
        assert torch.equal(question(ours), answer)
