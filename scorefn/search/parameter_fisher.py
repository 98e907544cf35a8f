"""The Fisher information of a distribution in the parameters that it is built from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent

from scorefn.core import ScorefnError
from scorefn.fisher import fisher_information


def root_fisher(p: Distribution, parameters: list[Tensor], widest: float = 0.0) -> tuple[Tensor, Tensor]:
    """Square roots ``[R]`` of the positive eigenvalues of F in the parameters, and their axes ``[P, R]``.

    Eigenvalues below 100 roundings of ``widest`` are left out: the rounding error of a score is some eps, whatever its
    size, so that ``F^-1 g`` is noise in such a direction (a bit that is all but decided).

    Args:
        p: a distribution whose Fisher information is known.
        parameters: that it is built from.
        widest: the largest eigenvalue that F had so far; with 0, no direction at all is an error.

    Raises:
        ScorefnError: p does not depend on the parameters.
    """
    fisher = fisher_information(p)
    family: Any = p
    while isinstance(family, Independent):
        family = family.base_dist
    own = {name: getattr(family, name) for name in fisher.parameters}
    own = {name: value for name, value in own.items() if value.requires_grad}
    seeds = [torch.zeros_like(value, requires_grad=True) for value in own.values()]
    pulled = torch.autograd.grad(
        list(own.values()), parameters, seeds, create_graph=True, materialize_grads=True, allow_unused=True
    )
    flat = torch.cat([entry.flatten() for entry in pulled])  # J^T seed, linear in the seeds
    units = torch.eye(len(flat), dtype=flat.dtype, device=flat.device)
    rows = [torch.autograd.grad(flat, seeds, unit, retain_graph=True, materialize_grads=True) for unit in units]
    jacobian = {name: torch.stack([row[index] for row in rows]) for index, name in enumerate(own)}
    still = {
        name: torch.zeros((len(flat), *value.shape), dtype=value.dtype, device=value.device)
        for name, value in fisher.parameters.items()
    }
    with torch.no_grad():
        image = fisher.product({**still, **jacobian})
        count = len(flat)
        matrix = torch.stack(
            [jacobian[name].reshape(count, -1).double() @ image[name].reshape(count, -1).double().T for name in own]
        )
        matrix = matrix.sum(0)
        values, axes = torch.linalg.eigh((matrix + matrix.T) / 2)
    eps = torch.finfo(flat.dtype).eps
    kept = values > (len(flat) * eps * values.amax()).clamp(min=100 * eps * widest)
    if not bool(kept.any()) and widest == 0:
        raise ScorefnError("The distribution does not depend on the parameters: its Fisher information is zero.")
    return values[kept].sqrt(), axes[:, kept]
