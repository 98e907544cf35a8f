"""Which factors each guide site can influence, found by running guide and model under ``Tracking``.

A map belongs to a *signature*: model and guide, the kinds and shapes of their arguments, and the sites with their
families, shapes and plates. It is found on the first run of that signature, by one more run with every site held at the
values that were sampled, and is used once ``audit`` has failed to refute it. Three rules keep it sound where it is
reused:

* it is intersected with program order, which needs no trust;
* from the first escape on (``if z:``, ``z.item()``), where Python may go another way at the next values, it says what
  program order says;
* it is audited again every so many steps, and after one refutation never used again.

The first audit changes every site in several settings at once (``scorefn.posteriors.perturbations``), where the program
can be run so, and otherwise, as all later ones, one after the other (``scorefn.tracking.audit``).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor
from torch.utils import _pytree as pytree

from scorefn.core import ScorefnError, check_count
from scorefn.core.warnings import DependencyWarning, ScorefnWarning, warn
from scorefn.posteriors.perturbations import Factor, PinnedProgram, refutation, support_of
from scorefn.posteriors.plates import Reach
from scorefn.posteriors.traces import Outline, Run, Trace
from scorefn.tracking import AuditReport, EscapeWarning, Ledger, Tracking, audit

_MOST_MAPS = 64  # signatures; a program with more is not static
_MOST_RUNS = 200  # of a first audit one after the other, unless there are more sites than that
_ROTATION = 10  # sites in each later audit
_SOON = 16  # steps from the first audit to the second; then twice as many each time, up to audit_every


@dataclass(frozen=True, eq=False)
class SiteInfluence:
    """What a guide site can influence, through other sites too: every site has an entry, with its own log q."""

    reached: Mapping[str, frozenset[Factor]]

    def reach(self, outline: Outline) -> tuple[Reach, ...]:
        """The same as bits, for the steps of a program."""
        sites = [values[0][0][1] for _, _, values in outline.stages]  # each stage begins with its own log q
        factors = [key[:2] for _, _, values in outline.stages for key, _ in values]
        return tuple(
            Reach(
                sum(1 << step for step, other in enumerate(sites) if ("log q", other) in reached),
                sum(1 << number for number, factor in enumerate(factors) if factor in reached),
            )
            for reached in (self.reached[site] for site in sites)
        )


class TrackedDependencies:
    """The influence of guide sites in a Pyro program, cached by the signature of its traces.

    Sources: Schulman, Heess, Weber & Abbeel (2015), "Gradient estimation using stochastic computation graphs", theorem
    1, for what a decision must be charged with; see ``scorefn.tracking`` for how it is found.

    Args:
        audit_every: steps between two audits of the same map, at least 1; the first ones follow after 16, 32, 64, ...
            steps, if that is sooner. A dependence that begins later without another signature (a gate on a parameter,
            a counter, a warm-up) is missed until an audit finds it. The first audit changes every site whose map
            is sharper than program order, in ten settings, by some thirty runs of guide and model however many sites
            there are; where Python branches on a value, or torch.vmap refuses the program, by one or two runs for each
            site. Later audits change ten sites in turn, each by one or two runs.

    Raises:
        ScorefnError: audit_every is no positive integer.
    """

    def __init__(self, audit_every: int = 1000) -> None:
        self.audit_every = check_count("audit_every", audit_every)
        self.refuted = False
        self._maps = dict[Any, _Map]()
        self._warned = set[str]()
        self._step = 0

    def applied(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        pairs: Sequence[tuple[Trace, Trace]],
        runs: list[Run],
        program: tuple[Callable[..., Any], Callable[..., Any]],
    ) -> list[Run]:
        """The runs of one step, with what their sites can influence wherever it is known.

        Args:
            model: as the user gave it.
            guide: likewise.
            args: of both.
            kwargs: of both.
            pairs: traces of model and guide.
            runs: what was read from them.
            program: model and guide as they were run, with the plate of the particles around them.
        """
        self._step += 1
        if self.refuted or isinstance(poutine.unwrap(guide), Messenger):
            return runs
        key = (model, guide, _signature((args, kwargs)))
        try:
            hash((model, guide))  # a key that holds on to the program, so that no other takes its place in memory
        except TypeError:
            return runs
        found = [
            self._map((*key, _families(pair), run.outline), _Program(*program, args, kwargs), pair, run)
            for pair, run in zip(pairs, runs, strict=True)
        ]
        if self.refuted:
            return runs
        return [replace(run, influence=influence) for run, influence in zip(runs, found, strict=True)]

    def _map(self, key: Any, program: _Program, pair: tuple[Trace, Trace], run: Run) -> SiteInfluence | None:
        if (found := self._maps.get(key)) is None:
            if len(self._maps) >= _MOST_MAPS:
                return None
            found = self._maps[key] = self._find(program, pair, run)
        if found.open and self._step >= found.next_audit and not self.refuted:
            self._audit(program, found)
        return found.influence

    def _find(self, program: _Program, pair: tuple[Trace, Trace], run: Run) -> _Map:
        """Run the program once more, at the same values, and see where they go."""
        samples = {name: site["value"].detach() for name, site in pair[1].nodes.items() if site["type"] == "sample"}
        try:
            with warnings.catch_warnings(), _generators_restored():
                warnings.simplefilter("ignore", EscapeWarning)  # told below, for the users of this loss
                with Tracking() as tracking:
                    seen = _Seen(tracking)
                    program(seen, frozenset(samples), samples)
        except ScorefnError as error:
            self._warn(
                "tracking", f"Tracking cannot follow this program, so program order is used. The reason was: {error}"
            )
            return _Map(None, ())
        for escape in tracking.escapes:
            for name in escape.decisions:
                self._warn(
                    name,
                    f'The guide site "{name}" left the tensor graph by {escape.kind} in {escape.filename}, line '
                    f"{escape.line}: Python may do anything with it, so every later factor counts as depending on it. "
                    "Keep it in torch (torch.where, gather, one_hot) for less variance.",
                    EscapeWarning,
                )
        if seen.factors != _factors(pair):  # another path, by a luck that the traces do not hold
            return _Map(None, ())
        influence = SiteInfluence({name: frozenset(reached) for name, reached in seen.reached.items()})
        return _Map(influence, _open(run, influence), frozenset(seen.factors), bool(tracking.escapes))

    def _audit(self, program: _Program, found: _Map) -> None:
        """Change one site at a time, and look for factors that move though the map says that they do not."""
        first = found.next_audit == 0
        if first and (refuted := self._audit_together(program, found)) is not None:
            found.schedule(self._step, self.audit_every)
            for site, factor in refuted:
                self._refute(site, factor)
            return
        sites = found.open if first else found.rotated()
        trials = max(1, min(10, _MOST_RUNS // len(found.open))) if first else 1
        supports = dict[str, Tensor]()
        try:
            with _generators_restored():
                program(_Supports(supports), frozenset(sites))
            report = audit(lambda ledger: program(ledger, frozenset(sites)), trials=trials, supports=supports)
        except Exception as error:
            self.refuted = True
            self._warn(
                "audit",
                "The dependencies found by tracking are not used, but program order, because they could not be "
                f"audited. The reason was: {error}",
            )
            return
        found.schedule(self._step, self.audit_every)
        for site, factor in _moved(report):
            if found.influence is not None and site in found.influence.reached:
                reached = found.influence.reached[site]
                if factor in found.factors and factor not in reached:
                    self._refute(site, factor)
                    return

    def _audit_together(self, program: _Program, found: _Map) -> tuple[tuple[str, Factor], ...] | None:
        """What refutes the map where all sites are changed at once; None: this program has to be run one by one."""
        if found.escaped or found.influence is None:  # Python would decide for all rows together
            return None
        try:
            with _generators_restored():
                return refutation(program.pinned, found.open, found.influence.reached, found.factors)
        except Exception:  # vmap refuses in many ways, and a fault of the program's shows again in the ordinary audit
            return None

    def _refute(self, site: str, factor: Factor) -> None:
        """Use the maps no more."""
        self.refuted = True
        self._warn(
            "audit",
            f'An audit changed the guide site "{site}", and {factor[0]} of site "{factor[1]}" moved, though tracking '
            "had not seen that it depends on it: program order is used from here on, and earlier gradients may have "
            "been biased. Something is invisible to tracking (threads, jit, C++ extensions, caught exceptions), or the "
            "program takes another path than when it was tracked.",
        )

    def _warn(self, about: str, message: str, category: type[ScorefnWarning] = DependencyWarning) -> None:
        """Once."""
        if about not in self._warned:
            self._warned.add(about)
            warn(message, category)


@dataclass
class _Map:
    """What was found for one signature, and when it is to be audited.

    Args:
        influence: None: program order.
        open: sites of which it says more than program order.
        factors: every factor, also one that nothing seems to reach.
        escaped: whether a value left the tensor graph.
        next_audit: the step; 0: it was never audited.
    """

    influence: SiteInfluence | None
    open: tuple[str, ...]
    factors: frozenset[Factor] = frozenset()
    escaped: bool = False
    next_audit: int = 0
    _turn: int = 0
    _gap: int = _SOON

    def schedule(self, step: int, most: int) -> None:
        """The next audit, after an audit at this step."""
        self.next_audit = step + min(self._gap, most)
        self._gap = min(2 * self._gap, most)

    def rotated(self) -> tuple[str, ...]:
        """The sites whose turn it is."""
        start, self._turn = self._turn, (self._turn + _ROTATION) % max(len(self.open), 1)
        return (self.open[start:] + self.open[:start])[:_ROTATION]


class _Program:
    """Guide and model as a program that tells a ledger its decisions and values."""

    def __init__(
        self, model: Callable[..., Any], guide: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self._model, self._guide, self._args, self._kwargs = model, guide, args, kwargs
        self.pinned = PinnedProgram(model, guide, args, kwargs)

    def __call__(self, ledger: Any, decisions: Collection[str], samples: Mapping[str, Tensor] | None = None) -> None:
        """Run both, unseen by what is around; hold the guide's sites at samples, where they are given."""
        with torch.no_grad(), poutine.block():
            with _Telling(ledger, "log q", decisions, samples or {}):
                guide_trace = poutine.trace(self._guide).get_trace(*self._args, **self._kwargs)
            with _Telling(ledger, "log p", (), {}):
                poutine.replay(self._model, trace=guide_trace)(*self._args, **self._kwargs)


