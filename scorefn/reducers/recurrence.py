"""First-order linear recurrences: a scan that is fast on the CPU, and differentiable everywhere."""

from __future__ import annotations

from itertools import repeat
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._C._functorch import is_legacy_batchedtensor
from torch.autograd import forward_ad
from torch.overrides import has_torch_function

from scorefn.core import ShapeError, in_transform

FEW_STEPS, LONG_ROW = 16, 256  # measured: where a loop over the steps is faster than halving them
_FLOATS = (torch.float32, torch.float64)


def linear_recurrence(x: Tensor, decay: Tensor | float, *, reverse: bool = False, dim: int = 0) -> Tensor:
    """``y_t = x_t + decay_t * y_{t-1}`` along ``dim``, or ``y_t = x_t + decay_t * y_{t+1}`` with ``reverse``.

    Nothing is divided, so decays of 0 (the end of an episode) cut exactly, as long as what lies beyond them is finite.
    Differentiable in x and decay, to any order: the derivative is the same recurrence the other way round.

    On the CPU, rows of 256 numbers or more, or up to 16 of them, take a loop over time; all others are joined in pairs,
    ``(x_t + a_t x_{t-1}, a_t a_{t-1})`` for every second t, whose scan is every second y (Brent & Kung, 1982).
    Elsewhere, and where each operation must be seen (``torch.func``, forward mode, ``torch.compile``, tracking), it is
    a log-step scan (Hillis & Steele, 1986): log2(T) rounds of ``y_t += a_t y_{t-s}``, ``a_t *= a_{t-s}``.

    Args:
        x: any shape; T is its size along ``dim``.
        decay: a number, or a tensor that broadcasts to x; the first one (with ``reverse`` the last) is not used.
        reverse: run from the end.
        dim: the axis of time.

    Returns:
        y, of the shape of x.

    Raises:
        ShapeError: decay does not broadcast to x.

    Example:
        >>> import torch
        >>> from scorefn import linear_recurrence
        >>> linear_recurrence(torch.tensor([1.0, 1.0, 1.0]), 0.5, reverse=True)
        tensor([1.7500, 1.5000, 1.0000])
    """
    if dim < 0:
        dim += x.ndim
    if not isinstance(decay, Tensor):
        readable = _in_memory(x)
        if decay == 1 and (dim != 0 or x.numel() < LONG_ROW * len(x) or not readable):
            return x.flip(dim).cumsum(dim).flip(dim) if reverse else x.cumsum(dim)
        decay = float(decay) if readable else decay
    else:
        if decay.dtype != x.dtype:
            x, decay = (v.to(torch.result_type(x, decay)) for v in (x, decay))
        if decay.shape != x.shape:
            try:
                decay = decay.expand(x.shape)
            except RuntimeError as error:
                raise ShapeError(
                    f"decay {tuple(decay.shape)} does not broadcast to x {tuple(x.shape)}: give one decay per step."
                ) from error
        readable = _in_memory(x, decay)
    if not readable:
        return _log_step(x, decay, reverse, dim)
    if torch.is_grad_enabled() and (x.requires_grad or (isinstance(decay, Tensor) and decay.requires_grad)):
        scanned: Tensor = _Scan.apply(x, decay, reverse, dim)  # type: ignore[no-untyped-call]
        return scanned
    return _scan(x, decay, reverse, dim)


def _in_memory(*arguments: Any) -> bool:
    """Whether numpy may read the tensors among the arguments, unseen by transforms and modes."""
    if in_transform() or forward_ad._current_level >= 0 or has_torch_function(arguments):
        return False
    for v in arguments:
        if isinstance(v, Tensor) and not (
            v.is_cpu
            and v.dtype in _FLOATS
            and type(v) in (Tensor, nn.Parameter)
            and not (v.is_neg() or is_legacy_batchedtensor(v))  # is_grads_batched=True makes such
        ):
            return False
    return True


