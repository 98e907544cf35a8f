"""The situations of Pyro's own tests of gradients, valid models and downstream costs, against exact answers."""

import copy
import math
from itertools import product

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI
from pyro.infer.autoguide import AutoGuideList, AutoNormal
from pyro.nn import PyroModule, PyroParam
from pyro.poutine.messenger import Messenger

import scorefn as sf
from scorefn.posteriors import ScoreFunctionELBO
from tests.oracles import gauss_hermite
from tests.posteriors import problems
from tests.posteriors.enumeration import Problem, distance, exact_bound, exact_gradient, expected_gradient, paths
from tests.posteriors.problems import coin, number, observe, parameters

EXACT = 1e-10
DATA = number([-0.5, 2.0])


@pytest.fixture(autouse=True)
def fresh_store():
    with pyro.get_param_store().scope():
        pyro.set_rng_seed(0)
        yield


# ------------------------------------------------------------------------------ gradients: Gaussians with known answers


class Nodes(Messenger):
    """Gives site "z" of a guide mean + scale * node; the other sites are at their means."""

    def __init__(self, nodes):
        super().__init__()
        self.nodes = nodes

    def _pyro_sample(self, msg):
        if msg["done"] or msg["is_observed"] or type(msg["fn"]).__name__ == "_Subsample":
            return
        fn = msg["fn"]
        value = fn.mean + fn.variance.sqrt() * (self.nodes if msg["name"] == "z" else 0.0)
        msg["value"], msg["done"] = value if fn.has_rsample else value.detach(), True


def gaussian(reparameterised, nuisance, dim=-1):
    """z_i ~ N(0, 1), x_i ~ N(z_i, 1), with latents that have nothing to do with it, met in opposite orders."""
    loc, scale = number([0.0, 0.0]).requires_grad_(), number([1.0]).requires_grad_()

    def normal(mean, sd):
        return dist.Normal(number(mean) if isinstance(mean, float) else mean, sd).has_rsample_(reparameterised)

    def other(name, mean, sd):
        if nuisance:
            pyro.sample(name, normal(mean, sd))

    def model():
        other("first", 0.0, 1.0)
        data = pyro.plate("data", 2, dim=dim)
        with data:
            z = pyro.sample("z", normal(torch.zeros(2, dtype=torch.float64).reshape(2, *[1] * (-dim - 1)), 1.0))
        other("second", 2.0, 3.0)
        with data:
            pyro.sample("x", dist.Normal(z, number(1.0)), obs=DATA.reshape(2, *[1] * (-dim - 1)))
        other("third", 4.0, 5.0)

    def guide():
        other("third", 4.0, 5.0)
        with pyro.plate("data", 2, dim=dim):
            pyro.sample("z", normal(loc.reshape(2, *[1] * (-dim - 1)), scale))
        other("second", 2.0, 3.0)
        other("first", 0.0, 1.0)

    return Problem("gaussian", [loc, scale], model, guide, nesting=-dim)


@pytest.mark.parametrize("dim", [-1, -2])
@pytest.mark.parametrize("nuisance", [False, True])
@pytest.mark.parametrize("reparameterised", [True, False])
@pytest.mark.parametrize("num_particles", [1, 2])
def test_gaussians_by_quadrature(num_particles, reparameterised, nuisance, dim):
    """At loc 0 and scale 1 the loss has slopes -data and 1 for each scale; f is a quadratic of z."""
    problem = gaussian(reparameterised, nuisance, dim)
    loss = ScoreFunctionELBO(num_particles, max_plate_nesting=-dim, vectorize_particles=False)
    nodes, weights = gauss_hermite(5)
    total = [torch.zeros(2, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)]
    cells = list(product(range(5), repeat=2))
    for choice in product(cells, repeat=num_particles):
        given = iter([nodes[list(cell)].reshape(2, *[1] * (-dim - 1)) for cell in choice])

        def guide(given=given):
            with Nodes(next(given)):
                problem.guide()

        weight = math.prod(float(weights[i]) for cell in choice for i in cell)
        value = copy.deepcopy(loss).differentiable_loss(problem.model, guide)
        for k, part in enumerate(torch.autograd.grad(value, problem.params)):
            total[k] += weight * part
    torch.testing.assert_close(total, [number([0.5, -2.0]), number([2.0])], rtol=0, atol=1e-9)


# --------------------------------------------------------------------------------------------------------- valid models


def exact_enough(problem, num_particles=1, **options):
    options.setdefault("vectorize_particles", problem.batched)
    loss = ScoreFunctionELBO(num_particles, max_plate_nesting=problem.nesting, **options)
    assert distance(expected_gradient(problem, loss), exact_gradient(problem)) < EXACT


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


@pytest.mark.parametrize("num_particles", [1, 2])
def test_plates_that_are_loops(num_particles):
    """Sequential plates: every round is a site of its own, charged as program order says."""
    logits, weight = parameters(2, ())

    def model():
        for i in pyro.plate("loop", 2):
            observe(f"x{i}", weight * coin(f"z{i}", number(0.2)), 0.7)

    def guide():
        for i in pyro.plate("loop", 2):
            coin(f"z{i}", logits[i])

    exact_enough(Problem("loop", [logits, weight], model, guide), num_particles)


def test_loops_in_loops_in_other_orders_and_absent_from_the_guide():
    logits, weight = parameters(4, ())

    def model():
        inner = pyro.plate("inner", 2)
        for i in pyro.plate("outer", 2):
            for j in inner:
                observe(f"x{i}{j}", weight * coin(f"z{i}{j}", number(0.2)), 0.7)

    def guide():
        outer = pyro.plate("outer", 2)
        for j in pyro.plate("inner", 2):
            for i in outer:
                coin(f"z{i}{j}", logits[2 * i + j])

    def flat():
        for i, j in product((1, 0), (0, 1)):
            coin(f"z{i}{j}", logits[2 * i + j])

    exact_enough(Problem("swapped loops", [logits, weight], model, guide))
    exact_enough(Problem("no loops in the guide", [logits, weight], model, flat))


