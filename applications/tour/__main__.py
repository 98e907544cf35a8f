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
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from applications.tour.checks import GradientCheck
from applications.tour.figure import draw_figure
from applications.tour.stages import Report, take


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
    parser = argparse.ArgumentParser("python -m applications.tour", description=(__doc__ or "").splitlines()[0])
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
