"""Whether the mean of some terms is zero: a z-test that says when it is not to be trusted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

VALIDITY = 1000.0
"""The z-test is trusted from this many terms per squared skewness: n p >= 1000 for an event of probability p."""

_COORDINATES = 16  # up to this many, each is a direction of its own
_DIRECTIONS = 8


@dataclass(frozen=True)
class ZeroMean:
    """A test that the mean of independent terms (or of martingale differences) is zero.

    Attributes:
        count: terms.
        mean: of the column that is furthest off, among those that can be judged.
        z: its mean in standard errors; infinite for terms without spread that are not zero.
        critical: two-sided, corrected for the number of columns.
        detectable: the mean, the largest over the judged columns, that would be found with probability 0.999.
        needed: terms that the most skewed column needs; the test of that column is void with fewer.
    """

    count: int
    mean: float
    z: float
    critical: float
    detectable: float
    needed: float

    @property
    def off(self) -> bool:
        """Whether a mean that can be judged is not zero."""
        return abs(self.z) > self.critical

    @property
    def valid(self) -> bool:
        """Whether every column can be judged."""
        return self.count >= self.needed

    @property
    def evidence(self) -> dict[str, float]:
        """Its numbers."""
        return {"mean": self.mean, "z": self.z, "critical z": self.critical, "terms": self.count}


def zero_mean(terms: Tensor, false_alarm: float, floor: Tensor | float, unmet: float = 0.0) -> ZeroMean:
    """Test each column of ``[n, C]``.

    Args:
        terms: independent rows.
        false_alarm: of all columns together, two-sided.
        floor: ``[C]`` or a number, what rounding makes of a mean of zero.
        unmet: how large a term may be. Terms without spread may be balanced by an event of such a size that was not met
            in n draws, of a probability up to ``log(1 / false_alarm) / n``: a mean below their product is not judged.
    """
    terms = terms.detach().double()
    n, columns = terms.shape
    floor = torch.as_tensor(floor, dtype=torch.float64, device=terms.device).expand(columns)
    mean = terms.mean(0)
    spread = (terms - mean).square().mean(0).sqrt()
    error = spread / max(n - 1, 1) ** 0.5
    flat = spread <= torch.maximum(floor, 1e-12 * mean.abs())
    skewness = torch.where(flat, 0.0, ((terms - mean) / spread.clamp(min=1e-300)).pow(3).mean(0))
    balanced = unmet * math.log(1 / false_alarm) / mean.abs().clamp(min=1e-300)
    alike = torch.where(mean.abs() > floor, balanced.clamp(min=1.0), 1.0)
    needed = torch.where(flat, alike, (VALIDITY * skewness.square()).clamp(min=100.0))
    critical = NormalDist().inv_cdf(1.0 - false_alarm / (2 * columns))
    beyond = (mean.abs() - floor).clamp(min=0) * mean.sign()
    z = torch.where(flat, torch.where(beyond == 0, 0.0, torch.inf * mean.sign()), beyond / error.clamp(min=1e-300))
    judged = needed <= n
    z = torch.where(judged, z.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf), 0.0)
    worst = int(z.abs().argmax())
    power = critical + NormalDist().inv_cdf(0.999)
    detectable = torch.where(judged, power * torch.where(flat, 0.0, error) + floor, 0.0)
    return ZeroMean(n, float(mean[worst]), float(z[worst]), critical, float(detectable.max()), float(needed.max()))


def directions(parameter: Tensor) -> Tensor:
    """``[D, *shape]``: each coordinate of a small parameter, random signs of a large one."""
    size = parameter.numel()
    if size <= _COORDINATES:
        return torch.eye(size, dtype=parameter.dtype, device=parameter.device).reshape(size, *parameter.shape)
    signs = torch.randint(2, (_DIRECTIONS, *parameter.shape), device=parameter.device)
    return (2 * signs - 1).to(parameter.dtype)


def slopes(values: Tensor, parameter: Tensor, along: Tensor) -> Tensor:
    """The derivative of every value in a parameter along directions: ``[*values, D]``.

    The gradient of ``sum_i c_i values_i`` is linear in c, and its product with a direction is differentiated in c: two
    backward passes and one for each direction, however many values there are.

    Raises:
        RuntimeError: values cannot be differentiated twice.
    """
    if not values.requires_grad:
        return values.new_zeros(*values.shape, len(along))
    c = torch.zeros_like(values, requires_grad=True)
    (gradient,) = torch.autograd.grad(values, [parameter], c, create_graph=True, materialize_grads=True)
    found = []
    for direction in along:
        total = (gradient * direction).sum()
        part = torch.autograd.grad(total, c, retain_graph=True, allow_unused=True)[0] if total.requires_grad else None
        found.append(torch.zeros_like(values) if part is None else part)
    return torch.stack(found, -1).detach()


def rounding(scale: Tensor | float, parameters: Sequence[Tensor]) -> float:
    """What rounding may leave of zero, beside numbers of this size."""
    eps = max(torch.finfo(parameter.dtype).eps for parameter in parameters)
    return 100 * eps * float(scale)
