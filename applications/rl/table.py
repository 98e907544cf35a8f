"""The table of tasks: ``python -m applications.rl.table --seeds 5 --workers 2 --page docs/gallery/rl.md``.

Each row is ``applications.rl.train`` for several seeds, each in a process of its own; runs whose ``result.json`` exists
are not repeated, so an interrupted table goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch

from applications.over_seeds import bootstrap
from applications.rl.course import fill


@dataclass(frozen=True)
class Row:
    """What is trained, by which arguments, and what is to be reached."""

    env: str
    method: str
    goal: float  # of the sampled mean
    arguments: tuple[str, ...] = ()
    variant: str = ""

    @property
    def name(self) -> str:
        """Of its folders."""
        return "-".join(part for part in (self.env, self.method, self.variant.replace(" ", "-")) if part)


ROWS = (
    Row("CartPole-v1", "rloo", 475.0),
    Row("CartPole-v1", "gae", 475.0),
    Row("Acrobot-v1", "gae", -86.0),
    Row("InvertedPendulum-v5", "gae", 1000.0),
    Row("LunarLander-v3", "gae", 200.0),
    Row("HalfCheetah-v5", "gae", 300.0, ("--not-normalized",), "not normalised"),
    Row("HalfCheetah-v5", "gae", 900.0),
    Row("Hopper-v5", "gae", 800.0),
    Row("Hopper-v5", "ppo_clip", 2000.0),
)


def run(row: Row, seed: int, out: Path) -> dict[str, Any]:
    """One result, from its file where there is one."""
    folder = out / f"{row.name}-{seed}"
    path = folder / "result.json"
    if not path.exists():
        command = [sys.executable, "-m", "applications.rl.train", "--env", row.env, "--method", row.method]
        command += ["--seed", str(seed), "--out", str(folder), *row.arguments]
        if (folder / "checkpoint.pt").exists():
            command.append("--resume")
        begin = time.perf_counter()
        quiet = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        subprocess.run(command, check=True, capture_output=True, env=os.environ | quiet)
        print(f"{row.name} seed {seed}: {time.perf_counter() - begin:.0f} s", flush=True)
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return result


def report(results: dict[Row, list[dict[str, Any]]]) -> str:
    """The table in Markdown."""
    lines = [
        "| task | method | environment steps | sampled: median, IQM [95 %] | seeds | greedy: IQM [95 %] | CPU s "
        "(median) | steps per CPU s | goal | met |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for row, runs in results.items():
        sampled = np.array([r["eval_sampled_mean"] for r in runs])
        greedy = np.array([r["eval_greedy_mean"] for r in runs])
        cpu, steps = (np.array([r[name] for r in runs]) for name in ("cpu_seconds", "env_steps"))
        each = ", ".join(f"{value:.0f}" for value in sorted(sampled))
        lines.append(
            f"| {row.env} | {row.method}{f', {row.variant}' if row.variant else ''} | {np.median(steps):,.0f} "
            f"| {np.median(sampled):.1f}, {bootstrap(sampled)} | {each} | {bootstrap(greedy)} | {np.median(cpu):.1f} "
            f"| {np.median(steps / cpu):,.0f} | {row.goal:g} | {'yes' if np.median(sampled) >= row.goal else 'no'} |"
        )
    return "\n".join(lines)


def section(table: str, seeds: int, episodes: int, threads: int) -> str:
    """What the page says of it: protocol, table, command."""
    versions = f"Python {platform.python_version()}, PyTorch {torch.__version__}, Gymnasium {gymnasium.__version__}"
    return f"""Measured on {datetime.now(UTC).date()}: seeds 0 to {seeds - 1}, {versions}, {os.cpu_count()} cores,
{threads} torch thread(s) a run. After training, {episodes} fresh episodes of the sampled policy and as many of its
mode. Median and interquartile mean over the seeds, with a bootstrap interval; the seeds are shown sorted. CPU seconds
are of training, evaluation apart; the environments' own time is included. A goal is met where the median of the sampled
means reaches it. The settings are those of `applications/rl/settings.py`; they were chosen on these tasks, in part on
these seeds.

{table}

    python -m applications.rl.table --seeds {seeds} --page docs/gallery/rl.md"""


def main(argv: Sequence[str] | None = None) -> int:
    """Train what is missing, print the table, write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one core each")
    parser.add_argument("--only", nargs="*", help="parts of the names of rows")
    parser.add_argument("--out", type=Path, default=Path("runs/table"))
    parser.add_argument("--page", type=Path, help="write the table into this page, such as docs/gallery/rl.md")
    arguments = parser.parse_args(argv)
    rows = [row for row in ROWS if not arguments.only or any(part in row.name for part in arguments.only)]
    jobs = [(row, seed) for row in rows for seed in range(arguments.seeds)]
    with ThreadPoolExecutor(arguments.workers) as pool:
        results = list(pool.map(lambda job: run(*job, arguments.out), jobs))
    by_row = {row: [r for (other, _), r in zip(jobs, results, strict=True) if other is row] for row in rows}
    table = report(by_row)
    print(table)
    if arguments.page is not None:
        fill(arguments.page, "tasks", section(table, arguments.seeds, results[0]["episodes_evaluated"], 1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
