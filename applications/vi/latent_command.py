"""The command line that ``mixture`` and ``hmm`` share: fit the families in turn, compare, write and plot."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from applications.arguments import at_least
from applications.progress import Interruption
from applications.results import write_result
from applications.vi.fitting import draw_ways, show
from applications.vi.latent_fit import Fit, fit, report
from applications.vi.latent_gradients import compare, show_rows
from applications.vi.latent_posterior import posterior
from applications.vi.latent_states import Program


def plot(fits: Sequence[Fit], path: Path) -> None:
    """Means beside the posterior's, marginals of the states against the posterior's, and the way of the bound."""
    from matplotlib.figure import Figure

    exact, labels = fits[0].exact, fits[0].program.labels
    figure = Figure(figsize=(13, 4), layout="constrained")
    means, states, way = figure.subplots(1, 3)
    means.axhspan(-0.1, 0.1, color="lightgrey")
    states.plot([0, 1], [0, 1], color="lightgrey")
    for number, fitted in enumerate(fits):
        name, colour = fitted.program.name, f"C{number}"
        found, sds, marginals = fitted.program.moments()
        places = [i + 0.2 * (number - (len(fits) - 1) / 2) for i in range(len(labels))]
        off, spread = (found - exact.means) / exact.sds, sds / exact.sds
        means.errorbar(places, off.tolist(), spread.tolist(), fmt="o", color=colour, label=name)
        states.plot(exact.states.tolist(), marginals.tolist(), ".", color=colour, label=name)
    means.set_xticks(range(len(labels)), labels)
    means.set_ylabel("guide minus posterior, posterior sd; bars: sd")
    states.set_xlabel("exact P(state = 1 | y)")
    states.set_ylabel("guide")
    draw_ways(way, {fitted.program.name: fitted.curve for fitted in fits}, seconds=True)
    way.set_ylabel("below the log evidence, nats")
    figure.savefig(path, dpi=120)


def run(
    argv: list[str] | None,
    description: str | None,
    families: Mapping[str, type[Program]],
    data: tuple[Tensor, dict[str, Any]],
    *,
    name: str,
    nodes: int,
    steps: int,
    particles: int,
    rates: Mapping[str, float],
) -> int:
    """The command line of both programs: fit the families in turn, then compare with what is exact.

    Args:
        argv: None: of the process.
        description: whose first line says what the program is.
        families: by name; "exact" is among them.
        data: y, and what posteriordb says.
        name: of the folder and the plot.
        nodes: of the quadrature, in each dimension.
        steps: by default.
        particles: by default.
        rates: see ``fit``.
    """
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("--seed", type=at_least(0), default=0)
    parser.add_argument("--steps", type=at_least(1), default=steps)
    parser.add_argument("--particles", type=at_least(2), default=particles, help="leave-one-out takes two or more")
    parser.add_argument("--families", nargs="+", choices=list(families), default=list(families))
    parser.add_argument("--score", action="store_true", help="the globals by the score function too")
    parser.add_argument("--repeats", type=at_least(0), default=0, help="gradients for the variance of each estimator")
    parser.add_argument("--out", type=Path, default=Path("runs") / name, help="folder of result and plot")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)  # before the work: a path that cannot be is found out at once
    (y, reference), fits = data, list[Fit]()
    exact = posterior(families["exact"](y), nodes)
    with Interruption() as interrupted:
        for family in dict.fromkeys(options.families):
            print(family)
            program = families[family](y, pathwise=not options.score)
            settings: dict[str, Any] = {"particles": options.particles, "should_stop": interrupted}
            fits.append(fit(program, exact, options.seed, options.steps, show, rates=rates, **settings))
            if interrupted():
                break
    print(f"\nlog evidence {exact.log_evidence:.6f}, of ordered means")
    rows = [fitted.summary() for fitted in fits]
    print(*map(report, rows), sep="\n")
    found = []
    if options.repeats and not interrupted():
        found = compare(fits[-1].program, options.repeats, options.particles)
        print(f"\ngradients at the fitted guide, {fits[-1].program.name}\n{show_rows(found)}")
    record: dict[str, Any] = {
        "complete": not interrupted(),
        "log_evidence": exact.log_evidence,
        "means": dict(zip(fits[0].program.labels, exact.means.tolist(), strict=True)),
        "sds": dict(zip(fits[0].program.labels, exact.sds.tolist(), strict=True)),
        "states": exact.states.tolist(),
        "reference": reference,
        "families": rows,
        "compare": [asdict(row) for row in found],
        "curves": [[asdict(point) for point in fitted.curve] for fitted in fits],
    }
    write_result(options.out, vars(options), record)
    plot(fits, options.out / f"{name}.png")
    return 130 if interrupted() else 0
