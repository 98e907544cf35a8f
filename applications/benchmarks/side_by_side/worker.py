"""The process of a room: reads an order a line from standard input, writes an answer a line.

    python -m applications.benchmarks.side_by_side.worker

It imports nothing but NumPy and what the contenders' modules import, so that any environment can run it.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import random
import signal
import sys
import time
import traceback
import warnings
from importlib.metadata import PackageNotFoundError, version
from typing import IO, Any

import numpy as np

from applications.benchmarks.side_by_side.work import Sample, Work

Order = dict[str, Any]


class Worker:
    """The works of one process, by name."""

    def __init__(self) -> None:
        self._works: dict[str, Work] = {}

    def obey(self, order: Order) -> Order:
        """One order: ``make``, ``answer``, ``run``, ``forget`` or ``versions``."""
        kind = order["do"]
        if kind == "make":
            factory = _named(order["work"])
            seed_all(order["seed"])
            self._works[order["name"]] = factory(**order["options"])
            one_thread()
            return {}
        if kind == "answer":
            answer = self._works[order["name"]].answer
            if answer is None:
                return {"answer": None}
            seed_all(order["seed"])
            found = answer()
            return {"answer": {"mean": found.mean, "error": found.error}}
        if kind == "run":
            return {"sample": timed(self._works[order["name"]], order["turn"], order["calls"])}
        if kind == "prepare":
            function = _named(order["work"])
            seed_all(order["seed"])
            function(order["path"])
            return {}
        if kind == "forget":
            self._works.clear()
            return {}
        assert kind == "versions", kind
        return {"versions": {"python": platform.python_version(), **dict(_versions(order["packages"]))}}


def _named(name: str) -> Any:
    """What ``module:name`` says."""
    module, _, attribute = name.partition(":")
    found = getattr(importlib.import_module(module), attribute)
    one_thread()
    return found


def one_thread() -> None:
    """Of torch, where it is loaded."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


def timed(work: Work, turn: int, calls: int) -> Sample:
    """A turn: so many calls, after one that does not count where they are many, because the room was asleep."""
    if calls > 1:
        work.run(turn)
    begin = time.process_time()
    found: Sample | None = None
    for _ in range(calls):
        found = work.run(turn)
    cpu = (time.process_time() - begin) / calls
    return {"cpu": cpu, "work": 1.0, **(found or {})}


def seed_all(seed: int) -> None:
    """Every generator that is loaded."""
    random.seed(seed)
    np.random.seed(seed)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(seed)


def _versions(packages: list[str]) -> Any:
    for package in packages:
        try:
            yield package, version(package)
        except PackageNotFoundError:
            continue


def serve(orders: IO[str], answers: IO[str]) -> None:
    """Until there is no more order; what goes wrong is an answer."""
    worker = Worker()
    for line in orders:
        try:
            answer = worker.obey(json.loads(line))
        except Exception as error:
            answer = {"trouble": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the program's to answer
    warnings.simplefilter("ignore")
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints is no answer
    serve(sys.stdin, answers)


if __name__ == "__main__":
    main()
