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
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal, AutoNormalMessenger
from pyro.poutine.messenger import Messenger
from torch.distributions import Bernoulli, Categorical, Normal

import scorefn as sf
from scorefn.posteriors import (
    VIMCO,
    ArithmeticMean,
    BoundOnly,
    DoublyReparameterized,
    GeometricMean,
    doubly_reparameterized,
    importance_weighted_elbo,
    particle_loss,
    vimco,
)
from scorefn.posteriors.importance_weighted import without_each
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


# ---------------------------------------------------------------------------- reparameterised and mixed, by quadrature


def grid(num_noises, points, reach):
    """Nodes ``[num_noises, M]`` and weights ``[M]`` of the trapezoid rule for standard normal noise."""
    line = torch.linspace(-reach, reach, points, dtype=torch.float64)
    weight = Normal(number(0.0), number(1.0)).log_prob(line).exp() * (line[1] - line[0])
    nodes = torch.cartesian_prod(*[line] * num_noises).T if num_noises > 1 else line[None]
    weights = torch.cartesian_prod(*[weight] * num_noises).T if num_noises > 1 else weight[None]
    return nodes, weights.prod(0)


def quadrature(program, params, num_particles, points, reach=8.0, **options):
    """Mean and variance of the loss's gradient in each parameter, and the exact gradient of the bound.

    Every node is an element of a plate and has parameters of its own.
    """
    noises, coins = program.noises, program.coins
    nodes, weight = grid(len(noises) * num_particles, points, reach)
    tables = number(list(itertools.product([0.0, 1.0], repeat=len(coins) * num_particles))).T
    M, C = nodes.shape[1], max(tables.shape[1], 1)
    nodes, weight = nodes.repeat(1, C), weight.repeat(C)
    values = {name: nodes[i * num_particles : (i + 1) * num_particles] for i, name in enumerate(noises)}
    if coins:
        tables = tables.repeat_interleave(M, 1)
        values |= {name: tables[i * num_particles : (i + 1) * num_particles] for i, name in enumerate(coins)}
    own = {name: number(value).expand(M * C).clone().requires_grad_() for name, value in params.items()}

    def run(part):
        def inside():
            with pyro.plate("nodes", M * C):
                part(own)

        return inside

    loss = VIMCO(num_particles, max_plate_nesting=1, **options)
    with Given({name: value if num_particles > 1 else value[0] for name, value in values.items()}):
        estimate = torch.autograd.grad(
            -loss.differentiable_loss(run(program.model), run(program.guide)), [*own.values()]
        )

    log_q, log_w = 0.0, 0.0
    with poutine.trace() as guide_trace, Given(values), pyro.plate("particles", num_particles, dim=-2):
        run(getattr(program, "reference", program.guide))()
    particles = pyro.plate("particles", num_particles, dim=-2)
    with poutine.trace() as model_trace, poutine.replay(trace=guide_trace.trace), particles:
        run(program.model)()
    for sign, trace in ((1, model_trace.trace), (-1, guide_trace.trace)):
        trace.compute_log_prob()
        for name, site in trace.nodes.items():
            if site["type"] == "sample" and type(site["fn"]).__name__ != "_Subsample":
                log_w = log_w + sign * site["log_prob"]
                if sign < 0 and name in coins:
                    log_q = log_q + site["log_prob"].sum(0)
    probability = weight * (log_q.exp() if coins else 1.0)
    bound = log_w.logsumexp(0) - math.log(num_particles)
    exact = torch.autograd.grad((probability * bound).sum(), [*own.values()], materialize_grads=True)
    mass = probability.detach()
    means = [(mass * g).sum() for g in estimate]
    variances = [(mass * (g - m).square()).sum() for g, m in zip(estimate, means, strict=True)]
    return torch.stack(means), torch.stack(variances), torch.stack([g.sum() for g in exact])


class Gaussian:
    noises, coins = ["z"], []

    @staticmethod
    def model(own):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(own["weight"] * z, 1.0), obs=number(0.9))

    @staticmethod
    def guide(own):
        pyro.sample("z", dist.Normal(own["loc"], own["log_scale"].exp()))


class Hierarchical:
    """The second latent reads the first, in model and guide."""

    noises, coins = ["z", "y"], []

    @staticmethod
    def model(own):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        y = pyro.sample("y", dist.Normal(own["weight"] * z, 1.0))
        pyro.sample("x", dist.Normal(y, 1.0), obs=number(0.9))

    @staticmethod
    def guide(own):
        z = pyro.sample("z", dist.Normal(own["loc"], own["log_scale"].exp()))
        pyro.sample("y", dist.Normal(own["loc"] * z + 0.3, own["log_scale"].exp()))


