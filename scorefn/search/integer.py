"""Search over integers between bounds."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from scorefn.core import ScorefnError, ShapeError
from scorefn.search.factors import chosen, whole_numbers
from scorefn.search.points import Numbers, as_numbers, as_sigma, as_start, is_number
from scorefn.search.ranking import Ranking
from scorefn.search.stopping import Limits
from scorefn.search.strategy import State, Strategy, checked_popsize
from scorefn.search.trust_region import TrustRegion, default_margin, default_popsize, discrete_limits
from scorefn.shaping import utilities_by_rank

_MOST = 2**20  # values of a coordinate: what a generation costs grows with them
_LEAST = 1e-200  # cells of lower probability are never drawn, and their scores would lose digits


class IntegerSearch(Strategy):
    """Minimise over integers by natural-gradient steps of independent discretised normal distributions.

    Coordinate i takes the values ``lower_i, ..., upper_i``; a value has the probability that a normal variable of mean
    m and standard deviation s, rounded and clipped to the bounds, has it::

        P(x) = Phi((x + 1/2 - m)/s) - Phi((x - 1/2 - m)/s)         the cells of lower and upper reach to infinity

    With u the utilities of ``nes_utilities``, a generation of N points does::

        g = sum_k u_k grad log P(x_k)                  the score-function gradient of E u, in m and in log s
        w = (s g_m, g_log_s / sqrt 2)                  whitened by the Fisher information of the normal variable
        m, log s <- m + r s w_m / |w|, log s + r w_log_s / (sqrt 2 |w|)
        N = 4 + floor(3 ln 2 D)

    with r the radius of a trust region, by signal-to-noise ratio. g is the gradient of ``SNES`` averaged over all
    normal variables that would have been rounded to the told points. The Fisher information of P itself is smaller, as
    rounding loses information, and nearly vanishes when s is small: with that of the normal variable r is an upper
    bound of the step's length, and no step leaps over cells.

    m is kept within the bounds, and s between ``0.5 / z`` and the width of the interval, with z the normal quantile of
    ``1 - margin/2``: so a coordinate leaves its nearest integer with a probability of at least ``margin`` (half of it
    at a bound, which has one neighbour), and does not freeze.

    Near values have alike probabilities: where the order means nothing, use ``CategoricalSearch``. Only ranks enter;
    ties and failures as in ``SNES``. O(N D + D K) a generation, with K the widest interval.

    Sources: Akimoto, Shirakawa, Yoshinari, Uchida, Saito & Nishida (2019), "Adaptive stochastic natural gradient method
    for one-shot neural architecture search", ICML, for the trust region; Hamano, Saito, Nomura & Shirakawa (2022),
    "CMA-ES with margin: lower-bounding marginal probability for mixed-integer black-box optimization", GECCO, for the
    margin, here on s alone.

    Args:
        lower: ``[D]``, the smallest values, of size ``2^53`` at most.
        upper: ``[D]``, the largest ones, each above its ``lower``, by less than ``2^20``.
        x0: ``[D]``, where m starts, any numbers within the bounds; None: the middle.
        sigma0: s at the start, one number or ``[D]``; None: a quarter of ``upper - lower + 1``.
        margin: None: ``min(1/D, 0.27)``.
        popsize: N.
        seed: as for ``SNES``.
        limits: as for ``CategoricalSearch``.

    Raises:
        ScorefnError: bounds that are crossed, no integers or too far apart, x0 outside, sigma0 or margin that makes
            no sense; as for ``SNES``.
        ShapeError: bounds, x0 and sigma0 of different lengths.
        NonFiniteError: a bound or x0 is not finite.

    Example:
        >>> import torch
        >>> from scorefn.search import IntegerSearch
        >>> strategy = IntegerSearch([-10, -10], [10, 10], seed=0, ftarget=0.0)
        >>> while not strategy.stop:
        ...     x = strategy.ask()
        ...     strategy.tell(x, (x - torch.tensor([3, -7])).square().sum(1))
        >>> strategy.result.best_x
        tensor([ 3., -7.], dtype=torch.float64)
    """

    method = "integer"

    def __init__(
        self,
        lower: Numbers,
        upper: Numbers,
        *,
        x0: Numbers | None = None,
        sigma0: float | Numbers | None = None,
        margin: float | None = None,
        popsize: int | None = None,
        seed: int | torch.Generator | None = None,
        **limits: float | None,
    ) -> None:
        low, high = _bound(lower, "lower"), _bound(upper, "upper")
        _check_bounds(low, high)
        mean = low + (high - low) / 2 if x0 is None else as_start(x0)
        if mean.shape != low.shape or bool(((mean < low) | (mean > high)).any()):
            raise ScorefnError(
                f"x0 is {mean.tolist()}, but the bounds are {low.tolist()} and {high.tolist()}: start inside them."
            )
        width = high - low + 1
        sigma = as_sigma(width / 4 if sigma0 is None else sigma0, low)
        dimension = len(low)
        least = default_margin(dimension) if margin is None else margin
        if not is_number(least) or not 0 < least < 1:
            raise ScorefnError(
                f"margin must lie between 0 and 1, but it is {margin!r}: it is the least probability of leaving the "
                "nearest integer. Leave it out for min(1/D, 0.27)."
            )
        self._lower, self._upper, self._width = low, high, width
        self._narrowest = 0.5 / math.sqrt(2) / float(torch.erfinv(torch.tensor(1 - least, dtype=torch.float64)))
        default = default_popsize(2 * dimension)
        super().__init__(
            {
                "offset": (width - 1) / 2 if x0 is None else mean - low,  # m less lower: near 2^53 m has no digits left
                "log_scale": self._kept(sigma.log()),
                **TrustRegion(torch.zeros((2, dimension), dtype=torch.float64, device=low.device)).state(),
            },
            settings={"margin": float(least)},
            shape=(checked_popsize(default if popsize is None else popsize, 2, "4 + floor(3 ln 2 D)"), dimension),
            sigma0=sigma,
            seed=seed,
            fixed={"lower": low.tolist(), "upper": high.tolist()},
            limits=Limits.of_options(
                discrete_limits(limits), "IntegerSearch", ("x0", "sigma0", "margin", "popsize", "seed")
            ),
        )

    @property
    def location(self) -> Tensor:
        """``[D]``, m; a copy."""
        location: Tensor = self._lower + self._state["offset"]
        return location

    @property
    def mean(self) -> Tensor:
        """``[D]`` float64, the integers nearest to m: the point to recommend."""
        nearest: Tensor = self._lower + self._state["offset"].round()
        return nearest

    @property
    def continuous_mean(self) -> Tensor:
        """NaN: no coordinate is continuous."""
        return torch.full_like(self._sigma0, torch.nan)

    @property
    def sigma(self) -> Tensor:
        """``[D]``, s."""
        scale: Tensor = self._state["log_scale"].exp()
        return scale

    @property
    def probabilities(self) -> list[Tensor]:
        """P of every value of each coordinate, from lower to upper, ``[K_i]``."""
        table, _, _ = self._cells()
        return [row[: int(width)].clone() for row, width in zip(table, self._width.tolist(), strict=True)]

    def sampled(self) -> Tensor:
        """``[N, D]``, integers in float64."""
        z = torch.randn(self._shape, dtype=torch.float64, device=self._sigma0.device, generator=self._generator)
        return self._within(z.mul_(self.sigma).add_(self._state["offset"]).round_()).add_(self._lower)

    def told(self, x: Numbers) -> Tensor:
        """Integers within the bounds, ``[N, D]``; anything else is refused."""
        return whole_numbers(super().told(x), self._lower, self._upper)

    def learnt(self, points: Tensor, ranking: Ranking) -> State:
        """One natural-gradient step in the trust region."""
        table, by_mean, by_scale = self._cells()
        u = ranking.hand_out(utilities_by_rank(len(ranking), points.device))
        scores = chosen(points - self._lower, u, table.shape[1]) * torch.where(table > _LEAST, 1 / table, 0.0)
        whitened = torch.stack([(scores * by_mean).sum(1) * self.sigma, (scores * by_scale).sum(1) / math.sqrt(2)])
        followed = TrustRegion.of_state(self._state).step(whitened, 2 * self._shape[1])
        if followed is None:
            return self._state
        (by_location, by_width), region = followed
        offset = self._within(self._state["offset"] + self.sigma * by_location)
        log_scale = self._kept(self._state["log_scale"] + by_width / math.sqrt(2))
        return {"offset": offset, "log_scale": log_scale, **region.state()}

    def _within(self, offset: Tensor) -> Tensor:
        """Offsets ``[..., D]`` from lower, clipped to the bounds."""
        return torch.minimum(offset.clamp(min=0), self._width - 1)

    def _kept(self, log_scale: Tensor) -> Tensor:
        least = torch.full_like(log_scale, math.log(self._narrowest))
        return log_scale.clamp(least, torch.maximum(self._width.log(), least))

    def _cells(self) -> tuple[Tensor, Tensor, Tensor]:
        """P and its derivatives in m and in log s, ``[D, K]``; zeros beyond the width of a coordinate."""
        count = int(self._width.max())
        scale = self.sigma.unsqueeze(1)
        index = torch.arange(count - 1, device=scale.device)
        edge = (index + 0.5 - self._state["offset"].unsqueeze(1)) / scale
        inner = index < (self._width - 1).unsqueeze(1)
        density = torch.where(inner, (-edge.square() / 2).exp() / math.sqrt(2 * math.pi), 0.0)
        below = torch.where(inner, torch.special.erfc(-edge / math.sqrt(2)) / 2, 1.0)
        above = torch.where(inner, torch.special.erfc(edge / math.sqrt(2)) / 2, 0.0)
        # a difference of two numbers near 1 has lost the digits of a far cell: take the tail that is small
        left = torch.nn.functional.pad(edge, (1, 0), value=-torch.inf)
        table = torch.where(left < 0, _steps(below, 0.0, 1.0), -_steps(above, 1.0, 0.0))
        return table, -_steps(density, 0.0, 0.0) / scale, -_steps(edge * density, 0.0, 0.0)


def _bound(value: Numbers, name: str) -> Tensor:
    bound = as_numbers(value, name, value.device if isinstance(value, Tensor) else torch.device("cpu"))
    if bound.ndim != 1 or not len(bound):
        raise ShapeError(f"{name} must be one number per coordinate, [D], but it has shape {tuple(bound.shape)}.")
    if not bool((bound == bound.round()).all() & bound.isfinite().all()):
        raise ScorefnError(
            f"{name} must hold integers, but it is {bound.tolist()}: round it, and give every coordinate an end."
        )
    if bool((bound.abs() > 2**53).any()):
        raise ScorefnError(
            f"{name} is {bound.tolist()}, but beyond 2^53 float64, in which points are kept, does not hold every "
            "integer. Shift or scale that coordinate."
        )
    return bound


def _check_bounds(lower: Tensor, upper: Tensor) -> None:
    if lower.shape != upper.shape:
        raise ShapeError(
            f"lower has {len(lower)} numbers and upper {len(upper)}: give both bounds of every coordinate."
        )
    if bool((lower >= upper).any()):
        bad = (lower >= upper).nonzero().flatten().tolist()
        raise ScorefnError(
            f"The bounds are crossed or leave a single value at coordinates {bad[:10]}: lower is {lower.tolist()} and "
            f"upper {upper.tolist()}. Exchange them, or leave such a coordinate out of the search."
        )
    if bool((upper - lower >= _MOST).any()):
        widest = int((upper - lower).argmax())
        raise ScorefnError(
            f"A coordinate may have {_MOST:,} values, but coordinate {widest} has "
            f"{int(upper[widest]) - int(lower[widest]) + 1:,}: their probabilities are tabulated. Search so wide a "
            "range by CSANES, with points that fun rounds."
        )


def _steps(inner: Tensor, first: float, last: float) -> Tensor:
    """Differences from one edge to the next, ``[D, K - 1] -> [D, K]``."""
    ends = [torch.full_like(inner[:, :1], end) for end in (first, last)]
    return torch.cat([ends[0], inner, ends[1]], 1).diff(dim=1)
