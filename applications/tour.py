"""One identity, three doors, in under a minute: ``python -m applications.tour [--seed S] [--out DIR] [--quick]``.

1. The textbook derivation on a tabular Markov decision process: five computations of one policy gradient agree to
   rounding, and the dynamics cancel.
2. CartPole-v1 is trained until a sampled policy returns 475 or more over 100 fresh episodes.
3. A Pyro guide with discrete latents is fitted to scanned digits and held against the exact posterior.
4. A 20-dimensional black box without any gradient is minimised.
5. Estimated gradients are held against exact ones, without and with variance reducers.

Written: ``tour.json`` with every number, ``tour.png`` with the picture. The exit status is 1 where anything that
should agree does not.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import pyro
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor
from torch.distributions import Bernoulli, Normal

import scorefn as sf
from applications.bbo import fewest_mistakes
from applications.rl import cartpole, tabular_mdp
from applications.vi import belief_net_bounds, belief_net_training

Report = Callable[[float, str], None]  # share done, what to say
Loss = Callable[[], Tensor]


@dataclass(frozen=True)
class GradientCheck:
    """One gradient, exact and estimated without and with variance reducers; moments are over ``repeats`` estimates.

    Attributes:
        problem: what is differentiated.
        reducers: what "with" uses beyond "without".
        exact_norm: length of the exact gradient.
        estimated_error: distance of the mean estimate (with reducers) from it, as a share of its length.
        expected_error: what the standard error lets one expect of that share.
        largest_z: over the coordinates, deviation from the exact gradient in standard errors (with reducers).
        variance_without: total variance of one estimate without reducers.
        variance_with: with them.
        milliseconds: CPU time of one estimate and its gradient (with reducers).
    """

    problem: str
    reducers: str
    coordinates: int
    exact_norm: float
    estimated_error: float
    expected_error: float
    largest_z: float
    variance_without: float
    variance_with: float
    milliseconds: float
    repeats: int

    @property
    def agrees(self) -> bool:
        """Whether no coordinate deviates by more than chance allows: about one false alarm in a million tours."""
        false_alarm = 1e-6 / self.coordinates
        return self.largest_z < (2 * torch.tensor(1.0 / false_alarm).log()).sqrt().item() + 1.0


def gradient_check(
    problem: str, reducers: str, without: Loss, reduced: Loss, params: list[Tensor], exact: list[Tensor], repeats: int
) -> GradientCheck:
    """Measure both estimators, in turn."""
    table = sf.diagnostics.compare({"without": without, "with": reduced}, params, exact, repeats=repeats)
    with_reducers = table.statistics["with"]
    truth = torch.cat([g.flatten() for g in exact])
    estimate = torch.cat([g.flatten() for g in with_reducers.mean])
    return GradientCheck(
        problem=problem,
        reducers=reducers,
        coordinates=len(truth),
        exact_norm=truth.norm().item(),
        estimated_error=((estimate - truth).norm() / truth.norm()).item(),
        expected_error=(with_reducers.total_variance / repeats) ** 0.5 / truth.norm().item(),
        largest_z=table.bias_z["with"],
        variance_without=table.statistics["without"].total_variance,
        variance_with=with_reducers.total_variance,
        milliseconds=1e3 * with_reducers.seconds,
        repeats=repeats,
    )


def bernoulli_check(repeats: int) -> GradientCheck:
    """Five coins and a quadratic; exact by enumeration of 32 outcomes."""
    logits = torch.zeros(5, requires_grad=True)
    p = Bernoulli(logits=logits)

    def f(x: Tensor) -> Tensor:
        return (x - 0.45).square().sum(-1)

    def loss(baseline: Any) -> Loss:
        return lambda: sf.expectation(p, f, 16, baseline=baseline)

    exact = sf.diagnostics.exact_gradient(p, f, [logits])
    return gradient_check(
        "five Bernoullis, 16 draws", "leave-one-out", loss(None), loss("auto"), [logits], list(exact), repeats
    )


def search_check(repeats: int) -> GradientCheck:
    """A normal search distribution on a curved valley; exact by quadrature."""
    location = torch.tensor([-0.5, 1.0], requires_grad=True)
    log_scale = torch.tensor([-1.0, -1.0], requires_grad=True)
    params = [location, log_scale]

    def p() -> Normal:
        return Normal(location, log_scale.exp())

    def f(x: Tensor) -> Tensor:
        return (x[..., 0] - 1).square() + 10 * (x[..., 1] - x[..., 0].square()).square()

    def loss(baseline: Any) -> Loss:
        return lambda: sf.expectation(p(), f, 16, baseline=baseline)

    exact = sf.diagnostics.exact_gradient(p(), f, params)
    return gradient_check(
        "Normal on a valley, 16 draws", "leave-one-out", loss(None), loss("auto"), params, list(exact), repeats
    )


def trajectory_check(seed: int, repeats: int) -> GradientCheck:
    """Episodes of the tabular problem; exact by summing over all of them."""
    mdp = tabular_mdp.TabularMDP.random(seed)
    logits = torch.zeros(mdp.reward.shape[:2], dtype=torch.float64, requires_grad=True)
    p = tabular_mdp.EpisodeDistribution(mdp, logits)

    def loss(credit: Any, baseline: Any) -> Loss:
        return lambda: sf.expectation(p, tabular_mdp.rewards, 16, credit=credit, baseline=baseline)

    (exact,) = torch.autograd.grad(tabular_mdp.backward_induction(mdp, logits), logits)
    without, reduced = loss(sf.Total(), None), loss(None, "auto")
    return gradient_check(
        "tabular MDP, 16 episodes", "reward-to-go, leave-one-out", without, reduced, [logits], [exact], repeats
    )


def posterior_check(fit: belief_net_training.Training, repeats: int) -> GradientCheck:
    """The guide of the digits on one batch; exact by summing over the 1024 states of each image."""
    images, params = fit.train[:50], [list(fit.net.encoder.parameters())[-1]]  # ten biases, one for each latent

    def loss(baseline: Any) -> Loss:
        elbo = sf.posteriors.ScoreFunctionELBO(num_particles=8, max_plate_nesting=1, baseline=baseline)

        def estimate() -> Tensor:
            with pyro.get_param_store().scope():
                return -elbo.differentiable_loss(fit.net.model, fit.net.guide, images) / fit.net.num_images

        return estimate

    exact = torch.autograd.grad(fit.net.exact_bound(images).mean(), params)
    return gradient_check(
        "digits in Pyro, 8 particles",
        "leave-one-out",
        loss(None),
        loss("auto"),
        params,
        list(exact),
        repeats,
    )


@dataclass
class Tour:
    """What was found on the way."""

    seed: int
    derivation: tabular_mdp.Derivation
    run: cartpole.Run
    confirmation: Tensor
    fit: belief_net_training.Training
    posterior: belief_net_bounds.Comparison
    mistakes: dict[str, Any]
    checks: list[GradientCheck]
    seconds: dict[str, float]

    @property
    def failures(self) -> list[str]:
        """What should agree and does not."""
        found = []
        if self.derivation.largest_difference > 1e-10:
            found.append(f"the five gradients differ by {self.derivation.largest_difference:.1e}")
        if not self.confirmation.mean() >= self.run.config.threshold:
            found.append(f"CartPole returned {self.confirmation.mean():.1f}, not {self.run.config.threshold:g}")
        found += [
            f"{check.problem}: {check.largest_z:.1f} standard errors off" for check in self.checks if not check.agrees
        ]
        return found

    def as_json(self) -> dict[str, Any]:
        """Every number, as plain data."""
        run = self.run
        return {
            "seed": self.seed,
            "versions": {name: version(name) for name in ("scorefn", "torch", "gymnasium", "pyro-ppl")}
            | {"python": platform.python_version()},
            "derivation": {
                "largest_difference": self.derivation.largest_difference,
                "value": self.derivation.value,
                "gradients": {name: g.tolist() for name, g in self.derivation.gradients.items()},
            },
            "cartpole": {
                "updates": run.updates,
                "env_steps": run.env_steps,
                "training_cpu_seconds": run.train_seconds,
                "returns": run.returns,
                "confirmed_mean": self.confirmation.mean().item(),
                "confirmed_episodes": len(self.confirmation),
            },
            "digits": asdict(self.posterior)
            | {"gap": self.posterior.gap, "curve": [[point.step, point.bound] for point in self.fit.curve]},
            "black_box": self.mistakes,
            "gradients": [asdict(check) for check in self.checks],
            "seconds": self.seconds,
            "failures": self.failures,
        }


def take(seed: int, quick: bool, stage: Callable[[str], Any]) -> Tour:
    """Walk through all five parts; ``stage(title)`` is a context manager that gives a ``Report``."""
    seconds: dict[str, float] = {}

    @contextmanager
    def timed(title: str) -> Iterator[Report]:
        start = time.perf_counter()
        with stage(title) as report:
            yield report
        seconds[title] = time.perf_counter() - start

    torch.manual_seed(seed)
    with timed("1  one policy gradient, five ways"):
        derivation = tabular_mdp.derivation(seed)
    with timed("2  CartPole-v1") as report:
        goal = cartpole.Config().stop_at
        run = cartpole.train(
            seed, progress=lambda r: report(r.returns[-1] / goal, f"{r.env_steps:,} steps, return {r.returns[-1]:.0f}")
        )
        confirmation = cartpole.confirm(run)
    with timed("3  digits in Pyro") as report:
        steps = 300 if quick else 1500
        fit = belief_net_training.fit(
            seed, steps, lambda p: report(p.step / p.steps, f"bound {p.bound:.2f} nat per image")
        )
        posterior = belief_net_bounds.compare(fit.net, fit.test)
    with timed("4  a black box in 20 dimensions") as report:
        mistakes = fewest_mistakes.run(seed, lambda n, wrong: report(min(0.99, n / 4000), f"{wrong:.0f} mistakes"))
    with timed("5  gradients, exact and estimated") as report:
        repeats = 200 if quick else 1000
        checks = []
        for done, check in enumerate(
            (
                lambda: bernoulli_check(repeats),
                lambda: trajectory_check(seed, repeats),
                lambda: posterior_check(fit, repeats // 2),
                lambda: search_check(repeats),
            )
        ):
            checks.append(check())
            report((done + 1) / 4, checks[-1].problem)
    return Tour(seed, derivation, run, confirmation, fit, posterior, mistakes, checks, seconds)


def table(checks: list[GradientCheck]) -> Table:
    """The gradients, one row each."""
    rows = Table(
        title="Estimated gradients against exact ones; variance without and with reducers",
        caption="error: of the mean estimate, as a share of the exact length (in brackets: what its noise explains); "
        "z: largest deviation of a coordinate in standard errors",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    rows.add_column("estimator", overflow="fold")
    for name in ("exact", "error", "z", "variance\nwithout", "variance\nwith", "seconds"):
        rows.add_column(name, justify="right", no_wrap=True)
    for c in checks:
        rows.add_row(
            f"{c.problem}\n  {c.reducers}",
            f"{c.exact_norm:.4g}",
            f"{c.estimated_error:.1%} ({c.expected_error:.1%})",
            f"{c.largest_z:.1f}",
            f"{c.variance_without:.3g}",
            f"{c.variance_with:.3g}",
            f"{c.milliseconds / 1e3:.5f}",
        )
    return rows


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


@contextmanager
def live_stage(console: Console, title: str) -> Iterator[Report]:
    """A progress bar where somebody watches, a line where nobody does."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(f"{title:38}", total=1.0, note="")
        start = time.perf_counter()
        note = ""

        def report(share: float, text: str) -> None:
            nonlocal note
            note = text
            progress.update(task, completed=min(1.0, max(0.0, share)), note=text)

        yield report
        progress.update(task, completed=1.0)
    if not console.is_terminal:
        console.print(f"{title:38} {time.perf_counter() - start:5.1f} s  {note}", highlight=False, soft_wrap=True)


