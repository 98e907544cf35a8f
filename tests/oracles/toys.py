"""Toy measures that can be enumerated.

A `Toy` lists every path of K decisions with its log-probabilities and values.

Axes: G groups, B problems, P paths, T tuples; N, K, J as everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


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
