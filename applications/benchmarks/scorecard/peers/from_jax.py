"""Estimates of JAX libraries: a function of a key, compiled; one or many at a time; float64, one thread."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")

import jax  # it reads the flags when it first computes
import jax.numpy as jnp
import numpy as np

from applications.benchmarks.scorecard.protocol import Answer

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_traceback_filtering", "off")  # else a refusal of JAX itself looks as if it came from here


def answer(
    estimate: Callable[[Any], Any], seed: int, *, chunk: int = 20_000, compiled: bool = True, mapped: bool = True
) -> Answer:
    """Independent estimates of a library, each from a key of its own.

    Args:
        estimate: of a key, one estimate ``[P]`` (or a scalar), in the problem's sign.
        seed: of the first key.
        chunk: how many are made in one sweep.
        compiled: through ``jax.jit``; without it a step is run as it is written.
        mapped: several at a time through ``jax.vmap``.
    """
    keys = [jax.random.PRNGKey(seed)]

    def step(key: Any) -> tuple[Any, Any]:
        key, draw = jax.random.split(key)
        return key, jnp.reshape(estimate(draw), -1)

    run = jax.jit(step) if compiled else step
    sweep = jax.vmap(lambda key: jnp.reshape(estimate(key), -1))
    sweep = jax.jit(sweep) if compiled else sweep

    def one() -> np.ndarray:
        keys[0], found = run(keys[0])
        return np.asarray(found)

    def many(count: int) -> np.ndarray:
        keys[0], draw = jax.random.split(keys[0])
        return np.asarray(sweep(jax.random.split(draw, count)))

    one()  # compiles, outside what is timed
    return Answer(one, many if mapped else None, chunk=chunk)
