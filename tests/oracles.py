"""Toy measures that can be enumerated, and the checks of the contract battery.

A `Toy` lists every path of K decisions with its log-probabilities and values. A `Setting` is a toy with N draws: it
lists every N-tuple of paths along a leading problem axis, with the probability of each, so that one call of the library
sees all of its own randomness at once. The expected gradient is then a finite sum, compared with the gradient of the
enumerated expectation; nothing here is sampled, and nothing of the library is used to obtain the truth.

Axes: G groups, B problems, P paths, T tuples; N, K, J as everywhere.

A check raises AssertionError, also where the library refuses what it should accept: the mutations count on that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import permutations, product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import scorefn as sf
from scorefn.reducers import couplings, quantiles

EXACT = 1e-10
VISIBLE = 1e-3


def near(ours: Tensor, truth: Tensor, tolerance: float = 1e-11) -> bool:
    """Equal to rounding, relatively for what is large: without the looseness that `allclose` has by default."""
    return bool(((ours - truth).abs() <= tolerance * truth.abs().clamp(min=1.0)).all())


# ------------------------------------------------------------------------------------------------------------- toys


@dataclass(frozen=True, eq=False)
class Paths:
    """Every path of a toy: log-probabilities `[..., P, K]` and values `[..., P, J]`."""

    log_prob: Tensor
    fx: Tensor

    @property
    def probability(self) -> Tensor:
        """`[..., P]`; absent decisions are NaN or infinite and count for nothing."""
        return torch.where(self.log_prob.isfinite(), self.log_prob, 0.0).sum(-1).exp()


@dataclass(frozen=True, eq=False)
class Toy:
    """A finite problem: its parameters, its paths, and who influences what."""

    name: str
    sizes: tuple[tuple[int, ...], ...]  # of the parameters of one problem; the last one enters f only
    enumerate: Callable[..., Paths]
    influence: Tensor  # [K, J] bool
    state: Tensor  # [P, K] int: what is known before each decision
    age: tuple[int, ...]  # of each value, counted from the start of its episode
    mask: Tensor | None = None  # [P, K] bool
    done: tuple[bool, ...] | None = None
    ordered: bool = False  # one value per decision, each of them after it
    native: str = "Total()"

    @property
    def K(self) -> int:
        return self.influence.shape[0]

    @property
    def J(self) -> int:
        return self.influence.shape[1]

    def parameters(self, lead: Sequence[int], seed: int) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)
        return tuple(
            torch.randn(*lead, *size, generator=generator, dtype=torch.float64).requires_grad_() for size in self.sizes
        )


def values(shape: Sequence[int], seed: int) -> Tensor:
    """The fixed part of f."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def coordinates(*sizes: int) -> Tensor:
    """Every outcome of independent choices, `[P, len(sizes)]`."""
    return torch.cartesian_prod(*[torch.arange(size) for size in sizes]).reshape(-1, len(sizes))


def single_paths(theta: Tensor, psi: Tensor) -> Paths:
    log_p = theta.log_softmax(-1)
    fx = values((3,), 1) + psi.sin() * values((3,), 2) + 0.3 * theta
    return Paths(log_p[..., None], fx[..., None])


def chain_paths(theta: Tensor, phi: Tensor, psi: Tensor) -> Paths:
    """The second decision is made in a state that the first one chose; each value has a pathwise part."""
    first, second = phi.shape[-2:]
    a, c = coordinates(first, second).unbind(-1)
    log_prob = torch.stack([theta.log_softmax(-1)[..., a], phi.log_softmax(-1)[..., a, c]], -1)
    psi = psi.expand(log_prob.shape[:-1])
    fx = [values((first,), 4)[a] + 0.5 * psi.square(), values((len(a),), 3) * psi.exp() + 0.2 * theta[..., a]]
    return Paths(log_prob, torch.stack(fx, -1))


def coins_paths(theta: Tensor, phi: Tensor, psi: Tensor) -> Paths:
    """The smallest chain: two coins, the second chosen by the first; few parameters, for derivatives of high order."""
    return chain_paths(*[torch.cat([logit, torch.zeros_like(logit)], -1) for logit in (theta, phi)], psi)


def fork_paths(theta: Tensor, phi: Tensor, psi: Tensor) -> Paths:
    """Two decisions that do not meet, one value of each and one of both."""
    a, c = coordinates(2, 3).unbind(-1)
    log_prob = torch.stack([theta.log_softmax(-1)[..., a], phi.log_softmax(-1)[..., c]], -1)
    psi = psi.expand(log_prob.shape[:-1])
    fx = [values((2,), 5)[a] + psi, values((3,), 6)[c] * psi.cos() + 0.1 * phi[..., c], values((6,), 7) - psi.square()]
    return Paths(log_prob, torch.stack(fx, -1))


def ended_paths(theta: Tensor, phi: Tensor, psi: Tensor) -> Paths:
    """A chain that ends after its first decision where that is 0: the absent places hold NaN and -inf."""
    whole = chain_paths(theta, phi, psi)
    keep, absent = torch.tensor([0, 2, 3, 4, 5]), torch.zeros(5, 2, dtype=torch.bool)
    absent[0, 1] = True
    garbage = torch.tensor([[torch.nan], [-torch.inf]], dtype=torch.float64)
    garbage = garbage[(theta[..., :1] > 0).long().squeeze(-1)]  # NaN in some problems, -inf in others
    log_prob = torch.where(absent, garbage[..., None, :], whole.log_prob[..., keep, :])
    return Paths(log_prob, torch.where(absent, 0.0, whole.fx[..., keep, :]))


def episodes_paths(theta: Tensor, phi: Tensor, chi: Tensor, psi: Tensor) -> Paths:
    """Two episodes in one draw: the first has one decision, the second two."""
    a, c, e = coordinates(2, 2, 2).unbind(-1)
    log_prob = [theta.log_softmax(-1)[..., a], phi.log_softmax(-1)[..., c], chi.log_softmax(-1)[..., c, e]]
    psi = psi.expand(log_prob[0].shape)
    fx = [values((2,), 8)[a] + psi, values((2,), 9)[c] * psi.exp(), values((2, 2), 10)[c, e] + 0.2 * chi[..., c, e]]
    return Paths(torch.stack(log_prob, -1), torch.stack(fx, -1))


