"""Doubly reparameterised gradients of guides that are continuous or mixed: exact by quadrature over the noise."""

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions.testing.rejection_exponential import RejectionExponential
from pyro.infer import RenyiELBO
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal, AutoNormalMessenger
from torch.distributions import Normal

from scorefn.posteriors import VIMCO, DoublyReparameterized, doubly_reparameterized, vimco
from tests.posteriors.problems import number
from tests.posteriors.vimco_cases import Given

X = torch.tensor([0.1, 1.2, -0.3])


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
