"""What to cite for a method: the sources of the classes, functions and objects that were used."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from types import FunctionType, ModuleType
from typing import Any

from scorefn.citation.bibliography import Reference, bibliography
from scorefn.citation.sources import METHODS, SETTINGS, SOURCES
from scorefn.core.errors import ScorefnError

PACKAGE = __name__.partition(".")[0]
FEW = 6  # keys that ``repr`` shows


@dataclass(frozen=True)
class Citation:
    """The sources of what was used. ``str`` of it is a list to read.

    Attributes:
        references: each source once, in the order in which the objects and their parts name them.

    Example:
        >>> import scorefn as sf
        >>> found = sf.cite(sf.trajectories.rloo)
        >>> [(reference["year"], reference.authors[0]) for reference in found.references]
        [('2019', 'Kool, Wouter'), ('2024', 'Ahmadian, Arash')]
        >>> found
        <Citation of 2: kool2019buy, ahmadian2024back>
    """

    references: tuple[Reference, ...]

    @property
    def bibtex(self) -> str:
        """The entries, for a ``.bib`` file."""
        return "\n\n".join(reference.bibtex for reference in self.references)

    def __repr__(self) -> str:
        keys = [reference.key for reference in self.references]
        more = [f"... {len(keys) - FEW} more"] if len(keys) > FEW else []
        return f"<Citation of {len(keys)}: {', '.join(keys[:FEW] + more)}>"

    def __str__(self) -> str:
        return "\n".join(f"* {reference}" for reference in self.references)


def cite(*used: Any) -> Citation:
    """The sources of the methods that were used, for a paper's references.

    An object also names the sources of the parts it was made of: a baseline, a coupling, a proposal; a
    ``functools.partial`` those of its function and arguments; a ``SearchResult`` those of its method. What has no
    source of its own, and ``cite()``, name this library.

    Args:
        *used: public classes and functions of this library, or objects made of them.

    Raises:
        ScorefnError: an object that is not of this library.

    Example:
        >>> import scorefn as sf
        >>> print(sf.cite(sf.LeaveOneOut()))
        * Wouter Kool, Herke van Hoof and Max Welling (2019). Buy 4 REINFORCE samples, get a baseline for free! ICLR
          workshop Deep Reinforcement Learning Meets Structured Prediction.
        >>> [reference.key for reference in sf.cite(sf.surrogate, sf.RewardToGo()).references]
        ['williams1992simple', 'schulman2015gradient', 'mnih2014neural', 'sutton2000policy', 'baxter2001infinite',
         'nota2020policy']
        >>> print(sf.cite().bibtex)
        @software{scorefn,
          author = {{The scorefn authors}},
          title = {{scorefn: score-function gradient estimators for PyTorch}},
          year = {2026},
          version = {...},
        }
    """
    keys: dict[str, None] = {}
    for position, thing in enumerate(used):
        if isinstance(thing, ModuleType) or not _is_ours(thing):
            raise ScorefnError(
                f"cite() got {thing!r} as argument {position}, which is no class, function or object of scorefn, so "
                "its source is not known here. Give it the parts of scorefn that were used, such as "
                "cite(scorefn.expectation, scorefn.LeaveOneOut())."
            )
        for part in _parts(thing, set()):
            keys.update(dict.fromkeys(_keys(part)))
    sources = bibliography()
    return Citation(tuple(sources[key] for key in keys) or (_library(),))


def _library() -> Reference:
    """The library itself, with the facts of CITATION.cff."""
    fields = [
        ("author", "{The scorefn authors}"),
        ("title", "{scorefn: score-function gradient estimators for PyTorch}"),
        ("year", "2026"),
        ("version", str(import_module(PACKAGE).__version__)),
    ]
    return Reference(PACKAGE, "software", tuple(fields))


def _ancestry(thing: Any) -> list[type | FunctionType]:
    """The function or class, or the classes that an object is of, nearest first."""
    if isinstance(thing, FunctionType):
        return [thing]
    return list((thing if isinstance(thing, type) else type(thing)).__mro__)


def _names(thing: Any) -> list[str]:
    """What of its ancestry is of this library, as the table names it: room and name."""
    ours = [source for source in _ancestry(thing) if source.__module__.partition(".")[0] == PACKAGE]
    return [f"{f'{source.__module__}..'.split('.')[1]}.{source.__qualname__}" for source in ours]


def _is_ours(thing: Any) -> bool:
    return any(map(_is_ours, _held(thing))) if isinstance(thing, partial) else bool(_names(thing))


def _keys(thing: Any) -> tuple[str, ...]:
    """The sources of the nearest class that has some: a subclass of one's own has those of what it extends.

    What has none, but says which method was used, has those of the method.
    """
    method = getattr(thing, "method", None)
    named = [METHODS[method]] if isinstance(method, str) and method in METHODS else []
    return next((SOURCES[name] for name in _names(thing) + named if name in SOURCES), ())


def _held(thing: Any) -> list[Any]:
    """What an object, a container or a ``functools.partial`` holds."""
    if isinstance(thing, (list, tuple, set, frozenset)):
        return list(thing)
    if isinstance(thing, Mapping):
        return list(thing.values())
    if isinstance(thing, partial):
        return [thing.func, *thing.args, *thing.keywords.values()]
    return [] if isinstance(thing, (type, FunctionType)) else list(getattr(thing, "__dict__", {}).values())


def _parts(thing: Any, seen: set[int]) -> Iterator[Any]:
    """The object and, depth first, what of this library it holds; containers are looked into, tensors are not."""
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if not isinstance(thing, (list, tuple, set, frozenset, Mapping, partial)):
        if not _is_ours(thing):
            return
        yield thing
    for part in _held(thing):
        if SETTINGS.isdisjoint(_names(part)):
            yield from _parts(part, seen)