def bool_mask(*rows: str) -> Tensor:
    return torch.tensor([[entry == "1" for entry in row] for row in rows])


def state_of(*columns: Tensor) -> Tensor:
    """States numbered apart for each decision."""
    return torch.stack([column + 10 * k for k, column in enumerate(columns)], -1)


_a32, _a222, _zero = coordinates(3, 2)[:, 0], coordinates(2, 2, 2), torch.zeros(8, dtype=torch.long)
TOYS = {
    toy.name: toy
    for toy in (
        Toy("single", ((3,), (1,)), single_paths, bool_mask("1"), state_of(_zero[:3]), (0,)),
        Toy(
            "chain", ((3,), (3, 2), (1,)), chain_paths, bool_mask("11", "01"), state_of(_zero[:6], _a32), (0, 1),
            ordered=True,
        ),
        Toy(
            "fork", ((2,), (3,), (1,)), fork_paths, bool_mask("101", "011"), state_of(_zero[:6], _zero[:6]), (0, 0, 0),
            native="Influence",
        ),
        Toy(
            "ended", ((3,), (3, 2), (1,)), ended_paths, bool_mask("11", "01"),
            state_of(_zero[:5], torch.tensor([0, 1, 1, 2, 2])), (0, 1),
            mask=torch.tensor([[True, False]] + [[True, True]] * 4), ordered=True,
        ),
        Toy(
            "episodes", ((2,), (2,), (2, 2), (1,)), episodes_paths, bool_mask("100", "011", "001"),
            state_of(_zero, _zero, _a222[:, 1]), (0, 0, 1), done=(True, False, True), ordered=True,
            native="RewardToGo(1)",
        ),
        Toy(
            "coins", ((1,), (2, 1), (1,)), coins_paths, bool_mask("11", "01"),
            state_of(_zero[:4], coordinates(2, 2)[:, 0]), (0, 1), ordered=True,
        ),
    )
}  # fmt: skip


# --------------------------------------------------------------------------------------------------------- settings


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


class Lookup(nn.Module):
    """A value for each state: the plainest value function."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(values((40,), 11))

    def forward(self, state: Tensor) -> Tensor:
        return self.table[state]


def _remembered(given: Setting, credit: sf.core.Credit) -> sf.MovingAverage:
    """A moving average after three batches that have nothing to do with the draws it will meet."""
    average = sf.MovingAverage(0.7)
    draws = replace(given.draws, mask=None)
    width = draws.signal(credit).shape[-1]
    for step in range(3):
        past = values((given.layout.N, 1, *given.layout.batch, width), 30 + step)
        average.update(past.expand(*draws.log_prob.shape[:-1], width), draws)
    return average


BASELINES: dict[str, Callable[[Setting, sf.core.Credit], Any]] = {
    "None": lambda given, credit: None,
    "Constant(.7)": lambda given, credit: sf.Constant(0.7),
    "Constant([K])": lambda given, credit: sf.Constant(values((given.toy.K,), 12)),
    "Constant([N, *B, K])": lambda given, credit: sf.Constant(
        values((given.layout.N, 1, *given.layout.batch, given.toy.K), 13).expand(given.draws.log_prob.shape)
    ),
    "LeaveOneOut()": lambda given, credit: sf.LeaveOneOut(),
    "MovingAverage, new": lambda given, credit: sf.MovingAverage(),
    "MovingAverage, after three batches": _remembered,
    "OptimalConstant()": lambda given, credit: sf.OptimalConstant(),
    "RegressionBaseline": lambda given, credit: sf.RegressionBaseline(
        lambda draws: draws.context.double().unsqueeze(-1)
    ),
    "ValueFunction": lambda given, credit: sf.ValueFunction(Lookup()),
    "ValueFunction, [N, *B, K, 1]": lambda given, credit: sf.ValueFunction(
        nn.Sequential(Lookup(), nn.Unflatten(-1, (-1, 1))), features=lambda draws: draws.context
    ),
}


class Prepared:
    """A structured measure whose draws are given: the way through the front door."""

    def __init__(self, draws: sf.Draws) -> None:
        self.prepared = draws

    def draws(self, f: Any, num_samples: int, *, coupling: Any = None) -> sf.Draws:
        return self.prepared


ENTRIES: dict[str, Callable[..., Tensor]] = {
    "surrogate": lambda draws, credit, baseline: sf.surrogate(draws, credit=credit, baseline=baseline).mean(0),
    "dice": lambda draws, credit, baseline: sf.dice(draws, credit=credit, baseline=baseline).mean(0),
    "expectation": lambda draws, credit, baseline: sf.expectation(
        Prepared(draws), None, len(draws), credit=credit, baseline=baseline
    ),
}


# ----------------------------------------------------------------------------------------------------------- checks


def deviation(given: Setting, credit_name: str, baseline: Any, entry: str) -> float:
    """Largest deviation of the expected gradient from the true one; the value must be right in any case.

    Args:
        given: the setting.
        credit_name: a row of CREDITS, or "own" for the draws' own credit.
        baseline: a baseline, None or "auto".
        entry: a row of ENTRIES.
    """
    row = CREDITS[given.toy.native if credit_name == "own" else credit_name]
    where = f"{entry}, {credit_name}, {baseline}, on {given}"
    try:
        credit = None if credit_name == "own" else row.make(given)
        estimate = ENTRIES[entry](given.draws, credit, baseline)
        expected = (given.weight * estimate).sum()
        gradient = torch.autograd.grad(expected, given.parameters, retain_graph=True, allow_unused=True)
    except sf.ScorefnError as error:
        raise AssertionError(f"refused: {where}: {error}") from error
    value_error = abs(float(expected.detach() - given.truth(row.discount)))
    assert value_error < EXACT, f"{where}: the expected value is off by {value_error:.3g}"
    gaps = [
        (truth if ours is None else ours - truth).abs().max()
        for ours, truth in zip(gradient, given.true_gradient(row.discount), strict=True)
    ]
    return float(torch.stack(gaps).nan_to_num(nan=torch.inf).max())


def check_exact(given: Setting, credit_name: str, baseline_name: str, entry: str) -> None:
    """The expected gradient is the true gradient to 1e-10."""
    credit = CREDITS[given.toy.native if credit_name == "own" else credit_name].make(given)
    baseline = "auto" if baseline_name == "auto" else BASELINES[baseline_name](given, credit)
    gap = deviation(given, credit_name, baseline, entry)
    assert gap < EXACT, f"{entry}, {credit_name}, {baseline_name}, on {given}: the gradient is off by {gap:.3g}"


# ------------------------------------------------------------------------------------------- plain distributions


@dataclass(frozen=True, eq=False)
class Family:
    """A plain distribution, with points that integrate it: its support, or the nodes of a quadrature.

    Args:
        name: shown where a check fails.
        start: the parameters.
        build: parameters to distribution.
        points: parameters to points `[P, *batch, *event]` and weights `[P, *B]`, without gradient.
        f: x `[..., *batch, *event]` and parameters to `[..., *B]`; the last parameter enters f only.
        truth: parameters to E f, summed over problems.
        batch: B.
        most: the largest N.
    """

    name: str
    start: tuple[Any, ...]
    build: Callable[..., torch.distributions.Distribution]
    points: Callable[..., tuple[Tensor, Tensor]]
    f: Callable[..., Tensor]
    truth: Callable[..., Tensor]
    batch: tuple[int, ...] = ()
    most: int = 2

    def parameters(self) -> tuple[Tensor, ...]:
        return tuple(torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in self.start)


class Replay:
    """All N-tuples of points, handed out by the distribution's own `sample`."""

    def __init__(self, family: Family, N: int) -> None:
        self.family, self.N, self.parameters = family, N, family.parameters()
        with torch.no_grad():
            points, weight = family.points(*self.parameters)
        choice = coordinates(*[len(points)] * N).T
        self.x, self.weight = points[choice], weight[choice].prod(0)
        self.p = family.build(*self.parameters)
        self.p = self.p.expand((choice.shape[1], *self.p.batch_shape))
        self.p.sample = self._sample  # type: ignore[method-assign]

    def _sample(self, sample_shape: torch.Size) -> Tensor:
        assert tuple(sample_shape) == (self.N,)
        return self.x

    def f(self, x: Tensor) -> Tensor:
        return self.family.f(x, *self.parameters)


