"""Search distributions on their way: the points of each generation, and an ellipse of two standard deviations."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

import scorefn as sf
from applications.gallery.film import film
from scorefn.search import Strategy


class Generation(NamedTuple):
    """Where a search in the plane stands, and the points that it asks for next."""

    evaluations: int
    mean: Tensor  # [2]
    factor: Tensor  # [2, 2], A: the covariance is A A^T
    points: Tensor  # [N, 2]
    value: float  # of the mean


def rosenbrock(x: Tensor) -> Tensor:
    """``[N]`` of ``[N, 2]``: a curved valley, 0 at (1, 1)."""
    return 100 * (x[..., 1] - x[..., 0].square()).square() + (1 - x[..., 0]).square()


def rotated_ellipsoid(x: Tensor) -> Tensor:
    """``[N]`` of ``[N, 2]``: curvatures 1 and 1000, the axes turned by 40 degrees."""
    angle = math.radians(40)
    along = math.cos(angle) * x[..., 0] + math.sin(angle) * x[..., 1]
    across = math.cos(angle) * x[..., 1] - math.sin(angle) * x[..., 0]
    return along.square() + 1000 * across.square()


def way(strategy: Strategy, f: Callable[[Tensor], Tensor], generations: int) -> list[Generation]:
    """The generations of a search in the plane, until it stops."""
    found = list[Generation]()
    while not strategy.stop and len(found) < generations:
        mean = strategy.mean.clone()
        factor = torch.diag(strategy.sigma) if strategy.factor is None else strategy.factor
        x = strategy.ask()
        found.append(Generation(strategy.result.evaluations, mean, factor.clone(), x, float(f(mean))))
        strategy.tell(x, f(x))
    return found


def ellipse(state: Generation, deviations: float = 2.0) -> Tensor:
    """The outline ``m + deviations A u`` of all unit vectors u, ``[65, 2]``."""
    angle = torch.linspace(0, 2 * math.pi, 65, dtype=torch.float64)
    return state.mean + deviations * torch.stack([angle.cos(), angle.sin()], 1) @ state.factor.T


class Panel:
    """Contours of f, and one search upon them.

    Args:
        axes: to draw on.
        f: of points ``[N, 2]``.
        corners: lowest and highest coordinate of the picture, ``(x, x, y, y)``.
        colour: of the search.
    """

    def __init__(
        self, axes: Axes, f: Callable[[Tensor], Tensor], corners: tuple[float, float, float, float], colour: str
    ) -> None:
        x = torch.linspace(corners[0], corners[1], 161, dtype=torch.float64)
        y = torch.linspace(corners[2], corners[3], 161, dtype=torch.float64)
        grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)
        height = f(grid).clamp(min=1e-3).log10()
        axes.contour(x.numpy(), y.numpy(), height.numpy(), levels=12, colors="0.8", linewidths=0.8)
        axes.plot(*grid.flatten(0, 1)[f(grid).argmin()].tolist(), "k+", ms=9)
        (self._trail,) = axes.plot([], [], color=colour, lw=0.8)
        (self._outline,) = axes.plot([], [], color=colour, lw=1.6)
        (self._points,) = axes.plot([], [], ".", color="0.35", ms=4)
        axes.set(xlim=corners[:2], ylim=corners[2:], xticks=[], yticks=[])
        self._axes = axes

    def show(self, states: list[Generation], i: int, name: str) -> None:
        """The i-th generation, or the last one there is."""
        now = states[min(i, len(states) - 1)]
        self._trail.set_data(*torch.stack([state.mean for state in states[: i + 1]]).T.numpy())
        self._outline.set_data(*ellipse(now).T.numpy())
        self._points.set_data(*now.points.T.numpy())
        title = f"{name}{now.evaluations:5d} evaluations, f = {now.value:.0e}"
        self._axes.set_title(title, family="monospace", fontsize=9)


def draw_rosenbrock(out: Path, generations: int = 100) -> Path:
    """``search_path.gif``: CSANES in Rosenbrock's valley, one picture for each generation."""
    strategy = sf.search.CSANES([-1.2, 1.0], 0.3, seed=0, ftarget=1e-9)
    states = way(strategy, rosenbrock, generations)
    figure = Figure(figsize=(7.0, 3.3), dpi=90, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.3, 1])
    panel = Panel(left, rosenbrock, (-2.0, 2.0, -1.0, 3.0), "C3")
    (curve,) = right.plot([], [], color="C3")
    longest = states[-1].evaluations or 1
    right.set(yscale="log", xlim=(0, longest), ylim=(1e-10, 1e4), xlabel="evaluations", ylabel="f of the mean")
    right.grid(alpha=0.3)

    def show(i: int) -> None:
        panel.show(states, i, "")
        curve.set_data(
            [state.evaluations for state in states[: i + 1]], [max(state.value, 1e-12) for state in states[: i + 1]]
        )

    return film(out / "search_path.gif", figure, show, len(states))


def draw_rotated_ellipsoid(out: Path, generations: int = 90) -> Path:
    """``rotated_ellipsoid.gif``: a diagonal covariance (SNES) beside a full one (XNES), the same start and seed."""
    start = torch.tensor([-1.6, 1.4], dtype=torch.float64)
    searches = (sf.search.SNES, sf.search.XNES)
    ways = {
        kind.__name__: way(kind(start, 0.6, popsize=10, seed=0, ftarget=1e-6), rotated_ellipsoid, generations)
        for kind in searches
    }
    figure = Figure(figsize=(7.2, 3.7), dpi=90, layout="constrained")
    corners = (-2.6, 1.6, -2.4, 1.8)
    panels = [
        Panel(axes, rotated_ellipsoid, corners, colour)
        for axes, colour in zip(figure.subplots(1, 2), ("C0", "C3"), strict=True)
    ]

    def show(i: int) -> None:
        for panel, (name, states) in zip(panels, ways.items(), strict=True):
            panel.show(states, i, name)

    return film(out / "rotated_ellipsoid.gif", figure, show, max(len(states) for states in ways.values()))
