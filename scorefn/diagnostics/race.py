"""Estimators measured on one problem in rounds, within a budget of evaluations of f."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scorefn.core import Integrand, NonFiniteError, PyTree, ScorefnError, expectation
from scorefn.core.protocols import tensor_leaves
from scorefn.diagnostics.equivalence import equivalence
from scorefn.diagnostics.estimation import Estimation
from scorefn.diagnostics.exact import gradient
from scorefn.diagnostics.prices import FEWEST, Cost, Measurement, effective_repeats, prices_of, within
from scorefn.diagnostics.replicas import Replicas, replicas
from scorefn.diagnostics.shortlist import Candidate, references, shortlist
from scorefn.diagnostics.statistics import interleaved
from scorefn.reducers import Sobol

MARGIN = 0.1
"""Prices that differ by less are as good; a pathwise bias of less, as a share of the gradient, is taken for none."""
CONFIDENCE = 0.95
"""Of a decision."""
EVENTS = 30.0
"""Repeats that the variance of a winner has to rest on, see ``effective_repeats``."""
SILENT = 1000
"""Repeats without any noise after which there is taken to be none."""
TIMED = 32
"""Estimates per round that are made one by one, for their CPU seconds."""
_CHECKS = 24  # estimates that ``replicas`` makes to see whether a sweep is right
_STORED = 2**26  # numbers of gradients that are kept of one estimator
REFERENCE = 256
"""Draws of the estimate that the pathwise one is compared with."""


class _TooDearError(Exception):
    """f was about to be evaluated more often than it may be; it was not."""


class Meter:
    """f, with its evaluations counted and limited."""

    def __init__(self, f: Integrand, budget: int) -> None:
        self._f, self.left, self.limit = f, budget, budget

    def __call__(self, x: PyTree) -> Any:
        """f(x), or ``_TooDearError`` before f is called."""
        rows = len(tensor_leaves(x)[0])
        if rows > min(self.left, self.limit):
            raise _TooDearError(f"it takes {rows} evaluations of f or more.")
        self.left -= rows
        self.limit -= rows
        return self._f(x)


@dataclass
class Entrant:
    """A candidate and what was measured of it.

    ``evaluations`` of f are what one estimate takes; ``timings`` are pairs of a round and CPU seconds, round -1 being
    the entrance.
    """

    candidate: Candidate
    estimation: Estimation
    evaluations: int
    gradients: list[Tensor] = field(default_factory=list)
    timings: list[tuple[int, float]] = field(default_factory=list)
    sweeps: Replicas | str | None = None

    @property
    def repeats(self) -> int:
        """How many gradients there are."""
        return sum(len(part) for part in self.gradients)


class Race:
    """Rounds of measurements, and who is left out of them."""

    def __init__(
        self, p: Any, f: Integrand, parameters: tuple[Tensor, ...], budget: int, num_samples: int, cost: Cost
    ) -> None:
        self.p, self.f, self.parameters, self.cost = p, f, parameters, cost
        self.budget, self.num_samples = budget, num_samples
        self.meter = Meter(f, budget)
        self.entrants: dict[str, Entrant] = {}
        self.alive: list[str] = []
        self.why: dict[str, str] = {}
        self.unproven: str | None = None  # why the pathwise gradient may not win
        self.judge: Entrant | None = None
        self.missing = 100.0  # by how much the proof falls short, as a factor of the budget
        self.paces: list[float] = []  # CPU seconds of the first entrant, by round
        self.bias_z: dict[str, float] = {}
        self.problems = 0

    # ------------------------------------------------------------------------------------------------- entrance

    def enter(self) -> None:
        """Two estimates of each candidate: what it costs, and whether it serves the problem."""
        first = references(self.num_samples)
        for candidate in first:
            self._probe(candidate)
        found = shortlist(self.p, self.meter, self.num_samples, self.problems)
        self.why.update(found.left_out)
        for candidate in found.candidates[len(first) :]:
            if self.budget < FEWEST * self.num_samples * (len(self.entrants) + 1):
                self.why[candidate.name] = "the budget did not reach to try it."
                continue
            try:
                self._probe(candidate)
            except Exception as error:  # whatever it says, it cannot serve this problem
                self.why[candidate.name] = f"{str(error) or type(error).__name__}".partition("\n")[0]
        self.alive = list(self.entrants)
        self.unproven = "its mean was not compared yet." if "pathwise" in self.alive else None

    def _probe(self, candidate: Candidate) -> None:
        before = self.meter.left
        self.meter.limit = self.num_samples
        try:
            value = candidate.estimator(self.p, self.meter)
        finally:
            self.meter.limit = self.budget
        spent = before - self.meter.left
        if spent == 0:
            raise ScorefnError(
                f"f was not called with draws of {type(self.p).__name__}, so there is nothing to count a budget in: "
                "use scorefn.diagnostics.compare."
            )
        if not self.entrants:
            self.problems = value.ndim
        entrant = Entrant(candidate, Estimation(self.p, self.meter, candidate.estimator), spent)
        entrant.gradients.append(self._flat(value.sum()))
        start = time.process_time()
        entrant.gradients.append(self._flat(entrant.estimation()))
        entrant.timings.append((-1, time.process_time() - start))
        self.entrants[candidate.name] = entrant

    def _flat(self, value: Tensor) -> Tensor:
        """Its gradient, ``[1, P]``."""
        found = torch.cat([g.reshape(-1) for g in gradient(value, self.parameters, retain_graph=True)])
        if not bool(found.isfinite().all()):
            raise NonFiniteError("its gradient is NaN or infinite: it has neither mean nor variance. Make f finite.")
        return found[None].detach()

    # --------------------------------------------------------------------------------------------------- rounds

    def run(self) -> None:
        """Rounds until the best is known or the budget is spent; half is kept while the pathwise proof is due."""
        rounds = max(2, math.ceil(math.log2(len(self.alive)))) + 1
        for number in range(rounds, 0, -1):
            kept = self.meter.left // 2 if self._due() else 0
            self._measure(self.alive, (self.meter.left - kept) // number)
            self._compare_means()
            self._drop()
            if self._due() and (number == 1 or self._leads()):
                self._prove()
            if self._settled():
                return
        self._measure(self.alive, self.meter.left)

    def _measure(self, names: list[str], share: int) -> None:
        """Spend at most ``share`` evaluations, the same on each; those that are timed take turns with the first."""
        turns = list(dict.fromkeys([*names, next(iter(self.entrants))]))
        each = share // len(turns)
        counts = {name: self._count(self.entrants[name], each) for name in names}
        if (together := min(TIMED, *(each // self.entrants[name].evaluations for name in turns))) >= 2:
            found = interleaved({name: self.entrants[name].estimation for name in turns}, self.parameters, together)
            self.paces.append(max(median(found[next(iter(self.entrants))][1]), 1e-9))
            for name, (gradients, taken) in found.items():
                self._keep(self.entrants[name], gradients)
                self.entrants[name].timings += [(len(self.paces) - 1, t) for t in taken]
            counts = {name: max(count - together, 0) for name, count in counts.items()}
        for name, count in counts.items():
            self._repeat(self.entrants[name], count)

    def _count(self, entrant: Entrant, evaluations: int) -> int:
        room = max(_STORED // max(entrant.gradients[0].shape[1], 1), 64) - entrant.repeats
        return max(min(evaluations // max(entrant.evaluations, 1), room), 0)

    def _repeat(self, entrant: Entrant, count: int) -> None:
        if entrant.sweeps is None and count >= 4 * _CHECKS:
            entrant.sweeps = replicas(entrant.estimation, self.parameters)
            count -= _CHECKS
        if isinstance(entrant.sweeps, Replicas) and count > 0:
            self._keep(entrant, entrant.sweeps.gradients(count))
        elif count == 1:
            self._keep(entrant, self._flat(entrant.estimation()))
        elif count > 1:
            name = entrant.candidate.name
            found = interleaved({name: entrant.estimation}, self.parameters, count)[name]
            self._keep(entrant, found[0])

    def _keep(self, entrant: Entrant, gradients: Tensor) -> None:
        if not bool(gradients.isfinite().all()):
            raise NonFiniteError(
                f'A gradient of "{entrant.candidate.name}" is NaN or infinite: it has no variance. Make f finite.'
            )
        entrant.gradients.append(gradients.detach())

    def measurements(self, names: Iterable[str]) -> dict[str, Measurement]:
        """What is known of each; the machine may be slower in one round than in another, and the first shows it."""
        found = {}
        usual = median(self.paces) if self.paces else 1.0
        for name in names:
            e = self.entrants[name]
            timings = [t * usual / self.paces[number] for number, t in e.timings if number >= 0]
            found[name] = Measurement.of(
                torch.cat(e.gradients), timings or [t for _, t in e.timings], e.evaluations, self.parameters
            )
        return found

    def proven(self) -> list[str]:
        """Those that are known to be right."""
        return [name for name in self.entrants if name != "pathwise" or not self.unproven]

    def _drop(self) -> None:
        """Leave out whose price is above 1.1 times the least, at 99 % confidence."""
        measurements = self.measurements(self.entrants)
        samples = prices_of(measurements, self.cost)[1]
        proven = self.proven()
        least = np.min(np.stack([samples[name] for name in proven]), axis=0)
        for name in list(self.alive):
            s = measurements[name].statistics
            rests = effective_repeats(s)
            if s.repeats >= FEWEST and rests >= FEWEST and ((1 + MARGIN) * least < samples[name]).mean() > 0.99:
                self.alive.remove(name)

    def _settled(self) -> bool:
        """Whether the best is known beyond doubt, so that the rest of the budget need not be spent."""
        if self._due() or self.unresolved():
            return False
        _, probability, reliable = self.verdict(self.measurements(self.entrants))
        return reliable and probability > 0.995

    def verdict(self, measurements: Mapping[str, Measurement]) -> tuple[str, float, bool]:
        """The best of these, the probability that it is within the margin, and whether its variance can be trusted."""
        proven = {name: measurements[name] for name in self.proven()}
        prices, samples = prices_of(proven, self.cost)
        winner = min(  # among those without noise, one that has none by construction
            proven,
            key=lambda name: (
                prices[name],
                not self.entrants[name].candidate.exact,
                self.cost(proven[name].statistics),
            ),
        )
        return winner, within(samples, 1 + MARGIN)[winner], self._reliable(winner, prices[winner], proven[winner])

    def _reliable(self, name: str, price: float, measurement: Measurement) -> bool:
        s = measurement.statistics
        if self.entrants[name].candidate.exact:
            return True
        return s.repeats >= SILENT if price == 0 else effective_repeats(s) >= EVENTS

    # ------------------------------------------------------------------------------------- the pathwise gradient

    def _reference(self) -> Entrant:
        """The score-function estimate whose mean is known best for its evaluations."""
        known = [e for name, e in self.entrants.items() if name != "pathwise"]
        if self.judge is not None:
            known.append(self.judge)
        return min(known, key=lambda e: _spread(e) * e.evaluations)

    def _refer(self) -> None:
        """A reference of many draws, which are balanced where they can be: its mean costs least."""
        if self.meter.left < 32 * REFERENCE:
            return
        for coupling, text in ((Sobol(), ", coupling=sf.Sobol()"), (None, "")):
            estimator = partial(expectation, num_samples=REFERENCE, coupling=coupling)
            candidate = Candidate("reference", estimator, f"sf.expectation(p, f, {REFERENCE}{text})", "")
            judge = Entrant(candidate, Estimation(self.p, self.meter, estimator), REFERENCE)
            try:
                self._repeat(judge, 8)
            except ScorefnError:  # no quantile function
                continue
            self.judge = judge
            return

    def _due(self) -> bool:
        """Whether the pathwise gradient is in the race, but may not win it yet."""
        return self.unproven is not None and "pathwise" in self.alive

    def _leads(self) -> bool:
        """Whether the pathwise gradient, if it is right, is the best by far: all others can wait for the proof."""
        samples = prices_of(self.measurements(self.entrants), self.cost)[1]
        least = np.min(np.stack([samples[name] for name in self.proven()]), axis=0)
        return bool(((1 + MARGIN) * samples["pathwise"] < least).mean() > 0.99)

    def unresolved(self) -> bool:
        """Whether it might be the best, and was neither proven nor refuted."""
        if self.unproven is None or "pathwise" in self.bias_z or "pathwise" not in self.entrants:
            return False
        samples = prices_of(self.measurements(self.entrants), self.cost)[1]
        least = np.min(np.stack([samples[name] for name in self.proven()]), axis=0)
        return bool(((1 + MARGIN) * samples["pathwise"] < least).mean() > 1 - CONFIDENCE)

    def _prove(self) -> None:
        """Up to three quarters of what is left, in steps, for the two means; what cannot be proven leaves the race."""
        step = self.meter.left * 3 // 16
        self._refer()
        for _ in range(4):
            pair = [self._reference(), self.entrants["pathwise"]]
            weights = [math.sqrt(_spread(e) * e.evaluations) for e in pair]
            for entrant, weight in zip(pair, weights, strict=True):  # of least variance of the difference
                share = step * weight / sum(weights) if sum(weights) > 0 else step / 2
                self._repeat(entrant, self._count(entrant, int(share)))
            self._compare_means()
            if not self._due():
                return
        self.alive.remove("pathwise")
        self.why["pathwise"] = str(self.unproven)

    def _compare_means(self) -> None:
        """Compare the means, coordinate by coordinate; say what is missing."""
        if not self._due():
            return
        mine, other = self.entrants["pathwise"], self._reference()
        if min(mine.repeats, other.repeats * other.evaluations // mine.evaluations) < 2 * EVENTS or other.repeats < 8:
            self.unproven = "the budget did not reach to compare its mean with the score-function gradient."
            return
        found = equivalence(torch.cat(mine.gradients), torch.cat(other.gradients))
        if found.refuted:
            self.alive.remove("pathwise")
            self.bias_z["pathwise"] = found.z
            self.unproven = self.why["pathwise"] = (
                f"its mean is not the gradient: it is off by {found.difference:.0%} of the largest coordinate, "
                f"{found.z:.1f} standard errors. f jumps, or hides a dependence on x."
            )
            return
        self.missing = (found.worst / MARGIN) ** 2
        self.unproven = (
            None
            if found.worst <= MARGIN and found.rests >= EVENTS
            else f"its mean could not be shown to be the gradient: it may be off by {min(found.worst, 99.0):.0%} of "
            "the largest coordinate, and 10 % are allowed. A larger budget may show it, or a place where the gradient "
            "is not near 0."
        )


def _spread(entrant: Entrant) -> float:
    """Total variance."""
    return float(torch.cat(entrant.gradients).double().var(0).sum()) if entrant.repeats > 1 else math.inf
