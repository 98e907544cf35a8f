"""What to cite for a method: the sources of the classes, functions and objects that were used."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from types import FunctionType, ModuleType
from typing import Any

from scorefn.citation.bibliography import Reference, bibliography
from scorefn.citation.sources import SOURCES
from scorefn.core.errors import ScorefnError

PACKAGE = __name__.partition(".")[0]


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
    """

    references: tuple[Reference, ...]

    @property
    def bibtex(self) -> str:
        """The entries, for a ``.bib`` file."""
        return "\n\n".join(reference.bibtex for reference in self.references)

    def __str__(self) -> str:
        return "\n".join(f"* {reference}" for reference in self.references)


def cite(*used: Any) -> Citation:
    """The sources of the methods that were used, for a paper's references.

    An object also names the sources of the parts it was made of: a baseline, a coupling, a proposal. What has no source
    of its own, and ``cite()``, name this library.

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
    """The function or class, or the classes an object is made of, nearest first."""
    if isinstance(thing, FunctionType):
        return [thing]
    return list((thing if isinstance(thing, type) else type(thing)).__mro__)


def _is_ours(thing: Any) -> bool:
    return any(source.__module__.partition(".")[0] == PACKAGE for source in _ancestry(thing))


def _keys(thing: Any) -> tuple[str, ...]:
    """The sources of the nearest class that has some: a subclass of one's own has those of what it extends."""
    for source in _ancestry(thing):
        room = f"{source.__module__}..".split(".")[1]
        if source.__module__.partition(".")[0] == PACKAGE and (found := SOURCES.get(f"{room}.{source.__qualname__}")):
            return found
    return ()


def _parts(thing: Any, seen: set[int]) -> Iterator[Any]:
    """The object and, depth first, what of this library it holds; containers are looked into, tensors are not."""
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, (list, tuple, set, frozenset)):
        inside = list(thing)
    elif isinstance(thing, Mapping):
        inside = list(thing.values())
    elif _is_ours(thing):
        yield thing
        inside = [] if isinstance(thing, (type, FunctionType)) else list(getattr(thing, "__dict__", {}).values())
    else:
        return
    for part in inside:
        yield from _parts(part, seen)
