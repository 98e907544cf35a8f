"""Plots of three programs that draw none: six steps from REINFORCE to PPO, digits as a bandit, the fewest mistakes."""

from __future__ import annotations

import importlib
import io
from contextlib import redirect_stdout
from pathlib import Path

import torch
from matplotlib.figure import Figure

from applications.bbo import fewest_mistakes
from applications.rl import contextual_bandit

PROGRAMS = ("1_reinforce", "2_reward_to_go", "3_leave_one_out", "4_value_function", "5_gae", "6_ppo_clip")


def draw_programs(out: Path, updates: int = 60, seed: int = 0) -> Path:
    """``reinforce_to_ppo.png``: the mean return of each batch of the six programs in ``applications/rl``."""
    figure = Figure(figsize=(8.4, 3.9), dpi=100, layout="constrained")
    panels = figure.subplots(2, 3, sharex=True, sharey=True)
    curves = {}
    for name in PROGRAMS:
        with redirect_stdout(io.StringIO()):  # each prints a line every five updates
            curves[name] = importlib.import_module(f"applications.rl.{name}").main(seed, updates)
    for axes, (name, returns) in zip(panels.flat, curves.items(), strict=True):
        for other in curves.values():
            axes.plot(range(1, updates + 1), other, color="0.88", lw=0.8)
        axes.plot(range(1, updates + 1), returns, color="C0")
        axes.set_title(name, fontsize=9)
    figure.supxlabel("update of 64 episodes", fontsize=9)
    figure.supylabel("mean return", fontsize=9)
    figure.savefig(out / "reinforce_to_ppo.png")
    return out / "reinforce_to_ppo.png"


FEW = contextual_bandit.Config(repeats=60)
"""As the program has it, with fewer estimates of each variance."""


def draw_bandit(out: Path, config: contextual_bandit.Config = FEW, seed: int = 0) -> Path:
    """``contextual_bandit.png``: the variance of each estimate at three points of one training."""
    noise = contextual_bandit.train("leave-one-out", config, seed).noise
    names, width = list(noise), 0.8 / len(config.measured_at)
    figure = Figure(figsize=(6.6, 3.6), dpi=100, layout="constrained")
    axes = figure.subplots()
    shades = ("#c6dbef", "#6baed6", "#2171b5")
    for i, update in enumerate(config.measured_at):
        places = [y + (i - (len(config.measured_at) - 1) / 2) * width for y in range(len(names))]
        axes.barh(
            places, [noise[name][i] for name in names], width, color=shades[i % 3], label=f"after {update} updates"
        )
    labels = {"none": "no baseline", "1": "none, rewards of -1 and 0"}
    axes.set_yticks(range(len(names)), [labels.get(name, name) for name in names], fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("variance of one estimate, in squared lengths of the exact gradient", fontsize=9)
    figure.legend(loc="outside upper center", ncols=3, fontsize=8)
    figure.savefig(out / "contextual_bandit.png")
    return out / "contextual_bandit.png"


def draw_mistakes(out: Path, seeds: int = 5) -> Path:
    """``fewest_mistakes.png``: wrong diagnoses of the mean of the search distribution, beside logistic regression."""
    figure = Figure(figsize=(6.4, 3.2), dpi=100, layout="constrained")
    axes = figure.subplots()
    for seed in range(seeds):
        found = fewest_mistakes.run(seed)
        evaluations, mistakes = torch.tensor(found["curve"]).T.tolist()
        axes.step(evaluations, mistakes, where="post", color=f"C{seed}", lw=1.2, label=f"split {seed}")
        axes.plot([evaluations[-1]], [found["logistic_mistakes"]], "_", color=f"C{seed}", ms=14, mew=2)
    axes.set(
        yscale="log",
        xlabel="evaluations",
        ylabel="wrong diagnoses of 400",
        title="dashes at the end: logistic regression",
    )
    axes.set_title("dashes at the end: logistic regression", fontsize=9)
    axes.set_yticks([4, 6, 10, 20, 50], ["4", "6", "10", "20", "50"])
    axes.set_ylim(3.5, 60)
    axes.minorticks_off()
    axes.legend(fontsize=8)
    figure.savefig(out / "fewest_mistakes.png")
    return out / "fewest_mistakes.png"
