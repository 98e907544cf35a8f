"""Reductions: how tokens and sequences are added into one objective, and what that does to the gradient."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from scorefn.core import Draws, ScorefnError, ShapeError
from scorefn.trajectories.bias import Bias
from scorefn.trajectories.group_advantages import present_decisions, wide


@dataclass(frozen=True)
class TokenSum:
    """Tokens are summed, sequences divided by a constant: the reduction that keeps the gradient.

    Args:
        denominator: the number of sequences of the whole batch (times a constant length, for Dr.GRPO); None: those of
            the draws.
    """

    denominator: float | None = None

    def __call__(self, draws: Draws) -> Tensor:
        """Weight of each sequence, ``[N, *B, 1]``."""
        return torch.full_like(_length(draws), 1.0 / positive("denominator", self.denominator, len(draws)))

    def bias(self) -> Bias:
        """None."""
        return Bias()


@dataclass(frozen=True)
class SequenceMean:
    """Tokens are averaged within each sequence, sequences divided by a constant: short sequences weigh more.

    Args:
        denominator: the number of sequences of the whole batch; None: those of the draws.
    """

    denominator: float | None = None

    def __call__(self, draws: Draws) -> Tensor:
        """Weight of each sequence, ``[N, *B, 1]``."""
        return 1.0 / (_length(draws) * positive("denominator", self.denominator, len(draws)))

    def bias(self) -> Bias:
        """The length depends on the decisions."""
        return Bias(None, ("each sequence is divided by its own length, which its tokens decide",))


@dataclass(frozen=True)
class TokenMean:
    """Tokens are summed and divided by their number: every token weighs the same.

    Args:
        tokens: how many tokens the *whole* batch has, over all microbatches and ranks: a number, or ``[*B]``.
    """

    tokens: float | Tensor

    def __call__(self, draws: Draws) -> Tensor:
        """Weight of each sequence, ``[N, *B, 1]``."""
        tokens = self.tokens
        if isinstance(tokens, Tensor) and tokens.ndim:
            if tokens.shape != (problems := draws.log_prob.shape[1:-1]):
                raise ShapeError(
                    f"tokens has shape {tuple(tokens.shape)}, but these draws are of problems [*B] = "
                    f"{tuple(problems)}: give one count per problem, or one number, such as draws.mask.sum()."
                )
            for number in tokens.flatten().tolist():
                positive("tokens", number, 1)
            return (1.0 / tokens.to(_length(draws))).unsqueeze(-1).expand_as(_length(draws))
        return torch.full_like(_length(draws), 1.0 / positive("tokens", tokens, 1))

    def bias(self) -> Bias:
        """The number of tokens depends on the decisions."""
        return Bias(None, ("the sum is divided by the number of tokens drawn, which the tokens decide: of order 1/N",))


Reduction = TokenSum | SequenceMean | TokenMean


def positive(name: str, number: float | Tensor | None, default: int) -> float:
    """The number, or its default, refused unless it is positive and finite."""
    number = default if number is None else number
    if not hasattr(number, "__float__") or not 0.0 < number < float("inf"):
        raise ScorefnError(
            f"{name} must be a positive number, but it is {number!r}: it is the constant of the whole batch that every "
            "part of it is divided by."
        )
    return float(number)


def _length(draws: Draws) -> Tensor:
    """Tokens of each sequence, at least 1, ``[N, *B, 1]``."""
    return present_decisions(draws).sum(-1, keepdim=True).clamp(min=1).to(wide(draws.fx).dtype)
