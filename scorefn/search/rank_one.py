"""Natural evolution of a diagonal and one direction: what coordinates alone cannot say, at the price of a vector."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scorefn.search.mirrored import Directions, MirroredStrategy
from scorefn.search.path_rates import PathRates
from scorefn.search.points import Numbers, as_sigma, as_start
from scorefn.search.ranking import Ranking
from scorefn.search.stopping import Limits
from scorefn.search.strategy import State, check_overflow

_TRUST = 0.7


class RankOneCSANES(MirroredStrategy):
    """Minimise by natural-gradient steps of a normal distribution with covariance ``sigma^2 d (I + v v^T) d``.

    In the field's terms this is a restricted-covariance NES, close to CR-FM-NES: the covariance model and the natural
    gradient of VD-CMA, the paths and active weights of ``CSANES``; with d constant it would be R1-NES. d is a diagonal
    and v a vector, ``det(d (I + v v^T) d) = 1``. With ``e = v/|v|`` and ``g = 1 + |v|^2``, a generation is
    ``m +- sigma d y_k``, ``y_k = z_k + (sqrt g - 1) (e . z_k) e``, for N/2 directions z. The weights w and v_k, the
    path p, the step size and the rates c_s, d_s and c_c are those of ``CSANES``; the path q is that of
    ``sum_k w_k y_k``. With squares and products of vectors taken coordinate by coordinate, a point y has the scores::

        T(y) = (e . y) y - ((e . y)^2 + g)/2 e          in v, times |v|
        s(y) = y^2 - |v|^2/g (e . y) e y - 1            in log d

        T, s = c_mu sum_k v_k (T, s)(y_k) + c_1 (T, s)(q)
        c_mu = mu/(mu + 60 + 3 sqrt D),    c_1 = (D + 2)/(3 ((D + 1.3)^2 + mu))

    The natural gradient (n_v, n_d) in v and log d is, with ``E = e^2``, ``b = 2 a^2 - (1 - a^2) |v|^4/g``,
    ``H = 2 - (b + 2 a^2) E`` and ``a = min(1, sqrt(|v|^4 + (2 g - sqrt g)/max E)/(2 + |v|^2))``::

        r   = s - a/g ((2 + |v|^2) T e - |v|^2 (e . T) E)
        n_d = r/H - b (r . E/H)/(1 + b (E . E/H)) E/H
        n_v = (T - a ((2 + |v|^2) n_d e - (E . n_d) e))/|v|

    (a < 1 weakens what the metric says of d and v together, so that H stays positive.) The part ``-a v n_d`` of n_v
    undoes what the change of d does to the long axis ``d v``: it is applied as ``v <- v exp(-a n_d)`` beside
    ``d <- d exp(n_d)``, so that the noise of the diagonal does not bend the axis. Both are shortened where a relative
    change would pass .7. Time and memory are O(N D).

    What needs more than one direction, such as a rotated ellipsoid, this method cannot learn.

    Sources: Akimoto, Auger & Hansen (2014), "Comparison-based natural gradient optimization in high dimension", GECCO,
    section 3, for the natural gradient; Nomura & Ono (2022), "Fast moving natural evolution strategy for
    high-dimensional problems", CEC, for its use with a path of the step size; and those of ``CSANES``.

    Args:
        x0: ``[D]``, where the mean starts; the search runs on its device.
        sigma0: the initial standard deviation, one number or ``[D]``.
        popsize: N, even; None: ``2 floor(5 + 1.6 ln D)``.
        dtype: of the points, torch.float64 or torch.float32; the state is kept in float64.
        seed: of the strategy's own generator, which also draws the first v; see ``SNES``.
        limits: when to stop, in pycma's words; see ``SNES``.

    Raises:
        ScorefnError: sigma0, popsize, dtype or a limit that makes no sense; an unknown limit.
        ShapeError: x0 is not one point.
        NonFiniteError: x0 is not finite.

    Example:
        >>> import torch
        >>> from scorefn.search import RankOneCSANES
        >>> strategy = RankOneCSANES(torch.zeros(5), sigma0=1.0, seed=0, ftarget=1e-4)
        >>> while not strategy.stop:
        ...     x = strategy.ask() - 1
        ...     along = x.mean(-1, keepdim=True)
        ...     f = 10 * along.squeeze(-1) ** 2 + 1e4 * (x - along).square().sum(-1)
        ...     strategy.tell(x + 1, f)
        >>> strategy.stop
        {'ftarget': 0.0001}
    """

    method = "rank_one"

    def __init__(
        self,
        x0: Numbers,
        sigma0: float | Numbers,
        *,
        popsize: int | None = None,
        dtype: torch.dtype = torch.float64,
        seed: int | torch.Generator | None = None,
        **limits: float | None,
    ) -> None:
        start = as_start(x0)
        sigma = as_sigma(sigma0, start)
        dimension = len(start)
        super().__init__(
            {
                "mean": start,
                "log_sigma": 0.0,
                "log_shape": sigma.log(),
                "direction": torch.zeros_like(start),
                "sigma_path": torch.zeros_like(start),
                "shape_path": torch.zeros_like(start),
                "updates": 0,
            },
            settings={},
            sigma0=sigma,
            popsize=popsize,
            dtype=dtype,
            seed=seed,
            limits=Limits.of_options(limits, "RankOneCSANES", ("popsize", "dtype", "seed")),
        )
        self._rates = _RankOneRates(self.popsize, dimension, start.device)
        noise = torch.randn(dimension, dtype=torch.float64, device=start.device, generator=self._generator)
        v = noise / math.sqrt(dimension)
        log_shape = sigma.log() - v.square().log1p() / 2  # the standard deviations are sigma0
        excess = _log_volume(log_shape, v)
        self._state |= {"log_sigma": float(excess), "log_shape": log_shape - excess, "direction": v}

    @property
    def sigma(self) -> Tensor:
        """``[D]``, the standard deviations of the coordinates."""
        widened: Tensor = self._scale() * (1 + self._state["direction"].square()).sqrt()
        return widened

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; see ``Strategy``."""
        super().load_state_dict(state)
        self._rates = _RankOneRates(self.popsize, self._shape[1], self._sigma0.device)

    def stretched(self, z: Tensor) -> Tensor:
        """``sigma d y``."""
        axis, root = self._axis()
        e = axis.to(z.dtype)
        return torch.addcmul(z, (z @ e).unsqueeze(1), (root - 1) * e).mul_(self._scale().to(z.dtype))

    def local(self, steps: Tensor) -> Tensor:
        """The z of which steps are ``sigma d y``."""
        e, root = self._axis()
        y = steps / self._scale()
        return torch.addcmul(y, (y @ e).unsqueeze(1), (1 / root - 1) * e)

    def learnt(self, points: Tensor, ranking: Ranking) -> State:
        """One step of the mean, the two paths, the step size, the diagonal and the direction."""
        state, rates, dimension = self._state, self._rates, self._shape[1]
        directions, v = self.directions(points), state["direction"]
        e, root = self._axis()
        w, n = ranking.hand_out(rates.weights).unbind(1)
        square = directions.square_lengths()
        s = directions.first(w)
        step = s + (root - 1) * (e @ s) * e
        mean = state["mean"] + self._scale() * step
        p, q, growth = rates.walked(state, s, step)
        log_sigma = state["log_sigma"] + growth
        weights = rates.c_mu * (w + n * dimension / square)
        sums = _Sums.of(directions, weights, e, root)
        along = e @ q
        sums = _Sums(
            sums.total + rates.c_1,
            sums.squares + rates.c_1 * q.square(),
            sums.products + rates.c_1 * along * q,
            sums.lengths + rates.c_1 * along.square(),
        )
        change, keep, turn = natural_step(v, *sums.scores(e, root))
        log_shape = state["log_shape"] + change
        direction = v * (-keep * change).exp() + turn
        direction = direction * (1e-6 / torch.linalg.vector_norm(direction)).clamp(min=1)
        excess = _log_volume(log_shape, direction)
        log_shape = log_shape - excess
        check_overflow(
            "the mean or the covariance", float(square.max().sqrt()), mean, (log_shape + log_sigma).exp(), direction
        )
        return {
            "mean": mean,
            "log_sigma": log_sigma,
            "log_shape": log_shape,
            "direction": direction,
            "sigma_path": p,
            "shape_path": q * (excess - change).exp(),
            "updates": state["updates"] + 1,
        }

    def _scale(self) -> Tensor:
        """``sigma d``, ``[D]``."""
        scale: Tensor = (self._state["log_shape"] + self._state["log_sigma"]).exp()
        return scale

    def _axis(self) -> tuple[Tensor, float]:
        """e ``[D]`` and ``sqrt g``."""
        v = self._state["direction"]
        length = float(torch.linalg.vector_norm(v))
        return v / length, math.hypot(1.0, length)


