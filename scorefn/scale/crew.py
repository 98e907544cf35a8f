"""Batches on their way: sent, sent again, given up; nothing here knows about generations."""

from __future__ import annotations

import queue
from collections import deque
from concurrent.futures import BrokenExecutor, CancelledError
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from scorefn.core import ScorefnError
from scorefn.scale.executors import Staff, Workers, missing_module, now, refuse_result
from scorefn.scale.transport import Answer, Failure, Letters, Missing, Refusal, Work, answer, cut, evaluated, received

_NAP = 1.0  # seconds: some systems let no interrupt through while one waits longer


@dataclass(eq=False)
class _Batch:
    """Points that are sent together.

    Args:
        points: tensors, or tuples, lists and dicts of them.
        ticket: the number of the first one, by which values are handed back.
        num: how many.
        first: which of the generation the first one is.
        total: how many the generation has.
        tries: how often it was sent.
        alone: nothing else may be on its way with it.
        full: the function must be sent along.
        deadline: when it is given up.
    """

    points: Any
    ticket: int
    num: int
    first: int
    total: int
    tries: int = 0
    alone: bool = False
    full: bool = False
    deadline: float = np.inf


@dataclass(frozen=True)
class Spent:
    """What was spent so far: see ``WorkRecord``."""

    bytes_sent: int = 0
    busy: float = 0.0
    resubmitted: int = 0
    failed: int = 0

    def __add__(self, other: Spent) -> Spent:
        return Spent(
            self.bytes_sent + other.bytes_sent,
            self.busy + other.busy,
            self.resubmitted + other.resubmitted,
            self.failed + other.failed,
        )

    def since(self, before: Spent) -> Spent:
        """What was spent since then."""
        return self + Spent(-before.bytes_sent, -before.busy, -before.resubmitted, -before.failed)


