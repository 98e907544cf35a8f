"""Parameters by name, read from a module, from Pyro's store or from a mapping, and written back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from scorefn.core import ScorefnError


class HasParameters(Protocol):
    """A module, or Pyro's parameter store (whose parameters are the unconstrained ones)."""

    def named_parameters(self) -> Any:
        """Pairs of a name and a tensor."""


Source: TypeAlias = HasParameters | Mapping[str, Tensor]


def floating_tensors(source: Source) -> dict[str, Tensor]:
    """Floating-point tensors by name, detached."""
    if isinstance(source, Mapping) and not hasattr(source, "named_parameters"):
        pairs = list(source.items())
    elif callable(getattr(source, "named_parameters", None)):
        pairs = list(source.named_parameters())
    else:
        raise ScorefnError(
            f"{type(source).__name__} has no parameters to read: give a module, pyro.get_param_store(), or tensors by "
            "name."
        )
    found = {name: tensor.detach() for name, tensor in pairs if tensor.is_floating_point()}
    if not found:
        raise ScorefnError("There are no floating-point parameters to average: pass those that the optimiser moves.")
    return found


@torch.no_grad()
def assign(values: Mapping[str, Tensor], target: HasParameters) -> None:
    """Give the parameters of these names new values, in place."""
    for name, tensor in target.named_parameters():
        if name in values:
            tensor.copy_(values[name])
