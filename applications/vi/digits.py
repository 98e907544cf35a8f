"""A sigmoid belief net on scikit-learn's digits, trained by score functions and compared with its exact posterior.

Ten Bernoulli latents for each image, an amortised guide, and a model that is small enough to know everything: all 1024
states of an image can be summed, so the evidence, the bound, the posterior and the gradient are exact. Run it with::

    python -m applications.vi.digits --steps 2000

The pieces (``load``, ``fit``, ``compare``, ``gradient_table``) are meant to be imported and copied.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import ELBO, SVI, Trace_ELBO, TraceGraph_ELBO
from sklearn.datasets import load_digits
from torch import Tensor, nn

from scorefn import MovingAverage
from scorefn.posteriors import ScoreFunctionELBO

LATENTS = 10
PIXELS = 64
BATCH = 100
TRAIN = 1500


def load() -> tuple[Tensor, Tensor]:
    """1500 images to train on and 297 to test on, 8x8 pixels, 1 where the grey level is at least 8."""
    images = torch.as_tensor(load_digits().data >= 8, dtype=torch.get_default_dtype())
    images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]
    return images[:TRAIN], images[TRAIN:]


class Generator(nn.Module):
    """p(z) p(x | z): a prior logit for each latent and one linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.prior = nn.Parameter(torch.zeros(LATENTS))
        self.decoder = nn.Linear(LATENTS, PIXELS)


class BeliefNet:
    """The model and its guide, as Pyro programs, and everything about them in closed form."""

    def __init__(self, num_images: int) -> None:
        self.num_images = num_images
        self.generator = Generator()
        self.encoder = nn.Sequential(nn.Linear(PIXELS, 64), nn.Tanh(), nn.Linear(64, LATENTS))

    def model(self, images: Tensor) -> None:
        """Latents z and pixels x of a minibatch that stands for all images."""
        generator = pyro.module("generator", self.generator)
        with pyro.plate("images", self.num_images, subsample_size=len(images), dim=-1):
            z = pyro.sample("z", dist.Bernoulli(logits=generator.prior).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=generator.decoder(z)).to_event(1), obs=images)

    def guide(self, images: Tensor, infer: dict[str, Any] | None = None) -> None:
        """q(z | x), independent bits."""
        encoder = pyro.module("encoder", self.encoder)
        with pyro.plate("images", self.num_images, subsample_size=len(images), dim=-1):
            pyro.sample("z", dist.Bernoulli(logits=encoder(images)).to_event(1), infer=infer)

    def log_joint(self, images: Tensor) -> Tensor:
        """log p(x, z) of every state z, ``[images, 1024]``."""
        z = states()
        logits = self.generator.decoder(z)
        prior = log_bernoulli(self.generator.prior, z).sum(-1)
        return images @ logits.T - nn.functional.softplus(logits).sum(-1) + prior

    def log_guide(self, images: Tensor) -> Tensor:
        """log q(z | x) of every state z, ``[images, 1024]``."""
        logits = self.encoder(images)
        return logits @ states().T - nn.functional.softplus(logits).sum(-1, keepdim=True)

    def exact_bound(self, images: Tensor) -> Tensor:
        """The ELBO of each image by summing over all states, ``[images]``, differentiable."""
        log_q = self.log_guide(images)
        return (log_q.exp() * (self.log_joint(images) - log_q)).sum(-1)

    def parameters(self) -> list[nn.Parameter]:
        return [*self.generator.parameters(), *self.encoder.parameters()]


def states() -> Tensor:
    """All states of the latents, ``[1024, 10]``."""
    return torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * LATENTS).to(torch.get_default_dtype())


def log_bernoulli(logits: Tensor, z: Tensor) -> Tensor:
    """Elementwise log-probability."""
    return z * logits - nn.functional.softplus(logits)


@dataclass(frozen=True)
class Progress:
    """Where a fit stands; ``bound`` is the mean estimate per image since the last report."""

    step: int
    steps: int
    bound: float
    seconds: float


@dataclass(frozen=True)
class Fit:
    """A trained net, the images, and the bound on the way."""

    net: BeliefNet
    train: Tensor
    test: Tensor
    curve: list[Progress]

    @property
    def seconds(self) -> float:
        """CPU time of the training."""
        return self.curve[-1].seconds


