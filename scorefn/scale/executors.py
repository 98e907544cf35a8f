"""Workers that other libraries run: which executor, how long to wait, how often to try again."""

from __future__ import annotations

import inspect
import math
import operator
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import BrokenExecutor
from concurrent.futures import TimeoutError as Late  # the builtin one from Python 3.11 on; loky and Dask raise it too
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NoReturn

from scorefn.core import ScorefnError
from scorefn.core.representation import representation
from scorefn.scale.records import WorkRecord
from scorefn.scale.transport import whoami


@dataclass(frozen=True, eq=False)
class Workers:
    """An executor, and how to deal with what happens on its workers.

    Any object whose ``submit`` returns futures will do: ``concurrent.futures`` pools of processes or threads, loky's,
    ``RayExecutor``, Dask's ``client.get_executor()``, ``mpi4py.futures.MPIPoolExecutor``. One that was made here is
    shut down at the end where it has ``shutdown``. Points are sent in batches, and values are told in the order of the
    points: however many workers there are and whoever is first, a search is the serial one to the bit, as long as fun
    gives the same value for the same point everywhere.

    Trouble. An evaluation that raises, loses its worker or outlasts ``timeout`` is sent again, ``attempts`` times in
    all, and is then a failed one, NaN, as if fun had returned that; the first exception is shown once as a warning.
    The last attempt is made one point at a time, after a broken pool with nothing else running, so that a point that
    kills workers takes no other one with it. Where every evaluation of the first generation fails, the exception is
    raised, with the worker's traceback as a note; ``ScorefnError``, as where fun returns no number, is raised at once.
    (Without workers, an exception of fun is raised as it is.)

    A pool of processes that has lost a worker, or has one that hangs, is beyond repair: neither can a future that runs
    be cancelled, nor is a worker replaced. Give a function that makes the executor, and the pool is killed and made
    anew, and shut down at the end. An executor that was given as it is stays open, hangs cost it a worker each, and
    where it breaks or no worker is left the search ends with an error that says so. A ``RayExecutor`` does not need
    that: it replaces workers.

    Start methods are the executor's own. Processes that are forked after torch has run on several threads may hang:
    take "spawn" or "forkserver" (``mp_context=multiprocessing.get_context("spawn")``), for which the program needs
    ``if __name__ == "__main__":``, and ``initializer=sf.scale.one_thread`` where fun uses torch. Threads share fun,
    which is then called by several at once.

    Args:
        executor: it, or a function without arguments that makes one.
        timeout: seconds on the clock for one evaluation (a batch of n gets n times as many); None: for ever.
        attempts: how often an evaluation is tried.
        drop_slowest: so many of a generation, the slowest, count as failed: a generation ends when all others are
            known. Who is slow depends on the clock: this gives up that runs can be repeated to the bit. Those that
            still run keep their workers.
        batch: points sent together; None: by the number of workers, and by how long evaluations took, which changes
            no value. With ``vectorized=True`` one share of a generation for each worker: fun then sees other numbers
            of points than serially, and the values are the same to the bit where each row's is computed by itself.
        num_workers: None: as many as the executor says.
        startup: seconds for the first answer of a worker, on top of timeout until all have answered.
        report: called with the ``WorkRecord`` of each generation, for instance
            ``functools.partial(sf.scale.log_scalars, writer)``.

    Raises:
        ScorefnError: executor is neither of them, or a function that needs arguments; a number that makes no sense.

    Example:
        >>> from concurrent.futures import ThreadPoolExecutor
        >>> from scorefn.scale import Workers
        >>> from scorefn.search import minimize
        >>> workers = Workers(lambda: ThreadPoolExecutor(2), timeout=60.0)
        >>> result = minimize(lambda x: (x**2).sum(), [1.0, 2.0], 0.5, seed=0, executor=workers)
        >>> result.success, len(result.workers) == result.nit
        (True, True)
    """

    executor: Any
    timeout: float | None = None
    attempts: int = 3
    drop_slowest: int = 0
    batch: int | None = None
    num_workers: int | None = None
    startup: float = 60.0
    report: Callable[[WorkRecord], object] | None = None

    __repr__ = representation

    def __post_init__(self) -> None:
        given = self.executor
        if not callable(given) and not _submits(given):
            raise ScorefnError(
                f"executor must have submit, or be a function that makes such an object, but it is {given!r}. Give "
                "for instance concurrent.futures.ProcessPoolExecutor(4), or lambda: ProcessPoolExecutor(4), which can "
                "be made anew."
            )
        if not _submits(given) and (lacking := _unbound(given)) is not None:
            raise ScorefnError(
                f"executor must be a function that is called without arguments, but {given!r} needs some ({lacking}): "
                "give for instance lambda: ProcessPoolExecutor(4), or bind them by functools.partial."
            )
        for name, least in (("attempts", 1), ("drop_slowest", 0), ("batch", 1), ("num_workers", 1)):
            value = getattr(self, name)
            if value is None and name in ("batch", "num_workers"):
                continue
            if isinstance(value, bool) or not hasattr(value, "__index__") or operator.index(value) < least:
                raise ScorefnError(f"{name} must be an integer of at least {least}, but it is {value!r}.")
        for name in ("timeout", "startup"):
            value = getattr(self, name)
            if value is None and name == "timeout":
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ScorefnError(f"{name} must be a positive number of seconds, but it is {value!r}.")
        if self.report is not None and not callable(self.report):
            raise ScorefnError(f"report must be a function of a WorkRecord, but it is {self.report!r}.")

    @classmethod
    def of(cls, executor: Any) -> Workers:
        """The workers themselves, or those of an executor or a function that makes one."""
        return executor if isinstance(executor, Workers) else cls(executor)


