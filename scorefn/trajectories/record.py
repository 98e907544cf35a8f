"""What was seen of N streams."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from scorefn.core import PyTree, ScorefnError
from scorefn.core.representation import representation


class Trajectories(NamedTuple):
    """N streams of up to T steps: whole episodes, or segments in which episodes end and begin; a pytree.

    Zero (False) wherever ``mask`` is False. Observations are one tensor, or a dict or tuple of tensors for spaces of
    those kinds.

    Args:
        observations: ``[N, T, *obs]``, what each action was chosen from.
        actions: ``[N, T, *act]``, as they were sampled, before any clipping or squashing.
        rewards: ``[N, T]``, what followed each action.
        terminated: ``[N, T]`` bool, the step after which the task was over.
        truncated: ``[N, T]`` bool, the step after which the episode was no longer watched; both may be True.
        mask: ``[N, T]`` bool, False where there is no step: after the end of a whole episode, and in the row that
            environments of autoreset mode NEXT_STEP use up for a reset.
        next_observations: ``[N, T, *obs]``, what each step led to, before any reset: the true final observation at the
            end of an episode.
        starts: ``[N, T]`` bool, the first step of an episode. A segment's first column is one only where the episode
            began there.
        state: the recurrent state before the first column, a pytree with leading N; None for policies without one.

    Example:
        >>> import gymnasium, torch
        >>> from scorefn.trajectories import CategoricalPolicy, rollout
        >>> policy = CategoricalPolicy(torch.nn.Linear(4, 2))
        >>> seen = rollout(gymnasium.make("CartPole-v1"), policy, 2, max_steps=3)
        >>> seen.observations.shape, seen.actions.shape, seen.rewards.tolist()
        (torch.Size([2, 3, 4]), torch.Size([2, 3]), [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]])
        >>> # no longer watched, but not over
        >>> seen.terminated[0].tolist(), seen.truncated[0].tolist()
        ([False, False, False], [False, False, True])
    """

    observations: PyTree
    actions: Tensor
    rewards: Tensor
    terminated: Tensor
    truncated: Tensor
    mask: Tensor
    next_observations: PyTree
    starts: Tensor
    state: PyTree = None

    def __repr__(self) -> str:
        return representation(self)

    @property
    def done(self) -> Tensor:
        """The last step of an episode, for whichever reason, ``[N, T]`` bool."""
        return self.terminated | self.truncated


def rewards(trajectories: Trajectories) -> Tensor:
    """The reward of each step, ``[N, T]``: the usual f, charged as reward-to-go.

    For one value of the whole episode, charged to all of its actions, use ``returns``.

    Example:
        >>> import gymnasium, torch
        >>> from scorefn.trajectories import CategoricalPolicy, TrajectoryDistribution, rewards
        >>> policy = CategoricalPolicy(torch.nn.Linear(4, 2))
        >>> p = TrajectoryDistribution(gymnasium.make("CartPole-v1"), policy, max_steps=3)
        >>> draws = p.draws(rewards, num_samples=2)
        >>> draws.signal().tolist()  # what each action is charged with
        [[3.0, 2.0, 1.0], [3.0, 2.0, 1.0]]
    """
    return trajectories.rewards


def returns(trajectories: Trajectories) -> Tensor:
    """The return of each whole episode, ``[N]``: an f of one value an episode, charged to all of its actions.

    Segments are no whole episodes: what their last ones would still have earned is not known. Use ``rewards`` there,
    or add what a value function expects of the rest.

    Raises:
        ScorefnError: a stream is not exactly one episode, from its first step to its end.

    Example:
        >>> import gymnasium, torch
        >>> from scorefn.trajectories import CategoricalPolicy, TrajectoryDistribution, returns
        >>> policy = CategoricalPolicy(torch.nn.Linear(4, 2))
        >>> p = TrajectoryDistribution(gymnasium.make("CartPole-v1"), policy, max_steps=3)
        >>> draws = p.draws(returns, num_samples=2)
        >>> draws.fx.tolist(), draws.log_prob.shape  # one value, charged to all three actions
        ([[3.0], [3.0]], torch.Size([2, 3]))
    """
    check_whole(trajectories)
    return trajectories.rewards.sum(-1)


def check_whole(trajectories: Trajectories) -> None:
    """Raise ScorefnError, with stream and step named, unless each stream is one episode from its start to its end."""
    mask, done, starts = trajectories.mask, trajectories.done, trajectories.starts
    last = mask.long().cumsum(-1).argmax(-1, keepdim=True)  # where the count of present steps is first complete
    for fault, wrong in (
        ("is in the middle of an episode at step 0", ~starts[:, :1]),
        ("has not ended its episode after step {step}, the last one that was seen", ~done.gather(-1, last)),
        ("begins another episode within the record", starts[:, 1:].any(-1, keepdim=True)),
    ):
        if bool(wrong.any()):
            stream = int(wrong.nonzero()[0, 0])
            raise ScorefnError(
                f"Stream {stream} of {len(mask)} {fault.format(step=int(last[stream]))}, but whole episodes were asked "
                "for: the return of an unfinished episode is not known, and one return for several episodes would be "
                "charged to actions that have no part in it. Draw whole episodes from TrajectoryDistribution, or use "
                "the rewards of each step."
            )
