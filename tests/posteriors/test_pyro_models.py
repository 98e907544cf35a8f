"""Models that Pyro takes, and its modules, stores and guides."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI
from pyro.infer.autoguide import AutoGuideList, AutoNormal
from pyro.nn import PyroModule, PyroParam

from scorefn.posteriors import ScoreFunctionELBO
from tests.posteriors import problems
from tests.posteriors.enumeration import Problem, exact_bound, paths
from tests.posteriors.problems import coin, number, observe, parameters
from tests.posteriors.pyro_cases import DATA, EXACT, exact_enough


def test_an_empty_guide_lets_the_model_learn():
    (loc,) = parameters(())
    ScoreFunctionELBO(2, max_plate_nesting=0).loss_and_grads(lambda: observe("x", loc, 0.3), lambda: None)
    assert loc.grad.item() == pytest.approx(loc.item() - 0.3)


@pytest.mark.parametrize("num_particles", [1, 2])
def test_nothing_at_all_has_loss_zero(num_particles):
    assert ScoreFunctionELBO(num_particles, max_plate_nesting=0).loss(lambda: None, lambda: None) == 0
    assert ScoreFunctionELBO(num_particles, max_plate_nesting=0).loss_and_grads(lambda: None, lambda: None) == 0


@pytest.mark.parametrize("where", ["model", "guide"])
def test_a_name_that_is_used_twice(where):
    def twice():
        coin("z", number(0.1))
        coin("z", number(0.1))

    def once():
        coin("z", number(0.1))

    model, guide = (twice, once) if where == "model" else (once, twice)
    with pytest.raises(RuntimeError, match="Multiple sample sites named 'z'"):
        ScoreFunctionELBO(1, max_plate_nesting=0).loss(model, guide)


def test_event_dimensions_that_disagree():
    def model():
        pyro.sample("z", dist.Bernoulli(logits=torch.zeros(2)).to_event(1))

    def guide():
        with pyro.plate("data", 2):
            pyro.sample("z", dist.Bernoulli(logits=torch.zeros(2)))

    with pytest.raises(ValueError, match="event_dims disagree at site 'z'"):
        ScoreFunctionELBO(1, max_plate_nesting=1).loss(model, guide)


def test_shapes_that_disagree():
    def program(size):
        return lambda: pyro.sample("z", dist.Bernoulli(logits=torch.zeros(size)).to_event(1))

    with pytest.raises(ValueError, match="shapes disagree at site 'z'"):
        ScoreFunctionELBO(1, max_plate_nesting=0).loss(program(3), program(2))


# ------------------------------------------------------------------------------------------- modules, stores and guides


class CoinGuide(PyroModule):
    def __init__(self):
        super().__init__()
        self.probs = PyroParam(number([0.3, 0.6]), constraint=dist.constraints.unit_interval)

    def forward(self):
        with pyro.plate("data", 2):
            return pyro.sample("z", dist.Bernoulli(self.probs))


class CoinModel(PyroModule):
    def __init__(self):
        super().__init__()
        self.loc = PyroParam(number(0.5))

    def forward(self):
        with pyro.plate("data", 2):
            z = coin("z", number(0.2))
            pyro.sample("x", dist.Normal(self.loc * z, 1.0), obs=DATA)


@pytest.mark.parametrize("local", [True, False])
def test_pyro_modules_train_as_torch_modules(local):
    with pyro.settings.context(module_local_params=local):
        model, guide = CoinModel(), CoinGuide()
        elbo = ScoreFunctionELBO(4, max_plate_nesting=1)(model, guide)
        optim = torch.optim.Adam(elbo.parameters(), lr=0.05)
        losses = []
        for _ in range(300):
            optim.zero_grad()
            loss = elbo()
            loss.backward()
            optim.step()
            losses.append(loss.item())
        assert sum(losses[-100:]) < sum(losses[:100]) - 5
        posterior = torch.sigmoid(0.2 + model.loc * DATA - model.loc**2 / 2)
        assert (guide.probs - posterior).abs().max() < 0.15


def test_pyro_modules_exactly():
    model, guide = CoinModel(), CoinGuide()
    params = [guide.probs_unconstrained, model.loc_unconstrained]
    exact_enough(Problem("modules", params, model, guide, nesting=1), 2)


def test_an_automatic_guide_beside_discrete_sites():
    """AutoGuideList: pathwise for the continuous latent, score function for the coins."""

    def model():
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 2):
            z = pyro.sample("z", dist.Bernoulli(0.4))
            pyro.sample("x", dist.Normal(m + 2 * z, 1.0), obs=DATA.float())

    guide = AutoGuideList(model)
    guide.append(AutoNormal(poutine.block(model, hide=["z"])))

    def coins():
        logits = pyro.param("logits", torch.zeros(2))
        with guide[0].plates["data"]:
            return {"z": pyro.sample("z", dist.Bernoulli(logits=logits))}

    guide.append(coins)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), loss=ScoreFunctionELBO(8))
    losses = [svi.step() for _ in range(200)]
    assert sum(losses[-50:]) < sum(losses[:50])
    assert pyro.param("logits").detach()[1] > pyro.param("logits").detach()[0]


def test_masks_inside_plates_and_on_all_of_the_model():
    slopes, weight = parameters(2, ())
    mask = torch.tensor([True, False])

    def model():
        with pyro.plate("data", 2), poutine.mask(mask=mask):
            z = coin("z", number(0.3))
            pyro.sample("x", dist.Normal(weight * z, 1.0), obs=DATA)

    def guide():
        with pyro.plate("data", 2), poutine.mask(mask=mask):
            coin("z", slopes)

    for scale in (1.0, 3.0):
        scaled = poutine.scale(model, scale), poutine.scale(guide, scale)
        problem = Problem("masked", [slopes, weight], *scaled, nesting=1)
        exact_enough(problem, 2)


@pytest.mark.parametrize("num_particles", [1, 2])
def test_the_reported_loss_of_auxiliary_sites_is_the_one_that_is_descended(num_particles):
    """-log q of an auxiliary site is in value and gradient alike: the expected loss is minus the bound."""
    problem = problems.auxiliary()
    loss = ScoreFunctionELBO(num_particles, max_plate_nesting=0, baseline=None)
    expected = sum(p.detach() * value for p, value in paths(lambda: loss.loss(problem.model, problem.guide)))
    assert float(expected.detach()) == pytest.approx(-float(exact_bound(problem).detach()), abs=EXACT)
    exact_enough(problem, num_particles)
