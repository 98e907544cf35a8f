"""Points that are not sent but rebuilt on the worker: from a key, a generation, and the number of an individual.

A worker keeps a replica of the search distribution, and is told the ranks of the last generation, from which it makes
the same update. Where a replica is missing, behind, or differs in a single bit, the state is sent, and counted.
"""

from __future__ import annotations

import pickle
import threading
from collections import deque
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scorefn.core import ScorefnError
from scorefn.core.representation import representation
from scorefn.scale.crew import Crew, Spent
from scorefn.scale.dispatch import Dispatch
from scorefn.scale.executors import Workers
from scorefn.scale.records import WorkRecord
from scorefn.scale.transport import Missing, answer, culprit, described, evaluated

PAST = 2  # generations whose ranks travel with each batch: a worker may have missed all but the last one
_KEPT = 2  # searches whose replicas a worker keeps
_replicas: dict[bytes, Replica] = {}
_lock = threading.Lock()
_present: ContextVar[Points] = ContextVar("_present")


def noise(key: bytes, generation: int, individual: int, dimension: int, dtype: torch.dtype) -> Tensor:
    """``[D]`` standard normal numbers that depend on nothing but the arguments, whoever draws them in whatever order.

    Source: Salmon, Moraes, Dror & Shaw (2011), "Parallel random numbers: as easy as 1, 2, 3", SC11: Philox, here
    numpy's, with 4 words of counter; individual and generation are the upper two.

    Args:
        key: 16 bytes, of the run.
        generation: below 2^64.
        individual: below 2^64.
        dimension: D, below 2^64.
        dtype: torch.float32 or torch.float64.

    Example:
        >>> noise(bytes(16), 3, 5, 2, torch.float64)
        tensor([-1.1250, -0.5105], dtype=torch.float64)
    """
    counter = np.array([0, 0, individual, generation], dtype=np.uint64)
    stream = np.random.Generator(np.random.Philox(key=np.frombuffer(key, "<u8"), counter=counter))
    kind: Any = np.float32 if dtype == torch.float32 else np.float64
    return torch.from_numpy(stream.standard_normal(dimension, dtype=kind))


class Points(Protocol):
    """The points of a generation."""

    def __getitem__(self, individual: int, /) -> Tensor:
        """``[D]``, of an individual; of -1 the mean."""


class Replica(Protocol):
    """A search distribution that can be followed from ranks alone."""

    key: bytes
    """Of the run."""

    generation: int
    """How many generations it has learnt from."""

    def follow(self, ranks: NDArray[Any], /) -> None:
        """Learn from the ranks of a generation, equal where values are."""

    def mark(self) -> bytes:
        """Bytes that differ where the distribution, or the noise, differs in a bit."""

    def points(self) -> Points:
        """Those of this generation, also when the replica goes on."""

    def bare(self) -> Replica:
        """What is sent to a worker."""


@dataclass(frozen=True)
class SeedRecord(WorkRecord):
    """What one generation cost where points are rebuilt on workers.

    Args:
        states_sent: batches that carried the whole distribution, for workers that were new, had missed generations or
            had come to other bits.

    Raises:
        ScorefnError: as ``WorkRecord``.

    Example:
        >>> import scorefn as sf
        >>> from concurrent.futures import ThreadPoolExecutor
        >>> strategy = sf.search.SNES([1.0, 2.0], 0.5, seed=0, maxiter=3)
        >>> with ThreadPoolExecutor(1) as executor:
        ...     result = sf.search.run_by_seeds(strategy, lambda x: x.square().sum(), executor)
        >>> [record.states_sent for record in result.workers]  # none missed a generation
        [0, 0, 0]
    """

    states_sent: int = 0

    __repr__ = representation


class ByIndividual:
    """Work on the numbers of individuals: each is made a point of the generation that is present in this thread.

    Args:
        work: on points ``[n, D]``.
    """

    def __init__(self, work: Any) -> None:
        self._work = work

    def __call__(self, individuals: Tensor, first: int, total: int) -> Tensor:
        """Values ``[n]`` of individuals ``[n]``."""
        points = _present.get()
        return torch.cat(
            [self._work(points[k].unsqueeze(0), first + i, total) for i, k in enumerate(individuals.tolist())]
        )


def with_points(points: Points, call: Callable[..., Any], *args: Any) -> Any:
    """``call(*args)``, during which individuals are those of ``points``."""
    token = _present.set(points)
    try:
        return call(*args)
    finally:
        _present.reset(token)


