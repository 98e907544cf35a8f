"""The gradient of each of many values, in sweeps."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from scorefn.core import ScorefnError
from scorefn.diagnostics.estimation import as_parameters

_ELEMENTS = 2**22  # numbers that the gradients of one sweep, or their weights, are made of


def value_gradients(values: Tensor, params: Tensor | Iterable[Tensor]) -> Tensor:
    """The gradient of each value, ``[*values.shape, P]``: the Jacobian, with the parameters side by side.

    One backward pass for each value, many in one sweep; the graph is kept. With the surrogates of single draws it gives
    what ``variance_split`` and ``nested_variances`` take.

    Args:
        values: any shape, made from the parameters.
        params: the tensors to differentiate; where a value does not depend on one of them, its gradient is 0.

    Raises:
        ScorefnError: no parameters, or values without gradient.

    Example:
        >>> import torch
        >>> from scorefn.diagnostics import value_gradients
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> value_gradients(x.square().expand(3, 2), x).shape
        torch.Size([3, 2, 2])
    """
    parameters = as_parameters(params)
    if not parameters:
        raise ScorefnError("There are no parameters to differentiate: pass tensors that require grad.")
    if not values.requires_grad:
        raise ScorefnError(
            "The values do not require grad, so they have no gradients: make them from parameters that require grad, "
            "outside torch.no_grad()."
        )
    flat, size = values.reshape(-1), sum(q.numel() for q in parameters)
    rows = []
    for chunk in torch.arange(flat.numel(), device=flat.device).split(max(_ELEMENTS // max(size, flat.numel(), 1), 1)):
        weight = torch.zeros(len(chunk), flat.numel(), dtype=flat.dtype, device=flat.device)
        weight[torch.arange(len(chunk), device=flat.device), chunk] = 1
        found = torch.autograd.grad(
            flat, parameters, weight, retain_graph=True, allow_unused=True, is_grads_batched=True
        )
        parts = [
            q.new_zeros(len(chunk), q.numel()) if g is None else g.detach().reshape(len(chunk), -1)
            for q, g in zip(parameters, found, strict=True)
        ]
        rows.append(torch.cat(parts, 1))
    return torch.cat(rows).reshape(*values.shape, size)
