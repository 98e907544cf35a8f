"""What a worker does: registered rows, asked in turn, written down. Needs numpy only."""

from __future__ import annotations

import argparse
import inspect
import json
import linecache
import platform
import random
import sys
import textwrap
import time
import traceback
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from applications.benchmarks.scorecard import problems
from applications.benchmarks.scorecard.problems import Problem

TIMED = 0.3  # CPU seconds spent on timing single estimates, at least
YARDSTICK = 300  # rounds


@dataclass
class Answer:
    """How to get estimates from a library: see the package's docstring.

    Attributes:
        one: one estimate ``[P]``.
        many: count independent estimates ``[count, P]``, all at once.
        exact: nothing is random; asked once.
        chunk: how many ``many`` is asked for at a time.
    """

    one: Callable[[], Any]
    many: Callable[[int], Any] | None = None
    exact: bool = False
    chunk: int = 20_000


@dataclass
class Record:
    """One row as it is written down.

    Attributes:
        status: "ran", "crashed", "refused" (the library raised on purpose) or "not offered".
        error: type and message of the exception; for "not offered", the reason.
        where: file name and line of code where the exception left.
        array: name of the row's gradients in the ``.npz``; empty where there are none.
        seconds: CPU seconds per single estimate, median over blocks.
        yardstick: CPU seconds of the yardstick in the same process, just before.
        at_once: whether the estimates were made many at a time.
        usage: source of the registered function.
    """

    peer: str
    problem: str
    estimator: str
    link: str = ""
    reading: str = ""
    choice: str = ""
    note: str = ""
    evaluations: int | None = None
    status: str = "ran"
    error: str = ""
    where: str = ""
    array: str = ""
    seconds: float | None = None
    yardstick: float | None = None
    at_once: bool = False
    exact: bool = False
    warnings: list[str] = field(default_factory=list)
    usage: str = ""


def yardstick() -> float:
    """CPU seconds of a fixed piece of numpy and Python work: the unit of time that every environment has."""
    table = np.random.default_rng(0).normal(size=(50, 50))
    begin = time.process_time()
    for _ in range(YARDSTICK):
        total = {}
        for index, row in enumerate(np.exp(-((table @ table.T) ** 2))):
            total[index] = row.sum() + index
    return time.process_time() - begin


