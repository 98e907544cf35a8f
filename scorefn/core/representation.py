"""What ``repr`` says: how a part was made, in a line; a tensor of more than a few numbers by its shape."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from types import FunctionType, MethodType
from typing import Any

from torch import Tensor

FEW = 6  # numbers or entries that are shown themselves
LINE = 100  # characters of an object of somebody else's class; beyond, its class is named


def called(part: object, *positional: Any, **settings: Any) -> str:
    """``Name(value, setting=value)``, without the settings that are None."""
    given = {name: value for name, value in settings.items() if value is not None}
    return _call(part, [brief(value) for value in positional], given)


def representation(part: Any) -> str:
    """A dataclass or a named tuple as it was called: its fields where they differ from their defaults."""
    if is_dataclass(part):
        defaults = {field.name: field.default for field in fields(part) if field.repr}
    else:
        defaults = dict.fromkeys(part._fields, MISSING) | part._field_defaults
    values = {name: getattr(part, name) for name in defaults}
    return _call(part, [], {name: value for name, value in values.items() if not _same(value, defaults[name])})


def brief(value: Any) -> str:
    """A value in a few words."""
    if isinstance(value, Tensor) or (hasattr(value, "ndim") and hasattr(value, "tolist")):  # or numpy's
        if value.ndim > 1 or math.prod(value.shape) > FEW:
            return f"{'tensor' if isinstance(value, Tensor) else 'array'} {list(value.shape)}"
        return brief(value.tolist())
    if isinstance(value, float):
        return repr(value) if len(repr(value)) <= len("0.123456") else f"{value:.6g}"
    if isinstance(value, (FunctionType, MethodType, type)):
        return value.__qualname__.rpartition(".")[2]
    if isinstance(value, Mapping):
        return "{" + _entries([f"{key!r}: {brief(entry)}" for key, entry in value.items()]) + "}"
    if type(value) is tuple:
        return "(" + _entries([brief(entry) for entry in value]) + ("," if len(value) == 1 else "") + ")"
    if isinstance(value, list):
        return "[" + _entries([brief(entry) for entry in value]) + "]"
    text = repr(value)
    plain = isinstance(value, str) or (len(text) <= LINE and " at 0x" not in text and "\n" not in text)
    return text if plain else type(value).__name__


def _call(part: object, shown: list[str], settings: dict[str, Any]) -> str:
    named = [f"{name}={brief(value)}" for name, value in settings.items()]
    return f"{type(part).__name__}({', '.join(shown + named)})"


def _entries(shown: list[str]) -> str:
    more = [] if len(shown) <= FEW else [f"... {len(shown) - FEW} more"]
    return ", ".join(shown[:FEW] + more)


def _same(value: Any, default: Any) -> bool:
    return value is default or (default is not MISSING and type(value) is type(default) and bool(value == default))