class Mixed:
    """A coin between two reparameterised draws, each reads what came before."""

    noises, coins = ["w", "y"], ["b"]

    @staticmethod
    def model(own):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Bernoulli(logits=own["weight"] * w))
        y = pyro.sample("y", dist.Normal(b - 0.5, 1.0))
        pyro.sample("x", dist.Normal(0.5 * y + own["weight"] * b, 1.0), obs=number(0.7))

    @staticmethod
    def guide(own):
        w = pyro.sample("w", dist.Normal(own["loc"], own["log_scale"].exp()))
        b = pyro.sample("b", dist.Bernoulli(logits=own["logit"] + 0.6 * w))
        pyro.sample("y", dist.Normal(own["loc"] * b + 0.2 * w, own["log_scale"].exp()))


class BeforeCoin(Mixed):
    """Only the draw before the coin; and an observed site before both."""

    noises, coins = ["w"], ["b"]

    @staticmethod
    def model(own):
        pyro.sample("before", dist.Normal(own["weight"], 1.0), obs=number(0.2))
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Bernoulli(logits=own["weight"] * w))
        pyro.sample("x", dist.Normal(own["weight"] * b + 0.4 * w, 1.0), obs=number(0.7))

    @staticmethod
    def guide(own):
        w = pyro.sample("w", dist.Normal(own["loc"], own["log_scale"].exp()))
        pyro.sample("b", dist.Bernoulli(logits=own["logit"] + own["loc"] * w))


class Masked(Gaussian):
    """log w has no log q: its score cannot be traded for a path."""

    @staticmethod
    def guide(own):
        with poutine.mask(mask=torch.tensor(False)):
            Gaussian.guide(own)


class MaskedDistribution(Gaussian):
    @staticmethod
    def guide(own):
        pyro.sample("z", dist.Normal(own["loc"], own["log_scale"].exp()).mask(torch.tensor(False)))


class Pushed(Gaussian):
    """An auxiliary draw and a Delta that moves it, with a parameter of its own: as Pyro's autoguides do."""

    noises = ["u"]

    @staticmethod
    def guide(own):
        u = pyro.sample("u", dist.Normal(own["loc"], 1.0), infer={"is_auxiliary": True})
        density = (-own["log_scale"]).expand(u.shape)
        pyro.sample("z", dist.Delta(own["log_scale"].exp() * u + own["loc"], log_density=density))


class Chained(Gaussian):
    """A chain of transforms, whose density need not have an inverse."""

    @staticmethod
    def guide(own):
        base = dist.Normal(own["loc"], own["log_scale"].exp())
        pyro.sample("z", dist.TransformedDistribution(base, [dist.transforms.AffineTransform(0.1, 1.5)]))


class Rejection(Gaussian):
    """A rejection sampler, with a score besides its path; the truth is that of the density which it samples."""

    @staticmethod
    def guide(own):
        pyro.sample("z", RejectionExponential(own["loc"].exp(), own["log_scale"].sigmoid()))

    @staticmethod
    def reference(own):
        pyro.sample("z", dist.Exponential(own["loc"].exp()))


class MovingSupport(Gaussian):
    """A uniform guide whose end moves: the identity of the score does not hold at all."""

    @staticmethod
    def guide(own):
        pyro.sample("z", dist.Uniform(own["loc"] - 2, own["log_scale"] + 2))


PARAMS = {"loc": 0.4, "log_scale": -0.1, "weight": 0.7}
WITH_COIN = {**PARAMS, "logit": 0.3}
CONTINUOUS = [
    (Gaussian, PARAMS, 1, 161),
    (Gaussian, PARAMS, 2, 121),
    (Gaussian, PARAMS, 3, 41),
    (Hierarchical, PARAMS, 1, 121),
    (Hierarchical, PARAMS, 2, 33),
    (BeforeCoin, WITH_COIN, 1, 161),
    (BeforeCoin, WITH_COIN, 2, 81),
    (Mixed, WITH_COIN, 2, 21),
    (Masked, PARAMS, 2, 121),
    (MaskedDistribution, PARAMS, 2, 121),
    (Pushed, PARAMS, 2, 121),
    (Chained, PARAMS, 2, 121),
    (MovingSupport, PARAMS, 2, 121),
    (Rejection, PARAMS, 2, 121),
]


