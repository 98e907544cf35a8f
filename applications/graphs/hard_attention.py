"""Hard attention: a reader of digits that sees a few pixels at a time and chooses where to look.

An image of 8x8 grey pixels has 36 places at which a patch of 3x3 pixels can be looked at. A state h remembers::

    place_t ~ Categorical(habit_t + policy(h_t));    h_t+1 = tanh(A h_t + glimpse(place_t))
    digit ~ Categorical(read(h_T))

where a glimpse is a layer over the patch and a vector for its place. The loss is the negative log-probability of the
digit, on average over the places: a score for the places, a plain gradient for the rest (Mnih, Heess, Graves &
Kavukcuoglu 2014; Xu et al. 2015). As a graph it is a loop over sites. The readers:

* ``hard``: chooses by what it has seen.
* ``fixed``: has habits only, policy(h) = 0.
* ``random``: has neither, so that every place is equally likely.
* ``soft``: its glimpse is the mean of all glimpses under its policy (Xu et al. 2015), so it sees every pixel each time.

With one glimpse or two the loss is a short sum (``exact_loss``); Ctrl-C ends the present reader after its step.

Run it with::

    python -m applications.graphs.hard_attention --seed 0
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.distributions import Categorical

import scorefn as sf
from applications.arguments import at_least
from applications.progress import Interruption, show_line, timed_steps
from applications.results import write_result

READERS = {"hard": (1.0, 1.0), "fixed": (1.0, 0.0), "random": (0.0, 0.0), "soft": (1.0, 1.0)}  # of habit and policy
BATCH, DRAWS = 50, 8
CURIOSITY = 0.05  # nats of loss for a nat of entropy of the places, at the start
TRAIN = 1200  # of the 1797 digits
SIDE, PATCH = 8, 3


class Digits:
    """Patches ``[images, places, pixels of a patch]`` in [-1, 1] and labels ``[images]``."""

    def __init__(self, patches: Tensor, labels: Tensor) -> None:
        self.patches, self.labels = patches, labels

    def __getitem__(self, rows: Any) -> Digits:
        return Digits(self.patches[rows], self.labels[rows])


def load() -> tuple[Digits, Digits]:
    """To train on and to test on."""
    found = load_digits()
    images = torch.as_tensor(found.data, dtype=torch.get_default_dtype()).reshape(-1, 1, SIDE, SIDE) / 8 - 1
    patches = nn.functional.unfold(images, PATCH).movedim(1, -1)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    whole = Digits(patches, torch.as_tensor(found.target))[order]
    return whole[:TRAIN], whole[TRAIN:]


class Reader(nn.Module):
    """Policy, memory and classifier.

    Args:
        kind: one of ``READERS``.
        glimpses: T.
        places: P.
        pixels: of a patch.
        width: of the state.
        digits: how many classes.
    """

    def __init__(
        self, kind: str, glimpses: int = 3, places: int = 36, pixels: int = 9, width: int = 64, digits: int = 10
    ) -> None:
        super().__init__()
        self.kind, self.glimpses, self.weights = kind, glimpses, READERS[kind]
        self.habit = nn.Parameter(torch.zeros(glimpses, places))
        self.what, self.where = nn.Linear(pixels, width), nn.Parameter(0.1 * torch.randn(places, width))
        self.start, self.memory = nn.Parameter(torch.zeros(width)), nn.Linear(width, width)
        self.policy, self.read = nn.Linear(width, places), nn.Linear(width, digits)

    def glimpses_of(self, patches: Tensor) -> Tensor:
        """``[images, P, width]``."""
        seen: Tensor = torch.tanh(self.what(patches) + self.where)
        return seen

    def logits(self, t: int, state: Tensor) -> Tensor:
        """Of the places of a glimpse, ``[..., P]``."""
        habit, policy = self.weights  # a policy times 0 is still one for each draw of the places before
        logits: Tensor = habit * self.habit[t] + policy * self.policy(state)
        return logits

    def then(self, state: Tensor, seen: Tensor) -> Tensor:
        """The next state."""
        state = torch.tanh(self.memory(state) + seen)
        return state

    def program(self, g: sf.StochasticGraph, data: Digits, curiosity: float = 0.0, first: Any = None) -> Tensor:
        """Loss of each image, written into an open graph; log-probabilities of the digits ``[N, (M,) images, digits]``.

        Args:
            g: open.
            data: images and labels.
            curiosity: weight of the entropy of each policy, which is then to be large.
            first: estimator of the first place, such as ``sf.Enumerate(batch_ndim=1)``.
        """
        seen, images = self.glimpses_of(data.patches), torch.arange(len(data.labels))
        state = self.start.expand(len(images), -1)
        for t in range(self.glimpses):
            estimator = first if t == 0 else None
            where = Categorical(logits=self.logits(t, state))
            place = g.sample(f"place[{t}]", where, estimator=estimator)
            if t and curiosity:
                g.cost(f"certainty[{t}]", -curiosity * where.entropy())  # that depends on the places before
            state = self.then(state, seen[images, place])  # [N, (M,) images, width]
        log_prob: Tensor = self.read(state).log_softmax(-1)
        g.cost("surprise", -log_prob[..., images, data.labels])
        return log_prob

    def softly(self, data: Digits) -> Tensor:
        """Log-probabilities of the digits ``[images, digits]`` by soft attention."""
        seen = self.glimpses_of(data.patches)
        state = self.start.expand(len(data.labels), -1)
        for t in range(self.glimpses):
            state = self.then(state, (self.logits(t, state).softmax(-1).unsqueeze(-1) * seen).sum(-2))
        log_prob: Tensor = self.read(state).log_softmax(-1)
        return log_prob

    def exact_loss(self, data: Digits) -> Tensor:
        """E -log p(label) over all P^T sequences of places, ``[images]``, differentiable."""
        seen, images = self.glimpses_of(data.patches), len(data.labels)
        state, log_q = self.start.expand(1, images, -1), torch.zeros(1, images)
        for t in range(self.glimpses):  # [paths, images] -> [P * paths, images]
            log_q = (log_q + self.logits(t, state).log_softmax(-1).movedim(-1, 0)).flatten(0, 1)
            state = self.then(state, seen.movedim(1, 0).unsqueeze(1)).flatten(0, 1)
        log_prob: Tensor = self.read(state).log_softmax(-1)[:, torch.arange(images), data.labels]
        return -(log_q.exp() * log_prob).sum(0)


@dataclass(frozen=True)
class Point:
    """Where a reader stands on the test images: share read correctly, mean surprise in nats, and CPU seconds."""

    step: int
    accuracy: float
    surprise: float
    seconds: float


@torch.no_grad()
def judge(reader: Reader, data: Digits, draws: int = 20, seed: int = 0) -> tuple[float, float]:
    """Accuracy and surprise when a digit is read once, on average over so many draws of the places."""
    if reader.kind == "soft":
        log_prob = reader.softly(data).unsqueeze(0)
    else:
        with torch.random.fork_rng(devices=[]), sf.StochasticGraph(draws) as g:
            torch.manual_seed(seed)
            log_prob = reader.program(g, data)
    right = log_prob.argmax(-1) == data.labels
    surprise = -log_prob[:, torch.arange(len(data.labels)), data.labels]
    return right.to(log_prob.dtype).mean().item(), surprise.mean().item()


def fit(
    kind: str,
    train: Digits,
    test: Digits,
    seed: int = 0,
    steps: int = 3000,
    progress: Callable[[Point], None] | None = None,
    *,
    glimpses: int = 3,
    learning_rate: float = 0.005,
    should_stop: Callable[[], bool] = lambda: False,
) -> tuple[Reader, list[Point]]:
    """Train by Adam, whose learning rate decays to 3 %, as the reward for entropy does.

    Args:
        kind: of the reader.
        train: images to train on, in minibatches.
        test: images to be judged by.
        seed: of everything; the start is the same for all readers.
        steps: of Adam.
        progress: called some 60 times on the way.
        glimpses: T.
        learning_rate: at the start.
        should_stop: asked after every step.
    """
    torch.manual_seed(seed)
    reader, order = Reader(kind, glimpses), torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(reader.parameters(), learning_rate)
    decay = torch.optim.lr_scheduler.ExponentialLR(optimiser, 0.03 ** (1 / steps))
    graph = sf.StochasticGraph(DRAWS, audit_every=1000)  # the program is the same at every step

    def step() -> None:
        data = train[torch.randint(len(train.labels), (BATCH,), generator=order)]
        optimiser.zero_grad()
        if kind == "soft":
            loss = nn.functional.nll_loss(reader.softly(data), data.labels)
        else:
            with graph:
                reader.program(graph, data, CURIOSITY * float(decay.get_last_lr()[0]) / learning_rate)
            loss = graph.surrogate().mean()
        loss.backward()
        optimiser.step()
        decay.step()

    curve = list[Point]()
    for mark in timed_steps(step, steps, should_stop=should_stop):
        curve.append(Point(mark.step, *judge(reader, test), mark.seconds))
        if progress is not None:
            progress(curve[-1])
    return reader, curve


@torch.no_grad()
def attention(reader: Reader, data: Digits, draws: int = 20) -> Tensor:
    """How often each place was looked at, at each glimpse, over all images: ``[T, P]``."""
    state = reader.start.expand(draws, len(data.labels), -1)
    seen, found = reader.glimpses_of(data.patches), list[Tensor]()
    for t in range(reader.glimpses):
        weights = reader.logits(t, state).softmax(-1)
        found.append(weights.mean((0, 1)))
        if reader.kind == "soft":
            state = reader.then(state, (weights.unsqueeze(-1) * seen).sum(-2))
        else:
            state = reader.then(state, seen[torch.arange(len(data.labels)), Categorical(weights).sample()])
    return torch.stack(found)


def plot(curves: dict[str, list[Point]], looks: dict[str, Tensor], path: Path) -> None:
    """Accuracy along the way, and where each reader looked."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 2 + 1.5 * len(looks)), layout="constrained")
    halves = figure.subfigures(1, 2, squeeze=False)[0]
    axis = halves[0].subplots()
    for number, (kind, curve) in enumerate(curves.items()):
        axis.plot([p.step for p in curve], [p.accuracy for p in curve], color=f"C{number}", label=kind)
    axis.set(xlabel="step", ylabel="accuracy on the test images")
    axis.legend()
    maps = halves[1].subplots(len(looks), max(map(len, looks.values())), squeeze=False)
    across = SIDE - PATCH + 1
    for row, (kind, look) in zip(maps, looks.items(), strict=True):
        for t, (cell, places) in enumerate(zip(row, look, strict=True)):
            cell.imshow(places.reshape(across, across).tolist(), cmap="Greys", vmin=0)
            cell.set(xticks=[], yticks=[], title=f"{kind}, glimpse {t + 1}")
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> int:
    """Train each reader, then compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seed", type=at_least(0), default=0)
    parser.add_argument("--steps", type=at_least(1), default=3000)
    parser.add_argument("--glimpses", type=at_least(1), default=3)
    parser.add_argument("--readers", nargs="+", choices=list(READERS), default=list(READERS))
    parser.add_argument("--out", type=Path, default=Path("runs/hard_attention"), help="folder of result and plot")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)  # before the work: a path that cannot be is found out at once
    (train, test), curves, looks = load(), dict[str, list[Point]](), dict[str, Tensor]()
    with Interruption() as interrupted:
        for kind in dict.fromkeys(options.readers):

            def show(point: Point, kind: str = kind) -> None:
                show_line(
                    f"{kind:7} step {point.step:5d} of {options.steps}   accuracy {point.accuracy:.3f}   surprise "
                    f"{point.surprise:.3f} nats   {point.seconds:5.1f} s CPU",
                    last=point.step == options.steps or interrupted(),
                )

            reader, curves[kind] = fit(
                kind, train, test, options.seed, options.steps, show, glimpses=options.glimpses, should_stop=interrupted
            )
            looks[kind] = attention(reader, test)
            if interrupted():
                break
    record = {
        "complete": not interrupted(),
        "readers": {kind: asdict(curve[-1]) for kind, curve in curves.items()},
        "looks": {kind: look.tolist() for kind, look in looks.items()},
        "curves": {kind: [asdict(point) for point in curve] for kind, curve in curves.items()},
    }
    write_result(options.out, vars(options), record)
    plot(curves, looks, options.out / "hard_attention.png")
    return 130 if interrupted() else 0


if __name__ == "__main__":
    sys.exit(main())
