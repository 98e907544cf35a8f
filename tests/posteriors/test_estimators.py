"""Sites with an estimator in ScoreFunctionELBO: exact by enumeration of the estimator's own randomness."""

import copy
import itertools
import math
import re

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO
from pyro.poutine.runtime import _PYRO_STACK
from torch.nn.functional import one_hot

import scorefn as sf
from scorefn.core import ScorefnError
from scorefn.estimators import antithetic
from scorefn.estimators.estimator import Estimator
from scorefn.posteriors import VIMCO, ScoreFunctionELBO, diagnose, joint_sites
from scorefn.posteriors.hints import AVERAGE
from tests.posteriors.enumeration import (
    Problem,
    Script,
    distance,
    exact_bound,
    exact_gradient,
    expected_gradient,
    paths,
)
from tests.posteriors.problems import coin, number, observe, parameters

EXACT = 1e-10


@pytest.fixture(autouse=True)
def fresh_store():
    with pyro.get_param_store().scope():
        pyro.set_rng_seed(0)
        yield


def chosen(probabilities):
    """Which of several things happens: each of them in turn, where a script runs the program."""
    if (script := next((h for h in _PYRO_STACK if isinstance(h, Script)), None)) is None:
        return int(torch.multinomial(probabilities, 1))
    digit = script.given[len(script.digits)] if len(script.digits) < len(script.given) else 0
    script.digits.append(digit)
    script.bases.append(len(probabilities))
    script.log_prob = script.log_prob + probabilities[digit].detach().log()
    return digit


def all_orders(shape, device):
    """In place of ``random_order``: every order of each column, in turn."""
    orders = list(itertools.permutations(range(shape[0])))
    uniform = torch.full((len(orders),), 1 / len(orders), dtype=torch.float64)
    columns = [orders[chosen(uniform)] for _ in range(math.prod(shape[1:]))]
    return torch.tensor(columns).T.reshape(shape)


@pytest.fixture
def orders(monkeypatch):
    monkeypatch.setattr(joint_sites, "random_order", all_orders)


def base(p):
    while isinstance(p, torch.distributions.Independent):
        p = p.base_dist
    return p


class Mirror(Estimator):
    """One antithetic pair of coins u < p and 1 - u < p, by DisARM's formula: every draw is a draw of p."""

    evaluations = 2

    def sample(self, p):
        pairs = []
        for one in base(p).probs.detach().flatten():
            both, unequal = (2 * one - 1).clamp(min=0), torch.minimum(one, 1 - one)
            neither = (1 - 2 * one).clamp(min=0)
            pairs.append(((0, 0), (1, 1), (0, 1), (1, 0))[chosen(torch.stack([neither, both, unequal, unequal]))])
        return number(pairs).T.reshape(2, *base(p).probs.shape)

    def surrogate(self, p, x, fx):
        logits = base(p).logits
        sign = (x[0] - x[1]) * logits.detach().abs().sigmoid() / 2
        fx = fx.reshape(fx.shape + (1,) * (x.ndim - fx.ndim))
        score = (fx[0] - fx[1]) * sign * (logits - logits.detach())
        return fx.mean(0).reshape(p.batch_shape) + score.reshape(*p.batch_shape, -1).sum(-1)


class TopAndRest(Estimator):
    """The most probable value, always, and a draw of the others: two draws that are not alike, of unequal weight."""

    evaluations = 2

    def _parts(self, p):
        logits = base(p).logits
        top = one_hot(logits.argmax(-1), logits.shape[-1]).bool()
        return top, logits.log_softmax(-1)

    def sample(self, p):
        top, log_p = self._parts(p)
        rest = torch.where(top, 0.0, log_p.detach().exp()).reshape(-1, top.shape[-1])
        drawn = torch.tensor([chosen(row / row.sum()) for row in rest]).reshape(top.shape[:-1])
        return torch.stack([log_p.argmax(-1), drawn])

    def weights(self, p, x):
        first = self._parts(p)[1].detach().exp().amax(-1)
        return torch.stack([first, 1 - first])

    def surrogate(self, p, x, fx):
        _, log_p = self._parts(p)
        first, drawn = log_p.gather(-1, x.movedim(0, -1)).unbind(-1)
        other = 1 - first.exp()
        within = drawn - other.log()  # of the draw, given that it is none of the most probable
        return first.exp() * fx[0] + other * (fx[1].detach() * (within - within.detach()) + fx[1])


