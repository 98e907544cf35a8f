"""How many particles a step should take, from where its noise comes from and what it costs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TypeVar

import torch
from torch import Tensor

from scorefn.core import NonFiniteError, ScorefnError, ShapeError, check_count
from scorefn.core.representation import representation

Batch = TypeVar("Batch")


@dataclass(frozen=True)
class Allocation:
    """Noise and cost of a gradient with K particles, and the K that makes the most of both.

    A step on one minibatch has a gradient of total variance ``V_b + V_w/K`` and costs ``c0 + c1 K``; B minibatches
    divide the one and multiply the other by B. To reach a given precision costs their product, whatever B is::

        (V_b + V_w/K)(c0 + c1 K) = V_b c0 + V_w c1 + V_b c1 K + V_w c0 / K

    whose derivative ``V_b c1 - V_w c0 / K^2`` vanishes at ``K* = sqrt(c0 V_w / (c1 V_b))``: particles are worth it
    while the noise that they remove and the cost that they share outweigh the noise that only more data removes.
    Source: Cochran (1977), "Sampling techniques", 3rd ed., section 10.6 (subsampling in two stages).

    Args:
        within: V_w, the variance of one particle given the minibatch, summed over coordinates.
        between: V_b, the variance between minibatches of the exact gradient; 0 where every step sees all data.
        fixed_cost: c0, of a step whatever K is.
        particle_cost: c1, of each particle.
        least: fewer particles are not recommended (leave-one-out needs 2).

    Raises:
        ScorefnError: a variance or cost that is no number, negative or not finite, or a step that costs nothing; from
            ``variance``, ``cost`` and ``price``, particles that are no number above 0.

    Example:
        >>> from scorefn.diagnostics import Allocation
        >>> noise = Allocation(within=4.0, between=1.0, fixed_cost=1.0, particle_cost=0.25)
        >>> noise.num_particles, noise.price(4)
        (4, 4.0)
        >>> noise.price(1), noise.price(16)  # too few, and too many
        (6.25, 6.25)
    """

    within: float
    between: float
    fixed_cost: float
    particle_cost: float
    least: int = 1

    __repr__ = representation

    def __post_init__(self) -> None:
        """Refuse what is no variance and no cost."""
        for name in ("within", "between", "fixed_cost", "particle_cost"):
            if not (_finite(value := getattr(self, name)) and value >= 0):
                raise ScorefnError(f"{name} must be finite and not negative, but it is {value!r}.")
        if self.fixed_cost == self.particle_cost == 0:
            raise ScorefnError("A step costs nothing: fixed_cost and particle_cost are both 0. Measure at least one.")
        check_count("least", self.least)

    def variance(self, num_particles: float) -> float:
        """``V_b + V_w/K``."""
        return self.between + self.within / _positive(num_particles)

    def cost(self, num_particles: float) -> float:
        """``c0 + c1 K``."""
        return self.fixed_cost + self.particle_cost * _positive(num_particles)

    def price(self, num_particles: float) -> float:
        """Variance x cost: what a unit of precision costs."""
        return self.variance(num_particles) * self.cost(num_particles)

    @property
    def optimum(self) -> float:
        """K*, not rounded; infinite without noise between minibatches or without cost of particles."""
        numerator, denominator = self.fixed_cost * self.within, self.particle_cost * self.between
        return math.sqrt(numerator / denominator) if denominator > 0 else math.inf if numerator > 0 else 0.0

    @property
    def num_particles(self) -> int:
        """The integer K of the least price; where the price falls for ever, the first within twice its limit.

        That is K = c0/c1, at which particles cost as much as the rest of the step. Where they cost nothing measurable,
        it is K = V_w/V_b, at which they are as noisy as minibatches; without either, ``least``: nothing tells.
        """
        best = self.optimum
        if best < math.inf:
            around = [max(self.least, math.floor(best)), max(self.least, math.ceil(best))]
            return min(around, key=self.price)
        if self.particle_cost > 0:
            enough = self.fixed_cost / self.particle_cost
        else:
            enough = self.within / self.between if self.between > 0 else 0.0
        return max(self.least, math.ceil(enough))


def _finite(value: object) -> bool:
    """Whether this is a finite number: a tensor or NumPy's, too."""
    try:
        return hasattr(value, "__float__") and math.isfinite(value)
    except (TypeError, ValueError, RuntimeError):  # several numbers
        return False