def minibatches(images: Tensor, seed: int) -> Iterator[Tensor]:
    """Without end: shuffled epochs in batches of 100."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for index in torch.randperm(len(images), generator=generator).split(BATCH):
            yield images[index]


def fit(
    seed: int = 0,
    steps: int = 2000,
    progress: Callable[[Progress], None] | None = None,
    *,
    particles: int = 8,
    exact: bool = False,
    learning_rate: float = 2e-3,
) -> Fit:
    """Train model and guide together, by Adam on batches of 100.

    Args:
        seed: of the initial weights, the batches and the particles.
        steps: number of Adam steps.
        progress: called 50 times on the way.
        particles: N of ScoreFunctionELBO.
        exact: follow the exact gradient instead, by summing over all states: the best that an estimator can do.
        learning_rate: of Adam.
    """
    pyro.set_rng_seed(seed)
    train, test = load()
    net, batches, curve = BeliefNet(len(train)), minibatches(train, seed), list[Progress]()
    every, total, begin = max(1, steps // 50), 0.0, time.process_time()
    with pyro.get_param_store().scope():
        step = exact_step(net, learning_rate) if exact else svi_step(net, learning_rate, particles)
        for number in range(1, steps + 1):
            total += step(next(batches))
            if number % every == 0 or number == steps:
                since = number - (curve[-1].step if curve else 0)
                curve.append(Progress(number, steps, total / since, time.process_time() - begin))
                total = 0.0
                if progress is not None:
                    progress(curve[-1])
    return Fit(net, train, test, curve)


def svi_step(net: BeliefNet, learning_rate: float, particles: int) -> Callable[[Tensor], float]:
    """One step of Pyro's SVI; the only line that is not Pyro's is the loss."""
    svi = SVI(
        net.model,
        net.guide,
        pyro.optim.Adam({"lr": learning_rate}),
        loss=ScoreFunctionELBO(num_particles=particles, max_plate_nesting=1),
    )
    return lambda images: -svi.step(images) / net.num_images


def exact_step(net: BeliefNet, learning_rate: float) -> Callable[[Tensor], float]:
    """The same step without sampling."""
    optimiser = torch.optim.Adam(net.parameters(), lr=learning_rate)

    def step(images: Tensor) -> float:
        optimiser.zero_grad()
        bound = net.exact_bound(images).mean()
        (-bound).backward()
        optimiser.step()
        return bound.item()

    return step


@dataclass(frozen=True)
class Comparison:
    """The guide against the exact posterior, in nats per image; a marginal is P(z_i = 1 | x)."""

    log_evidence: float
    bound: float
    largest_marginal_difference: float
    mean_marginal_difference: float

    @property
    def gap(self) -> float:
        """KL(q || posterior): what the guide loses."""
        return self.log_evidence - self.bound


@torch.no_grad()
def marginals(net: BeliefNet, images: Tensor) -> tuple[Tensor, Tensor]:
    """P(z_i = 1 | x) of the exact posterior and of the guide, both ``[images, 10]``."""
    return net.log_joint(images).softmax(-1) @ states(), net.encoder(images).sigmoid()


@torch.no_grad()
def compare(net: BeliefNet, images: Tensor) -> Comparison:
    """By enumeration of the 1024 states of every image."""
    posterior, guide = marginals(net, images)
    difference = (posterior - guide).abs()
    return Comparison(
        net.log_joint(images).logsumexp(-1).mean().item(),
        net.exact_bound(images).mean().item(),
        difference.max().item(),
        difference.mean().item(),
    )


@dataclass(frozen=True)
class GradientRow:
    """An estimator of the encoder's gradient on batches of 100, in nats per image.

    Args:
        name: of the loss.
        particles: N.
        variance: total over the encoder's parameters, about the exact gradient of the same batch.
        error: length of the mean deviation from the exact gradient, in its own standard errors; about 1 if unbiased.
        milliseconds: CPU time of one ``loss_and_grads``, median.
    """

    name: str
    particles: int
    variance: float
    error: float
    milliseconds: float


AVERAGE = "Pyro TraceGraph_ELBO, decaying average"
LOSSES: dict[str, Callable[[int], ELBO]] = {
    "ScoreFunctionELBO, leave-one-out": lambda n: ScoreFunctionELBO(n, max_plate_nesting=1),
    "ScoreFunctionELBO, MovingAverage": lambda n: ScoreFunctionELBO(
        n, max_plate_nesting=1, baseline=MovingAverage(0.9)
    ),
    "ScoreFunctionELBO, no baseline": lambda n: ScoreFunctionELBO(n, max_plate_nesting=1, baseline=None),
    "Pyro Trace_ELBO": lambda n: Trace_ELBO(n, max_plate_nesting=1, vectorize_particles=True),
    "Pyro TraceGraph_ELBO": lambda n: TraceGraph_ELBO(n, max_plate_nesting=1, vectorize_particles=True),
    AVERAGE: lambda n: TraceGraph_ELBO(n, max_plate_nesting=1, vectorize_particles=True),
}


def gradient_table(
    net: BeliefNet,
    images: Tensor,
    *,
    particles: tuple[int, ...] = (8,),
    repeats: int = 200,
    warm_up: int = 30,
    seed: int = 0,
) -> list[GradientRow]:
    """Variance and cost of each loss, in turns on the same random batches: averages see what they see in training.

    Args:
        net: its encoder's gradient is estimated.
        images: to take batches of 100 from.
        particles: each N to try.
        repeats: estimates that count for each loss and N.
        warm_up: estimates before, which fill the averages.
        seed: of batches and particles.
    """

    def average_guide(images: Tensor) -> None:
        net.guide(images, {"baseline": {"use_decaying_avg_baseline": True, "baseline_beta": 0.9}})

    encoder = list(net.encoder.parameters())
    batches = minibatches(images, seed)
    losses = {(name, n): make(n) for n in particles for name, make in LOSSES.items()}
    deviations = {key: list[Tensor]() for key in losses}
    seconds = {key: list[float]() for key in losses}
    stores = {key: dict[Any, Any](params={}, constraints={}) for key in losses}
    pyro.set_rng_seed(seed)
    for repeat in range(-warm_up, repeats):
        batch = next(batches)
        exact = torch.cat([g.flatten() for g in torch.autograd.grad(net.exact_bound(batch).mean(), encoder)])
        for key, loss in losses.items():
            guide = average_guide if key[0] == AVERAGE else net.guide
            with pyro.get_param_store().scope(stores[key]) as stores[key]:
                begin = time.process_time()
                loss.loss_and_grads(net.model, guide, batch)
                spent = time.process_time() - begin
            gradient = torch.cat([p.grad.flatten() for p in encoder if p.grad is not None])
            for parameter in net.parameters():
                parameter.grad = None
            if repeat >= 0:
                seconds[key].append(spent)
                deviations[key].append(-gradient / net.num_images - exact)
    rows = []
    for (name, n), found in deviations.items():
        stacked = torch.stack(found)
        variance = stacked.square().sum(-1).mean()
        error = stacked.mean(0).norm() / (variance / repeats).sqrt()
        rows.append(
            GradientRow(name, n, variance.item(), error.item(), 1e3 * float(torch.tensor(seconds[name, n]).median()))
        )
    return rows


def table(rows: list[GradientRow]) -> str:
    """As Markdown."""
    lines = ["| loss | particles | variance | error | CPU ms | variance x ms |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {row.name} | {row.particles} | {row.variance:.3g} | {row.error:.2f} | {row.milliseconds:.2f} "
        f"| {row.variance * row.milliseconds:.3g} |"
        for row in rows
    ]
    return "\n".join(lines)


def show(progress: Progress) -> None:
    """One line that is written over on a terminal."""
    end = "\r" if sys.stdout.isatty() and progress.step < progress.steps else "\n"
    print(
        f"step {progress.step:6d} of {progress.steps}   bound {progress.bound:8.3f} nat/image   "
        f"{progress.seconds:6.1f} s CPU",
        end=end,
        flush=True,
    )


def main() -> None:
    """Train, then compare with everything that is exact."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--particles", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=200, help="estimates per loss in the table of gradients")
    parser.add_argument("--exact", action="store_true", help="train with the exact gradient instead")
    parser.add_argument("--out", type=Path, help="write the results to this JSON file")
    options = parser.parse_args()
    torch.set_num_threads(1)

    pyro.set_rng_seed(options.seed)
    before = BeliefNet(TRAIN)  # as the fit will start
    print(f"{TRAIN} images to train on, {LATENTS} latents, {options.particles} particles, seed {options.seed}")
    fitted = fit(options.seed, options.steps, show, particles=options.particles, exact=options.exact)
    results = {name: compare(fitted.net, images) for name, images in (("train", fitted.train), ("test", fitted.test))}
    print("\nexact, by summing over the 1024 states of each image (nats per image)")
    for name, result in results.items():
        print(
            f"{name:>6}: log evidence {result.log_evidence:8.3f}   bound {result.bound:8.3f}   gap {result.gap:.3f}   "
            f"marginals differ by {result.mean_marginal_difference:.4f} on average, "
            f"{result.largest_marginal_difference:.3f} at most"
        )
    tables = {}
    for name, net in (("before training", before), ("after training", fitted.net)):
        tables[name] = gradient_table(net, fitted.train, particles=(2, options.particles), repeats=options.repeats)
        print(f"\ngradient of the encoder, batches of {BATCH} images, {name}\n{table(tables[name])}")
    if options.out is not None:
        record = {
            "arguments": {name: str(value) for name, value in vars(options).items()},
            "exact": {name: asdict(result) | {"gap": result.gap} for name, result in results.items()},
            "gradients": {name: [asdict(row) for row in rows] for name, rows in tables.items()},
            "curve": [asdict(point) for point in fitted.curve],
        }
        options.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