# ----------------------------------------------------------------------------------------------------- the programs


def plate_then_global(estimator):
    """Coins in a plate with parameters of their own; then a coin that depends on all of them."""
    slopes, top, weight = parameters(2, (), ())
    data = number([0.3, -1.0])

    def model():
        with pyro.plate("data", 2):
            z = coin("z", weight)
            pyro.sample("x", dist.Normal(z * weight, 1.0), obs=data)
        s = coin("s", z.sum(-1, keepdim=True) - 1)
        with pyro.plate("late", 2):
            pyro.sample("y", dist.Normal(s - weight * s * z, 1.0), obs=data)

    def guide():
        with pyro.plate("data", 2):
            z = coin("z", slopes, infer={"estimator": estimator})
        coin("s", top + slopes.sum() * z.sum(-1, keepdim=True))

    return Problem("plate, then global", [slopes, top, weight], model, guide, nesting=1)


def global_then_plate(estimator):
    """A coin that everything depends on; a coin before it, on which it does not depend."""
    first, top, slopes, weight = parameters((), (), 2, (), seed=3)
    data = number([0.3, -1.0])

    def model():
        a = coin("a", number(0.4))
        g = coin("g", a - weight)
        with pyro.plate("data", 2):
            z = coin("z", weight * g - 0.2)
            pyro.sample("x", dist.Normal(z + a + weight * g, 1.0), obs=data)

    def guide():
        coin("a", first)
        g = coin("g", top, infer={"estimator": estimator})
        with pyro.plate("data", 2):
            coin("z", slopes + g)

    return Problem("global, then plate", [first, top, slopes, weight], model, guide, nesting=1)


def two(estimator):
    """Two sites that do not know each other, both with estimators; their values meet."""
    left, right, weight = parameters((), (), (), seed=4)

    def model():
        a, b = coin("a", number(0.4)), coin("b", weight)
        c = coin("c", a - b)
        observe("x", weight * a * b + b - c, 0.7)

    def guide():
        coin("a", left, infer={"estimator": estimator})
        coin("b", right - left, infer={"estimator": estimator})
        coin("c", left)

    return Problem("two", [left, right, weight], model, guide)


def categories(estimator):
    """Three values in a subsampled plate; a categorical outside of it depends on the plate."""
    table, top, weight = parameters((4, 3), 2, 3, seed=5)
    index, data = torch.tensor([1, 3]), number([0.3, -1.0, 1.4, 0.2])

    def model():
        with pyro.plate("data", 4, subsample=index):
            z = pyro.sample("z", dist.Categorical(logits=weight))
            pyro.sample("x", dist.Normal(weight[z.long()], 1.0), obs=data[index])

    def guide():
        with pyro.plate("data", 4, subsample=index):
            z = pyro.sample("z", dist.Categorical(logits=table[index]), infer={"estimator": estimator})
        s = (z == 1).double().sum(-1, keepdim=True)
        coin("s", top[0] + top[1] * s, infer={"is_auxiliary": True})

    return Problem("categories", [table, top, weight], model, guide, nesting=1)


def meeting(estimator):
    """One factor reads all elements of a plate."""
    table, weight = parameters((2, 3), 3, seed=6)

    def model():
        with pyro.plate("data", 2):
            z = pyro.sample("z", dist.Categorical(logits=weight))
        observe("x", weight[z.long()].sum(-1, keepdim=True).square(), 0.7)

    def guide():
        with pyro.plate("data", 2):
            pyro.sample("z", dist.Categorical(logits=table), infer={"estimator": estimator})

    return Problem("elements that meet", [table, weight], model, guide, nesting=1)


