"""Many independent estimates in one sweep: the distribution is copied along a new batch axis, and f is called once."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from scorefn.core import Integrand
from scorefn.diagnostics.copied_work import Folded, Work, refuse_difference, work_of
from scorefn.diagnostics.cuts import Cuts, LoopedError, across, batched
from scorefn.diagnostics.estimation import Estimation

_ELEMENTS = 2**16  # numbers in the draws of one sweep, and in its gradients: more do not fit the cache
_DIRECT = 48  # backward passes of one sweep for f's own gradient: one by coordinate, or by replicate if that is fewer
_TRIAL = 16  # replicates of the first sweep, which is a trial
_PLACES = 5  # replicates of the trial at which f is called again by itself
_MORE_PLACES = 6  # and of a sweep that is used


class Replicas:
    """Independent repeats of one estimation, made in sweeps; from ``replicas``."""

    def __init__(self, work: Work, cuts: Cuts, f: Integrand, parameters: tuple[Tensor, ...]) -> None:
        self._work, self._cuts, self._f, self._parameters = work, cuts, f, parameters
        self._reached: int | None = None  # coordinates in which f has a gradient of its own; None: not known yet
        self._twice = True  # whether that gradient can be differentiated again
        self._sweep = _TRIAL

    def gradients(self, count: int) -> Tensor:
        """Gradients of ``count`` independent estimates, ``[count, P]``."""
        return self.estimates(count)[1]

    def estimates(self, count: int) -> tuple[Tensor, Tensor]:
        """``count`` independent estimates: their values ``[count]``, summed over the problems, and ``gradients``."""
        found = [self._sweep_at(self.draws(size)) for size in self._sizes(count)]
        return torch.cat([value for value, _ in found]), torch.cat([gradient for _, gradient in found])

    def checked_estimates(self, count: int) -> tuple[Tensor, Tensor] | str:
        """``estimates``, whose first and last sweep are checked as the trial was, or why they must be looped.

        What f does may depend on how many rows it is given, so that a sweep of another size is not taken on trust.
        """
        sizes = self._sizes(count)
        found = []
        try:
            for number, size in enumerate(sizes):
                x, f = self.draws(size), Folded(self._f, size)
                found.append(self._sweep_at(x, f))
                if number in {0, len(sizes) - 1}:
                    self._redo(x, f, found[-1], _MORE_PLACES)
        except torch.OutOfMemoryError:
            raise
        except LoopedError as reason:
            return str(reason)
        except Exception as error:  # what is wrong with the estimation itself, the loop will say in its own words
            return f"a sweep of {count} raised {type(error).__name__}: {error}"
        return torch.cat([value for value, _ in found]), torch.cat([gradient for _, gradient in found])

    def gradients_at(self, x: Tensor) -> Tensor:
        """Gradients of the estimates from given draws: x ``[N, R, *batch, *event]`` to ``[R, P]``.

        Each of the R columns stands for what one estimate draws: N draws of p, those of a coupling in its order, or
        what a joint estimator's ``sample`` returns.
        """
        parts = x.split(self._sweep, dim=1)
        return torch.cat([self._sweep_at(part)[1] for part in parts])

    def _sizes(self, count: int) -> list[int]:
        whole, rest = divmod(count, self._sweep)
        return [self._sweep] * whole + [rest] * (rest > 0)

    def draws(self, count: int) -> Tensor:
        """What ``count`` estimates draw, ``[N, count, *batch, *event]``, for ``gradients_at``."""
        with torch.no_grad() if not self._work.needs_graph else torch.enable_grad():
            x = self._work.sample(self._cuts.p, self._cuts.copies(count)[0], count)
        if not isinstance(x, Tensor):
            raise LoopedError(f"its draws are a {type(x).__name__}, not one tensor")
        return x

    def _sweep_at(self, x: Tensor, f: Folded | None = None) -> tuple[Tensor, Tensor]:
        count = x.shape[1]
        p, leaves = self._cuts.copies(count)
        x = x.detach()
        f = Folded(self._f, count) if f is None else f
        with torch.enable_grad():
            value, more = self._work.surrogate(p, x.requires_grad_() if self._work.needs_graph else x, f, count)
        if value.shape[:1] != (count,):
            raise LoopedError(f"{count} copies gave values of shape {tuple(value.shape)}")
        inner = [*leaves, *(leaf for leaf, _ in more)]
        if f.values is not None:
            inner.append(f.values)
        found: list[Tensor | None] = [None] * len(inner)
        if inner and value.requires_grad:
            found = list(torch.autograd.grad(value.sum(), inner, retain_graph=True, allow_unused=True))
        pairs = self._cuts.pairs(found[: len(leaves)])
        outside = zip(more, found[len(leaves) :], strict=False)
        pairs += [(source, g) for (_, source), g in outside if g is not None]
        own: list[Tensor | None] = [None] * len(self._parameters)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an operation that is batched by a loop is slower, and as right
            if f.values is not None and found[-1] is not None and self._reach(f.values):
                if self._across:
                    own = across(f.values, found[-1], self._parameters)
                else:
                    pairs.append((f.values, _apart(found[-1])))
            slopes = batched(pairs, self._parameters)
        total = [
            sum((g.reshape(count, -1) for g in both if g is not None), q.new_zeros(count, q.numel()))
            for q, *both in zip(self._parameters, slopes, own, strict=True)
        ]
        return value.detach().reshape(count, -1).sum(1), torch.cat(total, 1)

    def _reach(self, values: Tensor) -> int:
        if not self._reached:
            found = torch.autograd.grad(values.sum(), self._parameters, retain_graph=True, allow_unused=True)
            self._reached = sum(g.numel() for g in found if g is not None)
        return self._reached

    @property
    def _across(self) -> bool:
        """Whether f's own gradient is made coordinate by coordinate: by fewer passes than there are replicates."""
        return self._twice and self._reached is not None and 0 < self._reached <= _DIRECT

    def check(self) -> None:
        """Make a sweep, and some of its replicates again by themselves, from the same draws.

        Raises:
            LoopedError: they differ by more than rounding.
        """
        try:
            self._compare()
        except (LoopedError, RuntimeError):
            if not self._across:
                raise
            self._twice = False
            self._compare()

    def _compare(self) -> None:
        x, f = self.draws(_TRIAL), Folded(self._f, _TRIAL)
        value, gradient = self._sweep_at(x, f)
        per_replicate = max(x.numel() // _TRIAL, gradient.shape[1], 1)
        self._sweep = max(_ELEMENTS // per_replicate, 1)
        if self._across:
            self._sweep = max(_ELEMENTS // (per_replicate * (self._reached or 1)), 1)
        elif self._reached:
            self._sweep = max(min(math.isqrt(_ELEMENTS // per_replicate), _DIRECT), 1)
        self._redo(x, f, (value, gradient), _PLACES)

    def _redo(self, x: Tensor, f: Folded, found: tuple[Tensor, Tensor], places: int) -> None:
        """Make three replicates of a sweep again by themselves, from the same draws, and f alone at some others."""
        value, gradient = found
        eps = torch.finfo(gradient.dtype).eps
        size, slope_size = float(value.abs().amax()), float(gradient.abs().amax())
        limits = eps**0.6 * size, eps**0.6 * slope_size + 1e3 * eps * size
        chosen = _ordinary(gradient.abs().amax(1))
        for r in chosen:
            lone = x[:, r].detach().clone()
            with torch.enable_grad():
                one = self._work.alone(self._cuts.p, lone.requires_grad_(self._work.needs_graph), self._f).sum()
            slope = torch.autograd.grad(one, self._parameters, retain_graph=True, allow_unused=True)
            flat = [
                q.new_zeros(q.numel()) if g is None else g.reshape(-1)
                for q, g in zip(self._parameters, slope, strict=True)
            ]
            for name, mine, alone, limit in (
                ("a value", value[r], one.detach(), limits[0]),
                ("a gradient", gradient[r], torch.cat(flat), limits[1]),
            ):
                refuse_difference(name, mine, alone, limit)
        others = torch.linspace(0, x.shape[1] - 1, min(places + 3, x.shape[1])).long().tolist()
        for r in [r for r in dict.fromkeys(others) if r not in chosen][:places]:
            f.compare_at(r, eps)


def replicas(estimation: Estimation, parameters: tuple[Tensor, ...]) -> Replicas | str:
    """Independent repeats of an estimation in one sweep, or why they must be looped.

    p is copied along a new first batch axis, the estimator is run once on all copies, and f is called once on all
    draws ``[N R, *batch, *event]``; the gradient of each copy is carried to the parameters by one batched pass. Served
    are ``functools.partial(scorefn.expectation, ...)`` without parts that learn, and the joint estimators. Whether a
    sweep is what single runs would be is not taken on trust: some of its replicates are made again by themselves, from
    the same draws, and must agree to rounding; an f that mixes the draws that it is given, and one that is random, is
    found out and looped. ``checked_estimates`` does so for the sweeps that are used, too, whose size is another.

    Args:
        estimation: p, f and estimator.
        parameters: the tensors to differentiate.

    Returns:
        The repeats, or a sentence that says why there are none.
    """
    try:
        found = Replicas(work_of(estimation), Cuts(_distribution(estimation.p)), estimation.f, parameters)
        found.check()
    except torch.OutOfMemoryError:
        raise
    except LoopedError as reason:
        return str(reason)
    except Exception as error:  # what is wrong with the estimation itself, the loop will say in its own words
        return f"the sweep raised {type(error).__name__}: {error}"
    return found


def _distribution(p: Any) -> Distribution:
    if callable(getattr(p, "draws", None)):
        raise LoopedError(f"{type(p).__name__} makes its own draws")
    if not isinstance(p, Distribution):
        raise LoopedError(f"{type(p).__name__} is no torch distribution, so it has no copies")
    return p


def _apart(weight: Tensor) -> Tensor:
    """The weights ``[N, R, *B]`` of the values as one gradient for each copy, ``[R, N, R, *B]``: 0 off the diagonal."""
    own = weight.new_zeros(weight.shape[1], *weight.shape)
    own.diagonal(0, 0, 2).copy_(weight.movedim(1, -1))
    return own


def _ordinary(sizes: Tensor) -> set[int]:
    """Up to three of the replicates, spread over their sizes ``[R]``: neither the largest nor, where many are, 0.

    An extreme replicate is the last that shows an f that looks at extremes: it would be the extreme one alone, too.
    """
    order = sizes.argsort()
    between = order[(sizes[order] > 0) & (sizes[order] < sizes.max())]
    order = between if len(between) >= 3 else order
    return {int(order[len(order) * quarter // 4]) for quarter in (1, 2, 3)}
