"""Whether an environment has spaces that can be recorded, and a policy the form of one; how the two are called."""

from __future__ import annotations

from typing import Any, TypeAlias

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.utils import _pytree as pytree

from scorefn.core import NonFiniteError, PyTree, ScorefnError

VectorEnvironment: TypeAlias = VectorEnv[Any, Any, Any]
Environment: TypeAlias = VectorEnvironment | gymnasium.Env[Any, Any]

_TENSORS = (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)
_LARGEST = np.iinfo(np.int64).max
_RECORDED = {"uint16": np.int32, "uint32": np.int64, "uint64": np.int64}  # torch computes with no other unsigned ones


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
    elif isinstance(space, spaces.Box) and np.dtype(space.dtype) == np.uint64 and space.high.max() > _LARGEST:
        raise ScorefnError(
            f"The observation space is {whole}, but tensors have no integers above {_LARGEST}, and those of {space} "
            "would be wrapped around: declare a smaller high, or convert the observations by a wrapper of the "
            "environment."
        )


def recorded_dtype(dtype: Any) -> np.dtype[Any]:
    """The dtype that observations are kept in: their own where torch computes with it, otherwise one that holds it.

    Floating-point observations reach the policy in its own dtype; so ``longdouble`` is kept as float64.
    """
    dtype = np.dtype(dtype)
    if dtype.kind == "f" and dtype.itemsize > 8:
        return np.dtype(np.float64)
    recorded: np.dtype[Any] = np.dtype(_RECORDED.get(dtype.name, dtype))
    return recorded


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
        note = f"scorefn called {type(policy).__name__} with observations of shape {_shapes(observations)}."
        integers = [leaf.dtype for leaf in pytree.tree_leaves(observations) if not leaf.is_floating_point()]
        if integers and isinstance(error, RuntimeError) and "type" in str(error):
            note += f" Integers stay {integers[0]}, as the space has them: a Linear needs observations.float()."
        error.add_note(note)
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


def policy_fault(policy: nn.Module, fact: str) -> NonFiniteError:
    """What to raise where a policy makes NaN or infinity of an observation that is finite."""
    for name, parameter in policy.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            value = parameter[~torch.isfinite(parameter)][0].item()
            cause = f"the policy's parameter {name!r} holds {value}, so that an earlier update must have failed"
            break
    else:
        cause = "the policy's parameters are finite, so that they overflow on their way through its network"
    return NonFiniteError(
        f"{fact}, though the observation is finite: {cause}. Nothing was kept of this record. Go back to parameters "
        "that work (a checkpoint), and look at the learning rate, and at gradients that were not clipped."
    )


def reference(policy: nn.Module) -> Tensor:
    """An empty tensor of the dtype and on the device of the policy: those of its first floating parameter."""
    for parameter in policy.parameters():
        if parameter.is_floating_point():
            return parameter.detach().new_empty(0)
    return torch.empty(0)
