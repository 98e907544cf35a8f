"""Gradients that are right once: given by hand, or those of a surrogate; a second derivative is refused."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from scorefn.core import ScorefnError, in_transform

_REPAIR = (
    "This estimate has a first derivative only, and its gradient, differentiated once more (create_graph=True), is not "
    "the second derivative of the expectation. Use scorefn.Enumerate() where the support is small, or differentiate "
    "scorefn.dice(scorefn.draw(p, f, num_samples)).mean(), which has every derivative."
)


def beside(values: Tensor, sites: Tensor) -> Tensor:
    """``[*lead]`` with trailing axes of 1, to multiply ``[*lead, *rest]`` without broadcasting from the wrong end."""
    return values.reshape(values.shape + (1,) * (sites.ndim - values.ndim))


def with_gradient(value: Tensor, parameter: Tensor, gradient: Tensor) -> Tensor:
    """``value`` ``[*B]``, to whose gradient ``gradient`` is added, the one with respect to ``parameter``.

    Args:
        value: what is returned, to the bit; its own gradient is kept.
        parameter: ``[*B, *rest]``; all that lies beyond B belongs to one value. It may be infinite.
        gradient: of the shape of the parameter; a constant, whatever its graph.
    """
    gradient = gradient.detach()
    if in_transform():  # which cannot trace the function below
        limit = torch.finfo(parameter.dtype).max
        finite = parameter.clamp(-limit, limit)
        return value + (gradient * (finite - finite.detach())).reshape(*value.shape, -1).sum(-1)
    attached: Tensor = _Attached.apply(value, parameter, gradient)  # type: ignore[no-untyped-call]
    return attached


def first_order(value: Tensor, repair: str = _REPAIR) -> Tensor:
    """The same value, whose gradient is refused where a second derivative is wanted of it.

    Inside a ``torch.func`` transform, which always keeps the graph, it cannot be told and is not refused.
    """
    if in_transform():
        return value
    found: Tensor = _FirstOrder.apply(value, repair)  # type: ignore[no-untyped-call]
    return found


def _refuse_second(repair: str) -> None:
    if torch.is_grad_enabled():
        raise ScorefnError(repair)


class _FirstOrder(torch.autograd.Function):
    """The identity; its gradient may not be differentiated again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor, repair: str) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, str], output: Tensor) -> None:
        ctx.repair = inputs[1]

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, None]:
        _refuse_second(ctx.repair)
        return outputs[0], None


class _Attached(torch.autograd.Function):
    """One product in the backward pass, and nothing in the forward one."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, parameter: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, Tensor, None]:
        _refuse_second(_REPAIR)
        (gradient,) = ctx.saved_tensors
        return outputs[0], beside(outputs[0], gradient) * gradient, None
