"""Training of a sigmoid belief net and its guide by Adam: losses by name, checkpoints that go on bit for bit.

``Training.load(path, images).net`` is the net of a checkpoint. ``discrete_vae.py`` is the program.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyro
from pyro.infer import ELBO, SVI
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

import scorefn as sf
from applications.checkpoint import read_checkpoint, write_checkpoint
from applications.progress import timed_steps
from applications.vi import images as data
from applications.vi.belief_net import MOST_SUMMED, NETS, BeliefNet
from applications.vi.images import Batches, Images
from scorefn.posteriors import VIMCO, ScoreFunctionELBO

FORMAT = 1  # of a checkpoint

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
            **{name: getattr(self, name).state_dict() for name in _WITH_STATE},
        }
        write_checkpoint(path, state)

    @classmethod
    def load(cls, path: Path, images: Images, settings: Settings | None = None) -> Training:
        """Go on from a checkpoint, with torch's generator where it stood.

        Args:
            path: that ``save`` wrote.
            images: those that it was begun with.
            settings: refused where the checkpoint's differ; None: whatever they are.

        Raises:
            sf.ScorefnError: no such file, something else, or a checkpoint of other settings, images or format.
        """

        def build(state: dict[str, Any]) -> Training:
            if state["format"] != FORMAT:
                raise sf.ScorefnError(
                    f"{path} has format {state['format']!r}, but this program reads format {FORMAT}: begin the run "
                    "anew in another folder."
                )
            found = Settings(**state["settings"])
            if settings is not None and found != settings:
                differs = {n: (v, getattr(settings, n)) for n, v in asdict(found).items() if v != getattr(settings, n)}
                raise sf.ScorefnError(
                    f"{path} differs from what is asked for in (its own, asked for) {differs}: resume it with the "
                    "settings it was begun with, or choose another folder."
                )
            if state["images"] != images.fingerprint:
                raise sf.ScorefnError(
                    f"{path} was begun with {state['images']}, but these are {images.fingerprint}: give the same "
                    "--data and --binarise, or choose another folder."
                )
            training = cls(found, images)
            for name in _WITH_STATE:
                getattr(training, name).load_state_dict(state[name])
            training.optimiser.set_state(state["optimiser"])
            training.step, training.seconds, training._total = state["step"], state["seconds"], state["total"]
            training.curve = [Progress(**point) for point in state["curve"]]
            return training

        return read_checkpoint(path, [*_PLAIN, *_WITH_STATE], build)


_PLAIN = ["format", "settings", "images", "step", "seconds", "total", "curve", "optimiser"]
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