PLAIN_ENTRIES: dict[str, Callable[..., Tensor]] = {
    "surrogate": lambda p, f, N, baseline: sf.surrogate(sf.draw(p, f, N), baseline=baseline).mean(0),
    "dice": lambda p, f, N, baseline: sf.dice(sf.draw(p, f, N), baseline=baseline).mean(0),
    "expectation": lambda p, f, N, baseline: sf.expectation(p, f, N, baseline=baseline),
}


def check_plain(family: Family, N: int, baseline: Any, entry: str) -> None:
    """Expected value and gradient over all N-tuples of points are the true ones, to 1e-10."""
    replay = Replay(family, N)
    where = f"{entry}, {baseline}, on {family.name} with N = {N}"
    try:
        estimate = PLAIN_ENTRIES[entry](replay.p, replay.f, N, baseline)
    except sf.ScorefnError as error:
        raise AssertionError(f"refused: {where}: {error}") from error
    assert estimate.shape == replay.weight.shape, f"{where}: shape {tuple(estimate.shape)}"
    ours, truth = (replay.weight * estimate).sum(), family.truth(*replay.parameters)
    assert abs(float(ours.detach() - truth.detach())) < EXACT, f"{where}: value {ours.item()} for {truth.item()}"
    pairs = zip(
        *[torch.autograd.grad(value, replay.parameters, materialize_grads=True) for value in (ours, truth)], strict=True
    )
    for index, (mine, true) in enumerate(pairs):
        gap = float((mine - true).abs().nan_to_num(nan=torch.inf).max())
        assert gap < EXACT, f"{where}: the gradient of parameter {index} is off by {gap:.3g}"


def finite(
    name: str, start: Any, build: Any, support: Tensor, f: Any, *, batch: tuple[int, ...] = (), most: int = 3
) -> Family:
    """A family of finite support: `support` `[P, *rest, *event]` lists the joint outcomes of one problem."""

    def spread(p: torch.distributions.Distribution) -> Tensor:
        tail = support.shape[1:]
        return support.reshape(-1, *[1] * len(batch), *tail).expand(-1, *batch, *tail)

    def mass(p: torch.distributions.Distribution) -> Tensor:
        log_prob = p.log_prob(spread(p))
        return log_prob.flatten(1 + len(batch)).sum(-1).exp() if log_prob.ndim > 1 + len(batch) else log_prob.exp()

    def points(*parameters: Tensor) -> tuple[Tensor, Tensor]:
        p = build(*parameters)
        return spread(p), mass(p)

    def truth(*parameters: Tensor) -> Tensor:
        p = build(*parameters)
        return (mass(p) * f(spread(p), *parameters)).sum()

    return Family(name, start, build, points, f, truth, batch, most)


