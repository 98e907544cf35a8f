"""Rollouts: N streams, each to its first end."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from scorefn.core import PyTree, check_count
from scorefn.trajectories.behaviour import Recorded
from scorefn.trajectories.interaction import Interaction, Record
from scorefn.trajectories.record import Trajectories
from scorefn.trajectories.spaces import Environment, VectorEnvironment, check_policy, vectorised


def rollout(env: Environment, policy: nn.Module, num_samples: int, *, max_steps: int | None = None) -> Trajectories:
    """``num_samples`` whole episodes of env under policy.

    Each stream is followed to its *first* end, terminated or truncated, and what comes after is masked. Which episodes
    are kept is decided by the index of the stream, never by who finishes first: the first ``num_samples`` to finish
    would be the short ones. Where N exceeds ``env.num_envs`` there are several rounds, and the last streams of the last
    round are left out.

    Every round resets the environment with a seed from torch's global generator, and policies sample from torch's
    generators, so ``torch.manual_seed`` reproduces everything (but EnvPool, whose seed is an argument of
    ``envpool.make``). Observations reach the policy on the device and in the dtype of its parameters (integers keep
    theirs, but uint16, uint32 and uint64, which torch does not compute with, become signed ones that hold them), as a
    dict or tuple of tensors where the space is one. Actions reach the environment as they were sampled,
    or as ``policy.executed`` makes them: what is recorded and scored stays what was sampled.

    Args:
        env: any Gymnasium environment; each autoreset mode gives the same record. A single one is one stream.
        policy: a module, observations ``[num_envs, *obs]`` to a distribution of batch shape ``[num_envs]`` over
            actions; its method ``act(observations)``, where it has one, draws from the same distribution faster, and
            ``executed(actions)`` is what the environment is given (clipped, squashed). With ``initial_state`` it is
            recurrent: ``(observations, state)`` to ``(distribution, state)``, and ``act`` to ``(actions, state)``.
        num_samples: N, at least 1.
        max_steps: an episode that is not over after so many steps counts as truncated; None: it is awaited, for ever
            where the environment does not end it.

    Raises:
        ScorefnError: env is no environment, or policy is no module that returns a distribution over env's actions; an
            action, as it was sampled or as ``executed`` made it, is not in the action space (in any step; the
            environment is not given it). Actions of a density may leave a Box of floats.
        ShapeError: the distribution's shape fits neither the streams nor the action space, or rewards, flags or
            observations have not one entry per stream.
        NonFiniteError: a reward, an observation or an action is NaN or infinite, with stream and step named. An error
            that ``env.step`` or ``env.reset`` raises is raised as it is, with a note that names the step, and the
            stream where it is known.

    Example:
        >>> import gymnasium, torch
        >>> from torch import nn
        >>> from scorefn.trajectories import CategoricalPolicy, rollout
        >>> env = gymnasium.make_vec("CartPole-v1", num_envs=2)
        >>> policy = CategoricalPolicy(nn.Linear(4, 2))
        >>> _ = torch.manual_seed(0)
        >>> # two rounds of two streams, one of them left out
        >>> seen = rollout(env, policy, num_samples=3, max_steps=10)
        >>> seen.rewards.shape[0], bool((seen.done.sum(1) == 1).all())
        (3, True)
        >>> _ = torch.manual_seed(0)
        >>> again = rollout(env, policy, num_samples=3, max_steps=10)
        >>> torch.equal(again.observations, seen.observations)
        True
    """
    return joined(record_episodes(vectorised(env), policy, num_samples, max_steps, Recorded.NOTHING))


def record_episodes(
    env: VectorEnvironment, policy: nn.Module, num_samples: int, max_steps: int | None, behaviour: Recorded
) -> list[Record]:
    """``num_samples`` whole episodes in rounds of up to ``env.num_envs``."""
    check_policy(policy)
    num_samples = check_count("num_samples", num_samples)
    max_steps = None if max_steps is None else check_count("max_steps", max_steps)
    interaction, rounds = Interaction(env, policy), []
    for first in range(0, num_samples, env.num_envs):
        interaction.begin()
        rounds.append(interaction.run(max_steps, min(env.num_envs, num_samples - first), behaviour))
    return rounds


def joined(rounds: list[Record]) -> Trajectories:
    """One round after the other, the shorter ones padded with absent steps."""
    parts = [part.trajectories for part in rounds]
    if len(parts) == 1:
        return parts[0]
    length = max(part.mask.shape[1] for part in parts)

    def padded(tensor: Tensor) -> Tensor:
        count, steps, *rest = tensor.shape
        return torch.cat([tensor, tensor.new_zeros(count, length - steps, *rest)], 1)

    def together(*leaves: PyTree) -> PyTree:
        return torch.cat([padded(leaf) for leaf in leaves])

    states = [part.state for part in parts]
    steps: Trajectories = pytree.tree_map(together, *[part._replace(state=()) for part in parts])
    state = None if states[0] is None else pytree.tree_map(lambda *leaves: torch.cat(leaves), *states)
    return steps._replace(state=state)
