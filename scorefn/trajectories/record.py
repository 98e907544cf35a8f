"""What was seen of N episodes."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Trajectories(NamedTuple):
    """N whole episodes of up to T steps; a pytree, zero (False) wherever ``mask`` is False.

    Args:
        observations: ``[N, T, *obs]``, what each action was chosen from.
        actions: ``[N, T, *act]``, as they were sampled, before any clipping by the environment.
        rewards: ``[N, T]``, what followed each action.
        terminated: ``[N, T]`` bool, the step after which the task was over.
        truncated: ``[N, T]`` bool, the step after which the episode was no longer watched; both may be True.
        mask: ``[N, T]`` bool, False after the end of an episode.
    """

    observations: Tensor
    actions: Tensor
    rewards: Tensor
    terminated: Tensor
    truncated: Tensor
    mask: Tensor


def rewards(trajectories: Trajectories) -> Tensor:
    """The reward of each step, ``[N, T]``: the usual f, charged as reward-to-go.

    For the return as one value of the whole episode, use ``lambda tau: rewards(tau).sum(-1)``, ``[N]``.
    """
    return trajectories.rewards
