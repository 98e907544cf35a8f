"""Long work that shows how far it is and can be interrupted."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Any, NamedTuple


class Interruption:
    """Ctrl-C as a question that the work asks, so that it ends after a whole step; a second Ctrl-C ends it at once.

    Example::

        with Interruption() as interrupted:
            for _ in timed_steps(step, 1000, should_stop=interrupted):
                ...
    """

    def __init__(self) -> None:
        self._asked = False
        self._before: Any = None

    def __call__(self) -> bool:
        """Whether Ctrl-C was pressed."""
        return self._asked

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True

    def __enter__(self) -> Interruption:
        """Ctrl-C asks from here on."""
        self._before = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Ctrl-C is what it was before."""
        signal.signal(signal.SIGINT, self._before)


class Mark(NamedTuple):
    """Where timed work stands.

    Attributes:
        step: the last one done, from 1.
        seconds: of CPU, spent in the steps alone.
    """

    step: int
    seconds: float


def timed_steps(
    step: Callable[[], Any], steps: int, *, marks: int = 60, should_stop: Callable[[], bool] = lambda: False
) -> Iterator[Mark]:
    """Take the steps and pause some times on the way, and at the end; what is done in a pause costs no time.

    Args:
        step: called so many times.
        steps: how many.
        marks: about how many pauses, evenly spaced.
        should_stop: asked after every step; work that it ends pauses once more.
    """
    every, seconds = max(1, steps // marks), 0.0
    for number in range(1, steps + 1):
        begin = time.process_time()
        step()
        seconds += time.process_time() - begin
        stop = should_stop()
        if number % every == 0 or number == steps or stop:
            yield Mark(number, seconds)
        if stop:
            return


def show_line(text: str, *, last: bool) -> None:
    """Print a line that the next one writes over on a terminal, until the last."""
    print(text, end="\r" if sys.stdout.isatty() and not last else "\n", flush=True)
