"""The page: sections, summary, and what to take from it."""

from __future__ import annotations

import platform
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from typing import Any

import torch

import scorefn as sf
from applications.benchmarks.reducers.variances import Problem, Row, number, table
from applications.vi import capture_recapture


def page(sections: list[str], command: str) -> str:
    """The whole page."""
    packages = "".join(f", {name} {version(name)}" for name in ("pyro-ppl", "gymnasium", "scikit-learn"))
    head = f"""# What each reducer saves

Measured on {date.today()} on a 2-core shared x86-64 machine with one torch thread, in CPU seconds: scorefn
{sf.__version__}, Python {platform.python_version()}, torch {torch.__version__}{packages}. The machine was
busy; ratios within one table are more reliable than absolute times.

    OMP_NUM_THREADS=1 {command}

The variance is that of one estimate, summed over the parameters that are named. The estimators of a table take turns
in every round; what has a state is warmed up on rounds that do not count, with the parameters held, which flatters it:
in training they move. Brackets are 95 % intervals of a bootstrap over rounds. *Ratio* is to the variance of the first
row, *time ratio* to its time, a median over rounds. *Error*, where the exact gradient is known, is the length of the
mean deviation from it in its own standard errors: about 1 if unbiased, up to 3 by chance where there is a single
parameter. *Variance x ms* is the price of precision: the lower the better."""
    return "\n\n".join([head, *sections]) + "\n"


def summary(found: list[tuple[Problem, list[Row]]]) -> str:
    """Of each problem and part, the estimator with the least variance x time, where it is clearly not the first."""
    lines = [
        "## In short",
        "",
        "The least variance x time of each table relative to its first row, which stays where no other is better by",
        "more than its interval.",
        "",
        "| problem | cheapest | variance | CPU time | variance x time |",
        "|---|---|---|---|---|",
    ]
    for problem, (first, *others) in found:
        for part in problem.parts:
            clear = [
                row for row in others if row.ratio[part][2] * row.time_ratio < 1 and not row.name.startswith("pathwise")
            ]
            best = min(clear, key=lambda row: row.ratio[part][0] * row.time_ratio, default=first)
            ratio = best.ratio[part][0]
            of = f", {part}" if len(problem.parts) > 1 else ""
            cells = [number(ratio), f"{best.time_ratio:.2f}", number(ratio * best.time_ratio)]
            lines.append(f"| {problem.title}{of} | {best.name} | {' | '.join(cells)} |")
    return "\n".join(lines)


LESSONS = """## What to take from it

* Leave-one-out is the row to beat. `OptimalConstant` is noisier or no better with 4 or 8 draws; with many it pays where
  scores and values go together, as for scales.
* `AdaptiveRaoBlackwell` is worth its time wherever a value that a decision does not influence balances one that it
  does, which is the case of a bound that is nearly tight; elsewhere it costs a tenth and changes little. `Total()` does
  as well for what is global, at twenty times the variance of what is local. In a Pyro guide, sample what is global
  first: program order then charges it with the whole log-ratio, and the individuals with their own factors alone.
* In CartPole the past rewards are known numbers, so that there is nothing for it to learn, except where an episode has
  outlived all others. Reward-to-go saves a third to a half of the variance while episodes end at different times. Near
  the end of training most run to the limit, and all centred estimators are alike.
* Knowing f pays more than any baseline: a quadratic model of it, from its derivatives (`DeltaMethod`) or from past
  draws (`NaturalControlVariate`), leaves a hundredth of the variance where f is smooth.
* Antithetic and orthogonal mirrored draws are for locations, and make scales noisier; Sobol points serve both.
* A value function of the datum loses to leave-one-out where several particles share the datum, and can win where draws
  pass through states that differ."""


def fits(steps: int, report: Callable[[str], None] = print) -> str:
    """Where the fits of capture-recapture end."""
    optimum = capture_recapture.exact(capture_recapture.load()).optimum
    lines = [
        "## Capture-recapture: where a fit ends",
        "",
        f"{steps} steps of ClippedAdam from Beta(2, 2) and fair coins, learning rate .05 decayed to a tenth, "
        f"{capture_recapture.PARTICLES} particles, seed 0: nats below the best bound of the family ({optimum:.6f}), "
        "evaluated in closed form.",
        "",
        "| guide | baseline | after 1/3 | 2/3 | all steps | within .1 nat from step | E[N] | CPU s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for guide, options in {
        "globals first": {},
        "globals last": {"globals_last": True},
        "globals first, Betas reparameterised": {"pathwise": True},
    }.items():
        for name, baseline in {"leave-one-out": "auto", "AdaptiveRaoBlackwell": "adaptive"}.items():
            report(f"Fit of capture-recapture, {guide}, {name} ...")
            settings: dict[str, Any] = {"learning_rate": 0.05, "decays_to": 0.1, **options}
            fitted = capture_recapture.fit(0, steps, baseline=baseline, **settings)
            curve = fitted.curve
            gaps = [f"{curve[len(curve) * third // 3 - 1].gap:.3f}" for third in (1, 2, 3)]
            cells = [guide, name, *gaps, str(fitted.steps_within(0.1) or "–"), f"{fitted.net.expected_number():.2f}"]
            lines.append(f"| {' | '.join(cells)} | {curve[-1].seconds:.1f} |")
    return "\n".join(lines)


def section(problem: Problem, found: list[Row], rounds: int) -> str:
    """Heading, what is estimated, the table."""
    return "\n".join([f"## {problem.title}", "", f"{problem.about} {rounds} rounds.", "", *table(found)])
