"""Functions of bit strings to be maximised, each with its exact optimum; ``combinatorial.py`` lists them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from itertools import product
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]
_WIDEST = 24  # bits of which all strings, or all states of dynamic programming, are looked at


class Problem(ABC):
    """A function of bit strings, to be maximised."""

    name: str
    dimension: int

    @abstractmethod
    def __call__(self, x: Array) -> Array:
        """Values ``[N]`` of the strings ``[N, n]`` of zeros and ones."""

    @abstractmethod
    def optimum(self) -> float:
        """The largest value, exact; ValueError where that is out of reach."""


class OneMax(Problem):
    """The number of ones."""

    name = "onemax"

    def __init__(self, dimension: int) -> None:
        self.dimension = dimension

    def __call__(self, x: Array) -> Array:
        return x.sum(1, dtype=np.float64)

    def optimum(self) -> float:
        return float(self.dimension)


class LeadingOnes(OneMax):
    """The number of ones before the first zero."""

    name = "leadingones"

    def __call__(self, x: Array) -> Array:
        return np.logical_and.accumulate(x, 1).sum(1, dtype=np.float64)


class MaxCut(Problem):
    """The weight of the edges between the nodes of 0 and the nodes of 1.

    Args:
        weights: ``[n, n]``, symmetric, zero where there is no edge.

    Raises:
        ValueError: weights are not square, not symmetric, or join a node with itself.
    """

    name = "maxcut"

    def __init__(self, weights: Array) -> None:
        weights = np.asarray(weights, dtype=np.float64)
        if weights.ndim != 2 or weights.shape != weights.T.shape or (weights != weights.T).any() or weights.trace():
            raise ValueError(
                f"weights of shape {weights.shape} must be a symmetric square table with a diagonal of zeros: an "
                "edge has no direction and joins two nodes."
            )
        self.weights, self.dimension = weights, len(weights)
        first, second = np.triu(weights).nonzero()
        self._ends, self._edges = (first, second), weights[first, second]

    @classmethod
    def random(cls, nodes: int, seed: int, degree: int = 3) -> MaxCut:
        """A random graph in which every node has this degree: pairings of ends, drawn until the graph is simple."""
        if nodes <= degree or nodes * degree % 2:
            raise ValueError(
                f"There is no graph of {nodes} nodes of degree {degree}: make their product even, nodes more."
            )
        generator = np.random.default_rng(seed)
        while True:
            ends = generator.permutation(np.repeat(np.arange(nodes), degree)).reshape(-1, 2)
            weights = np.zeros((nodes, nodes))
            np.add.at(weights, (ends[:, 0], ends[:, 1]), 1.0)
            weights = weights + weights.T
            if not weights.trace() and weights.max() == 1:
                return cls(weights)

    def __call__(self, x: Array) -> Array:
        first, second = self._ends
        return (x[:, first] != x[:, second]) @ self._edges

    def optimum(self) -> float:
        """Node by node, with a table of the best cut for each side of the nodes that still have neighbours to come."""
        order = min((self._order(start) for start in range(min(8, self.dimension))), key=lambda found: found[0])
        if order[0] > _WIDEST:
            raise ValueError(
                f"The exact cut needs a table over {order[0]} nodes, more than {_WIDEST}: take a sparser or "
                "smaller graph."
            )
        table, frontier, done = np.zeros(()), list[int](), set[int]()
        for node in order[1]:
            table = np.stack([table, table], -1)
            for axis, other in enumerate(frontier):
                if self.weights[node, other]:
                    side = np.arange(2).reshape([2 if a == axis else 1 for a in range(table.ndim)])
                    table = table + self.weights[node, other] * (side != np.arange(2))
            frontier, done = [*frontier, node], done | {node}
            finished = [a for a, other in enumerate(frontier) if self._neighbours(other) <= done]
            table = table.max(axis=tuple(finished))
            frontier = [other for a, other in enumerate(frontier) if a not in finished]
        return float(table)

    def _neighbours(self, node: int) -> set[int]:
        return set(self.weights[node].nonzero()[0].tolist())

    def _order(self, start: int) -> tuple[int, list[int]]:
        """The widest table and an order of the nodes that keeps it narrow, each next one by what it leaves open."""
        neighbours = [self._neighbours(node) for node in range(self.dimension)]
        order, frontier, widest = list[int](), set[int](), 0

        def left_open(node: int) -> set[int]:
            done = {*order, node}
            return {other for other in {*frontier, node} if not neighbours[other] <= done}

        while len(order) < self.dimension:
            near = set().union(*(neighbours[node] for node in frontier)) - set(order)
            rest = near or set(range(self.dimension)) - set(order)
            node = start if not order else min(sorted(rest), key=lambda other: len(left_open(other)))
            widest = max(widest, len(frontier) + 1)
            frontier = left_open(node)
            order.append(node)
        return widest, order


class Knapsack(Problem):
    """The profit of the packed items; where they weigh more than the capacity, minus the excess.

    Args:
        weights: ``[n]``, positive whole numbers.
        profits: ``[n]``, positive.
        capacity: a whole number.

    Raises:
        ValueError: weights, profits or capacity are not of that kind.
    """

    name = "knapsack"

    def __init__(self, weights: Array, profits: Array, capacity: int) -> None:
        weights, profits = np.asarray(weights), np.asarray(profits, dtype=np.float64)
        whole = np.issubdtype(weights.dtype, np.integer) and weights.ndim == 1 and weights.shape == profits.shape
        if not whole or not ((weights > 0).all() and (profits > 0).all()) or capacity < 0:
            raise ValueError(
                f"weights {weights.tolist()} and profits {profits.tolist()} must be positive and equally many, "
                f"weights and capacity {capacity} whole numbers."
            )
        self.weights, self.profits, self.capacity, self.dimension = weights, profits, capacity, len(weights)

    @classmethod
    def random(cls, items: int, seed: int) -> Knapsack:
        """Weights of 1 to 1000, profits within 100 of them, room for half of the weight."""
        generator = np.random.default_rng(seed)
        weights = generator.integers(1, 1001, items)
        profits = np.maximum(weights + generator.integers(-100, 101, items), 1)
        return cls(weights, profits, int(weights.sum()) // 2)

    def __call__(self, x: Array) -> Array:
        excess = x @ self.weights - self.capacity
        return np.where(excess > 0, -excess, x @ self.profits)

    def optimum(self) -> float:
        best = np.zeros(self.capacity + 1)  # of each capacity, with the items so far
        for weight, profit in zip(self.weights.tolist(), self.profits.tolist(), strict=True):
            if weight <= self.capacity:
                best[weight:] = np.maximum(best[weight:], best[: self.capacity + 1 - weight] + profit)
        return float(best[-1])


class NK(Problem):
    """``f(x) = 1/n sum_i table[i, (x_j for j in neighbours[i])]``, the first of the neighbours being the highest digit.

    Source: Kauffman & Weinberger (1989), "The NK model of rugged fitness landscapes".

    Args:
        neighbours: ``[n, k + 1]``, which bits each table reads.
        table: ``[n, 2^(k + 1)]``.

    Raises:
        ValueError: the shapes do not belong together, or there are no such bits.
    """

    name = "nk"

    def __init__(self, neighbours: Array, table: Array) -> None:
        self.neighbours, self.table, self.dimension = np.asarray(neighbours), np.asarray(table), len(neighbours)
        width = self.neighbours.shape[1]
        if self.table.shape != (self.dimension, 2**width) or not (self.neighbours < self.dimension).all():
            raise ValueError(
                f"neighbours of shape {self.neighbours.shape} need a table of {(self.dimension, 2**width)}, but it has "
                f"shape {self.table.shape}; they are numbers below {self.dimension}."
            )
        self._digits = 2 ** np.arange(width)[::-1]

    @classmethod
    def random(cls, bits: int, others: int, seed: int, *, adjacent: bool) -> NK:
        """Uniform entries; adjacent: bits i, ..., i + k around a circle."""
        if not 0 <= others < bits:
            raise ValueError(f"A bit has {bits - 1} others, so k must be 0 to {bits - 1}, but it is {others}.")
        generator = np.random.default_rng(seed)
        if adjacent:
            neighbours = (np.arange(bits)[:, None] + np.arange(others + 1)) % bits
        else:
            drawn = [generator.choice(bits - 1, others, replace=False) for _ in range(bits)]
            neighbours = np.array([[i, *(j + (j >= i))] for i, j in enumerate(drawn)])
        problem = cls(neighbours, generator.random((bits, 2 ** (others + 1))))
        problem.name = "nk-adjacent" if adjacent else "nk-random"
        return problem

    def __call__(self, x: Array) -> Array:
        codes = x.astype(np.int64)[:, self.neighbours] @ self._digits
        return self.table[np.arange(self.dimension), codes].mean(1)

    def optimum(self) -> float:
        width = self.neighbours.shape[1]
        circle = (np.arange(self.dimension)[:, None] + np.arange(width)) % self.dimension
        if (self.neighbours != circle).any():
            return largest(self)
        # best[s, t]: bits 0 to k - 1 are s, bits i to i + k - 1 are t; after n steps t is s again
        states = 2 ** (width - 1)
        best = np.where(np.eye(states, dtype=bool), 0.0, -np.inf)
        for row in self.table:
            steps = best[:, :, None] + row.reshape(states, 2)  # of the state t and the next bit
            best = steps.reshape(states, 2, -1).max(1)  # the highest digit of t leaves
        return float(best.diagonal().max()) / self.dimension


def largest(problem: Problem) -> float:
    """The largest value over all strings, by enumeration; ValueError for more than 24 bits."""
    if problem.dimension > _WIDEST:
        raise ValueError(f"{problem.name} has 2^{problem.dimension} strings, too many to look at: at most 2^{_WIDEST}.")
    low = min(problem.dimension, 14)
    block = np.array(list(product((0, 1), repeat=low)), dtype=np.int8)
    best = -math.inf
    for head in product((0, 1), repeat=problem.dimension - low):
        rows = np.broadcast_to(np.array(head, dtype=np.int8), (len(block), len(head)))
        best = max(best, float(problem(np.concatenate([rows, block], 1)).max()))
    return best


def instances(size: int, seed: int) -> list[Problem]:
    """The six problems; of size n but for nk-random, which has at most 20 bits."""
    return [
        OneMax(size),
        LeadingOnes(size),
        MaxCut.random(size, seed),
        Knapsack.random(size, seed),
        NK.random(size, 4, seed, adjacent=True),
        NK.random(min(size, 20), 4, seed, adjacent=False),
    ]
