"""Refusals: shape, dtype, device, finiteness and gradient of draws and of what f returns."""

from __future__ import annotations

import math
import operator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from scorefn.core.errors import NonFiniteError, ScorefnError, ShapeError
from scorefn.core.protocols import PyTree, in_transform, tensor_leaves

if TYPE_CHECKING:
    from scorefn.core.draws import Draws


def check_count(name: str, number: Any) -> int:
    """The number as an int, or ScorefnError where it is no integer of at least 1.

    Raises:
        ScorefnError: it is none.

    Example:
        >>> import scorefn as sf
        >>> sf.core.check_count("num_samples", 8)
        8
        >>> sf.core.check_count("num_samples", 0.5)
        Traceback (most recent call last):
        scorefn.core.errors.ScorefnError: num_samples must be an integer of at least 1, but it is 0.5.
    """
    try:
        count = 0 if isinstance(number, bool) else operator.index(number)
    except TypeError:  # a tensor has __index__, and most tensors have no index
        count = 0
    if count < 1:
        raise ScorefnError(f"{name} must be an integer of at least 1, but it is {number!r}.")
    return count


def no_part(name: str, given: object, use: str) -> ScorefnError:
    """The refusal of what cannot play the part of an argument: a class, a name, a number."""
    noun = name.replace("_", " ")
    if isinstance(given, type):
        return ScorefnError(
            f"{name}={given.__name__} is a class, and a {noun} is an object made from one, with its own settings and "
            f"state: write {given.__name__}() with parentheses."
        )
    return ScorefnError(f"{name}={given!r} is no {noun}, because it cannot be used as one: {use}")


def check_fields(draws: Draws) -> None:
    """Refuse fields whose shape, dtype or device does not belong to log_prob ``[N, *B, K]``."""
    shape, dtype = draws.log_prob.shape, draws.log_prob.dtype
    if len(shape) < 2 or 0 in shape:
        raise ShapeError(f"log_prob must be [N, *B, K] with N and K at least 1, but its shape is {tuple(shape)}.")
    fx_shape = draws.fx.shape
    if len(fx_shape) != len(shape):
        raise ShapeError(
            f"fx has shape {tuple(fx_shape)}, but beside log_prob [N, *B, K] = {tuple(shape)} it must be [N, *B, J], "
            "with as many axes: one value per draw and problem is fx.unsqueeze(-1)."
        )
    wanted = shape[:-1] + (fx_shape[-1:] if fx_shape and fx_shape[-1] else (1,))
    check_beside(draws.log_prob, "fx", draws.fx, wanted, (dtype,))
    if draws.mask is not None:
        check_beside(draws.log_prob, "mask", draws.mask, shape, (torch.bool,))
    for name, index in (("block", draws.block), ("group", draws.group)):
        if index is not None:
            integers = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
            check_beside(draws.log_prob, name, index, shape[:1], integers)
    if (behaviour := draws.behaviour_log_prob) is not None:
        check_beside(draws.log_prob, "behaviour_log_prob", behaviour, shape, (dtype,))
        if behaviour.requires_grad:
            raise ScorefnError(
                "behaviour_log_prob requires grad, but what was sampled from is a constant, and a gradient through it "
                "would cancel the score. Pass behaviour_log_prob.detach()."
            )


def check_beside(
    log_prob: Tensor, name: str, tensor: Tensor, wanted: tuple[int, ...], dtypes: tuple[torch.dtype, ...]
) -> None:
    """Refuse a tensor of another shape, dtype or device than log_prob asks for."""
    if tensor.shape != wanted:
        raise ShapeError(
            f"{name} has shape {tuple(tensor.shape)}, but log_prob [N, *B, K] = {tuple(log_prob.shape)} asks for "
            f"{tuple(wanted)}: N, B and K are never repaired by broadcasting."
        )
    if tensor.dtype not in dtypes or tensor.device != log_prob.device:
        repair = f"{name}.real" if tensor.is_complex() else f"{name}.to({str(log_prob.device)!r}, {dtypes[0]})"
        raise ScorefnError(
            f"{name} is {tensor.dtype} on {tensor.device}, but beside a log_prob that is {log_prob.dtype} on "
            f"{log_prob.device} it must be {dtypes[0]} there: scorefn neither rounds nor copies silently. Convert one "
            f"of them, for instance {repair}."
        )


def check_detached(x: PyTree, num_samples: int) -> None:
    """Refuse draws that carry a gradient or whose leaves do not lead with N.

    Args:
        x: the draws.
        num_samples: N.

    Raises:
        ScorefnError: a leaf requires grad.
        ShapeError: a leaf does not lead with N.

    Example:
        >>> import torch, scorefn as sf
        >>> p = torch.distributions.Normal(torch.zeros((), requires_grad=True), 1.0)
        >>> sf.core.check_detached(p.sample((10,)), 10)
        >>> sf.core.check_detached(p.rsample((10,)), 10)
        Traceback (most recent call last):
        scorefn.core.errors.ScorefnError: The draws x require grad: differentiating through them as well as through ...
    """
    for leaf in tensor_leaves(x):
        if leaf.requires_grad:
            raise ScorefnError(
                "The draws x require grad: differentiating through them as well as through log_prob counts the "
                "pathwise gradient twice. Sample with p.sample(), or detach x, before it is scored."
            )
        if leaf.ndim == 0 or leaf.shape[0] != num_samples:
            raise ShapeError(f"Each leaf of x must lead with N = {num_samples}, but one has shape {tuple(leaf.shape)}.")


