"""The first audit of tracked dependencies: each site changed alone, in many settings, by one run under ``torch.vmap``.

A row is a setting of all guide sites. Under ``vmap`` each row is computed by itself, whatever the program does with
shapes, so a row is what an ordinary run of the program with these values would give; what ``vmap`` cannot run that way
(a branch on a value, a thread, numpy) it refuses, and the audit runs site by site instead.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

Factor: TypeAlias = tuple[str, str]  # "log p" or "log q", and the name of the site
Factors: TypeAlias = dict[Factor, list[Any]]  # what is compared of each: log-probabilities, mask and scale

MOST_SETTINGS = 64  # of a site whose support is enumerated
_SETTINGS = 10  # of all sites
_MOST_ELEMENTS = 2**22  # in one run
_MOST_WORK = 2**25  # elements in all runs; a larger program is audited in fewer settings
_PADDING = 32  # last rows, which the kernels of elementwise functions may round differently


class PinnedProgram:
    """Guide and model whose sites all take given values.

    Args:
        model: as it is run.
        guide: likewise.
        args: of both.
        kwargs: of both.
    """

    def __init__(
        self, model: Callable[..., Any], guide: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self._model, self._guide, self._args, self._kwargs = model, guide, args, kwargs

    def drawn(self, pinned: Mapping[str, Tensor]) -> dict[str, Any]:
        """Sites of one run of the guide, of which those in pinned are given."""
        with torch.no_grad(), poutine.block(), _Pinned(pinned):
            trace = poutine.trace(self._guide).get_trace(*self._args, **self._kwargs)
        return {name: site for name, site in trace.nodes.items() if site["type"] == "sample"}

    def factors(self, pinned: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> Factors:
        """Every factor at the pinned values; log q also at second ones, where another density shows as well."""
        factors: Factors = {}
        with torch.no_grad(), poutine.block():
            with _Pinned(pinned), _Kept("log q", factors, second):
                trace = poutine.trace(self._guide).get_trace(*self._args, **self._kwargs)
            with _Pinned(pinned), _Kept("log p", factors, {}):
                poutine.replay(self._model, trace=trace)(*self._args, **self._kwargs)
        return factors


class _Pinned(Messenger):  # type: ignore[misc]
    """Gives sites their values before anything is drawn: under vmap nothing may be drawn from a moved density."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._values = values

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self._values and not msg["done"] and not msg["is_observed"]:
            msg["value"], msg["done"] = self._values[msg["name"]], True


