"""Dynamic taint analysis of plain PyTorch code, at the level of memory.

Every call of torch's Python interface inside the block passes through one ``TorchFunctionMode``; values stay ordinary
tensors. What is known of a value is kept beside the *storage* it lies in, so that views, in-place operations and
``out=`` need no rule of their own; a view that was chosen by a decision (``table[z]``) carries that on top. Three rules
do the work, for the decisions D(args) on which the arguments of a call depend:

* what a call returns, and every storage that it changes, depends on D(args);
* a call that returns something other than tensors (``bool``, ``.item()``, ``.numpy()``, ...) is an *escape*: from then
  on nothing can be known, and every later value depends on D(args);
* a shape that was chosen by a decision (``nonzero``, ``x[mask]``) is an escape as soon as it is read.

Sources: Schulman, Heess, Weber & Abbeel (2015), "Gradient estimation using stochastic computation graphs", for what
the dependencies are good for; Newsome & Song (2005) and Schwartz, Avgerinos & Brumley (2010) for dynamic taint
analysis, whose blind spot, control flow, the second rule covers; Pyro's ``TraceGraph_ELBO`` for a version without it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from torch import Tensor, UntypedStorage
from torch._C import DisableTorchFunction, _are_functorch_transforms_active
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from scorefn.core import PyTree
from scorefn.tracking.escapes import Escape, calling_line, warn
from scorefn.tracking.operations import (
    ALIGNED,
    COUNTS,
    ELSEWHERE,
    FACTORIES,
    KINDS,
    POINTWISE,
    REPLACED,
    SHAPES,
    SIZED,
    STATISTICS,
    known,
    relevant,
)
from scorefn.tracking.storages import Memory, is_boolean, plain, storage_of, tensors_in, unwrapped, version_of


class _Arguments(NamedTuple):
    """The tensors of one call before it, and what they depend on."""

    tensors: list[Tensor]
    storages: list[int | None]
    masks: list[int]
    shape: int
    versions: list[int]


class Taint:
    """What is known of the storages that a block has met; decisions are bits, in the order in which they were made."""

    def __init__(self) -> None:
        self.decisions = list[str]()
        self.escapes = list[Escape]()
        self.escaped = 0
        self.checking = False
        self.memories = dict[int, Memory]()
        self.views: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._shaped = False  # whether any decision chose a shape

    def forget(self) -> None:
        """The block is over."""
        self.memories.clear()
        self.views.clear()

    def names(self, mask: int) -> tuple[str, ...]:
        """Of the decisions, in their order."""
        return tuple(name for k, name in enumerate(self.decisions) if mask >> k & 1)

    def of(self, tree: PyTree) -> int:
        """On which the tensors of a tree depend."""
        mask = 0
        for tensor in tensors_in(tree, []):
            mask |= self.read(plain(tensor))
        return mask

    def read(self, tensor: Tensor, source: bool = True) -> int:
        """On which a tensor depends; without ``source``, on which its content does."""
        storage = storage_of(tensor)
        memory = None if storage is None else self.memories.get(storage._cdata)
        if memory is None and tensor.is_nested:
            memory = self._unseen(storage)
        return 0 if memory is None else self._seen(tensor, memory, source)

    def _unseen(self, storage: UntypedStorage | None) -> Memory | None:
        """What torch did not show in the making (``nested_tensor``): it depends on every decision so far."""
        if storage is None:
            return None
        memory = self.remember(storage)
        memory.content |= (1 << len(self.decisions)) - 1
        return memory

    def _seen(self, tensor: Tensor, memory: Memory, source: bool = True) -> int:
        """On which a tensor in this memory depends; an unknown view of it may be any of those that were chosen."""
        mask = memory.content | memory.source if source else memory.content
        return mask | self.views.get(tensor, memory.chosen) if memory.chosen else mask

    def remember(self, storage: UntypedStorage) -> Memory:
        """What is known of a storage, from now on until it is freed."""
        key, memories = storage._cdata, self.memories
        if (memory := memories.get(key)) is None:
            memory = memories[key] = Memory(weakref.ref(storage, lambda _: memories.pop(key, None)))
        return memory

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make a call of torch's Python interface, and follow what it does."""
        name, about = known(func)
        if about or (name in SHAPES and not self._shaped and len(args) == 1 and not kwargs):
            return func(*args, **kwargs)
        with DisableTorchFunction():
            met = self._meet(tensors_in(kwargs, tensors_in(args, [])) if kwargs else tensors_in(args, []))
        result = func(*args, **kwargs)
        if met is not None:
            with DisableTorchFunction():
                self._follow(name, args, kwargs, met, result)
        return result

    def _meet(self, tensors: list[Tensor]) -> _Arguments | None:
        """The arguments; None where nothing is known of any of them."""
        if _are_functorch_transforms_active():
            tensors = list(map(unwrapped, tensors))
        memories = self.memories
        storages, masks, shape, found = list[int | None](), list[int](), 0, False
        for tensor in tensors:
            storage = storage_of(tensor)
            key = None if storage is None else storage._cdata
            storages.append(key)
            if (memory := memories.get(key)) is None:  # type: ignore[arg-type]
                memory = self._unseen(storage) if tensor.is_nested else None
                if memory is None:
                    masks.append(0)
                    continue
            mask = self._seen(tensor, memory)
            masks.append(mask)
            shape |= memory.shape
            found = found or mask != 0 or memory.shape != 0 or memory.chosen != 0
        return _Arguments(tensors, storages, masks, shape, list(map(version_of, tensors))) if found else None

    def _follow(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], met: _Arguments, result: Any) -> None:
        outputs, others = list[Tensor](), list[Any]()
        tensors_in(result, outputs, others)
        if name in SHAPES:
            asked = self.of(tensors_in((args[1:], kwargs), []))
            self.escape(met.shape | asked, f".{name.strip('_')}, which it chose")
            return
        masks = relevant(name, args, met.masks)
        total = _union(masks)
        sizes = self._sizes(name, args, kwargs, total)
        written = self._write(name, args, kwargs, met, total, sizes)
        for output in map(plain, outputs):
            storage = storage_of(output)
            if storage is None:
                self.escape(total, f"a tensor of layout {output.layout}")
            elif storage._cdata in met.storages:
                if storage._cdata not in written:
                    self.escape(sizes, "the size of a view")
                    aligned = name in ALIGNED  # no value of one argument chooses a view of another
                    self._choose(output, storage, met, [met.shape] * len(masks) if aligned else masks)
            else:
                memory = self.remember(storage)
                memory.content |= total
                if output.ndim:  # a single number has no shape to read
                    memory.shape |= met.shape | sizes
                    self._shaped = self._shaped or memory.shape != 0
        if name in ELSEWHERE or (others and not (name == "type" and isinstance(result, str))):
            self.escape(total | met.shape, KINDS.get(name, f".{name.strip('_')}()"))
        elif type(result) in (tuple, list):
            self.escape(met.shape, "the number of parts")

    def _write(
        self,
        name: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        met: _Arguments,
        total: int,
        sizes: int,
    ) -> set[int]:
        """Mark the storages that the call changed, whichever way it did."""
        written = set()
        in_place = "out" in kwargs or name.startswith(("__setitem__", "__i"))
        in_place = in_place or (name.endswith("_") and not name.endswith("__"))
        updates = name in STATISTICS and next((a for a in args if isinstance(a, bool)), kwargs.get("training", True))
        for position, (tensor, version) in enumerate(zip(met.tensors, met.versions, strict=True)):
            replaced = position == 0 and name in REPLACED
            updated = position > 0 and updates and not tensor.requires_grad
            if replaced or updated or (in_place if version < 0 else version_of(tensor) != version):
                storage = storage_of(tensor)
                if storage is None:
                    self.escape(total, f"a tensor of layout {tensor.layout}")
                    continue
                memory = self.remember(storage)
                memory.content |= total
                memory.shape |= sizes
                self._shaped = self._shaped or sizes != 0
                written.add(storage._cdata)
                if not storage.resizable():
                    self.escape(total, "memory that numpy shares")
                if replaced:
                    self.views.pop(tensor, None)
        return written

    def _choose(self, view: Tensor, storage: UntypedStorage, met: _Arguments, masks: list[int]) -> None:
        """Note on what a view depends beyond the memory that it shows."""
        memory, key, chosen = self.memories.get(storage._cdata), storage._cdata, 0
        before = 0 if memory is None else memory.chosen
        same = [tensor for tensor, other in zip(met.tensors, met.storages, strict=True) if other == key]
        for other, mask in zip(met.storages, masks, strict=True):
            chosen |= 0 if other == key else mask
        if before:
            for tensor in same:
                chosen |= self.views.get(tensor, before)
        if not chosen | before:
            return
        for tensor in same:
            self.views.setdefault(tensor, before)
        memory = self.remember(storage)
        memory.chosen |= chosen
        self.views[view] = chosen

    def _sizes(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], total: int) -> int:
        """The decisions that chose the shape of the result by their values."""
        if name in FACTORIES or name in COUNTS:
            return total
        if name == "where":
            return total if len(args) + len(kwargs) == 1 else 0
        if name == "one_hot":
            classes = args[1] if len(args) > 1 else kwargs.get("num_classes", -1)
            return total if isinstance(classes, Tensor) or classes < 0 else 0
        if name in ("full", "new_full"):
            return self.of([*args[name == "new_full" :][:1], kwargs.get("size")])
        if name == "__getitem__":
            parts = args[1] if isinstance(args[1], tuple | list) else (args[1],)
            return self.of([part for part in parts if isinstance(part, slice | list) or is_boolean(part)])
        if name in SIZED:
            return self.of([part for part in tensors_in((args[1:], kwargs), []) if not part.is_floating_point()])
        if name.strip("_") in POINTWISE:
            return 0
        numbers = tensors_in((args[1:], kwargs), [])  # a dimension, a length, a flag: whatever is not known to be data
        return self.of([number for number in numbers if number.ndim == 0 and not number.is_floating_point()])

    def escape(self, mask: int, kind: str) -> None:
        """From here on, everything depends on these decisions."""
        new = mask & ~self.escaped
        if not new or self.checking or (place := calling_line()) is None:
            return
        self.escaped |= new
        escape = Escape(self.names(new), kind, place.filename, place.line)
        self.escapes.append(escape)
        warn(escape, place)


class TaintMode(TorchFunctionMode):
    """Shows a taint each call of torch's Python interface in its block; the mode is off inside the call."""

    def __init__(self, taint: Taint) -> None:
        super().__init__()
        self._taint = taint

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run the call and follow what it does."""
        taint = self._taint
        if not taint.memories:
            return func(*args, **(kwargs or {}))
        return taint.call(func, args, kwargs or {})


def _union(masks: list[int]) -> int:
    total = 0
    for mask in masks:
        total |= mask
    return total
