"""What every search strategy shares: ask for points, tell their values, read stop and result, save and resume."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from scorefn.core import NonFiniteError, ScorefnError
from scorefn.search.generators import own_generator
from scorefn.search.points import Numbers, as_integer, as_points, as_values, is_number
from scorefn.search.progress import Progress
from scorefn.search.ranking import Ranking
from scorefn.search.saved_state import check_saved, usable
from scorefn.search.stopping import Limits
from scorefn.search.strategy_result import StrategyResult

_MOST = 2**31  # points

State: TypeAlias = dict[str, Any]
"""What a strategy has learnt: tensors and plain numbers by name, replaced as a whole and never changed in place."""


class Strategy(ABC):
    """A minimiser whose loop is in the caller's hands; N points of D coordinates a generation.

    A new strategy says how its distribution is sampled (``sampled``), what it learns from the order of a generation
    (``learnt``, without side effect) and what it recommends (``mean``, ``sigma``); this class does the rest. Only ranks
    reach ``learnt``: f may be noisy, discontinuous, or known up to a monotone transform. A generation whose values are
    all tied teaches nothing, and leaves the distribution as it is to the bit.

    Args:
        state: what ``learnt`` replaces: tensors and numbers by name, from which sampling goes on.
        settings: numbers that are fixed but belong to a saved state, such as rates.
        shape: of the points of a generation, ``(N, D)``.
        sigma0: ``[D]``, the first standard deviations, against which growth is measured.
        seed: of the strategy's own generator; None: drawn from torch's global generator (so that ``torch.manual_seed``
            reproduces the run), a ``torch.Generator``: drawn from that one.
        limits: when to stop.
        fixed: what the strategy was made with and a saved state must agree with, plain values by name.

    Raises:
        ScorefnError: maxfevals that does not pay for one generation, or a seed that is none.

    Example:
        >>> import torch
        >>> from scorefn.search import SNES
        >>> strategy, again = SNES([3.0, -2.0], 1.0, seed=0), SNES([0.0, 0.0], 2.0)
        >>> for _ in range(3):  # every strategy is searched by this loop
        ...     x = strategy.ask()
        ...     strategy.tell(x, x.square().sum(1))
        >>> again.load_state_dict(strategy.state_dict())  # saved and resumed, to the bit
        >>> torch.equal(again.ask(), strategy.ask())
        True
    """

    method: ClassVar[str]
    """As ``minimize`` names it."""

    learns_from_ties: ClassVar[bool] = False
    """Whether a generation without any order teaches it something."""

    fits_products: ClassVar[bool] = True
    """Whether it may be a block of ``ProductSearch``: points are ``[N, D]``, and N stays as it is."""

    open_entries: ClassVar[frozenset[str]] = frozenset()
    """Entries of a saved state that need not be finite."""

    def __init__(
        self,
        state: State,
        *,
        settings: Mapping[str, float],
        shape: tuple[int, int],
        sigma0: Tensor,
        seed: int | torch.Generator | None,
        limits: Limits,
        fixed: Mapping[str, Any] | None = None,
    ) -> None:
        if limits.maxfevals is not None and limits.maxfevals < shape[0]:
            raise ScorefnError(
                f"maxfevals={limits.maxfevals} does not pay for one generation of {shape[0]} points: raise it, or "
                "lower popsize."
            )
        self._state = state
        self._settings = dict(settings)
        self._fixed = dict(fixed or {})
        self._shape = shape
        self._sigma0 = sigma0
        self._limits = limits
        self._generator = own_generator(seed, sigma0.device)
        self._before_ask: Tensor | None = None  # the generator then, until another state is adopted
        self._progress = Progress()
        self._stop: dict[str, float] = {}

    # ------------------------------------------------------------------------------------- what a strategy defines

    @property
    @abstractmethod
    def mean(self) -> Tensor:
        """``[D]``, the point to recommend."""

    @property
    @abstractmethod
    def sigma(self) -> Tensor:
        """``[D]``, the standard deviations of the search distribution."""

    @property
    def continuous_mean(self) -> Tensor:
        """``[D]``, the mean, NaN in coordinates that are discrete: there no step is too small for float64."""
        return self.mean

    @property
    def factor(self) -> Tensor | None:
        """``[D, D]``, an A of which the covariance is ``A A^T``; None where it is not full."""
        return None

    @abstractmethod
    def sampled(self) -> Tensor:
        """Points ``[N, D]`` of the distribution, by the strategy's own generator."""

    @abstractmethod
    def learnt(self, points: Tensor, ranking: Ranking) -> State:
        """The state after a generation: points as ``told`` returns them, and the order of their values.

        Nothing is changed; ``adopt`` gets what is returned.
        """

    def told(self, x: Numbers) -> Tensor:
        """The points of a generation as ``learnt`` takes them, ``[N, D]``, checked."""
        return as_points(x, self._shape, self._sigma0.device)

    def check_popsize(self, popsize: int) -> None:
        """Raise ScorefnError where a generation cannot have so many points."""
        checked_popsize(popsize, 2, None)

    def adopt(self, state: State) -> None:
        """Sample from now on by a state that ``learnt`` returned."""
        if state is not self._state:
            self._state, self._before_ask = state, None

    # ------------------------------------------------------------------------------------------------- the contract

    def random_state(self) -> Tensor:
        """What the next sample is drawn from: the state of the strategy's own generator."""
        return self._generator.get_state()

    @property
    def popsize(self) -> int:
        """N, how many points a generation has."""
        return self._shape[0]

    @property
    def dimension(self) -> int:
        """D, how many numbers a point has."""
        return self._shape[1]

    @torch.no_grad()
    def ask(self) -> Tensor:
        """Points to evaluate, ``[N, D]`` in float64, a fresh sample with each call."""
        self._before_ask = self._generator.get_state()
        return self.sampled()

    @torch.no_grad()
    def tell(self, x: Numbers, f: Numbers) -> None:
        """Learn from a generation.

        Args:
            x: ``[N, D]``, the points that were evaluated, in any order; points changed since ``ask`` (repaired or
                injected ones) are taken as they are.
            f: ``[N]``, their values; NaN or infinity for a failure.

        Raises:
            ShapeError: x is not ``[N, D]`` or f is not ``[N]``.
            NonFiniteError: x is not finite, or so far away that the distribution would overflow, or it is so wide
                that it would do so soon, or ``tolfailed`` generations in a row had no finite value. The state is then
                as before.

        A point farther away than any draw, more than ``sqrt(D) + 6`` standard deviations, teaches its direction alone:
        strategies of normal distributions pull it back to that length. ``SNES`` takes it as it is, as published, and
        refuses what would overflow.
        """
        if "overflow" in self._stop:
            raise Diverged(
                f"A standard deviation has passed {self._stop['overflow']:g}, beyond which variances are "
                "infinite: there is nothing more to learn. Start anew, and stop where stop says so."
            )
        points = self.told(x)
        self.learn(points, f, lambda ranking: self.learnt(points, ranking))

    def learn(self, points: Any, f: Numbers, learnt: Callable[[Ranking], State]) -> None:
        """Adopt what ``learnt`` makes of the order of values f ``[N]``, and account for it: what ``tell`` ends in.

        Of the points only the best one is looked at.
        """
        ranking = Ranking(as_values(f, self._shape[0], self._sigma0.device))
        self._progress.check_alive(ranking, self._limits.tolfailed)
        state = self._state
        if self.learns_from_ties or not ranking.flat:
            try:
                state = learnt(ranking)
            except (OverflowError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
                raise Diverged(
                    f"This generation cannot be learnt from in float64 ({error}): the distribution is too wide, or too "
                    "narrow along one axis. Start anew, with another sigma0."
                ) from error
        self._progress = self._progress.after(points, ranking)
        self.adopt(state)
        self._stop = self._fired()

    @property
    def stop(self) -> dict[str, float]:
        """What ends the search, with the threshold it met; empty, hence false, while it should go on."""
        return dict(self._stop)

    @property
    def result(self) -> StrategyResult:
        """Where the search stands; tensors are copies."""
        progress = self._progress
        return StrategyResult(
            mean=self.mean.detach().clone(),
            sigma=self.sigma.detach().clone(),
            best_x=None if progress.best_x is None else progress.best_x.clone(),
            best_f=progress.best_f,
            evaluations=progress.evaluations,
            iterations=progress.iterations,
            failed=progress.failed,
            stop=self.stop,
        )

    def state_dict(self) -> dict[str, Any]:
        """Distribution, paths, rates, account and random state: tensors and plain numbers, as ``torch.save`` has them.

        The limits are not part of it, so that a search can go on with a larger budget.
        """
        return {
            "strategy": type(self).__name__,
            "popsize": self.popsize,
            **self._fixed,
            **self._settings,
            **{name: copied(value) for name, value in self._state.items()},
            "sigma0": self._sigma0.clone(),
            "progress": self._progress.state_dict(),
            "generator": self._generator.get_state(),
            "asked": None if self._before_ask is None else self._before_ask.clone(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state: the run then equals an uninterrupted one to the bit, also between ask and tell.

        Raises:
            ScorefnError: the state is of another strategy, another dimension or other settings, or is incomplete or
                damaged. Nothing is then changed.
        """
        self.check_state(state)
        device, asked = self._sigma0.device, state["asked"]
        progress = Progress.of_state(state["progress"], device, self._shape[1])
        self._state = {
            name: copied(state[name].to(device)).requires_grad_(value.requires_grad)
            if isinstance(value, Tensor)
            else copied(state[name])
            for name, value in self._state.items()
        }
        self._settings = {name: state[name] for name in self._settings}
        self._sigma0 = state["sigma0"].to(device).clone()
        self._shape = (state["popsize"], *self._shape[1:])
        self._progress = progress
        self._before_ask = None
        if asked is not None:  # drawn again: strategies remember how the points came about
            self._generator.set_state(asked.cpu())
            self.ask()
        self._generator.set_state(state["generator"].cpu())
        self._stop = self._fired() if progress.iterations else {}

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise ScorefnError where ``load_state_dict`` cannot take a state."""
        check_saved(state, self.state_dict(), self._fixed, ("progress", "generator", "asked"), self.open_entries)
        device, asked = self._sigma0.device, state["asked"]
        if not usable(state["generator"], device) or not (asked is None or usable(asked, device)):
            raise ScorefnError(
                f"The state's generator is no state of a torch.Generator on {device}: pass what state_dict() returned "
                "there, unchanged."
            )
        self.check_popsize(state["popsize"])
        Progress.of_state(state["progress"], device, self._shape[1])

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(dimension={self._shape[1]}, popsize={self.popsize}, "
            f"generation={self._progress.iterations}, evaluations={self._progress.evaluations}, "
            f"best_f={self._progress.best_f:.6g})"
        )

    @torch.no_grad()
    def _fired(self) -> dict[str, float]:
        return self._limits.fired(
            self._progress, self.continuous_mean, self.sigma, self._sigma0, self.popsize, factor=lambda: self.factor
        )


class Diverged(NonFiniteError):
    """The distribution would leave what float64 can hold; the state is as before."""


def copied(value: Any) -> Any:
    """A tensor of its own memory, without its gradient; a dict or a list as a copy; anything else as it is."""
    return value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)


def checked_popsize(popsize: int, least: int, default: str | None) -> int:
    """A population size, refused where it cannot be ranked; ``default``: what leaving it out means, if it may be."""
    size = as_integer(popsize)
    if size is None or size < least:
        raise ScorefnError(
            f"popsize must be an integer of at least {least}, but it is {popsize!r}: fewer points cannot be ranked and "
            f"recombined. {f'Leave it out for {default}.' if default else 'Give 20, or more for a noisy function.'}"
        )
    if size > _MOST:
        raise ScorefnError(
            f"popsize may be as large as {_MOST:,}, but it has {len(str(size))} digits: no memory holds so many points."
        )
    return size


def checked_pairs(popsize: int) -> int:
    """An even population size of at least 4, for points in mirrored pairs; refused otherwise."""
    size = checked_popsize(popsize, 4, "the default")
    if size % 2:
        raise ScorefnError(
            f"popsize must be even, but it is {size}: points come in mirrored pairs. Use {size - 1} or {size + 1}."
        )
    return size


def checked_rate(name: str, rate: float) -> float:
    """A learning rate, refused where nothing would be learnt."""
    if not is_number(rate) or not 0 < rate < math.inf:
        raise ScorefnError(f"{name} must be a positive number, but it is {rate!r}: nothing would be learnt.")
    return float(rate)


def check_overflow(name: str, farthest: Tensor | float, *changed: Tensor | float) -> None:
    """Refuse a generation that would make the distribution infinite.

    Args:
        name: what would overflow.
        farthest: the largest distance of a told point from the mean, in standard deviations.
        changed: parameters after the generation.
    """
    if not math.isfinite(sum(value if isinstance(value, float) else float(value.sum()) for value in changed)):
        raise Diverged(
            f"This generation would make {name} infinite: the told points lie too many standard deviations away (up to "
            f"{float(farthest):.1e}). Tell points near those that ask returned."
        )
