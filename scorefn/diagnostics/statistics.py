"""How noisy a gradient estimate is and what it costs."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from scorefn.core import NonFiniteError, ScorefnError, ShapeError
from scorefn.diagnostics.estimation import Estimate, as_parameters
from scorefn.diagnostics.exact import gradient


@dataclass(frozen=True)
class GradientStatistics:
    """Moments of a gradient estimate over independent repeats.

    Attributes:
        mean: per parameter, its shape.
        variance: per parameter and coordinate, of one estimate (divided by repeats - 1).
        standard_error: of the mean, per parameter: ``sqrt(variance / repeats)``.
        total_variance: the sum of the variances over all coordinates.
        signal_to_noise: ``|g|^2 / total_variance``, with |g|^2 estimated without bias and floored at 0; infinite
            without noise.
        seconds: CPU seconds of one estimate and its gradient, median.
        repeats: how many estimates were made.
    """

    mean: tuple[Tensor, ...]
    variance: tuple[Tensor, ...]
    standard_error: tuple[Tensor, ...]
    total_variance: float
    signal_to_noise: float
    seconds: float
    repeats: int


def gradient_statistics(
    estimate: Estimate, params: Tensor | Iterable[Tensor], repeats: int = 1000
) -> GradientStatistics:
    """Mean, variance, standard error, signal-to-noise ratio and CPU seconds of a gradient estimate.

    Args:
        estimate: zero-argument callable that returns a differentiable scalar: your own, or another library's.
        params: the tensors to differentiate.
        repeats: independent estimates, at least 2.

    Raises:
        ScorefnError: fewer than 2 repeats, or an estimate without gradient.
        NonFiniteError: a gradient that is NaN or infinite.
        ShapeError: the estimate is not a scalar.
    """
    parameters = as_parameters(params)
    return _summary(*interleaved({"estimate": estimate}, parameters, repeats)["estimate"], parameters)


def interleaved(
    estimates: Mapping[str, Estimate], parameters: tuple[Tensor, ...], repeats: int
) -> dict[str, tuple[Tensor, list[float]]]:
    """Gradients ``[repeats, P]`` and CPU seconds of each estimate, taken in turn so that drift meets all alike."""
    if repeats < 2:
        raise ScorefnError(f"repeats must be at least 2 to have a variance, but it is {repeats}.")
    gradients: dict[str, list[Tensor]] = {name: [] for name in estimates}
    seconds: dict[str, list[float]] = {name: [] for name in estimates}
    for _ in range(repeats):
        for name, estimate in estimates.items():
            start = time.process_time()
            value = estimate()
            if not isinstance(value, Tensor):
                raise ScorefnError(
                    f"The estimate must return a scalar tensor, but it returned a {type(value).__name__}."
                )
            if value.ndim:
                raise ShapeError(
                    f"The estimate must return a scalar, but it has shape {tuple(value.shape)}: take .mean() over "
                    "draws and .sum() over independent problems."
                )
            found = gradient(value, parameters)
            seconds[name].append(time.process_time() - start)
            gradients[name].append(torch.cat([g.reshape(-1) for g in found]))
            if not bool(gradients[name][-1].isfinite().all()):
                raise NonFiniteError(
                    f'The gradient of "{name}" is NaN or infinite (repeat {len(gradients[name])}): such an estimate '
                    "has neither mean nor variance. Make it finite before it is measured."
                )
    return {name: (torch.stack(gradients[name]), seconds[name]) for name in estimates}


def _summary(gradients: Tensor, seconds: list[float], parameters: tuple[Tensor, ...]) -> GradientStatistics:
    repeats = gradients.shape[0]
    mean, variance = gradients.mean(0), gradients.var(0)
    total = float(variance.sum())
    signal = max(float(mean.square().sum()) - total / repeats, 0.0)
    return GradientStatistics(
        mean=unflattened(mean, parameters),
        variance=unflattened(variance, parameters),
        standard_error=unflattened((variance / repeats).sqrt(), parameters),
        total_variance=total,
        signal_to_noise=signal / total if total > 0 else float("inf"),
        seconds=sorted(seconds)[repeats // 2],
        repeats=repeats,
    )


def matching(exact: Tensor | Iterable[Tensor], parameters: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The exact gradient, one tensor per parameter and of its shape, or ShapeError."""
    truths = as_parameters(exact)
    if [t.shape for t in truths] != [q.shape for q in parameters]:
        raise ShapeError(
            f"exact has shapes {[tuple(t.shape) for t in truths]} but params {[tuple(q.shape) for q in parameters]}: "
            "give one exact gradient per parameter, in the same order."
        )
    return truths


