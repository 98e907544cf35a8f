"""Whether an environment, its spaces and a policy belong together; what does not is refused before the first step."""

from __future__ import annotations

from typing import Any

import torch
from gymnasium import spaces
from gymnasium.vector import VectorEnv
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, Independent

from scorefn.core import ScorefnError, ShapeError

_TENSORS = (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)


def check_environment(env: Any) -> None:
    """Raise ScorefnError unless env is a vector environment whose observations and actions are single arrays."""
    if not isinstance(env, VectorEnv):
        raise ScorefnError(
            f"{type(env).__name__} is not a gymnasium.vector.VectorEnv, and episodes are drawn in parallel streams: "
            'use gymnasium.make_vec("...", num_envs=16), or gymnasium.vector.SyncVectorEnv([make_env] * 16).'
        )
    for noun, space in (("observation", env.single_observation_space), ("action", env.single_action_space)):
        if not isinstance(space, _TENSORS):
            raise ScorefnError(
                f"The {noun} space is {space}, but each {noun} must be one array (Box, Discrete, MultiDiscrete or "
                "MultiBinary), to be recorded as one tensor: flatten it with a wrapper of the environment."
            )
    if isinstance(env.single_action_space, spaces.Discrete) and env.single_action_space.start != 0:
        raise ScorefnError(
            f"The action space {env.single_action_space} does not start at 0, but a policy numbers its actions from 0: "
            "shift it with gymnasium.wrappers.TransformAction."
        )


def check_policy(policy: Any) -> None:
    """Raise ScorefnError unless policy is a module: its parameters say which dtype and device observations need."""
    if not isinstance(policy, nn.Module):
        raise ScorefnError(
            f"{type(policy).__name__} is not a torch.nn.Module: a policy is a module that maps observations "
            "[N, *obs] to a torch.distributions.Distribution, such as CategoricalPolicy(network)."
        )


def action_distribution(policy: nn.Module, observations: Tensor) -> Distribution:
    """``policy(observations)``, refused where it is no Distribution; an error inside the policy names the shape."""
    try:
        distribution = policy(observations)
    except Exception as error:
        error.add_note(f"scorefn called the policy with observations of shape {tuple(observations.shape)}.")
        raise
    if not isinstance(distribution, Distribution):
        raise ScorefnError(
            f"{type(policy).__name__} returned {type(distribution).__name__}, but its actions must be sampled and "
            "scored: return a torch.distributions.Distribution, or wrap a network of logits in CategoricalPolicy."
        )
    return distribution


def check_distribution(distribution: Distribution, env: VectorEnv[Any, Any, Any]) -> None:
    """Raise where samples of the policy's distribution are no actions of env."""
    space = env.single_action_space
    name = type(distribution).__name__
    batch, event, wanted = tuple(distribution.batch_shape), tuple(distribution.event_shape), tuple(space.shape or ())
    if batch != (env.num_envs,) or event != wanted:
        raise ShapeError(
            f"The policy returned {name} of batch shape {batch} and event shape {event}, but {env.num_envs} streams "
            f"with actions from {space} need batch shape {(env.num_envs,)} and event shape {wanted}, for "
            "one log-probability per action: declare action dimensions with "
            "torch.distributions.Independent(distribution, 1)."
        )
    discrete = _is_discrete(distribution)
    if discrete is not None and discrete == isinstance(space, spaces.Box):
        raise ScorefnError(
            f"The policy returned {name}, which is {'discrete' if discrete else 'continuous'}, but the action space is "
            f"{space}: use {'a density such as Normal' if discrete else 'Categorical'}, or another environment."
        )
    categories = _categories(distribution)
    counts = _action_counts(space)
    if categories is not None and counts is not None and {categories} != counts:
        raise ScorefnError(
            f"The policy chooses among {categories} actions, but the action space is {space}: let its network return "
            f"{' or '.join(map(str, sorted(counts)))} logits."
        )


def reference(policy: nn.Module) -> Tensor:
    """An empty tensor of the dtype and on the device of the policy: those of its first floating parameter."""
    for parameter in policy.parameters():
        if parameter.is_floating_point():
            return parameter.detach().new_empty(0)
    return torch.empty(0)


def _is_discrete(distribution: Distribution) -> bool | None:
    try:
        support: Any = distribution.support
        return bool(support.is_discrete)
    except (NotImplementedError, AttributeError):  # nothing declared, nothing to judge
        return None


def _categories(distribution: Distribution) -> int | None:
    while isinstance(distribution, Independent):
        distribution = distribution.base_dist
    return int(distribution.logits.shape[-1]) if isinstance(distribution, Categorical) else None


def _action_counts(space: spaces.Space[Any]) -> set[int] | None:
    if isinstance(space, spaces.Discrete):
        return {int(space.n)}
    if isinstance(space, spaces.MultiDiscrete):
        return {int(n) for n in space.nvec.flatten()}
    return {2} if isinstance(space, spaces.MultiBinary) else None
