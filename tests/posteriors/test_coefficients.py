"""The default baseline: one learnt coefficient for each site, exact whatever was learnt, and worth its cost."""

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch

import scorefn as sf
from scorefn.posteriors import ScoreFunctionELBO
from scorefn.posteriors.coefficients import ENOUGH, Columns, OfColumns, SiteRaoBlackwell
from tests.posteriors import problems
from tests.posteriors.enumeration import Problem, distance, exact_gradient, expected_gradient, paths
from tests.posteriors.problems import coin, number, observe, parameters

EXACT = 1e-10
VISIBLE = 1e-3


@pytest.fixture(autouse=True)
def seed():
    pyro.set_rng_seed(0)


def loss_for(problem, num_particles=2, **options):
    return ScoreFunctionELBO(
        num_particles, max_plate_nesting=problem.nesting, vectorize_particles=problem.batched, **options
    )


def taught(problem, num_particles=2, steps=12):
    loss = loss_for(problem, num_particles)
    for _ in range(steps):
        loss.differentiable_loss(problem.model, problem.guide)
    return loss


CASES = [
    problems.plate,
    problems.local_first,
    problems.nested_small,
    problems.crossed,
    problems.subsampled,
    problems.masked,
    problems.auxiliary,
    problems.swapped,
    problems.branch,
    problems.event,
]


@pytest.mark.parametrize("make", CASES)
def test_exact_with_what_was_learnt(make):
    problem = make()
    loss = taught(problem)
    assert float(loss.coefficients.seen.max()) >= ENOUGH
    if make not in (problems.auxiliary, problems.branch):  # what a coin does not influence there never varies
        assert any(loss.coefficients.coefficient(name) != 0 for name in loss.coefficients.rows)
    assert distance(expected_gradient(problem, loss), exact_gradient(problem)) < EXACT


@pytest.mark.parametrize("make", [problems.plate, problems.branch])
def test_exact_with_any_coefficients(make):
    problem = make()
    loss = taught(problem)
    sites = loss.coefficients
    sites.moments = torch.stack((torch.linspace(-3.0, 2.0, len(sites.rows)), torch.ones(len(sites.rows)))).double()
    assert distance(expected_gradient(problem, loss), exact_gradient(problem)) < EXACT


@pytest.mark.parametrize("num_particles", [2, 3])
def test_one_after_the_other(num_particles):
    problem = problems.swapped()
    loss = ScoreFunctionELBO(num_particles, max_plate_nesting=0, vectorize_particles=False)
    for _ in range(12):
        loss.differentiable_loss(problem.model, problem.guide)
    assert distance(expected_gradient(problem, loss), exact_gradient(problem)) < EXACT


def forked():
    """A coin that says which way the program goes, after one that has a cost of its own."""
    first, second, inner = parameters((), (), (), seed=4)

    def model():
        observe("early", 2.0 * coin("a", number(0.3)), 1.5)
        if coin("z", number(0.4)):
            observe("x", 1.5 * coin("y", number(0.2)), 0.7)

    def guide():
        coin("a", first)
        if coin("z", second):
            coin("y", inner)

    return Problem("forked", [first, second, inner], model, guide, batched=False)


def test_a_coefficient_chosen_by_the_way_that_a_draw_took_would_be_biased(monkeypatch):
    """Why coefficients belong to names: which program a draw went through was decided by its decisions."""
    problem = forked()
    assert distance(expected_gradient(problem, taught(problem)), exact_gradient(problem)) < EXACT

    original = OfColumns.__call__

    def by_program(self, signal, draws):
        value = original(self, signal, draws)
        rest = draws.fx.detach().sum(-1, keepdim=True) - signal
        went = draws.mask.all(-1, keepdim=True) if draws.mask is not None else torch.ones(len(draws), 1).bool()
        return value - torch.where(went, 2.0, 0.0) * rest

    monkeypatch.setattr(OfColumns, "__call__", by_program)
    assert distance(expected_gradient(problem, taught(problem)), exact_gradient(problem)) > VISIBLE


def test_nothing_is_applied_before_enough_was_seen():
    problem = problems.plate()
    loss, plain = loss_for(problem), loss_for(problem, baseline=sf.LeaveOneOut())
    for step in range(ENOUGH):
        pyro.set_rng_seed(step)
        ours = torch.autograd.grad(loss.differentiable_loss(problem.model, problem.guide), problem.params)
        pyro.set_rng_seed(step)
        theirs = torch.autograd.grad(plain.differentiable_loss(problem.model, problem.guide), problem.params)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)
    assert loss.coefficients.coefficient("z") != 0
    assert loss.coefficients.coefficient("g") == 0  # it influences everything
    assert loss.coefficients.coefficient("nobody") == 0


def test_the_coefficient_of_a_site_is_the_ratio_of_its_summed_moments():
    problem = problems.plate()
    loss = loss_for(problem, 3)
    covariance = variance = 0.0
    for step in range(8):
        pyro.set_rng_seed(step)
        draws = loss.draws(problem.model, problem.guide)
        pyro.set_rng_seed(step)
        loss.differentiable_loss(problem.model, problem.guide)
        signal = draws.signal()[:, 1:]
        rest = draws.fx.detach().sum(-1, keepdim=True) - signal
        a, b = ((v - v.mean(0)) * 3 / 2 for v in (signal, rest))
        covariance = 0.95 * covariance + 0.05 * (a * b).mean()
        variance = 0.95 * variance + 0.05 * b.square().mean()
    assert loss.coefficients.coefficient("z") == pytest.approx(float(-covariance / variance), rel=1e-10)


