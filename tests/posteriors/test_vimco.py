"""VIMCO and the plain importance-weighted bound: exact by enumeration of all particles and by quadrature."""

import copy
import itertools
import math
from contextlib import nullcontext

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions.testing.rejection_exponential import RejectionExponential
from pyro.infer import SVI, RenyiELBO
from pyro.poutine.messenger import Messenger
from torch.distributions import Bernoulli, Normal

import scorefn as sf
from scorefn.posteriors import (
    VIMCO,
    ArithmeticMean,
    BoundOnly,
    DoublyReparameterized,
    GeometricMean,
    particle_loss,
)
from tests.posteriors import problems
from tests.posteriors.enumeration import Problem, distance, expected_gradient, paths
from tests.posteriors.problems import coin, number, observe, parameters
from tests.posteriors.test_subsamples import Subsample

EXACT = 1e-10


@pytest.fixture(autouse=True)
def fresh_store():
    with pyro.get_param_store().scope():
        pyro.set_rng_seed(0)
        yield


def loss_for(problem, num_particles, **options):
    options.setdefault("vectorize_particles", problem.batched)
    options.setdefault("pathwise", None)  # enumeration holds the noise of reparameterised sites fixed
    return VIMCO(num_particles, max_plate_nesting=problem.nesting, **options)


def log_ratios(problem, element=lambda log_prob: log_prob.sum()):
    """log p - log q of one particle, from Pyro's traces alone."""
    guide_trace = poutine.trace(problem.guide).get_trace()
    model_trace = poutine.trace(poutine.replay(problem.model, trace=guide_trace)).get_trace()
    total = 0.0
    for sign, trace in ((1, model_trace), (-1, guide_trace)):
        trace.compute_log_prob()
        for site in trace.nodes.values():
            if site["type"] == "sample" and type(site["fn"]).__name__ != "_Subsample":
                total = total + sign * element(site["log_prob"])
    return total


def exact_gradient(problem, num_particles):
    """Of the bound of N particles, summed over all their joint values."""

    def bound():
        return torch.stack([log_ratios(problem) for _ in range(num_particles)]).logsumexp(0) - math.log(num_particles)

    total = torch.stack([probability * bound for probability, bound in paths(bound)]).sum()
    return list(torch.autograd.grad(total, problem.params, allow_unused=True, materialize_grads=True))


# --------------------------------------------------------------------------------------- discrete guides, enumerated

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


# ---------------------------------------------------------------------------------------------- one weight per element


def per_datum(log_w):
    """The sum of the elements' bounds, from log weights ``[N, D]``."""
    return (log_w.logsumexp(0) - math.log(len(log_w))).sum()


def exact_local_gradient(problem, num_particles, scale=1.0):
    def element(log_prob):
        return log_prob.reshape(-1, log_prob.shape[-1]).sum(0) / scale

    def bound():
        return scale * per_datum(torch.stack([log_ratios(problem, element) for _ in range(num_particles)]))

    total = torch.stack([probability * value for probability, value in paths(bound)]).sum()
    return list(torch.autograd.grad(total, problem.params, allow_unused=True, materialize_grads=True))


def local(size=2, data=2, index=None):
    """Two coins in each element of a plate, of which a subsample may be in use."""
    slopes, weight = parameters(data, (), seed=12)
    x = number([0.3, -1.0, 1.4, 0.0, 2.0, -0.5])[:data]
    index = torch.arange(data) if index is None else index

    def model():
        with pyro.plate("data", data, subsample=index):
            z = coin("z", weight)
            y = coin("y", z - 0.5)
            pyro.sample("x", dist.Normal(z + weight * y, 1.0), obs=x[index])

    def guide():
        with pyro.plate("data", data, subsample=index):
            z = coin("z", slopes[index])
            coin("y", slopes[index].square() - z)

    return Problem("latents in a plate", [slopes, weight], model, guide, nesting=1)


def with_constants():
    """Observed sites before the first latent, inside and outside the plate, do not spoil it."""
    slopes, weight = parameters(2, (), seed=13)

    def model():
        observe("before", weight, 0.5)
        with pyro.plate("data", 2):
            pyro.sample("y", dist.Normal(weight, 1.0), obs=number([1.0, 2.0]))
            z = coin("z", weight)
            pyro.sample("x", dist.Normal(z, 1.0), obs=number([0.3, -1.0]))

    def guide():
        with pyro.plate("data", 2):
            coin("z", slopes)

    return Problem("with constants", [slopes, weight], model, guide, nesting=1)


