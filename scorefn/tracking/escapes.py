"""Escapes: where decisions left the tensor graph, so that nothing can be known of what Python does with them."""

from __future__ import annotations

import os
import sys
import warnings
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any, NamedTuple

import torch
from torch.distributions import Distribution

from scorefn.core.warnings import ScorefnWarning

_PACKAGES = (os.path.dirname(torch.__file__) + os.sep, os.path.dirname(__file__) + os.sep)

_VALIDATION: frozenset[CodeType] = frozenset({Distribution.__init__.__code__, Distribution._validate_sample.__code__})
"""Reads below these decide only whether an error is raised."""


class EscapeWarning(ScorefnWarning):
    """A decision left the tensor graph, so that every later value counts as depending on it.

    Each block gives it once for each decision; Python's default filter shows it once for each line, however many blocks
    follow. The gradient stays right; it may have more variance than it needs.

    Example:
        >>> import warnings, torch
        >>> from scorefn.tracking import Tracking
        >>> with warnings.catch_warnings(record=True) as caught, Tracking() as t:
        ...     warnings.simplefilter("always")
        ...     z = t.decision("z", torch.tensor(1.0))
        ...     cost = torch.tensor(3.0) if z else torch.tensor(5.0)  # chosen by Python
        ...     t.dependencies(cost)
        frozenset({'z'})
        >>> caught[0].category.__name__
        'EscapeWarning'
        >>> with warnings.catch_warnings(), Tracking() as t:
        ...     warnings.simplefilter("error")  # there is none where torch chooses
        ...     z = t.decision("z", torch.tensor(1.0))
        ...     t.dependencies(torch.where(z > 0, 3.0, 5.0))
        frozenset({'z'})
    """


@dataclass(frozen=True)
class Escape:
    """Where decisions left the tensor graph.

    Args:
        decisions: their names.
        kind: how: ``"bool()"``, ``".item()"``, ...
        filename: of the line that did it.
        line: its number.

    Example:
        >>> import warnings, torch
        >>> from scorefn.tracking import Tracking
        >>> with warnings.catch_warnings(), Tracking() as t:
        ...     warnings.simplefilter("ignore")
        ...     z = t.decision("z", torch.tensor(2.0))
        ...     w = t.decision("w", torch.tensor(0.0))
        ...     table = [10.0, 20.0, 30.0][int(z)]
        >>> [(escape.decisions, escape.kind) for escape in t.escapes]
        [(('z',), 'int()')]
    """

    decisions: tuple[str, ...]
    kind: str
    filename: str
    line: int


class Place(NamedTuple):
    """A line of the user's code; ``told`` is where Python notes of which warnings its module was told."""

    filename: str = "<unknown>"
    line: int = 0
    told: dict[Any, Any] | None = None


def calling_line() -> Place | None:
    """The innermost line that is neither torch's nor this room's; None where torch validates its arguments."""
    place = Place()
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code in _VALIDATION:
            return None
        if not place.line and not frame.f_code.co_filename.startswith(_PACKAGES):
            told = frame.f_globals.setdefault("__warningregistry__", {})  # so that a loop is warned once
            place = Place(frame.f_code.co_filename, frame.f_lineno, told)
        frame = frame.f_back
    return place


def warn(escape: Escape, place: Place) -> None:
    """Tell the user, once for each line."""
    several = "s" if len(escape.decisions) > 1 else ""
    warnings.warn_explicit(
        f"The decision{several} {', '.join(map(repr, escape.decisions))} left the tensor graph by {escape.kind}: "
        "Python may do anything with it, so every later value in this block counts as depending on it, which is right "
        "but less sharp. Keep it in torch (torch.where, gather, one_hot), read it after the block, or inside "
        "t.checking() if it only decides whether to raise an error.",
        EscapeWarning,
        escape.filename,
        escape.line,
        registry=place.told,
    )