class _Scan(torch.autograd.Function):
    """The scan without a graph of its steps."""

    @staticmethod
    def forward(x: Tensor, decay: Tensor | float, reverse: bool, dim: int) -> Tensor:
        return _scan(x, decay, reverse, dim)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.decay, ctx.reverse, ctx.dim = inputs
        if isinstance(ctx.decay, Tensor):
            ctx.save_for_backward(ctx.decay, output)
            ctx.decay = None

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        """``g_t = gradient_t + decay_{t+1} g_{t+1}`` for x, ``g_t y_{t-1}`` for the decays."""
        if ctx.decay is not None:
            return linear_recurrence(gradient, ctx.decay, reverse=not ctx.reverse, dim=ctx.dim), None, None, None
        decay, y = ctx.saved_tensors
        links = decay.roll(1 if ctx.reverse else -1, ctx.dim)
        g = linear_recurrence(gradient, links, reverse=not ctx.reverse, dim=ctx.dim)
        return g, g * _before(y, ctx.reverse, ctx.dim) if ctx.needs_input_grad[1] else None, None, None


def _before(y: Tensor, reverse: bool, dim: int) -> Tensor:
    """What each step has looked back on: 0 for the first one."""
    rest = y.shape[dim] - 1
    zero = torch.zeros_like(y.narrow(dim, 0, 1))
    return torch.cat([y.narrow(dim, 1, rest), zero] if reverse else [zero, y.narrow(dim, 0, rest)], dim)


def _scan(x: Tensor, decay: Tensor | float, reverse: bool, dim: int) -> Tensor:
    values = _rows(x, dim)
    factors = _rows(decay, dim) if isinstance(decay, Tensor) else decay
    y = np.empty(values.shape, values.dtype)
    matrix = len(y), y.size // max(len(y), 1)
    views = [v if isinstance(v, float) else v.reshape(matrix) for v in (values, factors, y)]
    if reverse:
        views = [v if isinstance(v, float) else v[::-1] for v in views]
    with np.errstate(all="ignore"):  # torch has no such warnings either
        _scan_rows(*views)
    scanned = torch.from_numpy(y)
    return scanned.transpose(0, dim).contiguous() if dim else scanned


def _rows(tensor: Tensor, dim: int) -> Any:
    """As an array with time first, each row dense or broadcast."""
    tensor = tensor.detach() if tensor.requires_grad else tensor
    if dim:
        tensor = tensor.transpose(0, dim)
        tensor = tensor.contiguous() if tensor.stride(-1) > 1 else tensor
    return tensor.numpy()


def _scan_rows(x: Any, a: Any, y: Any) -> None:
    """``y_t = x_t + a_t y_{t-1}`` for arrays ``[T, M]``, a may be a number; written into y."""
    steps, width = x.shape
    number = isinstance(a, float)
    y[:1] = x[:1]
    if steps <= FEW_STEPS or width >= LONG_ROW:
        rows = list(y)
        for last, row, factor, own in zip(rows, rows[1:], repeat(a) if number else a[1:], x[1:], strict=False):
            np.multiply(factor, last, row)
            np.add(row, own, row)
        return
    whole = steps - steps % 2
    first, second, third = (a, a, a) if number else (a[0:whole:2], a[1::2], a[2::2])
    pairs = second * x[0:whole:2]
    pairs += x[1::2]
    _scan_rows(pairs, second * first, y[1::2])
    later = y[2::2]
    np.multiply(third, y[1::2][: len(later)], later)
    later += x[2::2]


def _log_step(x: Tensor, decay: Tensor | float, reverse: bool, dim: int) -> Tensor:
    """By operations of torch alone."""
    length = x.shape[dim]
    y, step = x, 1
    while step < length:
        rest = length - step
        near, far = (0, step) if reverse else (step, 0)  # y[near] is at t, y[far] at t -+ step
        edge = rest if reverse else 0  # where no term lies step beyond the border

        def at(tensor: Tensor, start: int, count: int = rest) -> Tensor:
            return tensor.narrow(dim, start, count)

        moved = at(y, near) + (at(decay, near) if isinstance(decay, Tensor) else decay) * at(y, far)
        kept = at(y, edge, step)
        y = torch.cat([moved, kept] if reverse else [kept, moved], dim)
        if isinstance(decay, Tensor):
            product, kept = at(decay, near) * at(decay, far), at(decay, edge, step)
            decay = torch.cat([product, kept] if reverse else [kept, product], dim)
        else:
            decay = decay * decay
        step *= 2
    return y.clone() if y is x else y