class _Kept(Messenger):  # type: ignore[misc]
    """Keeps every factor."""

    def __init__(self, kind: str, factors: Factors, second: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._kind, self._factors, self._second = kind, factors, second

    def _pyro_post_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            return
        points = [msg["value"], *([self._second[msg["name"]]] if msg["name"] in self._second else [])]
        parts = [msg["fn"].log_prob(point, *msg["args"], **msg["kwargs"]) for point in points]
        self._factors[self._kind, msg["name"]] = [*parts, msg["mask"], msg["scale"]]


@dataclass(frozen=True, eq=False)
class _Settings:
    """T values of every site, and T other ones.

    Args:
        banks: ``[2T, *shape]`` of each site, the settings and what a site is changed to in each.
        subsamples: indices of plates, the same in all settings.
        count: T.
        differs: of each site that is to be changed, the settings in which its other value is another.
    """

    banks: dict[str, Tensor]
    subsamples: dict[str, Tensor]
    count: int
    differs: dict[str, list[int]]

    def rows(self, most: int) -> Iterator[list[_Row]]:
        """Every change, a base row for each setting among them, and a padding, in groups of about ``most``."""
        changes = [_Row(t, frozenset([name])) for name, settings in self.differs.items() for t in settings]
        for start in range(0, len(changes), most):
            group = changes[start : start + most]
            bases = [_Row(t, frozenset()) for t in sorted({row.setting for row in group})]
            yield [*bases, *group, *bases[:1] * _PADDING]

    def values(self, rows: Sequence[_Row]) -> dict[str, Tensor]:
        """Of each site, ``[rows, *shape]``."""
        return {
            name: bank[[row.setting + self.count * (name in row.changed) for row in rows]]
            for name, bank in self.banks.items()
        }

    def seconds(self, rows: Sequence[_Row]) -> dict[str, Tensor]:
        """Other values of each site, the same for all rows of a setting."""
        index = [row.setting + self.count for row in rows]
        return {name: bank[index] for name, bank in self.banks.items()}

    def at(self, row: _Row, seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Values of an ordinary run."""
        pyro.set_rng_seed(seed)  # of what the program draws besides its sites
        values, seconds = self.values([row]), self.seconds([row])
        pinned = {name: value[0] for name, value in values.items()} | self.subsamples
        return pinned, {name: value[0] for name, value in seconds.items()}


@dataclass(frozen=True)
class _Row:
    """One setting, with some sites changed."""

    setting: int
    changed: frozenset[str]


def refutation(
    program: PinnedProgram,
    sites: Sequence[str],
    reached: Mapping[str, frozenset[Factor]],
    everything: Collection[Factor],
) -> tuple[tuple[str, Factor], ...] | None:
    """A factor that one of the sites moves though it is not among what the site reaches: at most one is looked for.

    In each of T settings (10, fewer in large programs) every site is changed alone, all others held, under ``vmap``.
    A factor that is not bitwise the same is run again, by itself, before it counts. A direct dependence that shows in a
    share p of the settings escapes with probability ``(1 - p)^T``; since ``reached`` is closed under composition
    (checked here), what passes through other sites is then covered too.

    That ``vmap`` computes what an ordinary run does is tested by T ordinary runs, each with a random half of the sites
    changed: a dependence that ``vmap`` loses (an exception that the program catches) escapes them with
    probability ``(1 - p/2)^T``.

    Args:
        program: guide and model.
        sites: names of those to change.
        reached: of every guide site.
        everything: the factors of the program that was tracked.

    Returns:
        A pair that refutes the map, or none; None where this program cannot be audited so.

    Raises:
        Exception: whatever the program, or ``vmap``, raises.
    """
    if any(not reached[other] <= reached[name] for name in sites for _, other in _decisions(reached, name)):
        return None
    with pyro.validation_enabled(False), warnings.catch_warnings():  # validation branches on values
        warnings.simplefilter("ignore")  # vmap's, of operations that it runs row by row
        settings = _drawn_settings(program, sites)
        if settings is None:
            return None
        seed = int(torch.randint(2**31, ()))
        base = _Row(0, frozenset())
        before = program.factors(*settings.at(base, seed))
        if before.keys() != set(everything):
            return None
        size = sum(part.numel() for parts in before.values() for part in parts if isinstance(part, Tensor))
        size += sum(bank[0].numel() for bank in settings.banks.values())
        settings = _fewer(settings, size)
        checks = [_Row(t, _half(settings, t)) for t in range(settings.count)]
        if not _faithful(program, settings, checks, size, seed):
            return None
        suspects = list(_suspects(program, settings, reached, size, seed))
        most = suspects[: len(sites)]  # if more are in doubt, running one by one is cheaper
        found = next(_confirmed(program, settings, most, seed), None)
        if found is None and len(suspects) > len(most):
            return None
        after = program.factors(*settings.at(base, seed))
        if found is None and _differences(before, after):  # a state, or noise of its own: an audit would mean nothing
            return None
    return () if found is None else (found,)


def support_of(fn: Any, value: Tensor) -> Tensor | None:
    """The values ``[S, *shape]`` that a site can take, where they are few."""
    if not getattr(fn, "has_enumerate_support", False):
        return None
    try:
        support = fn.enumerate_support(expand=False)
    except NotImplementedError:  # several dimensions at once
        return None
    if len(support) > MOST_SETTINGS:
        return None
    expanded: Tensor = support.expand(len(support), *value.shape).to(value.dtype)
    return expanded


def _decisions(reached: Mapping[str, frozenset[Factor]], name: str) -> Iterator[Factor]:
    return (factor for factor in reached[name] if factor[0] == "log q" and factor[1] in reached)


def _drawn_settings(program: PinnedProgram, sites: Sequence[str]) -> _Settings | None:
    """Settings that the guide draws; None: they do not fit together."""
    first = program.drawn({})
    subsamples = {name: site["value"] for name, site in first.items() if site_is_subsample(site)}
    runs = [first, *(program.drawn(subsamples) for _ in range(_SETTINGS - 1))]
    names = [name for name, site in first.items() if name not in subsamples and not site["is_observed"]]
    if any(run.keys() != first.keys() for run in runs) or not set(sites) <= set(names):
        return None
    banks = dict[str, Tensor]()
    differs = dict[str, list[int]]()
    for name in names:
        values = [run[name]["value"].detach() for run in runs]
        if any((value.shape, value.dtype) != (values[0].shape, values[0].dtype) for value in values):
            return None
        others = [_other(runs[t][name]["fn"], values, t) for t in range(len(runs))]
        banks[name] = torch.stack([*values, *others])
        if name in sites:
            differs[name] = [t for t in range(len(runs)) if not torch.equal(values[t], others[t])]
    return _Settings(banks, subsamples, len(runs), differs)


def _other(fn: Any, values: list[Tensor], t: int) -> Tensor:
    """Another value than that of setting t, from the support or from another setting; the same where there is none."""
    support = support_of(fn, values[t])
    offered = [*values[t + 1 :], *values[:t]] if support is None else [*support[t % len(support) :], *support]
    return next((value for value in offered if not torch.equal(value, values[t])), values[t])


def _fewer(settings: _Settings, size: int) -> _Settings:
    """So many settings that the work stays bounded, at least one."""
    count = max(1, min(settings.count, _MOST_WORK // (size * max(1, len(settings.differs)))))
    banks = {name: torch.cat((bank[:count], bank[settings.count :][:count])) for name, bank in settings.banks.items()}
    differs = {name: [t for t in changed if t < count] for name, changed in settings.differs.items()}
    return _Settings(banks, settings.subsamples, count, differs)


def _half(settings: _Settings, t: int) -> frozenset[str]:
    """A random half of the sites."""
    return frozenset(name for name, changed in settings.differs.items() if t in changed and torch.rand(()) < 0.5)


def _together(
    program: PinnedProgram, settings: _Settings, rows: Sequence[_Row], seed: int
) -> tuple[dict[Factor, list[Tensor]], Factors]:
    """Every factor in every row, ``[rows, ...]``, and what is no tensor, which no row can change."""
    constants: Factors = {}

    def run(values: dict[str, Tensor], seconds: dict[str, Tensor]) -> dict[Factor, list[Tensor]]:
        pyro.set_rng_seed(seed)
        factors = program.factors(values | settings.subsamples, seconds)
        for factor, parts in factors.items():
            constants[factor] = [part for part in parts if not isinstance(part, Tensor)]
        return {factor: [part for part in parts if isinstance(part, Tensor)] for factor, parts in factors.items()}

    together: dict[Factor, list[Tensor]] = torch.vmap(run, randomness="same")(
        settings.values(rows), settings.seconds(rows)
    )
    return together, constants


def _rows_at_once(size: int) -> int:
    return max(1, _MOST_ELEMENTS // size)


def _faithful(program: PinnedProgram, settings: _Settings, checks: list[_Row], size: int, seed: int) -> bool:
    """Whether ordinary runs give what vmap gives, up to rounding."""
    for start in range(0, len(checks), _rows_at_once(size)):
        group = checks[start : start + _rows_at_once(size)]
        together, constants = _together(program, settings, group, seed)
        for number, row in enumerate(group):
            alone = program.factors(*settings.at(row, seed))
            if alone.keys() != together.keys():
                return False
            for factor, parts in alone.items():
                theirs = [part[number] for part in together[factor]]
                ours = [part for part in parts if isinstance(part, Tensor)]
                rest = [part for part in parts if not isinstance(part, Tensor)]
                if rest != constants[factor] or len(ours) != len(theirs) or not all(map(_close, ours, theirs)):
                    return False
    return True


def _close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.allclose(a.double(), b.double(), rtol=1e-4, atol=1e-6, equal_nan=True)


def _suspects(
    program: PinnedProgram, settings: _Settings, reached: Mapping[str, frozenset[Factor]], size: int, seed: int
) -> Iterator[tuple[_Row, Factor]]:
    """Changes under which a factor that the site does not reach is not bitwise the same."""
    for rows in settings.rows(_rows_at_once(size)):
        together, _ = _together(program, settings, rows, seed)
        start = {row.setting: number for number, row in reversed(list(enumerate(rows))) if not row.changed}
        base = torch.tensor([start[row.setting] for row in rows])
        for factor, parts in together.items():
            moved = torch.zeros(len(rows), dtype=torch.bool)
            for part in parts:
                moved |= _unequal(part, part[base.to(part.device)]).reshape(len(rows), -1).any(-1).cpu()
            for number in moved.nonzero().flatten().tolist():
                if any(factor not in reached[name] for name in rows[number].changed):
                    yield rows[number], factor


def _confirmed(
    program: PinnedProgram, settings: _Settings, suspects: list[tuple[_Row, Factor]], seed: int
) -> Iterator[tuple[str, Factor]]:
    """Those that move in ordinary runs too: what a kernel rounds by its place in memory does not."""
    bases, changed = dict[int, Factors](), dict[_Row, Factors]()
    for row, factor in suspects:
        if row.setting not in bases:
            bases[row.setting] = program.factors(*settings.at(_Row(row.setting, frozenset()), seed))
        if row not in changed:
            changed = {row: program.factors(*settings.at(row, seed))}
        if factor in _differences(bases[row.setting], changed[row]):
            yield next(iter(row.changed)), factor


def _differences(first: Factors, second: Factors) -> set[Factor]:
    """Factors that are not equal, or on one side only."""
    same = {
        factor
        for factor in first.keys() & second.keys()
        if len(first[factor]) == len(second[factor]) and all(map(_equal, first[factor], second[factor]))
    }
    return (first.keys() | second.keys()) - same


def _equal(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return type(a) is type(b) and bool(a == b)
    return a.shape == b.shape and a.dtype == b.dtype and not bool(_unequal(a, b).any())


def _unequal(a: Tensor, b: Tensor) -> Tensor:
    """Elementwise, with NaN equal to itself."""
    return (a != b) & ~((a != a) & (b != b))
