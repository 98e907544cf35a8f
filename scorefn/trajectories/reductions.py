"""Reductions: how tokens and sequences are added into one objective, and what that does to the gradient."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from scorefn.core import Draws, ScorefnError, ShapeError
from scorefn.core.representation import representation
from scorefn.trajectories.bias import Bias
from scorefn.trajectories.group_advantages import present_decisions, wide


@dataclass(frozen=True)
class TokenSum:
    """Tokens are summed, sequences divided by a constant: the reduction that keeps the gradient.

    Called with draws of N sequences it returns the weight of each, ``w_i = 1/denominator``, ``[N, *B, 1]``. Source: Liu
    et al. (2025), "Understanding R1-Zero-like training", section 3.2, for the constant in place of lengths.

    Args:
        denominator: the number of sequences of the whole batch (times a constant length, for Dr.GRPO); None: those of
            the draws.

    Raises:
        ScorefnError: when called, a denominator that is not a positive number.

    Example:
        >>> import torch
        >>> from scorefn.trajectories import TokenSum, sequence_draws
        >>> logp = torch.zeros(2, 4, requires_grad=True)
        >>> mask = torch.tensor([[1, 0, 0, 0], [1, 1, 1, 1]]).bool()
        >>> # 1/N, whatever the length
        >>> TokenSum()(sequence_draws(logp, [1.0, 0.0], mask=mask))[:, 0].tolist()
        [0.5, 0.5]
    """

    denominator: float | None = None

    __repr__ = representation

    def __call__(self, draws: Draws) -> Tensor:
        """Weight of each sequence, ``[N, *B, 1]``."""
        return torch.full_like(_length(draws), 1.0 / positive("denominator", self.denominator, len(draws)))

    def bias(self) -> Bias:
        """None."""
        return Bias()


@dataclass(frozen=True)
class SequenceMean:
    """Tokens are averaged within each sequence, ``w_i = 1/(denominator T_i)``: short sequences weigh more.

    T_i counts the present tokens. Called with draws of N sequences it returns the weight of each, ``[N, *B, 1]``.
    Source: Shao et al. (2024), "DeepSeekMath", eq. 3.

    Args:
        denominator: the number of sequences of the whole batch; None: those of the draws.

    Raises:
        ScorefnError: when called, a denominator that is not a positive number.

    Example:
        >>> import torch
        >>> from scorefn.trajectories import SequenceMean, sequence_draws
        >>> logp = torch.zeros(2, 4, requires_grad=True)
        >>> mask = torch.tensor([[1, 0, 0, 0], [1, 1, 1, 1]]).bool()
        >>> SequenceMean()(sequence_draws(logp, [1.0, 0.0], mask=mask))[:, 0].tolist()  # 1/(N T_i)
        [0.5, 0.125]
    """

    denominator: float | None = None

    __repr__ = representation

    def __call__(self, draws: Draws) -> Tensor:
        """Weight of each sequence, ``[N, *B, 1]``."""
        return 1.0 / (_length(draws) * positive("denominator", self.denominator, len(draws)))

    def bias(self) -> Bias:
        """The length depends on the decisions."""
        return Bias(None, ("each sequence is divided by its own length, which its tokens decide",))


@dataclass(frozen=True)
class TokenMean:
    """Tokens are summed and divided by their number, ``w_i = 1/tokens``: every token weighs the same.

    Called with draws of N sequences it returns the weight of each, ``[N, *B, 1]``. Source: Yu et al. (2025), "DAPO",
    eq. 8.

    Args:
        tokens: how many tokens the *whole* batch has, over all microbatches and ranks: a number, or ``[*B]``.

    Raises:
        ScorefnError: when called, a number of tokens that is not positive.
        ShapeError: when called, tokens of another shape than ``[*B]``.

    Example:
        >>> import torch
        >>> from scorefn.trajectories import TokenMean, sequence_draws
        >>> logp = torch.zeros(2, 4, requires_grad=True)
        >>> mask = torch.tensor([[1, 0, 0, 0], [1, 1, 1, 0]]).bool()
        >>> TokenMean(tokens=4)(sequence_draws(logp, [1.0, 0.0], mask=mask))[:, 0].tolist()
        [0.25, 0.25]
    """

    tokens: float | Tensor

    __repr__ = representation

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
