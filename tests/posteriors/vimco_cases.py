"""The bound of N particles and its gradient, from the traces of Pyro alone."""

import math

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.testing.rejection_exponential import RejectionExponential
from pyro.poutine.messenger import Messenger
from torch.distributions import Normal

from scorefn.posteriors import VIMCO
from tests.oracles.toys import coordinates
from tests.posteriors.enumeration import Problem, paths
from tests.posteriors.problems import coin, number, parameters

EXACT = 1e-10


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


def joint_paths(problem, num_particles, element=lambda log_prob: log_prob.sum()):
    """Probabilities ``[T]`` and log weights ``[T, N, ...]`` of all tuples of paths of N independent particles."""
    probability, log_w = (torch.stack(part) for part in zip(*paths(lambda: log_ratios(problem, element)), strict=True))
    index = coordinates(*[len(probability)] * num_particles)
    return probability[index].prod(-1), log_w[index]


def exact_gradient(problem, num_particles):
    """Of the bound of N particles, summed over all their joint values."""
    probability, log_w = joint_paths(problem, num_particles)
    total = (probability * (log_w.logsumexp(1) - math.log(num_particles))).sum()
    return list(torch.autograd.grad(total, problem.params, allow_unused=True, materialize_grads=True))


def exact_local_gradient(problem, num_particles, scale=1.0):
    """The same where each element of a plate has a bound of its own, in the last axis of the log weights."""

    def element(log_prob):
        return log_prob.reshape(-1, log_prob.shape[-1]).sum(0) / scale

    probability, log_w = joint_paths(problem, num_particles, element)
    total = (probability * scale * (log_w.logsumexp(1) - math.log(num_particles)).sum(-1)).sum()
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


def masked_to(problem, index):
    """The problem with one element of its plate."""
    keep = torch.arange(2) == index

    def kept(program):
        def run():
            with poutine.mask(mask=keep):
                program()

        return run

    return Problem("one element", problem.params, kept(problem.model), kept(problem.guide), nesting=1)


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
