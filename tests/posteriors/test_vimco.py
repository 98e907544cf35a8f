"""VIMCO and the plain importance-weighted bound: exact by enumeration of all particles."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI
from torch.distributions import Bernoulli, Normal

import scorefn as sf
from scorefn.posteriors import VIMCO, ArithmeticMean, BoundOnly, DoublyReparameterized, GeometricMean
from tests.posteriors import problems
from tests.posteriors.enumeration import Problem, distance, expected_gradient, paths
from tests.posteriors.problems import coin, number
from tests.posteriors.vimco_cases import EXACT, Given, X, coins_guide, coins_model, exact_gradient, loss_for

WHOLE = [
    problems.single,
    problems.categorical,
    problems.branch,
    problems.leak,
    problems.auxiliary,
    problems.swapped,
    problems.mixed,
]


@pytest.mark.parametrize("make", WHOLE)
@pytest.mark.parametrize("num_particles", [1, 2, 3])
def test_expected_gradient(make, num_particles):
    problem = make()
    loss = loss_for(problem, num_particles)
    assert distance(expected_gradient(problem, loss), exact_gradient(problem, num_particles)) < EXACT


@pytest.mark.parametrize("make", [problems.plate, problems.local_first, problems.crossed, problems.foreign])
def test_plates_that_do_not_hold_all_have_one_weight(make):
    problem = make()
    assert distance(expected_gradient(problem, loss_for(problem, 2)), exact_gradient(problem, 2)) < EXACT


@pytest.mark.parametrize("baseline", [None, ArithmeticMean(), BoundOnly()])
@pytest.mark.parametrize("make", [problems.single, problems.swapped, problems.mixed])
def test_other_baselines(make, baseline):
    problem = make()
    assert (
        distance(expected_gradient(problem, loss_for(problem, 3, baseline=baseline)), exact_gradient(problem, 3))
        < EXACT
    )


@pytest.mark.parametrize("make", [problems.single, problems.masked, problems.mixed, problems.swapped])
def test_one_after_the_other(make):
    problem = make()
    loss = loss_for(problem, 2, vectorize_particles=False)
    assert distance(expected_gradient(problem, loss), exact_gradient(problem, 2)) < EXACT


def test_no_noise_remains_where_the_bound_is_tight():
    logit = number(0.4).requires_grad_()
    posterior = logit.detach().clone()
    problem = Problem("tight", [logit], lambda: coin("z", posterior), lambda: coin("z", logit))
    for num_particles in (1, 3):
        loss = loss_for(problem, num_particles)
        for _, value in paths(lambda loss=loss: loss.differentiable_loss(problem.model, problem.guide)):
            assert torch.autograd.grad(value, logit)[0].abs() < 1e-15


def test_it_trains_in_svi_towards_the_evidence():
    """The evidence of the coin and its Gaussian noise, in closed form."""
    svi = SVI(coins_model, coins_guide, pyro.optim.Adam({"lr": 0.05}), loss=VIMCO(8))
    losses = [svi.step(X) for _ in range(200)]
    assert sum(losses[-50:]) < sum(losses[:50])
    prior = pyro.param("prior").detach()
    halves = [Normal(float(z), 2**0.5).log_prob(X) + Bernoulli(prior).log_prob(torch.tensor(float(z))) for z in (0, 1)]
    evidence = torch.logaddexp(*halves).sum().item()
    bound = -VIMCO(5000).loss(coins_model, coins_guide, X)
    assert abs(bound - evidence) < 0.02  # 5000 draws: 6 standard deviations and more


def test_draws_are_one_draw_of_all_particles():
    draws = VIMCO(4, max_plate_nesting=1).draws(coins_model, coins_guide, X)
    assert (draws.log_prob.shape, draws.fx.shape) == ((1, 3, 4), (1, 3, 1))
    assert {name: value.shape for name, value in draws.x.items()} == {"z": (1, 4, 3), "w": (1, 4, 3)}

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("loc", torch.zeros(len(x))), 1.0))

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(sf.ScorefnError, match="no decision and no score"):
        VIMCO(2).draws(model, guide, X)


def test_a_fixed_guide_lets_the_model_learn():
    def guide(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.4))
            pyro.sample("w", dist.Normal(z, 1.0))

    VIMCO(4).loss_and_grads(coins_model, guide, X)
    assert pyro.param("prior").unconstrained().grad.abs() > 0


# ----------------------------------------------------------------------------------------------------- extreme weights


def impossible(log_w):
    """Log joints of a categorical latent, -inf for what cannot be."""
    logits = number([0.3, -0.2, 0.9]).requires_grad_()
    table = number(log_w)
    problem = Problem(
        "impossible",
        [logits],
        lambda: pyro.factor("f", table[pyro.sample("z", dist.Categorical(logits=number([0.0] * 3))).long()]),
        lambda: pyro.sample("z", dist.Categorical(logits=logits)),
    )
    return problem, logits, table


def test_impossible_draws_have_weight_zero():
    """With two particles, a pair of which one is impossible has the bound of the other, less log 2."""
    problem, logits, table = impossible([0.4, -torch.inf, 1.0])
    loss = loss_for(problem, 2)
    with Given({"z": torch.tensor([0, 1])}):
        value = loss.differentiable_loss(problem.model, problem.guide)
    log_q = logits - logits.logsumexp(0)
    possible = table[0] - math.log(3) - log_q[0]
    assert value.item() == pytest.approx(-(possible - math.log(2)).item(), rel=1e-14)
    # L - L_-n + r_-n - r_n: nothing is known without the first one, and the first stands in for the second
    first, second = (torch.autograd.grad(log_q[k], logits, retain_graph=True)[0] for k in (0, 1))
    truth = (possible - math.log(2)).detach() * first + (0.5 - math.log(2)) * second
    torch.testing.assert_close(-torch.autograd.grad(value, logits)[0], truth, rtol=0, atol=1e-14)


def test_all_impossible_is_refused():
    problem, logits, _ = impossible([0.4, -torch.inf, 1.0])
    for num_particles in (1, 2):
        given = torch.tensor([1] * num_particles) if num_particles > 1 else torch.tensor(1)
        with (
            Given({"z": given}),
            pytest.raises(sf.NonFiniteError, match=f"All {num_particles} particles have weight 0"),
        ):
            loss_for(problem, num_particles).loss_and_grads(problem.model, problem.guide)
    assert logits.grad is None


@pytest.mark.filterwarnings("ignore:Encountered")
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_weights_that_are_not_numbers_name_their_particles(bad):
    problem, logits, _ = impossible([0.4, bad, 1.0])
    with (
        pyro.validation_enabled(False),
        Given({"z": torch.tensor([0, 1, 2])}),
        pytest.raises(sf.NonFiniteError, match=r'Site "f": log p is (nan|inf) at 1 of 3 particles, namely \[1\]'),
    ):
        loss_for(problem, 3).loss_and_grads(problem.model, problem.guide)
    assert logits.grad is None


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_particles": 0}, "integer of at least 1"),
        ({"num_particles": 2.0}, "integer of at least 1"),
        ({"baseline": sf.LeaveOneOut()}, "are one draw"),
        ({"baseline": GeometricMean}, "are one draw"),
        ({"baseline": "geometric"}, "are one draw"),
        ({"pathwise": True}, "with parentheses"),
        ({"pathwise": DoublyReparameterized}, "with parentheses"),
        ({"plates": "data"}, r"plates=\('data',\)"),
    ],
)
def test_wrong_arguments_are_refused(options, message):
    with pytest.raises(sf.ScorefnError, match=message):
        VIMCO(**{"num_particles": 2, **options})


def test_pyro_hints_are_refused():
    hint = {"baseline": {"use_decaying_avg_baseline": True}}
    guide = poutine.infer_config(problems.single().guide, lambda site: hint)
    with pytest.raises(sf.ScorefnError, match="no baseline of single sites"):
        VIMCO(2, max_plate_nesting=0).loss(problems.single().model, guide)


def test_a_guide_and_a_model_without_gradient_are_refused():
    def model():
        pyro.sample("z", dist.Bernoulli(0.3))

    def guide():
        pyro.sample("z", dist.Bernoulli(logits=pyro.param("logit", torch.tensor(0.1)).detach()))

    with pytest.raises(sf.ScorefnError, match='No guide site is trainable: "z" would need a score'):
        VIMCO(2).loss_and_grads(model, guide)
    assert isinstance(VIMCO(2).loss(model, guide), float)


# ------------------------------------------------------------------------------------------------- what proofs can see


@pytest.mark.parametrize("make", [problems.single, problems.mixed])
def test_a_stand_in_made_from_its_own_weight(make):
    class Own(ArithmeticMean):
        def stand_in(self, log_weight):
            return log_weight.logsumexp(0, keepdim=True).expand(log_weight.shape) - math.log(len(log_weight))

    problem = make()
    wrong = expected_gradient(problem, loss_for(problem, 2, baseline=Own()))
    assert distance(wrong, exact_gradient(problem, 2)) > 1e-3


def test_a_share_of_its_own_weight():
    class Own(GeometricMean):
        def without_each(self, log_weight):
            return super().without_each(log_weight)[0], log_weight.softmax(0)

    problem = problems.single()
    assert distance(expected_gradient(problem, loss_for(problem, 2, baseline=Own())), exact_gradient(problem, 2)) > 1e-3