class Crew:
    """Sends batches to workers and hands values back as they come.

    Args:
        work: what runs there.
        workers: where, and how often.
        together: whether a batch is one call.
        fun: the caller's function in it, for errors.

    Raises:
        ScorefnError: no worker answers; fun cannot be pickled, or not be loaded there.
    """

    def __init__(self, work: Work, workers: Workers, *, together: bool, fun: Any) -> None:
        self._work = work
        self._workers = workers
        self._together = together
        self._fun = fun
        self.staff = Staff(workers)
        self.spent = Spent()
        self.failure: Failure | None = None  # the first one
        self._letters: Letters | None = None
        self._arrived: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._waiting: deque[_Batch] = deque()
        self._suspects: deque[_Batch] = deque()  # each goes alone
        self._away: dict[Any, _Batch] = {}
        self._hung: set[Any] = set()
        self._late: dict[Any, float] = {}  # given up, with their deadlines
        self._seen: set[Any] = set()
        self._given_up: list[tuple[int, float]] = []
        try:
            self._rehearse()
        except BaseException:
            self.staff.close(at_once=True)
            raise

    @property
    def load(self) -> int:
        """How many batches wait or are on their way."""
        return len(self._waiting) + len(self._away) + len(self._suspects)

    def add(self, points: Any, ticket: int, num: int, first: int, total: int) -> None:
        """Put a batch last."""
        self._waiting.append(_Batch(points, ticket, num, first, total))

    def settled(self) -> list[tuple[int, float]]:
        """Tickets and values, NaN for a failure, as soon as there are some; waits for them."""
        while True:
            self._send()
            if self._given_up:
                found, self._given_up = self._given_up, []
                return found
            if not self.load:
                return []
            found = self._received(self._wait())
            if found:
                return found

    def leave(self) -> None:
        """Give up all that waits or is on its way; what runs already keeps its worker until it ends."""
        self._waiting.clear()
        self._suspects.clear()
        self._given_up.clear()
        for future in list(self._away):
            batch = self._away.pop(future)
            if not future.cancel():
                self._late[future] = batch.deadline

    def close(self, at_once: bool = False) -> None:
        """Give up all, and shut down what was made here; at once: with what still runs, as after an interrupt."""
        self._waiting.clear()
        self._suspects.clear()
        busy = [future for future in self._away if not future.cancel()]
        self._away.clear()
        self.staff.close(at_once=at_once or bool(busy or self._late or self._hung))

    # ------------------------------------------------------------------------------------------------- on the way out

    def _send(self) -> None:
        """Send what may be sent: with a timeout no more than there are workers, so that its clock starts with it."""
        per_worker = 1 if self._workers.timeout is not None else 2
        while self._waiting or (self._suspects and not self._away):
            room = per_worker * self.staff.size - len(self._away) - len(self._hung) - len(self._late)
            if len(self._hung) >= self.staff.size:
                raise ScorefnError(
                    f"All {self.staff.size} workers hang: none answered within timeout={self._workers.timeout:g} s, "
                    "and futures that run cannot be cancelled. Give a function that makes the executor, such as "
                    "lambda: ProcessPoolExecutor(4): its processes are then killed and started anew."
                )
            if room <= 0 or (len(self._away) == 1 and next(iter(self._away.values())).alone):
                return
            batch = self._waiting.popleft() if self._waiting else self._suspects.popleft()
            try:
                future = self._submitted(batch)
            except BrokenExecutor as error:
                self._back(batch)
                self._broke(error)
                continue
            if (timeout := self._workers.timeout) is not None:
                grace = self._workers.startup if len(self._seen) < self.staff.size else 0.0
                batch.deadline = now() + timeout * batch.num + grace
            self.spent += Spent(resubmitted=batch.num if batch.tries else 0)
            self._away[future] = batch
            future.add_done_callback(self._arrived.put)

    def _submitted(self, batch: _Batch) -> Any:
        if self._letters is None:
            return self.staff.submit(evaluated, self._work, batch.points, batch.first, batch.total, self._together)
        letter = self._letters.message(batch.points, batch.first, batch.total, self._together, batch.full)
        self.spent += Spent(bytes_sent=len(letter))
        return self.staff.submit(answer, letter)

    # -------------------------------------------------------------------------------------------------- on the way in

    def _wait(self) -> Any:
        """The next future that is done; None where a deadline has passed instead."""
        while True:
            deadline = np.inf
            if self._workers.timeout is not None:
                deadlines = (*(batch.deadline for batch in self._away.values()), *self._late.values())
                deadline = min(deadlines, default=np.inf)
            left = min(deadline - now(), _NAP)
            try:
                return self._arrived.get(timeout=max(left, 0.0))
            except queue.Empty:
                if now() >= deadline:
                    return None

    def _received(self, future: Any) -> list[tuple[int, float]]:
        """What a future brings; a failure is sent again, or given up."""
        if future is None:
            self._lose_hung()
            return []
        batch = self._away.pop(future, None)
        self._hung.discard(future)
        self._late.pop(future, None)
        if batch is None:  # given up before
            return []
        try:
            found = future.result(timeout=0)
        except BrokenExecutor as error:
            self._away[future] = batch
            self._broke(error)
            return []
        except KeyboardInterrupt:
            raise
        except (Exception, CancelledError, SystemExit) as error:
            self._lost(batch, error)
            return []
        if isinstance(found, Missing):
            batch.full = True
            self._back(batch)
            return []
        if isinstance(found, Refusal):
            self._refuse(found)
        if not isinstance(found, Answer):
            refuse_result(found, self.staff.executor)
        return self._kept(batch, found)

    def _kept(self, batch: _Batch, found: Answer) -> list[tuple[int, float]]:
        self.spent += Spent(busy=found.seconds)
        self._seen.add(found.worker)
        values = np.frombuffer(found.values).tolist()
        if self._letters is None:
            self._seen = set(range(self.staff.size))  # threads need no time to start
        if not found.failures:
            return [(batch.ticket + i, value) for i, value in enumerate(values)]
        first = received(next(iter(found.failures.values())))
        if first.contract:
            first.again()
        if self._together:
            self._again(batch, first)
        else:
            for i, letter in found.failures.items():
                self._again(self._part(batch, i), received(letter))
        return [(batch.ticket + i, value) for i, value in enumerate(values) if i not in found.failures]

    def _lose_hung(self) -> None:
        """Deal with what has outlasted its time."""
        over = {future: batch for future, batch in self._away.items() if batch.deadline <= now()}
        for future in over:
            del self._away[future]
            if not future.cancel():
                self._hung.add(future)
        for future in [future for future, deadline in self._late.items() if deadline <= now()]:
            del self._late[future]
            self._hung.add(future)
        shown = f"an evaluation that took longer than timeout={self._workers.timeout} s"
        for batch in over.values():
            self._again(batch, Failure(None, shown, "It gave no answer.", False))
        if self._hung and self.staff.renewable:
            innocent = list(self._away.values())
            self._start_anew()
            self._waiting.extendleft(reversed(innocent))

    def _lost(self, batch: _Batch, error: BaseException) -> None:
        """One future was lost by itself, as where Ray loses a worker."""
        if (module := missing_module(error)) is not None:
            self._refuse(Refusal(f"{type(error).__name__}: {error}", module))
        shown = f"{type(error).__name__}: {error}"
        self._again(batch, Failure(None, shown, "It was lost with its worker.", False))

    def _broke(self, error: BrokenExecutor) -> None:
        """All that was on its way is lost, and any of it may have been the cause."""
        suspects = list(self._away.values())
        if not self.staff.renewable:
            where = ", ".join(f"{batch.first} to {batch.first + batch.num - 1}" for batch in suspects[:10])
            raise ScorefnError(
                f"The executor broke while points {where or 'of a generation'} were evaluated: a worker died, killed "
                "by the system for memory perhaps, and a pool that has lost one takes no further work. Give a function "
                "that makes the executor, such as lambda: ProcessPoolExecutor(4), and it is made anew."
            ) from error
        for batch in suspects:
            self._again(batch, Failure(None, f"{type(error).__name__}: {error}", "A worker died.", False), died=True)
        self._start_anew()

    def _start_anew(self) -> None:
        for known in (self._away, self._hung, self._late, self._seen):
            known.clear()
        self.staff.renew()
        for batch in (*self._waiting, *self._suspects):
            batch.full = True

    # ------------------------------------------------------------------------------------------------------- failures

    def _again(self, batch: _Batch, failure: Failure, died: bool = False) -> None:
        """Send a batch again, for the last time point by point, or give it up."""
        if self.failure is None:
            self.failure = failure
        batch.tries += 1
        if batch.tries >= self._workers.attempts:
            self.spent += Spent(failed=batch.num)
            self._given_up.extend((batch.ticket + i, np.nan) for i in range(batch.num))
            return
        last = batch.tries == self._workers.attempts - 1
        for part in [self._part(batch, i) for i in range(batch.num)] if last else [batch]:
            part.alone = died and last
            (self._suspects if part.alone else self._waiting).append(part)

    def _back(self, batch: _Batch) -> None:
        """Put a batch first, which was not tried."""
        (self._suspects if batch.alone else self._waiting).appendleft(batch)

    def _part(self, batch: _Batch, i: int) -> _Batch:
        return _Batch(cut(batch.points, i, i + 1), batch.ticket + i, 1, batch.first + i, batch.total, batch.tries)

    def _rehearse(self) -> None:
        """Find out before the first point whether fun can travel."""
        if self.staff.shares_memory:
            return
        self._letters = Letters(self._work, self._fun, self.staff.executor)
        try:
            future = self.staff.submit(answer, self._letters.message((), 0, 0, False))
            found = future.result(timeout=self._workers.startup)
        except TimeoutError as error:
            raise ScorefnError(
                f"No worker could load fun within {self._workers.startup:g} s, with all that it imports: raise startup."
            ) from error
        except BrokenExecutor as error:
            raise ScorefnError(
                f"A worker died while it loaded fun ({type(error).__name__}: {error}): what it imports, or its "
                "size, ends the process. Load it by hand in a fresh process to see why."
            ) from error
        if isinstance(found, Refusal):
            self._refuse(found)
        if not isinstance(found, Answer):
            refuse_result(found, self.staff.executor)

    def _refuse(self, found: Refusal) -> NoReturn:
        if found.module is not None:
            raise ScorefnError(
                f"A worker cannot import {found.module!r}, which fun needs ({found.shown}): install it there, or put "
                "its folder on the PYTHONPATH of the workers."
            )
        raise ScorefnError(
            f"A worker cannot load fun ({found.shown}): it must be able to import it by its name. Put fun into a "
            "module (a file), not into an interactive session, or take loky, whose cloudpickle sends it as a whole."
        )
