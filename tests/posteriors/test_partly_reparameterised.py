"""Rejection samplers: the pathwise gradient plus the score of the accepted noise, by quadrature over that noise."""

import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.testing.rejection_exponential import RejectionExponential
from pyro.distributions.testing.rejection_gamma import RejectionGamma, RejectionStandardGamma, ShapeAugmentedGamma
from pyro.poutine.messenger import Messenger

import scorefn as sf
from scorefn.posteriors import VIMCO, ScoreFunctionELBO, particle_loss
from tests.posteriors.problems import number

QUADRATURE = 1e-9


def exponential_nodes(fn, thin):
    """x = e / (factor rate); what is accepted has e ~ Exponential(1 / factor). Weights, and what makes values."""
    t = torch.linspace(-30.0, 4.2, 400 // thin, dtype=torch.float64)  # x = exp(t): the trapezoid rule is spectral there
    e = t.exp() * fn.factor.detach()
    weight = (t[1] - t[0]) * (t - t.exp()).exp()

    def place(index, at):
        at = getattr(at, "base_dist", at)  # expanded by the plate
        return e[index] / (at.factor * at.rate)

    return weight, place


def gamma_nodes(fn, thin):
    """x = d (1 + c noise)^3 / rate; accepted, x rate ~ Gamma(concentration, 1)."""
    t, a = torch.linspace(-16.0, 4.2, 300 // thin, dtype=torch.float64), fn.concentration.detach()
    weight = (t[1] - t[0]) * (a * t - t.exp() - torch.lgamma(a)).exp()
    standard = fn if isinstance(fn, RejectionStandardGamma) else fn._standard_gamma
    noise = ((t.exp() / standard._d.detach()) ** (1 / 3) - 1) / standard._c.detach()

    def place(index, at):
        inner = at if isinstance(at, RejectionStandardGamma) else at._standard_gamma
        value = inner._d * (1 + inner._c * noise[index]) ** 3
        return value if inner is at else value / at.rate

    return weight, place


def augmented_nodes(fn, thin):
    """A boosted gamma times u^(1 / concentration), by a product rule; the cache holds what was boosted."""
    weight, boosted = gamma_nodes(fn._rejection_gamma, 3 * thin)
    s = torch.linspace(-3.4, 3.4, 81, dtype=torch.float64)  # the double exponential rule
    u = torch.sigmoid(math.pi * s.sinh())
    inner = (s[1] - s[0]) * math.pi * s.cosh() * u * (1 - u)

    def place(index, at):
        x = boosted(index // len(u), at._rejection_gamma)
        return x * u[index % len(u)] ** (1 / at.concentration), x

    return (weight[:, None] * inner).flatten(), place


class Forced(Messenger):
    """Gives site "z" of each particle in turn its nodes, one for each plate element, and site "y" its coins."""

    def __init__(self, particles, coins=None):
        super().__init__()
        self.particles, self.coins = list(particles), coins

    def _pyro_sample(self, msg):
        if msg["done"] or msg["is_observed"] or msg["name"] not in ("z", "y"):
            return
        value = self.coins if msg["name"] == "y" else self.particles.pop(0)(msg["fn"])
        if isinstance(value, tuple):
            msg["fn"]._unboost_x_cache = value
            value = value[0]
        msg["value"], msg["done"] = value, True


CASES = {
    "exponential": (
        lambda a, b: RejectionExponential(a.exp(), b.sigmoid()),
        lambda a, b: dist.Exponential(a.exp()),
        exponential_nodes,
    ),
    "standard gamma": (
        lambda a, b: RejectionStandardGamma(1.5 + a.exp()),
        lambda a, b: dist.Gamma(1.5 + a.exp(), number(1.0)),
        gamma_nodes,
    ),
    "gamma": (
        lambda a, b: RejectionGamma(1.5 + a.exp(), b.exp()),
        lambda a, b: dist.Gamma(1.5 + a.exp(), b.exp()),
        gamma_nodes,
    ),
    "augmented gamma": (
        lambda a, b: ShapeAugmentedGamma(0.8 * a.exp(), b.exp()),
        lambda a, b: dist.Gamma(0.8 * a.exp(), b.exp()),
        augmented_nodes,
    ),
}
A, B, C = 0.2, -0.3, 0.4


def expected(name, num_particles=1, coin=None, thin=1, pathwise_only=False):
    """Gradient by A, B and C, and value: every node (or pair of them) is an element of one plate, with own parameters.

    The elements of a plate are charged with their own values only, so each has the estimate of a run of its own.
    """
    make, _, nodes = CASES[name]
    weight, place = nodes(make(number([A]), number([B])), thin)
    grid = torch.cartesian_prod(*[torch.arange(len(weight))] * num_particles).reshape(-1, num_particles)
    weights = weight[grid].prod(-1)
    grid, weights = grid[weights > 1e-16], weights[weights > 1e-16]
    size = len(grid)
    a, b, c = params = [number([value] * size).requires_grad_() for value in (A, B, C)]

    def model():
        with pyro.plate("nodes", size):
            z = pyro.sample("z", dist.Gamma(number(2.0), number(1.5)).expand([size]))
            y = 0.0 if coin is None else pyro.sample("y", dist.Bernoulli(logits=number([0.3] * size)))
            pyro.sample("x", dist.Normal(0.5 * z + y, number(1.0)), obs=number([1.2] * size))

    def guide():
        with pyro.plate("nodes", size):
            z = pyro.sample("z", make(a, b))
            if coin is not None:
                pyro.sample("y", dist.Bernoulli(logits=c * z))

    coins = None if coin is None else number([coin] * size)
    loss = ScoreFunctionELBO(num_particles, vectorize_particles=False, max_plate_nesting=1)
    with Forced([partial(place, grid[:, k]) for k in range(num_particles)] * 2, coins):
        value = loss.draws(model, guide).fx.reshape(num_particles, -1, size).sum(1).mean(0)
        estimate = -loss.differentiable_loss(model, guide) if not pathwise_only else value.sum()
    if coin is not None:
        with torch.no_grad():
            with Forced([partial(place, grid[:, 0])]) as forced:
                z = forced.particles[0](make(a, b))
            weights = weights * dist.Bernoulli(logits=c * z).log_prob(coins).exp()
    gradient = torch.autograd.grad(estimate, params, allow_unused=True, materialize_grads=True)
    return (weights * value.detach()).sum(), torch.stack([(weights * g).sum() for g in gradient])


def exact(name, coins=(None,)):
    """The bound by quadrature over x itself, at a density that autograd sees, and its gradient."""
    a, b, c = params = [number(value).requires_grad_() for value in (A, B, C)]
    q = CASES[name][1](a, b)
    t = torch.linspace(-50.0, 5.0, 3000, dtype=torch.float64)
    x, bound = t.exp(), number(0.0)
    for coin in coins:
        log_q, y = q.log_prob(x), number(0.0 if coin is None else coin)
        log_p = dist.Gamma(number(2.0), number(1.5)).log_prob(x)
        log_p = log_p + dist.Normal(0.5 * x + y, number(1.0)).log_prob(number(1.2))
        if coin is not None:
            log_q = log_q + dist.Bernoulli(logits=c * x).log_prob(y)
            log_p = log_p + dist.Bernoulli(logits=number(0.3)).log_prob(y)
        bound = bound + ((t[1] - t[0]) * (t + log_q).exp() * (log_p - log_q)).sum()
    gradient = torch.autograd.grad(bound, params, allow_unused=True, materialize_grads=True)
    return bound.detach(), torch.stack(gradient)


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient(name):
    ours, truth = expected(name), exact(name)
    torch.testing.assert_close(ours, truth, rtol=0, atol=QUADRATURE)
    assert truth[1].abs().max() > 0.01


@pytest.mark.parametrize("name", ["exponential", "gamma"])
def test_two_particles_with_leave_one_out(name):
    torch.testing.assert_close(expected(name, 2, thin=3), exact(name), rtol=0, atol=QUADRATURE)


def test_a_coin_that_depends_on_a_rejection_sample():
    """Both have a score; the coin's runs through the value of the other."""
    value, gradient = (sum(parts) for parts in zip(*(expected("exponential", coin=y) for y in (0.0, 1.0)), strict=True))
    torch.testing.assert_close((value, gradient), exact("exponential", (0.0, 1.0)), rtol=0, atol=QUADRATURE)
    assert gradient.abs().min() > 1e-3 or gradient[1].abs() < QUADRATURE  # the law does not depend on B


def test_the_pathwise_part_alone_would_be_wrong():
    assert (expected("exponential", pathwise_only=True)[1] - exact("exponential")[1]).abs().max() > 0.01


@pytest.mark.parametrize("vectorize", [True, False])
def test_it_runs_in_plates_and_with_particles_together(vectorize):
    with pyro.get_param_store().scope():
        concentration = number([2.0, 3.0]).requires_grad_()

        def model():
            with pyro.plate("data", 2):
                pyro.sample("z", dist.Gamma(number(2.0), number(1.5)))

        def guide():
            with pyro.plate("data", 2):
                pyro.sample("z", RejectionGamma(concentration, number(1.0)))

        loss = ScoreFunctionELBO(3, vectorize_particles=vectorize, max_plate_nesting=1)
        draws = loss.draws(model, guide)
        assert draws.log_prob.shape == (3, 2)
        loss.loss_and_grads(model, guide)
        assert concentration.grad.abs().min() > 0


def test_a_site_that_is_fixed_still_needs_a_gradient_somewhere():
    with pytest.raises(sf.ScorefnError, match="does not require grad"):
        ScoreFunctionELBO(1, vectorize_particles=False).loss_and_grads(
            lambda: pyro.sample("z", dist.Gamma(2.0, 1.0)),
            lambda: pyro.sample("z", RejectionExponential(torch.tensor(1.0), torch.tensor(0.5))),
        )


# ---------------------------------------------------------------------------------------------- hidden by a wrapper

LOG = dist.transforms.ExpTransform().inv


def wrapped(a, b):
    return dist.TransformedDistribution(RejectionExponential(a.exp(), b.sigmoid()), [LOG])


def of_its_own(a, b):
    """The sampler as a site, and its logarithm with the density that the change of variables gives it."""
    x = pyro.sample("x", RejectionExponential(a.exp(), b.sigmoid()), infer={"is_auxiliary": True})
    return dist.Delta(x.log(), log_density=x.log())


def in_the_logarithm(make):
    """Value and gradient by A and B of the loss of one particle, for a guide that samples the logarithm of a rejection
    sample: every node is an element of one plate."""
    t = torch.linspace(-30.0, 4.2, 400, dtype=torch.float64)
    size, factor = len(t), number(B).sigmoid()
    a, b = params = [number([value] * size).requires_grad_() for value in (A, B)]
    weights = (t[1] - t[0]) * (t - t.exp()).exp()

    class Given(Messenger):
        def _pyro_sample(self, msg):
            fn = getattr(msg["fn"], "base_dist", msg["fn"])
            if isinstance(fn, RejectionExponential) and not msg["done"]:
                x = t.exp() * factor / (fn.factor * fn.rate)
                msg["value"], msg["done"] = (x if msg["name"] == "x" else x.log()), True

    def model():
        with pyro.plate("nodes", size):
            z = pyro.sample("z", dist.Normal(number([0.1] * size), 1.0))
            pyro.sample("y", dist.Normal(0.5 * z, 1.0), obs=number([1.2] * size))

    def guide():
        with pyro.plate("nodes", size):
            pyro.sample("z", make(a, b))

    with Given():
        loss = ScoreFunctionELBO(1, max_plate_nesting=1)
        estimate = -loss.differentiable_loss(model, guide)
        log_ratio = loss.draws(model, guide).fx.reshape(-1, size).sum(0) if make is not wrapped else weights * 0
    gradient = torch.autograd.grad(estimate, params, allow_unused=True, materialize_grads=True)
    return (weights * log_ratio.detach()).sum(), torch.stack([(weights * g).sum() for g in gradient])


def exact_in_the_logarithm():
    params = [number(value).requires_grad_() for value in (A, B)]
    z = torch.linspace(-40.0, 5.0, 3000, dtype=torch.float64)
    log_q = dist.Exponential(params[0].exp()).log_prob(z.exp()) + z
    log_p = dist.Normal(number(0.1), 1.0).log_prob(z) + dist.Normal(0.5 * z, 1.0).log_prob(number(1.2))
    bound = ((z[1] - z[0]) * log_q.exp() * (log_p - log_q)).sum()
    return bound.detach(), torch.stack(torch.autograd.grad(bound, params, allow_unused=True, materialize_grads=True))


def test_the_repair_of_a_transformed_rejection_sampler_is_exact():
    torch.testing.assert_close(in_the_logarithm(of_its_own), exact_in_the_logarithm(), rtol=0, atol=QUADRATURE)


def test_a_transformed_rejection_sampler_would_be_wrong(monkeypatch):
    """Pyro's score parts of the wrapper are those of a site that is fully reparameterised."""
    monkeypatch.setattr(particle_loss, "refuse_hidden_samplers", lambda trace: None)
    error = in_the_logarithm(wrapped)[1] - exact_in_the_logarithm()[1]
    assert error.abs().max() > 0.1


CONCENTRATION = number([2.0, 3.0]).requires_grad_()
HIDING = {
    "TransformedDistribution": lambda fn: dist.TransformedDistribution(fn, [LOG]),
    "Independent": lambda fn: fn.to_event(1),
    "Independent masked": lambda fn: fn.to_event(1).mask(torch.tensor(True)),
    "TransformedDistribution of an Independent": lambda fn: dist.TransformedDistribution(fn.to_event(1), [LOG]),
    "Independent expanded": lambda fn: fn.to_event(1).expand([4]),
}


@pytest.mark.parametrize("loss", [ScoreFunctionELBO, VIMCO])
@pytest.mark.parametrize("hide", HIDING)
def test_a_rejection_sampler_inside_a_wrapper_is_refused(loss, hide):
    def program():
        pyro.sample("z", HIDING[hide](RejectionGamma(CONCENTRATION, number([1.0, 1.0]))))

    message = (
        r'Guide site "z" is an? (Independent|TransformedDistribution) over RejectionGamma, .* as a site of its own'
    )
    with pytest.raises(sf.ScorefnError, match=message):
        loss(2, max_plate_nesting=1).loss_and_grads(program, program)
    assert CONCENTRATION.grad is None


def test_wrappers_that_hide_nothing_are_fine():
    def program():
        with pyro.plate("data", 2):
            pyro.sample("expanded", RejectionGamma(CONCENTRATION[0], number(1.0)))
            pyro.sample("masked", RejectionGamma(CONCENTRATION, number([1.0, 1.0])).mask(torch.tensor([True, False])))
        pyro.sample("gamma", dist.Gamma(CONCENTRATION, 1.0).to_event(1))
        pyro.sample("logarithm", dist.TransformedDistribution(dist.Gamma(CONCENTRATION, 1.0).to_event(1), [LOG]))

    for loss in (ScoreFunctionELBO(2, max_plate_nesting=1), VIMCO(2, max_plate_nesting=1)):
        assert torch.isfinite(loss.differentiable_loss(program, program))
