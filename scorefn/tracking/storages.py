"""The storages in which tensors lie, and what is known of them."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch._C import _are_functorch_transforms_active, _functorch

_SCALARS = frozenset((int, float, bool, type(None), str, torch.dtype, torch.device))


class Memory:
    """What is known of one storage; decisions are bits, in the order in which they were made."""

    __slots__ = ("alive", "chosen", "content", "shape", "source")

    def __init__(self, alive: weakref.ref[UntypedStorage]) -> None:
        self.alive = alive  # kept for its callback, which forgets this storage
        self.content = 0  # on which the content depends
        self.source = 0  # that took their values from here
        self.chosen = 0  # that chose a view of it; `Taint.views` says which
        self.shape = 0  # that chose the shape of what lies here


def tensors_in(tree: Any, found: list[Tensor], others: list[Any] | None = None) -> list[Tensor]:
    """Append the tensors of arguments or results, which may be nested, to those found."""
    if isinstance(tree, Tensor):
        found.append(tree)
    elif isinstance(tree, tuple | list):
        for part in tree:
            if isinstance(part, Tensor):
                found.append(part)
            elif others is not None or type(part) not in _SCALARS:
                tensors_in(part, found, others)
    elif isinstance(tree, dict):
        for part in tree.values():
            tensors_in(part, found, others)
    elif isinstance(tree, slice):
        tensors_in((tree.start, tree.stop, tree.step), found)
    elif type(tree) in _SCALARS or not isinstance(tree, Sequence) or isinstance(tree, str | bytes):
        if others is not None and tree is not None:
            others.append(tree)
    else:
        for part in tree:
            tensors_in(part, found, others)
    return found


def plain(tensor: Tensor) -> Tensor:
    """The tensor inside the wrappers of ``torch.func`` transforms."""
    return unwrapped(tensor) if _are_functorch_transforms_active() else tensor


def unwrapped(tensor: Tensor) -> Tensor:
    """The tensor inside whatever wrappers it has."""
    while _functorch.is_functorch_wrapped_tensor(tensor):
        tensor = _functorch.get_unwrapped(tensor)
    return tensor


def storage_of(tensor: Tensor) -> UntypedStorage | None:
    """Where the tensor lies; None for layouts without a single memory."""
    try:
        return tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):
        return None


def version_of(tensor: Tensor) -> int:
    """How often it was changed in place; -1 in inference mode, which does not count."""
    try:
        return tensor._version
    except RuntimeError:
        return -1


def is_boolean(part: Any) -> bool:
    """Whether a part of an index is a mask."""
    return isinstance(part, Tensor) and part.dtype in (torch.bool, torch.uint8)
