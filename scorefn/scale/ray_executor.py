"""Ray's workers as an executor."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future
from importlib import import_module
from typing import Any

from scorefn.core import ScorefnError
from scorefn.core.representation import called

_PORT = 10001  # of ray://host
_TRIAL = "import sys, ray; ray.init(address=sys.argv[1], log_to_driver=False, configure_logging=False)"


class RayExecutor(Executor):
    """An executor over Ray tasks, for ``executor=``.

    A task is a batch of points; Ray starts its processes and replaces those that die, so that a lost or hung task costs
    no other one. Ray itself does not repeat tasks: ``sf.scale.Workers`` does, and counts.

    Args:
        address: ``"host:6379"``, ``"ray://host:10001"`` or ``"auto"``; None: what Ray does then, by RAY_ADDRESS or on
            this machine. Of no matter where Ray is initialised already.
        num_workers: how many tasks run at a time; None: the CPUs of the cluster.
        timeout: seconds in which an address must answer.
        init: further arguments of ``ray.init``, such as ``runtime_env``.

    Raises:
        ScorefnError: Ray is not installed; the address does not answer, or what answers is no Ray; num_workers or
            timeout makes no sense.

    ``shutdown`` ends Ray only where this object started it.

    Example:
        >>> import scorefn as sf
        >>> def search(fun, address):  # address "auto": the cluster that ray start made
        ...     with sf.scale.RayExecutor(address, num_workers=64) as executor:
        ...         return sf.search.minimize(fun, [1.0, 2.0], 0.5, executor=executor)
        >>> search(lambda x: x.square().sum(), 6379)
        Traceback (most recent call last):
        scorefn.core.errors.ScorefnError: address must be text such as 'host:6379', or None, but it is 6379.
    """

    def __init__(
        self, address: str | None = None, *, num_workers: int | None = None, timeout: float = 10.0, **init: Any
    ) -> None:
        if num_workers is not None and not (type(num_workers) is int and num_workers >= 1):
            raise ScorefnError(f"num_workers must be an integer of at least 1, but it is {num_workers!r}.")
        if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not timeout > 0:
            raise ScorefnError(f"timeout must be a positive number of seconds, but it is {timeout!r}.")
        if address is not None and not isinstance(address, str):
            raise ScorefnError(f"address must be text such as 'host:6379', or None, but it is {address!r}.")
        try:
            self._ray: Any = import_module("ray")
        except ImportError as error:
            raise ScorefnError(
                f"RayExecutor needs Ray, which cannot be imported ({error}): pip install scorefn[scale]."
            ) from error
        self._owns = not self._ray.is_initialized()
        if self._owns:
            self._start(address, timeout, init)
        self.num_workers = num_workers or max(1, int(self._ray.cluster_resources().get("CPU", 1)))
        self.dumps: Callable[[Any], bytes] = self._ray.cloudpickle.dumps
        self._call = self._ray.remote(max_retries=0)(_call)
        self._tasks: dict[Future[Any], Any] = {}
        self._closed = False

    def __repr__(self) -> str:
        return called(self, num_workers=self.num_workers)

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Run ``fn(*args, **kwargs)`` as a task."""
        if self._closed:
            raise RuntimeError("This RayExecutor was shut down.")
        task = self._call.remote(fn, args, kwargs)
        future = _TaskFuture(lambda: self._ray.cancel(task, force=True))
        self._tasks[future] = task

        def finish(done: Future[Any]) -> None:
            self._tasks.pop(future, None)
            if not future.set_running_or_notify_cancel():
                return
            error = done.exception()
            if error is None:
                future.set_result(done.result())
            else:
                future.set_exception(error)

        task.future().add_done_callback(finish)
        return future

    def kill_workers(self) -> None:
        """End all tasks, with the processes that run them."""
        for future in list(self._tasks):
            future.cancel()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no further tasks; end Ray where this object started it."""
        self._closed = True
        if cancel_futures:
            self.kill_workers()
        tasks = list(self._tasks.values())
        if wait and tasks and self._ray.is_initialized():
            self._ray.wait(tasks, num_returns=len(tasks))
        if self._owns and self._ray.is_initialized():
            self._ray.shutdown()
        self._owns = False

    def _start(self, address: str | None, timeout: float, init: dict[str, Any]) -> None:
        wanted = address or os.environ.get("RAY_ADDRESS")
        if wanted and wanted not in ("auto", "local"):
            _probe(wanted, timeout)
        options = {"log_to_driver": False, **init}
        try:
            self._ray.init(address=address, **options)
        except Exception as error:
            raise ScorefnError(
                f"Ray could not be initialised with address={address!r} ({type(error).__name__}: {error}): start it by "
                "`ray start --head`, or leave the address out for workers on this machine."
            ) from error


class _TaskFuture(Future[Any]):
    """A future whose task, unlike that of other executors, can be cancelled while it runs."""

    def __init__(self, kill: Callable[[], object]) -> None:
        super().__init__()
        self._kill = kill

    def cancel(self) -> bool:
        """End the task, with its process where it runs; Ray starts another one."""
        cancelled = super().cancel()
        if cancelled:
            self._kill()
        return cancelled


def _call(fn: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    return fn(*args, **kwargs)


def _probe(address: str, timeout: float) -> None:
    """Refuse an address where nothing answers, or what answers is no Ray.

    ``ray.init`` would wait there for minutes, and may end the whole process after that; so another one tries first.
    """
    end = time.monotonic() + timeout
    bare = address.removeprefix("ray://")
    host, _, port = bare.rpartition(":") if ":" in bare else (bare, "", str(_PORT))
    if not host or not port.isdigit():
        raise ScorefnError(f"A Ray address is 'host:port', 'ray://host:port' or 'auto', but it is {address!r}.")
    repair = "Start Ray there by `ray start --head`, check host, port and firewall, or raise timeout."
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=timeout / 2).close()
    except (OSError, OverflowError) as error:
        raise ScorefnError(f"The Ray address {address!r} does not answer ({error}). {repair}") from error
    try:
        tried = subprocess.run(
            [sys.executable, "-c", _TRIAL, address],
            timeout=max(end - time.monotonic(), 0.1),
            capture_output=True,
            text=True,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ScorefnError(
            f"What listens at the Ray address {address!r} did not answer as Ray does within {timeout:g} s. {repair}"
        ) from error
    if tried.returncode:
        last = (tried.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise ScorefnError(f"The Ray address {address!r} cannot be used ({last}). {repair}")
