"""What one record is written into while it is made: rows that grow, and are cut into streams when it is whole."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from scorefn.core import NonFiniteError, PyTree, ScorefnError
from scorefn.trajectories.record import Trajectories
from scorefn.trajectories.spaces import (
    VectorEnvironment,
    leaf_spaces,
    leaves,
    observation_tree,
    policy_fault,
    recorded_dtype,
    reference,
)

_FIRST_CAPACITY = 128


class Memory:
    """Rows of observations, rewards and flags, one a step, in arrays that double when they are full."""

    def __init__(self, env: VectorEnvironment, policy: nn.Module, steps: int | None) -> None:
        self.policy, self.like = policy, reference(policy)
        self.space, self.num_envs = env.single_observation_space, env.num_envs
        self.capacity, self.steps = steps or _FIRST_CAPACITY, 0
        parts = leaf_spaces(self.space)
        self.single = parts[0] is self.space
        self.shapes = [(self.num_envs, *(part.shape or ())) for part in parts]
        self.actions: list[Tensor] = []
        self.observations = [self._zeros(part.dtype, *(part.shape or ())) for part in parts]
        self.reward_tensor = self._zeros(np.float64)
        self.mask, self.starts, self.terminated, self.truncated = (self._flags() for _ in range(4))
        self.finals: list[tuple[int, Any, list[Any]]] = []  # step, streams, and what they saw before a reset
        self._view()

    def _zeros(self, dtype: Any, *shape: int) -> Tensor:
        """One row more than steps, on the CPU; in the policy's dtype where they are floats and NumPy has it."""
        own = torch.from_numpy(np.zeros(0, recorded_dtype(dtype))).dtype
        if own.is_floating_point and self.like.dtype != torch.bfloat16:
            own = self.like.dtype
        return torch.zeros(self.capacity + 1, self.num_envs, *shape, dtype=own)

    def _flags(self) -> Any:
        return np.zeros((self.capacity + 1, self.num_envs), bool)

    def _view(self) -> None:
        self.arrays = [tensor.numpy() for tensor in self.observations]
        self.rewards = self.reward_tensor.numpy()
        rows = [tensor.unbind() for tensor in self.observations]  # at once: indexing a tensor costs more than a step
        self.array = self.arrays[0] if self.single else None
        self.rows = rows[0] if self.single and self._cast(self.observations[0]) is self.observations[0] else None

    def grow(self) -> None:
        """Double the capacity; refuse what is not finite, for an environment that went astray may never end."""
        self._check_actions(torch.stack(self.actions))
        self._check_finite("reward", self._streams(self.reward_tensor, self._mask()))
        for tensor in self.observations:
            self._check_finite("observation", self._streams(tensor, self._mask()))

        def longer(tensor: Tensor) -> Tensor:
            return torch.cat([tensor, tensor.new_zeros(self.capacity, *tensor.shape[1:])])

        self.observations, self.reward_tensor = [longer(t) for t in self.observations], longer(self.reward_tensor)
        more = np.zeros((self.capacity, self.num_envs), bool)
        for name in ("mask", "starts", "terminated", "truncated"):
            setattr(self, name, np.concatenate([getattr(self, name), more]))
        self.capacity *= 2
        self._view()

    def begin(self, observation: list[Any], fresh: Any) -> None:
        """The first row."""
        for array, leaf in zip(self.arrays, observation, strict=True):
            array[0] = leaf
        self.starts[0] = fresh

    def write(self, row: int, observation: Any) -> None:
        """A copy of the observation: the environment may write the next one into the same memory."""
        if self.array is not None:
            self.array[row] = observation
        else:
            for array, leaf in zip(self.arrays, leaves(self.space, observation), strict=True):
                array[row] = leaf

    def fits(self, observation: Any) -> bool:
        """Whether an observation has one array of the right shape for each leaf, ``[num_envs, *obs]``."""
        return all(map(has_shape, leaves(self.space, observation), self.shapes))

    def seen(self, row: int) -> PyTree:
        """What the policy is shown."""
        if self.rows is not None:
            return self.rows[row]
        return observation_tree(self.space, [self._cast(tensor[row]) for tensor in self.observations])

    def _cast(self, tensor: Tensor) -> Tensor:
        """To the policy's device, and to its dtype unless they are integers."""
        return tensor.to(self.like) if tensor.is_floating_point() else tensor.to(self.like.device)

    def _mask(self) -> Tensor:
        return torch.from_numpy(self.mask[: self.steps].T)

    def _streams(self, tensor: Tensor, mask: Tensor) -> Tensor:
        """Rows from the first on ``[steps.., num_envs, ...]`` as ``[N, T, ...]`` in memory of their own, absent 0."""
        streams = tensor[: mask.shape[1], : len(mask)].transpose(0, 1)
        return streams.masked_fill(~mask.reshape(*mask.shape, *[1] * (tensor.ndim - 2)), 0).contiguous()

    def record(self, count: int, state: PyTree) -> Trajectories:
        """The first ``count`` streams.

        Raises:
            NonFiniteError: an action, a reward or an observation is NaN or infinite, with stream and step named.
        """
        self._check_actions(acted := torch.stack(self.actions))
        mask = self._mask()[:count].contiguous()
        rewards = self._streams(self.reward_tensor, mask)
        observations = [self._streams(tensor, mask) for tensor in self.observations]
        following = [self._streams(tensor[1:], mask) for tensor in self.observations]
        for step, streams, final in self.finals:
            for tensor, leaf in zip(following, final, strict=True):
                tensor.numpy()[streams, step] = leaf
        self._check_finite("reward", rewards)
        for tensor in observations:
            self._check_finite("observation", tensor)
        for tensor in following:
            self._check_finite("next observation", tensor)
        device = self.like.device
        terminated, truncated, starts = (
            self._streams(torch.from_numpy(flags), mask).to(device)
            for flags in (self.terminated, self.truncated, self.starts)
        )
        return Trajectories(
            observation_tree(self.space, [self._cast(tensor) for tensor in observations]),
            self._streams(acted, mask.to(acted.device)),
            self._cast(rewards),
            terminated,
            truncated,
            mask.to(device),
            observation_tree(self.space, [self._cast(tensor) for tensor in following]),
            starts,
            None if state is None else pytree.tree_map(lambda leaf: leaf[:count].clone(), state),
        )

    def blame_observations(self, error: Exception) -> None:
        """Where the environment or the policy failed at what is not finite, say so instead."""
        if not isinstance(error, ScorefnError):
            self.blame_values(error)

    def blame_values(self, error: Exception) -> None:
        """Raise NonFiniteError where an action or an observation so far is not finite."""
        try:
            if self.actions:
                self._check_actions(torch.stack(self.actions))
        except NonFiniteError as cause:
            raise cause from error
        self.steps = min(self.steps + 1, self.capacity)
        mask = self._mask()
        for tensor in self.observations:
            try:
                self._check_finite("observation", self._streams(tensor, mask))
            except NonFiniteError as cause:
                raise cause from error

    def _check_actions(self, acted: Tensor) -> None:
        """Refuse actions ``[T, num_envs, *act]`` that are NaN or infinite where what they were chosen from is not."""
        if not acted.is_floating_point() or math.isfinite(acted.sum().item()):
            return
        bad = ~torch.isfinite(acted).flatten(2).all(2) if acted.ndim > 2 else ~torch.isfinite(acted)
        for step, stream in (bad.cpu() & torch.from_numpy(self.mask[: len(bad)])).nonzero()[:1].tolist():
            if all(bool(torch.isfinite(tensor[: step + 1, stream]).all()) for tensor in self.observations):
                action = acted[step, stream].flatten()
                value = action[~torch.isfinite(action)][0].item()
                raise policy_fault(self.policy, f"The action of stream {stream} in step {step} is {value}")

    @staticmethod
    def _check_finite(noun: str, values: Tensor) -> None:
        """Refuse NaN and infinities among ``[N, T, ...]``: by one sum, which alone may overflow without any."""
        if not values.is_floating_point() or math.isfinite(values.sum().item()):
            return
        bad = ~torch.isfinite(values)
        if bool(bad.any()):
            stream, step, *_ = bad.nonzero()[bad.nonzero()[:, 1].argmin()].tolist()
            where = (stream, step)
            value = values[where].flatten()[bad[where].flatten()][0].item()
            raise NonFiniteError(
                f"The {noun} of stream {stream} in step {step} is {value}: a gradient, a normaliser or a value "
                "function that learnt from it would be NaN from then on, so nothing of this record was kept and no "
                "statistics were touched. Repair the environment, or end the episode before it leaves its domain."
            )


def has_shape(array: Any, wanted: tuple[int, ...]) -> bool:
    """Whether an array, or what NumPy makes of it, has a shape."""
    return getattr(array, "shape", None) == wanted or np.shape(array) == wanted
