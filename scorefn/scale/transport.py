"""What travels: the function once per worker, points as numpy bytes, values and failures back."""

from __future__ import annotations

import functools
import hashlib
import os
import pickle
import socket
import time
import traceback
import uuid
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any, NamedTuple, NoReturn, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from scorefn.core import NonFiniteError, ScorefnError

_TOKEN = uuid.uuid4().hex  # of this process, but for those that are forked from it
_KEPT = 4  # functions in a worker
_SMALL = 1 << 14  # bytes of a function that are sent with each batch; more are sent where they are missing
_held: dict[str, Any] = {}


class Work(Protocol):
    """What runs on workers: values of points; pickled where these are other processes."""

    def __call__(self, points: Any, first: int, total: int, /) -> Any:
        """Values ``[n]`` of points ``first`` to ``first + n`` among ``total``: tensors, or tuples, lists and dicts."""


class Failure(NamedTuple):
    """An exception on a worker: itself where it can travel, its class and text, and its traceback."""

    error: BaseException | None
    shown: str
    trace: str
    contract: bool

    def again(self) -> NoReturn:
        """Raise it here, with the worker's traceback as a note."""
        error = self.error or ScorefnError(
            f"No evaluation succeeded, and the first failure was {self.shown}. Try fun on one point in this process."
        )
        error.add_note(f"On the worker:\n{self.trace}")
        raise error


class Answer(NamedTuple):
    """Values of a batch, the failures among them by place, seconds of work, and which worker it was."""

    values: bytes
    failures: dict[int, bytes]
    seconds: float
    worker: tuple[str, int, str]


class Missing(NamedTuple):
    """The worker does not have the function, which is to be sent along."""


class Refusal(NamedTuple):
    """The worker cannot load the function, and why."""

    shown: str
    module: str | None


def whoami() -> tuple[str, int, str]:
    """Host, process and token: the same for all threads of a process, and for no two processes."""
    return socket.gethostname(), os.getpid(), _TOKEN


def one_thread() -> None:
    """Hold torch to one thread in a worker: pass it as ``initializer`` of a pool, so that workers do not crowd.

    Example:
        >>> from concurrent.futures import ProcessPoolExecutor
        >>> from scorefn.scale import one_thread
        >>> executor = ProcessPoolExecutor(2, initializer=one_thread)
    """
    torch.set_num_threads(1)


class Letters:
    """Writes the messages to the workers.

    Args:
        work: what runs there.
        fun: the caller's function inside, as errors should name it.
        executor: whose way to pickle is used: its ``dumps`` where it has one, cloudpickle with loky, Dask and Ray.

    Raises:
        ScorefnError: fun cannot be pickled.
    """

    def __init__(self, work: Work, fun: Any, executor: Any) -> None:
        dumps = _dumps(executor)
        try:
            self._blob: bytes = dumps(work)
        except Exception as error:
            path, what = culprit(fun, dumps)
            raise ScorefnError(
                f"fun cannot be sent to the workers, as {path} is {described(what)}, which pickle refuses "
                f"({type(error).__name__}: {error}). Use a function at the top of a module, with functools.partial for "
                "what it needs to know; open files, locks and generators inside it; or take loky, "
                "sf.scale.Workers(loky.get_reusable_executor), whose cloudpickle also takes lambdas and closures."
            ) from error
        self._key = hashlib.sha256(self._blob).hexdigest()
        self._brief = False

    def message(self, points: Any, first: int, total: int, together: bool, full: bool = False) -> bytes:
        """A batch; the function is left out where it is long and was sent before, unless ``full``."""
        blob = None if self._brief and not full else self._blob
        self._brief = len(self._blob) > _SMALL
        return pickle.dumps((self._key, blob, _changed(points, _Packed), first, total, together), protocol=5)


def answer(message: bytes) -> Answer | Missing | Refusal:
    """Do what a message says; runs on a worker."""
    key, blob, points, first, total, together = pickle.loads(message)
    work = _held.get(key)
    if work is None:
        if blob is None:
            return Missing()
        try:
            work = pickle.loads(blob)
        except Exception as error:
            module = error.name if isinstance(error, ModuleNotFoundError) else None
            return Refusal(f"{type(error).__name__}: {error}", module)
        for old in list(_held)[: len(_held) + 1 - _KEPT]:
            _held.pop(old, None)
        _held[key] = work
    return evaluated(work, points, first, total, together)


def evaluated(work: Work, points: Any, first: int, total: int, together: bool) -> Answer:
    """Values of a batch, one point after the other unless ``together``; a point that raises costs no other one."""
    begin = time.perf_counter()
    num = length(points)
    values = np.full(num, np.nan)
    failures: dict[int, bytes] = {}
    for start in range(0, num, num if together else 1):
        stop = num if together else start + 1
        try:
            values[start:stop] = torch.as_tensor(work(cut(points, start, stop), first + start, total)).cpu().numpy()
        except Exception as error:
            failures |= dict.fromkeys(range(start, stop), _sent(error))
    return Answer(values.tobytes(), failures, time.perf_counter() - begin, whoami())


