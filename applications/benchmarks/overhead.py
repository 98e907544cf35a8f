"""What `expectation` costs over the loop one would have written by hand.

    python -m applications.benchmarks.overhead [--repeats 100] [--out docs/figures/overhead.md]

Every estimator is timed with its backward pass, interleaved in one process on one thread, in CPU seconds; the ratio is
the median of the ratios of neighbouring repeats. All use the same `Bernoulli` object, f and leave-one-out baseline,
except the raw loop, which has no distribution object. Storchastic, where it is installed, runs in a process of its
own, beside the same hand-written loop, because importing it patches torch and turns argument validation off.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from torch.distributions import Bernoulli

Estimate = Callable[[], Tensor]
CASES = ((1000, 200, 5), (16, 16, 50))  # N, D, estimates per timing


def f(x: Tensor) -> Tensor:
    return (x - 0.499).square().mean(-1)


def hand_written(p: Bernoulli, n: int) -> Estimate:
    def estimate() -> Tensor:
        x = p.sample((n,))
        fx = f(x)
        log_prob = p.log_prob(x).sum(-1)
        baseline = (fx.sum() - fx) / (n - 1)
        return ((fx - baseline).detach() * log_prob).mean()

    return estimate


def raw_tensors(logits: Tensor, n: int) -> Estimate:
    def estimate() -> Tensor:
        x = torch.bernoulli(torch.sigmoid(logits.detach()).expand(n, -1))
        fx = f(x)
        log_prob = (x * logits - torch.nn.functional.softplus(logits)).sum(-1)
        baseline = (fx.sum() - fx) / (n - 1)
        return ((fx - baseline).detach() * log_prob).mean()

    return estimate


def library(p: Bernoulli, n: int) -> Estimate:
    import scorefn as sf

    return lambda: sf.expectation(p, f, n)


def timings(estimates: dict[str, Estimate], logits: Tensor, repeats: int, inner: int) -> dict[str, list[float]]:
    """CPU seconds of one estimate with its backward pass, in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in estimates}
    for repeat in range(repeats + 3):
        for name, estimate in estimates.items():
            start = time.process_time()
            for _ in range(inner):
                loss = estimate()
                logits.grad = None
                loss.backward()
            if repeat >= 3:
                seconds[name].append((time.process_time() - start) / inner)
    return seconds


def storchastic_timings(repeats: int) -> list[str]:
    """Rows for storchastic, measured in this process."""
    import storch  # type: ignore[import-not-found]

    rows = []
    for n, d, inner in CASES:
        logits = torch.zeros(d, requires_grad=True)
        p = Bernoulli(logits=logits)
        method = storch.method.ScoreFunction("x", n_samples=n, baseline_factory="batch_average")
        by_hand = hand_written(p, n)
        ours: list[float] = []
        theirs: list[float] = []
        for _ in range(repeats + 3):
            start = time.process_time()
            for _ in range(inner):
                loss = by_hand()
                logits.grad = None
                loss.backward()
            middle = time.process_time()
            for _ in range(inner):
                centred = method(p) - 0.499
                storch.add_cost((centred * centred).mean(-1), "f")
                logits.grad = None
                storch.backward()
            ours.append((middle - start) / inner)
            theirs.append((time.process_time() - middle) / inner)
        ratio = median(b / a for a, b in zip(ours[3:], theirs[3:], strict=True))
        name = f"storchastic {version('storchastic')}, `ScoreFunction(batch_average)`"
        rows.append(f"| {n} | {d} | {name} | {1e6 * median(theirs[3:]):.0f} | {ratio:.2f} |")
    return rows


def table(repeats: int) -> list[str]:
    rows = ["| N | D | estimator | CPU microseconds | ratio to the hand-written loop |", "|---|---|---|---|---|"]
    for n, d, inner in CASES:
        logits = torch.zeros(d, requires_grad=True)
        p = Bernoulli(logits=logits)
        estimates = {
            "hand-written loop on the same `Bernoulli`": hand_written(p, n),
            "`scorefn.expectation`": library(p, n),
            "raw tensors, no distribution object": raw_tensors(logits, n),
        }
        seconds = timings(estimates, logits, repeats, inner)
        reference = next(iter(seconds.values()))
        for name, values in seconds.items():
            ratio = median(v / r for v, r in zip(values, reference, strict=True))
            rows.append(f"| {n} | {d} | {name} | {1e6 * median(values):.0f} | {ratio:.2f} |")
    if find_spec("storch"):
        peer = [sys.executable, "-m", "applications.benchmarks.overhead", "--storchastic", "--repeats", str(repeats)]
        rows += subprocess.run(peer, check=True, capture_output=True, text=True).stdout.strip().splitlines()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--out", type=Path, help="also write the table to this Markdown file")
    parser.add_argument("--storchastic", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if arguments.storchastic:
        print("\n".join(storchastic_timings(arguments.repeats)))
        return
    rows = table(arguments.repeats)
    text = "\n".join(
        [
            "# Overhead over the hand-written loop",
            "",
            f"Measured {date.today()}: Python {platform.python_version()}, torch {torch.__version__}, one thread, "
            f"seed 0, {arguments.repeats} interleaved repeats, {platform.machine()} machine with "
            f"{os.cpu_count()} shared cores. An estimate and its backward pass, median.",
            "",
            *rows,
            "",
            f"Reproduce with `python -m applications.benchmarks.overhead --repeats {arguments.repeats} "
            "--out docs/figures/overhead.md`.",
            "Storchastic is timed where it is installed, in a process of its own, and its ratio is to the hand-written",
            "loop of that process.",
            "",
        ]
    )
    print(text)
    if arguments.out is not None:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