@pytest.mark.parametrize("pathwise", [None, DoublyReparameterized()])
@pytest.mark.parametrize(("program", "params", "num_particles", "points"), CONTINUOUS)
def test_continuous_and_mixed(program, params, num_particles, points, pathwise):
    mean, _, exact = quadrature(program, params, num_particles, points, pathwise=pathwise)
    assert (mean - exact).abs().max() < 1e-8


def test_doubly_reparameterised_has_less_variance():
    """The exact variances of the Gaussian toy; the model's gradient is the same. [loc, log scale, weight]"""
    params = {"loc": 0.3, "log_scale": -0.2, "weight": 0.7}
    for num_particles, points in ((1, 161), (2, 121), (3, 45)):
        _, plain, _ = quadrature(Gaussian, params, num_particles, points, pathwise=None)
        _, doubly, _ = quadrature(Gaussian, params, num_particles, points)
        assert doubly[0] < 1e-5 * plain[0]  # the scale is nearly the posterior's: its path has little noise left
        assert doubly[1] < 0.012 * plain[1]
        assert (doubly[2] - plain[2]).abs() < 1e-12


class InTurn(Given):
    """Prescribes the values of one run after the other; each begins with the site "w"."""

    def __init__(self, runs):
        super().__init__({})
        self.runs = iter(runs)

    def _pyro_sample(self, msg):
        if msg["name"] == "w" and not msg["done"]:
            self.values = next(self.runs)
        super()._pyro_sample(msg)


@pytest.mark.parametrize("pathwise", [None, DoublyReparameterized()])
def test_one_after_the_other_has_the_gradient_of_all_together(pathwise):
    """Draw by draw: the same noise and coins, together and in two runs."""
    noise = {"w": number([0.4, -1.1]), "b": number([1.0, 0.0]), "y": number([-0.3, 0.8])}
    own = {name: number(value).requires_grad_() for name, value in WITH_COIN.items()}
    results = []
    for runs in ([noise], [{name: value[n] for name, value in noise.items()} for n in range(2)]):
        loss = VIMCO(2, max_plate_nesting=0, vectorize_particles=len(runs) == 1, pathwise=pathwise)
        with InTurn(runs):
            value = loss.differentiable_loss(lambda: Mixed.model(own), lambda: Mixed.guide(own))
        results.append([value, *torch.autograd.grad(value, [*own.values()])])
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-14)


@pytest.mark.parametrize("program", [Masked, MaskedDistribution, Pushed, MovingSupport, Rejection])
def test_sites_without_the_identity_are_left_alone(program, monkeypatch):
    """Cut all the same, each of them would be wrong, visibly."""
    monkeypatch.setattr(doubly_reparameterized, "_allows", lambda site: site["fn"].has_rsample)
    mean, _, exact = quadrature(program, PARAMS, 2, 121)
    assert (mean - exact).abs().max() > 1e-3


