"""Sites with finitely many values: points and numbers of values are one, whatever the family."""

import pytest
import torch
from torch.distributions import Bernoulli, Categorical, Independent, Normal, OneHotCategorical

import scorefn as sf
from scorefn.estimators.finite import indices, log_probs, points, unwrapped

LOGITS = torch.tensor([[0.3, -1.0, 2.0], [0.0, 0.5, -4.0]])
FAMILIES = {
    "bernoulli": (Bernoulli(logits=LOGITS), 2, (2, 3)),
    "categorical": (Categorical(logits=LOGITS), 3, (2,)),
    "one-hot": (OneHotCategorical(logits=LOGITS), 3, (2,)),
}


@pytest.mark.parametrize(("p", "values", "sites"), FAMILIES.values(), ids=FAMILIES)
def test_points_and_numbers_of_values(p, values, sites):
    unit = unwrapped(Independent(p, 1), "DisARM")
    assert unit is p
    x = p.sample(torch.Size((50,)))
    index = indices(unit, x)
    assert index.shape == (50, *sites)
    again = points(unit, index)
    assert torch.equal(again, x)
    assert again.dtype == x.dtype
    table = log_probs(unit)
    assert table.shape == (*sites, values)
    torch.testing.assert_close(table.exp().sum(-1), torch.ones(sites))
    found = table.expand(50, *table.shape).gather(-1, index.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(found, p.log_prob(x))


class Shifted(Bernoulli):
    """Samples another way than its family."""

    def sample(self, sample_shape=()):
        return 1 - super().sample(sample_shape)


@pytest.mark.parametrize(
    ("p", "name"),
    [
        (Normal(0.0, 1.0), "Normal"),
        (Independent(Normal(torch.zeros(2), 1.0), 1), "Independent of Normal"),
        (Shifted(logits=LOGITS), "Shifted"),
    ],
    ids=["normal", "independent", "overridden"],
)
def test_another_family_is_refused_by_name(p, name):
    with pytest.raises(sf.ScorefnError, match=f"DisARM does not serve {name}: it serves Bernoulli, Categorical"):
        unwrapped(p, "DisARM")
