"""Tracking: a block of plain PyTorch code in which the decisions behind every value are known."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Literal, Self

import torch
from torch import Tensor
from torch._C import DisableTorchFunction
from torch.overrides import TorchFunctionMode

from scorefn.core import PyTree, ScorefnError
from scorefn.tracking.escapes import Escape
from scorefn.tracking.ledger import check_decision, check_name, leaves_of, pinned_value
from scorefn.tracking.storages import storage_of
from scorefn.tracking.taint import Taint, TaintMode


class Tracking:
    """A block of plain PyTorch code in which the decisions behind every value are known.

    With M_kj = 1 where value j may depend on decision k, directly or through other decisions, the gradient
    ``E[sum_k (sum_j M_kj f_j) grad log p_k]`` is unbiased: ``sf.Influence(t.influence_mask())`` is that credit.

    Dependencies are never under-counted by what torch's Python interface shows: operations, views, in-place changes,
    modules, distributions, ``autograd.Function``, checkpoints, ``torch.func`` transforms, ``torch.tensor(z)``. They may
    be over-counted: storages are followed, not their elements, and after an escape (``if z:``, ``z.item()``,
    ``z.numpy()``, ``table[int(z)]``) every later value counts, with one ``EscapeWarning`` for each decision. Register a
    value where it is made: what is asked after an escape includes it, because Python may have picked the value by it.

    Invisible, so that only ``audit`` can find it: other threads and processes, ``torch.jit``, ``torch.compile``d code
    and C++ extensions, assignments to ``c.real`` and ``c.imag`` (``torch.view_as_real(c)[..., 0] = z`` is seen),
    ``torch.utils.dlpack.to_dlpack``, memory read through its address, backward hooks, and exceptions that are caught.
    A ``torch.nested.nested_tensor`` is made out of sight too: it counts as depending on every decision so far.

    No part of torch is patched, and nothing costs anything outside the block. Inside, beside the operation itself, a
    call costs about 2 µs before the first decision, 7 µs where nothing tracked is involved, 17 µs where something is
    and 30 µs where a decision chooses a view, on one core of a busy server.

    Sources: Schulman, Heess, Weber & Abbeel (2015), "Gradient estimation using stochastic computation graphs", theorem
    1, for the gradient; Newsome & Song (2005), "Dynamic taint analysis for automatic detection, analysis, and signature
    generation of exploits on commodity software", for the way in which dependencies are followed.

    Args:
        pinned: values of decisions by name, which take the place of those that are drawn.
        dependencies: "tracked"; or "order": a value depends on every decision made before it, which is sound for any
            program and costs nothing.

    Raises:
        ScorefnError: a block that is entered twice, used while it is not open, or given what it cannot follow.

    Example:
        >>> import torch, scorefn as sf
        >>> from torch.distributions import Bernoulli
        >>> p, q = Bernoulli(logits=torch.tensor(0.4)), Bernoulli(logits=torch.tensor(-0.7))
        >>> with sf.tracking.Tracking() as t:
        ...     z = t.decision("z", p.sample())
        ...     w = t.decision("w", q.sample())
        ...     values = [t.value("first", z * 2), t.value("second", torch.where(w > 0, 1.0, z))]
        >>> t.influence_mask()  # rows z and w, columns first and second: w is not charged with the first
        tensor([[ True,  True],
                [False,  True]])
        >>> credit = sf.Influence(t.influence_mask())
        >>> t
        Tracking(decisions=2, values=2, escapes=0)
    """

    def __init__(
        self, pinned: Mapping[str, Tensor] | None = None, *, dependencies: Literal["tracked", "order"] = "tracked"
    ) -> None:
        if dependencies not in ("tracked", "order"):
            raise ScorefnError(f'dependencies must be "tracked" or "order", but it is {dependencies!r}.')
        self._pinned = dict(pinned or {})
        self._taint = Taint()
        self._mode = TaintMode(self._taint) if dependencies == "tracked" else None
        self._state: Literal["new", "open", "closed"] = "new"
        self._values = dict[str, int]()

    def __enter__(self) -> Self:
        if self._state != "new":
            raise ScorefnError(
                "This Tracking has been entered before, and its decisions belong to that block. Make a new one: "
                "with Tracking() as t."
            )
        self._state = "open"
        if self._mode is not None:
            TorchFunctionMode.__enter__(self._mode)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._state = "closed"
        if self._mode is not None:
            TorchFunctionMode.__exit__(self._mode, kind, error, traceback)
        self._taint.forget()

    def __repr__(self) -> str:
        """What differs from a plain tracking, and how much was registered so far."""
        parts = [f"pinned={sorted(self._pinned)}"] if self._pinned else []
        parts += ["dependencies='order'"] if self._mode is None else []
        count = f"decisions={len(self.decisions)}, values={len(self._values)}, escapes={len(self.escapes)}"
        return f"Tracking({', '.join([*parts, count])})"

    @property
    def decisions(self) -> tuple[str, ...]:
        """Names of the decisions, in the order in which they were made: the K rows of the mask."""
        return tuple(self._taint.decisions)

    @property
    def values(self) -> tuple[str, ...]:
        """Names of the values, in the order in which they were registered: the J columns of the mask."""
        return tuple(self._values)

    @property
    def escapes(self) -> tuple[Escape, ...]:
        """Where decisions left the tensor graph."""
        return tuple(self._taint.escapes)

    def decision(self, name: str, value: Tensor, *, given: PyTree = ()) -> Tensor:
        """Register a sampled value; go on with what is returned, a copy that is tracked.

        Args:
            name: its own.
            value: what was drawn, of any shape; it carries the dependencies of the parameters it was drawn from.
            given: tensors on which its distribution depends, such as parameters or a log-probability: needed where
                the value was not drawn from them inside the block.

        Returns:
            The value, or what it is pinned to, in its own shape, dtype and device.

        Raises:
            ScorefnError: the block is not open; a name that is taken; a value that is no dense tensor; or a pinned
                value of another dtype or device.
            ShapeError: a pinned value of another shape.
        """
        self._check_open()
        check_name("decision", name, self._taint.decisions)
        check_decision(name, value)
        taken = pinned_value(name, value, self._pinned[name]) if name in self._pinned else value
        copy = taken.clone()  # where an enclosing block sees it
        with DisableTorchFunction():
            drawn, kept = storage_of(value), storage_of(copy)
            if drawn is None or kept is None:
                raise ScorefnError(
                    f"The decision {name!r} is a tensor of layout {value.layout}, which has no single memory to "
                    "follow. Register its dense values instead."
                )
            before = self._taint.read(value, source=False) | self._taint.of(leaves_of(given)) | self._taint.escaped
            mask = before | 1 << len(self._taint.decisions)
            self._taint.remember(drawn).source |= mask
            self._taint.remember(kept).content = mask
            self._taint.decisions.append(name)
        return copy

    def value(self, name: str, value: Any) -> Any:
        """Register a value that is charged to the decisions it depends on; return it unchanged.

        Args:
            name: its own.
            value: a tensor of any shape, a number, or tuples, lists and dicts of them: one column of the mask.

        Raises:
            ScorefnError: the block is not open; a name that is taken; or an object that may hide tensors.
        """
        self._check_open()
        check_name("value", name, self._values)
        self._values[name] = self._mask(value)
        return value

    def dependencies(self, value: PyTree) -> frozenset[str]:
        """Names of the decisions on which a value may depend; of what is no tensor, those that have escaped.

        Raises:
            ScorefnError: as ``value``.
        """
        self._check_open()
        return frozenset(self._taint.names(self._mask(value)))

    def carried(self, value: PyTree) -> frozenset[str]:
        """Names of the decisions that reached a value by torch's operations alone, not by what Python chose.

        They lie behind its shape and content; on those that have escaped it may depend as well: see ``dependencies``.

        Raises:
            ScorefnError: as ``value``.
        """
        self._check_open()
        if self._mode is None:
            return frozenset(self._taint.decisions)
        with DisableTorchFunction():
            return frozenset(self._taint.names(self._taint.of(leaves_of(value))))

    def influence_mask(self) -> Tensor:
        """``[K, J]`` bool for ``Influence``: decisions in the order made, values in the order registered.

        Raises:
            ScorefnError: there is no decision or no value.
        """
        decisions = self._taint.decisions
        if not decisions or not self._values:
            raise ScorefnError(
                f"A mask needs decisions and values, but {len(decisions)} decisions and {len(self._values)} "
                "values were registered. Call decision() and value() inside the block."
            )
        rows = range(len(decisions))
        return torch.tensor([[bool(mask >> k & 1) for mask in self._values.values()] for k in rows])

    @contextmanager
    def checking(self) -> Iterator[None]:
        """A block in which values are read only to decide whether an error is raised: no escapes."""
        before, self._taint.checking = self._taint.checking, True
        try:
            yield
        finally:
            self._taint.checking = before

    def _check_open(self) -> None:
        if self._state != "open":
            raise ScorefnError(
                "The block of this Tracking is not open, so operations are not seen and the answer could be too "
                "small. Call this inside: with Tracking() as t."
            )

    def _mask(self, value: PyTree) -> int:
        if self._mode is None:
            return (1 << len(self._taint.decisions)) - 1
        with DisableTorchFunction():
            return self._taint.of(leaves_of(value)) | self._taint.escaped
