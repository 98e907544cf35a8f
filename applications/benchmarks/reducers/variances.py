"""Problems, and the variances, times and intervals of their estimators as a table."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import Tensor

Estimate = Callable[[], Tensor]
"""One gradient, flat."""
RESAMPLES = 1000


@dataclass(frozen=True)
class Problem:
    """One table.

    Args:
        title: its heading.
        about: what is estimated.
        estimates: by name; the first is what ratios are to.
        parts: which coordinates of the gradient are summed to a variance; one column each.
        prepare: called at the start of each round, for what the estimators of a round share; it returns the exact
            gradient, or None where there is none, and the CPU seconds that each estimate would have spent on it.
        repeats: rounds that count, as a multiple of those asked for.
        warm_up: rounds before.
    """

    title: str
    about: str
    estimates: dict[str, Estimate]
    parts: dict[str, slice]
    prepare: Callable[[], tuple[Tensor | None, float]]
    repeats: float = 1.0
    warm_up: int = 40


@dataclass
class Measured:
    """Gradients and times of one estimator."""

    gradients: list[Tensor] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def measure(problem: Problem, repeats: int, warm_up: int) -> tuple[dict[str, Measured], list[Tensor] | None]:
    """Gradients and times by name, interleaved, and the exact gradient of each round."""
    measured = {name: Measured() for name in problem.estimates}
    truths: list[Tensor] = []
    for number in range(-warm_up, repeats):
        truth, shared = problem.prepare()
        for name, estimate in problem.estimates.items():
            begin = time.process_time()
            gradient = estimate()
            spent = time.process_time() - begin + shared
            if number >= 0:
                measured[name].gradients.append(gradient.detach().clone())
                measured[name].seconds.append(spent)
        if number >= 0 and truth is not None:
            truths.append(truth)
    return measured, truths or None


@dataclass(frozen=True)
class Row:
    """One estimator on one problem; a triple is an estimate with its interval.

    Args:
        name: of the estimator.
        variance: by part, summed over its coordinates.
        ratio: by part, of the variance to that of the first estimator.
        error: length of the mean deviation from the exact gradient in its own standard errors, by part; about 1 if
            unbiased, and at most about 3 by chance where a part is one coordinate. Empty without an exact gradient.
        milliseconds: CPU time of an estimate, median.
        time_ratio: of the CPU time to that of the first estimator: median over rounds.
    """

    name: str
    variance: dict[str, tuple[float, float, float]]
    ratio: dict[str, tuple[float, float, float]]
    error: dict[str, float]
    milliseconds: float
    time_ratio: float


def rows(problem: Problem, repeats: int, warm_up: int | None = None) -> list[Row]:
    """Measure a problem.

    Args:
        problem: what to measure.
        repeats: rounds that count.
        warm_up: rounds before; None: as many as the problem asks for.
    """
    measured, truths = measure(problem, repeats, problem.warm_up if warm_up is None else warm_up)
    resamples = torch.randint(repeats, (RESAMPLES, repeats), generator=torch.Generator().manual_seed(0))
    first, found = next(iter(measured)), list[Row]()
    squares = {name: _squares(m, truths, problem.parts) for name, m in measured.items()}
    for name, own in measured.items():
        variance, ratio, error = {}, {}, {}
        for part, square in squares[name].items():
            reference = squares[first][part]
            variance[part] = _interval(square.mean(), square[resamples].mean(1))
            ratio[part] = _interval(
                square.mean() / reference.mean(), square[resamples].mean(1) / reference[resamples].mean(1)
            )
            if truths is not None:
                mean = (torch.stack(own.gradients) - torch.stack(truths))[:, problem.parts[part]].double().mean(0)
                error[part] = float(mean.norm() / (square.mean() / repeats).sqrt())
        times = zip(own.seconds, measured[first].seconds, strict=True)
        found.append(Row(name, variance, ratio, error, 1e3 * median(own.seconds), median(a / b for a, b in times)))
    return found


def _squares(measured: Measured, truths: list[Tensor] | None, parts: dict[str, slice]) -> dict[str, Tensor]:
    """Squared deviation of each round ``[repeats]``: from the exact gradient, or from the mean of the others."""
    gradients = torch.stack(measured.gradients).double()
    if truths is None:
        deviations = (gradients - gradients.mean(0)) * (len(gradients) / (len(gradients) - 1)) ** 0.5
    else:
        deviations = gradients - torch.stack(truths)
    return {part: deviations[:, columns].square().sum(-1) for part, columns in parts.items()}


def _interval(value: Tensor, resampled: Tensor) -> tuple[float, float, float]:
    low, high = resampled.quantile(torch.tensor([0.025, 0.975], dtype=resampled.dtype)).tolist()
    return float(value), low, high


def table(found: list[Row]) -> list[str]:
    """As Markdown."""
    parts, exact = list(found[0].variance), bool(found[0].error)
    heads = ["estimator"]
    for part in parts:
        of = f" of {part}" if len(parts) > 1 else ""
        heads += [f"variance{of}", f"ratio{of}", *(["error"] if exact else [])]
    heads += ["CPU ms", "time ratio", *(f"variance x ms{f' of {part}' if len(parts) > 1 else ''}" for part in parts)]
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for row in found:
        cells = [row.name]
        for part in parts:
            cells += [_cell(*row.variance[part]), _cell(*row.ratio[part])]
            cells += [f"{row.error[part]:.2f}"] if exact else []
        cells += [f"{row.milliseconds:.2f}", f"{row.time_ratio:.2f}"]
        cells += [number(row.variance[part][0] * row.milliseconds) for part in parts]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _cell(value: float, low: float, high: float) -> str:
    return f"{number(value)} ({number(low)} – {number(high)})"


def number(value: float) -> str:
    """Three digits, without an exponent where it can be read without."""
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        digits_before = len(str(int(abs(value)))) if abs(value) >= 1 else 0
        if digits_before >= 3:
            return f"{value:,.0f}"
        text = f"{value:.3g}"
        return text if "e" not in text else f"{value:.4f}"
    return f"{value:.2e}"
