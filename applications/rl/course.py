"""The grid of a course on reinforcement learning: ``python -m applications.rl.course --experiment cartpole``.

The questions of Berkeley's CS285, homework 2: what reward-to-go, normalised advantages and a larger batch do on
CartPole; what a value function does on HalfCheetah; which lambda is best on LunarLander. Every run is one of
``applications.rl.train`` with the settings below.

In ``--out``: a folder for each run; ``EXPERIMENT.md`` and ``EXPERIMENT.png`` with interquartile means over the seeds
and bootstrap intervals. Runs whose result is there are not run again, so that a grid goes on where it was stopped.
``--page`` writes the table into the experiment's section of a page.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from torch import Tensor

import scorefn as sf
from applications.over_seeds import bootstrap, interquartile_mean
from applications.progress import Interruption
from applications.results import write_result
from applications.rl.evaluation import result
from applications.rl.settings import Settings, settings_for
from applications.rl.train import train
from applications.rl.training import Training


class Episodes:
    """Whole episodes, as many as should fill a batch of a given number of steps.

    How many they are is decided before they are drawn, from the length of earlier ones: whoever draws until the steps
    are enough has the last episode longer than the others, on average.
    """

    def __init__(self, training: StepBatches) -> None:
        self.training = training
        self.measure = sf.trajectories.TrajectoryDistribution(training.env, training.policy)

    def draws(self, f: Callable[[Any], Tensor], num_samples: int, *, coupling: Any = None) -> sf.Draws:
        """num_samples in the first batch, ``steps / mean length of the last batch`` in the others, at least 2."""
        if (length := self.training.length) is not None:
            num_samples = max(2, round(self.training.settings.steps / length))
        draws = self.measure.draws(f, num_samples, coupling=coupling)
        self.training.length = int(draws.mask.sum()) / num_samples
        self.training.earned = torch.zeros(num_samples)
        return draws


class StepBatches(Training):
    """Training on whole episodes in batches of ``settings.steps`` steps, as the course counts them."""

    length: float | None = None  # of the last batch's episodes, on average

    def start_streams(self) -> None:
        """The same streams, in batches of another size."""
        super().start_streams()
        self.measure = Episodes(self)


@dataclass(frozen=True)
class Experiment:
    """One picture: which settings are compared."""

    title: str
    program: type[Training]
    variants: dict[str, Settings]
    target: float  # the course's
    episodes: int = 100  # of each evaluation


def _cartpole() -> dict[str, Settings]:
    course = replace(
        settings_for("CartPole-v1", "reward_to_go"), hidden=(64, 64), learning_rate=0.005, decay_to=1.0, solved=None
    )
    variants = {}
    for size, steps in (("small", 1000), ("large", 4000)):
        for credit in ("reinforce", "reward_to_go"):
            for normalized in (False, True):
                name = f"{size}, {'total return' if credit == 'reinforce' else 'reward-to-go'}"
                variants[name + (", normalised" if normalized else "")] = replace(
                    course,
                    method=credit,
                    standardize_advantages=normalized,
                    steps=steps,
                    total_steps=100 * steps,
                    num_envs=steps // 20,  # an episode of the first policy has about 20 steps
                )
    return variants


def _halfcheetah() -> dict[str, Settings]:
    course = replace(
        settings_for("HalfCheetah-v5", "value_baseline"),
        num_envs=5,  # episodes of 1000 steps
        value_steps=5,
        decay_to=1.0,
        normalize_observations=False,
        standardize_advantages=False,
    )
    return {"without": replace(course, method="reward_to_go"), "with value function": course}


def _lunarlander() -> dict[str, Settings]:
    return {f"lambda {x:g}": replace(settings_for("LunarLander-v3", "gae"), lambda_=x) for x in (0.0, 0.98, 1.0)}


def experiments() -> dict[str, Experiment]:
    """By the name that the command line has for them."""
    return {
        "cartpole": Experiment("CartPole-v1: credit, normalisation, batch", StepBatches, _cartpole(), 475.0),
        "halfcheetah": Experiment("HalfCheetah-v5: a value function as baseline", Training, _halfcheetah(), 300.0, 20),
        "lunarlander": Experiment("LunarLander-v3: lambda", Training, _lunarlander(), 180.0),
    }


def run(experiment: Experiment, settings: Settings, seed: int, out: Path, should_stop: Callable[[], bool]) -> bool:
    """One run, unless its result is there; False where it was stopped."""
    found = out / "result.json"
    if found.exists() and json.loads(found.read_text(encoding="utf-8"))["settings"] == _plain(settings):
        return True
    training = experiment.program(settings, seed)
    (out / "checkpoint.pt").unlink(missing_ok=True)
    if not train(training, out, should_stop=should_stop):
        return False
    figures = result(training, experiment.episodes) | {"curve": training.curve}
    write_result(out, {"experiment": experiment.title, "seed": seed}, figures)
    last = f"{figures['eval_sampled_mean']:.1f} sampled, {figures['eval_greedy_mean']:.1f} greedy"
    print(f"{out.parent.name}, seed {seed}: {figures['env_steps']:,} steps, {last}", flush=True)
    return True


def _plain(settings: Settings) -> Any:
    """As JSON has them: lists for tuples."""
    return json.loads(json.dumps(settings.state()))


def folder(out: Path, experiment: str, variant: str, seed: int) -> Path:
    """Where a run's files are."""
    return out / experiment / re.sub(r"[^a-z0-9.]+", "-", variant) / f"seed-{seed}"


Results = dict[str, list[dict[str, Any]]]


