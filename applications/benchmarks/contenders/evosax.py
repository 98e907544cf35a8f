"""evosax: ask and tell as its examples compile them, float32 as JAX has it."""

from __future__ import annotations

import evosax.algorithms
import jax
import jax.numpy as jnp
import numpy as np

from applications.benchmarks.side_by_side.work import Sample, Work, exactly

SIGMA0 = 2.0


def generations(kind: str, dimension: int, generations: int, popsize: int) -> Work:
    """CPU time of so many generations on the ellipsoid of ``contenders.searches``."""
    start, weights = jnp.linspace(-4.0, 4.0, dimension), jnp.logspace(0.0, 6.0, dimension)
    search = getattr(evosax.algorithms, kind)(popsize, start)
    params = search.default_params.replace(std_init=SIGMA0)
    f = jax.jit(lambda x: x**2 @ weights)
    ask, tell = jax.jit(search.ask), jax.jit(search.tell)
    key = jax.random.key(0)
    key, first = jax.random.split(key)
    state = search.init(first, start, params)

    def turn(number: int) -> Sample:
        nonlocal key, state
        for _ in range(generations):
            key, draw, last = jax.random.split(key, 3)
            x, state = ask(draw, state, params)
            state, _ = tell(last, x, f(x), state, params)
        jax.block_until_ready(state)
        return {"work": float(generations)}

    probe = np.stack([start, np.zeros(dimension), np.ones(dimension)])
    return Work(turn, lambda: exactly(f(jnp.asarray(probe))))
