"""What each reducer saves and what it costs: ``python -m applications.benchmarks.reducers --out FILE``.

Variance of a gradient estimate, CPU time, and their product, which is the price of precision, on two problems in closed
form and four larger ones. The estimators of a problem take turns, round by round, on one thread; those with a state are
warmed up on draws that do not count. Intervals are percentiles of a bootstrap over rounds, 95 %.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pyro
import torch

from applications.benchmarks.reducers.closed_forms import bernoulli, couplings, gaussian
from applications.benchmarks.reducers.page import LESSONS, fits, page, section, summary
from applications.benchmarks.reducers.pole import pole, policies
from applications.benchmarks.reducers.programs import belief_net, recaptures
from applications.benchmarks.reducers.variances import Problem, Row, rows
from applications.rl import cartpole
from applications.vi import belief_net_training


def problems(*, quick: bool = False) -> Iterator[Problem]:
    """All of them, each made when its turn comes; ``quick`` trains next to nothing."""
    yield bernoulli(0.0)
    yield bernoulli(-4.0)
    yield gaussian()
    yield couplings()
    yield from recaptures()
    for steps in (10, 20) if quick else (100, 5000):
        fitted = belief_net_training.fit(0, steps)
        yield belief_net(fitted.net, fitted.train, f"after {steps} steps")
    config = cartpole.Config(num_samples=8, max_updates=4) if quick else cartpole.Config()
    for title, policy in policies(0, config).items():
        yield pole(policy, title, episodes=4 if quick else 32)


def run(
    repeats: int, *, quick: bool = False, report: Callable[[str], None] = print, only: str = ""
) -> Iterator[tuple[Problem, list[Row], str]]:
    """Problems, their rows and their sections, one after the other.

    Args:
        repeats: rounds; a problem takes a multiple of them.
        quick: a few rounds of everything, to see that it works.
        report: told what comes next.
        only: measure the problems whose title contains this.
    """
    pyro.set_rng_seed(0)
    for problem in problems(quick=quick):
        if only.lower() not in problem.title.lower():
            continue
        rounds = 4 if quick else max(10, round(problem.repeats * repeats))
        report(f"{problem.title}: {rounds} rounds ...")
        with pyro.get_param_store().scope():
            found = rows(problem, rounds, 2 if quick else None)
        yield problem, found, section(problem, found, rounds)


def main(argv: list[str] | None = None) -> int:
    """Measure, print, and write the page where one is asked for; Ctrl-C keeps what is finished."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=400, help="rounds; problems take up to five times as many")
    parser.add_argument("--quick", action="store_true", help="a few rounds of everything, to see that it works")
    parser.add_argument("--only", default="", help="measure only the problems whose title contains this")
    parser.add_argument("--out", type=Path, help="write the page to this Markdown file")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    sections: list[str] = []
    found: list[tuple[Problem, list[Row]]] = []
    interrupted = False

    def report(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    try:
        for problem, measured, text in run(options.repeats, quick=options.quick, report=report, only=options.only):
            found.append((problem, measured))
            sections.append(text)
            print(f"{text}\n", flush=True)
        if not options.only:
            sections.append(fits(20 if options.quick else 3000, report))
            print(f"{sections[-1]}\n\n{summary(found)}\n", flush=True)
    except KeyboardInterrupt:
        interrupted = True
        print("Stopped; the problems above are complete.", file=sys.stderr)
    if options.out is not None and sections and not interrupted:
        command = f"python -m applications.benchmarks.reducers --repeats {options.repeats} --out {options.out}"
        options.out.write_text(page([summary(found), LESSONS, *sections], command), encoding="utf-8")
    return 130 if interrupted else 0


if __name__ == "__main__":
    sys.exit(main())
