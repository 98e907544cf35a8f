"""Counts without a largest value, refused in the user's words by what needs a finite support."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import Geometric, Independent, Normal, Poisson

import scorefn as sf
from scorefn.estimators.finite import is_count, named
from scorefn.posteriors import ScoreFunctionELBO

ADVICE = "A count has no largest value: use the score function.*Categorical over 0 .. K"
ESTIMATORS = [sf.DisARM(2), sf.ARMS(4), sf.UnorderedSet(4), sf.SumAndSample(4), sf.LocalExpectation(4)]


def model():
    with pyro.plate("data", 3):
        z = pyro.sample("z", dist.Poisson(3.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.ones(3))


def guide():
    with pyro.plate("data", 3):
        pyro.sample("z", dist.Poisson(pyro.param("rate", torch.ones(3))))


def test_the_distribution_is_named_as_it_was_written():
    rate = torch.ones(2, 3)
    assert named(Poisson(rate)) == named(Independent(Poisson(rate), 0)) == "Poisson"
    assert named(Independent(Independent(Poisson(rate), 0), 1)) == "Independent of Poisson"
    assert named(object()) == "object"


def test_what_is_a_count():
    one = torch.tensor(1.0)
    assert is_count(Poisson(one))
    assert is_count(Geometric(0.5 * one))
    assert is_count(dist.NegativeBinomial(5.0, probs=0.4))
    assert not is_count(torch.distributions.Binomial(3, 0.5 * one))
    assert not is_count(Normal(0.0, 1.0))
    assert not is_count(torch.distributions.Distribution(validate_args=False))
    assert not is_count(object())


def test_enumeration_names_and_advises():
    with pytest.raises(sf.ScorefnError, match=f"^Poisson cannot be enumerated: its support is not finite. {ADVICE}"):
        sf.Enumerate().sample(Poisson(torch.ones(())))
    with pytest.raises(sf.ScorefnError, match="^Independent of Poisson cannot be enumerated"):
        sf.Enumerate().sample(Independent(Poisson(torch.ones(2)), 1))
    with pytest.raises(sf.ScorefnError, match="^Normal cannot be enumerated.*Use a smaller instance"):
        sf.Enumerate().sample(Normal(0.0, 1.0))


@pytest.mark.parametrize("estimator", [sf.Enumerate(), *ESTIMATORS], ids=lambda estimator: type(estimator).__name__)
def test_a_site_in_a_plate(estimator):
    pyro.clear_param_store()
    loss = ScoreFunctionELBO(4, max_plate_nesting=1, estimators={"z": estimator})
    says = (
        "Poisson cannot be enumerated" if isinstance(estimator, sf.Enumerate) else "does not serve Poisson: it serves"
    )
    with pytest.raises(sf.ScorefnError, match=f'"z" has an estimator; without one, it has the score.*{says}.*{ADVICE}'):
        loss.loss(model, guide)