def table(results: Results, experiment: Experiment) -> str:
    """Markdown: a row for each variant."""
    names = ["sampled", "greedy", "best of the curve", "env steps", "CPU s"]
    lines = [f"| {experiment.title} | seeds | {' | '.join(names)} |", f"|---|{'---:|' * (len(names) + 1)}"]
    for variant, runs in results.items():
        best = [max((y for _, y in run["curve"]), default=math.nan) for run in runs]
        steps = interquartile_mean([run["env_steps"] for run in runs])
        cells = [
            str(bootstrap([run["eval_sampled_mean"] for run in runs])),
            str(bootstrap([run["eval_greedy_mean"] for run in runs])),
            str(bootstrap(best)),
            f"{steps:,.0f}",
            f"{interquartile_mean([run['cpu_seconds'] for run in runs]):.1f}",
        ]
        lines.append(f"| {variant} | {len(runs)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def protocol(experiment: Experiment, seeds: list[int]) -> str:
    """What the figures depend on."""
    return (
        f"Measured {datetime.date.today()} with scorefn {sf.__version__}, Python {platform.python_version()}, torch "
        f"{torch.__version__}, Gymnasium {gymnasium.__version__}, on {os.cpu_count()} {platform.machine()} cores that "
        f"were shared with other work, one torch thread; seeds {', '.join(map(str, seeds))}; "
        f"{experiment.episodes} fresh episodes for each evaluation."
    )


def draw_curves(results: Results, experiment: Experiment, path: Path) -> None:
    """Interquartile mean over the seeds of each variant's learning curve, and the range of all seeds."""
    from matplotlib.figure import Figure

    groups = list(dict.fromkeys(variant.split(",")[0] for variant in results)) if len(results) > 4 else [""]
    figure = Figure(figsize=(5.5 * len(groups), 4), layout="constrained")
    panels = figure.subplots(1, len(groups), sharey=True, squeeze=False)[0]
    for axes, group in zip(panels, groups, strict=True):
        for variant, runs in results.items():
            if not variant.startswith(group):
                continue
            grid = np.linspace(0, max(run["env_steps"] for run in runs), 200)
            curves = np.array([np.interp(grid, *np.transpose(run["curve"])) for run in runs if run["curve"]])
            (line,) = axes.plot(grid, interquartile_mean(curves, axis=0), label=variant.removeprefix(f"{group}, "))
            axes.fill_between(grid, curves.min(0), curves.max(0), alpha=0.12, color=line.get_color(), linewidth=0)
        axes.axhline(experiment.target, color="grey", linestyle=":", linewidth=1)
        axes.set(xlabel="environment steps", title=f"{group} batch" if group else experiment.title)
        axes.xaxis.set_major_formatter(lambda steps, _: f"{steps / 1000:g}k")
        axes.legend(fontsize="small")
    panels[0].set_ylabel("mean return of the last 100 episodes")
    figure.savefig(path, dpi=120)


def fill(page: Path, experiment: str, text: str) -> None:
    """Replace what stands between an experiment's marks; ValueError where the page has none."""
    marks = [f"<!-- {experiment}: written by the program -->", f"<!-- {experiment}: end -->"]
    before = page.read_text(encoding="utf-8")
    if any(before.count(mark) != 1 for mark in marks):
        raise ValueError(f"{page} has no section for {experiment}: it needs the lines {marks[0]} and {marks[1]} once.")
    first, last = before.index(marks[0]) + len(marks[0]), before.index(marks[1])
    page.write_text(f"{before[:first]}\n\n{text}\n\n{before[last:]}", encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    """Run what is missing, tabulate, draw; 130 after Ctrl-C."""
    known = experiments()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--experiment", choices=sorted(known), required=True)
    parser.add_argument("--seeds", type=int, default=5, help="seeds 0, 1, ..., SEEDS - 1")
    parser.add_argument("--seed", type=int, help="this seed alone, without a table: to share the work")
    parser.add_argument("--out", type=Path, default=Path("runs/course"))
    parser.add_argument("--page", type=Path, help="write the table into this page, such as docs/gallery/course.md")
    parser.add_argument("--quick", action="store_true", help="a few updates of each run, to see that it runs")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)  # two threads on so small a network mostly wait for each other
    name, experiment = arguments.experiment, known[arguments.experiment]
    if arguments.quick:
        short = {variant: _short(s) for variant, s in experiment.variants.items()}
        name, experiment = f"{name}-quick", replace(experiment, variants=short, episodes=4)
    seeds = list(range(arguments.seeds)) if arguments.seed is None else [arguments.seed]
    with Interruption() as interrupted:
        for seed in seeds:
            for variant, settings in experiment.variants.items():
                if not run(experiment, settings, seed, folder(arguments.out, name, variant, seed), interrupted):
                    print("\nStopped. The same command goes on with the runs that are missing.")
                    return 130
    if arguments.seed is not None:
        return 0
    results = {
        variant: [
            json.loads((folder(arguments.out, name, variant, seed) / "result.json").read_text(encoding="utf-8"))
            for seed in seeds
        ]
        for variant in experiment.variants
    }
    text = f"{table(results, experiment)}\n\n{protocol(experiment, seeds)}"
    (arguments.out / f"{name}.md").write_text(text + "\n", encoding="utf-8")
    draw_curves(results, experiment, arguments.out / f"{name}.png")
    if arguments.page is not None:
        fill(arguments.page, arguments.experiment, text)
    print(text)
    return 0


def _short(settings: Settings) -> Settings:
    """A run of an update or two."""
    return replace(settings, total_steps=2 * settings.steps)


if __name__ == "__main__":
    sys.exit(main())