def events(estimator):
    """Two coins that are one joint decision in each row of nested plates, one of which is only the outer one's."""
    table, weight = parameters((2, 1, 2), (), seed=7)
    data = number([[0.3, -1.0]])

    def model():
        with pyro.plate("outer", 2, dim=-1), pyro.plate("rows", 1, dim=-2):
            z = pyro.sample("z", dist.Bernoulli(logits=weight).expand([2]).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1) * weight + z[..., 0], 1.0), obs=data)

    def guide():
        with pyro.plate("outer", 2, dim=-1), pyro.plate("rows", 1, dim=-2):
            logits = table.permute(1, 0, 2)
            pyro.sample("z", dist.Bernoulli(logits=logits).to_event(1), infer={"estimator": estimator})

    return Problem("events", [table, weight], model, guide, nesting=2)


def masked(estimator):
    """A masked element costs nothing itself; a scale counts the other twice."""
    slopes, weight = parameters(2, (), seed=8)
    mask = torch.tensor([True, False])

    def model():
        with pyro.plate("data", 2), poutine.scale(scale=2.0):
            with poutine.mask(mask=mask):
                z = coin("z", number(0.4))
            pyro.sample("x", dist.Normal(weight * z, 1.0), obs=number([0.3, 1.4]))

    def guide():
        with pyro.plate("data", 2), poutine.mask(mask=mask), poutine.scale(scale=2.0):
            coin("z", slopes, infer={"estimator": estimator})

    return Problem("masked and scaled", [slopes, weight], model, guide, nesting=1)


COINS = [plate_then_global, global_then_plate, two, events, masked]
EVERY = [
    *itertools.product(COINS, [Mirror()]),
    *itertools.product([plate_then_global, global_then_plate, two, masked], [sf.Enumerate()]),
    *itertools.product([categories, meeting], [TopAndRest()]),
]


def named(value):
    return getattr(value, "__name__", type(value).__name__)


def error(problem, loss):
    """How far the expected gradient is from the exact one."""
    return distance(expected_gradient(problem, loss), exact_gradient(problem))


@pytest.mark.parametrize(("make", "estimator"), EVERY, ids=named)
def test_the_expected_gradient_is_exact(make, estimator, orders):
    problem = make(estimator)
    assert error(problem, ScoreFunctionELBO(2, max_plate_nesting=problem.nesting)) < EXACT


@pytest.mark.parametrize(("make", "estimator"), EVERY, ids=named)
def test_the_expected_bound_is_exact(make, estimator, orders):
    problem = make(estimator)
    loss = ScoreFunctionELBO(2, max_plate_nesting=problem.nesting)
    found = sum(
        probability.detach() * value for probability, value in paths(lambda: -loss.loss(problem.model, problem.guide))
    )
    assert abs(found - exact_bound(problem)) < EXACT


@pytest.mark.parametrize(("make", "estimator"), EVERY, ids=named)
@pytest.mark.parametrize("dependencies", ["order", "tracked"])
def test_what_was_learnt_of_the_sites_stays_unbiased(make, estimator, dependencies, orders):
    """Coefficients of adaptive Rao-Blackwellisation, from twenty steps before."""
    problem = make(estimator)
    loss = ScoreFunctionELBO(2, max_plate_nesting=problem.nesting, dependencies=dependencies)
    for _ in range(20):
        loss.differentiable_loss(problem.model, problem.guide)
    assert error(problem, loss) < EXACT


BASELINES = [
    None,
    sf.Constant(-2.0),
    sf.LeaveOneOut(),
    sf.AdaptiveRaoBlackwell(),
    sf.MovingAverage(),
    sf.OptimalConstant(),
]


@pytest.mark.parametrize("baseline", BASELINES, ids=repr)
@pytest.mark.parametrize("estimator", [Mirror(), sf.Enumerate()], ids=named)
@pytest.mark.parametrize("make", [plate_then_global, global_then_plate])
def test_other_sites_keep_their_baseline(make, estimator, baseline, orders):
    """Of two particles that are coupled, each is the other's baseline: no block has to be left out."""
    problem = make(estimator)
    loss = ScoreFunctionELBO(2, max_plate_nesting=1, baseline=copy.deepcopy(baseline))
    for _ in range(5):
        loss.differentiable_loss(problem.model, problem.guide)
    assert error(problem, loss) < EXACT


