"""Squares of the gradients of single draws, from one batch: by outer products for linear layers, else one by one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from scorefn.diagnostics.halves import gradients

_ELEMENTS = 2**22  # of the padded rows and outer products that are in memory at once
_LINEAR = {"AddmmBackward0": ("_saved_mat1", 2), "MmBackward0": ("_saved_self", 1)}  # the input, and the weight's edge


def residual_squares(
    value: Tensor, params: tuple[Tensor, ...], index: Tensor, size: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """Gradient of the mean, and ``sum_m (S_m - size_m mean)^2`` with S_m the gradient of a block's sum.

    A linear layer whose rows belong to single blocks has ``S_m = B_m^T A_m``, with A_m ``[T, in]`` its inputs and B_m
    ``[T, out]`` the gradients at its outputs, for the T rows of block m: outer products summed over the rows, made from
    two backward passes of the whole batch (Goodfellow, 2015, "Efficient per-example gradient computations", for
    T = 1). The first pass gives B; the second weighs each block with a number of its own and shows by the factor on
    each row which block the row belongs to, and that it belongs to no other. Whatever else there is, parameters of
    other layers or rows that mix blocks, takes one backward pass for each block.

    Args:
        value: ``[N]``.
        params: what to differentiate.
        index: ``[N]``, the block of each draw, from 0 to M - 1.
        size: ``[M]``, draws in each block.

    Returns:
        Two lists of one tensor per parameter and of its shape.
    """
    uses = _linear_uses(value, params)
    layers = list({id(layer): layer for several in uses.values() for layer, _ in several}.values())
    total = _recorded(value, params, torch.ones_like(value), layers, "output_grad")
    if uses:
        mark = _marks(len(size)).to(value)
        _recorded(value, tuple(params[i] for i in uses), mark[index], layers, "marked")
        for layer in layers:
            layer.find_blocks(mark)
    mean = [g / len(value) for g in total]
    squares = [torch.zeros_like(q) for q in params]
    rest = []
    for i in range(len(params)):
        if i in uses and all(layer.block is not None for layer, _ in uses[i]):
            squares[i] = _by_outer_products(uses[i], mean[i], size)
        else:
            rest.append(i)
    if rest:
        others = tuple(params[i] for i in rest)
        for m in range(len(size)):
            for i, g in zip(rest, gradients(value, others, (index == m).to(value)), strict=True):
                squares[i] += (g - size[m] * mean[i]).square()
    return mean, squares


def _marks(count: int) -> Tensor:
    """Numbers between 1 and 2, spread, each at a random place: no mixture of some of them is like another."""
    generator = torch.Generator().manual_seed(0)
    place = torch.randperm(count, generator=generator) + 0.25 + 0.5 * torch.rand(count, generator=generator)
    return 1 + place / count


@dataclass(eq=False)
class _Linear:
    """One call of a linear layer."""

    node: Any
    output_grad: Tensor = field(init=False)
    marked: Tensor = field(init=False)
    block: Tensor | None = field(init=False, default=None)

    def find_blocks(self, mark: Tensor) -> None:
        """The block ``[R]`` that each row of the output belongs to; None where some row belongs to several."""
        plain = self.output_grad
        ratio = (self.marked * plain).sum(-1) / plain.square().sum(-1).clamp(min=torch.finfo(plain.dtype).tiny)
        ordered, order = mark.sort()
        nearest = torch.bucketize(ratio, (ordered[1:] + ordered[:-1]) / 2)
        wrong = (self.marked - ordered[nearest].unsqueeze(-1) * plain).abs().amax()
        tolerance = min(0.05 / len(mark), torch.finfo(plain.dtype).eps ** 0.5)  # marks are .5/M apart, or more
        if bool(wrong <= tolerance * plain.abs().amax()):
            self.block = order[nearest]

    @property
    def inputs(self) -> Tensor:
        """``[R, in]``."""
        saved: Tensor = getattr(self.node, _LINEAR[self.node.name()][0])
        return saved.detach()


_Uses = list[tuple[_Linear, bool]]  # calls of layers, each with whether the parameter is the bias


def _linear_uses(value: Tensor, params: tuple[Tensor, ...]) -> dict[int, _Uses]:
    """The uses of each parameter that is a weight or a bias of linear layers, and nothing else."""
    users: dict[Any, list[tuple[Any, int]]] = {}
    for node in _nodes(value):
        for edge, (following, _) in enumerate(node.next_functions):
            if following is not None:
                users.setdefault(following, []).append((node, edge))
    position = {id(q): i for i, q in enumerate(params)}
    layers: dict[Any, _Linear] = {}
    found: dict[int, _Uses] = {}
    for leaf, through in users.items():
        i = position.get(id(getattr(leaf, "variable", None)))
        if i is None:
            continue
        is_bias = params[i].ndim == 1
        if not is_bias:  # the weight enters transposed
            if any(node.name() != "TBackward0" for node, _ in through):
                continue
            through = [use for node, _ in through for use in users[node]]
        if all(_fits(node, edge, is_bias) for node, edge in through):
            found[i] = [(layers.setdefault(node, _Linear(node)), is_bias) for node, _ in through]
    return found


def _fits(node: Any, edge: int, is_bias: bool) -> bool:
    """Whether it is a linear layer that was reached by the edge of its bias, or of its weight."""
    if node.name() not in _LINEAR:
        return False
    if node.name() == "AddmmBackward0" and not node._saved_alpha == node._saved_beta == 1:
        return False
    return edge == 0 and node.name() == "AddmmBackward0" if is_bias else edge == _LINEAR[node.name()][1]


def _nodes(value: Tensor) -> Iterator[Any]:
    """The graph, each node once."""
    waiting: list[Any] = [value.grad_fn]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        yield node
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)


def _recorded(
    value: Tensor, params: tuple[Tensor, ...], weight: Tensor, layers: list[_Linear], name: str
) -> tuple[Tensor, ...]:
    """``gradients``, noting what arrives at the output of each layer."""

    def note(layer: _Linear) -> Any:
        return layer.node.register_prehook(lambda grads: setattr(layer, name, grads[0].detach()))

    handles = [note(layer) for layer in layers]
    try:
        return gradients(value, params, weight)
    finally:
        for handle in handles:
            handle.remove()


def _by_outer_products(uses: _Uses, mean: Tensor, size: Tensor) -> Tensor:
    """``sum_m (B_m^T A_m - size_m mean)^2``."""
    output_grad = torch.cat([layer.output_grad for layer, _ in uses])
    block = torch.cat([layer.block for layer, _ in uses if layer.block is not None])
    counts = torch.bincount(block, minlength=len(size))
    if mean.ndim == 1:  # a bias, whose input is 1
        sums = output_grad.new_zeros(len(size), len(mean)).index_add(0, block, output_grad)
        return (sums - size.unsqueeze(-1) * mean).square().sum(0)
    inputs = torch.cat([layer.inputs for layer, _ in uses])
    if int(counts.max()) == 1:  # the square of one outer product is the outer product of squares
        between = output_grad.T @ (size[block].unsqueeze(-1) * inputs)
        squares = output_grad.square().T @ inputs.square() - 2 * mean * between + size.square().sum() * mean.square()
        return squares.clamp(min=0)
    order = block.argsort(stable=True)
    slot = torch.arange(len(block), device=block.device) - (counts.cumsum(0) - counts)[block[order]]
    rows = torch.full((len(size), int(counts.max())), len(block), device=block.device)
    rows[block[order], slot] = order
    output_grad, inputs = (torch.cat([v, torch.zeros_like(v[:1])]) for v in (output_grad, inputs))  # for the padding
    total = torch.zeros_like(mean)
    chunk = max(_ELEMENTS // (mean.numel() + rows.shape[1] * sum(mean.shape)), 1)
    for part, number in zip(rows.split(chunk), size.reshape(-1, 1, 1).split(chunk), strict=True):
        sums = output_grad[part].transpose(1, 2) @ inputs[part]
        total += (sums - number * mean).square().sum(0)
    return total