class Staff:
    """The executor in use: made where a function makes it, greeted, and made anew where it is beyond repair.

    Args:
        workers: which.

    Raises:
        ScorefnError: no worker answers, or none can be started.
    """

    def __init__(self, workers: Workers) -> None:
        self._workers = workers
        self.renewable = not _submits(workers.executor)
        self._open = False
        self.start()

    def start(self) -> None:
        """Make the executor where there is a function for it, and wait until a worker has answered."""
        given = self._workers.executor
        self.executor = self._made() if self.renewable else given
        if not _submits(self.executor):
            raise ScorefnError(
                f"executor must make an object that has submit, but {given!r} made {self.executor!r}: return the pool."
            )
        self._open = True
        try:
            self.size = int(self._workers.num_workers or num_workers(self.executor))
            here = self._greeted()
        except BaseException:
            self.close(at_once=True)
            raise
        self.shares_memory = here == whoami()

    def submit(self, fn: Callable[..., Any], /, *args: Any) -> Any:
        """The future of ``fn(*args)``; a pool that is broken says so itself."""
        try:
            return self.executor.submit(fn, *args)
        except (BrokenExecutor, ScorefnError):
            raise
        except Exception as error:
            raise ScorefnError(
                f"The {type(self.executor).__name__} took no further work in the middle of a search "
                f"({type(error).__name__}: {error}): somebody else may have shut it down. Keep it open until the "
                "search has ended, or give a function that makes one for the search alone, such as lambda: "
                "ProcessPoolExecutor(4)."
            ) from error

    def renew(self) -> None:
        """Kill the workers and start others."""
        self.close(at_once=True)
        self.start()

    def close(self, at_once: bool = False) -> None:
        """Shut an executor down that was made here; at once: with whatever its workers are doing."""
        if not self.renewable or not self._open:
            return
        self._open = False
        shutdown = getattr(self.executor, "shutdown", None)
        if not at_once:
            if callable(shutdown):
                shutdown()
            return
        kill = getattr(self.executor, "kill_workers", None)  # ours, and that of Python 3.14
        processes = list((getattr(self.executor, "_processes", None) or {}).values())
        if callable(shutdown):
            shutdown(wait=False)
        if callable(kill):
            kill()
        for process in processes:
            _kill(process)

    def _made(self) -> Any:
        given = self._workers.executor
        try:
            return given()
        except Exception as error:
            error.add_note(f"scorefn called executor, {given!r}, to make the workers.")
            raise

    def _greeted(self) -> Any:
        try:
            found = self.executor.submit(whoami).result(timeout=self._workers.startup)
        except Late as error:
            raise ScorefnError(
                f"No worker of {_named(self.executor)} answered within {self._workers.startup:g} s: either none is "
                "running, or all are busy. Start some, or raise startup."
            ) from error
        except Exception as error:
            refuse(error, self.executor)
        if not isinstance(found, tuple):
            refuse_result(found, self.executor)
        return found


def refuse_result(found: Any, executor: Any) -> NoReturn:
    """Raise that a future holds what no function of this library returns."""
    raise ScorefnError(
        f"A future of {_named(executor)} returned {found!r:.200}, which the submitted function did not return: its "
        "result must be fn(*args). Make submit(fn, *args) return a future of just that."
    )


def refuse(error: BaseException, executor: Any) -> NoReturn:
    """Raise what it means that an executor cannot even run a function of this library."""
    module = missing_module(error)
    if module is not None:
        raise ScorefnError(
            f"A worker of {_named(executor)} cannot import {module!r}: install the same packages there as here."
        ) from error
    if isinstance(error, BrokenExecutor):
        raise ScorefnError(
            f"No worker of {_named(executor)} could be started, or it is broken already ({error}). Where processes are "
            'spawned, the program must be a file that starts by `if __name__ == "__main__":`; an executor that broke '
            "must be made anew."
        ) from error
    raise ScorefnError(
        f"{_named(executor)} takes no work ({type(error).__name__}: {error}): give an executor that is open."
    ) from error


def missing_module(error: BaseException | None) -> str | None:
    """The module that could not be imported, where that is the cause."""
    while error is not None:
        if isinstance(error, ModuleNotFoundError):
            return error.name
        _, found, rest = str(error).partition("No module named '")
        if found:
            return rest.partition("'")[0]
        error = error.__cause__ or error.__context__
    return None


def now() -> float:
    """Seconds."""
    return time.monotonic()


def _kill(process: Any) -> None:
    """Kill a worker process if it still runs; one that cannot be killed keeps no other one alive."""
    with suppress(AttributeError, OSError, ValueError):
        try:
            process.kill()
        except AttributeError:  # loky's on POSIX have a kill that calls one which is not there
            if process.exitcode is None:
                os.kill(process.pid, getattr(signal, "SIGKILL", signal.SIGTERM))


def _unbound(function: Callable[..., Any]) -> str | None:
    """What a call without arguments lacks; None where nothing, or where the function does not say."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return None
    try:
        signature.bind()
    except TypeError as error:
        return str(error)
    return None


def _submits(thing: Any) -> bool:
    return not isinstance(thing, type) and callable(getattr(thing, "submit", None))


def _named(executor: Any) -> str:
    return f"the {type(executor).__name__}"


def num_workers(executor: Any) -> int:
    """How many workers an executor has, as far as it says; else as many as this machine has cores."""
    for name in ("num_workers", "_max_workers"):
        number = getattr(executor, name, None)
        if isinstance(number, int) and number > 0:
            return number
    client = getattr(executor, "_client", None)  # Dask
    if client is not None and hasattr(client, "nthreads"):
        return max(1, int(sum(client.nthreads().values())))
    return os.cpu_count() or 1