class _Telling(Messenger):  # type: ignore[misc]
    """Registers sites of the guide as decisions and every factor as a value, where they are made."""

    def __init__(self, ledger: Ledger, kind: str, decisions: Collection[str], samples: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._ledger, self._kind, self._decisions, self._samples = ledger, kind, decisions, samples

    def _pyro_post_sample(self, msg: Any) -> None:
        if isinstance(msg["fn"], _Subsample):
            return
        name = msg["name"]
        if name in self._decisions:
            value = msg["value"]
            given = _log_prob(msg, value)
            if (held := self._samples.get(name)) is not None and held.shape == value.shape:
                value = torch.where(torch.ones((), dtype=torch.bool, device=value.device), held, value)
            if isinstance(self._ledger, _Supports):
                self._ledger.site(name, msg["fn"], value)
            msg["value"] = self._ledger.decision(name, value, given=given)
        self._ledger.value(f"{self._kind} {name}", (_log_prob(msg, msg["value"]), msg["mask"], msg["scale"]))


def _log_prob(msg: Any, value: Tensor) -> Tensor:
    log_prob: Tensor = msg["fn"].log_prob(value, *msg["args"], **msg["kwargs"])
    return log_prob


class _Seen:
    """A ledger on top of a tracking: after the first escape a factor depends on everything before it."""

    def __init__(self, tracking: Tracking) -> None:
        self._tracking = tracking
        self.reached = dict[str, set[Factor]]()
        self.factors = list[Factor]()

    def decision(self, name: str, value: Tensor, *, given: Any = ()) -> Tensor:
        """Register a site of the guide."""
        self.reached[name] = set()
        return self._tracking.decision(name, value, given=given)

    def value(self, name: str, value: Any) -> Any:
        """Register a factor."""
        factor = _factor(name)
        self.factors.append(factor)
        for site in self.reached if self._tracking.escapes else self._tracking.dependencies(value):
            self.reached[site].add(factor)
        return value


class _Supports:
    """A ledger that only asks what values the sites can take."""

    def __init__(self, supports: dict[str, Tensor]) -> None:
        self._supports = supports

    def site(self, name: str, fn: Any, value: Tensor) -> None:
        """Enumerate a support that is small."""
        if (support := support_of(fn, value)) is not None:
            self._supports[name] = support

    def decision(self, name: str, value: Tensor, *, given: Any = ()) -> Tensor:
        """Go on."""
        return value

    def value(self, name: str, value: Any) -> Any:
        """Go on."""
        return value


def _factor(name: str) -> Factor:
    return name[:5], name[6:]


def _factors(pair: tuple[Trace, Trace]) -> list[Factor]:
    """Every factor in the order in which guide and model made them."""
    model_trace, guide_trace = pair
    return [
        (kind, name)
        for kind, trace in (("log q", guide_trace), ("log p", model_trace))
        for name, site in trace.nodes.items()
        if site["type"] == "sample"
    ]


def _open(run: Run, influence: SiteInfluence) -> tuple[str, ...]:
    """Decisions of which the map says more than program order: those that an audit has to change."""
    later, sites = set[Factor](), list[str]()
    for stage in reversed(run.stages):
        later |= {value.key[:2] for value in stage.values}
        if stage.decision is not None and not later <= influence.reached[stage.decision.key[1]]:
            sites.append(stage.decision.key[1])
    return tuple(reversed(sites))


def _moved(report: AuditReport) -> Iterator[tuple[str, Factor]]:
    for k, j in report.moved.nonzero().tolist():
        yield report.decisions[k], _factor(report.values[j])


def _families(pair: tuple[Trace, Trace]) -> tuple[type, ...]:
    return tuple(type(site["fn"]) for trace in pair for site in trace.nodes.values() if site["type"] == "sample")


def _signature(arguments: Any) -> Any:
    """Kinds and shapes of arguments; flags and words by value, numbers not: they may count steps."""
    leaves, structure = pytree.tree_flatten(arguments)
    return str(structure), tuple(_kind(leaf) for leaf in leaves)


def _kind(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.dtype, leaf.device
    return leaf if isinstance(leaf, bool | str | None) else type(leaf)


@contextmanager
def _generators_restored() -> Iterator[None]:
    """Torch's, numpy's and Python's."""
    state = pyro.util.get_rng_state()
    with torch.random.fork_rng(list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []):
        try:
            yield
        finally:
            pyro.util.set_rng_state(state)
