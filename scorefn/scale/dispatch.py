"""Generations over workers: cut into batches, put back into the order of their points, and accounted for."""

from __future__ import annotations

import itertools
import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from scorefn.core import ScorefnError
from scorefn.core.warnings import EvaluationWarning, warn
from scorefn.scale.crew import Crew, Spent
from scorefn.scale.executors import Workers, now
from scorefn.scale.records import WorkRecord
from scorefn.scale.transport import Work, cut, leaves, length

_WORTH = 0.05  # seconds that a batch should last, of which sending it takes about a hundredth
_SHARES = 4  # batches per worker while nobody knows how long an evaluation takes


class Dispatch:
    """Values of the points of a generation, computed by workers and returned in the order of the points.

    Args:
        work: what runs there.
        workers: where.
        together: whether a batch is one call of work.
        fun: the caller's function in it, as errors name it.

    Raises:
        ScorefnError: no worker answers; fun cannot be pickled, or not be loaded there.
    """

    crew_kind: ClassVar[type[Crew]] = Crew

    def __init__(self, work: Work, workers: Workers, *, together: bool = False, fun: Any = None) -> None:
        self.records: list[WorkRecord] = []
        self.crew = self.crew_kind(work, workers, together=together, fun=work if fun is None else fun)
        self._workers = workers
        self._together = together
        self._each: float | None = None  # seconds, in the last generation
        self._warned = False
        self._begun = False

    def __call__(self, points: Any, counted: bool = True) -> Tensor:
        """Values ``[N]`` in float64 on the device of the points; NaN where an evaluation failed.

        Args:
            points: ``[N, ...]``, or tuples, lists and dicts of such.
            counted: whether this is a generation, with a record.
        """
        crew, num, begin = self.crew, length(points), now()
        spared = self._spared(num)
        before = crew.spent
        values, left = [math.nan] * num, num
        try:
            for start, stop in self._cuts(num):
                crew.add(cut(points, start, stop), start, stop - start, start, num)
            while left > spared:
                found = crew.settled()
                left -= len(found)
                for place, value in found:
                    values[place] = value
        finally:
            crew.leave()
        spent = crew.spent.since(before)
        self.report_failures(everything=spent.failed == num - left)
        self._each = spent.busy / (num - left) if spent.busy else self._each
        if counted:
            self.keep(num, now() - begin, spent, left)
        return torch.tensor(values, dtype=torch.float64, device=leaves(points)[0].device)

    def keep(self, num: int, seconds: float, spent: Spent, dropped: int = 0) -> None:
        """Keep the record of a generation, and show it to whoever asked for it."""
        record = WorkRecord(
            generation=len(self.records),
            evaluations=num,
            seconds=seconds,
            busy=spent.busy,
            workers=self.crew.staff.size,
            bytes_sent=spent.bytes_sent,
            resubmitted=spent.resubmitted,
            failed=spent.failed,
            dropped=dropped,
        )
        self.records.append(record)
        if self._workers.report is not None:
            self._workers.report(record)

    def report_failures(self, everything: bool) -> None:
        """Raise the first failure where there was nothing else from the beginning on; else show it, once."""
        begun, self._begun = self._begun, True
        failure = self.crew.failure
        if failure is None or not self.crew.spent.failed:
            return
        if everything and not begun:
            failure.again()
        if not self._warned:
            self._warned = True
            warn(
                f"Evaluations that fail {self._workers.attempts} times are failed ones, NaN. What happened first: "
                f"{failure.shown}\n{failure.trace}",
                EvaluationWarning,
            )

    def close(self, at_once: bool = False) -> None:
        """Shut down an executor that was made here."""
        self.crew.close(at_once)

    def _spared(self, num: int) -> int:
        drop = self._workers.drop_slowest
        if drop and num > 1 and drop >= num:
            raise ScorefnError(
                f"drop_slowest={drop} leaves nothing of a generation of {num} points: lower it, or raise popsize."
            )
        return drop if num > 1 else 0

    def _cuts(self, num: int) -> list[tuple[int, int]]:
        """Where a generation is cut: into as many batches for each worker, none of them short of ``_WORTH``."""
        size, batch = self.crew.staff.size, self._workers.batch
        if batch is not None:
            return [(start, min(start + batch, num)) for start in range(0, num, batch)]
        if self._together:
            pieces = size
        elif self._workers.drop_slowest:
            pieces = num
        elif self._each is None:
            pieces = _SHARES * size
        else:
            least = math.ceil(_WORTH / max(self._each, 1e-9))
            most = max(1, num // (size * least))
            pieces = size * min(range(most, most // 2, -1), key=lambda share: num % (size * share))  # evenly, if it can
        pieces = min(pieces, num)
        edges = [num * i // pieces for i in range(pieces + 1)]
        return list(itertools.pairwise(edges))