def unflattened(flat: Tensor, parameters: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Cut ``[P]`` into the shapes of the parameters."""
    parts = flat.split([q.numel() for q in parameters])
    return tuple(part.reshape(q.shape) for part, q in zip(parts, parameters, strict=True))


@dataclass(frozen=True)
class Comparison:
    """Estimators on one problem, ranked by variance x cost, the best first; ``print`` shows a table.

    Attributes:
        names: ranked.
        statistics: by name.
        bias_z: by name, the largest ``|mean - exact| / standard error`` over the coordinates; empty without an exact
            gradient. Under no bias it rarely exceeds 5 for up to thousands of coordinates.
    """

    names: tuple[str, ...]
    statistics: Mapping[str, GradientStatistics]
    bias_z: Mapping[str, float]

    def cost(self, name: str) -> float:
        """Total variance x CPU seconds: what one unit of precision costs."""
        return self.statistics[name].total_variance * self.statistics[name].seconds

    def __str__(self) -> str:
        """A table."""
        width = max(len("estimator"), *(len(name) for name in self.names))
        lines = [
            f"{'estimator':<{width}}  {'variance':>10}  {'SNR':>9}  {'ms':>8}  {'variance x s':>12}  {'bias z':>7}"
        ]
        for name in self.names:
            s = self.statistics[name]
            z = f"{self.bias_z[name]:>7.2f}" if name in self.bias_z else f"{'-':>7}"
            lines.append(
                f"{name:<{width}}  {s.total_variance:>10.4g}  {s.signal_to_noise:>9.3g}  {1e3 * s.seconds:>8.3f}  "
                f"{self.cost(name):>12.4g}  {z}"
            )
        return "\n".join(lines)


def compare(
    estimates: Mapping[str, Estimate],
    params: Tensor | Iterable[Tensor],
    exact: Tensor | Iterable[Tensor] | None = None,
    *,
    repeats: int = 200,
) -> Comparison:
    """Measure several estimators of one gradient, interleaved, and rank them by variance x cost.

    Args:
        estimates: by name, zero-argument callables that return a differentiable scalar.
        params: the tensors to differentiate.
        exact: the exact gradient, from ``exact_gradient``; None: not compared.
        repeats: independent estimates of each.

    Raises:
        ScorefnError: no estimates, or fewer than 2 repeats.
        NonFiniteError: a gradient that is NaN or infinite.
        ShapeError: an estimate that is no scalar, or an exact gradient that does not match the parameters.
    """
    if not estimates:
        raise ScorefnError("compare needs at least one estimate: pass {name: callable}.")
    parameters = as_parameters(params)
    truths = None if exact is None else matching(exact, parameters)
    measured = interleaved(estimates, parameters, repeats)
    statistics = {name: _summary(*measured[name], parameters) for name in measured}
    bias_z = {} if truths is None else {name: _bias_z(s, truths) for name, s in statistics.items()}
    names = sorted(statistics, key=lambda name: statistics[name].total_variance * statistics[name].seconds)
    return Comparison(tuple(names), statistics, bias_z)


def _bias_z(statistics: GradientStatistics, exact: tuple[Tensor, ...]) -> float:
    worst = 0.0
    for mean, error, truth in zip(statistics.mean, statistics.standard_error, exact, strict=True):
        floor = 1e-6 * truth.abs().max().clamp(min=1e-30)  # rounding, where there is no noise at all
        worst = max(worst, float(((mean - truth).abs() / error.clamp(min=float(floor))).max()))
    return worst