@cache
def gauss_hermite(n: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights of the standard normal, exact for polynomials of degree below 2n."""
    off_diagonal = torch.arange(1, n, dtype=torch.float64).sqrt()
    nodes, vectors = torch.linalg.eigh(torch.diag(off_diagonal, 1) + torch.diag(off_diagonal, -1))
    return nodes, vectors[0].square()


def normal_points(loc: Tensor, scale: Tensor, n: int = 10) -> tuple[Tensor, Tensor]:
    """`[P, *B]` points and weights of a batch of normals."""
    nodes, weights = gauss_hermite(n)
    lead = (-1, *[1] * loc.ndim)
    return loc + scale * nodes.reshape(lead), weights.reshape(lead).expand(-1, *loc.shape)


def _bits(n: int) -> Tensor:
    return coordinates(*[2] * n).double()


def _mixture(weights: Tensor, loc: Tensor, log_scale: Tensor) -> torch.distributions.Distribution:
    d = torch.distributions
    return d.MixtureSameFamily(d.Categorical(logits=weights), d.Normal(loc, log_scale.exp()))


def _trapezoid(weights: Tensor, loc: Tensor, log_scale: Tensor, psi: Tensor) -> tuple[Tensor, Tensor]:
    x = torch.linspace(-9.0, 9.0, 181, dtype=torch.float64)
    return x, _mixture(weights, loc, log_scale).log_prob(x).exp() * 0.1


def _product_points(loc: Tensor, log_scale: Tensor, psi: Tensor) -> tuple[Tensor, Tensor]:
    x, w = normal_points(loc, log_scale.exp(), 6)
    pairs = coordinates(6, 6)
    return torch.stack([x[pairs[:, 0], 0], x[pairs[:, 1], 1]], -1), w[pairs[:, 0], 0] * w[pairs[:, 1], 1]


def _correlated(loc: Tensor, tril: Tensor, psi: Tensor) -> torch.distributions.Distribution:
    return torch.distributions.MultivariateNormal(loc, scale_tril=tril.tril())


def _covariance(tril: Tensor) -> Tensor:
    return tril.tril() @ tril.tril().T


def _correlated_points(loc: Tensor, tril: Tensor, psi: Tensor) -> tuple[Tensor, Tensor]:
    nodes, weights = gauss_hermite(6)
    pairs = coordinates(6, 6)
    return loc + nodes[pairs] @ tril.tril().T, weights[pairs].prod(-1)


_d = torch.distributions
FAMILIES = {
    family.name: family
    for family in (
        finite(
            "Bernoulli", (0.4, 0.3), lambda eta, psi: _d.Bernoulli(logits=eta), _bits(1)[:, 0],
            lambda x, eta, psi: (x - 0.45).square() + psi.exp() * x,
        ),
        finite(
            "Bernoulli, f over its batch", ([0.4, -1.0, 0.3], 0.3), lambda eta, psi: _d.Bernoulli(logits=eta), _bits(3),
            lambda x, eta, psi: (x[..., 0] - 2 * x[..., 1] + x[..., 2] / 2).square() + psi * x[..., 0] * x[..., 2],
            most=2,
        ),
        finite(
            "Bernoulli, f over the tail of its batch", ([[0.4, -1.0], [0.3, 0.9]], 0.3),
            lambda eta, psi: _d.Bernoulli(logits=eta), _bits(2),
            lambda x, eta, psi: (x[..., 0] - 2 * x[..., 1] + psi).square(), batch=(2,),
        ),
        finite(
            "Bernoulli, independent problems", ([0.4, -1.0], 0.3), lambda eta, psi: _d.Bernoulli(logits=eta),
            _bits(1)[:, 0], lambda x, eta, psi: (x - 0.45).square() * (1 + psi * eta), batch=(2,),
        ),
        finite(
            "Independent(Bernoulli)", ([0.4, -1.0, 0.3], 0.3),
            lambda eta, psi: _d.Independent(_d.Bernoulli(logits=eta), 1), _bits(3),
            lambda x, eta, psi: (x.sum(-1) - psi).pow(3), most=2,
        ),
        finite(
            "Categorical", ([0.4, -1.0, 0.3], 0.3), lambda logits, psi: _d.Categorical(logits=logits), torch.arange(3),
            lambda x, logits, psi: (x + psi).square(),
        ),
        finite(
            "OneHotCategorical", ([[0.4, -1.0, 0.3], [0.1, 0.2, 2.0]], 0.3),
            lambda logits, psi: _d.OneHotCategorical(logits=logits), torch.eye(3, dtype=torch.float64),
            lambda x, logits, psi: (x * torch.tensor([1.0, -2.0, 5.0]).to(x)).sum(-1) * psi.exp(), batch=(2,),
        ),
        finite(
            "Binomial", (0.4, 0.3), lambda eta, psi: _d.Binomial(3, logits=eta), torch.arange(4).double(),
            lambda x, eta, psi: (x - psi).pow(3),
        ),
        Family(
            "Normal", (0.7, -0.2, 0.3), lambda m, s, psi: _d.Normal(m, s.exp()),
            lambda m, s, psi: normal_points(m, s.exp()), lambda x, m, s, psi: x.pow(3) + psi * x.square(),
            lambda m, s, psi: m.pow(3) + 3 * m * (2 * s).exp() + psi * (m.square() + (2 * s).exp()), most=3,
        ),
        Family(
            "Normal, independent problems", ([0.7, -0.5], [-0.2, 0.3], 0.3), lambda m, s, psi: _d.Normal(m, s.exp()),
            lambda m, s, psi: normal_points(m, s.exp()), lambda x, m, s, psi: x.square() + psi * x,
            lambda m, s, psi: (m.square() + (2 * s).exp() + psi * m).sum(), batch=(2,),
        ),
        Family(
            "Independent(Normal)", ([0.7, -0.5], [-0.2, 0.3], 0.3),
            lambda m, s, psi: _d.Independent(_d.Normal(m, s.exp()), 1), _product_points,
            lambda x, m, s, psi: (x[..., 0] * x[..., 1] + psi * x[..., 1].square()),
            lambda m, s, psi: m.prod() + psi * (m[1].square() + (2 * s[1]).exp()),
        ),
        Family(
            "MultivariateNormal", ([0.7, -0.5], [[0.8, 0.0], [0.3, 1.1]], 0.3), _correlated, _correlated_points,
            lambda x, m, tril, psi: x[..., 0] * x[..., 1] + psi * x[..., 1].square(),
            lambda m, tril, psi: (lambda c: c[0, 1] + m.prod() + psi * (c[1, 1] + m[1].square()))(_covariance(tril)),
        ),
        Family(
            "LogNormal", (0.2, -0.7, 0.3), lambda m, s, psi: _d.LogNormal(m, s.exp()),
            lambda m, s, psi: (lambda x, w: (x.exp(), w))(*normal_points(m, s.exp(), 30)),
            lambda x, m, s, psi: x + psi * x.log().square(),
            lambda m, s, psi: (m + (2 * s).exp() / 2).exp() + psi * (m.square() + (2 * s).exp()),
        ),
        Family(
            "TransformedDistribution", (0.2, -0.7, 0.3),
            lambda m, s, psi: _d.TransformedDistribution(
                _d.Normal(m, s.exp()), [_d.AffineTransform(1.0, -2.0), _d.ExpTransform(), _d.AffineTransform(3.0, 0.5)]
            ),
            lambda m, s, psi: (lambda x, w: (3 + (1 - 2 * x).exp() / 2, w))(*normal_points(m, s.exp(), 40)),
            lambda x, m, s, psi: (x - 3) * psi.exp(),
            lambda m, s, psi: (1 - 2 * m + 2 * (2 * s).exp()).exp() / 2 * psi.exp(),
        ),
        Family(
            "MixtureSameFamily", ([0.4, -0.3], [-1.0, 1.5], [-0.3, -0.1], 0.3),
            lambda w, m, s, psi: _mixture(w, m, s), _trapezoid, lambda x, w, m, s, psi: x.pow(3) + psi * x.square(),
            lambda w, m, s, psi: (
                w.softmax(-1) * (m.pow(3) + 3 * m * (2 * s).exp() + psi * (m.square() + (2 * s).exp()))
            ).sum(),
        ),
    )
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------- higher orders


def derivative_tensors(value: Tensor, parameters: Sequence[Tensor], order: int) -> list[Tensor]:
    """Gradient, Hessian, ... of a scalar in all parameters together: `[D]`, `[D, D]`, ..."""
    tensors, rows = [], value.reshape(1)
    size = sum(parameter.numel() for parameter in parameters)
    for depth in range(1, order + 1):
        gradients = [
            torch.autograd.grad(row, parameters, create_graph=True, materialize_grads=True)
            if row.requires_grad
            else [torch.zeros_like(parameter) for parameter in parameters]
            for row in rows.unbind()
        ]
        rows = torch.cat([torch.cat([part.reshape(-1) for part in gradient]) for gradient in gradients])
        tensors.append(rows.detach().reshape([size] * depth))
    return tensors


@cache
def true_derivatives(toy: str, discount: float, order: int) -> list[Tensor]:
    parameters = TOYS[toy].parameters((1,), seed=20)
    value = objective(TOYS[toy], TOYS[toy].enumerate(*parameters), (0,), discount)
    return derivative_tensors(value, parameters, order)


def check_orders(given: Setting, credit_name: str, baseline_name: str, order: int = 3) -> None:
    """Every derivative of `dice`, in expectation, is the derivative of the expectation; in one group, one problem."""
    row = CREDITS[credit_name]
    credit = row.make(given)
    where = f"dice, {credit_name}, {baseline_name}, on {given}"
    try:
        estimate = sf.dice(given.draws, credit=credit, baseline=BASELINES[baseline_name](given, credit))
    except sf.ScorefnError as error:
        raise AssertionError(f"refused: {where}: {error}") from error
    ours = derivative_tensors((given.weight * estimate.mean(0)).sum(), given.parameters, order)
    truth = true_derivatives(given.toy_name, row.discount, order)
    for depth, (mine, true) in enumerate(zip(ours, truth, strict=True), 1):
        assert true.abs().max() > VISIBLE, f"{where}: the derivative of order {depth} vanishes: nothing is tested"
        gap = float((mine - true).abs().nan_to_num(nan=torch.inf).max())
        assert gap < EXACT, f"{where}: the derivative of order {depth} is off by {gap:.3g}"


def check_constant_cancels(credit_name: str, toy: str = "coins", order: int = 3) -> None:
    """With leave-one-out, a constant f gives derivatives of 0 at each order, tuple by tuple."""
    given = setting(toy, "N=2")
    draws = replace(given.draws, fx=values((given.toy.J,), 14).expand(given.draws.fx.shape))
    estimate = sf.dice(draws, credit=CREDITS[credit_name].make(given), baseline=sf.LeaveOneOut()).mean(0)
    for number, tuple_value in enumerate(estimate.unbind()):
        for depth, tensor in enumerate(derivative_tensors(tuple_value, given.parameters, order), 1):
            size = float(tensor.abs().max())
            assert size < 1e-13, f"dice, {credit_name}: a constant leaves {size:.3g} at order {depth} of tuple {number}"


# ----------------------------------------------------------------------------------------------------- value, twins


def check_value(given: Setting, credit_name: str, baseline_name: str, entry: str) -> None:
    """The value of each draw is the weighted f, to the bit on-policy without discount."""
    row = CREDITS[credit_name]
    credit = row.make(given)
    draws, baseline = given.draws, BASELINES[baseline_name](given, credit)
    ours = {"surrogate": sf.surrogate, "dice": sf.dice}[entry](draws, credit=credit, baseline=baseline).detach()
    where = f"{entry}, {credit_name}, {baseline_name}, on {given}"
    weighted = draws.fx.detach()
    if row.discount != 1.0:
        weighted = weighted * torch.tensor([row.discount**age for age in given.toy.age], dtype=torch.float64)
    if given.off_policy:
        log_ratio = (draws.log_prob - draws.behaviour_log_prob).detach()
        influence = torch.ones_like(given.toy.influence) if credit_name == "Total()" else given.toy.influence
        weighted = weighted * torch.einsum("kj,...k->...j", influence.double(), log_ratio).exp()
    truth = weighted.sum(-1)
    if not given.off_policy and row.discount == 1.0:
        assert torch.equal(ours, truth), f"{where}: the value is not f to the bit"
    gap = float((ours - truth).abs().max())
    assert gap < 1e-12, f"{where}: the value is off by {gap:.3g}"


def check_microbatches(dtype: torch.dtype, tolerance: float) -> None:
    """With the baseline read once on the whole batch, any split gives the gradient of the whole."""
    given, N = setting("ended", "N=1", True), 12
    rows = torch.randint(given.choice.shape[1], (N,), generator=torch.Generator().manual_seed(3))
    paths, toy = given.paths, given.toy
    draws = sf.Draws(
        x=rows,
        log_prob=paths.log_prob[0, rows].to(dtype),
        fx=paths.fx[0, rows].to(dtype),
        credit=sf.RewardToGo(0.9, done=torch.tensor([[False, True]]).expand(N, 2)),
        behaviour_log_prob=given.behaviour.log_prob[0, rows].to(dtype),
        mask=toy.mask[rows],
        block=torch.tensor([0, 0, 1, 2, 3, 4, 4, 5, 6, 7, 8, 9]),
        group=torch.tensor([0, 0, 0, 1, 1, 1, 1, 0, 2, 2, 2, 2]),
    )
    read = sf.LeaveOneOut()(draws.signal(), draws)

    def gradient(loss: Tensor) -> Tensor:
        parts = torch.autograd.grad(loss, given.parameters, retain_graph=True)
        return torch.cat([part.flatten() for part in parts])

    whole = gradient(sf.surrogate(draws, baseline=sf.LeaveOneOut()).mean(0))
    assert whole.abs().max() > VISIBLE
    for cuts in ((12,), (5, 7), (1, 10, 1), (1,) * 12, (3, 1, 8), (2, 1, 2, 1, 2, 1, 3)):
        parts = torch.arange(N).split(cuts)
        total = sum(gradient(sf.surrogate(draws[i], baseline=sf.Constant(read[i])).sum(0) / N) for i in parts)
        gap = float((total - whole).abs().max())
        assert gap < tolerance, f"microbatches {cuts} in {dtype}: the gradient is off by {gap:.3g}"


def dense_reward_to_go(done: Tensor) -> Tensor:
    """`[K, J]`: step k influences the values from k on, as far as its episode goes."""
    T = len(done)
    episode = torch.cat([torch.zeros(1, dtype=torch.long), done.long().cumsum(0)[:-1]])
    return torch.ones(T, T, dtype=torch.bool).triu() & (episode[:, None] == episode[None, :])


def check_adjoint(credit: sf.core.Credit, v: Tensor, u: Tensor) -> None:
    """`<influence(v), u> == <v, influence_adjoint(u)>`; what has size 1 stands for K or J equal entries."""
    left = (credit.influence(v) * u).sum()
    right = (v * credit.influence_adjoint(u)).sum()
    assert near(left, right), f"{credit}: adjoint: {left.item()} and {right.item()}"


def check_twin(credit: sf.core.Credit, dense: Tensor, v: Tensor, u: Tensor) -> None:
    """A fast credit is its matrix, in `influence`, its adjoint and its predecessors, on `[..., J]` and `[..., K]`."""
    twin = sf.Influence(dense)
    for name, argument in (("influence", v), ("influence_adjoint", u), ("predecessors", u)):
        ours, theirs = getattr(credit, name)(argument), getattr(twin, name)(argument)
        gap = float((ours - theirs).abs().max())
        assert gap < 1e-11, f"{credit}: {name} differs from its matrix by {gap:.3g}:\n{ours}\n{theirs}"
    for name, argument, equation in (("influence", v, "kj,...j->...k"), ("influence_adjoint", u, "kj,...k->...j")):
        brute = torch.einsum(equation, dense.to(v), argument)
        gap = float((getattr(twin, name)(argument) - brute).abs().max())
        assert gap < 1e-11, f"Influence: {name} is not the matrix product, by {gap:.3g}"


def check_identity(credit: sf.core.Credit, v: Tensor, ages: Tensor, discount: float, visitation: bool) -> None:
    """`credit(v) == decision_weight * (M @ (value_weight * v))`, and the weights are powers of the discount."""
    value_weight, decision_weight = credit.value_weight(v), credit.decision_weight(v)
    if discount == 1.0:
        assert decision_weight is None
    else:
        assert near(value_weight.expand_as(v), discount**ages), f"{credit}: value_weight"
        if visitation:
            assert decision_weight is None
        else:
            inverse = discount**-ages
            assert near(decision_weight.expand_as(v), inverse), f"{credit}: decision_weight"
    weighed = v if value_weight is None else value_weight * v
    definition = credit.influence(weighed)
    if decision_weight is not None:
        definition = decision_weight * definition
    assert near(credit(v), definition), f"{credit}: {credit(v)} and {definition}"


def plain_recurrence(x: Tensor, decay: Tensor, reverse: bool) -> Tensor:
    """The loop, along the first axis."""
    order = range(len(x) - 1, -1, -1) if reverse else range(len(x))
    y: list[Any] = [None] * len(x)
    last = None
    for t in order:
        y[t] = x[t] if last is None else x[t] + decay[t] * last
        last = y[t]
    return torch.stack(y)


def check_recurrence(x: Tensor, decay: Tensor | float, reverse: bool, dim: int) -> None:
    """`linear_recurrence` is the loop, and so are its gradients."""
    x = x.detach().requires_grad_()
    inputs: tuple[Tensor, ...] = (x,)
    if isinstance(decay, Tensor):
        decay = decay.detach().requires_grad_()
        inputs = (x, decay) if x.shape[dim] > 1 else inputs
    ours = sf.linear_recurrence(x, decay, reverse=reverse, dim=dim)
    spread = torch.as_tensor(decay, dtype=x.dtype).expand(x.shape).movedim(dim, 0)
    theirs = plain_recurrence(x.movedim(dim, 0), spread, reverse).movedim(0, dim)
    gap = float((ours - theirs).detach().abs().max())
    assert gap < 1e-11, f"linear_recurrence, reverse={reverse}, dim={dim}: off by {gap:.3g}"
    direction = values(x.shape, 16)
    gradients = [torch.autograd.grad((y * direction).sum(), inputs) for y in (ours, theirs)]
    for mine, true in zip(*gradients, strict=True):
        gap = float((mine - true).abs().max())
        assert gap < 1e-11, f"linear_recurrence, reverse={reverse}, dim={dim}: its gradient is off by {gap:.3g}"


# -------------------------------------------------------------------------------------------------------- couplings


class Dice:
    """Every outcome of a coupling's own randomness, side by side along a problem axis T.

    The sources of randomness of `scorefn.reducers.couplings` are replaced: a first run, with T = 1, records what is
    asked for; each number asked for has an alphabet (the cells of a uniform, the values of an integer, the
    permutations of a block), and the second run hands out every word of these alphabets, with its probability.

    Args:
        cells: places and volumes `[C]` that stand for a uniform, exact where what is integrated is constant in each.
    """

    def __init__(self, cells: tuple[Tensor, Tensor]) -> None:
        self.cells, self.T = cells, 1
        self.sizes: list[int] = []
        self.words: Tensor | None = None  # [T, slots]; None while recording
        self.used = 0
        self.volume = torch.ones(1, dtype=torch.float64)

    def _roll(self, slots: int, letters: int) -> Tensor:
        """The letters of the next slots, `[slots, T]`."""
        if self.words is None:
            self.sizes += [letters] * slots
            return torch.zeros(slots, 1, dtype=torch.long)
        rolled = self.words[:, self.used : self.used + slots].T
        self.used += slots
        return rolled

    def rand(self, shape: Sequence[int], device: Any) -> Tensor:
        rolled = self._roll(torch.Size(shape).numel() // self.T, len(self.cells[0]))
        self.volume = self.volume * self.cells[1][rolled].prod(0)
        return self._placed(self.cells[0][rolled], shape)

    def integers(self, low: int, high: int, shape: Sequence[int], device: Any) -> Tensor:
        rolled = self._roll(torch.Size(shape).numel() // self.T, high - low)
        self.volume = self.volume / (high - low) ** len(rolled)
        return self._placed(low + rolled, (shape[0], 1, self.T, -1)).reshape(shape)

    def permutations(self, count: int, size: int, shape: torch.Size, device: Any) -> Tensor:
        every = torch.tensor(list(permutations(range(size))))
        rolled = self._roll(count * shape.numel() // self.T, len(every))
        self.volume = self.volume / len(every) ** len(rolled)
        placed = self._placed(rolled, (count, 1, *shape))
        return every[placed].movedim(-1, 1).squeeze(2)

    def sobol(self, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The first coordinates of the sequence, once for every outcome."""
        return lambda dimension, size: original(dimension // self.T, size).repeat(1, self.T)

    def _placed(self, rolled: Tensor, shape: Sequence[int]) -> Tensor:
        """`[slots, T]` to a shape `[a, b, T, *rest]`: T comes third."""
        return rolled.reshape(*shape[:2], -1, self.T).movedim(-1, 2).reshape(tuple(shape))

    def uniforms(self, coupling: Any, N: int, event: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """All outcomes of `coupling.uniforms`: `[N, T, *event]`, block `[N]` and probability `[T]`."""
        with pytest.MonkeyPatch.context() as patch:
            for name in ("rand", "integers", "permutations"):
                patch.setattr(couplings, f"_{name}", getattr(self, name))
            patch.setattr(couplings, "_sobol", self.sobol(couplings._sobol))
            patch.setattr(couplings.SobolEngine, "MAXDIM", 10**9)
            coupling.uniforms(N, torch.Size((1, *event)))
            self.words = coordinates(*self.sizes)
            self.T, self.volume = len(self.words), torch.ones(len(self.words), dtype=torch.float64)
            u, block = coupling.uniforms(N, torch.Size((self.T, *event)))
        return u, block, self.volume


def cells_between(breaks: Tensor) -> tuple[Tensor, Tensor]:
    """The middles and the volumes of the cells into which break points divide (0, 1)."""
    inner = breaks[(breaks > 1e-12) & (breaks < 1 - 1e-12)].sort().values
    edges = torch.cat([torch.zeros(1).to(inner), inner, torch.ones(1).to(inner)])
    edges = edges[torch.cat([torch.tensor([True]), edges.diff() > 1e-12])]
    return (edges[1:] + edges[:-1]) / 2, edges.diff()


def steps_of(family: Family) -> Tensor:
    """Where the quantile of a discrete family jumps, over all its coordinates."""
    with torch.no_grad():
        p = family.build(*family.parameters())
        p = p.base_dist if isinstance(p, torch.distributions.Independent) else p
        if isinstance(p, torch.distributions.Bernoulli):
            return (1 - p.probs).reshape(-1)
        if isinstance(p, torch.distributions.Binomial):
            return p.log_prob(torch.arange(p.total_count + 1.0).to(p.probs)).exp().cumsum(0)
        return p.probs.cumsum(-1).reshape(-1)


@dataclass(frozen=True)
class CouplingRow:
    """A coupling, with the settings small enough to enumerate.

    Args:
        make: the coupling.
        size: draws per block.
        served: families and how many draws of each.
    """

    make: Callable[[], Any]
    size: int
    served: tuple[tuple[str, int], ...]

    def cells(self, family: Family) -> tuple[Tensor, Tensor]:
        """Cells of a uniform in which all draws are constant; or the nodes of a quadrature."""
        if "Normal" in family.name:
            nodes, weights = gauss_hermite(6)
            return torch.special.ndtr(nodes), weights
        steps = steps_of(family)
        if isinstance(self.make(), sf.Antithetic):
            return cells_between(torch.cat([steps, 1 - steps]))
        return cells_between((self.size * steps).frac())


COUPLINGS = {
    "Antithetic()": CouplingRow(
        sf.Antithetic, 2,
        (
            ("Bernoulli", 2), ("Bernoulli", 6), ("Categorical", 4), ("OneHotCategorical", 4), ("Binomial", 4),
            ("Bernoulli, independent problems", 4), ("Bernoulli, f over its batch", 4), ("Independent(Bernoulli)", 2),
            ("Independent(Bernoulli)", 4), ("Normal", 2), ("Normal", 4), ("Normal", 6),
            ("Normal, independent problems", 4), ("Independent(Normal)", 4), ("MultivariateNormal", 4),
        ),
    ),
    "Stratified(2)": CouplingRow(
        lambda: sf.Stratified(2), 2, (("Bernoulli", 2), ("Bernoulli", 6), ("Categorical", 4), ("Binomial", 4))
    ),
    "Stratified(3)": CouplingRow(lambda: sf.Stratified(3), 3, (("Bernoulli", 3), ("Bernoulli", 6), ("Categorical", 3))),
    "Stratified()": CouplingRow(sf.Stratified, 2, (("Bernoulli", 4), ("Bernoulli, independent problems", 4))),
    "Systematic(2)": CouplingRow(
        lambda: sf.Systematic(2), 2,
        (("Bernoulli", 6), ("Categorical", 4), ("OneHotCategorical", 4), ("Independent(Bernoulli)", 2)),
    ),
    "Systematic(3)": CouplingRow(lambda: sf.Systematic(3), 3, (("Bernoulli", 6), ("Categorical", 6), ("Binomial", 6))),
    "Sobol(2)": CouplingRow(
        lambda: sf.Sobol(2), 2, (("Bernoulli", 2), ("Bernoulli", 6), ("Categorical", 4), ("Independent(Bernoulli)", 2))
    ),
    "Sobol(4)": CouplingRow(lambda: sf.Sobol(4), 4, (("Bernoulli", 4), ("Bernoulli", 8), ("Categorical", 4))),
    "Sobol()": CouplingRow(sf.Sobol, 2, (("Bernoulli", 4), ("Bernoulli, independent problems", 4))),
}  # fmt: skip


@dataclass(frozen=True)
class Given:
    """A coupling whose uniforms and blocks are prepared."""

    u: Tensor
    block: Tensor
    unbiased = True

    def sample(self, p: Any, num_samples: int) -> tuple[Tensor, Tensor]:
        return sf.quantile(p, self.u), self.block


COUPLED_ENTRIES: dict[str, Callable[..., Tensor]] = {
    "surrogate": lambda p, f, N, coupling, baseline: sf.surrogate(
        sf.draw(p, f, N, coupling=coupling), baseline=baseline
    ).mean(0),
    "dice": lambda p, f, N, coupling, baseline: sf.dice(
        sf.draw(p, f, N, coupling=coupling), baseline=baseline
    ).mean(0),
    "expectation": lambda p, f, N, coupling, baseline: sf.expectation(p, f, N, coupling=coupling, baseline=baseline),
}  # fmt: skip


def check_coupling(name: str, family_name: str, N: int, baseline: Any, entry: str) -> None:
    """Expected value and gradient over all outcomes of the coupling's uniforms are the true ones, to 1e-10."""
    row, family = COUPLINGS[name], FAMILIES[family_name]
    where = f"{name}, {entry}, {baseline}, on {family_name} with N = {N}"
    parameters = family.parameters()
    p = family.build(*parameters)
    event = quantiles.uniform_shape(p)
    u, block, weight = Dice(row.cells(family)).uniforms(row.make(), N, tuple(event))
    assert abs(float(weight.sum()) - 1) < 1e-12, f"{where}: the probabilities sum to {weight.sum()}"
    p = p.expand((len(weight), *p.batch_shape))
    estimate = COUPLED_ENTRIES[entry](p, lambda x: family.f(x, *parameters), N, Given(u, block), baseline)
    ours = (weight.reshape(-1, *[1] * (estimate.ndim - 1)) * estimate).sum()
    check_expected(ours, family.truth(*parameters), parameters, where)


def check_expected(ours: Tensor, truth: Tensor, parameters: Sequence[Tensor], where: str) -> None:
    """Value and gradient are the true ones, to 1e-10."""
    assert abs(float(ours.detach() - truth.detach())) < EXACT, f"{where}: value {ours.item()} for {truth.item()}"
    pairs = zip(
        *[torch.autograd.grad(value, parameters, materialize_grads=True) for value in (ours, truth)], strict=True
    )
    for index, (mine, true) in enumerate(pairs):
        gap = float((mine - true).abs().nan_to_num(nan=torch.inf).max())
        assert gap < EXACT, f"{where}: the gradient of parameter {index} is off by {gap:.3g}"


def orthogonal_outcomes(count: int) -> tuple[Tensor, Tensor]:
    """Gaussian 2 x 2 matrices of `count` blocks, `[count, T, 2, 2]`, and probabilities `[T]`.

    In polar coordinates: 6 angles of the first column integrate trigonometric polynomials below degree 6, the second
    angle matters by its side only, and two Gauss-Laguerre nodes of half the squared lengths those of degree 3.
    """
    root = 2**0.5
    half_square = torch.tensor([2 - root, 2 + root], dtype=torch.float64)
    share = torch.tensor([(2 + root) / 4, (2 - root) / 4], dtype=torch.float64)
    angle, side, first, second = coordinates(6, 2, 2, 2).T
    turn = angle.double() * torch.pi / 3 + 0.1
    turns = torch.stack([turn, turn + torch.where(side == 0, 1.0, -1.3)], -1)
    radius = (2 * half_square[torch.stack([first, second], -1)]).sqrt()
    g = torch.stack([turns.cos(), turns.sin()], -2) * radius.unsqueeze(-2)  # [48, 2, 2]
    weight = share[first] * share[second] / 12
    words = coordinates(*[len(g)] * count).T
    return g[words], weight[words].prod(0)


def check_orthogonal(coupling: Any, family_name: str, count: int, baseline: Any, entry: str) -> None:
    """As `check_coupling`, for two-dimensional Gaussians in blocks of two directions; f is a polynomial of degree 2."""
    family, N = FAMILIES[family_name], count * (4 if coupling.mirrored else 2)
    where = f"{coupling}, {entry}, {baseline}, on {family_name} with N = {N}"
    parameters = family.parameters()
    g, weight = orthogonal_outcomes(count)
    p = family.build(*parameters).expand((len(weight),))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(couplings, "_randn", lambda shape, device: g.reshape(shape))
        estimate = COUPLED_ENTRIES[entry](p, lambda x: family.f(x, *parameters), N, coupling, baseline)
    check_expected((weight * estimate).sum(), family.truth(*parameters), parameters, where)
