"""Tracking: dynamic taint analysis of plain PyTorch code, at the level of memory.

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

import os
import sys
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from types import CodeType, FrameType, TracebackType
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor, UntypedStorage
from torch._C import DisableTorchFunction, _are_functorch_transforms_active, _functorch
from torch.distributions import Distribution
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from scorefn.core import PyTree, ScorefnError
from scorefn.tracking.ledger import check_decision, check_name, leaves_of, pinned_value

_PACKAGES = (os.path.dirname(torch.__file__) + os.sep, os.path.dirname(__file__) + os.sep)

_VALIDATION: frozenset[CodeType] = frozenset({Distribution.__init__.__code__, Distribution._validate_sample.__code__})
"""Reads below these decide only whether an error is raised."""

# Names of torch's functions, methods and properties, where the three rules above need more than D(args).
# fmt: off
_ABOUT = frozenset((  # facts about a tensor that no value can change
    "dtype", "device", "layout", "requires_grad", "grad_fn", "_version", "__hash__", "names", "has_names", "name",
    "element_size", "itemsize", "get_device", "result_type", "can_cast", "promote_types", "output_nr",
    "retains_grad", "retain_grad", "register_hook", "_backward_hooks", "_is_view", "register_post_accumulate_grad_hook",
    "_post_accumulate_grad_hooks", "__dlpack_device__", "_has_symbolic_sizes_strides", "qscheme",
))
_SHAPES = frozenset((  # facts about a shape
    "shape", "size", "dim", "ndim", "ndimension", "numel", "nelement", "stride", "storage_offset", "__len__",
    "nbytes", "is_contiguous", "is_same_size", "dim_order",
))
_LIKE = frozenset((  # the first argument gives shape, dtype and device only
    "zeros_like", "ones_like", "empty_like", "rand_like", "randn_like", "full_like", "randint_like", "new_zeros",
    "new_ones", "new_empty", "new_full", "new_tensor",
))
_AS = frozenset((  # so does the second
    "expand_as", "view_as", "reshape_as", "type_as", "to",
))
_ALIGNED = frozenset((  # each result is a view of one argument, of which the others give the shape only
    "broadcast_tensors", "broadcast_all", "expand_as", "view_as", "reshape_as",
))
_FACTORIES = frozenset((  # numbers among the arguments may be sizes
    "zeros", "ones", "empty", "rand", "randn", "randint", "randperm", "arange", "range", "linspace", "logspace",
    "eye", "tril_indices", "triu_indices", "hann_window", "hamming_window", "blackman_window", "bartlett_window",
    "kaiser_window", "fft_fftfreq", "fft_rfftfreq", "fftfreq", "rfftfreq",
))
_SIZED = frozenset((  # numbers after the first argument may be sizes
    "repeat", "tile", "expand", "broadcast_to", "narrow", "view", "reshape", "unflatten", "split", "chunk",
    "tensor_split", "unfold", "topk", "resize_", "pad", "diag", "diagonal", "diag_embed", "as_strided",
    "new_zeros", "new_ones", "new_empty", "repeat_interleave", "bincount",
))
_POINTWISE = frozenset((  # single integers among the arguments are data
    *(f"{side}{name}" for side in ("", "r", "i") for name in (
        "add", "sub", "mul", "div", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift",
    )),
    "true_divide", "floor_divide", "divide", "multiply", "subtract", "remainder", "fmod", "float_power", "eq", "ne",
    "lt", "le", "gt", "ge", "greater", "less", "equal", "not_equal", "greater_equal", "less_equal", "logical_and",
    "logical_or", "logical_xor", "bitwise_and", "bitwise_or", "bitwise_xor", "maximum", "minimum", "fmax", "fmin",
    "clamp", "clip", "clamp_min", "clamp_max", "where", "lerp", "addcmul", "addcdiv", "atan2", "hypot",
    "copysign", "xlogy", "ldexp", "isclose", "allclose", "broadcast_tensors", "broadcast_all", "gather",
    "index_select", "take", "embedding", "masked_fill", "fill", "copy", "scatter", "scatter_add", "index_add",
    "index_put", "index_fill", "index_copy", "setitem", "getitem", "cross_entropy", "nll_loss", "mse_loss",
    "binary_cross_entropy", "binary_cross_entropy_with_logits", "binomial", "poisson", "normal", "lgamma",
))
_COUNTS = frozenset((  # the shape of the result depends on the values of the arguments
    "_pack_padded_sequence", "pack_padded_sequence",
    "nonzero", "argwhere", "masked_select", "unique", "unique_consecutive", "_unique2", "bincount",
    "repeat_interleave",
))
_ELSEWHERE = frozenset((  # the result goes into .grad, or through a callback
    "backward", "apply_", "map_", "map2_",
))
_REPLACED = frozenset(("set_", "set data"))  # the first argument shows other memory after it
_STATISTICS = frozenset((  # buffers among the arguments are changed without being counted as changed
    "batch_norm", "instance_norm", "native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm",
))
# fmt: on
_KINDS = {
    "__bool__": "bool()",
    "__int__": "int()",
    "__float__": "float()",
    "__complex__": "complex()",
    "__index__": "an index",
    "__array__": "numpy",
    "__dlpack__": "DLPack",
    "__repr__": "printing",
    "__format__": "printing",
}


class EscapeWarning(UserWarning):
    """A decision left the tensor graph, so that every later value counts as depending on it."""


@dataclass(frozen=True)
class Escape:
    """Where decisions left the tensor graph.

    Args:
        decisions: their names.
        kind: how: ``"bool()"``, ``".item()"``, ...
        filename: of the line that did it.
        line: its number.
    """

    decisions: tuple[str, ...]
    kind: str
    filename: str
    line: int


class _Memory:
    """What is known of one storage; decisions are bits, in the order in which they were made."""

    __slots__ = ("alive", "chosen", "content", "shape", "source")

    def __init__(self, alive: weakref.ref[UntypedStorage]) -> None:
        self.alive = alive  # kept for its callback, which forgets this storage
        self.content = 0  # on which the content depends
        self.source = 0  # that took their values from here
        self.chosen = 0  # that chose a view of it; `Tracking._views` says which
        self.shape = 0  # that chose the shape of what lies here


class _Arguments(NamedTuple):
    """The tensors of one call before it, and what they depend on."""

    tensors: list[Tensor]
    storages: list[int | None]
    masks: list[int]
    shape: int
    versions: list[int]


class Tracking:
    """A block of plain PyTorch code in which the decisions behind every value are known.

    ::

        with sf.tracking.Tracking() as t:
            p, q = Bernoulli(logits=a), Bernoulli(logits=b)
            z = t.decision("z", p.sample())
            w = t.decision("w", q.sample())
            t.value("first", z * 2)
            t.value("second", torch.where(w > 0, 1.0, z))
        credit = sf.Influence(t.influence_mask())  # [[True, True], [False, True]]

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

    Args:
        pinned: values of decisions by name, which take the place of those that are drawn.
        dependencies: "tracked"; or "order": a value depends on every decision made before it, which is sound for any
            program and costs nothing.

    Raises:
        ScorefnError: a block that is entered twice, used while it is not open, or given what it cannot follow.
    """

    def __init__(
        self, pinned: Mapping[str, Tensor] | None = None, *, dependencies: Literal["tracked", "order"] = "tracked"
    ) -> None:
        if dependencies not in ("tracked", "order"):
            raise ScorefnError(f'dependencies must be "tracked" or "order", but it is {dependencies!r}.')
        self._pinned = dict(pinned or {})
        self._mode = _Mode(self) if dependencies == "tracked" else None
        self._state: Literal["new", "open", "closed"] = "new"
        self._decisions = list[str]()
        self._values = dict[str, int]()
        self._escapes = list[Escape]()
        self._escaped = 0
        self._checking = False
        self._shaped = False  # whether any decision chose a shape
        self._memories = dict[int, _Memory]()
        self._views: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

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
        self._memories.clear()
        self._views.clear()

    @property
    def decisions(self) -> tuple[str, ...]:
        """Names of the decisions, in the order in which they were made: the K rows of the mask."""
        return tuple(self._decisions)

    @property
    def values(self) -> tuple[str, ...]:
        """Names of the values, in the order in which they were registered: the J columns of the mask."""
        return tuple(self._values)

    @property
    def escapes(self) -> tuple[Escape, ...]:
        """Where decisions left the tensor graph."""
        return tuple(self._escapes)

    def decision(self, name: str, value: Tensor, *, given: PyTree = ()) -> Tensor:
        """Register a sampled value; go on with what is returned, a copy that is tracked.

        Args:
            name: its own.
            value: what was drawn; it carries the dependencies of the parameters it was drawn from.
            given: tensors on which its distribution depends, such as parameters or a log-probability: needed where
                the value was not drawn from them inside the block.
        """
        self._check_open()
        check_name("decision", name, self._decisions)
        check_decision(name, value)
        taken = pinned_value(name, value, self._pinned[name]) if name in self._pinned else value
        copy = taken.clone()  # where an enclosing block sees it
        with DisableTorchFunction():
            drawn, kept = _storage(value), _storage(copy)
            if drawn is None or kept is None:
                raise ScorefnError(
                    f"The decision {name!r} is a tensor of layout {value.layout}, which has no single memory to "
                    "follow. Register its dense values instead."
                )
            before = self._read(value, source=False) | self._of(leaves_of(given)) | self._escaped
            mask = before | 1 << len(self._decisions)
            self._remember(drawn).source |= mask
            self._remember(kept).content = mask
            self._decisions.append(name)
        return copy

    def value(self, name: str, value: Any) -> Any:
        """Register a value that is charged to the decisions it depends on; return it unchanged."""
        self._check_open()
        check_name("value", name, self._values)
        self._values[name] = self._mask(value)
        return value

    def dependencies(self, value: PyTree) -> frozenset[str]:
        """Names of the decisions on which a value may depend; of what is no tensor, those that have escaped."""
        self._check_open()
        return frozenset(self._names(self._mask(value)))

    def carried(self, value: PyTree) -> frozenset[str]:
        """Names of the decisions that reached a value by torch's operations alone, not by what Python chose.

        They lie behind its shape and content; on those that have escaped it may depend as well: see ``dependencies``.
        """
        self._check_open()
        if self._mode is None:
            return frozenset(self._decisions)
        with DisableTorchFunction():
            return frozenset(self._names(self._of(leaves_of(value))))

    def influence_mask(self) -> Tensor:
        """``[K, J]`` bool for ``Influence``: decisions in the order made, values in the order registered."""
        if not self._decisions or not self._values:
            raise ScorefnError(
                f"A mask needs decisions and values, but {len(self._decisions)} decisions and {len(self._values)} "
                "values were registered. Call decision() and value() inside the block."
            )
        rows = range(len(self._decisions))
        return torch.tensor([[bool(mask >> k & 1) for mask in self._values.values()] for k in rows])

    @contextmanager
    def checking(self) -> Iterator[None]:
        """A block in which values are read only to decide whether an error is raised: no escapes."""
        before, self._checking = self._checking, True
        try:
            yield
        finally:
            self._checking = before

    # ----------------------------------------------------------------------------------------------- what is known

    def _check_open(self) -> None:
        if self._state != "open":
            raise ScorefnError(
                "The block of this Tracking is not open, so operations are not seen and the answer could be too "
                "small. Call this inside: with Tracking() as t."
            )

    def _names(self, mask: int) -> tuple[str, ...]:
        return tuple(name for k, name in enumerate(self._decisions) if mask >> k & 1)

    def _mask(self, value: PyTree) -> int:
        if self._mode is None:
            return (1 << len(self._decisions)) - 1
        with DisableTorchFunction():
            return self._of(leaves_of(value)) | self._escaped

    def _of(self, tree: PyTree) -> int:
        mask = 0
        for tensor in _tensors(tree, []):
            mask |= self._read(_plain(tensor))
        return mask

    def _read(self, tensor: Tensor, source: bool = True) -> int:
        storage = _storage(tensor)
        memory = None if storage is None else self._memories.get(storage._cdata)
        if memory is None and tensor.is_nested:
            memory = self._unseen(storage)
        return 0 if memory is None else self._seen(tensor, memory, source)

    def _unseen(self, storage: UntypedStorage | None) -> _Memory | None:
        """What torch did not show in the making (``nested_tensor``): it depends on every decision so far."""
        if storage is None:
            return None
        memory = self._remember(storage)
        memory.content |= (1 << len(self._decisions)) - 1
        return memory

    def _seen(self, tensor: Tensor, memory: _Memory, source: bool = True) -> int:
        """On which a tensor in this memory depends; an unknown view of it may be any of those that were chosen."""
        mask = memory.content | memory.source if source else memory.content
        return mask | self._views.get(tensor, memory.chosen) if memory.chosen else mask

    def _remember(self, storage: UntypedStorage) -> _Memory:
        key, memories = storage._cdata, self._memories
        if (memory := memories.get(key)) is None:
            memory = memories[key] = _Memory(weakref.ref(storage, lambda _: memories.pop(key, None)))
        return memory

    # --------------------------------------------------------------------------------------------------- each call

    def _call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name, about = _known(func)
        if about or (name in _SHAPES and not self._shaped and len(args) == 1 and not kwargs):
            return func(*args, **kwargs)
        with DisableTorchFunction():
            met = self._meet(_tensors(kwargs, _tensors(args, [])) if kwargs else _tensors(args, []))
        result = func(*args, **kwargs)
        if met is not None:
            with DisableTorchFunction():
                self._follow(name, args, kwargs, met, result)
        return result

    def _meet(self, tensors: list[Tensor]) -> _Arguments | None:
        """The arguments; None where nothing is known of any of them."""
        if _are_functorch_transforms_active():
            tensors = list(map(_unwrapped, tensors))
        memories = self._memories
        storages, masks, shape, known = list[int | None](), list[int](), 0, False
        for tensor in tensors:
            storage = _storage(tensor)
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
            known = known or mask != 0 or memory.shape != 0 or memory.chosen != 0
        return _Arguments(tensors, storages, masks, shape, list(map(_version, tensors))) if known else None

    def _follow(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], met: _Arguments, result: Any) -> None:
        outputs, others = list[Tensor](), list[Any]()
        _tensors(result, outputs, others)
        if name in _SHAPES:
            asked = self._of(_tensors((args[1:], kwargs), []))
            self._escape(met.shape | asked, f".{name.strip('_')}, which it chose")
            return
        masks = _relevant(name, args, met.masks)
        total = _union(masks)
        sizes = self._sizes(name, args, kwargs, total)
        written = self._write(name, args, kwargs, met, total, sizes)
        for output in map(_plain, outputs):
            storage = _storage(output)
            if storage is None:
                self._escape(total, f"a tensor of layout {output.layout}")
            elif storage._cdata in met.storages:
                if storage._cdata not in written:
                    self._escape(sizes, "the size of a view")
                    aligned = name in _ALIGNED  # no value of one argument chooses a view of another
                    self._choose(output, storage, met, [met.shape] * len(masks) if aligned else masks)
            else:
                memory = self._remember(storage)
                memory.content |= total
                if output.ndim:  # a single number has no shape to read
                    memory.shape |= met.shape | sizes
                    self._shaped = self._shaped or memory.shape != 0
        if name in _ELSEWHERE or (others and not (name == "type" and isinstance(result, str))):
            self._escape(total | met.shape, _KINDS.get(name, f".{name.strip('_')}()"))
        elif type(result) in (tuple, list):
            self._escape(met.shape, "the number of parts")

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
        updates = name in _STATISTICS and next((a for a in args if isinstance(a, bool)), kwargs.get("training", True))
        for position, (tensor, version) in enumerate(zip(met.tensors, met.versions, strict=True)):
            replaced = position == 0 and name in _REPLACED
            updated = position > 0 and updates and not tensor.requires_grad
            if replaced or updated or (in_place if version < 0 else _version(tensor) != version):
                storage = _storage(tensor)
                if storage is None:
                    self._escape(total, f"a tensor of layout {tensor.layout}")
                    continue
                memory = self._remember(storage)
                memory.content |= total
                memory.shape |= sizes
                self._shaped = self._shaped or sizes != 0
                written.add(storage._cdata)
                if not storage.resizable():
                    self._escape(total, "memory that numpy shares")
                if replaced:
                    self._views.pop(tensor, None)
        return written

    def _choose(self, view: Tensor, storage: UntypedStorage, met: _Arguments, masks: list[int]) -> None:
        """Note on what a view depends beyond the memory that it shows."""
        memory, key, chosen = self._memories.get(storage._cdata), storage._cdata, 0
        before = 0 if memory is None else memory.chosen
        same = [tensor for tensor, other in zip(met.tensors, met.storages, strict=True) if other == key]
        for other, mask in zip(met.storages, masks, strict=True):
            chosen |= 0 if other == key else mask
        if before:
            for tensor in same:
                chosen |= self._views.get(tensor, before)
        if not chosen | before:
            return
        for tensor in same:
            self._views.setdefault(tensor, before)
        memory = self._remember(storage)
        memory.chosen |= chosen
        self._views[view] = chosen

    def _sizes(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], total: int) -> int:
        """The decisions that chose the shape of the result by their values."""
        if name in _FACTORIES or name in _COUNTS:
            return total
        if name == "where":
            return total if len(args) + len(kwargs) == 1 else 0
        if name == "one_hot":
            classes = args[1] if len(args) > 1 else kwargs.get("num_classes", -1)
            return total if isinstance(classes, Tensor) or classes < 0 else 0
        if name in ("full", "new_full"):
            return self._of([*args[name == "new_full" :][:1], kwargs.get("size")])
        if name == "__getitem__":
            parts = args[1] if isinstance(args[1], tuple | list) else (args[1],)
            return self._of([part for part in parts if isinstance(part, slice | list) or _is_boolean(part)])
        if name in _SIZED:
            return self._of([part for part in _tensors((args[1:], kwargs), []) if not part.is_floating_point()])
        if name.strip("_") in _POINTWISE:
            return 0
        numbers = _tensors((args[1:], kwargs), [])  # a dimension, a length, a flag: whatever is not known to be data
        return self._of([number for number in numbers if number.ndim == 0 and not number.is_floating_point()])

    def _escape(self, mask: int, kind: str) -> None:
        """From here on, everything depends on these decisions."""
        new = mask & ~self._escaped
        if not new or self._checking:
            return
        filename, line, told = "<unknown>", 0, None
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            if frame.f_code in _VALIDATION:
                return
            if not line and not frame.f_code.co_filename.startswith(_PACKAGES):
                filename, line = frame.f_code.co_filename, frame.f_lineno
                told = frame.f_globals.setdefault("__warningregistry__", {})  # so that a loop is warned once
            frame = frame.f_back
        self._escaped |= new
        names = self._names(new)
        self._escapes.append(Escape(names, kind, filename, line))
        several = "s" if len(names) > 1 else ""
        warnings.warn_explicit(
            f"The decision{several} {', '.join(map(repr, names))} left the tensor graph by {kind}: Python may do "
            "anything with it, so every later value in this block counts as depending on it, which is right but less "
            "sharp. Keep it in torch (torch.where, gather, one_hot), read it after the block, or inside t.checking() "
            "if it only decides whether to raise an error.",
            EscapeWarning,
            filename,
            line,
            registry=told,
        )


class _Mode(TorchFunctionMode):
    """Shows a tracking each call of torch's Python interface in its block; the mode is off inside the call."""

    def __init__(self, tracking: Tracking) -> None:
        super().__init__()
        self._tracking = tracking

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run the call and follow what it does."""
        tracking = self._tracking
        if not tracking._memories:
            return func(*args, **(kwargs or {}))
        return tracking._call(func, args, kwargs or {})


@lru_cache(maxsize=4096)
def _known(func: Callable[..., Any]) -> tuple[str, bool]:
    """The name of a function, a method or a property (``"set data"`` for an assignment); whether it reads no value."""
    name = str(getattr(func, "__name__", ""))
    if name in ("__get__", "__set__", "__delete__"):
        owner = getattr(func, "__self__", None)
        owned = str(getattr(owner, "__name__", None) or getattr(getattr(owner, "fget", None), "__name__", ""))
        name = owned if name == "__get__" else f"set {owned}"
    name = name.partition(".")[0]  # overloads such as aten's nonzero.default
    question = name.startswith("is_") and name not in ("is_nonzero", *_SHAPES)
    return name, question or name in _ABOUT


def _tensors(tree: Any, found: list[Tensor], others: list[Any] | None = None) -> list[Tensor]:
    """Append the tensors of arguments or results, which may be nested, to those found."""
    if isinstance(tree, Tensor):
        found.append(tree)
    elif isinstance(tree, tuple | list):
        for part in tree:
            if isinstance(part, Tensor):
                found.append(part)
            elif others is not None or type(part) not in _SCALARS:
                _tensors(part, found, others)
    elif isinstance(tree, dict):
        for part in tree.values():
            _tensors(part, found, others)
    elif isinstance(tree, slice):
        _tensors((tree.start, tree.stop, tree.step), found)
    elif type(tree) in _SCALARS or not isinstance(tree, Sequence) or isinstance(tree, str | bytes):
        if others is not None and tree is not None:
            others.append(tree)
    else:
        for part in tree:
            _tensors(part, found, others)
    return found


_SCALARS = frozenset((int, float, bool, type(None), str, torch.dtype, torch.device))


def _plain(tensor: Tensor) -> Tensor:
    """The tensor inside the wrappers of ``torch.func`` transforms."""
    return _unwrapped(tensor) if _are_functorch_transforms_active() else tensor


def _unwrapped(tensor: Tensor) -> Tensor:
    while _functorch.is_functorch_wrapped_tensor(tensor):
        tensor = _functorch.get_unwrapped(tensor)
    return tensor


def _storage(tensor: Tensor) -> UntypedStorage | None:
    """Where the tensor lies; None for layouts without a single memory."""
    try:
        return tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):
        return None


def _version(tensor: Tensor) -> int:
    """How often it was changed in place; -1 in inference mode, which does not count."""
    try:
        return tensor._version
    except RuntimeError:
        return -1


def _relevant(name: str, args: tuple[Any, ...], masks: list[int]) -> list[int]:
    """The masks of the arguments, without those of which only shape, dtype or device matter."""
    if name in _LIKE and args and isinstance(args[0], Tensor):
        return [0, *masks[1:]]
    if name in _AS and len(args) > 1 and isinstance(args[0], Tensor) and isinstance(args[1], Tensor):
        return [masks[0], 0, *masks[2:]]
    return masks


def _union(masks: list[int]) -> int:
    total = 0
    for mask in masks:
        total |= mask
    return total


def _is_boolean(part: Any) -> bool:
    return isinstance(part, Tensor) and part.dtype in (torch.bool, torch.uint8)