@pytest.mark.parametrize("estimator", [Mirror(), sf.Enumerate()], ids=named)
def test_total_credit(estimator, orders):
    problem = plate_then_global(estimator)
    assert error(problem, ScoreFunctionELBO(2, max_plate_nesting=1, credit=sf.Total())) < EXACT


@pytest.mark.parametrize("estimator", [Mirror(), sf.Enumerate()], ids=named)
def test_hints_at_other_sites(estimator, orders):
    logits, top, weight = parameters((), (), (), seed=9)

    def model():
        z = coin("z", number(0.4))
        s = coin("s", z - weight)
        observe("x", weight * z * s - s, 0.7)

    def guide():
        z = coin("z", logits, infer={"estimator": estimator})
        hint = {"use_decaying_avg_baseline": True, "baseline_value": 2.0 * z.detach() - 1}
        coin("s", top + z, infer={"baseline": hint})

    problem = Problem("hinted", [logits, top, weight], model, guide)
    loss = ScoreFunctionELBO(2, max_plate_nesting=0)
    for _ in range(5):
        loss.differentiable_loss(problem.model, problem.guide)
    assert pyro.param(AVERAGE + "s").abs() > 0.05
    assert error(problem, loss) < EXACT


def test_paths_are_weighed_too(orders):
    """A reparameterised site after a site whose draws do not count alike."""
    logits, loc, weight = parameters((), (), (), seed=10)

    def model():
        z = coin("z", number(0.4))
        w = pyro.sample("w", dist.Normal(z, 1.0))
        observe("x", weight * z * w + w, 0.7)

    def guide():
        z = coin("z", logits, infer={"estimator": sf.Enumerate()})
        pyro.sample("w", dist.Normal(loc * z + weight, number(0.5)))

    problem = Problem("with a path", [logits, loc, weight], model, guide)
    assert error(problem, ScoreFunctionELBO(2, max_plate_nesting=0)) < EXACT


def test_a_fixed_guide_leaves_the_model_to_learn():
    table, weight = parameters((2, 3), 3, seed=6)
    loss = ScoreFunctionELBO(3, max_plate_nesting=1)

    def guide():
        with pyro.plate("data", 2):
            pyro.sample("z", dist.Categorical(logits=table.detach()), infer={"estimator": sf.Enumerate()})

    def model():
        with pyro.plate("data", 2):
            z = pyro.sample("z", dist.Categorical(logits=weight))
            pyro.sample("x", dist.Normal(weight[z.long()], 1.0), obs=number([0.3, -1.0]))

    problem = Problem("fixed guide", [weight], model, guide, nesting=1)
    (found,) = torch.autograd.grad(-loss.differentiable_loss(model, guide), [weight])
    assert distance([found], exact_gradient(problem)) < EXACT  # every element is enumerated: no variance


def test_enumeration_in_a_plate_has_no_variance():
    table, weight = parameters((5, 3), 3, seed=11)
    data = number([0.3, -1.0, 1.4, 0.2, 0.1])

    def model():
        with pyro.plate("data", 5):
            z = pyro.sample("z", dist.Categorical(logits=weight))
            pyro.sample("x", dist.Normal(weight[z.long()], 1.0), obs=data)

    def guide():
        with pyro.plate("data", 5):
            pyro.sample("z", dist.Categorical(logits=table), infer={"estimator": sf.Enumerate()})

    loss = ScoreFunctionELBO(3, max_plate_nesting=1)
    found = torch.autograd.grad(-loss.differentiable_loss(model, guide), [table, weight])
    enumerated = TraceEnum_ELBO(max_plate_nesting=1)

    def marked():
        with pyro.plate("data", 5):
            pyro.sample("z", dist.Categorical(logits=table), infer={"enumerate": "parallel"})

    exact = torch.autograd.grad(-enumerated.differentiable_loss(model, marked), [table, weight])
    assert distance(list(found), list(exact)) < EXACT


