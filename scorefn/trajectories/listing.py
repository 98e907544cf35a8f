"""Arrays in messages: never more than a few of their rows."""

from __future__ import annotations

from typing import Any


def few(values: Any, most: int = 5) -> str:
    """The first rows of an array or tensor, and whether there are more."""
    return ", ".join(map(str, values[:most].tolist())).join("[]" if len(values) <= most else ("[", ", ...]"))