def test_a_plate_in_a_loop_and_a_loop_in_a_plate():
    logits, weight = parameters((2, 2), ())

    def in_loop(read):
        def run():
            data = pyro.plate("data", 2)
            for i in pyro.plate("loop", 2):
                with data:
                    read(i)

        return run

    def in_plate(read):
        def run():
            with pyro.plate("data", 2):
                for i in pyro.plate("loop", 2):
                    read(i)

        return run

    def read_model(i):
        z = coin(f"z{i}", number([0.2, -0.1]))
        pyro.sample(f"x{i}", dist.Normal(weight * z, 1.0), obs=DATA)

    def read_guide(i):
        coin(f"z{i}", logits[i])

    for shape in (in_loop, in_plate):
        exact_enough(Problem("mixed", [logits, weight], shape(read_model), shape(read_guide), nesting=1))


def test_a_plate_that_is_entered_again_and_plates_without_size():
    slopes, weight = parameters(2, ())

    def model():
        data = pyro.plate("data", 2)
        with data:
            z = coin("z", number(0.3))
        with data:
            y = coin("y", z - weight)
        with data:
            pyro.sample("x", dist.Normal(z + weight * y, 1.0), obs=DATA)

    def guide():
        data = pyro.plate("data", 2)
        with data:
            z = coin("z", slopes)
        with data:
            coin("y", slopes * z)

    exact_enough(Problem("entered again", [slopes, weight], model, guide, nesting=1))


def test_three_plates_at_different_depths():
    outer, weight = parameters(1, (), seed=3)

    def model():
        a = pyro.plate("a", 2, dim=-1)
        with a:
            u = coin("u", number(0.1))
        with pyro.plate("b", 1, dim=-3):
            v = coin("v", weight)
        with a, pyro.plate("c", 2, dim=-2):
            pyro.sample("x", dist.Normal(u + 0.5 * v.sum(), 1.0), obs=number([[0.1, 0.2], [0.3, 0.4]]))

    def guide():
        with pyro.plate("a", 2, dim=-1):
            coin("u", outer.expand(2))
        with pyro.plate("b", 1, dim=-3):
            coin("v", outer)

    exact_enough(Problem("three depths", [outer, weight], model, guide, nesting=3))


def test_a_wrong_size_inside_a_plate():
    def run():
        with pyro.plate("data", 3):
            coin("z", torch.zeros(2))

    with pytest.raises((ValueError, RuntimeError)):
        ScoreFunctionELBO(1, max_plate_nesting=1).loss(run, run)


@pytest.mark.parametrize("num_particles", [1, 3])
@pytest.mark.parametrize("vectorize", [True, False])
def test_particles_together_with_plates_and_events(num_particles, vectorize):
    logits = pyro.param("logits", torch.zeros(4, 3, 2))

    def model():
        with pyro.plate("outer", 3, dim=-1), pyro.plate("inner", 4, dim=-2):
            pyro.sample("z", dist.Bernoulli(0.3 * torch.ones(2)).to_event(1))

    def guide():
        with pyro.plate("outer", 3, dim=-1), pyro.plate("inner", 4, dim=-2):
            pyro.sample("z", dist.Bernoulli(logits=logits).to_event(1))

    loss = ScoreFunctionELBO(num_particles, vectorize_particles=vectorize)
    assert loss.draws(model, guide).log_prob.shape == (num_particles, 12)
    loss.loss_and_grads(model, guide)
    assert logits.unconstrained().grad.abs().sum() > 0


# ----------------------------------------------------------------------------------------------------- downstream costs


def big(nested=True, flip=False, last=True):
    """Coins before, inside and between plates, in the guide in another order than in the model; two ways back up."""
    p, q, weight = parameters(3, 3, (), seed=6)

    def model():
        a = coin("a", number(0.2))
        with pyro.plate("outer", 2, dim=-1):
            b = coin("b", a - weight)
            if nested:
                with pyro.plate("inner", 1, dim=-2):
                    c = coin("c", b + a)
                    pyro.sample("x", dist.Normal(weight * c + b, 1.0), obs=DATA)
        if last:
            d = coin("d", a + 0.1 * b.sum(-1, keepdim=b.ndim > 1))
            observe("y", weight * d, 0.4)

    def guide():
        a = coin("a", p[0])

        def outer():
            with pyro.plate("outer", 2, dim=-1):
                b = coin("b", q[0] + a)
                if nested:
                    with pyro.plate("inner", 1, dim=-2):
                        coin("c", q[1] - b)

        if last and flip:
            coin("d", p[1] + a)
        outer()
        if last and not flip:
            coin("d", p[1] + a)

    return Problem("big", [p, q, weight], model, guide, nesting=2)


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("last", [True, False])
def test_costs_downstream_of_nested_sites(nested, flip, last):
    exact_enough(big(nested, flip, last))
    exact_enough(big(nested, flip, last), 1, credit=sf.Total())


def test_diamonds_are_not_counted_twice():
    """a reaches d by b and by c."""
    (p,) = parameters(4, seed=7)

    def program(first, second):
        def run():
            a = coin("a", p[0] if second is None else number(0.1))
            b, c = coin("b", first * a), coin("c", p[1] * a - 0.2)
            coin("d", p[2] * (b + c) + p[3] * b * c)

        return run

    exact_enough(Problem("diamond", [p], program(0.7, 1), program(-0.4, None)), 1)
    exact_enough(Problem("diamond", [p], program(0.7, 1), program(-0.4, None)), 2)


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
