"""Sigmoid belief nets with 10 to 200 binary latents, trained by score functions; ten latents beside what is exact.

An image x of 0 and 1 has K Bernoulli latents, independent in the prior and in the guide::

    z_k ~ Bernoulli(sigmoid(prior_k));    x_i | z ~ Bernoulli(sigmoid(decoder(z)_i))
    q(z_k | x) = Bernoulli(sigmoid(encoder(x)_k))

Encoder and decoder are those of one of the ``NETS``: ``linear`` has a single layer each way, ``nonlinear`` two hidden
layers of 200 each way, ``mixed`` a hidden layer in the encoder alone. With up to 12 latents every state of an image can
be summed, so evidence, bound, posterior and gradient are exact; beyond, the bound and the importance-weighted bound
are estimated, with standard errors. Images are scikit-learn's digits, or MNIST's files where ``--data`` says. Run it
with::

    python -m applications.vi.discrete_vae --steps 10000
    python -m applications.vi.discrete_vae --latents 200 --net nonlinear --data DIR --out runs/mnist

In ``--out``: ``result.json``, ``discrete_vae.png``, ``checkpoint.pt``. Ctrl-C stops after the present step;
``--resume`` goes on bit for bit. ``Training.load(path, images).net`` is the net of a checkpoint, and
``frozen(net, batch)`` its guide and black box, for estimators to be compared on. The pieces are meant to be imported
and copied.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import ELBO, SVI, Trace_ELBO, TraceGraph_ELBO
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import scorefn as sf
from applications.arguments import at_least
from applications.gradients import flat, flat_grad
from applications.progress import Interruption, show_line, timed_steps
from applications.results import write_result
from applications.vi import images as data
from applications.vi.images import BATCH, Batches, Images
from scorefn.posteriors import VIMCO, ScoreFunctionELBO

FORMAT = 1  # of a checkpoint
MOST_SUMMED = 12  # latents whose states are summed
EVALUATED = 10_000  # images at most, where the bound is estimated


# ------------------------------------------------------------------------------------------------------------- the net


@dataclass(frozen=True)
class Layers:
    """Hidden layers of encoder and decoder, and what stands between them."""

    encoder: tuple[int, ...] = ()
    decoder: tuple[int, ...] = ()
    activation: Callable[[], nn.Module] = nn.Tanh


NETS = {
    "mixed": Layers(encoder=(64,)),
    "linear": Layers(),
    # as in Dong, Mnih & Tucker (2020), "DisARM"
    "nonlinear": Layers((200, 200), (200, 200), lambda: nn.LeakyReLU(0.3)),
}


def network(sizes: tuple[int, ...], activation: Callable[[], nn.Module]) -> nn.Sequential:
    """Linear layers of these sizes, the activation between them."""
    layers: list[nn.Module] = []
    for narrow, wide in pairwise(sizes):
        layers += [nn.Linear(narrow, wide), activation()]
    return nn.Sequential(*layers[:-1])


class Generator(nn.Module):
    """p(z) p(x | z): a prior logit for each latent, and the decoder."""

    def __init__(self, latents: int, pixels: int, layers: Layers) -> None:
        super().__init__()
        self.prior = nn.Parameter(torch.zeros(latents))
        self.decoder = network((latents, *layers.decoder, pixels), layers.activation)


class BeliefNet(nn.Module):
    """The model and its guide, as Pyro programs and as densities, and what of them is in closed form.

    Args:
        num_images: that a minibatch stands for.
        latents: K.
        pixels: of an image.
        layers: of encoder and decoder.
    """

    def __init__(self, num_images: int, latents: int = 10, pixels: int = 64, layers: Layers = NETS["mixed"]) -> None:
        super().__init__()
        self.num_images = num_images
        self.latents = latents
        self.generator = Generator(latents, pixels, layers)
        self.encoder = network((pixels, *layers.encoder, latents), layers.activation)

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

    def q(self, images: Tensor) -> torch.distributions.Bernoulli:
        """The guide as a torch distribution of batch shape ``[images, K]``."""
        return torch.distributions.Bernoulli(logits=self.encoder(images))

    def log_joint(self, images: Tensor, z: Tensor) -> Tensor:
        """log p(x, z), ``[N, images, K] -> [N, images]``."""
        pixels: Tensor = log_bernoulli(self.generator.decoder(z), images).sum(-1)
        return pixels + log_bernoulli(self.generator.prior, z).sum(-1)

    def log_weights(self, images: Tensor, num_samples: int) -> Tensor:
        """log p(x, z) - log q(z | x) of draws of the guide, ``[N, images]``."""
        q = self.q(images)
        z = q.sample(torch.Size((num_samples,)))
        log_q: Tensor = q.log_prob(z).sum(-1)
        return self.log_joint(images, z) - log_q

    def log_joint_of_states(self, images: Tensor) -> Tensor:
        """log p(x, z) of every state z, ``[images, 2^K]``."""
        z = states(self.latents).to(images)
        logits: Tensor = self.generator.decoder(z)
        prior = log_bernoulli(self.generator.prior, z).sum(-1)
        return images @ logits.T - nn.functional.softplus(logits).sum(-1) + prior

    def log_guide_of_states(self, images: Tensor) -> Tensor:
        """log q(z | x) of every state z, ``[images, 2^K]``."""
        logits: Tensor = self.encoder(images)
        return logits @ states(self.latents).to(images).T - nn.functional.softplus(logits).sum(-1, keepdim=True)

    def exact_bound(self, images: Tensor) -> Tensor:
        """The ELBO of each image by summing over all states, ``[images]``, differentiable."""
        log_q = self.log_guide_of_states(images)
        return (log_q.exp() * (self.log_joint_of_states(images) - log_q)).sum(-1)


def states(latents: int) -> Tensor:
    """All states of the latents, ``[2^K, K]``.

    Raises:
        sf.ScorefnError: they are too many.
    """
    if latents > MOST_SUMMED:
        raise sf.ScorefnError(
            f"{latents} latents have 2^{latents} states for each image, more than can be summed (2^{MOST_SUMMED} at "
            "most): estimate instead, or take fewer latents."
        )
    return torch.stack(torch.meshgrid([torch.tensor([0.0, 1.0])] * latents, indexing="ij"), -1).reshape(-1, latents)


def log_bernoulli(logits: Tensor, z: Tensor) -> Tensor:
    """Elementwise log-probability."""
    return z * logits - nn.functional.softplus(logits)


class Frozen(NamedTuple):
    """What an estimator of a gradient is given, for a minibatch.

    Attributes:
        q: Bernoulli of batch shape ``[images, K]``, whose logits ask for a gradient and belong to nothing else.
        f: the black box, log p(x, z) - log q(z | x), ``[N, images, K] -> [N, images]``, without gradient: the gradient
            of E_q f in the logits is that of the ELBO.
    """

    q: torch.distributions.Bernoulli
    f: Callable[[Tensor], Tensor]


def frozen(net: BeliefNet, images: Tensor) -> Frozen:
    """Guide and black box of a net that is held still."""
    logits = net.encoder(images).detach().requires_grad_()
    held = logits.detach().clone()  # an optimiser that moves the logits does not move f

    @torch.no_grad()
    def f(z: Tensor) -> Tensor:
        return net.log_joint(images, z) - log_bernoulli(held, z).sum(-1)

    return Frozen(torch.distributions.Bernoulli(logits=logits), f)


# ------------------------------------------------------------------------------------------------------------ training

Step = Callable[[Tensor], float]  # fills .grad; gives the mean bound of an image


def with_svi(loss: Callable[[int], ELBO]) -> Callable[[Training], Step]:
    """A step of Pyro's SVI; the only line that is not Pyro's is the loss."""

    def make(training: Training) -> Step:
        net = training.net
        svi = SVI(net.model, net.guide, training.optimiser, loss=loss(training.settings.particles))
        return lambda images: -svi.step(images) / net.num_images

    return make


def with_torch(bound: Callable[[BeliefNet, Tensor, int], Tensor]) -> Callable[[Training], Step]:
    """A step up the gradient of a bound ``[images]``."""

    def make(training: Training) -> Step:
        net, parameters = training.net, list(training.net.parameters())

        def step(images: Tensor) -> float:
            value = bound(net, images, training.settings.particles).mean()
            (-value).backward()
            training.optimiser(parameters)
            pyro.infer.util.zero_grads(parameters)
            return value.item()

        return step

    return make


def plain_bound(net: BeliefNet, images: Tensor, particles: int) -> Tensor:
    """The ELBO of each image without Pyro."""
    return sf.posteriors.elbo(lambda z: net.log_joint(images, z), net.q(images), particles)


# Leave-one-out by name: the adaptive default finds nothing more in images that are independent, and has a state.
LOSSES: dict[str, Callable[[Training], Step]] = {
    "leave-one-out": with_svi(lambda n: ScoreFunctionELBO(n, max_plate_nesting=1, baseline=sf.LeaveOneOut())),
    "vimco": with_svi(lambda n: VIMCO(n, max_plate_nesting=1)),
    "plain": with_torch(plain_bound),
    "exact": with_torch(lambda net, images, particles: net.exact_bound(images)),
}


@dataclass(frozen=True)
class Settings:
    """What a training depends on, beside its images.

    Args:
        seed: of the initial weights, the minibatches and the particles.
        steps: of Adam.
        latents: K.
        net: of ``NETS``.
        loss: of ``LOSSES``; "exact" follows the exact gradient, the best that an estimator can do.
        particles: N.
        learning_rate: of Adam.

    Raises:
        sf.ScorefnError: an unknown name, a number out of range, or too many latents for "exact".
    """

    seed: int = 0
    steps: int = 10_000
    latents: int = 10
    net: str = "mixed"
    loss: str = "leave-one-out"
    particles: int = 8
    learning_rate: float = 2e-3

    def __post_init__(self) -> None:
        """Check."""
        for name, table in (("net", NETS), ("loss", LOSSES)):
            if getattr(self, name) not in table:
                raise sf.ScorefnError(f"{name} is {getattr(self, name)!r}, but must be one of {list(table)}.")
        for name, least in (("steps", 1), ("latents", 1), ("particles", 1 if self.loss == "exact" else 2)):
            if getattr(self, name) < least:
                raise sf.ScorefnError(f"{name} is {getattr(self, name)}, but must be {least} or more.")
        if not 0 < self.learning_rate < float("inf"):
            raise sf.ScorefnError(f"learning_rate is {self.learning_rate}, but must be positive and finite.")
        if self.loss == "exact" and self.latents > MOST_SUMMED:
            raise sf.ScorefnError(
                f"loss 'exact' sums the states of each image, of which {self.latents} latents have 2^{self.latents}: "
                f"take {MOST_SUMMED} latents at most, or another loss."
            )


@dataclass(frozen=True)
class Progress:
    """Where a training stands; ``bound`` is the mean estimate per image since the last point of the curve."""

    step: int
    steps: int
    bound: float
    seconds: float


class Training:
    """Model and guide, trained together by Adam on minibatches of 100; it can be left and gone on with at any step.

    Args:
        settings: all of them.
        images: that it is trained on.

    Attributes:
        net: as it is.
        average: of the nets after the last quarter of the steps, from ``torch.optim.swa_utils``.
        curve: about 50 points on the way.
        seconds: of CPU, spent in the steps.
    """

    def __init__(self, settings: Settings, images: Images) -> None:
        pyro.set_rng_seed(settings.seed)
        self.settings, self.images = settings, images
        self.net = BeliefNet(len(images.train), settings.latents, images.pixels, NETS[settings.net])
        self.average = AveragedModel(self.net)
        self.batches = Batches(images.train, settings.seed)
        self.optimiser = pyro.optim.Adam({"lr": settings.learning_rate})
        self.step, self.seconds, self.curve = 0, 0.0, list[Progress]()
        self._total = 0.0  # of the bounds since the last point of the curve
        self._store: Any = {"params": {}, "constraints": {}}
        with self._own_store():
            pyro.module("generator", self.net.generator)
            pyro.module("encoder", self.net.encoder)
        self._ascend = LOSSES[settings.loss](self)

    @property
    def averaged(self) -> BeliefNet:
        """Its parameters are the means over the last quarter of the steps, once there are such."""
        net = self.average.module
        assert isinstance(net, BeliefNet)
        return net

    @property
    def train(self) -> Tensor:
        """The images to train on, ``[images, pixels]``."""
        return self.images.train

    @property
    def test(self) -> Tensor:
        """The others."""
        return self.images.test

    @contextmanager
    def _own_store(self) -> Iterator[None]:
        """Pyro's parameters of this training alone."""
        with pyro.get_param_store().scope(self._store) as self._store:
            yield

    def advance(self) -> None:
        """One step of Adam."""
        begin, steps = time.process_time(), self.settings.steps
        with self._own_store():
            self._total += self._ascend(next(self.batches))
        self.step += 1
        if self.step > steps - max(1, steps // 4):
            self.average.update_parameters(self.net)
        self.seconds += time.process_time() - begin
        if self.step % max(1, steps // 50) == 0 or self.step == steps:
            since = self.step - (self.curve[-1].step if self.curve else 0)
            self.curve.append(Progress(self.step, steps, self._total / since, self.seconds))
            self._total = 0.0

    def save(self, path: Path) -> None:
        """Write all that the rest of the training depends on, in one piece or not at all."""
        with self._own_store():
            optimiser = self.optimiser.get_state()
        state = {
            "format": FORMAT,
            "settings": asdict(self.settings),
            "images": self.images.fingerprint,
            "step": self.step,
            "seconds": self.seconds,
            "total": self._total,
            "curve": [asdict(point) for point in self.curve],
            "optimiser": optimiser,
            "generator": torch.get_rng_state(),
            **{name: getattr(self, name).state_dict() for name in _WITH_STATE},
        }
        part = path.with_suffix(".part")
        torch.save(state, part)
        os.replace(part, path)

    @classmethod
    def load(cls, path: Path, images: Images, settings: Settings | None = None) -> Training:
        """Go on from a checkpoint.

        Args:
            path: that ``save`` wrote.
            images: those that it was begun with.
            settings: refused where the checkpoint's differ; None: whatever they are.

        Raises:
            sf.ScorefnError: no such file, something else, or a checkpoint of other settings, images or format.
        """
        if not path.exists():
            raise sf.ScorefnError(f"There is no checkpoint {path} to resume: leave out --resume to begin a run.")
        try:
            state: dict[str, Any] = torch.load(path, weights_only=True)
            known = state["format"], set(state["settings"])
        except Exception as error:  # whatever a damaged file makes of the reader
            raise sf.ScorefnError(
                f"{path} cannot be read as a checkpoint ({type(error).__name__}: {str(error)[:100]}): it is damaged, "
                "or something else. Begin the run anew in another folder."
            ) from error
        if known != (FORMAT, {field.name for field in fields(Settings)}):
            raise sf.ScorefnError(
                f"{path} has format {known[0]!r} and settings {sorted(known[1])}, but this program reads format "
                f"{FORMAT} with {sorted(field.name for field in fields(Settings))}: begin the run anew in another "
                "folder."
            )
        found = Settings(**state["settings"])
        if settings is not None and found != settings:
            differs = {n: (v, getattr(settings, n)) for n, v in asdict(found).items() if v != getattr(settings, n)}
            raise sf.ScorefnError(
                f"{path} differs from what is asked for in (its own, asked for) {differs}: resume it with the settings "
                "it was begun with, or choose another folder."
            )
        if state["images"] != images.fingerprint:
            raise sf.ScorefnError(
                f"{path} was begun with {state['images']}, but these are {images.fingerprint}: give the same --data "
                "and --binarise, or choose another folder."
            )
        training = cls(found, images)
        for name in _WITH_STATE:
            getattr(training, name).load_state_dict(state[name])
        training.optimiser.set_state(state["optimiser"])
        training.step, training.seconds, training._total = state["step"], state["seconds"], state["total"]
        training.curve = [Progress(**point) for point in state["curve"]]
        torch.set_rng_state(state["generator"])
        return training


_WITH_STATE = ["net", "average", "batches"]


def run(
    training: Training,
    checkpoint: Path | None = None,
    progress: Callable[[Progress], None] | None = None,
    *,
    should_stop: Callable[[], bool] = lambda: False,
) -> bool:
    """Take the steps that are left; False where stopped.

    Args:
        training: new or loaded.
        checkpoint: written about 50 times on the way, and at the end.
        progress: called then.
        should_stop: asked after every step.
    """
    left, marks = training.settings.steps - training.step, 50
    for _ in timed_steps(training.advance, left, marks=marks, should_stop=should_stop):
        if checkpoint is not None:
            training.save(checkpoint)
        if progress is not None and training.curve:
            bound = training.curve[-1].bound
            progress(Progress(training.step, training.settings.steps, bound, training.seconds))
    return training.step == training.settings.steps


def fit(
    seed: int = 0, steps: int = 2000, progress: Callable[[Progress], None] | None = None, **settings: Any
) -> Training:
    """Train on scikit-learn's digits, with ten latents unless told otherwise.

    Args:
        seed: of everything.
        steps: of Adam.
        progress: called about 50 times.
        settings: others of ``Settings``.
    """
    training = Training(Settings(seed, steps, **settings), data.digits())
    run(training, progress=progress)
    return training


# -------------------------------------------------------------------------------------------------------- what came out


@dataclass(frozen=True)
class Comparison:
    """The guide against the exact posterior, in nats per image; a marginal is P(z_k = 1 | x)."""

    log_evidence: float
    bound: float
    largest_marginal_difference: float
    mean_marginal_difference: float

    @property
    def gap(self) -> float:
        """KL(q || posterior): what the guide loses."""
        return self.log_evidence - self.bound

    def __str__(self) -> str:
        """In one line."""
        return (
            f"log evidence {self.log_evidence:8.3f}   bound {self.bound:8.3f}   gap {self.gap:.3f}   marginals differ "
            f"by {self.mean_marginal_difference:.4f} on average, {self.largest_marginal_difference:.3f} at most"
        )


@torch.no_grad()
def marginals(net: BeliefNet, images: Tensor) -> tuple[Tensor, Tensor]:
    """P(z_k = 1 | x) of the exact posterior and of the guide, both ``[images, K]``."""
    return net.log_joint_of_states(images).softmax(-1) @ states(net.latents), net.encoder(images).sigmoid()


@torch.no_grad()
def compare(net: BeliefNet, images: Tensor) -> Comparison:
    """By summing over all states of every image."""
    posterior, guide = marginals(net, images)
    difference = (posterior - guide).abs()
    return Comparison(
        net.log_joint_of_states(images).logsumexp(-1).mean().item(),
        net.exact_bound(images).mean().item(),
        difference.max().item(),
        difference.mean().item(),
    )


@dataclass(frozen=True)
class Estimate:
    """Bounds by sampling, in nats per image; an error is the standard error that the draws leave, the images given.

    Args:
        bound: the ELBO.
        error: of it.
        importance_weighted: the bound of ``draws`` particles, between ELBO and log evidence.
        importance_weighted_error: of it.
        draws: for each image.
        images: that were looked at.
    """

    bound: float
    error: float
    importance_weighted: float
    importance_weighted_error: float
    draws: int
    images: int

    def __str__(self) -> str:
        """In one line."""
        return (
            f"bound {self.bound:.3f} +- {self.error:.3f}   of {self.draws} particles {self.importance_weighted:.3f} +- "
            f"{self.importance_weighted_error:.3f}   {self.images} images"
        )


@torch.no_grad()
def estimate(net: BeliefNet, images: Tensor, draws: int = 100, *, seed: int = 0) -> Estimate:
    """By sampling, 100 images at a time; torch's global generator is left as it was.

    Args:
        net: whose bounds.
        images: ``[images, pixels]``, 0 or 1.
        draws: S for each image, 2 or more.
        seed: of the draws.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        weights = torch.cat([net.log_weights(some, draws) for some in images.split(BATCH)], -1)
    elbo, weighted = sf.posteriors.bound(weights), sf.posteriors.evidence(weights)

    def error(each: Tensor) -> float:
        return (each.square().sum().sqrt() / len(images)).item()

    return Estimate(
        elbo.value.mean().item(),
        error(elbo.standard_error),
        weighted.value.mean().item(),
        error(weighted.standard_error),
        draws,
        len(images),
    )


def evaluate(net: BeliefNet, images: Tensor, draws: int = 100) -> Comparison | Estimate:
    """Exactly where that is possible; otherwise on at most 10 000 images, the grey ones binarised by a fixed seed."""
    images = torch.bernoulli(images, generator=torch.Generator().manual_seed(1))  # 0 and 1 stay
    return compare(net, images) if net.latents <= MOST_SUMMED else estimate(net, images[:EVALUATED], draws)


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
COMPARED: dict[str, Callable[[int], ELBO]] = {
    "ScoreFunctionELBO, leave-one-out": lambda n: ScoreFunctionELBO(n, max_plate_nesting=1, baseline=sf.LeaveOneOut()),
    "ScoreFunctionELBO, adaptive": lambda n: ScoreFunctionELBO(n, max_plate_nesting=1),
    "ScoreFunctionELBO, MovingAverage": lambda n: ScoreFunctionELBO(
        n, max_plate_nesting=1, baseline=sf.MovingAverage(0.9)
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
        net: its encoder's gradient is estimated; of few latents.
        images: to take batches of 100 from.
        particles: each N to try.
        repeats: estimates that count for each loss and N.
        warm_up: estimates before, which fill the averages.
        seed: of batches and particles.

    Raises:
        sf.ScorefnError: the exact gradient is out of reach.
    """

    def average_guide(images: Tensor) -> None:
        net.guide(images, {"baseline": {"use_decaying_avg_baseline": True, "baseline_beta": 0.9}})

    encoder = list(net.encoder.parameters())
    batches = Batches(images, seed)
    losses = {(name, n): make(n) for n in particles for name, make in COMPARED.items()}
    deviations = {key: list[Tensor]() for key in losses}
    seconds = {key: list[float]() for key in losses}
    stores = {key: dict[Any, Any](params={}, constraints={}) for key in losses}
    pyro.set_rng_seed(seed)
    for repeat in range(-warm_up, repeats):
        batch = next(batches)
        exact = flat(torch.autograd.grad(net.exact_bound(batch).mean(), encoder))
        for key, loss in losses.items():
            guide = average_guide if key[0] == AVERAGE else net.guide
            with pyro.get_param_store().scope(stores[key]) as stores[key]:
                begin = time.process_time()
                loss.loss_and_grads(net.model, guide, batch)
                spent = time.process_time() - begin
            gradient = flat_grad(encoder)
            net.zero_grad()
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


# --------------------------------------------------------------------------------------------------------- the program


def plot(training: Training, results: dict[str, Comparison | Estimate], path: Path) -> None:
    """The bound on the way; images, what the net makes of them, and what it dreams up."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.5), layout="constrained")
    way, gallery = figure.subplots(1, 2)
    way.plot([p.step for p in training.curve], [p.bound for p in training.curve], color="C0", label="training")
    for number, (name, result) in enumerate(results.items(), start=1):
        way.axhline(result.bound, color=f"C{number}", ls="--", label=f"bound at the end, {name}")
    way.set(xlabel="step", ylabel=f"bound by {training.settings.loss}, nats per image")
    way.legend()
    gallery.imshow(pictures(training).numpy(), cmap="gray_r", vmin=0, vmax=1)
    gallery.set(title="new images, reconstructions, samples", xticks=[], yticks=[])
    figure.savefig(path, dpi=120)


@torch.no_grad()
def pictures(training: Training, columns: int = 12) -> Tensor:
    """Three rows of images, side by side, in [0, 1]."""
    net, (height, width) = training.net, training.images.shape
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        x = training.test[:columns]
        again = net.generator.decoder(net.q(x).sample()).sigmoid()
        dreamt = net.generator.decoder(torch.bernoulli(net.generator.prior.sigmoid().expand(len(x), -1))).sigmoid()
    rows = torch.stack([x, again, dreamt]).unflatten(-1, (height, width))
    framed: Tensor = nn.functional.pad(rows, (1, 1, 1, 1), value=0.3)
    return framed.permute(0, 2, 1, 3).reshape(3 * (height + 2), -1)


def show(progress: Progress) -> None:
    """One line that is written over on a terminal."""
    show_line(
        f"step {progress.step:6d} of {progress.steps}   bound {progress.bound:8.3f} nat/image   "
        f"{progress.seconds:6.1f} s CPU",
        last=progress.step == progress.steps,
    )


def _begin(options: argparse.Namespace) -> Training:
    """A new training, or the one in ``--out``."""
    settings = Settings(**{field.name: getattr(options, field.name) for field in fields(Settings)})
    checkpoint = options.out / "checkpoint.pt"
    if checkpoint.exists() and not options.resume:
        raise sf.ScorefnError(
            f"{checkpoint} belongs to an earlier run, which a new one would overwrite: add --resume to go on with it, "
            "or choose another folder with --out."
        )
    if options.binarise is not None and options.data is None:
        raise sf.ScorefnError("--binarise is for the images of --data: the digits are 1 from grey level 8 on.")
    images = data.digits() if options.data is None else data.read_folder(options.data, options.binarise or "threshold")
    if options.resume:
        return Training.load(checkpoint, images, settings)
    options.out.mkdir(parents=True, exist_ok=True)
    return Training(settings, images)


def main(argv: list[str] | None = None) -> int:
    """Train, compare with what is exact or estimate, write; 130 after Ctrl-C."""
    default = Settings()
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seed", type=at_least(0), default=default.seed)
    parser.add_argument("--steps", type=at_least(1), default=default.steps)
    parser.add_argument("--latents", type=at_least(1), default=default.latents)
    parser.add_argument("--net", choices=list(NETS), default=default.net)
    parser.add_argument("--loss", choices=list(LOSSES), default=default.loss)
    parser.add_argument("--particles", type=at_least(1), default=default.particles)
    parser.add_argument("--learning-rate", type=float, default=default.learning_rate)
    parser.add_argument("--data", type=Path, help="folder of MNIST's image files; default: scikit-learn's digits")
    parser.add_argument("--binarise", choices=["threshold", "dynamic"], help="of --data; default: threshold")
    parser.add_argument("--draws", type=at_least(2), default=100, help="for each image, where bounds are estimated")
    parser.add_argument("--repeats", type=at_least(0), default=0, help="estimates per loss in a table of gradients")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument("--out", type=Path, default=Path("runs/discrete_vae"), help="folder of result and plot")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    try:
        if options.repeats and options.latents > MOST_SUMMED:
            raise sf.ScorefnError(
                f"--repeats needs the exact gradient: {MOST_SUMMED} latents at most, or leave it out."
            )
        training = _begin(options)
    except (sf.ScorefnError, OSError) as error:
        parser.error(str(error))
    checkpoint = options.out / "checkpoint.pt"
    print(f"{training.images.fingerprint}; {asdict(training.settings)}")
    with Interruption() as interrupted:
        if not run(training, checkpoint, show, should_stop=interrupted):
            print(f"\nStopped. Go on with --resume from {checkpoint}.")
            return 130
    nets = {"": training.net, "averaged, ": training.averaged}
    results = {
        f"{kind}{name}": evaluate(net, images, options.draws)
        for kind, net in nets.items()
        for name, images in (("train", training.train), ("test", training.test))
    }
    for name, result in results.items():
        print(f"{name:>15}: {result}")
    gradients = {}
    if options.repeats:
        n = tuple(dict.fromkeys((2, max(2, options.particles))))
        before = Training(training.settings, training.images).net
        for name, net in (("before training", before), ("after training", training.net)):
            gradients[name] = gradient_table(net, training.train, particles=n, repeats=options.repeats)
            print(f"\ngradient of the encoder, batches of {BATCH} images, {name}\n{table(gradients[name])}")
    record = {
        "images": training.images.fingerprint,
        "cpu_seconds": training.seconds,
        "results": {name: asdict(result) for name, result in results.items()},
        "gradients": {name: [asdict(row) for row in rows] for name, rows in gradients.items()},
        "curve": [asdict(point) for point in training.curve],
    }
    write_result(options.out, vars(options), record)
    plot(training, {name: results[name] for name in ("train", "test")}, options.out / "discrete_vae.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
