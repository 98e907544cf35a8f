"""A fit that is watched from outside: its exact bound on the way, and when it had arrived."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from applications.progress import show_line, timed_steps


@dataclass(frozen=True)
class Progress:
    """Where a fit stands.

    Attributes:
        step: the last one taken.
        steps: how many there will be.
        bound: exact, not an estimate.
        gap: nats from the bound up to the best.
        seconds: of CPU, spent in the steps alone.
        others: what else is told of it, by name.
    """

    step: int
    steps: int
    bound: float
    gap: float
    seconds: float
    others: Mapping[str, float]


def watched(
    step: Callable[[], Any],
    steps: int,
    bound: Callable[[], Tensor],
    best: float,
    progress: Callable[[Progress], None] | None = None,
    *,
    others: Callable[[], Mapping[str, float]] = dict,
    marks: int = 60,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[Progress]:
    """Take the steps of a fit and note its bound some times on the way, and at the end.

    Args:
        step: called so many times.
        steps: how many.
        bound: exact.
        best: what it can reach.
        progress: called with each note.
        others: what else a note says.
        marks: about how many notes.
        should_stop: asked after every step.
    """
    curve = list[Progress]()
    for mark in timed_steps(step, steps, marks=marks, should_stop=should_stop):
        with torch.no_grad():
            value = bound().item()
        curve.append(Progress(mark.step, steps, value, best - value, mark.seconds, dict(others())))
        if progress is not None:
            progress(curve[-1])
    return curve


def arrival(curve: Sequence[Progress], nats: float) -> Progress | None:
    """The first note from which on the bound stayed within so many nats of the best; None: it did not."""
    away = [point.step for point in curve if point.gap > nats]
    after = [point for point in curve if not away or point.step > away[-1]]
    return after[0] if after else None


def decaying(steps: int, learning_rate: float, to: float) -> dict[str, Any]:
    """Arguments of Pyro's ClippedAdam: a learning rate that decays to a share of itself in so many steps.

    Squared gradients are averaged over 100 steps rather than 1000, as gradients shrink by orders of magnitude within a
    fit that is judged to hundredths of a nat.
    """
    return {"lr": learning_rate, "betas": (0.9, 0.99), "lrd": to ** (1 / steps)}


def ascend(parameters: Iterable[Tensor], bound: Callable[[], Tensor]) -> None:
    """Set parameters to the best that the exact gradient of their bound finds from where they are, by L-BFGS."""
    own = list(parameters)
    optim = torch.optim.LBFGS(
        own, max_iter=1000, tolerance_grad=1e-10, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optim.zero_grad()
        loss = -bound()
        loss.backward()
        return loss

    optim.step(closure)
    for parameter in own:
        parameter.grad = None


def show(progress: Progress) -> None:
    """One line that is written over on a terminal."""
    others = "".join(f"   {name} {value:.4f}" for name, value in progress.others.items())
    show_line(
        f"step {progress.step:5d} of {progress.steps}   bound {progress.bound:10.4f}   below the best "
        f"{progress.gap:9.5f}{others}   {progress.seconds:5.1f} s CPU",
        last=progress.step == progress.steps,
    )


def draw_ways(
    axis: Any, curves: Mapping[str, Sequence[Progress]], *, seconds: bool = False, first_colour: int = 0
) -> None:
    """How far below the best each fit was, on an axis of matplotlib.

    Args:
        axis: to draw on.
        curves: by name.
        seconds: against CPU time; otherwise against steps.
        first_colour: of matplotlib's cycle.
    """
    for number, (name, curve) in enumerate(curves.items(), first_colour):
        places = [point.seconds if seconds else point.step for point in curve]
        axis.plot(places, [max(point.gap, 1e-12) for point in curve], color=f"C{number}", label=name)
    axis.set(yscale="log", xlabel="CPU seconds" if seconds else "step", ylabel="below the best bound, nats")
    axis.legend()
