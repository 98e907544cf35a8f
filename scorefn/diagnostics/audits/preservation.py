"""Everything that a call may change, kept and put back bit for bit."""

from __future__ import annotations

import random
import sys
import types
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

_ATOMS = (str, bytes, int, float, complex, bool, type(None), type, types.ModuleType, torch.dtype, torch.device)
_DEPTH = 16
_LIBRARIES = frozenset(("torch", "numpy", "scorefn", *sys.stdlib_module_names)) - {"__main__"}
"""Modules whose functions keep no state of the user's in global names."""


class Snapshot:
    """What can be reached from some objects, as it is now.

    Kept are tensors with their ``.grad``, arrays, training modes and random generators, also what functions close over;
    of ``learners`` (baselines, control variates) every attribute and container besides. The data are put back beneath
    the tensors, so that graphs that have saved them remain valid. The global generators are only watched.
    """

    def __init__(self, objects: Iterable[Any], learners: Iterable[Any] = ()) -> None:
        self._tensors = list[tuple[Tensor, Tensor, Tensor, bool, Tensor | None, Tensor | None]]()
        self._arrays = list[tuple[np.ndarray, np.ndarray]]()
        self._modes = list[tuple[nn.Module, bool]]()
        self._owners = list[tuple[Any, Any]]()
        self._generators = list[tuple[Any, Any]]()
        self._seen = dict[int, Any]()  # by id, and kept alive so that no id is given twice
        self._marks = list[tuple[Any, Any]]()
        globally = _global_generators()
        self._seen.update((id(generator), generator) for generator in globally)  # for the caller to put back
        for learner in learners:
            self._walk(learner, True, 0)
        for thing in objects:
            self._walk(thing, False, 0)

    @property
    def coarsest(self) -> float:
        """The machine epsilon of the coarsest floating-point tensor met."""
        dtypes = {tensor.dtype for tensor, *_ in self._tensors if tensor.is_floating_point()}
        return max((torch.finfo(dtype).eps for dtype in dtypes), default=0.0)

    def generators_moved(self) -> bool:
        """Whether a random generator is not where it was when ``mark`` was called."""
        return any(not _same_state(_state(generator), state) for generator, state in self._marks)

    def mark(self) -> None:
        """Remember where the generators are now."""
        known = _global_generators() + [generator for generator, _ in self._generators]
        self._marks = [(generator, _state(generator)) for generator in known]

    def include(self, objects: Iterable[Any]) -> None:
        """Keep more, as it is now."""
        for thing in objects:
            self._walk(thing, False, 0)

    def restore(self) -> None:
        """Put everything back."""
        for owner, kept in self._owners:
            _restore_owner(owner, kept)
        for tensor, memory, data, required, grad, grad_data in self._tensors:
            if tensor.data_ptr() != memory.data_ptr():
                tensor.data = memory
            _write(memory, data)
            if tensor.is_leaf and tensor.requires_grad != required:
                tensor.requires_grad_(required)
            if tensor.is_leaf and tensor.grad is not grad:
                tensor.grad = grad
            if grad is not None and grad_data is not None:
                _write(grad.data, grad_data)
        for array, values in self._arrays:
            if array.tobytes() != values.tobytes():
                array[...] = values
        for module, training in self._modes:
            module.training = training
        for generator, state in self._generators:
            _set_state(generator, state)

    def _walk(self, thing: Any, learner: bool, depth: int) -> None:
        if isinstance(thing, _ATOMS) or depth > _DEPTH or id(thing) in self._seen:
            return
        self._seen[id(thing)] = thing
        if isinstance(thing, Tensor):
            self._keep_tensor(thing)
        elif isinstance(thing, np.ndarray):
            if thing.dtype != object and thing.flags.writeable:
                self._arrays.append((thing, thing.copy()))
        elif _is_generator(thing):
            self._generators.append((thing, _state(thing)))
        else:
            if isinstance(thing, nn.Module):
                self._modes.append((thing, thing.training))
            if learner:
                self._keep_owner(thing)
            for part in list(_parts(thing)):
                self._walk(part, learner, depth + 1)

    def _keep_tensor(self, tensor: Tensor) -> None:
        if is_lazy(tensor) or tensor.layout != torch.strided or (tensor.grad_fn is not None and tensor.requires_grad):
            return
        if any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
            return  # expanded: several entries share their memory, and cannot be written in place
        grad = tensor.grad if tensor.is_leaf else None
        memory = tensor.data
        kept = grad.data.clone() if grad is not None and grad.layout == torch.strided else None
        self._tensors.append((tensor, memory, memory.clone(), tensor.requires_grad, grad, kept))

    def _keep_owner(self, thing: Any) -> None:
        if isinstance(thing, dict | list):
            self._owners.append((thing, thing.copy()))
        elif not isinstance(thing, types.FunctionType | types.MethodType) and hasattr(thing, "__dict__"):
            self._owners.append((thing, dict(vars(thing))))


