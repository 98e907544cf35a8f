"""Search: CPU time of a generation, and evaluations until a target."""

from __future__ import annotations

from typing import Any

from applications.benchmarks.side_by_side.measures import EVALUATIONS, TIME
from applications.benchmarks.side_by_side.row import Contender, Row, Suite

SEARCHES = "applications.benchmarks.contenders.searches"
PYCMA: dict[str, Any] = {"room": "pycma", "package": "cma"}
EVOTORCH: dict[str, Any] = {"environment": "evotorch", "package": "evotorch"}
EVOSAX: dict[str, Any] = {"environment": "evosax", "package": "evosax"}
LIMIT = 30_000  # evaluations
WIDE, POPSIZE = 10_000, 100


def full(dimension: int, counts: dict[str, int], turns: int) -> Row:
    """``counts``: generations of a turn; a turn covers the ones in which a covariance is decomposed."""

    def one(name: str, library: str, kind: str, **rest: Any) -> Contender:
        count = counts.get(kind, counts["others"])
        options = {"library": library, "kind": kind, "dimension": dimension, "generations": count}
        return Contender(name, f"{SEARCHES}:generations", options, **rest)

    return Row(
        f"generation-{dimension}",
        f"A generation in {dimension} dimensions, full covariance",
        "Ask, evaluation of an ellipsoid with all points in one call, tell, and the check for stopping, which EvoTorch "
        "has not; the population is everybody's default. SNES has a diagonal covariance and is here for its time.",
        (
            one("scorefn `CSANES`, the default", "scorefn", "CSANES", role="scorefn"),
            one("pycma", "pycma", "full", **PYCMA),
            one("EvoTorch `CMAES`", "evotorch", "CMAES", **EVOTORCH),
            one("EvoTorch `XNES`", "evotorch", "XNES", **EVOTORCH),
            one("EvoTorch `SNES`", "evotorch", "SNES", **EVOTORCH),
        ),
        (TIME,),
        turns=turns,
        quick_turns=3,
        shortest=0.0,
    )


def diagonal(kind: str, about: str, *by_hand: Contender, turns: int = 15) -> Row:
    common = {"dimension": WIDE, "generations": 10, "popsize": POPSIZE}

    def one(name: str, library: str, **rest: Any) -> Contender:
        return Contender(name, f"{SEARCHES}:generations", {"library": library, "kind": kind, **common}, **rest)

    return Row(
        f"diagonal-{kind.lower()}",
        f"A generation of `{kind}` in {WIDE:,} dimensions, {POPSIZE} points",
        about,
        (
            one(f"scorefn `{kind}`", "scorefn", role="scorefn"),
            *by_hand,
            one(f"EvoTorch `{kind}`", "evotorch", **EVOTORCH),
            Contender(
                f"evosax `{kind}`",
                "applications.benchmarks.contenders.evosax:generations",
                {"kind": kind, **common},
                **EVOSAX,
            ),
        ),
        (TIME,),
        turns=turns,
        quick_turns=3,
        shortest=0.0,
    )


def to_target(problem: str) -> Row:
    def one(name: str, library: str, kind: str = "", **rest: Any) -> Contender:
        options = {"library": library, "problem": problem, "dimension": 10, "limit": LIMIT, "kind": kind}
        return Contender(name, f"{SEARCHES}:to_target", options, **rest)

    return Row(
        f"target-{problem}",
        f"Evaluations to 1e-8, {'rotated ' if problem != 'sphere' else ''}{problem.capitalize()}, 10 dimensions",
        f"Without restarts, sigma0 = 2, up to {LIMIT:,} evaluations. A turn is a random optimum, rotation and start, "
        "the same for everybody; one that does not arrive counts as infinity in the median. EvoTorch has no stopping "
        "rule and goes on to the limit.",
        (
            one("scorefn `minimize`", "scorefn", role="scorefn"),
            one("pycma", "pycma", **PYCMA),
            one("EvoTorch `CMAES`", "evotorch", "CMAES", **EVOTORCH),
            one("EvoTorch `XNES`", "evotorch", "XNES", **EVOTORCH),
            one("EvoTorch `SNES`", "evotorch", "SNES", **EVOTORCH),
        ),
        (EVALUATIONS,),
        turns=11,
        warm=False,
        quick_turns=3,
        shortest=0.0,
    )


FLOATS = "float64, and float32 in evosax, whose ask and tell are compiled, as its examples have it. "

BBO = Suite(
    "bbo",
    "Black-box search",
    "CPU milliseconds of a generation, and evaluations until 1e-8.",
    (
        full(10, {"others": 60}, 20),
        full(100, {"others": 50, "CSANES": 150, "full": 150}, 15),
        full(1000, {"others": 30, "CSANES": 120, "XNES": 1, "CMAES": 3}, 7),
        diagonal(
            "SNES",
            FLOATS + "The loop is the same update in NumPy, without state, stopping rules or checks.",
            Contender(
                "NumPy loop",
                f"{SEARCHES}:generations",
                {"library": "loop", "kind": "SNES", "dimension": WIDE, "generations": 10, "popsize": POPSIZE},
                "by hand",
            ),
        ),
        diagonal("PGPE", FLOATS + "Mirrored draws, centred ranks; optimisers differ and cost next to nothing."),
        *(to_target(problem) for problem in ("sphere", "ellipsoid", "rosenbrock")),
    ),
)