def test_values_that_are_all_but_impossible():
    """A weight of 0 in float32 loses nothing, and makes no NaN."""
    logits = torch.tensor([-200.0, 0.3, 200.0], requires_grad=True)

    def model():
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Bernoulli(0.4))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor([0.3, -1.0, 0.2]))

    def guide():
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Bernoulli(logits=logits), infer={"estimator": sf.Enumerate()})

    loss = ScoreFunctionELBO(2, max_plate_nesting=1).differentiable_loss(model, guide)
    (found,) = torch.autograd.grad(loss, logits)
    assert loss.isfinite()
    assert found.isfinite().all()
    p = torch.tensor(0.3).sigmoid()
    expected = -(p * (1 - p)) * (torch.tensor(0.4).logit() - 1.5 - 0.3)  # log p(1) - log p(0) - logit; -1.5: the datum
    assert torch.allclose(found, torch.stack([0 * p, expected, 0 * p]), atol=1e-6)


# --------------------------------------------------------------------------------------- what makes the tests above red


def test_without_orders_of_their_own_it_would_be_wrong(monkeypatch):
    monkeypatch.setattr(joint_sites, "random_order", lambda shape, device: torch.arange(2))
    assert error(two(sf.Enumerate()), ScoreFunctionELBO(2, max_plate_nesting=0)) > 1e-3


def test_without_the_weights_it_would_be_wrong(monkeypatch, orders):
    monkeypatch.setattr(
        joint_sites, "_log_weight", lambda site, weights: torch.zeros(site.x.shape, dtype=torch.float64)
    )
    assert error(global_then_plate(sf.Enumerate()), ScoreFunctionELBO(2, max_plate_nesting=1)) > 1e-3


def test_a_site_without_its_estimators_correction_would_be_wrong(monkeypatch):
    """Pairs that are scored as independent draws with leave-one-out."""

    class Uncorrected(Mirror):
        def surrogate(self, p, x, fx):
            log_q = p.log_prob(x)
            return (fx + (fx - fx.flip(0)) * (log_q - log_q.detach())).mean(0)

    assert error(plate_then_global(Uncorrected()), ScoreFunctionELBO(2, max_plate_nesting=1)) > 1e-3


# --------------------------------------------------------------------------------------------- the library's estimators


@pytest.mark.parametrize("make", [plate_then_global, global_then_plate, two, masked])
def test_disarm_cell_by_cell(make, monkeypatch):
    """Coins of 1/4, 1/2 and 3/4: the uniforms count by the quarter they lie in."""

    def quarters(shape, device):
        even = torch.full((4,), 0.25, dtype=torch.float64)
        return number([(chosen(even) + 0.5) / 4 for _ in range(math.prod(shape))]).reshape(shape)

    monkeypatch.setattr(antithetic, "uniform", quarters)
    problem = make(sf.DisARM())
    with torch.no_grad():
        for parameter in problem.params[:2]:
            probability = (number([1, 2, 3])[torch.arange(parameter.numel()) % 3] / 4).reshape(parameter.shape)
            parameter.copy_(probability.logit())
        if make is two:
            problem.params[1].zero_()  # the second coin has the logit right - left
    assert error(problem, ScoreFunctionELBO(2, max_plate_nesting=problem.nesting)) < EXACT


def test_arms_order_by_order(monkeypatch):
    """A coin of 1/4: one of four draws is 1, any of them; then a coin that depends on it, with leave-one-out."""
    monkeypatch.setattr(antithetic, "_ranks", lambda shape, device: all_orders((shape[-1], 1), device).reshape(shape))
    logits, top, weight = number(0.25).logit().requires_grad_(), *parameters((), (), seed=12)

    def model():
        z = coin("z", number(0.4))
        observe("x", weight * z + coin("s", z - weight) * z, 0.7)

    def guide():
        coin("s", top + coin("z", logits, infer={"estimator": sf.ARMS(4)}))

    assert (
        error(Problem("ARMS", [logits, top, weight], model, guide), ScoreFunctionELBO(4, max_plate_nesting=0)) < EXACT
    )


