"""The 24 noiseless functions of COCO's BBOB suite: how many a search solves within a budget, beside pycma.

    python -m applications.bbo.bbob --dimension 5 --functions 1-24 --instances 1-3 --budget 10000 --out runs/bbob

Every problem is a function with an instance, which moves and rotates it. Both solvers see a black box, start at the
same point, uniform in [-4, 4]^D, with sigma0 = 2, and restart at further such points: scorefn by ``minimize`` with
``Portfolio``, pycma by ``fmin2`` with ``bipop=True, restarts=9``. A run ends at f_opt + 1e-8 or with the budget, which
counts evaluations per dimension. f_opt is computed, by COCO, at the optimum that it declares; no solver sees it but as
ftarget.

What is left in the folder: COCO's own data of each solver in ``coco/``, for its post-processing; ``result.json``; and
``ecdf.png``, the share of problems and of 51 targets between 100 and 1e-8 that was reached, against evaluations. Begun
anew in the same folder, the program goes on after the last whole problem, and finds what an uninterrupted run finds.

Needs ``pip install coco-experiment cma``. Source: Hansen, Auger, Ros, Mersmann, Tusar & Brockhoff (2021), "COCO: a
platform for comparing continuous optimizers in a black-box setting".
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import scorefn as sf
from applications.arguments import at_least, span
from applications.bbo.bbob_solvers import SOLVERS, attempt
from applications.bbo.bbob_suite import TARGETS, Record, Suite
from applications.progress import Interruption, show_line
from applications.results import write_result

DIMENSIONS = (2, 3, 5, 10, 20, 40)
_SAVED = 10.0  # seconds between two times that result.json is written


def summary(records: Sequence[Record]) -> Record:
    """Of one solver: ``hits`` of ``total`` problems solved; the same of 51 targets each; evaluations, CPU seconds.

    All of it by function, too. ``ert`` is the evaluations of all runs (of a success those up to the target) per
    success; None without any.
    """
    functions = sorted({record["function"] for record in records})
    return {
        **_sums(records),
        "per_function": {
            str(number): _sums([record for record in records if record["function"] == number]) for number in functions
        },
    }


def _sums(records: Sequence[Record]) -> Record:
    last = [record["reached"][-1] for record in records]
    solved = sum(count is not None for count in last)
    spent = sum(record["evaluations"] if count is None else count for record, count in zip(records, last, strict=True))
    return {
        "hits": solved,
        "total": len(records),
        "evaluations": sum(record["evaluations"] for record in records),
        "cpu_seconds": sum(record["cpu_seconds"] for record in records),
        "target_hits": sum(count is not None for record in records for count in record["reached"]),
        "target_total": len(TARGETS) * len(records),
        "ert": spent / solved if solved else None,
    }


def ecdf(records: Sequence[Record], dimension: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Evaluations per dimension, ascending, and the share of problems and targets that was reached by then."""
    counts = sorted(count for record in records for count in record["reached"] if count is not None)
    share = np.arange(1, len(counts) + 1) / max(1, len(TARGETS) * len(records))
    return np.array(counts, dtype=np.float64) / dimension, share