def received(letter: bytes) -> Failure:
    """The failure that was sent."""
    travelling, shown, trace, contract = pickle.loads(letter)
    try:
        error = pickle.loads(travelling)
    except Exception:
        error = None
    return Failure(error if isinstance(error, BaseException) else None, shown, trace, contract)


def leaves(points: Any) -> list[Any]:
    """The tensors or arrays of points."""
    if isinstance(points, Mapping):
        return [leaf for part in points.values() for leaf in leaves(part)]
    if isinstance(points, Sequence):
        return [leaf for part in points for leaf in leaves(part)]
    return [points]


def length(points: Any) -> int:
    """N, how many points these are."""
    found = leaves(points)
    return len(found[0]) if found else 0


def cut(points: Any, start: int, stop: int) -> Any:
    """Points from start to stop."""
    return _changed(points, lambda part: part[start:stop])


def culprit(thing: Any, dumps: Callable[[Any], bytes], path: str = "fun", depth: int = 0) -> tuple[str, Any]:
    """The innermost part of a thing that cannot be pickled, with its path."""
    for name, part in _parts(thing) if depth < 8 else ():
        try:
            dumps(part)
        except Exception:
            return culprit(part, dumps, path + name, depth + 1)
    return path, thing


def described(thing: Any) -> str:
    """A function, or an object, in words."""
    name = getattr(thing, "__qualname__", None)
    if name is None or isinstance(thing, type):
        return f"a {type(thing).__module__}.{type(thing).__qualname__}" if name is None else f"the local class {name}"
    where = getattr(thing, "__code__", None)
    line = f" ({os.path.basename(where.co_filename)}, line {where.co_firstlineno})" if where else ""
    if "<lambda>" in name:
        return f"a lambda, {name}{line}"
    if getattr(thing, "__closure__", None):
        return f"a closure over {', '.join(where.co_freevars)}, {name}{line}" if where else f"a closure, {name}"
    return f"a local function, {name}{line}" if "<locals>" in name else f"{name}{line}"


def _parts(thing: Any) -> list[tuple[str, Any]]:
    if isinstance(thing, functools.partial):
        keywords = [(f".keywords[{name!r}]", value) for name, value in thing.keywords.items()]
        return [(".func", thing.func), *((f".args[{i}]", value) for i, value in enumerate(thing.args)), *keywords]
    if isinstance(thing, Mapping):
        return [(f"[{name!r}]", value) for name, value in thing.items()]
    if isinstance(thing, list | tuple):
        return [(f"[{i}]", value) for i, value in enumerate(thing)]
    if (owner := getattr(thing, "__self__", None)) is not None:
        return [(".__self__", owner)]
    if isinstance(thing, type) or hasattr(thing, "__code__"):
        return []
    return [(f".{name}", value) for name, value in getattr(thing, "__dict__", {}).items()]


def _dumps(executor: Any) -> Callable[[Any], bytes]:
    own = getattr(executor, "dumps", None)
    if callable(own):
        found: Callable[[Any], bytes] = own
        return found
    roots = {kind.__module__.partition(".")[0] for kind in type(executor).__mro__}
    if roots & {"loky", "distributed", "joblib"}:
        found = import_module("cloudpickle").dumps  # they cannot be had without it
        return found
    return functools.partial(pickle.dumps, protocol=5)


def _changed(points: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(points, Mapping):
        return {name: _changed(part, change) for name, part in points.items()}
    if isinstance(points, Sequence):
        return tuple(_changed(part, change) for part in points)
    return change(points)


class _Packed:
    """A tensor that is pickled as the bytes of its array, a tenth of what torch needs, and comes out as a tensor."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._array: NDArray[Any] = np.ascontiguousarray(tensor.detach().cpu().numpy())
        self._device = str(tensor.device)

    def __reduce__(self) -> Any:
        array = self._array
        return _tensor, (array.tobytes(), array.dtype.str, array.shape, self._device)


def _tensor(data: bytes, dtype: str, shape: tuple[int, ...], device: str) -> torch.Tensor:
    array: NDArray[Any] = np.ndarray(shape, dtype, bytearray(data))
    return torch.from_numpy(array).to(device)


def _sent(error: Exception) -> bytes:
    shown = f"{type(error).__name__}: {error}"
    notes = "".join(traceback.format_exception(error))
    contract = isinstance(error, ScorefnError) and not isinstance(error, NonFiniteError)
    try:
        travelling = pickle.dumps(error)
        pickle.loads(travelling)
    except Exception:
        travelling = pickle.dumps(None)
    return pickle.dumps((travelling, shown, notes, contract))
