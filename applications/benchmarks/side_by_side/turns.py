"""The contenders of a row, one after the other, in an order that is drawn anew for every turn."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from applications.benchmarks.scorecard.environments import interpreter
from applications.benchmarks.side_by_side.room import Room, RoomError
from applications.benchmarks.side_by_side.row import HOME, Contender, Row
from applications.benchmarks.side_by_side.work import Sample, agree

SEED = 0
MOST_CALLS = 500


class Disagreement(RuntimeError):
    """Two contenders of a row do not compute the same: nothing is timed."""


class House:
    """The rooms of a run, opened when they are first needed.

    Args:
        environments: a folder with one environment per library; missing ones are made.
    """

    def __init__(self, environments: Path) -> None:
        self._environments = environments
        self._rooms: dict[str, Room] = {}
        self._missing: dict[str, str] = {}
        self._prepared: set[str] = set()

    def room(self, contender: Contender) -> Room:
        """Where a contender works.

        Raises:
            RoomError: its environment cannot be made.
        """
        name = contender.room or contender.environment
        if name in self._missing:
            raise RoomError(self._missing[name])
        if name not in self._rooms:
            python, trouble = interpreter(contender.environment, self._environments)
            if python is None:
                self._missing[name] = f"not installed: {trouble}"
                raise RoomError(self._missing[name])
            self._rooms[name] = Room(python)
        return self._rooms[name]

    def home(self) -> Room:
        """scorefn's own."""
        return self.room(Contender("", "", environment=HOME))

    def prepared(self, function: str, folder: Path) -> Path:
        """The file that a function leaves in a folder; it is called once a run."""
        path = folder.resolve() / f"{function.rpartition(':')[2]}.npz"
        if function not in self._prepared:
            folder.mkdir(parents=True, exist_ok=True)
            self.home().ask("prepare", work=function, path=str(path), seed=SEED)
            self._prepared.add(function)
        return path

    def forget(self) -> None:
        """Let go of what a row has built."""
        for room in self._rooms.values():
            room.ask("forget")

    def close(self) -> None:
        """End all processes."""
        for room in self._rooms.values():
            room.close()
        self._rooms.clear()


@dataclass
class Measured:
    """A row's turns.

    Attributes:
        samples: of each contender by name, one a turn.
        versions: of packages.
        missing: who could not take part, and why.
    """

    samples: dict[str, list[Sample]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)


def measure(
    row: Row,
    house: House,
    turns: int,
    *,
    peers: bool,
    quick: bool,
    folder: Path,
    shown: Callable[[str], None] = lambda line: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Measured | None:
    """A row; None where it was told to stop before the end.

    Raises:
        RoomError: scorefn's own contender, or the loop by hand, failed.
        Disagreement: two contenders compute different things.
    """
    data = {} if row.prepare is None else {"data": str(house.prepared(row.prepare, folder))}
    found, calls, answers, homes = Measured(), {}, {}, {}
    for contender in row.among(peers=peers):
        options = {**contender.options, **(row.quick_options if quick else {}), **data}
        try:
            room = house.room(contender)
            room.ask("make", name=contender.name, work=contender.work, options=options, seed=SEED)
            answers[contender.name] = room.ask("answer", name=contender.name, seed=SEED)["answer"]
            calls[contender.name], homes[contender.name] = _calls(room, contender, row), room
            packages = [contender.package, "scorefn", "torch", "numpy"]
            found.versions.update(_told(room.ask("versions", packages=packages)["versions"], contender))
        except RoomError as error:
            if contender.role != "peer":
                raise
            found.missing[contender.name] = str(error)
        if should_stop():
            return None
    check(row.name, answers)
    found.samples = {name: [] for name in calls}
    order = random.Random(SEED)
    for turn in range(turns):
        for name in order.sample(list(calls), len(calls)):
            answer = homes[name].ask("run", name=name, turn=turn, calls=calls[name])
            found.samples[name].append(answer["sample"])
            if should_stop():
                return None
        shown(f"{row.name}: turn {turn + 1} of {turns}")
    house.forget()
    return found


def check(name: str, answers: Mapping[str, Mapping[str, Any] | None]) -> None:
    """Everybody who has an answer has the first one's.

    Raises:
        Disagreement: who has not, with both answers.
    """
    given = {who: answer for who, answer in answers.items() if answer is not None}
    for who, answer in given.items():
        first = next(iter(given))
        if not agree(given[first], answer):
            raise Disagreement(
                f"{name}: {who} computes {_short(answer)} where {first} computes {_short(given[first])}, so that their "
                "times cannot be compared."
            )


def _short(answer: Mapping[str, Any]) -> str:
    pairs = zip(answer["mean"][:4], answer["error"], strict=False)
    shown = ", ".join(f"{mean:.5g}" + (f" +- {error:.2g}" if error else "") for mean, error in pairs)
    return f"({shown}{', ...' if len(answer['mean']) > 4 else ''})"


def _calls(room: Room, contender: Contender, row: Row) -> int:
    """How often a turn repeats the work, after one call that warms it up."""
    if row.warm:
        room.ask("run", name=contender.name, turn=0, calls=1)
    if not row.shortest:
        return 1
    seconds: float = room.ask("run", name=contender.name, turn=0, calls=1)["sample"]["cpu"]
    return max(1, min(MOST_CALLS, round(row.shortest / max(seconds, 1e-6))))


def _told(versions: Mapping[str, str], contender: Contender) -> dict[str, str]:
    """The package's version; Python, torch and NumPy are told of scorefn's own environment."""
    if contender.environment == HOME:
        return dict(versions)
    return {contender.package: versions[contender.package]} if contender.package in versions else {}