LOCAL = [local, problems.event, problems.nested_small]


@pytest.mark.parametrize("make", LOCAL)
@pytest.mark.parametrize("batched", [True, False])
def test_latents_in_a_plate_have_weights_of_their_own(make, batched):
    problem = make()
    loss = loss_for(problem, 2, vectorize_particles=batched)
    assert distance(expected_gradient(problem, loss), exact_local_gradient(problem, 2)) < EXACT


@pytest.mark.parametrize("make", LOCAL)
def test_or_one_weight_where_it_is_asked_for(make):
    problem = make()
    expected = expected_gradient(problem, loss_for(problem, 2, plates=()))
    assert distance(expected, exact_gradient(problem, 2)) < EXACT
    assert distance(expected, exact_local_gradient(problem, 2)) > 1e-3


def test_factors_before_the_first_latent_need_no_weight():
    problem = with_constants()
    weight = problem.params[1]
    without = [torch.zeros(2, dtype=torch.float64), (0.5 - weight + 3.0 - 2 * weight).detach()]

    def model():
        with pyro.plate("data", 2):
            z = coin("z", weight)
            pyro.sample("x", dist.Normal(z, 1.0), obs=number([0.3, -1.0]))

    rest = exact_local_gradient(Problem("rest", problem.params, model, problem.guide, nesting=1), 3)
    expected = expected_gradient(problem, loss_for(problem, 3, plates=("data",)))
    assert distance(expected, [a + b for a, b in zip(rest, without, strict=True)]) < EXACT
    draws = loss_for(problem, 3).draws(problem.model, problem.guide)
    assert draws.log_prob.shape == (1, 2 + 1, 3)
    pyro.set_rng_seed(1)
    value = loss_for(problem, 3).loss(problem.model, problem.guide)
    pyro.set_rng_seed(1)
    assert -loss_for(problem, 3).draws(problem.model, problem.guide).fx.sum().item() == pytest.approx(value, rel=1e-14)


def test_the_scale_of_a_subsample_is_outside_the_logarithm():
    problem = local(data=6, index=torch.tensor([0, 3]))
    expected = expected_gradient(problem, loss_for(problem, 2))
    assert distance(expected, exact_local_gradient(problem, 2, scale=3.0)) < EXACT
    assert distance(expected, exact_local_gradient(problem, 2)) > 1e-3


def test_each_element_may_have_a_scale_of_its_own():
    problem = local()
    scale = number([0.5, 2.0])

    def scaled(program):
        def run():
            with poutine.scale(scale=scale):
                program()

        return run

    both = Problem("scaled", problem.params, scaled(problem.model), scaled(problem.guide), nesting=1)
    pieces = [exact_local_gradient(masked_to(problem, index), 2) for index in range(2)]
    truth = [sum(s * piece[k] for s, piece in zip(scale, pieces, strict=True)) for k in range(len(problem.params))]
    assert distance(expected_gradient(both, loss_for(both, 2)), truth) < EXACT


def masked_to(problem, index):
    """The problem with one element of its plate."""
    keep = torch.arange(2) == index

    def kept(program):
        def run():
            with poutine.mask(mask=keep):
                program()

        return run

    return Problem("one element", problem.params, kept(problem.model), kept(problem.guide), nesting=1)


def test_one_particle_may_have_any_scales():
    problem = problems.subsampled()
    assert distance(expected_gradient(problem, loss_for(problem, 1)), exact_gradient(problem, 1)) < EXACT
    with pytest.raises(sf.ScorefnError, match=r'different scales, such as 1 \("g"\) and 3'):
        loss_for(problem, 2).loss(problem.model, problem.guide)


def test_one_after_the_other_shares_the_subsample():
    seen = []

    def guide():
        with pyro.plate("data", 50, subsample_size=3) as index:
            seen.append(index.tolist())
            coin("z", pyro.param("logits", torch.zeros(50, dtype=torch.float64))[index])

    def model():
        with pyro.plate("data", 50, subsample_size=3) as index:
            seen.append(index.tolist())
            z = coin("z", number(0.3))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.linspace(0.0, 1.0, 50, dtype=torch.float64)[index])

    loss = VIMCO(3, vectorize_particles=False, max_plate_nesting=1)
    loss.loss_and_grads(model, guide)
    assert all(index == seen[0] for index in seen)
    loss.loss_and_grads(model, guide)
    assert seen[-1] != seen[0]


