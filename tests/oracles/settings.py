"""Toys with N draws, and the table of credits.

A `Setting` is a toy with N draws: it lists every N-tuple of paths along a leading problem axis, with the probability of
each, so that one call of the library sees all of its own randomness at once. The expected gradient is then a finite
sum, compared with the gradient of the enumerated expectation; nothing here is sampled, and nothing of the library is
used to obtain the truth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import product
from typing import Any

import torch
from torch import Tensor

import scorefn as sf
from tests.oracles.toys import TOYS, Paths, Toy, coordinates


@dataclass(frozen=True)
class Layout:
    """How N draws hang together: blocks with their joint law, groups with their own parameters, problems."""

    name: str
    N: int
    block: tuple[int, ...] | None = None
    law: str = "copies"
    group: tuple[int, ...] | None = None
    batch: tuple[int, ...] = ()
    joint: bool = False  # all tuples of all problems together, instead of each problem's in an order of its own

    @property
    def groups(self) -> tuple[int, ...]:
        return (0,) * self.N if self.group is None else tuple(sorted(set(self.group)).index(g) for g in self.group)

    @property
    def blocks(self) -> list[list[int]]:
        label = range(self.N) if self.block is None else self.block
        return [[n for n in range(self.N) if label[n] == b] for b in sorted(set(label))]


LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout("N=1", 1),
        Layout("N=2", 2),
        Layout("N=3", 3),
        Layout("N=2 B=(2,)", 2, batch=(2,)),
        Layout("N=2 B=(2,) joint", 2, batch=(2,), joint=True),
        Layout("N=2 B=(2, 3)", 2, batch=(2, 3)),
        Layout("copies", 4, block=(5, 5, 1, 1)),
        Layout("ragged copies", 3, block=(0, 1, 0)),
        Layout("antithetic", 4, block=(0, 1, 1, 0), law="antithetic"),
        Layout("one block", 2, block=(3, 3), law="antithetic"),
        Layout("groups", 4, group=(7, 2, 7, 2)),
        Layout("ragged groups", 4, group=(0, 0, 1, 0)),
        Layout("singleton groups", 2, group=(1, 0)),
        Layout("groups of blocks", 4, group=(0, 0, 0, 1), block=(0, 0, 1, 2), law="antithetic"),
    )
}


def block_law(probability: Tensor, size: int, law: str) -> Tensor:
    """Joint law of the draws of one block, `[..., P] -> [..., P]` or `[..., P, P]`, each margin being p."""
    if size == 1:
        return probability
    if law == "copies":
        return torch.diag_embed(probability)
    upper = probability.cumsum(-1)  # x(u) and x(1 - u): the overlap of their cells
    lower = upper - probability
    left = torch.maximum(lower[..., :, None], 1 - upper[..., None, :])
    right = torch.minimum(upper[..., :, None], 1 - lower[..., None, :])
    return (right - left).clamp(min=0.0)


@dataclass(frozen=True)
class Setting:
    """A toy, a layout and a sampling distribution, with every tuple of draws and its probability."""

    toy_name: str
    layout: Layout
    off_policy: bool = False

    def __str__(self) -> str:
        return f"{self.toy_name}, {self.layout.name}, {'off-policy' if self.off_policy else 'on-policy'}"

    @property
    def toy(self) -> Toy:
        return TOYS[self.toy_name]

    @cached_property
    def parameters(self) -> tuple[Tensor, ...]:
        return self.toy.parameters((max(self.layout.groups) + 1, *self.layout.batch), seed=20)

    @cached_property
    def paths(self) -> Paths:
        return self.toy.enumerate(*self.parameters)

    @cached_property
    def behaviour(self) -> Paths:
        with torch.no_grad():
            return self.toy.enumerate(*self.toy.parameters((max(self.layout.groups) + 1, *self.layout.batch), seed=21))

    @cached_property
    def choice(self) -> Tensor:
        """Which path each draw of each tuple takes, `[N, T, *B]`."""
        tuples = coordinates(*[self.toy.state.shape[0]] * self.layout.N).T
        batch = self.layout.batch
        problems = torch.Size(batch).numel()
        if self.layout.joint:
            order = coordinates(*[tuples.shape[1]] * problems)
        else:
            generator = torch.Generator().manual_seed(0)
            order = torch.stack([torch.randperm(tuples.shape[1], generator=generator) for _ in range(problems)], -1)
        return tuples[:, order].reshape(self.layout.N, -1, *batch)

    @cached_property
    def weight(self) -> Tensor:
        """Probability of each tuple under what was sampled, `[T, *B]`."""
        sampled = (self.behaviour if self.off_policy else self.paths).probability.detach()
        weight = torch.ones(self.choice.shape[1:], dtype=sampled.dtype)
        for block in self.layout.blocks:
            law = block_law(sampled[self.layout.groups[block[0]]], len(block), self.layout.law).unsqueeze(0)
            law = law.expand(weight.shape[0], *law.shape[1:])
            for n in block:
                index = self.choice[n].reshape(*weight.shape, *[1] * (law.ndim - weight.ndim))
                law = law.gather(weight.ndim, index.expand(*weight.shape, 1, *law.shape[weight.ndim + 1 :]))
                law = law.squeeze(weight.ndim)
            weight = weight * law
        if self.layout.joint:  # the probability of what all problems drew together
            weight = weight.flatten(1).prod(-1).reshape(-1, *[1] * len(self.layout.batch)).expand_as(weight)
        return weight

    def taken(self, table: Tensor) -> Tensor:
        """The entries of a table `[G, *B, P, width]` along the chosen paths, `[N, T, *B, width]`."""
        table = table[list(self.layout.groups)].unsqueeze(1).expand(*self.choice.shape, *table.shape[-2:])
        index = self.choice[..., None, None].expand(*self.choice.shape, 1, table.shape[-1])
        return table.gather(-2, index).squeeze(-2)

    @cached_property
    def draws(self) -> sf.Draws:
        """All tuples at once, as problems beside each other."""
        toy, layout = self.toy, self.layout
        log_prob = self.taken(self.paths.log_prob)
        return sf.Draws(
            x=self.choice,
            log_prob=log_prob,
            fx=self.taken(self.paths.fx),
            credit=CREDITS[toy.native].make(self),
            behaviour_log_prob=self.taken(self.behaviour.log_prob) if self.off_policy else None,
            mask=None if toy.mask is None else toy.mask[self.choice],
            block=None if layout.block is None else torch.tensor(layout.block),
            group=None if layout.group is None else torch.tensor(layout.group),
            context=toy.state[self.choice],
        )

    def truth(self, discount: float) -> Tensor:
        """`sum over problems, mean over draws of E[sum_j discount^age_j f_j]`, enumerated path by path."""
        return _truth(self.toy_name, tuple(self.layout.groups), self.layout.batch, discount)[0]

    def true_gradient(self, discount: float) -> tuple[Tensor, ...]:
        return _truth(self.toy_name, tuple(self.layout.groups), self.layout.batch, discount)[1]


@cache
def _truth(name: str, groups: tuple[int, ...], batch: tuple[int, ...], discount: float) -> tuple[Tensor, Any]:
    toy = TOYS[name]
    parameters = toy.parameters((max(groups) + 1, *batch), seed=20)
    value = objective(toy, toy.enumerate(*parameters), groups, discount)
    return value.detach(), torch.autograd.grad(value, parameters)


def objective(toy: Toy, paths: Paths, groups: Sequence[int], discount: float) -> Tensor:
    """The enumerated expectation, differentiable at every order."""
    weight = torch.tensor([discount**age for age in toy.age], dtype=torch.float64)
    per_group = (paths.probability * (paths.fx * weight).sum(-1)).sum(-1)
    return per_group[list(groups)].mean(0).sum()


@cache
def setting(toy: str, layout: str, off_policy: bool = False) -> Setting:
    """One setting, built once."""
    return Setting(toy, LAYOUTS[layout], off_policy)


def settings(toys: Sequence[str], layouts: Sequence[str] | None = None) -> Iterator[Setting]:
    """On- and off-policy settings of some toys."""
    for toy, layout, off_policy in product(toys, layouts or LAYOUTS, (False, True)):
        yield setting(toy, layout, off_policy)


# --------------------------------------------------------------------------------------- the tables reducers join


@dataclass(frozen=True)
class CreditRow:
    """A credit, for the toys on which it means something; its objective is discounted by `discount`."""

    make: Callable[[Setting], sf.core.Credit]
    discount: float = 1.0
    applies: Callable[[Toy], bool] = lambda toy: True


def _reward_to_go(discount: float, visitation_discount: bool = True) -> Callable[[Setting], sf.core.Credit]:
    def make(given: Setting) -> sf.core.Credit:
        done = given.toy.done
        if done is not None:
            done = torch.tensor(done).expand(*given.choice.shape, given.toy.K)
        return sf.RewardToGo(discount, visitation_discount, done)

    return make


CREDITS = {
    "Total()": CreditRow(lambda given: sf.Total()),
    "Influence": CreditRow(lambda given: sf.Influence(given.toy.influence), applies=lambda toy: toy.K > 1),
    "RewardToGo(1)": CreditRow(_reward_to_go(1.0), applies=lambda toy: toy.ordered),
    "RewardToGo(.9)": CreditRow(_reward_to_go(0.9), 0.9, applies=lambda toy: toy.ordered),
    "RewardToGo(.9, visitation_discount=False)": CreditRow(
        _reward_to_go(0.9, False), 0.9, applies=lambda toy: toy.ordered
    ),
    "RewardToGo(.9), bound to the draws' own": CreditRow(
        lambda given: sf.RewardToGo(0.9), 0.9, applies=lambda toy: toy.done is not None
    ),
}
