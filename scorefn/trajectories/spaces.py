"""Whether an environment, its spaces and a policy belong together; what does not is refused before the first step."""

from __future__ import annotations

from typing import Any, TypeAlias

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, Independent

from scorefn.core import PyTree, ScorefnError, ShapeError

VectorEnvironment: TypeAlias = VectorEnv[Any, Any, Any]
Environment: TypeAlias = VectorEnvironment | gymnasium.Env[Any, Any]

_TENSORS = (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)


def vectorised(env: Any) -> VectorEnvironment:
    """env as a vector environment, a single one as one stream of it.

    Raises:
        ScorefnError: env is no environment, its spaces cannot be recorded as tensors, or it does not say how it resets.
    """
    if isinstance(env, gymnasium.Env) and not isinstance(env, VectorEnv):
        single = env
        env = SyncVectorEnv([lambda: single], autoreset_mode=AutoresetMode.SAME_STEP)
    if not isinstance(env, VectorEnv):
        raise ScorefnError(
            f"{type(env).__name__} is neither a gymnasium.vector.VectorEnv nor a gymnasium.Env, and episodes are drawn "
            'in parallel streams: use gymnasium.make_vec("...", num_envs=16), or '
            "gymnasium.vector.SyncVectorEnv([make_env] * 16)."
        )
    _check_observations(env.single_observation_space, env.single_observation_space)
    _check_actions(env.single_action_space)
    autoreset_mode(env)
    return env


def autoreset_mode(env: VectorEnvironment) -> AutoresetMode:
    """What env does after the end of an episode.

    Raises:
        ScorefnError: ``env.metadata`` does not say.
    """
    declared = (env.metadata or {}).get("autoreset_mode")
    try:
        return AutoresetMode(declared)
    except ValueError as error:
        raise ScorefnError(
            f"{type(env).__name__}.metadata['autoreset_mode'] is {declared!r}, but it decides which row of a stream is "
            "the last of an episode, which the first of the next, and which neither: set it to the member of "
            "gymnasium.vector.AutoresetMode that the environment follows."
        ) from error


def is_envpool(env: VectorEnvironment) -> bool:
    """Whether env fixed its seeds when it was made, as EnvPool does, and warns of others."""
    return any(kind.__module__.startswith("envpool.") for kind in type(env.unwrapped).__mro__)


def _check_observations(space: spaces.Space[Any], whole: spaces.Space[Any]) -> None:
    if isinstance(space, spaces.Dict | spaces.Tuple):
        for part in _parts(space):
            _check_observations(part, whole)
    elif not isinstance(space, _TENSORS):
        raise ScorefnError(
            f"The observation space is {whole}, but observations are recorded as tensors, and {type(space).__name__} "
            "has none: use Box, Discrete, MultiDiscrete, MultiBinary, or a Dict or Tuple of them, by a wrapper of the "
            "environment."
        )


def _check_actions(space: spaces.Space[Any]) -> None:
    if not isinstance(space, _TENSORS):
        raise ScorefnError(
            f"The action space is {space}, but each action must be one array (Box, Discrete, MultiDiscrete or "
            "MultiBinary), to be recorded as one tensor: flatten it with a wrapper of the environment."
        )
    if isinstance(space, spaces.Discrete | spaces.MultiDiscrete) and np.any(space.start):
        raise ScorefnError(
            f"The action space {space} does not start at 0, but a policy numbers its actions from 0: shift it with "
            "gymnasium.wrappers.TransformAction."
        )


def _parts(space: spaces.Dict | spaces.Tuple[Any]) -> list[spaces.Space[Any]]:
    return list(space.spaces.values() if isinstance(space, spaces.Dict) else space.spaces)


def leaf_spaces(space: spaces.Space[Any]) -> list[spaces.Space[Any]]:
    """The spaces of single arrays that space is made of."""
    if isinstance(space, spaces.Dict | spaces.Tuple):
        return [leaf for part in _parts(space) for leaf in leaf_spaces(part)]
    return [space]


def leaves(space: spaces.Space[Any], observation: Any) -> list[Any]:
    """The arrays of an observation, in the order of ``leaf_spaces``."""
    if isinstance(space, spaces.Dict):
        return [leaf for key, part in space.spaces.items() for leaf in leaves(part, observation[key])]
    if isinstance(space, spaces.Tuple):
        return [leaf for part, inner in zip(space.spaces, observation, strict=True) for leaf in leaves(part, inner)]
    return [observation]