def subsampled(size):
    """A coin in each element of a plate of three data, of which each run draws some."""
    slopes, weight = parameters(3, (), seed=14)
    x = number([0.3, -1.0, 1.4])

    def model():
        with pyro.plate("data", 3, subsample_size=size) as index:
            z = coin("z", weight)
            pyro.sample("x", dist.Normal(z + weight * z, 1.0), obs=x[index])

    def guide():
        with pyro.plate("data", 3, subsample_size=size) as index:
            coin("z", slopes[index])

    return Problem("drawn subsample", [slopes, weight], model, guide, nesting=1)


class Drawing:
    """A loss whose particles meet the given subsamples, one for each that is drawn."""

    def __init__(self, loss, chosen):
        self.loss, self.chosen, self.left = loss, chosen, []

    def __deepcopy__(self, memo):
        return self

    def differentiable_loss(self, model, guide):
        with Subsample(self.chosen) as given:
            value = copy.deepcopy(self.loss).differentiable_loss(model, guide)
        self.left.append(len(given.chosen))
        return value


def over_drawn_subsamples(problem, loss, size):
    """Expectation over coins, and over one subsample for each particle, all equally likely; and how many were drawn."""
    chosen = list(itertools.product(itertools.permutations(range(3), size), repeat=2))
    total, drawn = [torch.zeros_like(param) for param in problem.params], set()
    for indices in chosen:
        drawing = Drawing(loss, indices)
        for k, part in enumerate(expected_gradient(problem, drawing)):
            total[k] += part / len(chosen)
        drawn |= {2 - left for left in drawing.left}
    return total, drawn


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("size", [1, 2])
def test_the_mean_over_subsamples_is_the_gradient_of_all_data(size, batched):
    problem = subsampled(size)
    loss = loss_for(problem, 2, vectorize_particles=batched)
    gradient, drawn = over_drawn_subsamples(problem, loss, size)
    assert drawn == {1}
    assert distance(gradient, exact_local_gradient(subsampled(3), 2)) < EXACT


def test_a_subsample_for_each_particle_would_be_another_bound(monkeypatch):
    monkeypatch.setattr(particle_loss, "SharedSubsamples", nullcontext)
    problem = subsampled(1)
    gradient, drawn = over_drawn_subsamples(problem, loss_for(problem, 2, vectorize_particles=False), 1)
    assert drawn == {2}
    assert distance(gradient, exact_local_gradient(subsampled(3), 2)) > 1e-3


# ------------------------------------------------------------------------------------------------ what Pyro handles


@pytest.mark.parametrize("num_particles", [2, 3])
def test_a_mask(num_particles):
    problem = problems.masked()
    expected = expected_gradient(problem, loss_for(problem, num_particles, plates=()))
    assert distance(expected, exact_gradient(problem, num_particles)) < EXACT


@pytest.mark.parametrize("make", [problems.single, problems.swapped, local])
def test_a_scale_on_the_whole_program_is_a_scale_on_the_bound(make):
    problem = make()
    scaled = [poutine.scale(program, scale=0.25) for program in (problem.model, problem.guide)]
    both = Problem("scaled", problem.params, *scaled, problem.nesting)
    truth = exact_local_gradient(problem, 2) if make is local else exact_gradient(problem, 2)
    assert distance(expected_gradient(both, loss_for(both, 2)), [0.25 * part for part in truth]) < EXACT


def test_a_scale_on_some_sites_is_refused():
    problem = problems.single()
    model = poutine.scale(problem.model, scale=0.25)
    with pytest.raises(sf.ScorefnError, match="different scales, such as .* use one particle"):
        VIMCO(2, max_plate_nesting=0).loss(model, problem.guide)


def test_a_site_that_is_conditioned_in_the_model_and_hidden_in_the_guide():
    problem = problems.swapped()
    latents = [name for name in poutine.trace(problem.guide).get_trace().nodes if not name.startswith("_")]
    given = {latents[0]: number(1.0)}
    model = poutine.condition(problem.model, data=given)
    guide = poutine.block(poutine.condition(problem.guide, data=given), hide=list(given))
    both = Problem("conditioned", problem.params, model, guide)
    assert distance(expected_gradient(both, loss_for(both, 3)), exact_gradient(both, 3)) < EXACT