def plot(by_solver: Mapping[str, Sequence[Record]], dimension: int, budget: int, path: Path) -> None:
    """The empirical distribution functions of the solvers."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, records in by_solver.items():
        evaluations, share = ecdf(records, dimension)
        label = f"{name}: {len(evaluations) / max(1, len(TARGETS) * len(records)):.3f}"
        end = share[-1:] if len(share) else [0.0]
        axes.step([*evaluations, budget], [*share, *end], where="post", label=label)
    axes.set(xscale="log", xlim=(1, budget), ylim=(0, 1))
    axes.set_xlabel("evaluations / D")
    axes.set_ylabel("share of problems and targets reached")
    problems = {(record["function"], record["instance"]) for records in by_solver.values() for record in records}
    axes.set_title(f"BBOB, D = {dimension}: {len(problems)} problems, {len(TARGETS)} targets from 100 to 1e-8")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left")
    figure.savefig(path, dpi=110)


def versions(names: Iterable[str]) -> dict[str, str]:
    """Of Python, this library and those of the named packages that are installed."""
    found = {"python": platform.python_version(), "scorefn": sf.__version__}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def missing(peers: bool) -> str | None:
    """What is to be installed, in words; None where all is there."""
    lacking = [] if importlib.util.find_spec("cocoex") else ["coco-experiment, which has the problems"]
    if peers and not importlib.util.find_spec("cma"):
        lacking.append("cma, the peer (or leave it out by --no-peers)")
    if not lacking:
        return None
    return f"There is no {' and no '.join(lacking)}: pip install coco-experiment cma"


def before(folder: Path, settings: Mapping[str, Any]) -> list[Record]:
    """The records of an earlier run in the folder; none where there was none.

    Raises:
        sf.ScorefnError: its result.json cannot be read, or was made with other settings.
    """
    path = folder / "result.json"
    if not path.exists():
        return []
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        records, made = list(found["records"]), dict(found["settings"])
    except (ValueError, KeyError, TypeError) as error:
        raise sf.ScorefnError(
            f"{path} is no result of this program ({type(error).__name__}): nothing can be added to it. Choose another "
            "folder."
        ) from error
    other = [
        f"{name} {made.get(name)} instead of {value}" for name, value in settings.items() if made.get(name) != value
    ]
    if other:
        raise sf.ScorefnError(
            f"{path} was made with {', '.join(other)}: its problems and new ones would not belong together. Choose "
            "another folder."
        )
    return records


def main(argv: list[str] | None = None) -> int:
    """All problems, the solvers in turn on each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--dimension", type=int, choices=DIMENSIONS, default=5, help="D")
    parser.add_argument("--functions", type=span(1, 24), default=list(range(1, 25)), help="for instance 1-4,8")
    parser.add_argument("--instances", type=span(1, 1000), default=[1, 2, 3], help="for instance 1-15")
    parser.add_argument("--budget", type=at_least(100), default=10_000, help="evaluations per dimension")
    parser.add_argument("--restarts", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True, help="pycma beside it")
    parser.add_argument("--data", action=argparse.BooleanOptionalAction, default=True, help="COCO's own data")
    parser.add_argument("--seed", type=at_least(0), default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/bbob"), help="folder of data, result and plot")
    options = parser.parse_args(argv)
    if lack := missing(options.peers):
        parser.error(lack)
    if '"' in str(options.out):
        parser.error(f"--out {options.out} has a quotation mark in it, which COCO cannot read")
    torch.set_num_threads(1)
    solvers = list(SOLVERS) if options.peers else ["scorefn"]
    settings = {name: getattr(options, name) for name in ("dimension", "budget", "restarts", "seed")}
    settings["versions"] = versions(["torch", "numpy", "coco-experiment", "cma"])
    try:
        records = before(options.out, settings)
    except sf.ScorefnError as error:
        parser.error(str(error))
    try:  # before the work: a path that cannot be is found out at once
        options.out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=options.out).close()
    except OSError as error:
        parser.error(f"--out {options.out} cannot be written into ({error.strerror}): choose another folder")
    suite = Suite(options.dimension, options.functions, options.instances)
    observers = {name: _observer(options.out, name) for name in solvers} if options.data else {}
    done = {(record["solver"], record["function"], record["instance"]) for record in records}
    todo = [(f, i, name) for f in options.functions for i in options.instances for name in solvers]
    left = [(f, i, name) for f, i, name in todo if (name, f, i) not in done]
    if len(left) < len(todo):
        print(f"{len(todo) - len(left)} of {len(todo)} runs are in {options.out} already", flush=True)
    saved = time.monotonic()
    try:
        with Interruption() as interrupted:
            for number, (f, i, name) in enumerate(left, 1):
                record = attempt(
                    name,
                    suite,
                    f,
                    i,
                    budget=options.budget,
                    seed=options.seed,
                    restarts=options.restarts,
                    observer=observers.get(name),
                )
                records.append(record)
                ended = number == len(left) or interrupted()
                show_line(_line(record, len(todo) - len(left) + number, len(todo)), last=ended)
                if time.monotonic() - saved > _SAVED:
                    _write(options, settings, records, False)
                    saved = time.monotonic()
                if ended:
                    break
    finally:
        complete = len({(r["solver"], r["function"], r["instance"]) for r in records} & {(n, f, i) for f, i, n in todo})
        _write(options, settings, records, complete == len(todo))
    by_solver = _by_solver(records)
    plot(by_solver, options.dimension, options.budget, options.out / "ecdf.png")
    print(table(by_solver))
    return 0 if complete == len(todo) else 130


def table(by_solver: Mapping[str, Sequence[Record]]) -> str:
    """Solved problems by function, and in all; the share of targets; evaluations and CPU time."""
    found = {name: summary(records) for name, records in by_solver.items()}
    functions = sorted({int(number) for entry in found.values() for number in entry["per_function"]})
    lines = ["| | " + " | ".join(found) + " |", "|---" * (len(found) + 1) + "|"]

    def row(title: str, cell: Callable[[Record], str]) -> None:
        lines.append(f"| {title} | " + " | ".join(cell(entry) for entry in found.values()) + " |")

    nothing = {"hits": 0, "total": 0}
    for number in functions:
        cells = (entry["per_function"].get(str(number), nothing) for entry in found.values())
        lines.append(f"| f{number} | " + " | ".join(f"{cell['hits']}/{cell['total']}" for cell in cells) + " |")
    row("all", lambda entry: f"{entry['hits']}/{entry['total']} = {entry['hits'] / entry['total']:.3f}")
    row("share of targets", lambda entry: f"{entry['target_hits'] / entry['target_total']:.3f}")
    row("evaluations", lambda entry: f"{entry['evaluations']:,}")
    row("CPU seconds", lambda entry: f"{entry['cpu_seconds']:,.0f}")
    return "\n".join(lines)


def _write(options: argparse.Namespace, settings: Mapping[str, Any], records: Sequence[Record], complete: bool) -> None:
    by_solver = _by_solver(records)
    found = {name: summary(entries) for name, entries in by_solver.items()}
    own = found.pop("scorefn", {})
    write_result(
        options.out,
        vars(options),
        {"complete": complete, "settings": settings, **own, "peers": found, "records": list(records)},
    )


def _by_solver(records: Sequence[Record]) -> dict[str, list[Record]]:
    split = {name: [record for record in records if record["solver"] == name] for name in SOLVERS}
    return {name: entries for name, entries in split.items() if entries}


def _observer(folder: Path, solver: str) -> Any:
    import cocoex

    return cocoex.Observer(
        "bbob", f'outer_folder: "{folder.resolve() / "coco"}" result_folder: {solver} algorithm_name: "{solver}"'
    )


def _line(record: Record, number: int, total: int) -> str:
    way = "solved after" if record["reached"][-1] else f"gap {record['gap']:.1e} after"
    what = f"f{record['function']} instance {record['instance']}, {record['solver']}"
    return f"{number} of {total}: {what}: {way} {record['evaluations']:,} evaluations".ljust(90)


if __name__ == "__main__":
    sys.exit(main())