def check_values(draws: Draws) -> None:
    """Refuse a log_prob without gradient and values that are not finite."""
    if torch.is_grad_enabled() and not draws.log_prob.requires_grad:
        raise ScorefnError(
            "log_prob does not require grad, so there is no score and the gradient would silently be zero. Build the "
            "distribution from parameters that require grad, by differentiable operations and outside "
            "torch.no_grad(); for the value alone, call this under torch.no_grad()."
        )
    fx = draws.fx.detach() if draws.fx.requires_grad else draws.fx
    log_prob, behaviour = draws.log_prob.detach(), draws.behaviour_log_prob
    total = (fx + log_prob).sum() if fx.shape == log_prob.shape else fx.sum() + log_prob.sum()
    if behaviour is not None:
        total = total + behaviour.sum()
    if math.isfinite(total.item()):  # one read from the device; a sum that merely overflows passes below
        return
    for name, tensor, repair in (
        ("f", fx, "Bound f, or give failures a finite value; leaving draws out would bias the estimate."),
        ("log_prob", log_prob, "x must lie inside the support of the distribution that scores it."),
        ("behaviour_log_prob", behaviour, "What was sampled must have had a positive density."),
    ):
        if tensor is not None and not (finite := torch.isfinite(tensor)).all():
            bad = (~finite.flatten(1).all(1)).nonzero().flatten().tolist()
            raise NonFiniteError(
                f"{name} is {tensor[~finite][0].item()} at {len(bad)} of {len(draws)} draws, namely "
                f"{bad[:10]}{' ...' if len(bad) > 10 else ''}: it would make the whole gradient NaN. {repair}"
            )


def refuse_two_fits(first: object, second: object) -> None:
    """Refuse two parts that are both fitted to the present draws; leave-one-out is not: it is linear in them.

    Raises:
        ScorefnError: both say ``fitted = True``.

    Example:
        >>> import torch, scorefn as sf
        >>> cv = sf.LinearControlVariate(torch.square, 1.0)  # its coefficient is fitted
        >>> sf.core.refuse_two_fits(cv, sf.LeaveOneOut())
        >>> sf.core.refuse_two_fits(cv, sf.OptimalConstant())
        Traceback (most recent call last):
        scorefn.core.errors.ScorefnError: LinearControlVariate and OptimalConstant are both fitted to the ...
    """
    if getattr(first, "fitted", False) and getattr(second, "fitted", False):
        name = "A control variate of these draws" if hasattr(first, "log_prob") else type(first).__name__
        raise ScorefnError(
            f"{name} and {type(second).__name__} are both fitted to the present draws: each would see "
            "its own draw through what the other learnt from it, and the estimate would be biased. Keep LeaveOneOut() "
            "as the baseline, give several functions h to one control variate, or give it a coefficient that is known."
        )


def importance_weight(log_ratio: Tensor) -> Tensor:
    """``exp(log_ratio)``, refused with NonFiniteError where it overflows."""
    weight = log_ratio.exp()
    if not in_transform() and not bool(torch.isfinite(weight).all()):
        raise NonFiniteError(
            f"An importance weight exp({float(log_ratio.detach().max()):.4g}) overflows. The draws come from a "
            "distribution too far from the one that is differentiated: sample afresh, or nearer to it."
        )
    return weight


def as_values(fx: Any, log_prob: Tensor, keep_integers: bool = False) -> Tensor:
    """What f returned as a tensor, with the dtype and device of log_prob where it was none."""
    if isinstance(fx, Tensor):
        return fx
    if any(leaf.requires_grad for leaf in tensor_leaves(fx)):
        raise ScorefnError(
            "f returned a list of tensors that require grad, and making numbers of them would drop the pathwise part "
            "of the gradient: return torch.stack of them."
        )
    try:
        values = torch.as_tensor(fx, device=log_prob.device)
        if values.is_complex():
            raise TypeError("complex numbers are not ordered")
        return values if keep_integers and not values.is_floating_point() else values.to(log_prob.dtype)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ScorefnError(f"f must return one real number per draw, but it returned {type(fx).__name__}.") from error


def kind_of(returned: Any) -> str:
    """What was returned, for a message."""
    return f"shape {tuple(returned.shape)}" if isinstance(returned, Tensor) else f"a {type(returned).__name__}"


def value_shape_message(fx: tuple[int, ...], log_prob: tuple[int, ...]) -> str:
    """Why f's shape is refused, and what to do."""
    message = (
        f"f returned shape {fx}, but the log-probabilities of the draws have shape {log_prob}: f must return one value "
        f"per draw, [N, *B] with N = {log_prob[0]} and B a leading part of the batch shape {log_prob[1:]}. "
    )
    if not fx:
        return message + "Reduce over the last dimensions only, for instance .sum(-1), never over the draws."
    if fx[-1] == 1 and fx[:-1] == log_prob[: len(fx) - 1]:
        return message + "The trailing 1 would broadcast [N] against [N, 1] into [N, N]: use .squeeze(-1)."
    return message + "Reduce f over its event dimensions, or declare them with Independent(p, ...)."
