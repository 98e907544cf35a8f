"""What the allocation of draws saves: per problem, per site, and over a training run.

Three experiments, each beside what is exact:

* ``problems``: 64 bandits of 10 arms share a budget of 8 draws each. Half-learnt ones are noisy, decided ones are not.
  The same draws for all, against ``draws_per_problem`` from exact moments and from measured ones (``problem_noise``).
  The variance of every allocation is exact, by sums over the arms.
* ``sites``: a chain of three sites whose draws cost 20, 4 and 1, in a ``StochasticGraph``. One nested draw each, the
  same number everywhere, and ``NestedAllocation`` from exact and from measured components. Variances are exact, by the
  sum over all 512 states, and measured beside.
* ``training``: a factorised guide of 20 coupled bits, gradient descent with momentum. Evaluations of f until the exact
  objective is within 10 % and 1 % of its starting distance from the optimum: a grid of fixed N against
  ``SampleSize``.

Run it with::

    OMP_NUM_THREADS=1 python -m applications.benchmarks.allocation

Ctrl-C ends after the present run; what was measured is still written. ``Bandits``, ``Chain``, ``Coupled`` and ``train``
are meant to be imported and copied.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from applications.arguments import at_least
from applications.benchmarks.allocation.bandits import problems
from applications.benchmarks.allocation.chain import sites
from applications.benchmarks.allocation.coupled import GAPS, GRID, meter_overhead, training
from applications.over_seeds import interquartile_mean
from applications.progress import Interruption, show_line
from applications.results import write_result


def render(record: dict[str, Any]) -> str:
    """Tables in Markdown."""
    lines = []
    for spread, rows in record.get("problems", {}).items():
        lines += [f"Bandits, logits spread up to {spread}:", "", "| draws | variance, exact | measured | ratio | n_b |"]
        lines += ["|---|---|---|---|---|"]
        for name, row in rows.items():
            measured = f"{row['measured']:.3f}" if "measured" in row else f"(worst {row['worst']:.3f})"
            counts = f"{row['least']} to {row['most']}" if "least" in row else ""
            lines.append(f"| {name} | {row['exact']:.3f} | {measured} | {row['ratio']:.3f} | {counts} |")
        lines.append("")
    if "sites" in record:
        lines += ["| nested draws of h, y | price | ratio | variance, exact | measured |", "|---|---|---|---|---|"]
        for name, row in record["sites"]["rows"].items():
            both = f"{row['exact']:.5f} | {row['measured']:.5f}" if "exact" in row else "|"
            lines.append(f"| {name}: {tuple(row['draws'])} | {row['price']:.3f} | {row['ratio']:.3f} | {both} |")
        lines.append("")
    if "training" in record:
        titles = " | ".join(f"gap {gap:.0%}" for gap in GAPS)
        lines += [f"| draws per step | {titles} | N at the end |", "|---|" + "---|" * (len(GAPS) + 1)]
        for name, row in record["training"].items():
            cells = []
            for found in zip(*row["evaluations"], strict=True):
                done = [count for count in found if count is not None]
                middle = f"{float(interquartile_mean(done)):,.0f}" if done else "-"
                cells.append(middle + ("" if len(done) == len(found) else f" ({len(done)} of {len(found)})"))
            last = f"{median(row['last']):.0f}" if row["last"] else "-"
            lines.append(f"| {name} | {' | '.join(cells)} | {last} |")
        lines.append("")
    if "overhead" in record:
        lines.append(f"A step with `observe` takes {record['overhead']:.3f} times as long as one without.")
    return "\n".join(lines)


def plot(rows: dict[str, Any], path: Path) -> None:
    """Evaluations of each way to each gap, by seed; what was not reached is not drawn."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot()
    for number, gap in enumerate(GAPS):
        points = [
            (x + 0.15 * number, found[number])
            for x, row in enumerate(rows.values())
            for found in row["evaluations"]
            if found[number] is not None
        ]
        axes.plot([x for x, _ in points], [y for _, y in points], "o", label=f"gap {gap:.0%}", alpha=0.7)
    axes.set(yscale="log", ylabel="evaluations of f")
    axes.set_xticks(range(len(rows)), list(rows))
    axes.legend()
    figure.savefig(path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write ``result.json``, ``tables.md`` and a plot."""
    parser = argparse.ArgumentParser(description="What the allocation of draws saves.")
    parser.add_argument("--seeds", type=at_least(1), default=5, help="of the training runs")
    parser.add_argument("--repeats", type=at_least(100), default=1000, help="estimates behind a measured variance")
    parser.add_argument("--budget", type=at_least(GRID[-1]), default=40_000, help="evaluations of f of a training run")
    parser.add_argument("--out", type=Path, default=Path("runs/allocation"), help="folder for what is written")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    record: dict[str, Any] = {"problems": {}}
    started = time.process_time()
    with Interruption() as interrupted:
        for spread in (0, 3, 6):
            if not interrupted():
                record["problems"][str(spread)] = problems(spread, options.repeats)
                show_line(f"problems: spread {spread} done", last=False)
        if not interrupted():
            record["sites"] = sites(options.repeats)
            show_line("sites: done", last=False)
        if not interrupted():
            record["overhead"] = meter_overhead()
        if not interrupted():
            show = partial(show_line, last=False)
            record["training"] = training(options.seeds, options.budget, show, interrupted)
    record["seconds"] = time.process_time() - started
    path = write_result(options.out, vars(options), record)
    tables = render(record)
    (options.out / "tables.md").write_text(tables + "\n", encoding="utf-8")
    if any(row["evaluations"] for row in record.get("training", {}).values()):
        plot(record["training"], options.out / "training.png")
    show_line(f"\n{tables}\n{record['seconds']:.0f} CPU seconds; written to {path.parent}", last=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
