"""Who takes part, and the processes they work in."""

from __future__ import annotations

import json
import multiprocessing
import sys
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from applications.benchmarks.rl_peers.learners import FASTEST, FIRST_SEED, train_by_hand, train_few_steps, train_scorefn
from applications.benchmarks.rl_peers.libraries import train_sb3, train_tianshou, train_torchrl
from applications.benchmarks.rl_peers.watch import STREAMS, Watch


@dataclass(frozen=True)
class Contestant:
    """One row of a table: who trains what, and for how long."""

    name: str
    package: str  # "scorefn" or a key of PACKAGES
    train: Callable[..., None]
    options: dict[str, Any]
    limits: dict[str, Any]


def throughput_contestants(quick: bool) -> list[Contestant]:
    """Everybody on 64 streams, and SB3 on the 8 of the zoo too."""
    few, some, steps = (2, 2, 2000) if quick else (20, 30, 40_000)
    options: dict[str, Any]
    rows = []
    for how, options, updates in (("whole episodes", {}, few), ("segments of 128 steps", {"steps": 128}, some)):
        limits = {"max_updates": updates}
        rows.append(Contestant(f"scorefn, {how}", "scorefn", train_scorefn, options, limits))
        rows.append(Contestant(f"hand-written loop, {how}", "scorefn", train_by_hand, options, limits))
    limits = {"max_steps": steps}
    for algorithm in ("A2C", "PPO"):
        for streams in (8, STREAMS):
            options = {"algorithm": algorithm, "num_envs": streams}
            rows.append(Contestant(f"SB3 {algorithm}, zoo, {streams} streams", "sb3", train_sb3, options, limits))
    options = {"num_envs": STREAMS, "activation": nn.Tanh, "room": STREAMS * 1000}
    rows.append(Contestant("Tianshou Reinforce", "tianshou", train_tianshou, options, limits))
    rows.append(Contestant("TorchRL ReinforceLoss + GAE", "torchrl", train_torchrl, {}, limits))
    return rows


def threshold_contestants(quick: bool) -> list[Contestant]:
    """Everybody with settings that are meant for the task; the limit is the end of the recipe or of patience."""
    cap = (lambda steps: {"max_steps": 2000}) if quick else (lambda steps: {"max_steps": steps})
    return [
        Contestant("scorefn, fastest: 64 whole episodes", "scorefn", train_scorefn, FASTEST, cap(600_000)),
        Contestant("scorefn, fewest steps: gae, 8 x 64", "scorefn", train_few_steps, {}, cap(100_000)),
        Contestant("SB3 PPO, zoo", "sb3", train_sb3, {"algorithm": "PPO"}, cap(100_000)),
        Contestant("SB3 A2C, zoo", "sb3", train_sb3, {"algorithm": "A2C"}, cap(500_000)),
        Contestant("Tianshou Reinforce, its example", "tianshou", train_tianshou, {}, cap(200_000)),
    ]


def measured(contestant: Contestant, seed: int, judged: bool) -> dict[str, Any]:
    """One training in this process."""
    watch = Watch(seed=seed, judged=judged, **contestant.limits)
    contestant.train(watch, seed, **contestant.options)
    return watch.result()


class Room:
    """A process for one library, which trains when asked to; scorefn's own is this one."""

    def __init__(self, package: str) -> None:
        self.package = package
        if package != "scorefn":
            context = multiprocessing.get_context("spawn")
            self._here, there = context.Pipe()
            self._process = context.Process(target=_serve, args=(there,), daemon=True)
            self._process.start()

    def measured(self, contestant: Contestant, seed: int, judged: bool) -> dict[str, Any]:
        """One training in that process.

        Raises:
            RuntimeError: the library failed there; its traceback is the message.
        """
        if self.package == "scorefn":
            return measured(contestant, seed, judged)
        self._here.send((contestant, seed, judged))
        answer = self._here.recv()
        if isinstance(answer, str):
            raise RuntimeError(f"{contestant.name} failed:\n{answer}")
        result: dict[str, Any] = answer
        return result

    def close(self) -> None:
        """End the process."""
        if self.package != "scorefn":
            self._here.send(None)
            self._process.join()


def _serve(connection: Any) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    while (order := connection.recv()) is not None:
        try:
            connection.send(measured(*order))
        except Exception:
            connection.send(traceback.format_exc())


Results = dict[str, list[dict[str, Any]]]  # one per seed


def run(peers: list[str], seeds: int, quick: bool) -> dict[str, Results]:
    """Both tables: every contestant once a seed, in turn, after a short training that warms it up."""
    asked = ["scorefn", *peers]
    tables = {
        "throughput": [c for c in throughput_contestants(quick) if c.package in asked],
        "threshold": [c for c in threshold_contestants(quick) if c.package in asked],
    }
    rooms = {package: Room(package) for package in asked}
    results: dict[str, Results] = {name: {c.name: [] for c in rows} for name, rows in tables.items()}
    try:
        for name, rows in tables.items():
            for contestant in rows if name == "throughput" else []:
                rooms[contestant.package].measured(replace(contestant, limits={"max_steps": 1}), 1000, False)
            for seed in range(FIRST_SEED, FIRST_SEED + seeds):
                for contestant in rows:
                    result = rooms[contestant.package].measured(contestant, seed, name == "threshold")
                    results[name][contestant.name].append(result)
                    print(f"{name}, seed {seed}: {contestant.name}: {json.dumps(result)}", file=sys.stderr, flush=True)
    finally:
        for room in rooms.values():
            room.close()
    return results
