"""The page and its tables."""

from __future__ import annotations

import os
import platform
import textwrap
from dataclasses import asdict
from importlib.metadata import version
from statistics import median
from typing import Any

import gymnasium
import numpy as np
import torch

import scorefn as sf
from applications.benchmarks.rl_peers.contestants import Results
from applications.benchmarks.rl_peers.learners import FEWEST_STEPS, FIRST_SEED
from applications.benchmarks.rl_peers.libraries import PACKAGES
from applications.benchmarks.rl_peers.watch import EVERY, STREAMS, THRESHOLD
from applications.rl.cartpole import Config
from applications.rl.settings import Settings


def spread(values: list[float], form: str) -> str:
    """Median and range."""
    return f"{median(values):{form}} ({min(values):{form}} – {max(values):{form}})"


def rates(rows: list[dict[str, Any]], clock: str = "cpu") -> list[float]:
    """Environment steps per second."""
    return [row["env_steps"] / row[clock] for row in rows]


def throughput_table(results: Results) -> list[str]:
    """Who learns from how many steps a second."""
    reference = results.get("SB3 A2C, zoo, 8 streams")
    lines = [
        "| who | env steps per CPU s | per s of wall time | env steps / updates | x hand-written | x A2C, 8 streams |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, rows in results.items():
        own, by_hand = rates(rows), results.get(name.replace("scorefn,", "hand-written loop,"), [])
        beside = f"{median(a / b for a, b in zip(own, rates(by_hand), strict=True)):.2f}" if by_hand else ""
        against = f"{median(a / b for a, b in zip(own, rates(reference), strict=True)):.1f}" if reference else ""
        done = f"{median(r['env_steps'] for r in rows):,.0f} / {median(r['updates'] for r in rows):,.0f}"
        lines.append(
            f"| {name} | {spread(own, ',.0f')} | {median(rates(rows, 'wall')):,.0f} | {done} | "
            f"{beside if name.startswith('scorefn') else ''} | {against} |"
        )
    return lines


def threshold_table(results: Results) -> list[str]:
    """Medians over all seeds, where one that did not arrive counts as infinity."""
    lines = [
        "| who | arrived | env steps | training CPU s | wall s | confirmed by |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, rows in results.items():
        solved = [r for r in rows if r["solved"]]
        cells = []
        for key, form in (("env_steps", ",.0f"), ("cpu", ".2f"), ("wall", ".2f")):
            values = [r[key] if r["solved"] else float("inf") for r in rows]
            cells.append(spread(values, form).replace("inf", "–") if solved else "–")
        lowest = f"{min(r['confirmed'] for r in solved):.1f}" if solved else "–"
        lines.append(f"| {name} | {len(solved)} of {len(rows)} | {' | '.join(cells)} | {lowest} |")
    return lines


def goals(results: dict[str, Results]) -> list[str]:
    """What was to be reached, what was, and what falls short."""
    rows = ["| goal | reached | |", "|---|---:|---|"]

    def add(goal: str, value: float, met: bool, form: str) -> None:
        rows.append(f"| {goal} | {value:{form}} | {'met' if met else '**falls short**'} |")

    work, time_to = results["throughput"], results["threshold"]
    ours = [name for name in work if name.startswith("scorefn")]
    for name in ours:
        by_hand = work[name.replace("scorefn", "hand-written loop")]
        ratio = median(a / b for a, b in zip(rates(work[name]), rates(by_hand), strict=True))
        add(f"throughput, {name.split(', ')[1]}: at least 0.8 x the hand-written loop", ratio, ratio >= 0.8, ".2f")
    for peer in ("SB3 A2C, zoo, 8 streams", f"SB3 A2C, zoo, {STREAMS} streams"):
        for name in ours if peer in work else []:
            ratio = median(a / b for a, b in zip(rates(work[name]), rates(work[peer]), strict=True))
            goal = f"throughput, {name.split(', ')[1]}: at least 20 x {peer}"
            add(goal, ratio, ratio >= 20.0, ".1f")
    for name, rows_of in time_to.items():
        if name.startswith("scorefn"):
            key, most, unit = ("cpu", 1.2, "CPU s") if "fastest" in name else ("env_steps", 25_000, "env steps")
            value = median(r[key] if r["solved"] else float("inf") for r in rows_of)
            form = ".2f" if key == "cpu" else ",.0f"
            add(f"time to threshold, {name[9:]}: median at most {most:,} {unit}", value, value <= most, form)
            arrived = sum(r["solved"] for r in rows_of)
            add(f"the same: all {len(rows_of)} seeds", arrived, arrived == len(rows_of), "d")
    return rows


def settings_lines(settings: Settings) -> str:
    """What differs from the defaults, and what defines the method all the same, as a block of Markdown."""
    own, usual = asdict(settings), asdict(Settings("", "", 0))
    said = {name for name in own if own[name] != usual[name]} - {"env", "total_steps"} | {
        "num_envs",
        "discount",
        "lambda_",
    }
    parts = [f"{name}={value!r}" for name, value in own.items() if name in said]
    return textwrap.fill(", ".join(parts), 110, subsequent_indent="    ")


def page(results: dict[str, Results], difference: dict[str, float], peers: list[str], options: Any) -> str:
    """The whole page."""
    versions = ", ".join([f"{PACKAGES[peer]} {version(PACKAGES[peer])}" for peer in peers]) or "no peers"
    seeds = len(next(iter(results["threshold"].values())))
    worst = max(difference.values())
    return f"""# CartPole-v1 beside other libraries

Measured {options.date} with scorefn {sf.__version__}, Python {platform.python_version()}, torch {torch.__version__},
gymnasium {gymnasium.__version__}, NumPy {np.__version__}; {versions}.
{platform.machine()} machine with {os.cpu_count()} shared cores that were busy with other work, one torch thread, seeds
{FIRST_SEED} to {FIRST_SEED + seeds - 1}.

    {_command(peers, options)}

Each library has a process of its own; within each seed they take turns, one at a time. CPU seconds are those of the
process that works. Medians over the seeds, ranges in brackets. Ratios are medians of the ratios within a seed.

## What is reached, and what falls short

{_joined(goals(results))}

## Learned throughput

Environment steps a second: rollouts, scores, gradients and updates. Two hidden layers of 64 tanh units, and
{STREAMS} streams unless the row says otherwise.

scorefn and the hand-written loop do REINFORCE with reward-to-go and leave-one-out on the native vector environment, one
step of Adam (0.01) a batch: from the first update on either every stream to the end of its episode, where most streams
wait for the longest, or segments of streams that go on. They draw the same random numbers from the same generators,
and the gradient of the first update is the same to a relative {worst:.0e} in float32; later updates drift apart by
rounding.

The peers use their own environments. Stable-Baselines3: `make_vec_env` and the hyperparameters of RL Baselines3 Zoo,
where A2C updates after 5 steps of each stream and PPO passes 20 times over 32 of each. Tianshou: `DummyVectorEnv`, as
many episodes an update as streams, 2 passes in minibatches of 64. TorchRL: a `GymWrapper` around Gymnasium's
synchronous vector environment, five times as fast here as its `SerialEnv`; segments of 64 steps, GAE, a critic. None of
them drives the native vector environment, so a part of the factor is the environment's; another part is that they
update more often or fit a critic as well. The last column is relative to A2C on the 8 streams of the zoo; on
{STREAMS} streams A2C is several times as fast, and the goals above are stated against both.

{_joined(throughput_table(results["throughput"]))}

## Time to the threshold

A policy is looked at whenever {EVERY:,} environment steps have passed (64 whole episodes are more than that): 100
episodes with *sampled* actions. Where they average {THRESHOLD:g} or more, 100 further ones must confirm it, or training
goes on. Neither time nor steps of looking are counted. *Confirmed by* is the lowest mean of the further 100 among the
seeds that arrived; in a range a dash is a seed that did not, and it counts as infinity in the median.

{_joined(threshold_table(results["threshold"]))}

Fastest: the loop of `applications/rl/cartpole.py`, 64 episodes an update, one hidden layer of {Config.hidden}, Adam
with {Config.learning_rate}, looked at as everybody is. Fewest steps: the program `applications/rl/train.py` with

    {settings_lines(FEWEST_STEPS)}

These were found by a random search (15 combinations for `gae` and 6 for `ppo_clip` on seeds 0 to 4; the best few of
`gae` and their neighbours on seeds 100 to 111 and 200 to 211); none of those seeds is used here. The peers' settings
are those that their projects publish. Limits: the zoo's 100,000 steps for PPO and 500,000 for A2C, where their
schedules end; 200,000 for Tianshou with the settings of its CartPole example; 600,000 and 100,000 for scorefn's two.
"""


def _joined(lines: list[str]) -> str:
    return "\n".join(lines)


def _command(peers: list[str], options: Any) -> str:
    names = "all" if len(peers) == len(PACKAGES) else ",".join(peers) or "none"
    return f"OMP_NUM_THREADS=1 python -m applications.benchmarks.rl_peers --peers {names} --seeds {options.seeds}"
