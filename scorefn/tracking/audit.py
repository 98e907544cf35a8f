"""A perturbation audit: change one decision, hold everything else, and see which values move.

The check that needs no trust in how the structure was found, nor in what torch shows: it runs the program. What moves
does depend; what never moves is unproven, unless every setting was tried.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import product
from math import prod
from typing import Any, TypeAlias

import torch
from torch import Tensor

from scorefn.core import PyTree, ScorefnError, ShapeError
from scorefn.tracking.generators import generators_restored, seed_generators
from scorefn.tracking.ledger import Ledger, check_decision, check_name, leaves_of, pinned_value

Program: TypeAlias = Callable[[Ledger], object]

_MOST_RUNS = 100_000
_ATTEMPTS = 8  # to redraw a decision until it differs


@dataclass(frozen=True)
class AuditReport:
    """What moved when one decision was changed; true where no claim is refuted.

    Args:
        decisions: names of the K decisions, in the order in which they were first met.
        values: names of the J values.
        moved: ``[K, J]`` bool: decision k moved value j, itself or through a decision whose distribution it moved.
        claimed: ``[K, J]`` bool, the structure under test; None where none was given.
        trials: number of settings that were perturbed or, if exhaustive, of seeds under which all were compared.
        exhaustive: every combination of the supports was run, and every decision but the first said what its
            distribution is given, so that what did not move does not depend (for the noise that these seeds gave to the
            program's own random numbers).
        runs: of the program.

    Example:
        >>> import torch
        >>> from scorefn.tracking import audit
        >>> def program(ledger):
        ...     z = ledger.decision("z", torch.bernoulli(torch.tensor(0.5)))
        ...     w = ledger.decision("w", torch.bernoulli(torch.tensor(0.5)))
        ...     ledger.value("first", 2 * z)
        ...     ledger.value("second", z - w)
        >>> report = audit(program, claimed=torch.tensor([[True, False], [True, True]]))
        >>> (
        ...     bool(report),
        ...     report.refuted,
        ... )  # z moves the second value: that claim would bias a gradient
        (False, (('z', 'second'),))
        >>> report.unproven  # w never moved the first: this one only costs variance
        (('w', 'first'),)
        >>> report
        AuditReport(decisions=2, values=2, trials=20, runs=..., refuted=(('z', 'second'),), unproven=(('w', 'first'),))
    """

    decisions: tuple[str, ...]
    values: tuple[str, ...]
    moved: Tensor
    claimed: Tensor | None
    trials: int
    exhaustive: bool
    runs: int

    @property
    def refuted(self) -> tuple[tuple[str, str], ...]:
        """Pairs (decision, value) that moved though the claim says that they do not depend, which biases a gradient."""
        return () if self.claimed is None else self._pairs(self.moved & ~self.claimed)

    @property
    def unproven(self) -> tuple[tuple[str, str], ...]:
        """Pairs that are claimed to depend but never moved: harmless, and perhaps more variance than needed."""
        return () if self.claimed is None else self._pairs(self.claimed & ~self.moved)

    def __repr__(self) -> str:
        """How much was tried, and what was found."""
        pairs = f"refuted={self.refuted}, unproven={self.unproven}"
        if self.claimed is None:
            pairs = f"moved={self._pairs(self.moved)}"
        counts = f"decisions={len(self.decisions)}, values={len(self.values)}, trials={self.trials}, runs={self.runs}"
        whole = ", exhaustive=True" if self.exhaustive else ""
        return f"AuditReport({counts}{whole}, {pairs})"

    def __bool__(self) -> bool:
        """Whether nothing that was claimed is refuted."""
        return not self.refuted

    def _pairs(self, mask: Tensor) -> tuple[tuple[str, str], ...]:
        return tuple((self.decisions[k], self.values[j]) for k, j in mask.nonzero().tolist())


def audit(
    program: Program,
    claimed: Tensor | None = None,
    *,
    trials: int = 20,
    supports: Mapping[str, Tensor] | None = None,
    exhaustive: bool = False,
) -> AuditReport:
    """Prove or refute a structure by running the program with one decision changed at a time.

    It is about one program; ``scorefn.diagnostics.audit`` is about a whole problem (p, f, baseline), and takes this
    one in.

    A trial seeds the global generators (torch, numpy and Python's, restored afterwards), runs the program, once more
    for each decision with that one redrawn (or taken from its support) and the others pinned, and at the end with
    every decision pinned, when nothing may move. A value has moved where it is no longer equal; so has the distribution
    of a decision where what it is ``given`` (or, without ``given``, its draw) is no longer equal. A dependence that
    shows in a share p of the settings escapes all trials with probability ``(1 - p)^trials``.

    Source: Goguen & Meseguer (1982), "Security policies and security models", for non-interference, which each run
    tests: what is changed must not show in what is said not to depend on it.

    Args:
        program: called with a ledger, as with a ``Tracking``: it calls ``decision`` and ``value`` and goes on with
            what ``decision`` returns. It must draw from the global generators or from freshly seeded ones.
        claimed: ``[K, J]`` bool, as for ``Influence``; None: only report what moves.
        trials: settings to perturb; if exhaustive, seeds to repeat everything under.
        supports: values that a decision can take, ``[S, *shape]``, by name.
        exhaustive: run every combination of the supports, which must then name every decision, twice; every decision
            after the first must say what it is ``given``.

    Raises:
        ScorefnError: values move though nothing was changed; a support or what a decision is given is missing from an
            exhaustive audit, or there are too many settings.
        ShapeError: claimed is not ``[K, J]``.

    Example:
        >>> import torch
        >>> from scorefn.tracking import audit
        >>> def program(ledger):
        ...     z = ledger.decision("z", torch.bernoulli(torch.tensor(0.5)), given=())
        ...     w = ledger.decision("w", torch.bernoulli(0.3 + 0.4 * z), given=0.3 + 0.4 * z)
        ...     ledger.value("of w", w + 1)
        >>> claimed = torch.tensor([[False], [True]])  # right only if w were drawn without z
        >>> audit(program, claimed).refuted
        (('z', 'of w'),)
        >>> support = torch.tensor([0.0, 1.0])  # every setting, not just twenty
        >>> report = audit(
        ...     program, supports={"z": support, "w": support}, exhaustive=True, trials=1
        ... )
        >>> report.moved.tolist()
        [[True], [True]]
    """
    if isinstance(trials, bool) or not isinstance(trials, int) or trials < 1:
        raise ScorefnError(f"trials must be an integer of at least 1, but it is {trials!r}: nothing would be tested.")
    if claimed is not None and (not isinstance(claimed, Tensor) or claimed.dtype != torch.bool):
        kind = claimed.dtype if isinstance(claimed, Tensor) else type(claimed).__name__
        raise ScorefnError(f"claimed must be a bool tensor [K, J], as for Influence, but it is {kind}: convert it.")
    inquiry = _Inquiry(program, _checked(supports or {}))
    with generators_restored():
        seeds = torch.randint(2**31, (trials,)).tolist()
        for seed in seeds:
            if exhaustive:
                inquiry.compare_all(seed, trials)
            else:
                inquiry.perturb(seed)
    return inquiry.report(claimed, trials, exhaustive)


@dataclass
class _Run:
    """A ledger that pins decisions and keeps copies of what it is told."""

    pinned: Mapping[str, Tensor]
    seed: int
    decisions: dict[str, Tensor] = field(default_factory=dict)
    ungiven: list[str] = field(default_factory=list)  # after others, on which their distributions might depend
    given: dict[str, list[Any]] = field(default_factory=dict)
    values: dict[str, list[Any]] = field(default_factory=dict)

    def decision(self, name: str, value: Tensor, *, given: PyTree = ()) -> Tensor:
        """Keep what its distribution is given, without it its draw; return the pinned value."""
        check_name("decision", name, self.decisions)
        check_decision(name, value)
        self.given[name] = _copies(given) or _copies(value)
        if self.decisions and not leaves_of(given):
            self.ungiven.append(name)
        taken = pinned_value(name, value, self.pinned[name]) if name in self.pinned else value
        self.decisions[name] = taken.detach().clone()
        self._seed_after("decision", name)
        return taken.clone()

    def value(self, name: str, value: Any) -> Any:
        """Keep a copy."""
        check_name("value", name, self.values)
        self.values[name] = _copies(value)
        self._seed_after("value", name)
        return value

    def _seed_after(self, kind: str, name: str) -> None:
        """How many random numbers were used up to here, which a decision may change, is no influence."""
        seed_generators((self.seed + zlib.crc32(f"{kind} {name}".encode())) % 2**32)

    def dependencies(self, value: PyTree) -> frozenset[str]:
        """Every decision so far."""
        return frozenset(self.decisions)

    def checking(self) -> AbstractContextManager[None]:
        """Nothing is watched here."""
        return nullcontext()


class _Inquiry:
    """Runs of one program, and which names were seen to move which."""

    def __init__(self, program: Program, supports: dict[str, Tensor]) -> None:
        self._program = program
        self._supports = supports
        self._runs = 0
        self._decisions = dict[str, None]()  # ordered sets of names
        self._values = dict[str, None]()
        self._moved = set[tuple[str, str]]()
        self._moved_given = set[tuple[str, str]]()

    def perturb(self, seed: int) -> None:
        """Change each decision of one setting in turn."""
        base = self._run({}, seed)
        for name, current in base.decisions.items():
            other = self._other(name, current, base.decisions, seed)
            if other is not None:
                self._note(name, base, self._run({**base.decisions, name: other}, seed))
        self._check_still(base, base.decisions, seed)

    def compare_all(self, seed: int, trials: int) -> None:
        """Run every setting; compare those that differ in one decision."""
        names, sizes = list(self._supports), [len(support) for support in self._supports.values()]
        if (most := 2 * prod(sizes) * trials) > _MOST_RUNS:
            raise ScorefnError(
                f"An exhaustive audit takes {prod(sizes)} settings x {trials} trials, each twice, = {most} runs, more "
                f"than {_MOST_RUNS}. Set exhaustive=False, or give smaller supports."
            )
        runs = dict[tuple[int, ...], _Run]()
        for setting in product(*map(range, sizes)):
            pinned = {name: self._supports[name][i] for name, i in zip(names, setting, strict=True)}
            run = runs[setting] = self._run(pinned, seed)
            if unknown := [name for name in run.decisions if name not in self._supports]:
                raise ScorefnError(
                    f"An exhaustive audit sets every decision, but the support of {unknown[0]!r} is not known. Give "
                    f"supports={{{unknown[0]!r}: tensor [S, *shape], ...}}, or set exhaustive=False."
                )
            if run.ungiven:
                raise ScorefnError(
                    f"An exhaustive audit leaves nothing to luck, but the decision {run.ungiven[0]!r} was registered "
                    "without given=, so that its distribution can be compared by one draw only, which may be the same "
                    f"from two distributions. Pass decision({run.ungiven[0]!r}, ..., given=(its parameters)), "
                    "constants where nothing moves them, or set exhaustive=False."
                )
        for run in runs.values():  # what is hidden may show on one branch only
            self._check_still(run, run.pinned, seed)
        for setting, run in runs.items():
            for place, name in enumerate(names):
                if setting[place]:  # equality is transitive: compare each line with its first setting
                    self._note(name, runs[(*setting[:place], 0, *setting[place + 1 :])], run)

    def report(self, claimed: Tensor | None, trials: int, exhaustive: bool) -> AuditReport:
        """What moved, through other decisions too."""
        decisions, values = tuple(self._decisions), tuple(self._values)
        if not decisions or not values:
            raise ScorefnError(
                f"The program registered {len(decisions)} decisions and {len(values)} values, so there is nothing to "
                "audit. Call decision() and value() of the ledger it is given."
            )
        if claimed is not None and claimed.shape != (len(decisions), len(values)):
            raise ShapeError(
                f"claimed has shape {tuple(claimed.shape)}, but the program has K = {len(decisions)} decisions "
                f"{list(decisions)} and J = {len(values)} values {list(values)}: give one row per decision and one "
                "column per value."
            )
        reach = torch.eye(len(decisions), dtype=torch.bool)
        for k, i in product(range(len(decisions)), repeat=2):
            reach[k, i] |= (decisions[k], decisions[i]) in self._moved_given
        for middle in range(len(decisions)):  # Warshall's transitive closure
            reach |= reach[:, middle, None] & reach[middle]
        direct = torch.tensor([[(k, j) in self._moved for j in values] for k in decisions])
        moved = (reach.float() @ direct.float()) > 0
        return AuditReport(decisions, values, moved, claimed, trials, exhaustive, self._runs)

    def _run(self, pinned: Mapping[str, Tensor], seed: int) -> _Run:
        self._runs += 1
        seed_generators(seed)
        run = _Run(dict(pinned), seed)
        try:
            self._program(run)
        except Exception as error:
            error.add_note(f"scorefn.tracking.audit ran the program with decisions {_short(run.decisions)}.")
            raise
        self._decisions.update(dict.fromkeys(run.decisions))
        self._values.update(dict.fromkeys(run.values))
        return run

    def _other(self, name: str, current: Tensor, pinned: Mapping[str, Tensor], seed: int) -> Tensor | None:
        """Another value of a decision; None where none was found."""
        if (support := self._supports.get(name)) is not None:
            others = [row for row in support if not _equal(row, current)]
            return others[seed % len(others)] if others else None
        free = {other: value for other, value in pinned.items() if other != name}
        for attempt in range(1, _ATTEMPTS + 1):
            drawn = self._run(free, seed + attempt).decisions.get(name)
            if drawn is not None and not _equal(drawn, current):
                return drawn
        return None

    def _note(self, name: str, before: _Run, after: _Run) -> None:
        self._moved |= {(name, value) for value in _differences(before.values, after.values)}
        self._moved_given |= {(name, other) for other in _differences(before.given, after.given) if other != name}

    def _check_still(self, run: _Run, pinned: Mapping[str, Tensor], seed: int) -> None:
        """With nothing changed, nothing may move."""
        again = self._run(pinned, seed)
        for kind, before, after in (
            ("value", run.values, again.values),
            ("distribution or draw of the decision", run.given, again.given),
        ):
            if moved := _differences(before, after):
                raise ScorefnError(
                    f"The {kind} {sorted(moved)[0]!r} moved though no decision was changed, so what an audit sees "
                    "would mean nothing: the program has randomness or a state of its own. Draw it as a decision, "
                    "take it from the global generators (which are seeded before each run) or from one that the "
                    "program seeds, and leave no counters or buffers behind."
                )


def _copies(value: PyTree) -> list[Any]:
    copies = []
    for leaf in leaves_of(value):
        if not isinstance(leaf, Tensor) and hasattr(leaf, "__array__"):
            leaf = torch.as_tensor(leaf)
        if isinstance(leaf, Tensor):
            leaf = leaf.detach()
            leaf = leaf.clone() if leaf.layout == torch.strided else leaf.to_dense()
        copies.append(leaf)
    return copies


def _differences(before: Mapping[str, list[Any]], after: Mapping[str, list[Any]]) -> set[str]:
    """Names whose entries are not equal, or that are on one side only."""
    same = {
        name
        for name in before.keys() & after.keys()
        if len(before[name]) == len(after[name]) and all(map(_equal, before[name], after[name]))
    }
    return (set(before) | set(after)) - same


def _equal(a: Any, b: Any) -> bool:
    """Equal in kind, shape and every bit, but for the sign of zeros and the payload of NaNs."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return type(a) is type(b) and (bool(a == b) or (a != a and b != b))
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
        return False
    return bool(((a == b) | ((a != a) & (b != b))).all())


def _checked(supports: Mapping[str, Tensor]) -> dict[str, Tensor]:
    for name, support in supports.items():
        if not isinstance(support, Tensor) or not support.ndim or not len(support):
            found = f"shape {tuple(support.shape)}" if isinstance(support, Tensor) else f"a {type(support).__name__}"
            raise ScorefnError(
                f"The support of {name!r} must be a tensor [S, *shape] of the values it can take, S at least 1, but "
                f"it is {found}. Stack them."
            )
    return dict(supports)


def _short(decisions: Mapping[str, Tensor]) -> dict[str, Any]:
    return {name: value.tolist() if value.numel() < 10 else f"[{value.numel()}]" for name, value in decisions.items()}
