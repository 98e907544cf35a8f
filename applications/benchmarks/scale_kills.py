"""Searches that are killed again and again: no committed generation is lost, and the end is the same to the bit.

    OMP_NUM_THREADS=1 python -m applications.benchmarks.scale_kills [--kills 100] [--by-seeds]

A forked process searches with a ``Checkpoint`` after each generation and says through a pipe when one was begun, and
when one was on disk. It is killed (SIGKILL) after a time drawn uniformly, and another one goes on, until all kills are
spent; then one runs to the end. The search is the same without kills, its state known bit for bit: the exact answer.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten_with_path

import scorefn as sf
from applications.arguments import at_least
from applications.progress import Interruption, show_line
from applications.results import write_result
from scorefn.search import SNES, run, run_by_seeds

LONGEST = 0.04  # seconds from the first generation of a process to its end
DIMENSION = 200


@dataclass(frozen=True)
class Kills:
    """What became of a search.

    Args:
        kills: how many processes were killed.
        lost: generations that were committed and then missing, over all kills; 0 is what is promised.
        cost: how many generations a kill cost at most: begun, and begun again; 1 is what is promised.
        writing: kills that left a file that was being written.
        identical: the end is that of the search without kills, to the bit.
        generations: of the whole search.
    """

    kills: int
    lost: int
    cost: int
    writing: int
    identical: bool
    generations: int


def sphere(x: Tensor) -> Tensor:
    return (x - 1.0).square().sum()


def fresh(generations: int) -> SNES:
    return SNES([0.0] * DIMENSION, 0.5, seed=5, popsize=10, maxiter=generations)


def digest(strategy: SNES) -> str:
    """Everything the strategy knows, to the bit."""
    found = hashlib.sha256()
    for path, leaf in tree_flatten_with_path(strategy.state_dict())[0]:
        found.update(str(path).encode())
        found.update(leaf.numpy().tobytes() if isinstance(leaf, Tensor) else repr(leaf).encode())
    return found.hexdigest()


def search(strategy: SNES, by_seeds: bool, callback: Any = None) -> None:
    """To the end."""
    (run_by_seeds if by_seeds else run)(strategy, sphere, callback=callback)


def child(path: Path, generations: int, by_seeds: bool, pipe: int) -> None:
    """Go on from the file, and say ``at G``, where it stands, ``on G`` when generation G is on disk, and ``end G``."""
    strategy, checkpoint = fresh(generations), sf.scale.Checkpoint(path, problem="kills")
    checkpoint.resume(strategy)

    def say(what: str, number: int) -> None:
        os.write(pipe, f"{what} {number}\n".encode())

    def commit(present: Any) -> None:
        checkpoint(present)
        say("on", present.result.iterations)

    say("at", strategy.result.iterations)
    search(strategy, by_seeds, commit)
    say("end", strategy.result.iterations)


def forked(path: Path, generations: int, by_seeds: bool, seconds: float | None) -> list[tuple[str, int]]:
    """What a process said until its end, by a kill so many seconds after it began to search, or by itself (None)."""
    out, into = os.pipe()
    number = os.fork()
    if not number:
        try:
            os.close(out)
            child(path, generations, by_seeds, into)
        finally:
            os._exit(0)
    os.close(into)
    with os.fdopen(out, "rb") as lines:
        said = lines.readline()
        if seconds is not None:
            time.sleep(seconds)
            os.kill(number, signal.SIGKILL)
        said += lines.read()
    os.waitpid(number, 0)
    found = (line.split() for line in said.decode().splitlines())
    return [(word, int(count)) for word, count in found]


def killed(
    path: Path,
    *,
    kills: int,
    seed: int,
    by_seeds: bool,
    generations: int,
    show: Callable[[int], bool] = lambda done: False,
) -> Kills:
    """A search in so many processes, all but the last one killed; a search that has ended begins anew.

    Args:
        path: of the checkpoint.
        kills: how many.
        seed: of their moments.
        by_seeds: whether by ``run_by_seeds``.
        generations: of the search.
        show: called with the number of kills; a true value ends it.
    """
    whole = fresh(generations)
    search(whole, by_seeds)
    wanted, rng = digest(whole), np.random.default_rng(seed)
    done = lost = cost = writing = committed = 0
    ends: list[bool] = []
    ended = False
    while True:
        if ended:
            path.unlink()
            committed, ended = 0, False
        last = done == kills
        said = forked(path, generations, by_seeds, None if last else float(rng.uniform(0, LONGEST)))
        begun = said[0][1]
        lost += max(0, committed - begun)
        cost = max(cost, committed + 1 - begun if done else 0)
        committed = max(count for _, count in said)
        if said[-1][0] == "end":
            ended = True
            strategy = fresh(generations)
            sf.scale.Checkpoint(path, problem="kills").resume(strategy)
            ends.append(digest(strategy) == wanted)
            committed = -1  # nothing of the next search is begun
        if last:
            return Kills(done, lost, cost, writing, bool(ends) and all(ends), generations)
        done += 1
        writing += any(entry.suffix == ".part" for entry in path.parent.iterdir())
        if show(done):
            kills = done


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=at_least(1), default=100)
    parser.add_argument("--generations", type=at_least(2), default=200)
    parser.add_argument("--seed", type=at_least(0), default=0)
    parser.add_argument("--by-seeds", action="store_true", help="search by run_by_seeds")
    parser.add_argument("--out", type=Path, default=Path("runs/scale_kills"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with Interruption() as interrupted, tempfile.TemporaryDirectory() as folder:

        def show(done: int) -> bool:
            show_line(f"{done} of {options.kills} kills", last=done == options.kills or interrupted())
            return interrupted()

        found = killed(
            Path(folder) / "search.pt",
            kills=options.kills,
            seed=options.seed,
            by_seeds=options.by_seeds,
            generations=options.generations,
            show=show,
        )
    write_result(options.out, vars(options), {"kills": asdict(found)})
    print(table({"run_by_seeds" if options.by_seeds else "run": found}))
    return 0


def table(found: dict[str, Kills]) -> str:
    """A row for each driver."""
    lines = [
        "| driver | kills | while writing | committed and lost | most that a kill cost | end equal to the bit |",
        "|---|---|---|---|---|---|",
    ]
    for name, kills in found.items():
        same = "yes" if kills.identical else "no"
        lines.append(f"| `{name}` | {kills.kills} | {kills.writing} | {kills.lost} | {kills.cost} | {same} |")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
