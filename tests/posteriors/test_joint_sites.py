"""Sites with an estimator in ScoreFunctionELBO: exact by enumeration of the estimator's own randomness."""

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import TraceEnum_ELBO

import scorefn as sf
from scorefn.posteriors import ScoreFunctionELBO, diagnose, joint_sites
from scorefn.posteriors.hints import AVERAGE
from tests.posteriors.enumeration import (
    Problem,
    distance,
    exact_bound,
    exact_gradient,
    expected_gradient,
    paths,
)
from tests.posteriors.joint_site_problems import (
    EVERY,
    EXACT,
    Mirror,
    all_orders,
    error,
    global_then_plate,
    meeting,
    named,
    plate_then_global,
    two,
)
from tests.posteriors.problems import coin, number, observe, parameters


@pytest.fixture
def orders(monkeypatch):
    monkeypatch.setattr(joint_sites, "random_order", all_orders)


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