def _positive(num_particles: float) -> float:
    """K, or ScorefnError where no step has so many."""
    if not (_finite(num_particles) and num_particles > 0):
        raise ScorefnError(
            f"num_particles must be finite and above 0, but it is {num_particles!r}: a step without particles has no "
            "gradient, of no variance and no price."
        )
    return num_particles


def check_gradients(gradients: object, shape: str) -> None:
    """Refuse what is no tensor of real numbers."""
    if not isinstance(gradients, Tensor) or gradients.is_complex():
        kind = f"a tensor of {gradients.dtype}" if isinstance(gradients, Tensor) else f"a {type(gradients).__name__}"
        raise ScorefnError(
            f"gradients must be a tensor of real numbers, {shape}, but it is {kind}: use torch.as_tensor(...) for an "
            "array, and torch.stack(...) for several tensors."
        )


def variance_split(gradients: Tensor, num_particles: int) -> tuple[float, float]:
    """V_w and V_b, from estimates of one gradient repeated on each of several minibatches.

    With g_rm the m-th of M independent estimates of K particles on minibatch r of R, each without bias::

        V_w = K sum_rm |g_rm - g_r|^2 / (R (M - 1))
        V_b = sum_r |g_r - g|^2 / (R - 1) - V_w/(K M)

    g_r and g being means: the one-way analysis of variance, summed over coordinates. A single minibatch has V_b = 0.
    By chance V_b can be negative; ``allocate`` takes that for 0. Source: Cochran (1977), "Sampling techniques", 3rd
    ed., section 10.3 (subsampling in two stages).

    Args:
        gradients: ``[R, M, P]``.
        num_particles: K, of every estimate.

    Raises:
        ScorefnError: gradients that are no tensor of real numbers.
        ShapeError: another shape, or fewer than two estimates per minibatch.
        NonFiniteError: a gradient that is NaN or infinite.

    Example:
        >>> import torch
        >>> from scorefn.diagnostics import variance_split
        >>> gradients = torch.tensor([[[1.0], [3.0]], [[5.0], [7.0]]])  # 2 minibatches, met twice
        >>> variance_split(gradients, num_particles=2)
        (4.0, 7.0)
    """
    K = check_count("num_particles", num_particles)
    check_gradients(gradients, "[R, M, P]")
    if gradients.ndim != 3 or gradients.shape[0] < 1 or gradients.shape[1] < 2:
        raise ShapeError(
            f"gradients has shape {tuple(gradients.shape)}, but it must be [R, M, P] with M at least 2: only two "
            "estimates on one minibatch tell its noise from that between minibatches."
        )
    if not bool(gradients.isfinite().all()):
        raise NonFiniteError("A gradient is NaN or infinite, so it has no variance. Look at log p and log q there.")
    R, M = gradients.shape[:2]
    values = gradients.detach().double()
    means = values.mean(1)
    within = float((values - means.unsqueeze(1)).square().sum()) / (R * (M - 1))
    if R == 1:
        return K * within, 0.0
    return K * within, float((means - means.mean(0)).square().sum()) / (R - 1) - within / M


def cost_split(seconds: Mapping[int, float]) -> tuple[float, float]:
    """c0 and c1 of the line ``c0 + c1 K`` through seconds per step, by least squares; neither below 0.

    Args:
        seconds: by number of particles, at least two of them.

    Raises:
        ScorefnError: no mapping; fewer than two different numbers of particles, one that is no integer of at least 1,
            or seconds that are not positive.

    Example:
        >>> from scorefn.diagnostics import cost_split
        >>> cost_split({1: 3.0, 3: 7.0})  # 1 second a step, and 2 for each particle
        (1.0, 2.0)
    """
    if not isinstance(seconds, Mapping):
        raise ScorefnError(
            f"seconds must map numbers of particles to seconds per step, such as {{8: 0.1, 32: 0.3}}, but it is a "
            f"{type(seconds).__name__}."
        )
    for K in seconds:
        check_count("Each number of particles", K)
    if len(seconds) < 2:
        raise ScorefnError(
            f"Seconds were measured with {sorted(seconds)} particles only, but a line needs two different numbers."
        )
    if bad := {K: s for K, s in seconds.items() if not (_finite(s) and s > 0)}:
        raise ScorefnError(f"Seconds per step must be positive, but they are {bad} (by number of particles).")
    x, y = list(seconds), list(seconds.values())
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    square = sum((a - mean_x) ** 2 for a in x)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / square
    if slope <= 0:
        return mean_y, 0.0
    if slope * mean_x >= mean_y:  # the best line through the origin
        return 0.0, sum(a * b for a, b in zip(x, y, strict=True)) / sum(a * a for a in x)
    return mean_y - slope * mean_x, slope