def exact_variance(problem, loss):
    """The variance of the estimate of each parameter, by enumeration of all particles."""
    first, second = 0.0, 0.0
    for probability, value in paths(lambda: copy.deepcopy(loss).differentiable_loss(problem.model, problem.guide)):
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(value, problem.params, materialize_grads=True)])
        first, second = first + probability.detach() * gradient, second + probability.detach() * gradient.square()
    return (second - first.square()).tolist()


def shared_noise():
    """Two coins that meet in one likelihood, of which one has a cost of its own."""
    first, second = parameters((), (), seed=2)

    def model():
        a, b = coin("a", number(0.3)), coin("b", number(-0.2))
        observe("early", 3.0 * a, 1.5)
        observe("x", 3.0 * a + 3.0 * b, 2.5)

    def guide():
        coin("a", first)
        coin("b", second)

    return Problem("shared noise", [first, second], model, guide)


def test_a_coefficient_takes_variance_out():
    """With the best coefficient for its site, by enumeration of two particles: less than by leave-one-out."""
    problem = shared_noise()
    loss = taught(problem, steps=400)
    ours = exact_variance(problem, loss)
    theirs = exact_variance(problem, loss_for(problem, baseline=sf.LeaveOneOut()))
    assert loss.coefficients.coefficient("b") != 0
    assert ours[1] < 0.95 * theirs[1]  # of the coin that hears the other's noise
    assert ours[0] == pytest.approx(theirs[0], rel=1e-10)


def ragged(size):
    logit = pyro.param("logit", number(0.2))
    weights = pyro.param("weights", number([0.1, -0.2, 0.5, 0.3]))
    data = number([0.3, -1.0, 1.4, 0.2])[:size]

    def model():
        with pyro.plate("data", 4, subsample_size=size):
            pyro.sample("x", dist.Normal(coin("z", number(0.1)), 1.0), obs=data)

    def guide():
        coin("g", logit, infer={"is_auxiliary": True})
        with pyro.plate("data", 4, subsample_size=size):
            coin("z", weights[:size])

    return Problem("ragged", [logit.unconstrained(), weights.unconstrained()], model, guide, nesting=1)


def test_a_ragged_minibatch_is_served_by_what_its_site_has_learnt():
    with pyro.get_param_store().scope():
        loss = taught(ragged(4))
        before = loss.coefficients.coefficient("z")
        assert before != 0
        small = ragged(2)
        assert distance(expected_gradient(small, loss), exact_gradient(small)) < EXACT
        loss.differentiable_loss(small.model, small.guide)
        assert loss.coefficients.coefficient("z") != before
        assert set(loss.coefficients.rows) == {"g", "z"}


def test_another_program_neither_crashes_nor_biases():
    loss = taught(problems.plate())
    for make in (problems.masked, problems.crossed, problems.single):
        problem = make()
        loss.max_plate_nesting = problem.nesting + 1
        assert distance(expected_gradient(problem, loss), exact_gradient(problem)) < EXACT
        loss.differentiable_loss(problem.model, problem.guide)


def test_without_gradient_nothing_is_learnt():
    problem = problems.plate()
    loss = loss_for(problem)
    loss.loss(problem.model, problem.guide)
    loss.draws(problem.model, problem.guide)
    assert loss.coefficients.rows == {}


def test_one_particle_has_none():
    problem = problems.plate()
    loss = loss_for(problem, 1)
    loss.differentiable_loss(problem.model, problem.guide)
    assert loss.coefficients.rows == {}


def test_total_credit_leaves_nothing_out():
    problem = problems.plate()
    loss = loss_for(problem, 2, credit=sf.Total())
    for _ in range(12):
        loss.differentiable_loss(problem.model, problem.guide)
    assert distance(expected_gradient(problem, loss), exact_gradient(problem)) < EXACT


def test_an_overflow_leaves_what_was_learnt():
    problem = problems.plate()
    loss = taught(problem)
    before = loss.coefficients.moments.clone()

    def model():
        pyro.factor("huge", 1e200 * torch.randn((3, 1), dtype=torch.float64))
        problem.model()

    loss.num_particles = 3
    with pytest.raises(sf.NonFiniteError, match="overflows"):
        loss.differentiable_loss(model, problem.guide)
    assert torch.equal(loss.coefficients.moments, before)


def test_columns_are_found_again_by_name():
    sites = SiteRaoBlackwell()
    first = sites.of([Columns(("score", "a", ()), 0, 1), Columns(("score", "b", (2,)), 1, 2)], torch.device("cpu"))
    other = sites.of([Columns(("score", "b", (3,)), 0, 3), Columns(("score", "a", ()), 3, 1)], torch.device("cpu"))
    assert first.index.row.tolist() == [0, 1, 1]
    assert other.index.row.tolist() == [1, 1, 1, 0]
