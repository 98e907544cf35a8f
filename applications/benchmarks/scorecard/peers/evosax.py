"""evosax: the gradient that a step of its searches follows, and three traps of search."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from evosax import algorithms
from evosax.core.fitness_shaping import identity_fitness_shaping_fn

from applications.benchmarks.scorecard.peers.from_jax import answer
from applications.benchmarks.scorecard.problems import SMOOTHING, Problem, quadratic, ridge_cost
from applications.benchmarks.scorecard.protocol import Answer, Peer

LINK = "https://github.com/RobertTLange/evosax"
NATURAL = "the step is along sigma^2 times the gradient in the mean, a natural gradient; the rate is the user's"
TIES = "tied fitness gets averaged ranks, but the weight is looked up at the rank's whole part: equal weights, not zero"
GENERATIONS = {"flat-fitness": 20, "nan-fitness": 1, "correlation": 200}
peer = Peer("evosax", packages=("evosax", "jax", "numpy"))


def step(problem: Problem, name: str, sigma: float, population: int = 2, raw: bool = True, **more: Any) -> Answer:
    """The step of the mean in one generation, with rate 1: ascent of E f by evosax's descent, sign turned."""
    start = jnp.asarray(problem.start)
    if raw:
        more["fitness_shaping_fn"] = identity_fitness_shaping_fn
    if name == "Open_ES":
        more["std_schedule"] = optax.constant_schedule(sigma)
    search = getattr(algorithms, name)(population, start, optimizer=optax.sgd(1.0), **more)
    params = search.default_params
    params = params if name == "Open_ES" else params.replace(std_init=sigma)
    f = quadratic if len(start) == 2 else lambda x: x[..., 0] ** 2

    def gradient(key: Any) -> Any:
        first, draw, last = jax.random.split(key, 3)
        state = search.init(first, start, params)
        x, state = search.ask(draw, state, params)
        after, _ = search.tell(last, x, f(x), state, params)
        return start - after.mean

    return answer(gradient, peer.seed)


@peer.row("normal", "Open_ES, raw fitness", link=LINK, evaluations=2)
def open_es(problem: Problem) -> Answer:
    return step(problem, "Open_ES", 1.0)


@peer.row("smoothing", "Open_ES, raw fitness", link=LINK, evaluations=2)
def open_es_smoothing(problem: Problem) -> Answer:
    return step(problem, "Open_ES", SMOOTHING)


@peer.row("smoothing", "Open_ES", link=LINK, evaluations=16, reading="its defaults, 16 draws",
          choice="centred ranks instead of fitness: another objective, invariant to monotone maps")  # fmt: skip
def open_es_ranks(problem: Problem) -> Answer:
    return step(problem, "Open_ES", SMOOTHING, population=16, raw=False)


@peer.row("smoothing", "PGPE, raw fitness", link=LINK, evaluations=2, choice=NATURAL)
def pgpe(problem: Problem) -> Answer:
    return step(problem, "PGPE", SMOOTHING)


def search(problem: Problem, name: str, population: int | None = None) -> Answer:
    """Some generations of a search with evosax's settings, compiled; what comes back is what the problem asks for."""
    start = jnp.asarray(problem.start)
    sigma = 0.5 if problem.name == "nan-fitness" else 1.0
    population = population or 2 * ((4 + int(3 * math.log(len(start)))) // 2)
    searcher = getattr(algorithms, name)(population, start)
    params = searcher.default_params
    if name != "Open_ES":
        params = params.replace(std_init=sigma)

    def f(x: Any) -> Any:
        if problem.name == "flat-fitness":
            return jnp.ones(len(x))
        if problem.name == "nan-fitness":  # evosax minimises
            return jnp.where(x[:, 0] > 1, jnp.nan, (x**2).sum(-1))
        return ridge_cost(x)

    def gradient(key: Any) -> Any:
        first, key = jax.random.split(key)
        state = searcher.init(first, start, params)

        def generation(state: Any, key: Any) -> tuple[Any, Any]:
            draw, last = jax.random.split(key)
            x, state = searcher.ask(draw, state, params)
            return searcher.tell(last, x, f(x), state, params)[0], None

        after, _ = jax.lax.scan(generation, state, jax.random.split(key, GENERATIONS[problem.name]))
        if problem.name == "flat-fitness":
            return ((after.mean - start) ** 2).sum() / sigma**2
        if problem.name == "nan-fitness":
            return (after.mean - start)[0] / sigma
        covariance = after.C if name == "CMA_ES" else after.B.T @ after.B  # x = mean + std z B
        return covariance[0, 1] / jnp.sqrt(covariance[0, 0] * covariance[1, 1])

    return answer(gradient, peer.seed, chunk=500)


def family(name: str, note: str = "") -> None:
    """Rows of a search that has a step size of its own."""
    peer.row("flat-fitness", name, link=LINK, note=note)(lambda problem: search(problem, name))
    peer.row("nan-fitness", name, link=LINK)(lambda problem: search(problem, name, 20))


family("SNES", TIES)
family("xNES", TIES)
family("CMA_ES")
family("PGPE")


@peer.row("flat-fitness", "Open_ES", link=LINK)
def flat_open_es(problem: Problem) -> Answer:
    return search(problem, "Open_ES")


@peer.row(
    "correlation", "xNES", link=LINK, note="multiplies by the element-wise exponential, so what is zero stays zero"
)
def correlation(problem: Problem) -> Answer:
    return search(problem, "xNES")


@peer.row("correlation", "CMA_ES", link=LINK)
def correlation_cma(problem: Problem) -> Answer:
    return search(problem, "CMA_ES")


if __name__ == "__main__":
    peer.main()