def test_inner_latents_share_the_weight_of_the_outer_element():
    """Two plates, of which the inner one does not hold every latent."""
    outer, inner = parameters(2, (1, 2), seed=15)

    def model():
        with pyro.plate("outer", 2, dim=-1):
            u = coin("u", number(-0.5))
            with pyro.plate("inner", 1, dim=-2):
                pyro.sample("x", dist.Normal(coin("v", u + 0.3) + u, 1.0), obs=number([[0.3, -1.0]]))

    def guide():
        with pyro.plate("outer", 2, dim=-1):
            u = coin("u", outer)
            with pyro.plate("inner", 1, dim=-2):
                coin("v", inner - u)

    problem = Problem("nested", [outer, inner], model, guide, nesting=2)
    assert distance(expected_gradient(problem, loss_for(problem, 2)), exact_local_gradient(problem, 2)) < EXACT
    assert loss_for(problem, 2).draws(model, guide).log_prob.shape == (1, 2, 2)


def minibatch(index):
    """A coin for each of three data, of which the given ones are in use."""
    slopes, weight = parameters(3, (), seed=16)
    x = number([0.3, -1.0, 1.4])

    def model():
        with pyro.plate("data", 3, subsample=index):
            z = coin("z", weight)
            pyro.sample("x", dist.Normal(z + weight * z, 1.0), obs=x[index])

    def guide():
        with pyro.plate("data", 3, subsample=index):
            coin("z", slopes[index])

    return Problem("minibatch", [slopes, weight], model, guide, nesting=1)


def test_a_ragged_last_minibatch():
    """One loss serves batches of two and of one; weighed by their sizes they make the gradient of all data."""
    loss = loss_for(minibatch(torch.arange(3)), 2)
    total = [0.0, 0.0]
    for index in (torch.tensor([0, 1]), torch.tensor([2])):
        problem = minibatch(index)
        expected = expected_gradient(problem, loss)
        assert distance(expected, exact_local_gradient(problem, 2, scale=3 / len(index))) < EXACT
        total = [part + len(index) / 3 * more for part, more in zip(total, expected, strict=True)]
    assert distance(total, exact_local_gradient(minibatch(torch.arange(3)), 2)) < EXACT


def test_a_plate_that_does_not_hold_all_is_refused_by_name():
    problem = problems.plate()
    with pytest.raises(sf.ScorefnError, match='each element of the plate "data", because site "g"'):
        loss_for(problem, 2, plates=("data",)).loss(problem.model, problem.guide)


# ------------------------------------------------------------------------------------------------------------ anchor E


def at_noise(fn, noise):
    """The draw of a reparameterised site that standard normal noise makes."""
    base = fn
    while hasattr(base, "base_dist") and not hasattr(base, "transforms"):
        base = base.base_dist
    if hasattr(base, "transforms"):
        value = at_noise(base.base_dist, noise)
        for transform in base.transforms:
            value = transform(value)
        return value
    if isinstance(base, dist.Uniform):
        return base.icdf(Normal(0.0, 1.0).cdf(noise))
    if isinstance(base, RejectionExponential):  # what is accepted, times factor and rate, is Exponential(1 / factor)
        return exponential(noise) * base.factor.detach() / (base.factor * base.rate)
    return exponential(noise) / base.rate if isinstance(base, dist.Exponential) else base.loc + base.scale * noise


def exponential(noise):
    return -torch.special.log_ndtr(-noise)


class Given(Messenger):
    """Prescribes the value of a coin, and the noise of a Normal."""

    def __init__(self, values):
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg):
        if msg["name"] in self.values and not msg["done"]:
            value = self.values[msg["name"]]
            msg["value"] = at_noise(msg["fn"], value) if msg["fn"].has_rsample else value
            msg["done"] = True


def anchor(num_particles, estimate):
    """Mean and variance of the gradient, all K-tuples at once: each is an element of a plate, with its own logit."""
    tuples = number(list(itertools.product([0.0, 1.0], repeat=num_particles))).T
    M = tuples.shape[1]
    logits = torch.full((M,), 0.4, dtype=torch.float64, requires_grad=True)

    def model():
        with pyro.plate("tuples", M):
            z = pyro.sample("z", dist.Bernoulli(number(0.3)))
            pyro.sample("x", dist.Normal(2 * z - 1, number(1.0)), obs=number(0.7).expand(M))

    def guide():
        with pyro.plate("tuples", M):
            coin("z", logits)

    with Given({"z": tuples if num_particles > 1 else tuples[0]}):
        value = estimate(model, guide)
    gradient = torch.autograd.grad(value, logits)[0]
    weight = Bernoulli(logits=number(0.4)).log_prob(tuples).sum(0).exp()
    mean = (weight * gradient).sum()
    return mean.item(), (weight * (gradient - mean).square()).sum().item()


