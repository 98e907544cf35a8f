"""What a search with any distribution is put together from, and which of it cannot be put together."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from scorefn.core import ScorefnError
from scorefn.core.checks import no_part
from scorefn.search.clip_up import check_steps_alone


def checked_parameters(parameters: Iterable[Tensor], optimizer: torch.optim.Optimizer | None) -> list[Tensor]:
    """The tensors that a search moves, which are also those of the optimiser."""
    found = [parameters] if isinstance(parameters, Tensor) or not isinstance(parameters, Iterable) else list(parameters)
    if not found or not all(isinstance(entry, Tensor) and entry.is_leaf and entry.requires_grad for entry in found):
        raise ScorefnError(
            "parameters must be leaf tensors that require grad, at least one, but something else is among them: they "
            "are what the search changes. Make them by torch.zeros(D, requires_grad=True)."
        )
    if not all(entry.numel() for entry in found):
        raise ScorefnError(
            f"parameters must hold numbers, but their shapes are {[tuple(entry.shape) for entry in found]}, one of "
            "which has 0 numbers: there is nothing to search in it. Leave it out."
        )
    if len({id(entry) for entry in found}) < len(found):
        raise ScorefnError("parameters holds one tensor twice, which would be moved twice: give each of them once.")
    if optimizer is not None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise ScorefnError(
                f"optimizer must be a torch.optim.Optimizer, but it is {optimizer!r}: build one over the same "
                "parameters, for instance torch.optim.Adam(parameters, lr=0.05)."
            )
        check_steps_alone(optimizer)
        owned = {id(entry) for group in optimizer.param_groups for entry in group["params"]}
        if owned != {id(entry) for entry in found}:
            raise ScorefnError(
                f"The optimizer has {len(owned)} tensors, which are not the {len(found)} of parameters: it would leave "
                "some alone, or change others. Build it over the same tensors."
            )
    return found


def check_parts(make: object, shape: object, baseline: object, coupling: object, estimator: object) -> None:
    """Refuse what cannot play its part, and parts that exclude each other."""
    if not callable(make):
        raise ScorefnError(
            f"make must be a function without arguments, but it is {make!r}: it builds the distribution."
        )
    for name, part, use in (
        ("shape", shape, "use NESUtilities(), CenteredRank() or another function of fx, or None."),
        ("baseline", baseline, "use LeaveOneOut(), Constant(b) for a number, or None."),
    ):
        if part is not None and (isinstance(part, type) or not callable(part)):
            raise no_part(name, part, use)
    if coupling is not None and (isinstance(coupling, type) or not callable(getattr(coupling, "sample", None))):
        raise no_part("coupling", coupling, "use Antithetic(), Sobol() or another one, or None for independent draws.")
    if estimator is None:
        return
    if isinstance(estimator, type) or not all(
        callable(getattr(estimator, way, None)) for way in ("sample", "surrogate")
    ):
        raise no_part("estimator", estimator, "use DisARM(num_pairs), ARMS(num_samples) or another one, or None.")
    for name, part in (("baseline", baseline), ("coupling", coupling)):
        if part is not None:
            raise ScorefnError(
                f"{estimator!r} draws the points of a generation together and compares them with each other, so that "
                f"{name}={part!r} has no place beside it. Leave one of the two out."
            )


def is_discrete(p: Distribution) -> bool:
    """Whether the points of p are discrete."""
    try:
        support = p.support
    except NotImplementedError:
        return False
    return support is not None and bool(support.is_discrete)


@torch.no_grad()
def spread(p: Distribution, count: int) -> Tensor:
    """Standard deviations ``[D]`` in float64; NaN where p has none, or has no finite one by nature.

    Infinite ones are left where a parameter of p is: it has overflowed.
    """
    try:
        found = p.stddev.detach().double().flatten().clone()
    except (NotImplementedError, AttributeError):
        found = torch.zeros(0)
    if found.numel() != count:
        return torch.full((count,), torch.nan, dtype=torch.float64)
    if bool(found.isinf().any()) and _finite_parameters(p):
        return torch.where(found.isinf(), torch.nan, found)
    return found


def _finite_parameters(p: Any) -> bool:
    if isinstance(base := getattr(p, "base_dist", None), Distribution) and not p.arg_constraints:
        return _finite_parameters(base)  # Independent and other wrappers
    values = [getattr(p, name, None) for name in p.arg_constraints]
    return all(bool(value.isfinite().all()) for value in values if isinstance(value, Tensor))
