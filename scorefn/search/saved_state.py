"""What a saved state must be before a strategy goes on from it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor

from scorefn.core import ScorefnError


def check_saved(
    state: object,
    own: Mapping[str, Any],
    fixed: Mapping[str, Any],
    varying: tuple[str, ...],
    open_entries: frozenset[str] = frozenset(),
) -> None:
    """Refuse a state that a strategy cannot take, before anything is changed.

    Args:
        state: what is to be loaded.
        own: what the strategy's own ``state_dict`` returns: each entry must be of the same kind and shape.
        fixed: entries that must be equal.
        varying: entries whose kind may change; they are checked elsewhere.
        open_entries: entries that need not be finite.

    Raises:
        ScorefnError: with the entry that differs.
    """
    name = own["strategy"]
    if not isinstance(state, Mapping) or not _equal(state.get("strategy"), name) or set(state) != set(own):
        seen = f"{sorted(map(str, state))} of strategy {state.get('strategy')!r}" if isinstance(state, Mapping) else ""
        raise ScorefnError(
            f"This is no state of {name}: it {f'has {seen}' if seen else f'is {state!r}'}, but {sorted(own)} are "
            f"needed. Pass what {name}.state_dict() returned."
        )
    for key, value in fixed.items():
        if not _equal(state[key], value):
            raise ScorefnError(
                f"The state's {key} is {state[key]!r}, but this search has {value!r}: make the strategy with the same "
                f"{key} as the one that was saved."
            )
    for key in own:
        if key in varying:
            continue
        _check_like(key, state[key], own[key])
        if key not in open_entries:
            check_finite(key, state[key])


def check_finite(key: str, found: Any) -> None:
    """Refuse an entry that holds, at any depth, a number that is not finite."""
    if isinstance(found, Mapping):
        for name, entry in found.items():
            check_finite(f"{key}[{name!r}]", entry)
    elif isinstance(found, list | tuple):
        for index, entry in enumerate(found):
            check_finite(f"{key}[{index}]", entry)
    elif isinstance(found, Tensor):
        if not bool(found.isfinite().all()):
            refuse_number(key, float(found[~found.isfinite()][0]))
    elif isinstance(found, float) and not math.isfinite(found):
        refuse_number(key, found)


def check_counted(key: str, found: int) -> None:
    """Refuse a count below 0."""
    if found < 0:
        raise ScorefnError(
            f"The state's {key} is {found}, but it is a count: pass what state_dict() returned, undamaged."
        )


def refuse_number(key: str, found: float) -> NoReturn:
    """Refuse a number that no search has there."""
    raise ScorefnError(
        f"The state's {key} is not finite, as it holds {found}, which no search has there: pass an undamaged state."
    )


def usable(saved: object, device: torch.device) -> bool:
    """Whether this is the state of a generator there."""
    try:
        torch.Generator(device).set_state(saved.cpu() if isinstance(saved, Tensor) else saved)  # type: ignore[arg-type]
    except (RuntimeError, TypeError):
        return False
    return True


def _equal(found: object, own: object) -> bool:
    return type(found) is type(own) and found == own


def _check_like(key: str, found: Any, own: Any) -> None:
    if isinstance(own, list) and isinstance(found, list) and any(isinstance(entry, Tensor) for entry in own):
        if len(found) == len(own):
            for index, (entry, other) in enumerate(zip(found, own, strict=True)):
                _check_like(f"{key}[{index}]", entry, other)
            return
    elif isinstance(own, Tensor) and isinstance(found, Tensor):
        if found.shape != own.shape:
            raise ScorefnError(
                f"The state's {key} has shape {tuple(found.shape)}, but this search has shape {tuple(own.shape)}: make "
                "the strategy for points of the same length."
            )
        if found.dtype == own.dtype:
            return
    elif isinstance(own, int | float) and not isinstance(found, bool):
        if isinstance(found, int) and isinstance(own, int):
            check_counted(key, found)
        if isinstance(found, int) or (isinstance(found, float) and isinstance(own, float)):
            return
    elif isinstance(own, Mapping) and isinstance(found, Mapping):
        if set(found) == set(own):
            return
    elif isinstance(found, type(own)):
        return
    raise ScorefnError(
        f"The state's {key} is {_shown(found)}, where {_shown(own)} is needed: pass what state_dict() "
        "returned, unchanged."
    )


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype}"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, Mapping):
        return f"a dict of {sorted(map(str, value))}"
    return repr(value)