def main(argv: list[str] | None = None) -> int:
    """Take the tour; 0 where everything agrees, 1 where something does not, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/tour"), help="where tour.json and tour.png go")
    parser.add_argument("--quick", action="store_true", help="fewer steps and repeats: a look, not a measurement")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    console, start = Console(), time.perf_counter()
    try:
        tour = take(arguments.seed, arguments.quick, lambda title: live_stage(console, title))
    except KeyboardInterrupt:
        console.print("\nStopped; nothing was written.")
        return 130
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "tour.json").write_text(json.dumps(tour.as_json(), indent=1) + "\n", encoding="utf-8")
    draw_figure(tour, arguments.out / "tour.png")

    console.print()
    for line in tour.derivation.lines():
        console.print(line, highlight=False, soft_wrap=True)
    console.print(
        f"\nCartPole-v1: {tour.run.updates} updates, {tour.run.env_steps:,} steps, {tour.run.train_seconds:.2f} CPU s "
        f"of training; {len(tour.confirmation)} further sampled episodes return {tour.confirmation.mean():.1f}.\n"
        f"Digits: exact log evidence {tour.posterior.log_evidence:.3f}, bound of the guide {tour.posterior.bound:.3f} "
        f"nat per image (gap {tour.posterior.gap:.3f}); marginals differ from the exact posterior by "
        f"{tour.posterior.mean_marginal_difference:.3f} on average.\n"
        f"Black box: {tour.mistakes['mistakes']} mistakes of {tour.mistakes['patients']} after "
        f"{tour.mistakes['evaluations']:,} evaluations; logistic regression makes "
        f"{tour.mistakes['logistic_mistakes']}.\n",
        highlight=False,
        soft_wrap=True,
    )
    console.print(table(tour.checks))
    console.print(f"Written to {arguments.out}/tour.json and tour.png in {time.perf_counter() - start:.0f} s.")
    for failure in tour.failures:
        console.print(f"[bold red]Does not agree:[/] {failure}")
    return 1 if tour.failures else 0


if __name__ == "__main__":
    sys.exit(main())
