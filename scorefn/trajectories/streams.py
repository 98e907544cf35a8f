"""Streams that go on: segments of fixed length, in which episodes end and begin."""

from __future__ import annotations

from torch import nn

from scorefn.core import check_count
from scorefn.core.representation import called
from scorefn.trajectories.behaviour import Recorded
from scorefn.trajectories.interaction import Interaction, Record
from scorefn.trajectories.record import Trajectories
from scorefn.trajectories.spaces import Environment, check_policy, vectorised


class Streams:
    """The streams of an environment under a policy, which go on from one segment to the next.

    A segment is ``Trajectories`` of shape ``[N, T]``, T rows of each of N streams; at the end of an episode the next
    one begins in the same segment. Rows that an environment of autoreset mode NEXT_STEP uses up for a reset are masked,
    so that it has fewer steps in as many rows. The observations, recurrent states and unfinished episodes at the end of
    a segment are where the next one goes on: the segments put together are one long segment.

    The environment belongs to the streams: whoever else steps it (a rollout, to evaluate) must call ``reset()``
    afterwards. What it holds cannot be saved, so that a run resumed from a checkpoint begins with fresh episodes. After
    an error or Ctrl-C within a segment nothing of it is kept, and the next one begins with fresh episodes.

    Args:
        env: any Gymnasium environment, see ``rollout``; a single one is one stream.
        policy: a module that maps observations to a distribution over actions, see ``rollout``.

    Raises:
        ScorefnError: env is no environment whose spaces can be recorded, or policy is not a module.

    Example:
        >>> import gymnasium
        >>> from torch import nn
        >>> from scorefn.trajectories import CategoricalPolicy, Streams
        >>> env = gymnasium.make_vec("CartPole-v1", num_envs=2)
        >>> streams = Streams(env, CategoricalPolicy(nn.Linear(4, 2)))
        >>> first, second = streams.segment(3), streams.segment(3)
        >>> # the second goes on where the first ended
        >>> first.starts[:, 0].tolist(), second.starts[:, 0].tolist()
        ([True, True], [False, False])
    """

    def __init__(self, env: Environment, policy: nn.Module) -> None:
        self.env = vectorised(env)
        check_policy(policy)
        self.policy = policy
        self._interaction = Interaction(self.env, policy)

    def __repr__(self) -> str:
        return called(self, self.env, self.policy)

    @property
    def num_envs(self) -> int:
        """N, how many streams there are."""
        return self.env.num_envs

    def reset(self) -> None:
        """Let the next segment begin with fresh episodes, seeded from torch's generator."""
        self._interaction.live = False

    def segment(self, steps: int) -> Trajectories:
        """The next ``steps`` rows of each stream, ``[num_envs, steps]``.

        Raises:
            ScorefnError: what ``rollout`` refuses.
        """
        return self.record(steps, Recorded.NOTHING).trajectories

    def record(self, steps: int, behaviour: Recorded) -> Record:
        """A segment, with the behaviour's log-probabilities of some steps."""
        steps = check_count("steps", steps)
        if not self._interaction.live:
            self._interaction.begin()
        return self._interaction.run(steps, behaviour=behaviour)