class _RankOneRates(PathRates):
    """See ``RankOneCSANES``."""

    def __init__(self, num: int, dimension: int, device: torch.device) -> None:
        super().__init__(num, dimension, device)
        self.c_1 *= (dimension + 2) / 12
        self.c_mu = self.mu / (self.mu + 60 + 3 * math.sqrt(dimension))


class _Sums(NamedTuple):
    """What the scores of weighted points y add up from.

    Attributes:
        total: of the weights, ``[]``.
        squares: ``[D]``, of ``y^2``.
        products: ``[D]``, of ``(e . y) y``.
        lengths: of ``(e . y)^2``, ``[]``.
    """

    total: Tensor
    squares: Tensor
    products: Tensor
    lengths: Tensor

    @staticmethod
    def of(directions: Directions, weights: Tensor, e: Tensor, root: float) -> _Sums:
        """Of points with weights ``[N]``; y is never formed: its sums follow from those of z."""
        along = (directions.z @ e.to(directions.z.dtype)).double()
        even = directions.even(weights)
        projected = ((even * along).to(directions.z.dtype) @ directions.z).double()
        lengths = even @ along.square()
        squares = directions.second(weights) + 2 * (root - 1) * e * projected + (root - 1) ** 2 * lengths * e.square()
        products = root * (projected + (root - 1) * lengths * e)
        return _Sums(weights.sum(), squares, products, root**2 * lengths)

    def scores(self, e: Tensor, root: float) -> tuple[Tensor, Tensor]:
        """T and s, each ``[D]``."""
        g = root**2
        in_v = self.products - (self.lengths + g * self.total) / 2 * e
        return in_v, self.squares - (g - 1) / g * e * self.products - self.total


