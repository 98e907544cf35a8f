"""Training split over the processes that ``torchrun`` starts: what each takes, and what they share.

A rank is one of the processes, 0, 1, .... A process that ``torchrun`` did not start is rank 0 of 1, for which nothing
here calls ``torch.distributed``.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

import scorefn as sf


@dataclass(frozen=True)
class Ranks:
    """This process's number and how many there are, and sums over them."""

    rank: int = 0
    size: int = 1

    @property
    def group(self) -> sf.scale.World | None:
        """What baselines and normalisers are given: all processes, or None where there is one."""
        return sf.scale.World() if self.size > 1 else None

    def share(self, num_envs: int) -> int:
        """How many of the streams are this rank's.

        Raises:
            sf.ScorefnError: they cannot be dealt out evenly.
        """
        if num_envs % self.size:
            fitting = [str(size) for size in range(1, num_envs + 1) if num_envs % size == 0]
            raise sf.ScorefnError(
                f"The {num_envs} streams of an update cannot be split evenly over {self.size} processes: start "
                f"{', '.join(fitting[:-1])} or {fitting[-1]} of them (torchrun --nproc_per_node, times --nnodes)."
            )
        return num_envs // self.size

    def seed(self, seed: int, updates: int) -> int:
        """This rank's own, so that no two streams repeat each other; another one after another number of updates."""
        words = np.random.SeedSequence([seed % 2**64, self.size, updates], spawn_key=(self.rank,)).generate_state(2)
        return int(words[0]) << 32 | int(words[1])

    def add(self, v: Tensor) -> Tensor:
        """Sum over ranks."""
        return v if self.size == 1 else sf.scale.sum_over_ranks(v)

    def join(self, rows: Tensor) -> Tensor:
        """The rows of all ranks, one after the other."""
        return rows if self.size == 1 else sf.scale.gather_over_ranks(rows)

    def any(self, yes: bool) -> bool:
        """Whether one of them says so."""
        return bool(self.add(torch.tensor(int(yes))))

    def of_first(self, v: Tensor) -> Tensor:
        """What rank 0 has."""
        return self.add(v if self.rank == 0 else torch.zeros_like(v))

    def mean_and_std(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """Of all entries of all ranks; the spread is that of a sample."""
        if self.size == 1:
            return v.mean(), v.std()
        count = self.add(torch.tensor(v.numel()))
        mean = self.add(v.sum()) / count
        return mean, (self.add((v - mean).square().sum()) / (count - 1)).sqrt()

    def denominator(self, count: int) -> float:
        """What a sum over this rank's entries is divided by, so that ``average`` gives the mean over all of them."""
        return float(count if self.size == 1 else sf.scale.shared_denominator(count))

    def average(self, parameters: Iterable[Tensor]) -> None:
        """Replace gradients by their mean over ranks."""
        if self.size > 1:
            sf.scale.all_reduce_gradients(parameters)

    def check_same(self, what: str) -> None:
        """Refuse processes that were told different things; all wait here for the slowest.

        Raises:
            sf.ScorefnError: ``what`` differs between ranks.
        """
        if self.size == 1:
            return
        told = np.frombuffer(what.encode(), np.uint8).copy()
        mine = torch.zeros(4096, dtype=torch.uint8)
        mine[: len(told[:4096])] = torch.from_numpy(told[:4096])
        rows = self.join(mine.unsqueeze(0))
        if odd := [rank for rank in range(self.size) if not torch.equal(rows[rank], rows[0])]:
            raise sf.ScorefnError(
                f"The processes were not started for the same run: rank(s) {odd} differ from rank 0 in arguments or in "
                "the checkpoint that they see. Start all of them with the same arguments, and --out on a file system "
                "that they share."
            )


@contextmanager
def ranks_of_torchrun(timeout: float) -> Iterator[Ranks]:
    """Join the processes of the job, over gloo, and leave them at the end.

    Args:
        timeout: seconds after which a process that does not answer counts as lost.

    Raises:
        sf.LostRankError: they did not all come.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Ranks()
        return
    try:
        dist.init_process_group("gloo", timeout=timedelta(seconds=timeout))
    except RuntimeError as error:
        raise sf.LostRankError(
            f"The {os.environ['WORLD_SIZE']} processes of the job did not meet within {timeout:g} s "
            f"({' '.join(str(error).split())[:200]}): start all of them with torchrun and one --rdzv-endpoint."
        ) from error
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
