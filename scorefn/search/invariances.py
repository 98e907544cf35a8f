"""What a search must not see, as tests that any strategy can be put through.

Each test takes a ``make(x0, sigma0, seed)`` that returns a fresh strategy, and returns a figure; a strategy that fails
raises ``AssertionError`` with the figure. The first three compare two runs on the same random numbers and are exact up
to rounding; the others are statistical, and their false alarm rate is stated.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist
from typing import TypeAlias

import torch
from torch import Tensor
from torch.distributions import Distribution

from scorefn.core import ScorefnError, ShapeError, check_support
from scorefn.search.points import as_integer, is_number
from scorefn.search.strategy import Strategy

Make: TypeAlias = Callable[[Tensor, float, int], Strategy]
"""Makes a strategy of x0 ``[D]``, sigma0 and a seed."""

Objective: TypeAlias = Callable[[Tensor], Tensor]
"""Values ``[N]`` of points ``[N, D]``."""


def check_translation(
    make: Make,
    fun: Objective,
    x0: Tensor,
    sigma0: float,
    shift: Tensor,
    *,
    generations: int = 60,
    tolerance: float = 1e-6,
) -> float:
    """Searching ``fun(x - shift)`` from ``x0 + shift`` is searching fun from x0.

    Args:
        make: makes the strategy.
        fun: a function without ties.
        x0: ``[D]``.
        sigma0: the first standard deviation.
        shift: ``[D]``.
        generations: how long both runs are followed.
        tolerance: the largest deviation that counts as rounding.

    Returns:
        The largest deviation of the means, in standard deviations, and of log sigma.

    Raises:
        AssertionError: it exceeds the tolerance.
        ShapeError: the shift has another shape than x0.

    Example:
        >>> import torch
        >>> from scorefn.search import SNES, check_translation
        >>> x0 = torch.zeros(2, dtype=torch.float64)
        >>> shift = torch.tensor([5.0, -3.0], dtype=torch.float64)
        >>> def make(x0, sigma0, seed):
        ...     return SNES(x0, sigma0, seed=seed)
        >>> def sphere(x):
        ...     return (x - 1).square().sum(1)
        >>> check_translation(make, sphere, x0, 1.0, shift, generations=9) < 1e-9
        True
    """
    if shift.shape != x0.shape:
        raise ShapeError(
            f"shift has shape {tuple(shift.shape)}, but x0 has shape {tuple(x0.shape)}: give one number per coordinate."
        )
    plain = _path(make(x0, sigma0, 0), fun, generations)
    moved = _path(make(x0 + shift, sigma0, 0), lambda x: fun(x - shift), generations)
    return _compared("translation", plain, (moved[0] - shift, moved[1]), tolerance)


def check_scale(
    make: Make,
    fun: Objective,
    x0: Tensor,
    sigma0: float,
    factor: float,
    *,
    generations: int = 60,
    tolerance: float = 1e-6,
) -> float:
    """Searching ``fun(x / factor)`` from ``factor x0`` with ``factor sigma0`` is searching fun from x0.

    Args:
        make: makes the strategy.
        fun: a function without ties.
        x0: ``[D]``.
        sigma0: the first standard deviation.
        factor: the unit of length.
        generations: how long both runs are followed.
        tolerance: the largest deviation that counts as rounding.

    Returns:
        The largest deviation of the means, in standard deviations, and of log sigma.

    Raises:
        AssertionError: it exceeds the tolerance.

    Example:
        >>> import torch
        >>> from scorefn.search import SNES, check_scale
        >>> x0 = torch.zeros(2, dtype=torch.float64)
        >>> def make(x0, sigma0, seed):
        ...     return SNES(x0, sigma0, seed=seed)
        >>> def sphere(x):
        ...     return (x - 1).square().sum(1)
        >>> check_scale(make, sphere, x0, 1.0, factor=1e3, generations=9) < 1e-9
        True
    """
    plain = _path(make(x0, sigma0, 0), fun, generations)
    mean, sigma = _path(make(factor * x0, factor * sigma0, 0), lambda x: fun(x / factor), generations)
    return _compared("scale", plain, (mean / factor, sigma / factor), tolerance)


def check_monotone_transform(
    make: Make,
    fun: Objective,
    x0: Tensor,
    sigma0: float,
    transform: Callable[[Tensor], Tensor] = torch.arcsinh,
    *,
    generations: int = 60,
) -> float:
    """Searching ``transform(fun(x))`` is searching fun, to the bit.

    Args:
        make: makes the strategy.
        fun: a function without ties.
        x0: ``[D]``.
        sigma0: the first standard deviation.
        transform: strictly increasing, also in float64 over the values that are met.
        generations: how long both runs are followed.

    Returns:
        The largest deviation of the means, in standard deviations, and of log sigma: 0.

    Raises:
        AssertionError: it is not 0.

    Example:
        >>> import torch
        >>> from scorefn.search import SNES, check_monotone_transform
        >>> x0 = torch.zeros(2, dtype=torch.float64)
        >>> def make(x0, sigma0, seed):
        ...     return SNES(x0, sigma0, seed=seed)
        >>> def sphere(x):
        ...     return (x - 1).square().sum(1)
        >>> check_monotone_transform(make, sphere, x0, 1.0, torch.log1p, generations=9)
        0.0
    """
    plain = _path(make(x0, sigma0, 0), fun, generations)
    return _compared(
        "monotone transform", plain, _path(make(x0, sigma0, 0), lambda x: transform(fun(x)), generations), 0
    )


def check_rotation(
    make: Make,
    fun: Objective,
    x0: Tensor,
    sigma0: float,
    *,
    generations: int = 100,
    runs: int = 16,
    alarm: float = 1e-3,
) -> float:
    """Searching ``fun(R x)`` from ``R^T x0``, R a random rotation, comes as far as searching fun from x0.

    The best values of so many runs of each kind, every one with a rotation and a seed of its own, are compared by the
    rank-sum test of Mann & Whitney (1947) in its normal approximation. Choose a function that is ill-conditioned along
    the axes, and as many generations as a separable strategy needs to descend it.

    Args:
        make: makes the strategy.
        fun: the function.
        x0: ``[D]``.
        sigma0: the first standard deviation.
        generations: of each run.
        runs: of each kind; 16 can be told apart at most by 4.8 standard deviations.
        alarm: how often a strategy that cannot see the rotation fails.

    Returns:
        The standardised rank sum; positive where the rotated function was harder.

    Raises:
        AssertionError: its size exceeds what the alarm rate allows.
        ScorefnError: runs below 2, or an alarm rate that is none.

    Example:
        >>> import torch
        >>> from scorefn.search import CSANES, check_rotation
        >>> def make(x0, sigma0, seed):
        ...     return CSANES(x0, sigma0, seed=seed)
        >>> def ellipsoid(x):
        ...     return x[:, 0] ** 2 + 1e6 * x[:, 1] ** 2
        >>> x0 = torch.ones(2, dtype=torch.float64)
        >>> z = check_rotation(make, ellipsoid, x0, 1.0, generations=8, runs=4)  # few, to be quick
        >>> abs(z) < 3.3
        True
    """
    _check_alarm(alarm)
    _check_number("runs", runs)
    limit = NormalDist().inv_cdf(1 - alarm / 2)
    best: list[list[float]] = [[], []]
    for seed in range(runs):
        generator = torch.Generator().manual_seed(seed)
        square = torch.randn(2 * (len(x0),), dtype=torch.float64, generator=generator)
        rotation, upper = torch.linalg.qr(square)
        rotation = rotation * upper.diagonal().sign()
        for kind, turn in enumerate((torch.eye(len(x0), dtype=torch.float64), rotation)):
            strategy = make(turn.T @ x0, sigma0, 2 * seed + kind)
            _path(strategy, _turned(fun, turn), generations)
            best[kind].append(strategy.result.best_f)
    plain, rotated = torch.tensor(best, dtype=torch.float64)
    wins = float((rotated.unsqueeze(1) - plain).sign().sum()) / 2
    z = wins / math.sqrt(runs * runs * (2 * runs + 1) / 12)
    _require(abs(z) <= limit, f"rotation: the best values differ by {z:.1f} standard deviations (limit {limit:.1f}).")
    return z


def check_neutral_selection(
    make: Make, dimension: int, *, generations: int = 20, runs: int = 200, alarm: float = 1e-3
) -> tuple[float, float]:
    """Random values move neither the mean nor the volume of the distribution.

    Over independent runs on values that have nothing to do with the points, the drift of the mean (``D`` coordinates)
    and of log sigma, the D-th root of the volume, are compared with their standard errors. The volume is taken from
    ``20 D`` points of ``ask`` before and after; ``(log det after - log det before)/(2 D)`` is without bias where the
    points are a linear image of the same random numbers in both.

    Args:
        make: makes the strategy.
        dimension: D.
        generations: of each run.
        runs: how many.
        alarm: how often a strategy without drift fails, by Bonferroni over the ``D + 1`` figures.

    Returns:
        The drift of log sigma over a whole run, and its standard error.

    Raises:
        AssertionError: log sigma or the mean drifts by more than the alarm rate allows.
        ScorefnError: runs below 2, or an alarm rate that is none.

    Example:
        >>> from scorefn.search import SNES, check_neutral_selection
        >>> def make(x0, sigma0, seed):
        ...     return SNES(x0, sigma0, seed=seed)
        >>> # few, to be quick
        >>> drift, error = check_neutral_selection(make, 2, generations=5, runs=10)
        >>> abs(drift) < 3.6 * error
        True
    """
    _check_alarm(alarm)
    _check_number("runs", runs)
    limit = NormalDist().inv_cdf(1 - alarm / (2 * (dimension + 1)))
    drifts = []
    for seed in range(runs):
        strategy = make(torch.zeros(dimension, dtype=torch.float64), 1.0, seed)
        generator = torch.Generator().manual_seed(seed)
        before = _log_scale(strategy, dimension)
        for _ in range(generations):
            x = strategy.ask()
            strategy.tell(x, torch.rand(len(x), dtype=torch.float64, generator=generator))
        after = _log_scale(strategy, dimension)
        drifts.append(torch.cat([strategy.result.mean, strategy.result.mean.new_tensor([after - before])]))
    table = torch.stack(drifts)
    drift, error = table.mean(0), table.std(0) / math.sqrt(runs)
    z = (drift / error).abs()
    _require(
        float(z.max()) <= limit,
        f"neutral selection: over {generations} generations log sigma drifts by {float(drift[-1]):.4f} "
        f"+- {float(error[-1]):.4f}, and the mean by up to {float(z[:-1].max()):.1f} standard errors (limit "
        f"{limit:.1f}).",
    )
    return float(drift[-1]), float(error[-1])


def check_score_mean(
    distribution: Distribution, parameters: list[Tensor], *, num_samples: int = 1000, alarm: float = 1e-3, seed: int = 0
) -> float:
    """The score of a distribution, ``grad log p(x)`` at its own draws, has mean zero.

    So it must wherever a score-function gradient is to be one; a density that is not normalised, or a sampler that
    belongs to another density breaks it. A support that moves with a parameter breaks the identity too, but not always
    this mean; it is refused where the distribution declares it.

    Args:
        distribution: whose ``log_prob`` is a function of the parameters.
        parameters: tensors that require grad.
        num_samples: how many draws.
        alarm: how often a correct distribution fails, by Bonferroni over the coordinates.
        seed: of the draws; torch's global generator is put back.

    Returns:
        The largest mean score of a coordinate, in standard errors.

    Raises:
        AssertionError: it exceeds what the alarm rate allows.
        ScorefnError: log_prob does not depend on the parameters, or there are none; num_samples below 2, or an alarm
            rate that is none.
        SupportError: the support moves with a parameter.

    Example:
        >>> import torch
        >>> from scorefn.search import check_score_mean
        >>> class Shifted(torch.distributions.Normal):  # the density is that of other draws
        ...     def log_prob(self, x):
        ...         return super().log_prob(x + 1)
        >>> loc = torch.zeros(2, requires_grad=True)
        >>> check_score_mean(torch.distributions.Normal(loc, 1.0), [loc], num_samples=100) < 3.5
        True
        >>> check_score_mean(Shifted(loc, 1.0), [loc], num_samples=100)
        Traceback (most recent call last):
        AssertionError: score: the mean of a coordinate is ... standard errors from zero (limit 3.5).
    """
    _check_alarm(alarm)
    _check_number("num_samples", num_samples)
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    if not parameters:
        raise ScorefnError("parameters is empty, but a score is a derivative in something: give the tensors.")
    check_support(distribution)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        x = distribution.sample(torch.Size([num_samples]))
    log_prob = distribution.log_prob(x).reshape(num_samples, -1).sum(1)
    if not log_prob.requires_grad:
        raise ScorefnError(
            "log_prob does not depend on the parameters: build the distribution from tensors that require grad."
        )
    rows = torch.eye(num_samples, dtype=log_prob.dtype)
    found = torch.autograd.grad(log_prob, parameters, rows, is_grads_batched=True)
    scores = torch.cat([part.reshape(num_samples, -1) for part in found], 1).double()
    limit = NormalDist().inv_cdf(1 - alarm / (2 * scores.shape[1]))
    error = scores.std(0) / math.sqrt(num_samples)
    z = float((scores.mean(0) / error.clamp(min=torch.finfo(error.dtype).tiny)).abs().max())
    _require(z <= limit, f"score: the mean of a coordinate is {z:.1f} standard errors from zero (limit {limit:.1f}).")
    return z


def _turned(fun: Objective, rotation: Tensor) -> Objective:
    return lambda x: fun(x @ rotation.T)


def _path(strategy: Strategy, fun: Objective, generations: int) -> tuple[Tensor, Tensor]:
    """Means and standard deviations ``[G, D]``."""
    means, sigmas = [], []
    for _ in range(generations):
        x = strategy.ask()
        strategy.tell(x, fun(x))
        result = strategy.result
        means.append(result.mean)
        sigmas.append(result.sigma)
    return torch.stack(means), torch.stack(sigmas)


def _compared(what: str, plain: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor], tolerance: float) -> float:
    mean = ((other[0] - plain[0]) / plain[1]).abs().max()
    sigma = (other[1] / plain[1]).log().abs().max()
    figure = float(torch.maximum(mean, sigma))
    _require(figure <= tolerance, f"{what}: the runs differ by {figure:.1e} standard deviations (limit {tolerance:g}).")
    return figure


def _log_scale(strategy: Strategy, dimension: int) -> float:
    """``log det(C)/(2 D)`` of the second moments C of 20 D points around the mean."""
    x = torch.cat([strategy.ask() for _ in range(math.ceil(20 * dimension / strategy.popsize))]) - strategy.mean
    return float(torch.linalg.slogdet(x.T @ x / len(x))[1]) / (2 * dimension)


def _check_alarm(alarm: float) -> None:
    if not is_number(alarm) or not 0 < alarm < 1:
        raise ScorefnError(
            f"alarm must lie between 0 and 1, but it is {alarm!r}: it is how often what is right fails the test."
        )


def _check_number(name: str, number: int) -> None:
    count = as_integer(number)
    if count is None or count < 2:
        raise ScorefnError(f"{name} must be an integer of at least 2, but it is {number!r}: one alone has no spread.")


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise AssertionError(message)
