"""Variance, bias and cost of every estimator of the ELBO's gradient, on a sigmoid belief net that is held still.

The estimators are those of ``gradient_estimators.py``. The gradient is the one in the guide's logits, image by image:
for each image one problem with K Bernoulli latents, whose f is log p(x, z) - log q(z | x). For R estimates ``g_r``
``[images, K]`` of the same minibatches::

    variance = 1/R sum_r d_r,   d_r = R / (R - 1) ||g_r - mean g||^2 / images

which is the sample variance, summed over the latents and averaged over the images; intervals are bootstraps over the
d_r. Every estimator sees the same minibatches, in turn. With up to 12 latents the gradient is summed by
``sf.Enumerate``, and the variance of leave-one-out has a closed form (``leave_one_out_variance``); beyond, the truth is
a long average of leave-one-out. ``python -m applications.vi.discrete_vae --study R`` is the program.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Independent

import scorefn as sf
from applications.over_seeds import Interval, bootstrap
from applications.vi.belief_net import MOST_SUMMED, BeliefNet, states
from applications.vi.gradient_estimators import (
    BlackBox,
    Estimate,
    estimators,
    gradient,
    leave_one_out,
    problem,
    tuned,
)
from applications.vi.images import Batches

MINIBATCHES = 5  # of 100 images each
REFERENCE_DRAWS = (100, 50)  # for an image, together and one after the other, where nothing can be summed
TUNED = 500  # minibatches on which REBAR, RELAX and the alpha of the double control variate are tuned


# ---------------------------------------------------------------------------------------------------- what is measured


def leave_one_out_variance(p: Independent[Any], f: BlackBox, num_samples: int) -> Tensor:
    """Of leave-one-out with n draws, exactly, summed over the K latents: ``[images]``.

    The estimate is a U-statistic of the pairs ``1/2 (f_i - f_j)(s_i - s_j)``, so that with the score s, ``a = f - E f``
    and ``g = E[a s]`` its variance follows from moments of one draw::

        ((n - 1) E[a^2 |s|^2] - (n - 2) |g|^2 + E[a^2] E|s|^2) / (n (n - 1))

    Source: Hoeffding (1948), "A class of statistics with asymptotically normal distribution".

    Raises:
        sf.ScorefnError: more latents than can be summed.
    """
    logits = p.base_dist.logits.detach()
    z = states(logits.shape[-1]).to(logits)[:, None].expand(-1, *logits.shape)
    weight = p.log_prob(z).detach().exp()
    score, fx = z - logits.sigmoid(), f(z)
    a = fx - (weight * fx).sum(0)
    length = score.square().sum(-1)
    both, g = (weight * a.square() * length).sum(0), ((weight * a)[..., None] * score).sum(0)
    apart = (weight * a.square()).sum(0) * (weight * length).sum(0)
    n = num_samples
    variance: Tensor = ((n - 1) * both - (n - 2) * g.square().sum(-1) + apart) / (n * (n - 1))
    return variance


@dataclass(frozen=True)
class Row:
    """What is measured of an estimator.

    Args:
        name: of the tables.
        evaluations: of f, for an image and an estimate.
        slopes: of them, those in which f is differentiated too.
        squares: d_r of each repeat.
        error: length of the mean deviation from the truth, in its own standard errors; about 1 if unbiased.
        milliseconds: of CPU for a minibatch, value and gradient, median.
        exact: the variance, where it is known.
    """

    name: str
    evaluations: int
    slopes: int
    squares: tuple[float, ...]
    error: float
    milliseconds: float
    exact: float | None = None

    @property
    def variance(self) -> Interval:
        """Summed over the latents, averaged over the images."""
        return bootstrap(self.squares, np.mean)

    def over(self, other: Row) -> Interval:
        """The ratio of the variances."""
        count = len(self.squares)

        def ratio(both: Any, axis: int = -1) -> Any:
            return both[..., :count].mean(axis) / both[..., count:].mean(axis)

        return bootstrap([self.squares, other.squares], ratio)


@dataclass(frozen=True)
class Study:
    """All rows, why an estimator has none, and what tuning led to."""

    rows: dict[str, Row]
    skipped: dict[str, str]
    tuned: dict[str, str]
    images: int
    repeats: int

    def peer(self, row: Row) -> Row | None:
        """Leave-one-out with as many evaluations."""
        return self.rows.get(leave_one_out(row.evaluations)[0])

    def __str__(self) -> str:
        """Table, the published order, what was tuned and what is missing."""
        notes = [f"{name}: {text}" for name, text in (self.tuned | self.skipped).items()]
        head = f"gradient in the logits, {self.images} images, {self.repeats} estimates each"
        return "\n".join([f"\n{head}\n{table(self)}\n", ordering(self), "", *notes])

    def record(self) -> dict[str, Any]:
        """As JSON takes it."""
        rows = {name: asdict(row) | {"variance": row.variance._asdict()} for name, row in self.rows.items()}
        told = {"images": self.images, "repeats": self.repeats, "skipped": self.skipped, "tuned": self.tuned}
        return {**told, "rows": rows}


class Counted:
    """A black box that knows how often it was evaluated for an image, and how often on z that asks for a gradient."""

    def __init__(self, f: BlackBox) -> None:
        self.f, self.evaluations, self.slopes = f, 0, 0

    def __call__(self, z: Tensor) -> Tensor:
        """f."""
        self.evaluations += len(z)
        self.slopes += len(z) if z.requires_grad else 0
        return self.f(z)


def counts(estimate: Estimate, p: Independent[Any], f: BlackBox) -> tuple[int, int]:
    """Evaluations and slopes of one estimate.

    Raises:
        sf.ScorefnError: the estimator does not serve p.
    """
    counted = Counted(f)
    gradient(estimate, p, counted)
    return counted.evaluations, counted.slopes


def truth(p: Independent[Any], f: BlackBox) -> tuple[Tensor, float]:
    """The gradient ``[images, K]``, and the variance of what it is known by, summed over all its entries."""
    if p.event_shape.numel() <= MOST_SUMMED:
        return gradient(sf.Enumerate(), p, f), 0.0
    draws, times = REFERENCE_DRAWS
    _, estimate = leave_one_out(draws)
    found = torch.stack([gradient(estimate, p, f) for _ in range(times)])
    return found.mean(0), found.var(0).sum().item() / times


class Tally:
    """What the minibatches add to the row of an estimator."""

    def __init__(self, repeats: int) -> None:
        self.squares = torch.zeros(repeats, dtype=torch.float64)  # sums over the images, of each repeat
        self.missed = self.expected = 0.0  # squared length of the mean deviation, and of what noise makes of it
        self.exact = 0.0
        self.seconds = list[float]()

    def add(self, estimates: Tensor, right: Tensor, doubt: float) -> None:
        """Estimates ``[repeats, images, K]`` of a minibatch; the doubt is the variance of what is held for right."""
        mean, repeats = estimates.mean(0), len(estimates)
        squares = (estimates - mean).square().sum((1, 2)).double() * (repeats / (repeats - 1))
        self.squares += squares
        self.missed += (mean - right).square().sum().item()
        self.expected += squares.mean().item() / repeats + doubt

    def row(self, name: str, evaluations: int, slopes: int, images: int) -> Row:
        """The whole."""
        squares = tuple((self.squares / images).tolist())
        error, milliseconds = (self.missed / self.expected) ** 0.5, 1e3 * float(np.median(self.seconds))
        return Row(name, evaluations, slopes, squares, error, milliseconds, self.exact / images or None)


def study(
    net: BeliefNet,
    images: Tensor,
    repeats: int = 100,
    *,
    minibatches: int = MINIBATCHES,
    tuning: int = TUNED,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Study | None:
    """Measure every estimator; None where stopped.

    Args:
        net: held still.
        images: to take minibatches of 100 from, ``[images, pixels]``.
        repeats: R, 2 or more, for each minibatch.
        minibatches: how many.
        tuning: minibatches for what is tuned.
        seed: of the minibatches and of all draws.
        progress: called with the rounds done and the rounds to do, about four times for each minibatch.
        should_stop: asked after every round, an estimate of each estimator.
    """
    torch.manual_seed(seed)
    batches = Batches(images, seed)
    chosen = [next(batches) for _ in range(minibatches)]
    known, skipped, cost = dict[str, Estimate](), dict[str, str](), dict[str, tuple[int, int]]()
    prepared = tuned(net, images, tuning, seed + 1)
    for name, estimate in (estimators() | prepared).items():
        try:
            cost[name] = counts(estimate, *problem(net, chosen[0][:1]))
            known[name] = estimate
        except sf.ScorefnError as error:
            skipped[name] = str(error)
    for count in sorted({evaluations for evaluations, _ in cost.values() if evaluations > 1}):
        name, estimate = leave_one_out(count)
        known[name], cost[name] = estimate, (count, 0)
    tallies = {name: Tally(repeats) for name in known}
    for number, batch in enumerate(chosen):
        p, f = problem(net, batch)
        right, doubt = truth(p, f)
        found = {name: right.new_empty(repeats, *right.shape) for name in known}
        for repeat in range(repeats):
            for name, estimate in known.items():
                begin = time.process_time()
                found[name][repeat] = gradient(estimate, p, f)
                tallies[name].seconds.append(time.process_time() - begin)
            if should_stop():
                return None
            if progress is not None and (repeat + 1) % max(1, repeats // 4) == 0:
                progress(number * repeats + repeat + 1, minibatches * repeats)
        for name, tally in tallies.items():
            tally.add(found[name], right, doubt)
            if net.latents <= MOST_SUMMED and name == leave_one_out(cost[name][0])[0]:
                tally.exact += leave_one_out_variance(p, f, cost[name][0]).sum().item()
    total = sum(len(batch) for batch in chosen)
    rows = {name: tallies[name].row(name, *cost[name], total) for name in sorted(known, key=lambda name: cost[name][0])}
    return Study(rows, skipped, {name: repr(estimate) for name, estimate in prepared.items()}, total, repeats)


# -------------------------------------------------------------------------------------------------- tables and a plot

PUBLISHED = ("DoubleControlVariate (3), fitted", "ARMS (3)", "DisARM (1 pair)", "leave-one-out (2)")
"""The order of training bounds at 200 latents in the literature, the best first; the first two are about equal."""


def told(interval: Interval) -> str:
    """With four digits, whatever its size."""
    return f"{interval.estimate:.4g} [{interval.low:.4g}, {interval.high:.4g}]"


def table(found: Study) -> str:
    """As Markdown; the ratio is that to leave-one-out with as many evaluations, intervals are of 95 %."""
    lines = [
        "| estimator | evaluations of f | slopes of f | variance | exact | ratio at equal evaluations | error | CPU ms "
        "| variance x evaluations | variance x ms |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in found.rows.values():
        variance, peer = row.variance, found.peer(row)
        ratio = "" if peer is None or peer is row else told(row.over(peer))
        exact = "" if row.exact is None else f"{row.exact:.3g}"
        products = (f"{variance.estimate * cost:.4g}" for cost in (row.evaluations, row.milliseconds))
        lines.append(
            f"| {row.name} | {row.evaluations} | {row.slopes} | {told(variance)} | {exact} | {ratio} "
            f"| {row.error:.2f} | {row.milliseconds:.2f} | {' | '.join(products)} |"
        )
    return "\n".join(lines)


def ordering(found: Study) -> str:
    """The published order, neighbour by neighbour: ratios of variances, as they are and per evaluation of f."""
    lines = ["| one | other | variance, one / other | per evaluation |", "|---|---|---|---|"]
    for one, other in pairwise(PUBLISHED):
        first, second = found.rows[one], found.rows[other]
        ratio = first.over(second)
        each = Interval(*(first.evaluations / second.evaluations * number for number in ratio))
        lines.append(f"| {one} | {other} | {told(ratio)} | {told(each)} |")
    return "\n".join(lines)


def plot(found: Study, path: Path) -> None:
    """Each row's variance, as it is and times each cost, with its interval; leave-one-out in grey."""
    from matplotlib.figure import Figure

    rows = list(found.rows.values())[::-1]
    figure = Figure(figsize=(13, 0.6 + 0.27 * len(rows)), layout="constrained")
    costs = {
        "variance": [1.0 for _ in rows],
        "variance x evaluations of f": [float(row.evaluations) for row in rows],
        "variance x CPU ms": [row.milliseconds for row in rows],
    }
    for axes, (label, cost) in zip(figure.subplots(1, 3, sharey=True), costs.items(), strict=True):
        for height, (row, factor) in enumerate(zip(rows, cost, strict=True)):
            at, low, high = (factor * number for number in row.variance)
            colour = "0.5" if found.peer(row) is row else "C0"
            axes.errorbar(at, height, xerr=[[at - low], [high - at]], fmt="o", ms=4, color=colour)
        axes.set(xscale="log", xlabel=label)
        axes.grid(axis="y", color="0.9")
    figure.axes[0].set_yticks(range(len(rows)), [row.name for row in rows])
    figure.savefig(path, dpi=100)