@pytest.mark.parametrize("validation", [False, True])
@pytest.mark.parametrize(
    "estimator", [sf.Enumerate(), sf.LocalExpectation(), sf.SumAndSample(1, 1), sf.UnorderedSet(2)], ids=named
)
def test_estimators_that_see_the_whole_support_have_no_variance(estimator, validation):
    """One step, by either way of asking for it."""
    slopes, weight = parameters(3, (), seed=13)

    def model():
        with pyro.plate("data", 3):
            z = coin("z", weight)
            pyro.sample("x", dist.Normal(z * weight, 1.0), obs=number([0.3, -1.0, 0.2]))

    def guide(**infer):
        with pyro.plate("data", 3):
            coin("z", slopes, **infer)

    problem = Problem("coins", [slopes, weight], model, guide, nesting=1)
    by_name, plain = ScoreFunctionELBO(2, estimators={"z": estimator}), ScoreFunctionELBO(2)
    with pyro.validation_enabled(validation):
        one = by_name.differentiable_loss(model, guide)
        other = plain.differentiable_loss(model, lambda: guide(infer={"estimator": estimator}))
    for loss in (one, other):
        assert distance(list(torch.autograd.grad(-loss, problem.params)), exact_gradient(problem)) < EXACT
        assert abs(loss + exact_bound(problem)) < EXACT


@pytest.mark.parametrize(
    ("estimator", "num_particles"),
    [(sf.DisARM(2), 4), (sf.ARMS(3), 3), (sf.LocalExpectation(2), 8), (sf.UnorderedSet(3), 3)],
    ids=repr,
)
def test_every_estimator_is_served_where_three_coins_are_one_draw(estimator, num_particles):
    table, weight = parameters((2, 3), (), seed=12)

    def model():
        with pyro.plate("data", 2):
            z = pyro.sample("z", dist.Bernoulli(logits=weight).expand([3]).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=number([0.3, -1.0]))

    def guide():
        with pyro.plate("data", 2):
            pyro.sample("z", dist.Bernoulli(logits=table).to_event(1), infer={"estimator": estimator})

    loss = ScoreFunctionELBO(num_particles, max_plate_nesting=1).differentiable_loss(model, guide)
    gradient, _ = torch.autograd.grad(loss, [table, weight])
    assert gradient.isfinite().all()
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("estimator", [Mirror(), sf.Enumerate()], ids=named)
def test_a_leading_dimension_of_one_is_no_dimension_of_particles(estimator, orders):
    slopes, weight = parameters((1, 2), (), seed=14)

    def model():
        with pyro.plate("data", 2):
            z = coin("z", weight)
            pyro.sample("x", dist.Normal(z * weight, 1.0), obs=number([0.3, -1.0]))

    def guide():
        with pyro.plate("data", 2):
            coin("z", slopes, infer={"estimator": estimator})

    problem = Problem("a row", [slopes, weight], model, guide, nesting=1)
    found = expected_gradient(problem, ScoreFunctionELBO(2, max_plate_nesting=1))

    def flat():
        with pyro.plate("data", 2):
            coin("z", slopes[0])

    assert distance(found, exact_gradient(Problem("flat", problem.params, model, flat, nesting=1))) < EXACT


def test_one_particle_and_one_draw():
    """A single draw may depend on what was sampled before."""

    class One(Mirror):
        evaluations = 1

        def sample(self, p):
            return p.sample((1,))

        def surrogate(self, p, x, fx):
            log_q = p.log_prob(x)
            return (fx * (1 + log_q - log_q.detach())).mean(0)

    logits, top, weight = parameters((), (), (), seed=13)

    def model():
        a = coin("a", weight)
        observe("x", coin("z", a) * weight - a, 0.7)

    def guide():
        coin("z", top + coin("a", logits), infer={"estimator": One()})

    pyro.set_rng_seed(3)
    found = torch.autograd.grad(ScoreFunctionELBO(1, max_plate_nesting=0).differentiable_loss(model, guide), [top])
    pyro.set_rng_seed(3)
    plain = ScoreFunctionELBO(1, max_plate_nesting=0)
    plain.jointly = False
    expected = torch.autograd.grad(plain.differentiable_loss(model, guide), [top])
    assert distance(list(found), list(expected)) < EXACT


