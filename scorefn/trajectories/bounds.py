"""Bounded actions: what the environment is given in place of an unbounded one, and the density of that."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.distributions import Normal

from scorefn.core import ScorefnError, ShapeError
from scorefn.trajectories.listing import few


class Bounds(nn.Module):
    """Lower and upper ends ``[*act]`` of the actions that an environment takes; base of ``Clip`` and ``Tanh``."""

    low: Tensor
    high: Tensor

    def __init__(self, low: Any, high: Any) -> None:
        super().__init__()
        # a setting and nothing that is learned: it moves with the policy and stays out of its state_dict
        self.register_buffer("low", _floating(low), persistent=False)
        self.register_buffer("high", _floating(high), persistent=False)
        name = type(self).__name__
        if self.low.shape != self.high.shape:
            raise ShapeError(
                f"{name} has low of shape {tuple(self.low.shape)} and high of shape {tuple(self.high.shape)}, but both "
                "must have the shape of one action."
            )
        if bool((wrong := ~(self.low < self.high)).any()):
            raise ScorefnError(
                f"{name} needs low < high in every dimension, but low is {few(self.low[wrong])} and high is "
                f"{few(self.high[wrong])} in {int(wrong.sum())} of {wrong.numel()}."
            )

    @classmethod
    def from_space(cls, space: Any) -> Self:
        """The bounds of a ``gymnasium.spaces.Box``.

        Raises:
            ScorefnError: the space has no ``low`` and ``high``.
        """
        if not (hasattr(space, "low") and hasattr(space, "high")):
            raise ScorefnError(
                f"{space} has no low and high, and only actions from a Box are bounded: give env.single_action_space "
                "of an environment whose actions are continuous."
            )
        return cls(space.low, space.high)

    def extra_repr(self) -> str:
        """The ends, for print."""
        return f"low={self.low.tolist()}, high={self.high.tolist()}"


class Clip(Bounds):
    """Clipped actions: the environment is given ``min(max(u, low), high)`` where u was sampled.

    What is stored and scored stays u: the clipped action has not the density ``p(u)``, and the score of p taken at the
    clipped action has another mean than 0, so that policy gradients with it are biased. The clipped action's own
    distribution is mixed, a density between the ends and an atom at each of them; ``log_prob`` is that. Its score is
    the mean of the score of u given the clipped action, hence unbiased too, and of no larger variance (Fujita & Maeda,
    2018, "Clipped Action Policy Gradient", arXiv:1802.07564).

    Args:
        low: ``[*act]``, -inf where there is no end.
        high: ``[*act]``, inf where there is no end.

    Raises:
        ShapeError: low and high have different shapes.
        ScorefnError: low is not below high.

    Example:
        >>> import torch
        >>> from scorefn.trajectories import Clip
        >>> Clip([-1.0, 0.0], [1.0, torch.inf])(torch.tensor([[-3.0, 2.0], [0.5, -1.0]]))
        tensor([[-1.0000,  2.0000],
                [ 0.5000,  0.0000]])
    """

    def forward(self, actions: Tensor) -> Tensor:
        """``[*batch, *act] -> [*batch, *act]``."""
        check_actions(self, actions)
        return actions.clamp(self.low, self.high)

    def log_prob(self, normal: Normal, actions: Tensor) -> Tensor:
        """Log-density of the clipped action, or log-probability of the end, ``[*batch]``; actions are before clipping.

        ``log N(u)`` between the ends, ``log Phi((low - mean) / scale)`` at or below the lower, and
        ``log Phi((mean - high) / scale)`` at or above the upper, summed over the dimensions of the action.
        """
        check_actions(self, actions)
        below, above = actions <= self.low, actions >= self.high
        outside = below | above
        # the argument is set to 0 wherever it is not used: an infinite end would make the gradient 0 * inf
        to_low, to_high = self.low.to(normal.loc.dtype) - normal.loc, normal.loc - self.high.to(normal.loc.dtype)
        deviation = torch.where(below, to_low, torch.where(above, to_high, torch.zeros_like(to_low))) / normal.scale
        tail: Tensor = torch.special.log_ndtr(deviation)
        inside = normal.log_prob(torch.where(outside, normal.loc, actions))
        return _summed(torch.where(outside, tail, inside), self.low.ndim)


class Tanh(Bounds):
    """Squashed actions: the environment is given ``a(u) = (low + high) / 2 + (high - low) / 2 * tanh(u)``.

    The density of a is ``p(u) / |da/du|`` (Haarnoja et al., 2018, arXiv:1801.01290, appendix C). What is stored and
    scored is u: the Jacobian depends on no parameter, so that the scores of u and of a are one, and u, unlike a, is not
    rounded to the ends. Entropies and KL divergences in terms of a do need it: ``log_prob``.

    Args:
        low: ``[*act]``, finite.
        high: ``[*act]``, finite.

    Raises:
        ShapeError: low and high have different shapes.
        ScorefnError: an end is infinite, or low is not below high.

    Example:
        >>> import torch
        >>> from scorefn.trajectories import Tanh
        >>> Tanh([-2.0], [2.0])(torch.tensor([[0.0], [1.0], [100.0]])).squeeze(-1)
        tensor([0.0000, 1.5232, 2.0000])
    """

    radius: Tensor
    centre: Tensor

    def __init__(self, low: Any, high: Any) -> None:
        super().__init__(low, high)
        if bool((wrong := ~torch.isfinite(self.high - self.low)).any()):
            raise ScorefnError(
                f"Tanh squashes actions between two finite ends, but low is {few(self.low[wrong])} and high is "
                f"{few(self.high[wrong])} in {int(wrong.sum())} of {wrong.numel()} dimensions: use Clip, which leaves "
                "an infinite end alone, or no bounds."
            )
        self.register_buffer("radius", (self.high - self.low) / 2, persistent=False)
        self.register_buffer("centre", self.low + self.radius, persistent=False)

    def forward(self, actions: Tensor) -> Tensor:
        """``[*batch, *act] -> [*batch, *act]``, never beyond the ends, whatever is rounded."""
        check_actions(self, actions)
        return (self.centre + self.radius * actions.tanh()).clamp(self.low, self.high)

    def log_abs_det(self, actions: Tensor) -> Tensor:
        """``log |det da/du| = sum log((high - low) / 2) + log(1 - tanh(u)^2)``, ``[*batch]``; safe for large ``|u|``.

        ``1 - tanh(u)^2 = 4 exp(-2 |u|) / (1 + exp(-2 |u|))^2``, which neither underflows nor cancels in its logarithm.
        """
        check_actions(self, actions)
        size = actions.abs()
        width = (4 * self.radius).log().to(actions.dtype)
        return _summed(width - 2 * (size + (-2 * size).exp().log1p()), self.low.ndim)

    def log_prob(self, normal: Normal, actions: Tensor) -> Tensor:
        """Log-density of the squashed action, ``[*batch]``; actions are before squashing."""
        return _summed(normal.log_prob(actions), self.low.ndim) - self.log_abs_det(actions)


def check_actions(bounds: Bounds, actions: Tensor) -> None:
    """Refuse actions that do not end with the shape of the bounds."""
    ndim = bounds.low.ndim
    if actions.ndim < ndim or actions.shape[actions.ndim - ndim :] != bounds.low.shape:
        raise ShapeError(
            f"The actions have shape {tuple(actions.shape)}, but {type(bounds).__name__} has ends of shape "
            f"{tuple(bounds.low.shape)}, which must be the shape of one action."
        )


def _summed(tensor: Tensor, ndim: int) -> Tensor:
    return tensor.sum(tuple(range(-ndim, 0))) if ndim else tensor  # sum(()) would sum over everything


def _floating(ends: Any) -> Tensor:
    tensor = ends.detach().clone() if isinstance(ends, Tensor) else torch.tensor(ends)
    return tensor if tensor.is_floating_point() else tensor.to(torch.get_default_dtype())