class SeedCrew(Crew):
    """A crew whose batches are numbers of individuals; a head in front of each says of which generation.

    ``follow`` must be called before the first batch.
    """

    _replica: Replica
    states_sent = 0

    def follow(self, replica: Replica, past: deque[NDArray[Any]]) -> None:
        """Make individuals those of the present generation of a replica, whose last ranks are ``past``."""
        self._replica, self._present = replica, replica.points()
        kind = past[-1].dtype.str if past else ""
        sent = [ranks.tobytes() for ranks in past]
        self._head = _Head(replica.key, replica.generation, replica.mark(), sent, kind, None)
        self._with_state: bytes | None = None

    def _submitted(self, batch: Any) -> Any:
        found, together = (batch.points, batch.first, batch.total), self._together
        if self._letters is None:
            return self.staff.submit(with_points, self._present, evaluated, self._work, *found, together)
        letter = self._letters.message(*found, together, batch.full)
        head = self._full_head() if batch.full else pickle.dumps(self._head, protocol=5)
        self.states_sent += batch.full
        self.spent += Spent(bytes_sent=len(letter) + len(head))
        return self.staff.submit(answer_by_seeds, head, letter)

    def _lost(self, batch: Any, error: BaseException) -> None:
        if isinstance(error, OtherNoiseError):
            raise error
        super()._lost(batch, error)

    def _full_head(self) -> bytes:
        if self._with_state is None:
            bare = self._replica.bare()
            try:
                state = pickle.dumps(bare, protocol=5)
            except Exception as error:
                path, what = culprit(bare, pickle.dumps, "strategy")
                raise ScorefnError(
                    f"The strategy cannot be sent to the workers, as {path} is {described(what)}, which pickle refuses "
                    f"({type(error).__name__}: {error}). Use functools.partial, for instance "
                    "optimizer=functools.partial(torch.optim.Adam, lr=0.01)."
                ) from error
            self._with_state = pickle.dumps(self._head._replace(state=state), protocol=5)
        return self._with_state


class SeedDispatch(Dispatch):
    """Values of the individuals of a generation: one batch for each worker, unless ``Workers`` says otherwise."""

    crew: SeedCrew
    crew_kind = SeedCrew

    def _cuts(self, num: int) -> list[tuple[int, int]]:
        if self._workers.batch is not None or self._workers.drop_slowest:
            return super()._cuts(num)
        pieces = min(self.crew.staff.size, num)  # ranks travel with each
        return [(num * i // pieces, num * (i + 1) // pieces) for i in range(pieces)]


def seed_workers(workers: Workers, states_sent: Callable[[], int]) -> tuple[Workers, list[SeedRecord]]:
    """Workers whose report gets records that count states, and the list that these are kept in."""
    records: list[SeedRecord] = []

    def report(record: WorkRecord) -> None:
        sent = states_sent() - sum(entry.states_sent for entry in records)
        records.append(SeedRecord(**vars(record), states_sent=sent))
        if workers.report is not None:
            workers.report(records[-1])

    return replace(workers, report=report), records


class OtherNoiseError(ScorefnError):
    """A worker draws other numbers than this process."""


class _Head(NamedTuple):
    """Of which generation the individuals of a batch are: what a replica needs to get there."""

    key: bytes
    generation: int
    mark: bytes
    past: list[bytes]
    kind: str
    state: bytes | None


def answer_by_seeds(head: bytes, letter: bytes) -> Any:
    """Do what a letter says with the points that its head names; runs on a worker."""
    points = _caught_up(_Head(*pickle.loads(head)))
    return Missing() if points is None else with_points(points, answer, letter)


def _caught_up(head: _Head) -> Points | None:
    """The points of the generation; None where this worker cannot get there by itself."""
    with _lock:
        replica = _replicas.get(head.key)
        if head.state is not None and not _fits(replica, head):
            _replicas.pop(head.key, None)
            for old in list(_replicas)[: len(_replicas) + 1 - _KEPT]:
                del _replicas[old]
            replica = _replicas[head.key] = pickle.loads(head.state)
        if replica is None:
            return None
        missed = head.generation - replica.generation
        if 0 < missed <= len(head.past):
            try:
                for ranks in head.past[-missed:]:
                    replica.follow(np.frombuffer(ranks, head.kind))
            except Exception:  # of another search with the same seed: the state comes next
                return None
        if _fits(replica, head):
            return replica.points()
        if head.state is not None:
            raise OtherNoiseError(
                f"A worker draws other numbers than this process from the same key: it has numpy {np.__version__} and "
                f"torch {torch.__version__}. Install the same versions everywhere."
            )
        return None


def _fits(replica: Replica | None, head: _Head) -> bool:
    return replica is not None and replica.generation == head.generation and replica.mark() == head.mark
