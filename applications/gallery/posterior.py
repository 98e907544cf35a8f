"""A guide closes in on the exact posterior: the year of ``applications.vi.change_point``, on the way of its fit."""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from applications.gallery.film import film
from applications.vi.change_point import Change, Year, fit, load
from applications.vi.fitting import Progress


def way(change: Change, steps: int = 1200, seed: int = 0) -> tuple[list[Progress], list[Tensor]]:
    """Some sixty notes of a fit of ``Year``, and q(change) at each of them, ``[T - 1]``."""
    problem = Year(change)
    points, guides = list[Progress](), list[Tensor]()

    def note(point: Progress) -> None:
        points.append(point)
        guides.append(problem.years())

    fit(problem, seed, steps, note)
    return points, guides


def draw(out: Path, steps: int = 1200, kept: float = 5e-4) -> Path:
    """``posterior.gif``: the uniform guide first, then one picture for every twenty steps.

    Args:
        out: folder.
        steps: of the fit.
        kept: years of this posterior probability or more are shown.
    """
    change = load()
    exact = change.posterior()
    points, guides = way(change, steps)
    states = [(0, torch.full_like(exact, 1 / len(exact)))]
    states += [(point.step, q) for point, q in zip(points, guides, strict=True)]
    shown = exact >= kept
    years = torch.tensor(change.years)[shown].tolist()
    figure = Figure(figsize=(6.4, 3.2), dpi=90, layout="constrained")
    axis = figure.subplots()
    bars = axis.bar(years, exact[shown].tolist(), color="C0", label="guide")
    axis.step(years, exact[shown].tolist(), where="mid", color="black", label="exact posterior")
    axis.set_xticks(years[::2])
    axis.set(xlabel="first year of the late rate", ylabel="probability", ylim=(0, 1.25 * float(exact.max())))
    axis.legend(loc="upper right")

    def show(i: int) -> None:
        step, q = states[i]
        for bar, value in zip(bars, q[shown].tolist(), strict=True):
            bar.set_height(value)
        away = float((q - exact).abs().sum()) / 2
        axis.set_title(f"step {step:4d}, total variation {away:.4f}", family="monospace", fontsize=10)

    return film(out / "posterior.gif", figure, show, len(states))
