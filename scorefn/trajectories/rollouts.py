"""Rollouts: N streams, each to its first end."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from torch import Tensor, nn

from scorefn.core import ScorefnError, ShapeError, check_count
from scorefn.trajectories.record import Trajectories
from scorefn.trajectories.spaces import (
    action_distribution,
    check_distribution,
    check_environment,
    check_policy,
    reference,
)

Environment: TypeAlias = VectorEnv[Any, Any, Any]


def rollout(env: Environment, policy: nn.Module, num_samples: int, *, max_steps: int | None = None) -> Trajectories:
    """``num_samples`` whole episodes of env under policy.

    Each stream is followed to its *first* end, terminated or truncated, and what comes after is masked. Which episodes
    are kept is decided by the index of the stream, never by who finishes first: the first ``num_samples`` to finish
    would be the short ones. Where N exceeds ``env.num_envs`` there are several rounds, and the last streams of the last
    round are left out.

    Every round resets the environment with a seed from torch's global generator, and policies sample from torch's
    generators, so ``torch.manual_seed`` reproduces everything. Observations reach the policy on the device and in the
    dtype of its parameters (integers keep theirs). Actions reach the environment as they were sampled: to clip
    them, wrap the environment, so that what is scored stays what was sampled.

    Args:
        env: any Gymnasium vector environment; each autoreset mode gives the same record.
        policy: a module, observations ``[num_envs, *obs]`` to a distribution of batch shape ``[num_envs]`` over
            actions; its method ``act(observations)``, where it has one, draws from the same distribution faster.
        num_samples: N, at least 1.
        max_steps: an episode that is not over after so many steps counts as truncated; None: it is awaited.

    Raises:
        ScorefnError: env is not vectorised, or policy is no module that returns a distribution over env's actions.
        ShapeError: the distribution's shape fits neither the streams nor the action space.
    """
    check_environment(env)
    check_policy(policy)
    num_samples = check_count("num_samples", num_samples)
    max_steps = None if max_steps is None else check_count("max_steps", max_steps)
    rounds = [
        _round(env, policy, min(env.num_envs, num_samples - first), max_steps)
        for first in range(0, num_samples, env.num_envs)
    ]
    return rounds[0] if len(rounds) == 1 else _joined(rounds)


@torch.no_grad()
def _round(env: Environment, policy: nn.Module, count: int, max_steps: int | None) -> Trajectories:
    """The first ``count`` streams of env, each to its first end."""
    like = reference(policy)
    reset_by_hand = env.metadata.get("autoreset_mode") == AutoresetMode.DISABLED
    observation = np.array(env.reset(seed=int(torch.randint(2**31 - env.num_envs, ())))[0])
    check_distribution(action_distribution(policy, _tensor(observation, like)), env)
    act = getattr(policy, "act", None) or (lambda seen: action_distribution(policy, seen).sample())
    steps: list[tuple[Any, ...]] = []
    present = np.arange(env.num_envs) < count
    while present.any():
        action = act(_tensor(observation, like))
        array = _array(action, env)
        if not steps:
            _check_actions(array, env)
        following, reward, terminated, truncated, _ = env.step(array)
        if len(steps) + 1 == max_steps:
            truncated = truncated | ~terminated
        steps.append((observation, action, np.array(reward), np.array(terminated), np.array(truncated), present))
        done = terminated | truncated
        present = present & ~done
        if reset_by_hand and done.any() and present.any():
            following, _ = env.reset(options={"reset_mask": done})
        observation = np.array(following)  # a copy: the environment may write the next one into the same memory
    return _record(steps, count, like)


def _record(steps: list[tuple[Any, ...]], count: int, like: Tensor) -> Trajectories:
    """The columns of all steps as tensors ``[count, T, ...]``, zero where the episode is over."""
    observations, actions, rewards, terminated, truncated, mask = (
        _stacked(column, count).to(like.device) for column in zip(*steps, strict=True)
    )

    def where_present(tensor: Tensor) -> Tensor:
        return torch.where(mask.reshape(*mask.shape, *[1] * (tensor.ndim - 2)), tensor, tensor.new_zeros(()))

    return Trajectories(
        where_present(_cast(observations, like)),
        where_present(actions),
        where_present(rewards.to(like.dtype)),
        where_present(terminated),
        where_present(truncated),
        mask,
    )


def _stacked(column: tuple[Any, ...], count: int) -> Tensor:
    rows = [row[:count] for row in column]
    return torch.stack(rows, 1) if isinstance(rows[0], Tensor) else torch.from_numpy(np.stack(rows, 1))


def _tensor(observation: Any, like: Tensor) -> Tensor:
    return _cast(torch.from_numpy(observation), like)


def _cast(observations: Tensor, like: Tensor) -> Tensor:
    """To the policy's device, and to its dtype unless they are integers."""
    return observations.to(like) if observations.is_floating_point() else observations.to(like.device)


def _array(action: Tensor, env: Environment) -> Any:
    """The actions as Gymnasium takes them: an array of the dtype of the action space."""
    return action.cpu().numpy().astype(env.action_space.dtype, copy=False)


def _check_actions(actions: Any, env: Environment) -> None:
    """Refuse actions that the space does not have; those of a density may leave a Box, whose wrappers clip them."""
    if actions.shape != env.action_space.shape:
        raise ShapeError(
            f"The policy acted with shape {actions.shape}, but {env.num_envs} streams with actions from "
            f"{env.single_action_space} need {env.action_space.shape}: return one action per stream."
        )
    if not isinstance(env.single_action_space, spaces.Box) and not env.action_space.contains(actions):
        raise ScorefnError(
            f"The policy chose the actions {actions.tolist()}, which are not all in {env.single_action_space}: the "
            "support of its distribution must be the action space, as that of Categorical is."
        )


def _joined(rounds: list[Trajectories]) -> Trajectories:
    """One round after the other, the shorter ones padded with absent steps."""
    length = max(part.mask.shape[1] for part in rounds)

    def padded(tensor: Tensor) -> Tensor:
        count, steps, *rest = tensor.shape
        return torch.cat([tensor, tensor.new_zeros(count, length - steps, *rest)], 1)

    return Trajectories(*(torch.cat([padded(tensor) for tensor in column]) for column in zip(*rounds, strict=True)))