def ours(num_particles, **options):
    loss = VIMCO(num_particles, max_plate_nesting=1, **options)
    return lambda model, guide: -loss.differentiable_loss(model, guide)


GRADIENT = {1: 0.0366883, 2: 0.01810355, 5: 0.00716539}


@pytest.mark.parametrize("num_particles", [1, 2, 5])
@pytest.mark.parametrize("baseline", [None, GeometricMean(), ArithmeticMean()])
def test_anchor_e_gradient(num_particles, baseline):
    assert anchor(num_particles, ours(num_particles, baseline=baseline))[0] == pytest.approx(
        GRADIENT[num_particles], abs=5e-8 if num_particles == 1 else 5e-9
    )


@pytest.mark.parametrize(
    ("num_particles", "baseline", "variance", "unit"),
    [
        (2, None, 2.37897, 1e-5),
        (2, GeometricMean(), 0.12405788, 1e-8),
        (2, ArithmeticMean(), 0.12405788, 1e-8),
        (5, None, 4.41069, 1e-5),
        (5, GeometricMean(), 0.04852573, 1e-8),
        (5, ArithmeticMean(), 0.04872686, 1e-8),
    ],
)
def test_anchor_e_variance(num_particles, baseline, variance, unit):
    published = None if baseline is None else BoundOnly(baseline)
    mean, found = anchor(num_particles, ours(num_particles, baseline=published))
    assert mean == pytest.approx(GRADIENT[num_particles], abs=5.1e-9)
    assert found == pytest.approx(variance, abs=0.51 * unit)


def test_anchor_e_without_the_score_in_the_weights():
    """Centring the score that log w carries as well leaves 1/350 (K = 2) and 1/6,900 (K = 5) of the variance."""
    assert anchor(2, ours(2))[1] == pytest.approx(0.000354309, abs=1e-9)
    assert anchor(5, ours(5))[1] == pytest.approx(6.98745e-6, abs=1e-11)
    assert anchor(5, ours(5, baseline=ArithmeticMean()))[1] == pytest.approx(7.15212e-6, abs=1e-11)


def test_renyi_elbo_does_not_train_a_discrete_guide():
    """Pyro's bound at alpha = 0 has no gradient in the coin's logit; the exact one is not zero."""
    logit = number(0.4).requires_grad_()

    def model():
        observe("x", 2 * pyro.sample("z", dist.Bernoulli(number(0.3))) - 1, 0.7)

    def guide():
        pyro.param("trains", number(1.0))  # without a parameter Pyro does not even call backward
        coin("z", logit)

    problem = Problem("anchor E", [logit], model, guide)
    truth = exact_gradient(problem, 2)
    assert truth[0].item() == pytest.approx(0.01810355, abs=5e-9)
    assert distance(expected_gradient(problem, loss_for(problem, 2)), truth) < EXACT

    def theirs():
        logit.grad = None
        RenyiELBO(0, 2, max_plate_nesting=0).loss_and_grads(model, guide)
        return 0.0 if logit.grad is None else -logit.grad

    assert sum(probability.detach() * gradient for probability, gradient in paths(theirs)) == 0.0


# ------------------------------------------------------------------------------------------------- as Pyro uses it

X = torch.tensor([0.1, 1.2, -0.3])
UNIT = dist.constraints.unit_interval


def coins_model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Bernoulli(pyro.param("prior", torch.tensor(0.3), constraint=UNIT)))
        w = pyro.sample("w", dist.Normal(z, 1.0))
        pyro.sample("x", dist.Normal(w, 1.0), obs=x)


def coins_guide(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Bernoulli(logits=pyro.param("local", torch.zeros(len(x)))))
        pyro.sample("w", dist.Normal(z + pyro.param("loc", torch.zeros(len(x))), 0.8))


def leaves():
    return [pyro.param(name).unconstrained() for name in ("prior", "local", "loc")]


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