def allocate(
    estimate: Callable[[Batch, int], Tensor],
    params: Tensor | Iterable[Tensor],
    batches: Sequence[Batch],
    *,
    num_particles: int = 8,
    repeats: int = 2,
    overhead: float = 0.0,
) -> Allocation:
    """Measure noise and cost of a gradient, and recommend a number of particles.

    Each minibatch is met ``repeats`` times with K particles and once with 4 K, in turns, so that drift meets all
    alike; costs are medians of CPU seconds. The answer belongs to the parameters as they are: ask again every few
    hundred steps. With leave-one-out a variance falls a little faster than 1/K where K is small, so that a
    recommendation far from the K measured with is worth a second measurement there.

    Args:
        estimate: ``estimate(batch, num_particles)``, a differentiable scalar, such as a loss; draws afresh each time.
        params: the tensors to differentiate.
        batches: as the training meets them: 30 or more make V_b worth reading. A single one means that every step sees
            the same data: V_b is 0, and ``repeats`` must be large, as it alone tells V_w.
        num_particles: K.
        repeats: M, at least 2.
        overhead: CPU seconds of a step outside the estimate (optimiser, loading), added to c0.

    Raises:
        ScorefnError: no batches, fewer than 2 repeats, no parameters or an estimate without gradient.
        NonFiniteError: a gradient that is NaN or infinite.

    Example:
        >>> import torch, scorefn as sf
        >>> from scorefn.diagnostics import allocate
        >>> theta = torch.zeros((), requires_grad=True)
        >>> def loss(batch, num_particles):
        ...     p = torch.distributions.Normal(theta, 1.0)
        ...     return sf.expectation(p, lambda x: (x - batch).square(), num_particles)
        >>> found = allocate(loss, theta, [-1.0, 0.0, 1.0])
        >>> found.within > 0, found.fixed_cost + found.particle_cost > 0, found.num_particles >= 2
        (True, True, True)
    """
    K, M = check_count("num_particles", num_particles), check_count("repeats", repeats)
    if M < 2:
        raise ScorefnError("repeats must be at least 2: one estimate on a minibatch says nothing about its noise.")
    if not len(batches):
        raise ScorefnError("There are no batches to measure on: give at least one, [()] where the data never change.")
    parameters = (params,) if isinstance(params, Tensor) else tuple(params)
    if not parameters:
        raise ScorefnError("There are no parameters to differentiate: pass tensors that require grad.")
    seconds: dict[int, list[float]] = {K: [], 4 * K: []}

    def timed(batch: Batch, count: int) -> Tensor:
        start = time.process_time()
        value = estimate(batch, count)
        if not isinstance(value, Tensor) or value.ndim or not value.requires_grad:
            raise ScorefnError(
                "estimate(batch, num_particles) must return a scalar tensor that requires grad, but it returned "
                f"{f'shape {tuple(value.shape)}' if isinstance(value, Tensor) else type(value).__name__}."
            )
        found = torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True)
        seconds[count].append(time.process_time() - start)
        return torch.cat([gradient.reshape(-1) for gradient in found])

    rows = []
    for batch in batches:
        rows.append(torch.stack([timed(batch, K) for _ in range(M)]))
        timed(batch, 4 * K)
    while len(seconds[4 * K]) < min(M, 10):  # a single batch
        timed(batches[0], 4 * K)
    within, between = variance_split(torch.stack(rows), K)
    fixed, particle = cost_split({count: max(median(found), 1e-9) for count, found in seconds.items()})
    return Allocation(within, max(between, 0.0), fixed + overhead, particle, least=min(K, 2))
