"""A step on a bound with discrete latents: CPU time, and the price of precision."""

from __future__ import annotations

from functools import partial
from typing import Any

from applications.benchmarks.side_by_side.measures import PRICE, TIME
from applications.benchmarks.side_by_side.row import Contender, Row, Suite

POSTERIORS = "applications.benchmarks.contenders.posteriors"
PYRO: dict[str, Any] = {"role": "peer", "room": "pyro", "package": "pyro-ppl"}


ABOUT = {
    "belief_net": "A belief net on the 8x8 digits, trained for 1000 steps so that images differ more than particles, "
    "with its parameters then held; minibatches of 50. The variance is that of the encoder's gradient given the "
    "minibatch.",
    "mixture": "100 points, their assignments latent, a guide of one categorical each. The variance is that of the "
    "gradient in the guide's logits.",
}
TITLES = {"belief_net": "200 Bernoulli latents", "mixture": "Mixture, 100 assignments"}
STORCHASTIC: dict[str, Any] = {"environment": "storchastic", "package": "storchastic"}


def one(problem: str, particles: int, name: str, how: str, **rest: Any) -> Contender:
    return Contender(name, f"{POSTERIORS}:{problem}", {"how": how, "num_particles": particles}, **rest)


def row(problem: str, particles: int, kind: str, about: str, contenders: tuple[Contender, ...]) -> Row:
    return Row(
        f"{problem.replace('_', '-')}-{kind}-{particles}",
        f"{TITLES[problem]}, S = {particles}, {'Pyro programs' if kind == 'pyro' else 'plain torch'}",
        f"{ABOUT[problem]} {about}",
        contenders,
        (TIME, PRICE),
        turns=40,
        quick_turns=5,
        shortest=0.0,
        prepare=f"{POSTERIORS}:{problem}_data",
    )


def programs(problem: str, particles: int) -> Row:
    contender = partial(one, problem, particles)
    default = contender("`ScoreFunctionELBO`", "ScoreFunctionELBO", role="scorefn")
    average = contender("`ScoreFunctionELBO`, `MovingAverage`", "ScoreFunctionELBO, average", role="scorefn")
    return row(
        problem,
        particles,
        "pyro",
        "The losses run one model and one guide; the averages learn from other minibatches in between, and "
        "one particle alone has no leave-one-out. "
        "The loop by hand does without Pyro: what is between it and a loss is mostly the program's own bookkeeping.",
        (
            *((default,) if particles > 1 else (average, default)),
            contender("loop by hand, without Pyro", "loop", role="by hand"),
            contender("Pyro `Trace_ELBO`", "Trace_ELBO", **PYRO),
            contender("Pyro `TraceGraph_ELBO`", "TraceGraph_ELBO", **PYRO),
            contender("Pyro `TraceGraph_ELBO`, decaying average", "TraceGraph_ELBO, average", **PYRO),
        ),
    )


def plain(problem: str, particles: int) -> Row:
    contender = partial(one, problem, particles)
    storchastic = f"applications.benchmarks.contenders.storchastic:{problem}"
    return row(
        problem,
        particles,
        "torch",
        "Everybody does the same: " + ("leave-one-out." if particles > 1 else "no baseline."),
        (
            contender("`posteriors.elbo`", "plain", role="scorefn"),
            contender("loop by hand", "loop", role="by hand"),
            Contender("storchastic", storchastic, {"num_particles": particles}, **STORCHASTIC),
        ),
    )


VI = Suite(
    "vi",
    "Variational inference",
    "Steps on an evidence lower bound whose latents are discrete, with S particles together: CPU milliseconds of a "
    "step, and the variance of its gradient, from pairs of gradients at the same minibatch, times its CPU seconds, "
    "which is what a given precision costs. All expect the same gradient, which is checked; argument validation is off "
    "for all.",
    tuple(make(problem, particles) for problem in TITLES for make in (programs, plain) for particles in (1, 16)),
)
