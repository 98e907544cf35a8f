"""Steps whose gradients are compared in pairs: CPU time of a step and variance of its gradient from the same turns."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from applications.benchmarks.side_by_side.work import Answer, Sample, Work, digest, on_average

PAIRS = 2  # in a turn
BATCH = 50
WARM_UP = 100  # steps on other minibatches before the first turn, of what learns from the past
ANSWERS = 40  # gradients behind an answer

Gradient = Callable[[Any], np.ndarray]


def pairs(data: Any, gradient: Gradient, *, batch: int | None = BATCH, learns: bool = False) -> Work:
    """Half the squared distance of two gradients at the same minibatch is a draw of the variance given the minibatch.

    Args:
        data: rows.
        gradient: a step's, flat ``[P]``, of a minibatch.
        batch: rows of a minibatch, drawn alike for every contender; None: all.
        learns: the step has a state that follows past minibatches: between two gradients comes a step on another one
            that counts neither way.
    """

    def minibatch(*seed: int) -> Any:
        draws = np.random.default_rng(seed)
        return data if batch is None else data[draws.permutation(len(data))[:batch]]

    for number in range(WARM_UP if learns else 0):
        gradient(minibatch(1, number))

    def run(turn: int) -> Sample:
        cpu = value = 0.0
        for pair in range(PAIRS):
            mine, found = minibatch(2, turn, pair), []
            for half in range(2):
                if learns:
                    gradient(minibatch(3, turn, pair, half))
                begin = time.process_time()
                found.append(gradient(mine))
                cpu += time.process_time() - begin
            value += float(np.square(found[0] - found[1]).sum()) / (2 * PAIRS)
        return {"cpu": cpu, "work": 2.0 * PAIRS, "value": value}

    def answer() -> Answer:
        mine = minibatch(0)
        return on_average(lambda: digest(gradient(mine)), ANSWERS)

    return Work(run, answer)
