"""What one reverse scan costs: `y_t = x_t + decay_t y_{t+1}`, the heart of reward-to-go and GAE.

    python -m applications.benchmarks.scan [--repeats 60] [--peers] [--out docs/figures/scan.md]

Float32, one thread, a decay of .99 with 1 % of zeros (ends of episodes). All candidates take and return torch tensors,
and run in one process, interleaved in a random order that is drawn anew for each repeat, in CPU seconds; the ratios are
medians of the ratios within a repeat. `scipy.signal.lfilter`, where scipy is installed, runs once per episode piece,
whose borders it is given. With `--peers` TorchRL's vectorised GAE is timed beside them, where it is installed: it is
given the values too, here zeros, so that its advantages are this scan.
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import random
import time
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import Tensor

import scorefn as sf

DECAY, ENDS = 0.99, 0.01
# [T, N], and the CPU milliseconds that are asked for
GOALS = {(500, 300): 1.1, (2048, 1): 0.17, (128, 8): 0.11, (1000, 1024): 4.0}
SHAPES = (*GOALS, (2048, 16), (1024, 64), (256, 1024), (64, 4096), (16, 64), (5, 16))
Scan = Callable[[], Tensor]


def numpy_loop(x: Tensor, decay: Tensor) -> Tensor:
    """As it is written in most libraries: one row after the other, from the end."""
    a, d = x.numpy(), decay.numpy()
    y = np.empty_like(a)
    last = y[-1] = a[-1]
    for t in range(len(a) - 2, -1, -1):
        last = a[t] + d[t] * last
        y[t] = last
    return torch.from_numpy(y)


def torch_loop(x: Tensor, decay: Tensor) -> Tensor:
    y = torch.empty_like(x)
    last = y[-1] = x[-1]
    for t in range(len(x) - 2, -1, -1):
        last = x[t] + decay[t] * last
        y[t] = last
    return y


def lfilter_pieces(x: Tensor, ends: list[list[int]]) -> Tensor:
    """One filter for each piece of each column; where the pieces end is known beforehand."""
    from scipy.signal import lfilter  # type: ignore[import-untyped]

    a = x.numpy()
    y = np.empty_like(a)
    for n, borders in enumerate(ends):
        for first, last in itertools.pairwise(borders):
            piece = a[first:last, n]
            y[first:last, n] = lfilter([1.0], [1.0, -DECAY], piece[::-1])[::-1]
    return torch.from_numpy(y)


def torchrl_gae(x: Tensor, decay: Tensor) -> Tensor:
    from torchrl.objectives.value.functional import (  # type: ignore[import-not-found]
        vec_generalized_advantage_estimate,
    )

    zeros, done = torch.zeros_like(x).unsqueeze(-1), (decay == 0).unsqueeze(-1)
    found: Tensor = vec_generalized_advantage_estimate(
        DECAY, 1.0, zeros, zeros, x.unsqueeze(-1), done, done, time_dim=0
    )[0]
    return found.squeeze(-1)


def candidates(length: int, width: int, peers: bool) -> dict[str, Scan]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(length, width, generator=generator)
    decay = DECAY * (torch.rand(length, width, generator=generator) >= ENDS).float()
    turned_x, turned_decay = x.T.contiguous(), decay.T.contiguous()
    ends = [[0, *(column[:-1].nonzero().flatten() + 1).tolist(), length] for column in (decay == 0).T]
    scans: dict[str, Scan] = {
        "`linear_recurrence`": lambda: sf.linear_recurrence(x, decay, reverse=True),
        "the same, [N, T]": lambda: sf.linear_recurrence(turned_x, turned_decay, reverse=True, dim=-1).T,
        "numpy loop": lambda: numpy_loop(x, decay),
        "torch loop": lambda: torch_loop(x, decay),
    }
    if find_spec("scipy"):
        scans["`lfilter` per piece"] = lambda: lfilter_pieces(x, ends)
    if peers and find_spec("torchrl"):
        scans["TorchRL, vectorised GAE"] = lambda: torchrl_gae(x, decay)
    return scans


def check(scans: dict[str, Scan]) -> None:
    """All compute the same."""
    reference = scans["numpy loop"]()
    for name, scan in scans.items():
        torch.testing.assert_close(scan(), reference, rtol=1e-3, atol=1e-3, msg=f"{name} computes something else")


def timings(scans: dict[str, Scan], repeats: int, shortest: float = 2e-3) -> dict[str, list[float]]:
    """CPU milliseconds of one call; fast calls are repeated until they can be timed, slow ones are repeated less."""
    calls = {}
    for name, scan in scans.items():
        start = time.process_time()
        scan()
        calls[name] = max(1, min(50, int(shortest / max(time.process_time() - start, 1e-6))))
    milliseconds: dict[str, list[float]] = {name: [] for name in scans}
    order = random.Random(0)
    for _ in range(repeats):
        for name in order.sample(list(scans), len(scans)):
            start = time.process_time()
            for _ in range(calls[name]):
                scans[name]()
            milliseconds[name].append(1e3 * (time.process_time() - start) / calls[name])
    return milliseconds


def backward(length: int, width: int) -> Scan:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(length, width, generator=generator).requires_grad_()
    decay = DECAY * (torch.rand(length, width, generator=generator) >= ENDS).float()
    direction = torch.randn(length, width, generator=generator)
    return lambda: torch.autograd.grad(sf.linear_recurrence(x, decay, reverse=True), x, direction)[0]


def table(repeats: int, peers: bool, shapes: tuple[tuple[int, int], ...] = SHAPES) -> list[str]:
    rows: list[str] = []
    for length, width in shapes:
        scans = candidates(length, width, peers)
        check(scans)
        scans["with its gradient in x"] = backward(length, width)
        found = timings(scans, repeats if length * width < 500_000 else max(repeats // 3, 1))
        if not rows:
            names = list(scans)
            rows = [f"| T x N | {' | '.join(names)} | numpy loop / ours | goal |", "|---" * (len(names) + 3) + "|"]
        ratio = median(
            theirs / ours for ours, theirs in zip(found["`linear_recurrence`"], found["numpy loop"], strict=True)
        )
        goal = GOALS.get((length, width))
        cells = [f"{median(values):.3g}" for values in found.values()]
        rows.append(f"| {length} x {width} | {' | '.join(cells)} | {ratio:.2f} | {'' if goal is None else goal} |")
    return rows


def page(rows: list[str], repeats: int, peers: bool, day: str) -> str:
    packages = [f"numpy {np.__version__}"]
    packages += [f"{name} {version(name)}" for name in ("scipy", *(("torchrl",) if peers else ())) if find_spec(name)]
    return "\n".join(
        [
            "# The scan",
            "",
            f"Measured {day}: Python {platform.python_version()}, torch {torch.__version__}, {', '.join(packages)},",
            f"one thread, {repeats} repeats (a third for the largest) in random order, {platform.machine()} machine",
            f"with {os.cpu_count()} shared cores. One reverse scan `y_t = x_t + decay_t y_(t+1)` of float32 with 1 %",
            "of zeros in the decay: CPU milliseconds, median.",
            "",
            *rows,
            "",
            "All take and return torch tensors. `[N, T]` is the layout of rewards in `Draws`, time last, which is",
            "turned before and after. The ratio is the median of the ratios within a repeat: above 1,",
            "`linear_recurrence` is the faster. Below some 20 steps the fixed cost of a call, about 10 microseconds,",
            "is most of it, and a bare loop is cheaper. The goals are of the first column; turned, the",
            "two widest ones are missed.",
            "`lfilter` is told where the pieces are.",
            "",
            f"Reproduce with `python -m applications.benchmarks.scan --repeats {repeats}{' --peers' if peers else ''} "
            "--out docs/figures/scan.md`.",
            "",
        ]
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--peers", action="store_true", help="time TorchRL too, where it is installed")
    parser.add_argument("--out", type=Path, help="also write the table to this Markdown file")
    parser.add_argument("--date", default=time.strftime("%Y-%m-%d"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    text = page(table(options.repeats, options.peers), options.repeats, options.peers, options.date)
    print(text)
    if options.out is not None:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
