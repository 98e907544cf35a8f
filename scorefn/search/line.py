"""One line about a search, now and then."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import TypeAlias

from scorefn.scale import WorkRecord

Report: TypeAlias = bool | Callable[[str], object]
"""True: one line on stderr that is written over; a callable: gets that line, at most five times a second."""

_SECONDS = 0.2  # between two reports


class Line:
    """The line."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._next = 0.0
        self._shown = False

    def show(
        self, row: tuple[int, float, float, float, int], best: float, seconds: float, records: Sequence[WorkRecord]
    ) -> None:
        """Report a generation, its row of the history, unless the last report was a moment ago."""
        if self._report is False or seconds < self._next:
            return
        self._next = seconds + _SECONDS
        nfev, _, median, sigma, number = row
        again = f"  restart {number}" if number else ""
        width = "" if math.isnan(sigma) else f"  sigma {sigma:.2e}"  # of several parts there is not one
        line = f"{nfev:>10,} evaluations{again}  best {best:.6g}  median {median:.6g}{width}  {seconds:.1f} s"
        if records:
            line += f"  {records[-1].evaluations_per_second:,.0f}/s  idle {100 * records[-1].idle_share:.0f} %"
        if callable(self._report):
            self._report(line)
        else:
            sys.stderr.write(f"\r{line:<120}")
            sys.stderr.flush()
            self._shown = True

    def end(self) -> None:
        """End the line."""
        if self._shown:
            sys.stderr.write("\n")
            self._shown = False
