"""Optimisers of bit strings within a budget of evaluations: ``BernoulliSearch`` and what it is held against."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import torch

import scorefn as sf
from applications.bbo.bit_problems import Array


class Account:
    """Evaluates a problem within a budget, and remembers when it became better.

    Args:
        problem: values ``[N]`` of strings ``[N, n]``.
        target: the optimum, at which a run ends.
        budget: how many strings may be evaluated.
    """

    def __init__(self, problem: Callable[[Array], Array], target: float, budget: int) -> None:
        self.spent, self.best, self.better = 0, -math.inf, list[tuple[int, float]]()
        self._problem, self._target, self._budget = problem, target, budget

    @property
    def hit(self) -> bool:
        """Whether the optimum was found, up to rounding."""
        return self.best >= self._target - 1e-9 * max(1.0, abs(self._target))

    @property
    def left(self) -> int:
        """How many strings may still be evaluated; none once the optimum was found."""
        return 0 if self.hit else self._budget - self.spent

    def __call__(self, x: Array) -> Array:
        """Values ``[N]``; of more strings than are left only the first ones are evaluated, the others are NaN."""
        paid = min(len(x), self.left)
        values = np.full(len(x), np.nan)
        values[:paid] = self._problem(x[:paid])
        for number, value in enumerate(values[:paid].tolist(), 1):
            if value > self.best:
                self.best = value
                self.better.append((self.spent + number, value))
        self.spent += paid
        return values


Optimiser: TypeAlias = Callable[[Account, int, int], None]
"""Spends an account on strings of n bits, by a seed."""


def bernoulli_search(account: Account, dimension: int, seed: int, popsize: int | None = None) -> None:
    """``BernoulliSearch``, started afresh where it stops."""
    generator = torch.Generator().manual_seed(seed)
    while account.left:
        strategy = sf.search.BernoulliSearch(dimension, popsize=popsize, seed=generator)
        while account.left and not strategy.stop:
            x = strategy.ask()
            strategy.tell(x, -account(x.numpy()))


def large_bernoulli_search(account: Account, dimension: int, seed: int) -> None:
    """The same with 4 n strings in each generation: slower, and less easily drawn into a poor optimum."""
    bernoulli_search(account, dimension, seed, popsize=4 * dimension)


def one_plus_one(account: Account, dimension: int, seed: int) -> None:
    """The (1+1) evolutionary algorithm; a string that would be a copy is drawn again."""
    generator = np.random.default_rng(seed)
    x = generator.integers(0, 2, (1, dimension), dtype=np.int8)
    value = account(x)[0]
    while account.left:
        flips = generator.random((1, dimension)) < 1 / dimension
        if flips.any():
            y = x ^ flips
            if (new := account(y)[0]) >= value:
                x, value = y, new


def local_search(account: Account, dimension: int, seed: int) -> None:
    """The first better neighbour in a random order; a fresh string where there is none."""
    generator = np.random.default_rng(seed)
    while account.left:
        x = generator.integers(0, 2, (1, dimension), dtype=np.int8)
        value, idle = account(x)[0], 0
        while account.left and idle < dimension:
            for bit in generator.permutation(dimension).tolist():
                x[0, bit] ^= 1
                new = account(x)[0]
                if new > value:
                    value, idle = new, 0
                else:
                    x[0, bit] ^= 1
                    idle += 1
                if not account.left or idle >= dimension:
                    break


def random_strings(account: Account, dimension: int, seed: int) -> None:
    """Independent uniform strings."""
    generator = np.random.default_rng(seed)
    while account.left:
        account(generator.integers(0, 2, (min(account.left, 1000), dimension), dtype=np.int8))


OPTIMISERS: dict[str, Optimiser] = {
    "scorefn": bernoulli_search,
    "scorefn 4n": large_bernoulli_search,
    "(1+1)-EA": one_plus_one,
    "local": local_search,
    "random": random_strings,
}