def observation_tree(space: spaces.Space[Any], tensors: list[Tensor]) -> PyTree:
    """The inverse of ``leaves``: dicts and tuples as the space has them."""

    def build(part: spaces.Space[Any]) -> PyTree:
        if isinstance(part, spaces.Dict):
            return {key: build(inner) for key, inner in part.spaces.items()}
        if isinstance(part, spaces.Tuple):
            return tuple(build(inner) for inner in part.spaces)
        return next(rest)

    rest = iter(tensors)
    return build(space)


def check_policy(policy: Any) -> None:
    """Raise ScorefnError unless policy is a module: its parameters say which dtype and device observations need."""
    if not isinstance(policy, nn.Module):
        raise ScorefnError(
            f"{type(policy).__name__} is not a torch.nn.Module: a policy is a module that maps observations "
            "[N, *obs] to a torch.distributions.Distribution, such as CategoricalPolicy(network)."
        )


def is_recurrent(policy: nn.Module) -> bool:
    """Whether policy carries a state from step to step."""
    return callable(getattr(policy, "initial_state", None))


def action_distribution(policy: nn.Module, observations: PyTree) -> Distribution:
    """``policy(observations)``, refused where it is no Distribution; an error inside the policy names the shape."""
    return _distribution(policy, _called(policy, policy, observations))


def recurrent_step(policy: nn.Module, observations: PyTree, state: PyTree) -> tuple[Distribution, PyTree]:
    """``policy(observations, state)``: the distribution of one step's actions, and the next state."""
    answer = _called(policy, policy, observations, state)
    if not isinstance(answer, tuple) or len(answer) != 2:
        raise ScorefnError(
            f"{type(policy).__name__} has initial_state, so it is recurrent, but it returned {type(answer).__name__}: "
            "return (distribution, new state), or remove initial_state."
        )
    return _distribution(policy, answer[0]), answer[1]


def unrolled_distribution(policy: nn.Module, observations: PyTree, starts: Tensor, state: PyTree) -> Distribution:
    """``policy.unrolled(observations, starts, state)``: a recurrent policy's distribution in all steps ``[N, T]``."""
    unrolled = getattr(policy, "unrolled", None)
    if unrolled is None:
        raise ScorefnError(
            f"{type(policy).__name__} has initial_state, so it is recurrent, but it has no method unrolled("
            "observations [N, T, *obs], starts [N, T], state) -> Distribution of batch shape [N, T], which scores."
        )
    return _distribution(policy, _called(policy, unrolled, observations, starts, state))


def _called(policy: nn.Module, function: Any, observations: PyTree, *rest: Any) -> Any:
    try:
        return function(observations, *rest)
    except Exception as error:
        error.add_note(f"scorefn called {type(policy).__name__} with observations of shape {_shapes(observations)}.")
        raise


def _shapes(observations: PyTree) -> Any:
    if isinstance(observations, dict):
        return {key: _shapes(part) for key, part in observations.items()}
    return tuple(observations.shape) if isinstance(observations, Tensor) else tuple(map(_shapes, observations))


def _distribution(policy: nn.Module, distribution: Any) -> Distribution:
    if not isinstance(distribution, Distribution):
        raise ScorefnError(
            f"{type(policy).__name__} returned {type(distribution).__name__}, but its actions must be sampled and "
            "scored: return a torch.distributions.Distribution, or wrap a network of logits in CategoricalPolicy."
        )
    return distribution


def check_distribution(distribution: Distribution, env: VectorEnvironment) -> None:
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


def check_executed(actions: Any, env: VectorEnvironment) -> None:
    """Refuse actions that the space does not have; those of a density may leave a Box, whose wrappers clip them."""
    space = env.single_action_space
    wanted = (env.num_envs, *(space.shape or ()))
    if actions.shape != wanted:
        raise ShapeError(
            f"The policy acted with shape {actions.shape}, but {env.num_envs} streams with actions from {space} need "
            f"{wanted}: return one action per stream."
        )
    if not isinstance(space, spaces.Box) and not all(map(space.contains, actions)):
        raise ScorefnError(
            f"The policy chose the actions {actions.tolist()}, which are not all in {space}: the support of its "
            "distribution must be the action space, as that of Categorical is."
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