class Peer:
    """A library under test: its rows, and the program that asks them.

    Args:
        name: of the worker's file.
        packages: whose versions are recorded, the library's own first.
        seed_all: seeds the library's generator.
    """

    def __init__(self, name: str, packages: Iterable[str], seed_all: Callable[[int], Any] | None = None) -> None:
        self.name, self.packages, self.seed_all = name, tuple(packages), seed_all
        self.seed = 0
        self.rows: list[tuple[Record, Callable[[Problem], Answer] | None]] = []

    def row(
        self,
        names: str | tuple[str, ...],
        estimator: str,
        *,
        link: str,
        reading: str = "",
        choice: str = "",
        note: str = "",
        evaluations: int | None = None,
    ) -> Callable[[Callable[[Problem], Answer]], Callable[[Problem], Answer]]:
        """Register a documented use of the library on one problem or several."""

        def register(build: Callable[[Problem], Answer]) -> Callable[[Problem], Answer]:
            usage = textwrap.dedent(inspect.getsource(build))
            for name in (names,) if isinstance(names, str) else names:
                known = Record(
                    self.name, problems.named(name).name, estimator, link, reading, choice, note, evaluations
                )
                known.usage = usage
                self.rows.append((known, build))
            return build

        return register

    def lacks(self, names: str | tuple[str, ...], why: str) -> None:
        """Register that the library offers nothing for these problems."""
        for name in (names,) if isinstance(names, str) else names:
            record = Record(self.name, problems.named(name).name, "", status="not offered", error=why)
            self.rows.append((record, None))

    def main(self, arguments: list[str] | None = None) -> None:
        """Ask every row, and write what came back."""
        parser = argparse.ArgumentParser(description=f"Asks {self.name} the problems of the scorecard.")
        parser.add_argument("--problems", default="", help="names, separated by commas; all of them by default")
        parser.add_argument("--seconds", type=float, default=5.0, help="CPU seconds a row may take")
        parser.add_argument("--repeats", type=int, default=400_000, help="estimates a row may make")
        parser.add_argument("--seed", type=int, default=0)
        parser.add_argument("--out", type=Path, default=Path("runs/scorecard"))
        options = parser.parse_args(arguments)
        wanted = {problems.named(name).name for name in options.problems.split(",") if name}
        self.seed = options.seed
        arrays, records = self._kept(options.out, wanted)
        try:
            for record, build in self.rows:
                if wanted and record.problem not in wanted:
                    continue
                if build is not None:
                    self._ask(record, build, options, arrays)
                    said = f"{self.name}: {record.problem}, {record.estimator}: {record.status} {record.error}"
                    print(said[:150], flush=True)
                records.append(asdict(record))
        except KeyboardInterrupt:
            print(f"{self.name}: interrupted; the rows so far are kept", flush=True)
        options.out.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(options.out / f"{self.name}.npz", **arrays)
        whole = {"peer": self.name, "versions": self._versions(), "seed": self.seed, "rows": records}
        (options.out / f"{self.name}.json").write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")

    def _kept(self, folder: Path, wanted: set[str]) -> tuple[dict[str, np.ndarray], list[dict[str, Any]]]:
        """Rows of an earlier run that are not asked again now; none where the versions are others."""
        before, store = folder / f"{self.name}.json", folder / f"{self.name}.npz"
        if not wanted or not before.exists() or not store.exists():
            return {}, []
        whole = json.loads(before.read_text(encoding="utf-8"))
        if whole["versions"] != self._versions():
            return {}, []
        with np.load(store) as found:
            old = dict(found)
        arrays: dict[str, np.ndarray] = {}
        records = [row for row in whole["rows"] if row["problem"] and row["problem"] not in wanted]
        for row in records:
            if row["array"]:
                name = f"g{len(arrays)}"
                arrays[name], row["array"] = old[row["array"]], name
        return arrays, records

    def _versions(self) -> dict[str, str]:
        found = {"python": platform.python_version()}
        for package in self.packages:
            try:
                found[package] = version(package)
            except PackageNotFoundError:
                found[package] = str(getattr(sys.modules.get(package), "__version__", "unknown"))
        return found

    def _ask(
        self,
        record: Record,
        build: Callable[[Problem], Answer],
        options: argparse.Namespace,
        arrays: dict[str, np.ndarray],
    ) -> None:
        problem = problems.named(record.problem)
        random.seed(self.seed)
        np.random.seed(self.seed)
        if self.seed_all is not None:
            self.seed_all(self.seed)
        found: list[np.ndarray] = []
        try:
            with warnings.catch_warnings(record=True) as heard:
                warnings.simplefilter("always")
                answer = build(problem)
                record.exact = answer.exact
                record.yardstick = yardstick()
                self._collect(record, answer, problem, options, found)
        except Exception as error:
            record.status, record.where = _blame(error)
            record.error = f"{type(error).__name__}: {error}".strip()
        record.warnings = sorted({f"{w.category.__name__}: {w.message}"[:300] for w in heard})
        if found and record.status == "ran":
            record.array = f"g{len(arrays)}"
            arrays[record.array] = np.concatenate(found)

    def _collect(
        self, record: Record, answer: Answer, problem: Problem, options: argparse.Namespace, found: list[np.ndarray]
    ) -> None:
        """Time single estimates, then gather as many as the budget allows."""

        def single() -> np.ndarray:
            return np.asarray(answer.one(), dtype=np.float64).reshape(1, -1)

        def keep(gradients: np.ndarray) -> int:
            if gradients.shape[1] != problem.width:
                raise AssertionError(
                    f"the worker gave {gradients.shape[1]} numbers per estimate, {problem.name} has {problem.width}"
                )
            found.append(problem.view(gradients))
            return len(gradients)

        begin = time.process_time()
        made = keep(single())
        if answer.exact:
            record.seconds = time.process_time() - begin
            return
        size, blocks = 1, []
        while sum(blocks) < TIMED and len(blocks) < 50 and made < options.repeats:
            start = time.process_time()
            count = min(size, options.repeats - made)
            batch = [single() for _ in range(count)]
            blocks.append(time.process_time() - start)
            made += keep(np.concatenate(batch))
            if count == size or record.seconds is None:
                record.seconds = float(np.median(blocks[-9:])) / count
            if blocks[-1] < TIMED / 20:
                size, blocks = size * 2, []
        if answer.many is not None:
            record.at_once = True
            while made < options.repeats and time.process_time() - begin < options.seconds:
                count = min(answer.chunk, options.repeats - made)
                made += keep(np.asarray(answer.many(count), dtype=np.float64).reshape(count, -1))
            return
        while made < options.repeats and time.process_time() - begin < options.seconds:
            made += keep(np.concatenate([single() for _ in range(min(size, options.repeats - made))]))


def _blame(error: Exception) -> tuple[str, str]:
    """Whether a library raised on purpose, and where: a ``raise`` statement outside this package is a refusal."""
    if isinstance(error, ImportError):
        return "crashed", "import"
    frame = traceback.extract_tb(error.__traceback__)[-1]
    line = (frame.line or linecache.getline(frame.filename, frame.lineno or 0)).strip()
    inside = "scorecard" in Path(frame.filename).parts
    place = f"{Path(frame.filename).name}: {line}"
    return ("refused" if line.startswith("raise") and not inside else "crashed"), place
