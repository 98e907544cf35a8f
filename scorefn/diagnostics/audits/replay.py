"""f called again and again, each time from the same state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from scorefn.core import Integrand, PyTree, evaluate
from scorefn.diagnostics.audits.preservation import Snapshot
from scorefn.tracking.generators import generators_restored, seed_generators


@dataclass
class Replay:
    """f with its random numbers repeated at each call, and its state put back after it.

    Args:
        f: the integrand.
        like: a log-probability, which gives dtype and device to values that are not tensors.
        snapshot: of everything that f may change.
        seed: of the global generators.
    """

    f: Integrand
    like: Tensor
    snapshot: Snapshot
    seed: int
    drew: bool = False
    """Whether a call has drawn random numbers."""
    wrote: bool = False
    """Whether a call has changed the draws it was given."""

    def __call__(self, x: PyTree, seed: int | None = None) -> Tensor:
        """The values of f, detached, as floating-point numbers."""
        values = self.differentiable(x, seed).detach()
        return values if values.is_floating_point() else values.to(self.like.dtype)

    def differentiable(self, x: PyTree, seed: int | None = None, *, restore: bool = True) -> Tensor:
        """The values of f with their graph; ``restore=False``: whatever f changed stays changed."""

        def watched(given: PyTree) -> Any:
            value = self.f(given)
            self.wrote = self.wrote or not _same(given, x)
            return value

        with generators_restored():
            seed_generators(self.seed if seed is None else seed)
            self.snapshot.mark()
            try:
                values = evaluate(watched, x, self.like)
                self.drew = self.drew or self.snapshot.generators_moved()
            finally:
                if restore:
                    self.snapshot.restore()
        return values

    @property
    def eps(self) -> float:
        """The machine epsilon of the coarsest numbers that f may compute with."""
        return max(self.snapshot.coarsest, torch.finfo(self.like.dtype).eps)


def _same(a: PyTree, b: PyTree) -> bool:
    pairs = zip(pytree.tree_leaves(a), pytree.tree_leaves(b), strict=False)
    return all(
        torch.equal(p.nan_to_num() if p.is_floating_point() else p, q.nan_to_num() if q.is_floating_point() else q)
        for p, q in pairs
        if isinstance(p, Tensor) and isinstance(q, Tensor)
    )


def rows(x: PyTree, index: Any) -> PyTree:
    """Some of the draws."""
    return pytree.tree_map(lambda leaf: leaf[index] if isinstance(leaf, Tensor) else leaf, x)


def joined(x: PyTree, y: PyTree) -> PyTree:
    """The draws of both, one after the other; of x alone where they do not fit together."""
    a, b = pytree.tree_leaves(x), pytree.tree_leaves(y)
    if len(a) != len(b) or any(
        isinstance(p, Tensor) and (not isinstance(q, Tensor) or p.shape[1:] != q.shape[1:])
        for p, q in zip(a, b, strict=True)
    ):
        return x
    return pytree.tree_map(lambda p, q: torch.cat([p, q]) if isinstance(p, Tensor) else p, x, y)


def mixed(keep: Tensor, x: PyTree, y: PyTree) -> PyTree:
    """x where ``keep [N, *B]``, otherwise y, leaf by leaf."""

    def mix(p: Any, q: Any) -> Any:
        if not isinstance(p, Tensor):
            return p
        return torch.where(keep.reshape(*keep.shape, *[1] * (p.ndim - keep.ndim)).to(p.device), p, q)

    return pytree.tree_map(mix, x, y)