def test_diagnose_draws_each_particle_apart():
    problem = meeting(sf.Enumerate())  # which makes three draws, not 400

    def guide():
        with pyro.plate("data", 2):
            logits = pyro.param("table", torch.zeros(2, 3, dtype=torch.float64))
            pyro.sample("z", dist.Categorical(logits=logits), infer={"estimator": sf.Enumerate()})

    report = diagnose(ScoreFunctionELBO(3, max_plate_nesting=1), problem.model, guide, num_draws=400, repeats=2)
    assert report.num_draws == 400
    assert "z" in report.sites


# ------------------------------------------------------------------------------------------------------------- refusals


def refused(words, estimator, make=None, num_particles=2, given=None, **options):
    """The loss refuses the site z, saying all these words, before anything was updated."""

    def model():
        with pyro.plate("data", 2):
            z = coin("z", number(0.4))
            pyro.sample("x", dist.Normal(z, 1.0), obs=number([0.3, -1.0]))

    def guide():
        with pyro.plate("data", 2):
            coin("z", pyro.param("logits", torch.zeros(2)), infer={} if estimator is None else {"estimator": estimator})

    model, guide = make or (model, guide)
    loss = ScoreFunctionELBO(num_particles, max_plate_nesting=1, estimators=given, **options)
    with pytest.raises(ScorefnError) as refusal:
        loss.loss_and_grads(model, guide)
    said = str(refusal.value) + " ".join(getattr(refusal.value, "__notes__", ()))
    for word in words:
        assert re.search(word, said), said


def test_the_number_of_draws():
    refused(['Mirror makes 2 draws of site "z", but num_particles is 5', "num_particles=2"], Mirror(), num_particles=5)
    refused(['Enumerate makes 2 draws of site "z", but num_particles is 3'], sf.Enumerate(), num_particles=3)


def test_what_is_no_estimator():
    refused([r'infer\["estimator"\] of site "z"=Mirror is a class', r"Mirror\(\)"], Mirror)
    refused([r"""infer\["estimator"\] of site "z"='DisARM'""", r"scorefn.DisARM\(num_pairs=4\)"], "DisARM")
    with pytest.raises(ScorefnError, match="must be a mapping from names of guide sites"):
        ScoreFunctionELBO(2, estimators=Mirror())
    with pytest.raises(ScorefnError, match=r'estimators\["z"\]=3 is no'):
        ScoreFunctionELBO(2, estimators={"z": 3})


def test_names():
    refused(['for "w"', 'samples "z"'], None, given={"w": Mirror()})
    refused(['Site "z"', "telling which"], Mirror(), given={"z": Mirror()})


def test_particles_one_after_the_other():
    refused(['Site "z"', "Mirror", "vectorize_particles=False"], Mirror(), vectorize_particles=False)


def dependent(before, estimator):
    """The site z depends on the site a, which is made so."""

    def model():
        a = before("a")
        with pyro.plate("data", 2):
            z = coin("z", number(0.4))
            pyro.sample("x", dist.Normal(z + a, 1.0), obs=number([0.3, -1.0]))

    def guide():
        a = before("a")
        with pyro.plate("data", 2):
            coin("z", pyro.param("logits", torch.zeros(2)) + a, infer={"estimator": estimator})

    return model, guide


@pytest.mark.parametrize(
    "before",
    [
        lambda name: coin(name, number(0.1)),
        lambda name: coin(name, number(0.1), infer={"estimator": Mirror()}),
        lambda name: pyro.sample(name, dist.Normal(number(0.0), 1.0)),
    ],
    ids=["a coin", "another coupled site", "a path"],
)
def test_sites_that_differ_from_particle_to_particle(before):
    words = [
        'Site "z"',
        "Mirror",
        r"batch shape \(2, 2\)",
        r'a site before it \("a"\)',
        "leave it to the score function",
    ]
    refused(words, Mirror(), dependent(before, Mirror()))


