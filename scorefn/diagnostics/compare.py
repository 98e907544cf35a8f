"""Several estimators of one gradient, measured on the same problem and ranked by what precision costs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from scorefn.core import ScorefnError
from scorefn.core.representation import representation
from scorefn.diagnostics.equivalence import critical_z
from scorefn.diagnostics.estimation import Estimate, Estimator, as_estimate, checked_parameters
from scorefn.diagnostics.prices import FEWEST, Cost, Measurement, check_cost, prices_of, seconds
from scorefn.diagnostics.statistics import evaluations_of, interleaved, matching
from scorefn.diagnostics.summary import GradientStatistics

if TYPE_CHECKING:
    from scorefn.core import Integrand, Measure


@dataclass(frozen=True)
class Comparison:
    """Estimators on one problem, ranked by variance x cost, the best first; ``print`` shows a table.

    From ``compare`` and ``recommend``. The price of an estimator is ``total_variance * cost``, in the unit of the cost
    times that of a squared gradient: N estimates divide the one factor and multiply the other.

    One whose bias is visible is ranked after all others, whatever its price, and marked ``!``.

    Attributes:
        names: ranked.
        statistics: by name.
        bias_z: by name, the largest ``|mean - exact| / standard error`` over the coordinates; empty without an exact
            gradient.
        prices: by name, total variance x cost of one estimate: what one unit of precision costs.
        intervals: by name, (low, high) of the price; the cost is resampled where it depends on CPU seconds. (0, inf)
            for fewer than 8 repeats.
        probability_best: by name, the share of resamples in which its price is the least, among those that are not
            marked; equal prices share it.
        critical_z: by name, from where a bias is visible: exceeded by an unbiased estimate with a probability of about
            1e-6, over all coordinates together.
        cost_name: of the function that gave the costs.
        confidence: of the intervals.

    Example:
        >>> import torch, scorefn as sf
        >>> from scorefn.diagnostics import compare
        >>> logits = torch.zeros(2, requires_grad=True)
        >>> p, f = torch.distributions.Bernoulli(logits=logits), lambda x: x.prod(-1)
        >>> estimates = {"DisARM": (p, f, sf.DisARM(2)), "exact": (p, f, sf.Enumerate())}
        >>> found = compare(estimates, logits, repeats=10, cost=sf.diagnostics.evaluations)
        >>> found.names, found.cost("exact"), found.biased
        (('exact', 'DisARM'), 0.0, ())
        >>> found.statistics["DisARM"].evaluations
        4
    """

    names: tuple[str, ...]
    statistics: Mapping[str, GradientStatistics]
    bias_z: Mapping[str, float]
    prices: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]]
    probability_best: Mapping[str, float]
    critical_z: Mapping[str, float]
    cost_name: str = "seconds"
    confidence: float = 0.95

    __repr__ = representation

    @property
    def biased(self) -> tuple[str, ...]:
        """Those whose bias is visible, in the order of the ranking."""
        return tuple(name for name in self.names if self.bias_z.get(name, 0.0) > self.critical_z[name])

    def cost(self, name: str) -> float:
        """Total variance x cost: what one unit of precision costs."""
        return self.prices[name]

    def _rows(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """The heading and the cells of the table."""
        heading = ("estimator", "variance", "SNR", "ms", "f calls", f"variance x {self.cost_name}", "interval")
        rows: list[tuple[str, ...]] = []
        for name in self.names:
            s, (low, high) = self.statistics[name], self.intervals[name]
            z = "-" if name not in self.bias_z else f"{self.bias_z[name]:.2f}{'!' * (name in self.biased)}"
            rows.append(
                (
                    name,
                    f"{s.total_variance:.4g}",
                    f"{s.signal_to_noise:.3g}",
                    f"{1e3 * s.seconds:.3f}",
                    "-" if s.evaluations is None else str(s.evaluations),
                    f"{self.prices[name]:.4g}",
                    f"{low:.3g} .. {high:.3g}",
                    f"{self.probability_best[name]:.2f}",
                    z,
                )
            )
        return (*heading, "best", "bias z"), rows

    def _warnings(self) -> list[str]:
        return [
            f"! {name}: bias z = {self.bias_z[name]:.1f}, above {self.critical_z[name]:.1f}: its mean is not the exact "
            "gradient, so it is ranked last, whatever its price."
            for name in self.biased
        ]

    def __str__(self) -> str:
        """A table, and a line for each estimator whose bias is visible."""
        heading, rows = self._rows()
        widths = [max(len(row[i]) for row in (heading, *rows)) for i in range(len(heading))]
        lines = [
            "  ".join(
                cell.ljust(width) if i == 0 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in (heading, *rows)
        ]
        return "\n".join([*lines, *self._warnings()])

    def __rich__(self) -> Any:
        """The table for ``rich.print``.

        Raises:
            ScorefnError: rich is not installed.
        """
        try:
            from rich.table import Table
            from rich.text import Text
        except ImportError as error:
            raise missing("rich") from error
        heading, rows = self._rows()
        table = Table(caption="\n".join(self._warnings()) or None, caption_style="red")
        for i, title in enumerate(heading):
            table.add_column(title, justify="left" if i == 0 else "right", no_wrap=i == 0)
        for row in rows:
            table.add_row(*(Text(cell) for cell in row), style="red" if row[0] in self.biased else None)
        return table

    def plot(self, ax: Any = None) -> Any:
        """Horizontal bars of the prices with their intervals, on a logarithmic axis; the best on top.

        Bars of estimators whose bias is visible are red and hatched; a price of 0 has no bar, and says so.

        Args:
            ax: matplotlib axes; None: new ones.

        Returns:
            The axes.

        Raises:
            ScorefnError: matplotlib is not installed.
        """
        try:
            from matplotlib import pyplot
        except ImportError as error:
            raise missing("matplotlib") from error
        if ax is None:
            ax = pyplot.subplots(figsize=(7, 0.45 * len(self.names) + 1.2), layout="constrained")[1]
        positive = [price for price in self.prices.values() if price > 0]
        floor = min(positive, default=1.0) / 3
        for place, name in enumerate(self.names):
            price, (low, high) = self.prices[name], self.intervals[name]
            style = {"color": "tab:red", "hatch": "//", "alpha": 0.5} if name in self.biased else {"color": "tab:blue"}
            if price > 0:
                ax.barh(place, price, left=None, **style)
                high = min(high, 30 * max(positive))  # an interval without end is drawn to the edge
                arms = [[price - max(low, floor / 3)], [high - price]]
                ax.errorbar(price, place, xerr=np.maximum(arms, 0.0), color="black", capsize=3)
            else:
                ax.text(floor, place, " 0: no noise", va="center")
        ax.set_yticks(
            range(len(self.names)), [f"{name} (biased)" * (name in self.biased) or name for name in self.names]
        )
        ax.invert_yaxis()
        ax.set_xscale("log")
        ax.set_xlim(left=floor)
        ax.set_xlabel(f"variance x {self.cost_name}, {self.confidence:.0%} intervals")
        return ax


def missing(package: str) -> ScorefnError:
    """What is said where an optional package is not installed."""
    return ScorefnError(
        f"This needs {package}, which is not installed: pip install scorefn[apps]. print shows a table."
    )


def compare(
    estimates: Mapping[str, Estimate | tuple[Measure, Integrand, Estimator]],
    params: Tensor | Iterable[Tensor],
    exact: Tensor | Iterable[Tensor] | None = None,
    *,
    repeats: int = 200,
    cost: Cost = seconds,
    confidence: float = 0.95,
) -> Comparison:
    """Measure several estimators of one gradient, interleaved, and rank them by variance x cost.

    With the squared deviations ``d_r = |g_r - mean|^2`` of n repeats the price is ``sum_r d_r / (n - 1) x cost``. Its
    interval is a bootstrap-t interval of the logarithm: of the mean of d, studentised, and of the median of the CPU
    seconds. The resamples have a generator of their own, of a fixed seed.

    Args:
        estimates: by name, zero-argument callables that return a differentiable scalar, or tuples
            ``(p, f, estimator)``, whose evaluations of f are then known.
        params: the tensors to differentiate.
        exact: the exact gradient, from ``exact_gradient``; None: not compared.
        repeats: independent estimates of each.
        cost: of one estimate, a function of its ``GradientStatistics``: ``seconds``, ``evaluations`` or your own.
        confidence: of the intervals.

    Raises:
        ScorefnError: no estimates, or none by name; fewer than 2 repeats; a confidence outside (0, 1); a cost that is
            not known or not a positive number; an estimate that is complex; an exact gradient that holds no tensors.
        NonFiniteError: a gradient that is NaN or infinite.
        ShapeError: an estimate that is no scalar, or an exact gradient that does not match the parameters.

    Sources: Efron & Tibshirani (1993), "An introduction to the bootstrap", chapter 12, for the intervals; Geffner &
    Domke (2020), "A rule for gradient estimator selection", for the order.

    Example:
        >>> import torch, scorefn as sf
        >>> from functools import partial
        >>> from scorefn.diagnostics import compare
        >>> _ = torch.manual_seed(0)
        >>> logits = torch.zeros(3, requires_grad=True)
        >>> p, f = torch.distributions.Bernoulli(logits=logits), lambda x: x.sum(-1)
        >>> found = compare(
        ...     {
        ...         "no baseline": (p, f, partial(sf.expectation, num_samples=8, baseline=None)),
        ...         "leave-one-out": (p, f, partial(sf.expectation, num_samples=8)),
        ...     },
        ...     logits,
        ...     exact=sf.diagnostics.exact_gradient(p, f, logits),
        ...     repeats=20,
        ...     cost=sf.diagnostics.evaluations,  # print(found) shows a table
        ... )
        >>> found.names[0], found.biased
        ('leave-one-out', ())
    """
    if not isinstance(estimates, Mapping):
        raise ScorefnError(
            f"compare needs the estimates by name, but they are a {type(estimates).__name__}: pass {{name: estimate}}."
        )
    if not estimates:
        raise ScorefnError("compare needs at least one estimate: pass {name: callable}.")
    parameters = checked_parameters(params)
    truths = None if exact is None else matching(exact, parameters)
    check_cost(cost)
    check_confidence(confidence)
    subjects = {name: as_estimate(estimate) for name, estimate in estimates.items()}
    measured = interleaved(subjects, parameters, repeats)
    measurements = {
        name: Measurement.of(*measured[name], evaluations_of(subject), parameters) for name, subject in subjects.items()
    }
    bias_z = {} if truths is None else {name: _bias_z(m.statistics, truths) for name, m in measurements.items()}
    return ranked(measurements, cost, bias_z, confidence)


def check_confidence(confidence: float) -> None:
    """Refuse what is no probability inside (0, 1)."""
    if isinstance(confidence, bool) or not isinstance(confidence, Real) or not 0.0 < confidence < 1.0:
        raise ScorefnError(f"confidence must lie between 0 and 1, such as .95, but it is {confidence!r}.")


def ranked(
    measurements: Mapping[str, Measurement],
    cost: Cost,
    bias_z: Mapping[str, float],
    confidence: float,
) -> Comparison:
    """The comparison of what was measured."""
    statistics = {name: m.statistics for name, m in measurements.items()}
    prices, samples = prices_of(measurements, cost)
    critical = {name: critical_z(sum(m.numel() for m in s.mean), s.repeats) for name, s in statistics.items()}
    marked = {name for name in statistics if bias_z.get(name, 0.0) > critical[name]}
    tails = [(1 - confidence) / 2, (1 + confidence) / 2]
    intervals = {}
    for name, s in statistics.items():
        low, high = np.quantile(samples[name], tails, method="inverted_cdf")
        intervals[name] = (float(low), float(high)) if s.repeats >= FEWEST else (0.0, math.inf)
    costs = {name: cost(s) for name, s in statistics.items()}
    names = sorted(statistics, key=lambda name: (name in marked, prices[name], costs[name]))
    return Comparison(
        names=tuple(names),
        statistics=statistics,
        bias_z=bias_z,
        prices=prices,
        intervals=intervals,
        probability_best=_shares({name: s for name, s in samples.items() if name not in marked}, names),
        critical_z=critical,
        cost_name=getattr(cost, "__name__", type(cost).__name__),
        confidence=confidence,
    )


def _shares(samples: Mapping[str, NDArray[np.float64]], names: Sequence[str]) -> dict[str, float]:
    """How often each is the least; 0 for a name without samples."""
    if not samples:
        return dict.fromkeys(names, 0.0)
    table = np.stack(list(samples.values()))
    least = table == table.min(0)
    share = (least / least.sum(0)).mean(1)
    found = dict(zip(samples, share.tolist(), strict=True))
    return {name: found.get(name, 0.0) for name in names}


def _bias_z(statistics: GradientStatistics, exact: tuple[Tensor, ...]) -> float:
    worst = 0.0
    for mean, error, truth in zip(statistics.mean, statistics.standard_error, exact, strict=True):
        floor = 1e-6 * truth.abs().max().clamp(min=1e-30)  # rounding, where there is no noise at all
        worst = max(worst, float(((mean - truth).abs() / error.clamp(min=float(floor))).max()))
    return worst
