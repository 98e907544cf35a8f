"""A repeated game of two moves, its exact value, and matches of it as a structured measure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

import scorefn as sf

STATES = ("start", "CC", "CD", "DC", "DD")  # the last round, one's own move first
_OTHERS_VIEW = [0, 1, 3, 2, 4]


class Rounds(NamedTuple):
    """N matches of T rounds."""

    states: Tensor  # [N, T] int, of STATES, as the first player sees them
    outcomes: Tensor  # [N, T] int, of STATES[1:]: what the round led to is the next state


@dataclass(frozen=True)
class Game:
    """A repeated game of two moves, symmetric; ``payoff`` is for CC, CD, DC, DD, one's own move first."""

    payoff: tuple[float, float, float, float] = (-1.0, -3.0, 0.0, -2.0)
    discount: float = 0.96

    def __post_init__(self) -> None:
        if not 0.0 <= self.discount < 1.0:
            raise ValueError(f"discount is {self.discount}, but a mean over endless rounds needs one in [0, 1).")

    def rewards(self, player: int) -> Tensor:
        """Payoff of each outcome to a player, ``[4]``, so scaled that their discounted sum is a mean."""
        own = torch.tensor(self.payoff, dtype=torch.float64)
        return (1 - self.discount) * (own if player == 0 else own[[0, 2, 1, 3]])

    def value(self, policies: Tensor, player: int, rounds: int | None = None) -> Tensor:
        """Exactly, and differentiable: with ``(I - discount P) v = r``, what the first round leads to.

        Args:
            policies: ``[2, 5]``.
            player: 0 or 1.
            rounds: after which all is over; None: never, the linear system.
        """
        probability, reward = log_outcomes(policies).exp(), self.rewards(player)
        if rounds is None:
            system = torch.eye(4, dtype=probability.dtype) - self.discount * probability[1:]
            to_come = torch.linalg.solve(system, probability[1:] @ reward)
        else:
            to_come = torch.zeros_like(reward)
            for _ in range(rounds - 1):
                to_come = probability[1:] @ (reward + self.discount * to_come)
        value: Tensor = probability[0] @ (reward + self.discount * to_come)
        return value


def log_outcomes(policies: Tensor) -> Tensor:
    """Log-probability of CC, CD, DC and DD in each state, ``[2, 5] -> [5, 4]``, as the first player sees them."""
    logits = torch.stack([policies[0], policies[1][_OTHERS_VIEW]])
    (c1, c2), (d1, d2) = torch.nn.functional.logsigmoid(logits), torch.nn.functional.logsigmoid(-logits)
    return torch.stack([c1 + c2, c1 + d2, d1 + c2, d1 + d2], -1)


@dataclass(frozen=True)
class Matches:
    """Matches of ``rounds`` rounds between two policies: a structured measure. Both moves of a round are one decision.

    The policies are tensors rather than modules, because one that has taken a step that is to be differentiated is a
    function of other tensors.
    """

    game: Game
    policies: Tensor
    rounds: int

    def draws(self, f: Callable[[Rounds], Tensor], num_samples: int, *, coupling: Any = None) -> sf.Draws:
        """Played without gradient, scored at once."""
        if coupling is not None:
            raise sf.ScorefnError("Matches are played independently: leave coupling out.")
        return self.score(f, self.play(num_samples))

    def score(self, f: Callable[[Rounds], Tensor], played: Rounds) -> sf.Draws:
        """Draws of given matches; their context is the state, discounted, which a regression of values can use."""
        log_prob = log_outcomes(self.policies)[played.states, played.outcomes]
        discount = self.game.discount ** torch.arange(self.rounds, dtype=log_prob.dtype)
        context = discount.unsqueeze(-1) * torch.nn.functional.one_hot(played.states, len(STATES))
        return sf.Draws(played, log_prob, f(played), credit=sf.RewardToGo(self.game.discount), context=context)

    @torch.no_grad()
    def play(self, num_samples: int) -> Rounds:
        """From torch's global generator."""
        upto = log_outcomes(self.policies).exp().cumsum(-1)[:, :3]
        state, columns = torch.zeros(num_samples, dtype=torch.long), []
        for chance in torch.rand(self.rounds, num_samples, 1, dtype=upto.dtype).unbind():
            outcome = (chance > upto[state]).sum(-1)
            columns.append((state, outcome))
            state = outcome + 1
        return Rounds(*(torch.stack(column, -1) for column in zip(*columns, strict=True)))