def _parts(thing: Any) -> Iterator[Any]:
    """What an object holds."""
    if isinstance(thing, dict):
        yield from thing.values()
    elif isinstance(thing, list | tuple | set | frozenset):
        yield from thing
    elif isinstance(thing, partial):
        yield from (thing.func, *thing.args, *thing.keywords.values())
    elif isinstance(thing, types.MethodType):
        yield from (thing.__self__, thing.__func__)
    elif isinstance(thing, types.FunctionType):
        for cell in thing.__closure__ or ():
            try:
                yield cell.cell_contents
            except ValueError:  # not yet filled
                continue
        yield from thing.__defaults__ or ()
        yield from (thing.__kwdefaults__ or {}).values()
        if thing.__module__ is None or thing.__module__.partition(".")[0] not in _LIBRARIES:
            yield from (thing.__globals__.get(name) for name in _names(thing.__code__))
    if hasattr(thing, "__dict__") and not isinstance(thing, type):
        yield from vars(thing).values()
        if not isinstance(thing, types.FunctionType | types.MethodType | nn.Module) and callable(thing):
            method = vars(type(thing)).get("__call__")
            if isinstance(method, types.FunctionType):
                yield method


def _names(code: types.CodeType) -> Iterator[str]:
    """Global names that a function reads, those of the functions inside it too."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _global_generators() -> list[Any]:
    cuda = list(torch.cuda.default_generators) if torch.cuda.is_initialized() else []
    return [torch.default_generator, random.random.__self__, np.random.get_state.__self__, *cuda]  # type: ignore[attr-defined]


def _is_generator(thing: Any) -> bool:
    return isinstance(thing, torch.Generator | random.Random | np.random.Generator | np.random.RandomState)


def _state(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return generator.getstate()
    return generator.bit_generator.state if isinstance(generator, np.random.Generator) else generator.get_state()


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    else:
        generator.set_state(state)


def _same_state(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) else _flat(a) == _flat(b)


def _flat(state: Any) -> list[Any]:
    """Every number of a state, for a comparison that no array makes ambiguous."""
    if isinstance(state, dict):
        return [part for value in state.values() for part in _flat(value)]
    if isinstance(state, tuple | list):
        return [part for value in state for part in _flat(value)]
    return [state.tobytes()] if isinstance(state, np.ndarray) else [state]


def _restore_owner(owner: Any, kept: Any) -> None:
    if isinstance(owner, list):
        if len(owner) != len(kept) or any(a is not b for a, b in zip(owner, kept, strict=True)):
            owner[:] = kept
        return
    held = owner if isinstance(owner, dict) else vars(owner)
    if held.keys() != kept.keys() or any(held[key] is not value for key, value in kept.items()):
        held.clear()
        held.update(kept)


def _write(memory: Tensor, data: Tensor) -> None:
    """Put the data back where a bit differs; the memory of a tensor that nothing changed is not touched."""
    if not torch.equal(_bits(memory), _bits(data)):
        memory.copy_(data)


def _bits(tensor: Tensor) -> Tensor:
    """Its bits as integers; the size of an entry is kept, so that strides need not be looked at."""
    plain = torch.view_as_real(tensor.detach().resolve_conj()) if tensor.is_complex() else tensor.detach()
    return plain.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[plain.element_size()])
