"""What a generation cost its workers, and where these numbers can be shown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from scorefn.core import ScorefnError, check_count
from scorefn.core.representation import representation


@dataclass(frozen=True)
class WorkRecord:
    """What one generation cost.

    Args:
        generation: which one, from 0.
        evaluations: how many points were asked for.
        seconds: on the clock, from the first point sent to the last value known.
        busy: seconds that workers spent in the function, all together; without those whose answers never came.
        workers: how many there are.
        bytes_sent: to workers, points and function; 0 where they share the memory of this process.
        resubmitted: evaluations that were sent again.
        failed: evaluations that raised, hung or lost their worker ``attempts`` times; NaN returned by fun not counted.
        dropped: evaluations that were left out by ``drop_slowest``.

    Raises:
        ScorefnError: workers is no integer of at least 1; seconds or busy is negative or NaN.

    Example:
        >>> import scorefn as sf
        >>> from concurrent.futures import ThreadPoolExecutor
        >>> from scorefn.scale import WorkRecord
        >>> with ThreadPoolExecutor(2) as executor:
        ...     strategy = sf.search.SNES([1.0, 2.0], 0.5, popsize=8, seed=0, maxiter=3)
        ...     result = sf.search.run(strategy, lambda x: x.square().sum(), executor=executor)
        >>> [record.evaluations for record in result.workers]
        [8, 8, 8]
        >>> record = WorkRecord(0, 20, 2.0, 3.0, 2, 0, 0, 0, 0)  # 3 of 4 worker seconds
        >>> record.evaluations_per_second, record.idle_share
        (10.0, 0.25)
    """

    generation: int
    evaluations: int
    seconds: float
    busy: float
    workers: int
    bytes_sent: int
    resubmitted: int
    failed: int
    dropped: int

    __repr__ = representation

    def __post_init__(self) -> None:
        """Refuse what leaves no share of the workers' time to speak of."""
        check_count("workers", self.workers)
        for name, spent in (("seconds", self.seconds), ("busy", self.busy)):
            if not spent >= 0:
                raise ScorefnError(f"{name} must be a time of at least 0, but it is {spent!r}: give it in seconds.")

    @property
    def evaluations_per_second(self) -> float:
        """``evaluations / seconds``."""
        return self.evaluations / max(self.seconds, 1e-9)

    @property
    def idle_share(self) -> float:
        """``1 - busy / (workers seconds)``, between 0 and 1: the share of the workers' time that was not used."""
        return min(1.0, max(0.0, 1 - self.busy / (self.workers * max(self.seconds, 1e-9))))


def log_scalars(writer: Any, record: WorkRecord, step: int | None = None, prefix: str = "workers") -> None:
    """Write a record as scalars, for TensorBoard or whatever takes them.

    Args:
        writer: has ``add_scalar(tag, value, step)``, such as ``torch.utils.tensorboard.SummaryWriter``.
        record: of a generation.
        step: where on the axis; None: the generation.
        prefix: of the tags: ``workers/evaluations_per_second`` and so on.

    Example:
        >>> from scorefn.scale import WorkRecord, log_scalars
        >>> class Writer:
        ...     def add_scalar(self, tag, value, step):
        ...         print(step, tag, value)
        >>> log_scalars(Writer(), WorkRecord(3, 20, 2.0, 3.0, 2, 400, 1, 0, 0))
        3 workers/evaluations_per_second 10.0
        3 workers/idle_share 0.25
        3 workers/bytes_sent 400
        3 workers/resubmitted 1
        3 workers/failed 0
        3 workers/dropped 0
    """
    at = record.generation if step is None else step
    for name in ("evaluations_per_second", "idle_share", "bytes_sent", "resubmitted", "failed", "dropped"):
        writer.add_scalar(f"{prefix}/{name}", getattr(record, name), at)