@pytest.mark.parametrize("automatic", [AutoNormal, AutoDelta, AutoMultivariateNormal, AutoNormalMessenger])
def test_automatic_guides(automatic):
    """Without discrete sites Pyro's bound at alpha = 0 is right, so that ours must be the same, draw by draw."""

    def model(x):
        m = pyro.sample("m", dist.Normal(0.0, 2.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(m, pyro.param("s", torch.tensor(1.0))), obs=x)

    guide = automatic(model)
    options = {"num_particles": 3, "vectorize_particles": True, "max_plate_nesting": 1}
    guide(X)
    parameters = [*guide.parameters(), pyro.param("s").unconstrained()]
    results = []
    for loss in (RenyiELBO(alpha=0, **options), VIMCO(**options, pathwise=None), VIMCO(**options)):
        for parameter in parameters:
            parameter.grad = None
        pyro.set_rng_seed(4)
        value = loss.loss_and_grads(model, guide, X)
        results.append((torch.tensor(value), *(parameter.grad.clone() for parameter in parameters)))
    torch.testing.assert_close(results[1], results[0])
    torch.testing.assert_close(results[2][0], results[0][0])
    torch.testing.assert_close(results[2][-1], results[0][-1])  # the model's parameter
    if automatic is AutoDelta:
        torch.testing.assert_close(results[2], results[0])


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


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("num_particles", [1, 4])
def test_the_three_losses_agree(num_particles, vectorize):
    loss = VIMCO(num_particles, vectorize_particles=vectorize, max_plate_nesting=1)
    pyro.set_rng_seed(1)
    value = loss.differentiable_loss(coins_model, coins_guide, X)
    expected = torch.autograd.grad(value, leaves())
    pyro.set_rng_seed(1)
    assert loss.loss(coins_model, coins_guide, X) == value.item()
    assert all(leaf.grad is None for leaf in leaves())
    pyro.set_rng_seed(1)
    assert loss.loss_and_grads(coins_model, coins_guide, X) == value.item()
    torch.testing.assert_close(tuple(leaf.grad for leaf in leaves()), expected)


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


def test_it_serves_as_a_module():
    class Guide(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.logit = torch.nn.Parameter(torch.tensor(0.3))

        def forward(self):
            pyro.sample("z", dist.Bernoulli(logits=pyro.module("guide", self).logit))

    class Model(torch.nn.Module):
        def forward(self):
            z = pyro.sample("z", dist.Bernoulli(0.3))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(0.7))

    guide = Guide()
    VIMCO(4)(Model(), guide)().backward()
    assert guide.logit.grad is not None


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


def test_control_flow_in_batches_says_what_to_do():
    problem = problems.leak()
    with pytest.raises(RuntimeError) as caught:
        VIMCO(3, max_plate_nesting=0).loss(problem.model, problem.guide)
    assert "VIMCO ran 3 particles together" in caught.value.__notes__[0]


# ----------------------------------------------------------------------------------------------------- extreme weights


def brute_force(log_w, mean):
    """Bound and share without each particle, one after the other."""
    N = len(log_w)
    bound, share = torch.zeros_like(log_w), torch.ones_like(log_w)
    for n in range(N):
        others = torch.cat([log_w[:n], log_w[n + 1 :]])
        replaced = torch.cat([others, mean(others)[None]])
        if (replaced > -torch.inf).any():
            bound[n] = replaced.logsumexp(0) - math.log(N)
            share[n] = replaced.softmax(0)[-1]
    return bound, share


EXTREME = [
    [0.3, -1.2, 0.8, 0.1],
    [1e4, 0.0, -3.0, 2.0],
    [-1e4, -1e4 - 1, -1e4 + 2],
    [-torch.inf, 0.5, 0.2],
    [-torch.inf, -torch.inf, 0.2],
    [-torch.inf, 1e5, -1e5, -torch.inf],
    [0.7, 0.2],
    [-torch.inf, 0.2],
    [0.7],
]


@pytest.mark.parametrize("log_w", EXTREME)
def test_the_bound_without_each_particle(log_w):
    log_w = number(log_w)
    for baseline, mean in (
        (GeometricMean(), lambda others: others.mean() if len(others) else number(-torch.inf)),
        (ArithmeticMean(), lambda others: others.logsumexp(0) - math.log(max(len(others), 1))),
    ):
        for ours, truth in zip(without_each(log_w, baseline), brute_force(log_w, mean), strict=True):
            digits = (
                1e-15 * log_w[log_w.isfinite()].abs().max().item()
            )  # a logarithm of 1e4 has twelve behind its point
            torch.testing.assert_close(ours, truth, rtol=0, atol=1e-15 + 10 * digits)
            assert ours.isfinite().all()


def test_a_dominating_weight_leaves_the_others_their_digits():
    """Taking 1e8 off a sum in single precision would leave nothing of the other weights."""
    log_w = torch.tensor([1e8, 0.3, -0.4, 0.9])
    bound, _ = without_each(log_w, GeometricMean())
    torch.testing.assert_close(bound[0], brute_force(log_w, torch.mean)[0][0])


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
        pytest.raises(sf.NonFiniteError, match=r"1 of 3 particles, namely \[1\]"),
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

    with pytest.raises(sf.ScorefnError, match="does not require grad"):
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


def test_weights_squared_without_the_score_of_later_coins(monkeypatch):
    """A draw before a coin also moves the coin's probability: without that term the doubly reparameterised is wrong."""
    original = VIMCO._path_term

    def without_score(self, pathwise, runs, weights, without, share):
        silent = vimco._Run.sums
        monkeypatch.setattr(vimco._Run, "sums", lambda *args, **options: (None, silent(*args, **options)[1]))
        return original(self, pathwise, runs, weights, without, share)

    monkeypatch.setattr(VIMCO, "_path_term", without_score)
    mean, _, exact = quadrature(BeforeCoin, WITH_COIN, 2, 81)
    assert (mean - exact).abs().max() > 1e-3


# --------------------------------------------------------------------------------------------------------- plain torch

TABLE = number([0.2, -0.7, 1.1])


class Prescribed(Categorical):
    """Returns given draws instead of sampling."""

    def __init__(self, logits, given):
        super().__init__(logits=logits)
        self.given = given

    def sample(self, sample_shape=torch.Size()):  # noqa: B008
        return self.given


@pytest.mark.parametrize("baseline", [GeometricMean(), ArithmeticMean(), BoundOnly(), None])
@pytest.mark.parametrize("num_samples", [1, 2, 3])
def test_plain_bound_over_all_draws(num_samples, baseline):
    """Every tuple is a problem of its own, with parameters of its own."""
    tuples = torch.cartesian_prod(*[torch.arange(3)] * num_samples).reshape(-1, num_samples).T
    M = tuples.shape[1]
    logits = number([0.3, -0.2, 0.9]).expand(M, 3).clone().requires_grad_()
    scale = number(0.8).expand(M).clone().requires_grad_()
    estimate = importance_weighted_elbo(
        lambda z: scale * TABLE[z], Prescribed(logits, tuples), num_samples, baseline=baseline
    )
    assert estimate.shape == (M,)
    gradient = torch.autograd.grad(estimate.sum(), [logits, scale])
    log_q = Categorical(logits=logits).log_prob(tuples)
    probability = log_q.sum(0).exp()
    bound = (scale * TABLE[tuples] - log_q).logsumexp(0) - math.log(num_samples)
    exact = torch.autograd.grad((probability * bound).sum(), [logits, scale])
    torch.testing.assert_close(estimate, bound, rtol=0, atol=1e-14)
    for ours, truth in zip(gradient, exact, strict=True):
        mean = (probability.reshape(-1, *[1] * (ours.ndim - 1)) * ours).sum(0)
        torch.testing.assert_close(mean, truth.sum(0), rtol=0, atol=EXACT)


def test_plain_bound_of_problems_and_black_boxes():
    logits = torch.zeros(4, 5, requires_grad=True)
    assert importance_weighted_elbo(lambda z: z.sum(-1), Bernoulli(logits=logits), 8).shape == (4,)
    assert importance_weighted_elbo(lambda z: z.sum((-1, -2)), Bernoulli(logits=logits), 8).shape == ()
    mean = torch.zeros((), requires_grad=True)
    importance_weighted_elbo(lambda z: -(z.numpy() ** 2) / 2, Normal(mean, 1.0), 16).backward()
    assert mean.grad is not None


def test_plain_bound_with_impossible_draws():
    logits = torch.zeros(3, requires_grad=True)
    table = torch.tensor([0.0, -torch.inf, 1.0])
    importance_weighted_elbo(lambda z: table[z], Prescribed(logits, torch.tensor([0, 1, 1])), 3).backward()
    assert logits.grad.isfinite().all()
    with pytest.raises(sf.NonFiniteError, match="All 2 particles have weight 0"):
        importance_weighted_elbo(lambda z: table[z], Prescribed(logits, torch.tensor([1, 1])), 2)
    several = torch.zeros(2, 3, requires_grad=True)
    with pytest.raises(sf.NonFiniteError, match=r"in 1 of 2 problems, namely \[1\]"):
        importance_weighted_elbo(lambda z: table[z], Prescribed(several, torch.tensor([[1, 1], [2, 1]])), 2)


@pytest.mark.parametrize("log_joint", [lambda z: z.sum(), lambda z: z.sum(-1, keepdim=True), lambda z: z.sum(0)])
def test_plain_shapes_are_refused_never_repaired(log_joint):
    with pytest.raises(sf.ShapeError, match="log_joint returned shape"):
        importance_weighted_elbo(log_joint, Bernoulli(logits=torch.zeros(4, 5, requires_grad=True)), 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"num_samples": 0}, "integer of at least 1"), ({"num_samples": 2, "baseline": sf.LeaveOneOut()}, "are one draw")],
)
def test_plain_arguments_are_refused(options, message):
    with pytest.raises(sf.ScorefnError, match=message):
        importance_weighted_elbo(lambda z: z, Bernoulli(logits=torch.zeros(4, requires_grad=True)), **options)


def test_a_bound_that_wraps_no_baseline_is_refused():
    with pytest.raises(sf.ScorefnError, match="are one draw"):
        BoundOnly(None)
