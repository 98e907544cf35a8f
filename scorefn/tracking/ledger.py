"""What a program writes down while it runs: its decisions and its values, by name."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import AbstractContextManager
from numbers import Number
from typing import Any, Protocol

from torch import Tensor
from torch.utils import _pytree as pytree

from scorefn.core import PyTree, ScorefnError, ShapeError


class Ledger(Protocol):
    """What a program is given, so that the same program can be run, tracked, pinned and audited.

    Example:
        >>> import torch
        >>> from scorefn.tracking import Ledger, Tracking, audit
        >>> def program(ledger: Ledger) -> None:
        ...     p = torch.distributions.Bernoulli(torch.tensor([0.5, 0.2]))
        ...     z = ledger.decision("z", p.sample(), given=p.probs)
        ...     w = ledger.decision("w", p.sample(), given=p.probs)
        ...     ledger.value("cost", 3 * z.sum())
        >>> with Tracking() as t:  # once, with what is known of every value
        ...     program(t)
        >>> t.influence_mask().tolist()  # of z and of w
        [[True], [False]]
        >>> bool(
        ...     audit(program, t.influence_mask())
        ... )  # and many times, with one decision changed at a time
        True
    """

    def decision(self, name: str, value: Tensor, *, given: PyTree = ()) -> Tensor:
        """Register a sampled value and return it, or the value to which it is pinned; go on with what is returned.

        The value is a tensor of any shape, and so is what is returned; ``given`` are tensors that its distribution is
        made of.
        """
        ...

    def value(self, name: str, value: Any) -> Any:
        """Register a value that is charged to decisions, such as a cost or a log-density; return it."""
        ...

    def dependencies(self, value: PyTree) -> frozenset[str]:
        """Names of the decisions on which a value may depend."""
        ...

    def checking(self) -> AbstractContextManager[None]:
        """A block in which values are read only to decide whether an error is raised."""
        ...


def check_name(kind: str, name: Any, taken: Collection[str]) -> None:
    """Refuse a name that is no string, or that another decision or value already has."""
    if not isinstance(name, str):
        raise ScorefnError(f"A {kind} is known by its name, a string, but {name!r} was given. Pass {kind}('...', ...).")
    if name in taken:
        raise ScorefnError(
            f"The {kind} {name!r} is registered twice, and the two could not be told apart. Give each its own name, "
            f"for instance f'{name}[{{t}}]' in a loop."
        )


def check_decision(name: str, value: Any) -> None:
    """Refuse a decision that is no ordinary tensor."""
    if not isinstance(value, Tensor):
        raise ScorefnError(
            f"The decision {name!r} is a {type(value).__name__}, and only tensors can be followed. Wrap it with "
            "torch.as_tensor and go on with the tensor that decision() returns."
        )


def pinned_value(name: str, value: Tensor, pinned: Tensor) -> Tensor:
    """The pinned value, which must look like the one that was drawn."""
    if not isinstance(pinned, Tensor):
        raise ScorefnError(
            f"The decision {name!r} is pinned to a {type(pinned).__name__}, but it takes the place of a tensor. Pass "
            f"torch.as_tensor(..., dtype={value.dtype})."
        )
    if pinned.shape != value.shape:
        raise ShapeError(
            f"The decision {name!r} is drawn with shape {tuple(value.shape)} but pinned to shape "
            f"{tuple(pinned.shape)}: nothing is repaired by broadcasting. Pin it to a tensor of its own shape."
        )
    if pinned.dtype != value.dtype or pinned.device != value.device:
        raise ScorefnError(
            f"The decision {name!r} is {value.dtype} on {value.device} but pinned to {pinned.dtype} on "
            f"{pinned.device}: nothing is rounded or copied silently. Convert the pinned value."
        )
    return pinned


def leaves_of(value: PyTree) -> list[Any]:
    """The leaves of what is registered; an object that could hide tensors is refused."""
    leaves: list[Any] = pytree.tree_leaves(value)
    for leaf in leaves:
        if leaf is not None and not isinstance(leaf, Tensor | Number | str) and not hasattr(leaf, "__array__"):
            raise ScorefnError(
                f"Dependencies of a {type(leaf).__name__} were asked, and the tensors it may hold cannot be seen. Pass "
                "the tensors themselves, in tuples, lists or dicts; of a distribution, its parameters or a "
                "log-probability."
            )
    return leaves
