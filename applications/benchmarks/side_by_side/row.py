"""A row: one piece of work, those who do it, and what is read off."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from applications.benchmarks.side_by_side.measures import Measure

Role = Literal["scorefn", "by hand", "limit", "peer"]
HOME = "scorefn"


@dataclass(frozen=True)
class Contender:
    """Who does the work.

    Attributes:
        name: on the page.
        work: the factory of its ``Work``, ``module:function`` below ``applications.benchmarks.contenders``.
        options: of the factory.
        role: scorefn's own, the loop by hand, a limit that nobody can pass, or a peer.
        environment: whose Python runs it, a name of ``scorecard.environments.PEERS``.
        room: the process that it shares with others of that name; None: the environment's.
        package: whose version is told.
    """

    name: str
    work: str
    options: Mapping[str, Any] = field(default_factory=dict)
    role: Role = "peer"
    environment: str = HOME
    room: str | None = None
    package: str = "scorefn"


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        name: what ``--only`` matches, a word with hyphens.
        title: its heading.
        about: what is done, and in what the contenders differ.
        contenders: the first is scorefn's, to which all ratios are.
        measures: what is read off; the first is plotted.
        turns: rounds in which everybody has one turn.
        quick_turns: the same of a quick run.
        quick_options: replace options of every contender in a quick run.
        shortest: a turn repeats its work until this many CPU seconds; 0: never.
        warm: the work is done once before the first turn.
        prepare: a function ``module:function`` of a path, called once in scorefn's room to leave a file there, whose
            path all contenders get as the option ``data``.
    """

    name: str
    title: str
    about: str
    contenders: tuple[Contender, ...]
    measures: tuple[Measure, ...]
    turns: int
    quick_turns: int = 3
    quick_options: Mapping[str, Any] = field(default_factory=dict)
    shortest: float = 0.02
    warm: bool = True
    prepare: str | None = None

    def among(self, *, peers: bool) -> tuple[Contender, ...]:
        """Those who take part."""
        return tuple(c for c in self.contenders if peers or c.role != "peer")


@dataclass(frozen=True)
class Suite:
    """Rows that make a page.

    Attributes:
        name: of the suite and its files.
        title: of its page.
        about: its first paragraph.
        rows: in order.
    """

    name: str
    title: str
    about: str
    rows: tuple[Row, ...]