def natural_step(v: Tensor, in_v: Tensor, in_d: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The natural gradient of ``RankOneCSANES``, shortened where it is too long to be believed.

    Args:
        v: ``[D]``.
        in_v: T, the score in v times ``|v|``, ``[D]``.
        in_d: s, the score in log d, ``[D]``.

    Returns:
        ``n_d`` ``[D]``, the number a, and the rest ``n_v + a v n_d`` ``[D]``.
    """
    square = v @ v
    length, g = square.sqrt(), 1 + square
    e = v / length
    E = e.square()
    a = ((square.square() + (2 * g - g.sqrt()) / E.max()).sqrt() / (2 + square)).clamp(max=1)
    b = 2 * a.square() - (1 - a.square()) * square.square() / g
    over = 1 / (2 - (b + 2 * a.square()) * E)
    r = in_d - a / g * ((2 + square) * in_v * e - square * (e @ in_v) * E)
    n_d = over * (r - b * (r @ (E * over)) / (1 + b * (E @ (E * over))) * E)
    rest = (in_v - a * (2 * n_d * e - (E @ n_d) * e)) / length
    share = torch.stack([_TRUST * length / torch.linalg.vector_norm(rest), _TRUST / n_d.abs().max()]).min().clamp(max=1)
    return share * n_d, a, share * rest


def _log_volume(log_shape: Tensor, v: Tensor) -> Tensor:
    """``log det(d (I + v v^T) d)/(2 D)``, ``[]``."""
    return log_shape.mean() + (v @ v).log1p() / (2 * len(v))
