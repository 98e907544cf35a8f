"""Steps on a bound: the digits' belief net and a mixture, by scorefn, by hand and by Pyro's losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import ELBO, SVI, Trace_ELBO, TraceGraph_ELBO
from torch import Tensor

import scorefn as sf
from applications.benchmarks.contenders.pairs import BATCH, pairs
from applications.benchmarks.elbo import TRAINING, BeliefNet, leave_one_out
from applications.benchmarks.side_by_side.work import Work
from scorefn.posteriors import ScoreFunctionELBO, elbo

LOSSES: dict[str, Callable[..., ELBO]] = {
    "Trace_ELBO": Trace_ELBO,
    "TraceGraph_ELBO": TraceGraph_ELBO,
    "TraceGraph_ELBO, average": TraceGraph_ELBO,
    "ScoreFunctionELBO": ScoreFunctionELBO,
    "ScoreFunctionELBO, average": lambda **options: ScoreFunctionELBO(baseline=sf.MovingAverage(), **options),
}


class Mixture:
    """Points of three normals with known weights: their means are parameters, the assignments are latent."""

    def __init__(self, arrays: dict[str, Tensor], average: bool = False) -> None:
        self.x, self.weights = arrays["points"], arrays["weights"]
        self.initial = {name: arrays[name] for name in ("logits", "means")}
        self.infer = {"baseline": {"use_decaying_avg_baseline": True}} if average else {}

    @property
    def params(self) -> list[Tensor]:
        return [pyro.param("logits").unconstrained()]

    def param(self, name: str) -> Tensor:
        value: Tensor = pyro.param(name, self.initial[name])
        return value

    def model(self) -> None:
        with pyro.plate("data", len(self.x)):
            z = pyro.sample("z", dist.Categorical(self.weights))
            pyro.sample("x", dist.Normal(self.param("means")[z], 1.0), obs=self.x)

    def guide(self) -> None:
        with pyro.plate("data", len(self.x)):
            pyro.sample("z", dist.Categorical(logits=self.param("logits")), infer=self.infer)

    def log_joint(self, z: Tensor) -> Tensor:
        log_prior = torch.distributions.Categorical(self.weights).log_prob(z)
        return log_prior + torch.distributions.Normal(self.param("means")[z], 1.0).log_prob(self.x)

    def plain(self, num_particles: int) -> Callable[[], object]:
        def step() -> None:
            q = torch.distributions.Categorical(logits=self.param("logits"))
            (-elbo(self.log_joint, q, num_particles).sum()).backward()

        return step

    def by_hand(self, num_particles: int) -> Callable[[], object]:
        def step() -> None:
            q = torch.distributions.Categorical(logits=self.param("logits"))
            z = q.sample((num_particles,))
            log_q, log_p = q.log_prob(z), self.log_joint(z)
            (-(leave_one_out((log_p - log_q).detach()) * log_q + log_p).mean(0).sum()).backward()

        return step


def belief_net_data(path: str) -> None:
    """Train a belief net, so that images differ more than particles, and write parameters and images."""
    pyro.enable_validation(False)
    pyro.clear_param_store()
    net = BeliefNet()
    loss = ScoreFunctionELBO(num_particles=16, vectorize_particles=True, max_plate_nesting=2)
    svi = SVI(net.model, net.guide, pyro.optim.Adam({"lr": 0.01}), loss)
    for _ in range(TRAINING):
        net.next()
        svi.step()
    trained = {name: pyro.param(name).detach().numpy() for name in net.initial}
    np.savez(path, images=net.data.numpy(), **trained)


def belief_net(how: str, num_particles: int, data: str) -> Work:
    """A step on a minibatch of digits; ``how``: a loss of ``LOSSES``, plain or loop."""
    arrays = {name: torch.from_numpy(array) for name, array in np.load(data).items()}
    net = BeliefNet(average=how.endswith("average"))
    net.data = arrays.pop("images")
    net.initial = arrays
    return _steps(net, how, num_particles, net.data, BATCH)


def mixture_data(path: str, size: int = 100) -> None:
    """Draw points, and logits of the guide, and write them with the parameters."""
    draws = np.random.default_rng(0)
    means, weights = np.array([-2.0, 0.0, 2.0], np.float32), np.array([0.5, 0.3, 0.2], np.float32)
    points = draws.normal(means[draws.integers(0, 3, size)], 1.0).astype(np.float32)
    np.savez(path, points=points, logits=draws.standard_normal((size, 3), np.float32), means=means, weights=weights)


def mixture(how: str, num_particles: int, data: str) -> Work:
    """A step on all points; ``how`` as for the belief net."""
    arrays = {name: torch.from_numpy(array) for name, array in np.load(data).items()}
    return _steps(Mixture(arrays, average=how.endswith("average")), how, num_particles, arrays["points"], None)


def _steps(problem: Any, how: str, num_particles: int, data: Tensor, batch: int | None) -> Work:
    """Each contender has the parameters to itself, in a store of its own."""
    pyro.enable_validation(False)
    if how in LOSSES:
        together = {"vectorize_particles": True, "max_plate_nesting": 2} if num_particles > 1 else {}
        loss = LOSSES[how](**{"num_particles": num_particles, "max_plate_nesting": 1, **together})
        step = lambda: loss.loss_and_grads(problem.model, problem.guide)  # noqa: E731
    else:
        step = {"plain": problem.plain, "loop": problem.by_hand}[how](num_particles)

    def gradient(x: Tensor) -> np.ndarray:
        problem.x = x
        for value in pyro.get_param_store().values():
            value.unconstrained().grad = None
        step()
        found: np.ndarray = problem.params[0].grad.double().flatten().numpy()
        return found

    with pyro.get_param_store().scope() as store:
        for name in problem.initial:
            problem.param(name)
        work = pairs(data, gradient, batch=batch, learns=how.endswith("average"))
    return Work(_within(store, work.run), _within(store, work.answer))


def _within(store: Any, function: Any) -> Any:
    def call(*arguments: Any) -> Any:
        with pyro.get_param_store().scope(store):
            return function(*arguments)

    return call