def test_the_same_values_by_luck_are_refused_too():
    """All particles drew the same a this time; they need not the next time."""
    refused(["one for each particle"], Mirror(), dependent(lambda name: coin(name, number(40.0)), Mirror()))


def test_families():
    def model():
        pyro.sample("z", dist.Poisson(2.0))

    def guide():
        pyro.sample("z", dist.Poisson(pyro.param("rate", torch.tensor(2.0))), infer={"estimator": sf.DisARM()})

    refused(["DisARM does not serve", "Poisson", 'Guide site "z"'], None, (model, guide))


def test_reparameterised_sites():
    class Anything(Estimator):
        evaluations = 2

        def sample(self, p):
            return p.sample((2,))

        def surrogate(self, p, x, fx):
            return fx.mean(0)

    def model():
        pyro.sample("z", dist.Normal(0.0, 1.0))

    def guide():
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(2.0)), 1.0), infer={"estimator": Anything()})

    refused(['Guide site "z"', "Normal is reparameterised", "pathwise"], None, (model, guide))


@pytest.mark.parametrize(
    ("estimator", "num_particles"), [(sf.DoubleControlVariate(2), 2), (sf.REBAR(), 3), (sf.REBAR(), 1)], ids=repr
)
def test_estimators_that_need_more_than_the_cost_at_the_particles(estimator, num_particles):
    refused(['site "z"', type(estimator).__name__, "its gradient"], estimator, num_particles=num_particles)


def test_given_values_and_hints():
    refused(['Site "z"', "its value is given"], None, observed())

    def model():
        coin("z", number(0.4))

    def guide():
        hint = {"use_decaying_avg_baseline": True}
        coin("z", pyro.param("logit", torch.zeros(())), infer={"estimator": Mirror(), "baseline": hint})

    refused(['Site "z"', "subtracts no other baseline"], None, (model, guide))


def observed():
    def model():
        coin("z", number(0.4))

    def guide():
        coin("z", pyro.param("logit", torch.zeros(())), infer={"estimator": Mirror()})

    return model, poutine.condition(guide, data={"z": number(1.0)})


def test_wrong_shapes_of_a_users_own_estimator():
    class Flat(Mirror):
        def sample(self, p):
            return super().sample(p).sum(-1)

    class Summed(Mirror):
        def surrogate(self, p, x, fx):
            return super().surrogate(p, x, fx).sum()

    class Heavy(Mirror):
        def weights(self, p, x):
            return torch.ones(3)

    class Negative(Mirror):
        def weights(self, p, x):
            return number([1.5, -0.5])

    refused([r'a tensor of shape \(2,\) for site "z"', r"\(2, 2\)"], Flat())
    refused([r'of shape \(\) for site "z"', r"are \(2,\)"], Summed())
    refused([r'weights of shape \(3,\) to site "z"', r"\(2, 2\)"], Heavy())
    refused(['site "z" a weight of -0.5', "at least 0"], Negative())


def test_draws_and_other_bounds():
    problem = plate_then_global(Mirror())
    with pytest.raises(ScorefnError, match='Site "z" has an estimator.*one score for each draw'):
        ScoreFunctionELBO(2, max_plate_nesting=1).draws(problem.model, problem.guide)
    with pytest.raises(ScorefnError, match='Guide site "z" is marked .*log of their mean weight'):
        VIMCO(2, max_plate_nesting=1).loss(problem.model, problem.guide)


def test_nothing_to_train():
    def model():
        coin("z", number(0.4))

    def guide():
        coin("z", number(0.1), infer={"estimator": Mirror()})

    refused(["No guide site is trainable", '"z"'], None, (model, guide))


def test_not_finite_names_the_site():
    def model():
        z = coin("z", number(0.4))
        pyro.factor("y", torch.where(z > 0, 0.0, -torch.inf))

    def guide():
        coin("z", pyro.param("logit", torch.zeros(())), infer={"estimator": sf.Enumerate()})

    refused(['Site "y"', "log p"], None, (model, guide))
