"""A distribution as R independent copies of itself, each with parameters of its own to differentiate."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Transform

_UNEXPANDED = {
    "_unbroadcasted_scale_tril": 2,
    "_unbroadcasted_cov_factor": 2,
    "_unbroadcasted_cov_diag": 1,
    "_capacitance_tril": 2,
}
"""Tensors that ``expand`` leaves as they are, and how many of their last axes belong to one event."""

Path = tuple[str, ...]


class LoopedError(Exception):
    """Why repeats must be made one after the other; never shown as an error."""


class Cuts:
    """Copies of p whose tensors are cut from the graph of p, and the way back through that graph.

    ``p.expand((R, *batch))`` holds its tensors R times. Made leaves ``[R, *shape]`` of their own, they receive the
    gradient of a sum over the R copies as R separate gradients; each is then carried to the parameters by the
    vector-Jacobian product of p's own graph, all in one batched pass. That graph is kept.

    Args:
        p: the distribution.

    Raises:
        LoopedError: p cannot be expanded, or keeps tensors that require grad where they cannot be cut.
    """

    def __init__(self, p: Distribution) -> None:
        self.p, self._batch = p, tuple(p.batch_shape)
        if overridden := [name for name in ("sample", "log_prob") if name in vars(p)]:
            raise LoopedError(f"this {type(p).__name__} has a {overridden[0]} of its own, which its copies would lose")
        self._held = _rebuilt(p, lambda path, tensor, _: tensor)  # p may compute more tensors later: logits from probs
        self._sources: dict[Path, Tensor] = {}
        self._shapes: dict[Path, tuple[int, ...]] = {}
        one: dict[Path, Tensor] = {}
        _rebuilt(self._expanded(1), lambda path, tensor, _: one.setdefault(path, tensor))
        _rebuilt(self._expanded(2), lambda path, tensor, owner: self._note(path, one[path], tensor, owner))

    def copies(self, count: int) -> tuple[Distribution, list[Tensor]]:
        """R copies, a distribution of batch shape ``[R, *batch]``, and its leaves, in the order of ``pairs``."""
        leaves: dict[Path, Tensor] = {}

        def cut(path: Path, tensor: Tensor, owner: Distribution) -> Tensor:
            shape = (count, *self._shapes[path])
            leaves[path] = self._sources[path].detach().reshape(1, *shape[1:]).expand(shape).requires_grad_()
            return leaves[path]

        copies = _rebuilt(self._expanded(count), cut)
        return copies, [leaves[path] for path in self._sources]

    def pairs(self, gradients: list[Tensor | None]) -> list[tuple[Tensor, Tensor]]:
        """The tensors of p with their graph, and the gradients ``[R, ...]`` found at the leaves, for ``batched``."""
        found = zip(self._sources.values(), gradients, strict=True)
        return [(source, g.reshape(len(g), *source.shape)) for source, g in found if g is not None]

    def _expanded(self, count: int) -> Distribution:
        try:
            expanded: Distribution = self._held.expand(torch.Size((count, *self._batch)))
        except NotImplementedError as error:
            raise LoopedError(f"{type(self.p).__name__} has no expand") from error
        return expanded

    def _note(self, path: Path, one: Tensor, two: Tensor, owner: Distribution) -> Tensor:
        own = _UNEXPANDED.get(path[-1])
        if one.ndim and one.shape[0] == 1 and two.shape == (2, *one.shape[1:]):
            self._shapes[path] = tuple(one.shape[1:])
        elif own is not None and two.shape == one.shape:
            missing = len(owner.batch_shape) - 1 - (one.ndim - own)
            self._shapes[path] = (*[1] * missing, *one.shape)
        else:
            raise LoopedError(f"{type(owner).__name__} keeps its {path[-1]} out of the reach of expand")
        self._sources[path] = one
        return two


def batched(pairs: list[tuple[Tensor, Tensor]], parameters: tuple[Tensor, ...]) -> list[Tensor | None]:
    """``sum_i g_ir^T (d output_i / d q)`` for each r, ``[R, *q.shape]``; None where q has no part; the graph is kept.

    Args:
        pairs: an output and its R gradients ``[R, *output.shape]``.
        parameters: q.
    """
    pairs = [(output, g) for output, g in pairs if output.requires_grad]
    if not pairs:
        return [None] * len(parameters)
    outputs, gradients = zip(*pairs, strict=True)
    found = torch.autograd.grad(
        outputs, parameters, gradients, retain_graph=True, is_grads_batched=True, allow_unused=True
    )
    return list(found)


def across(values: Tensor, weights: Tensor, parameters: tuple[Tensor, ...]) -> list[Tensor | None]:
    """``sum_n weights_nr (d values_nr / d q)`` for each r, ``[R, *q.shape]``; None where q has no part.

    One row of the Jacobian for each coordinate of q, all values at once, where ``batched`` makes one for each r: the
    gradient by the parameters is linear in what it starts from, and its slope there is the Jacobian. Values must be
    such that their gradient can be differentiated again.

    Args:
        values: ``[N, R, *B]``.
        weights: of their shape.
        parameters: q.
    """
    start = torch.ones_like(values).requires_grad_()
    found = torch.autograd.grad(values, parameters, start, create_graph=True, allow_unused=True)
    flat = torch.cat([g.reshape(-1) for g in found if g is not None])
    rows = torch.eye(len(flat), dtype=flat.dtype, device=flat.device)
    (jacobian,) = torch.autograd.grad(flat, start, rows, is_grads_batched=True)
    slopes = (jacobian * weights).transpose(1, 2).flatten(2).sum(2).T
    parts = iter(slopes.split([g.numel() for g in found if g is not None], dim=1))
    return [None if g is None else next(parts).reshape(-1, *g.shape) for g in found]


def _rebuilt(p: Distribution, replace: Callable[[Path, Tensor, Distribution], Tensor], path: Path = ()) -> Distribution:
    """A shallow copy of p, at any depth, whose tensors that require grad are replaced; each of them once."""
    other = copy.copy(p)
    done: dict[int, Tensor] = {}
    for name, value in vars(p).items():
        if isinstance(value, Tensor):
            if value.requires_grad:
                if id(value) not in done:  # one tensor under two names, such as logits and _param
                    done[id(value)] = replace((*path, name), value, p)
                vars(other)[name] = done[id(value)]
        elif isinstance(value, Distribution):
            vars(other)[name] = _rebuilt(value, replace, (*path, name))
        elif _hides(value, frozenset({id(p)})):
            raise LoopedError(f"{type(p).__name__} keeps parameters that require grad in its {name}")
    return other


def _hides(part: Any, seen: frozenset[int]) -> bool:
    """Whether a tensor that requires grad lies inside, at any depth."""
    if isinstance(part, Tensor):
        return part.requires_grad
    if isinstance(part, nn.Module):
        return any(parameter.requires_grad for parameter in part.parameters())
    if id(part) in seen:
        return False
    if isinstance(part, Mapping):
        inner: Iterable[Any] = part.values()
    elif isinstance(part, list | tuple | set):
        inner = part
    elif isinstance(part, Distribution | Transform | torch.distributions.constraints.Constraint):
        inner = vars(part).values()
    else:
        return False
    return any(_hides(value, seen | {id(part)}) for value in inner)
