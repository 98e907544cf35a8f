"""The picture of the tour: five panels, one for each stage."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from applications.tour.stages import Tour
from applications.vi import belief_net_bounds


def draw_figure(tour: Tour, path: Path) -> None:
    """Five panels, one for each part."""
    ink, accent, quiet = "#1f2a44", "#d1495b", "#8d99ae"
    style = {
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": quiet,
        "axes.titleweight": "bold",
        "axes.titlesize": 10,
        "axes.titlelocation": "left",
        "text.color": ink,
        "axes.labelcolor": ink,
    }
    with plt.rc_context(style):
        figure, axes = plt.subplot_mosaic("aabbcc;ddeeee", figsize=(13, 7.4), layout="constrained")
        figure.suptitle(
            r"$\nabla\,\mathbb{E}_{x\sim p}[f(x)]\;=\;\mathbb{E}\left[\,f(x)\,\nabla\log p(x)+\nabla f(x)\,\right]$",
            fontsize=17,
        )
        _panel_derivation(axes["a"], tour, ink)
        _panel_cartpole(axes["b"], tour, ink, accent, quiet)
        _panel_posterior(axes["c"], tour, ink, quiet)
        _panel_black_box(axes["d"], tour, ink, accent)
        _panel_variance(axes["e"], tour, ink, quiet)
        figure.savefig(path, dpi=150)
        plt.close(figure)


def _panel_derivation(ax: Axes, tour: Tour, ink: str) -> None:
    for (name, gradient), marker, size in zip(
        tour.derivation.gradients.items(), "osD^x", (190, 120, 60, 26, 12), strict=True
    ):
        flat = gradient.flatten().tolist()
        ax.scatter(range(len(flat)), flat, s=size, marker=marker, label=name, alpha=0.75, linewidths=0.8)
    ax.axhline(0, color=ink, lw=0.6)
    ax.set(
        title=f"One policy gradient, five ways, {tour.derivation.largest_difference:.0e} apart",
        xlabel="logit (state, action)",
        ylabel="derivative",
    )
    low, high = ax.get_ylim()
    ax.set_ylim(low - 0.75 * (high - low), high + 0.05 * (high - low))  # room for the legend below the points
    ax.legend(fontsize=8, frameon=False, loc="lower left")


def _panel_cartpole(ax: Axes, tour: Tour, ink: str, accent: str, quiet: str) -> None:
    returns = tour.run.returns
    ax.plot(range(1, len(returns) + 1), returns, color=ink, marker="o", ms=3)
    ax.axhline(tour.run.config.threshold, color=quiet, ls="--", lw=1)
    ax.annotate(
        f"{len(tour.confirmation)} further episodes: {tour.confirmation.mean():.0f}\n"
        f"{tour.run.env_steps:,} steps, {tour.run.train_seconds:.1f} CPU s",
        (0.98, 0.06),
        xycoords="axes fraction",
        ha="right",
        color=accent,
    )
    ax.set(title="Trajectories: CartPole-v1", xlabel="update", ylabel="mean return of a batch", ylim=(0, 515))


def _panel_posterior(ax: Axes, tour: Tour, ink: str, quiet: str) -> None:
    exact, guide = belief_net_bounds.marginals(tour.fit.net, tour.fit.test)
    ax.plot([0, 1], [0, 1], color=quiet, lw=1)
    ax.scatter(exact.flatten(), guide.flatten(), s=4, alpha=0.25, color=ink, linewidths=0)
    ax.annotate(
        f"exact log evidence {tour.posterior.log_evidence:.2f}\nbound of the guide {tour.posterior.bound:.2f} nat",
        (0.04, 0.88),
        xycoords="axes fraction",
    )
    ax.set(
        title="Posteriors: digits, 10 bits an image",
        xlabel="exact posterior P(bit = 1), new images",
        ylabel="guide fitted by SVI",
    )


def _panel_black_box(ax: Axes, tour: Tour, ink: str, accent: str) -> None:
    evaluations, wrong = zip(*tour.mistakes["curve"], strict=True)
    ax.step(evaluations, wrong, color=ink, where="post", label="SNES on the count itself")
    ax.axhline(tour.mistakes["logistic_mistakes"], color=accent, ls="--", lw=1, label="logistic regression")
    ax.set(
        title="Search: 20 weights, no gradient",
        xlabel="evaluations",
        ylabel=f"wrong diagnoses of {tour.mistakes['patients']}",
        ylim=(0, None),
    )
    ax.legend(fontsize=8, frameon=False)


def _panel_variance(ax: Axes, tour: Tour, ink: str, quiet: str) -> None:
    names = [f"{c.problem}\n{c.reducers}" for c in tour.checks]
    places = list(range(len(names)))
    ax.barh([y + 0.19 for y in places], [c.variance_without / c.exact_norm**2 for c in tour.checks], 0.36, color=quiet)
    ax.barh([y - 0.19 for y in places], [c.variance_with / c.exact_norm**2 for c in tour.checks], 0.36, color=ink)
    for y, c in zip(places, tour.checks, strict=True):
        times = c.variance_without / c.variance_with
        ax.annotate(
            f" {times:,.{0 if times > 10 else 1}f} times less",
            (c.variance_with / c.exact_norm**2, y - 0.19),
            va="center",
        )
    ax.set_yticks(places, names, fontsize=8)
    ax.set(
        title="Gradient variance: without reducers (grey) and with", xscale="log", xlabel="variance / squared length"
    )
