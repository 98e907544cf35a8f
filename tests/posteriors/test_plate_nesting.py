"""A max_plate_nesting that is too small: Pyro's own words, and a note that names the number."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from scorefn.posteriors import VIMCO, ScoreFunctionELBO, diagnose

DATA = torch.tensor([1.9, 2.6, 1.2, 2.3, 0.4, 3.1, 1.0, 2.2])


def model():
    z = pyro.sample("z", dist.NegativeBinomial(5.0, probs=0.4))
    with pyro.plate("data", 8):
        pyro.sample("x", dist.Normal(0.5 * z, 1.0), obs=DATA)


def guide():
    pyro.sample("z", dist.Poisson(pyro.param("rate", torch.tensor(3.0))))


def two_deep():
    with pyro.plate("rows", 2), pyro.plate("columns", 8):
        z = pyro.sample("z", dist.Poisson(3.0))
        pyro.sample("x", dist.Normal(0.5 * z, 1.0), obs=torch.zeros(8, 2))


def two_deep_guide():
    with pyro.plate("rows", 2), pyro.plate("columns", 8):
        pyro.sample("z", dist.Poisson(pyro.param("rate", torch.ones(8, 2))))


@pytest.fixture(autouse=True)
def fresh():
    pyro.clear_param_store()


@pytest.mark.parametrize("family", [ScoreFunctionELBO, VIMCO])
def test_the_number_is_named(family):
    loss = family(4, max_plate_nesting=0)
    with pytest.raises(ValueError, match="log_prob at site 'x'") as caught:
        loss.loss(model, guide)
    assert "Value is not broadcastable with batch_shape+event_shape: torch.Size([8]) vs" in str(caught.value)
    assert caught.value.__notes__ == [
        f"max_plate_nesting=0 was given to {family.__name__}, but plates lie 1 deep in model or guide, so that the "
        "plate of the 4 particles met one of them: set max_plate_nesting=1, or leave it out."
    ]
    assert isinstance(family(4, max_plate_nesting=1).loss(model, guide), float)


def test_of_two_plates():
    with pytest.raises(ValueError, match="Shape mismatch inside plate") as caught:
        ScoreFunctionELBO(4, max_plate_nesting=1).loss(two_deep, two_deep_guide)
    assert "set max_plate_nesting=2" in caught.value.__notes__[-1]
    loss = ScoreFunctionELBO(4)
    loss.loss(two_deep, two_deep_guide)
    assert loss.max_plate_nesting == 3  # with that of the particles, as the docstring says


def test_diagnose_says_so_too():
    with pytest.raises(ValueError, match="log_prob at site 'x'") as caught:
        diagnose(ScoreFunctionELBO(4, max_plate_nesting=0), model, guide, repeats=2)
    assert any("set max_plate_nesting=1" in note for note in caught.value.__notes__)


def test_other_failures_have_no_such_note():
    def wrong():
        z = pyro.sample("z", dist.Poisson(3.0))
        pyro.sample("x", dist.Normal(z, -1.0), obs=torch.tensor(0.0))

    for loss in (ScoreFunctionELBO(4, max_plate_nesting=0), ScoreFunctionELBO(4)):
        with pytest.raises(ValueError, match="scale") as caught:
            loss.loss(wrong, guide)
        assert not any("max_plate_nesting" in note for note in getattr(caught.value, "__notes__", []))


def test_one_particle_has_pyros_own_advice():
    with pytest.raises(ValueError, match="Try increasing max_plate_nesting to at least 1"):
        ScoreFunctionELBO(1, max_plate_nesting=0).loss(model, guide)
