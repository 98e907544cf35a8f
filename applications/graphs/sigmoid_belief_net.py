"""A sigmoid belief net of two layers, written as a graph and trained without a sleep phase.

Binary images x have latents of two layers, and the guide climbs the other way::

    upper ~ Bernoulli(prior);    lower | upper ~ Bernoulli(down(upper));    x | lower ~ Bernoulli(out(lower))
    q(lower | x) = Bernoulli(up(x));    q(upper | lower) = Bernoulli(top(lower))

all of them by logits, each a linear layer. Model and guide climb one bound, the ELBO. Wake-sleep (Hinton, Dayan, Frey
& Neal 1995) needs dreams of the model for the guide; here ``StochasticGraph`` finds what each layer is to be charged
with: all of it for ``lower``, and for ``upper`` nothing of the pixels. With few latents evidence, bound and gradient
are sums, over images beside lower states and over lower beside upper states. The ways:

* ``flat``: 8 draws of both layers for each image.
* ``nested``: 4 draws of ``lower``, and 2 of ``upper`` for each, compared with each other.
* ``exact``: no draws.

Run it with::

    python -m applications.graphs.sigmoid_belief_net --seed 0

Ctrl-C ends the present fit after its step; what was fitted is still written.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli

import scorefn as sf
from applications.arguments import at_least
from applications.progress import Interruption, show_line, timed_steps
from applications.results import write_result
from applications.vi.belief_net import log_bernoulli, states
from applications.vi.images import Batches, Images, digits

WAYS: dict[str, tuple[int, int | None]] = {"flat": (8, None), "nested": (4, 2)}  # draws, upper draws for each


class TwoLayers(nn.Module):
    """Model and guide.

    Args:
        pixels: of an image.
        lower: latents next to the pixels.
        upper: latents above.
    """

    def __init__(self, pixels: int = 64, lower: int = 10, upper: int = 5) -> None:
        super().__init__()
        self.sizes = lower, upper
        self.prior = nn.Parameter(torch.zeros(upper))
        self.down, self.out = nn.Linear(upper, lower), nn.Linear(lower, pixels)
        self.up, self.top = nn.Linear(pixels, lower), nn.Linear(lower, upper)

    def program(self, g: sf.StochasticGraph, images: Tensor, upper_draws: int | None = None) -> None:
        """The negative ELBO of each image ``[images, pixels]``, written into an open graph.

        The guide's own terms are costs without gradient: what they lack is the expectation of a score, 0.
        """
        lower = g.sample("lower", Bernoulli(logits=self.up(images)))  # [N, images, lower]
        upper = g.sample("upper", Bernoulli(logits=self.top(lower)), num_samples=upper_draws)  # [N, (M,) images, upper]
        g.cost("log q(lower)", g.log_prob("lower").detach().sum(-1))
        g.cost("-log p(x)", -log_bernoulli(self.out(lower), images).sum(-1))
        below = lower if upper_draws is None else lower.unsqueeze(1)
        g.cost("log q(upper)", g.log_prob("upper").detach().sum(-1))
        g.cost("-log p(lower)", -log_bernoulli(self.down(upper), below).sum(-1))
        g.cost("-log p(upper)", -log_bernoulli(self.prior, upper).sum(-1))

    def exact_bound(self, images: Tensor) -> Tensor:
        """The ELBO of each image by summing over all states, ``[images]``, differentiable."""
        joint, log_q_upper = self._of_states()
        above = (log_q_upper.exp() * (joint - log_q_upper)).sum(-1)  # [lower states]
        logits = self.up(images)
        log_q = logits @ states(self.sizes[0]).T - nn.functional.softplus(logits).sum(-1, keepdim=True)
        bound: Tensor = (log_q.exp() * (self._pixels(images) + above - log_q)).sum(-1)
        return bound

    def log_evidence(self, images: Tensor) -> Tensor:
        """log p(x), ``[images]``."""
        joint, _ = self._of_states()
        return (self._pixels(images) + joint.logsumexp(-1)).logsumexp(-1)

    def _of_states(self) -> tuple[Tensor, Tensor]:
        """log p(lower, upper) and log q(upper | lower) of all states, both ``[lower states, upper states]``."""
        lower, upper = states(self.sizes[0]), states(self.sizes[1])
        joint = log_bernoulli(self.down(upper), lower.unsqueeze(1)).sum(-1) + log_bernoulli(self.prior, upper).sum(-1)
        return joint, log_bernoulli(self.top(lower).unsqueeze(1), upper).sum(-1)

    def _pixels(self, images: Tensor) -> Tensor:
        """log p(x | lower), ``[images, lower states]``."""
        logits: Tensor = self.out(states(self.sizes[0]))
        log_prob: Tensor = images @ logits.T - nn.functional.softplus(logits).sum(-1)
        return log_prob


@dataclass(frozen=True)
class Point:
    """Where a fit stands: exact bound and log evidence of the test images, in nats per image, and CPU seconds."""

    step: int
    bound: float
    log_evidence: float
    seconds: float


@dataclass(frozen=True)
class Estimate:
    """The bound as the graph samples it, and the standard error that its draws leave."""

    bound: float
    error: float


def fit(
    way: str,
    data: Images,
    seed: int = 0,
    steps: int = 4000,
    progress: Callable[[Point], None] | None = None,
    *,
    latents: tuple[int, int] = (10, 5),
    learning_rate: float = 0.01,
    should_stop: Callable[[], bool] = lambda: False,
) -> tuple[TwoLayers, list[Point]]:
    """Train all parameters by Adam, whose learning rate decays to a tenth.

    Args:
        way: "flat", "nested" or "exact".
        data: to train on and to test on.
        seed: of start, minibatches and draws; the first two are the same for all ways.
        steps: of Adam.
        progress: called some 60 times on the way.
        latents: lower and upper.
        learning_rate: at the start.
        should_stop: asked after every step.
    """
    torch.manual_seed(seed)
    net, batches = TwoLayers(data.pixels, *latents), Batches(data.train, seed)
    optimiser = torch.optim.Adam(net.parameters(), learning_rate)
    decay = torch.optim.lr_scheduler.ExponentialLR(optimiser, 0.1 ** (1 / steps))
    draws, upper_draws = WAYS.get(way, (1, None))
    graph = sf.StochasticGraph(draws, audit_every=1000)  # the program is the same at every step

    def step() -> None:
        images = next(batches)
        optimiser.zero_grad()
        if way == "exact":
            loss = -net.exact_bound(images).mean()
        else:
            with graph:
                net.program(graph, images, upper_draws)
            loss = graph.surrogate().mean()
        loss.backward()
        optimiser.step()
        decay.step()

    curve = list[Point]()
    for mark in timed_steps(step, steps, should_stop=should_stop):
        with torch.no_grad():
            bound, evidence = (f(data.test).mean().item() for f in (net.exact_bound, net.log_evidence))
        curve.append(Point(mark.step, bound, evidence, mark.seconds))
        if progress is not None:
            progress(curve[-1])
    return net, curve


@torch.no_grad()
def estimate(net: TwoLayers, images: Tensor, draws: int = 200) -> Estimate:
    """The bound by the graph that trains, beside which ``exact_bound`` stands."""
    with sf.StochasticGraph(draws) as g:
        net.program(g, images)
    each = -g.surrogate().mean(-1)  # draws are independent, images are given
    return Estimate(each.mean().item(), (each.std() / len(each) ** 0.5).item())


def plot(curves: dict[str, list[Point]], path: Path) -> None:
    """Exact bound and evidence of the test images along the way."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    for number, (way, curve) in enumerate(curves.items()):
        at = [point.step for point in curve]
        axis.plot(at, [point.bound for point in curve], color=f"C{number}", label=way)
        axis.plot(at, [point.log_evidence for point in curve], ":", color=f"C{number}")
    axis.set(xlabel="step", ylabel="test images, nats each: exact bound, log evidence (dotted)")
    axis.legend()
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> int:
    """Fit in each way, then compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seed", type=at_least(0), default=0)
    parser.add_argument("--steps", type=at_least(1), default=4000)
    parser.add_argument("--ways", nargs="+", choices=[*WAYS, "exact"], default=[*WAYS, "exact"])
    parser.add_argument("--out", type=Path, default=Path("runs/sigmoid_belief_net"), help="folder of result and plot")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)  # before the work: a path that cannot be is found out at once
    data, curves, estimates = digits(), dict[str, list[Point]](), dict[str, Estimate]()
    with Interruption() as interrupted:
        for way in dict.fromkeys(options.ways):

            def show(point: Point, way: str = way) -> None:
                show_line(
                    f"{way:7} step {point.step:5d} of {options.steps}   bound {point.bound:8.3f}   log evidence "
                    f"{point.log_evidence:8.3f}   {point.seconds:5.1f} s CPU",
                    last=point.step == options.steps or interrupted(),
                )

            net, curves[way] = fit(way, data, options.seed, options.steps, show, should_stop=interrupted)
            estimates[way] = estimate(net, data.test)
            if interrupted():
                break
    for way, curve in curves.items():
        last, found = curve[-1], estimates[way]
        print(
            f"{way:7} exact bound {last.bound:.3f} (the graph says {found.bound:.3f} +- {found.error:.3f}), log "
            f"evidence {last.log_evidence:.3f}   {last.seconds:.1f} s CPU"
        )
    record = {
        "complete": not interrupted(),
        "ways": {way: {**asdict(curve[-1]), "estimate": asdict(estimates[way])} for way, curve in curves.items()},
        "curves": {way: [asdict(point) for point in curve] for way, curve in curves.items()},
    }
    write_result(options.out, vars(options), record)
    plot(curves, options.out / "sigmoid_belief_net.png")
    return 130 if interrupted() else 0


if __name__ == "__main__":
    sys.exit(main())
