"""The loop in which a policy and an environment meet: what whole episodes and segments are recorded by.

A step costs little more than the policy's forward pass and the environment: observations and rewards are written into
memory that grows, ends of episodes are dealt with only in steps that have one, and whether everything was finite is
asked once, of the whole record, before anybody learns from it.
"""

from __future__ import annotations

import math
import traceback
from enum import Enum
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from scorefn.core import NonFiniteError, PyTree, ScorefnError, ShapeError
from scorefn.trajectories.record import Trajectories
from scorefn.trajectories.spaces import (
    VectorEnvironment,
    action_distribution,
    autoreset_mode,
    check_distribution,
    check_executed,
    is_envpool,
    is_recurrent,
    leaf_spaces,
    leaves,
    observation_tree,
    recurrent_step,
    reference,
)

_FIRST_CAPACITY = 128


class Recorded(Enum):
    """The steps of which the behaviour's log-probabilities are kept."""

    NOTHING = 0
    FIRST = 1
    POWERS = 2  # 0, 1, 2, 4, 8, ...


class Behaviour(NamedTuple):
    """Log-probabilities ``[num_envs]`` of one step's actions under the distribution that they were drawn from."""

    step: int
    log_prob: Tensor


class Record(NamedTuple):
    """What was seen, and how likely the behaviour said it was."""

    trajectories: Trajectories
    behaviour: list[Behaviour]


class _Memory:
    """Rows of observations, rewards and flags, one a step, in arrays that double when they are full."""

    def __init__(self, env: VectorEnvironment, like: Tensor, steps: int | None) -> None:
        self.like, self.space, self.num_envs = like, env.single_observation_space, env.num_envs
        self.capacity, self.steps = steps or _FIRST_CAPACITY, 0
        parts = leaf_spaces(self.space)
        self.single = parts[0] is self.space
        self.observations = [self._zeros(part.dtype, *(part.shape or ())) for part in parts]
        self.reward_tensor = self._zeros(np.float64)
        self.mask, self.starts, self.terminated, self.truncated = (self._flags() for _ in range(4))
        self.finals: list[tuple[int, Any, list[Any]]] = []  # step, streams, and what they saw before a reset
        self._view()

    def _zeros(self, dtype: Any, *shape: int) -> Tensor:
        """One row more than steps, on the CPU; in the policy's dtype where they are floats and NumPy has it."""
        own = torch.from_numpy(np.zeros(0, dtype)).dtype
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

    def record(self, actions: list[Tensor], count: int, state: PyTree) -> Trajectories:
        """The first ``count`` streams.

        Raises:
            NonFiniteError: a reward or an observation is NaN or infinite, with stream and step named.
        """
        mask = self._mask()[:count].contiguous()
        rewards = self._streams(self.reward_tensor, mask)
        observations = [self._streams(tensor, mask) for tensor in self.observations]
        following = [self._streams(tensor[1:], mask) for tensor in self.observations]
        for step, streams, final in self.finals:
            for tensor, leaf in zip(following, final, strict=True):
                tensor[streams, step] = torch.from_numpy(leaf).to(tensor.dtype)
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
        acted = torch.stack(actions)
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
        """Where the policy or the environment failed at an observation that is not finite, say so instead."""
        if isinstance(error, ScorefnError):
            return
        self.steps = min(self.steps + 1, self.capacity)
        mask = self._mask()
        for tensor in self.observations:
            try:
                self._check_finite("observation", self._streams(tensor, mask))
            except NonFiniteError as cause:
                raise cause from error

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


class Interaction:
    """A policy in the streams of an environment, until whole episodes are over or for so many steps.

    Args:
        env: a vector environment.
        policy: a module.
    """

    def __init__(self, env: VectorEnvironment, policy: nn.Module) -> None:
        self.env, self.policy, self.mode = env, policy, autoreset_mode(env)
        self.space = env.single_observation_space
        self.live = False  # whether the streams can go on from where they are
        self.fits = False  # whether the policy's actions were compared with the action space

    def begin(self) -> None:
        """Reset all streams, with a seed from torch's generator where the environment takes one."""
        env = self.env
        seed = None if is_envpool(env) else int(torch.randint(2**31 - env.num_envs, ()))
        self.current = [np.array(leaf) for leaf in leaves(self.space, env.reset(seed=seed)[0])]
        for leaf, part in zip(self.current, leaf_spaces(self.space), strict=True):
            if leaf.shape != (env.num_envs, *(part.shape or ())):
                raise ShapeError(
                    f"{type(env).__name__}.reset returned observations of shape {leaf.shape}, but {env.num_envs} "
                    f"streams of {part} need {(env.num_envs, *(part.shape or ()))}: one observation per stream."
                )
        self.fresh = np.ones(env.num_envs, bool)  # streams whose next row is the first of an episode
        self.present = np.ones(env.num_envs, bool)  # streams whose next row is a step, not used up by a reset
        self.state: PyTree = None

    @torch.no_grad()
    def run(self, steps: int | None, episodes: int = 0, behaviour: Recorded = Recorded.NOTHING) -> Record:
        """Go on for ``steps``; or, with ``episodes``, until each of the first so many streams has ended once.

        Args:
            steps: T; with ``episodes`` the step in which those that are not over count as truncated; None: as long as
                it takes.
            episodes: N, the number of streams that are recorded; 0: all, for so many steps.
            behaviour: of which steps the behaviour's log-probabilities are kept.
        """
        self.live = False
        memory = _Memory(self.env, reference(self.policy), None if episodes else steps)
        memory.begin(self.current, self.fresh)
        if episodes:
            self.present = np.arange(self.env.num_envs) < episodes
        initial = self._initial_state()
        state = self.state
        try:
            actions, kept = self._loop(memory, steps, episodes, initial, behaviour)
        except Exception as error:
            memory.blame_observations(error)
            raise
        trajectories = memory.record(actions, episodes or self.env.num_envs, state)
        self.current, self.fresh = [array[memory.steps] for array in memory.arrays], memory.starts[memory.steps]
        self.live = True
        return Record(trajectories, kept)

    def _initial_state(self) -> PyTree:
        """The state of streams that begin; sets that before the first step."""
        if not is_recurrent(self.policy):
            return None
        count = self.env.num_envs
        initial = self.policy.initial_state(count)  # type: ignore[operator]
        for leaf in pytree.tree_leaves(initial):
            if not isinstance(leaf, Tensor) or leaf.shape[:1] != (count,):
                raise ShapeError(
                    f"{type(self.policy).__name__}.initial_state({count}) has the part "
                    f"{tuple(leaf.shape) if isinstance(leaf, Tensor) else type(leaf).__name__}, but each must be a "
                    f"tensor that leads with the number of streams, ({count}, ...)."
                )
        self.state = initial if self.state is None else _renewed(self.state, initial, self.fresh)
        return initial

    def _loop(
        self, memory: _Memory, steps: int | None, episodes: int, initial: PyTree, behaviour: Recorded
    ) -> tuple[list[Tensor], list[Behaviour]]:
        """Every step: act, execute, write down."""
        env, policy, shape, dtype = self.env, self.policy, (self.env.num_envs,), self.env.action_space.dtype
        act, executed = getattr(policy, "act", None), getattr(policy, "executed", None)
        recurrent = is_recurrent(policy)
        actions: list[Tensor] = []
        kept: list[Behaviour] = []
        closer = -1 if self.fits and behaviour is Recorded.NOTHING else 0  # the next step that is looked at closely
        waiting = not episodes and not self.present.all()
        t = 0
        while True:
            memory.mask[t] = self.present
            seen = memory.seen(t)
            if recurrent:
                if t and memory.starts[t].any():
                    self.state = _renewed(self.state, initial, memory.starts[t])
                if act is None:
                    distribution, self.state = recurrent_step(policy, seen, self.state)
                    action = distribution.sample()
                else:  # also where the distribution is looked at: the random numbers must not depend on that
                    if t == closer:
                        distribution, _ = recurrent_step(policy, seen, self.state)
                    action, self.state = act(seen, self.state)
            elif act is None:
                distribution = action_distribution(policy, seen)
                action = distribution.sample()
            else:
                if t == closer:
                    distribution = action_distribution(policy, seen)
                action = act(seen)
            given = action if executed is None else executed(action)
            array = (given.float() if given.dtype is torch.bfloat16 else given).cpu().numpy()
            if array.dtype != dtype:
                array = array.astype(dtype)
            if t == closer:
                if not self.fits:
                    check_distribution(distribution, env)
                    check_executed(array, env)
                    self.fits = True
                if behaviour is not Recorded.NOTHING:
                    kept.append(Behaviour(t, distribution.log_prob(action)))
                closer = max(1, 2 * t) if behaviour is Recorded.POWERS else -1
            try:
                following, reward, terminated, truncated, info = env.step(array)
            except Exception as error:
                error.add_note(f"scorefn called env.step in step {t} of the record{_culprit(error)}; nothing was kept.")
                raise
            if getattr(reward, "shape", None) != shape and np.shape(reward) != shape:
                raise ShapeError(
                    f"env.step returned rewards of shape {np.shape(reward)} in step {t}, but {shape[0]} streams need "
                    f"{shape}, one number per stream: they are never repaired by broadcasting."
                )
            memory.rewards[t] = reward
            actions.append(action)
            ended = terminated | truncated
            memory.steps = t + 1
            if waiting or np.count_nonzero(ended) or t + 1 == steps:
                following = self._ends(memory, t, steps, bool(episodes), following, terminated, truncated, info)
                waiting = not episodes and not self.present.all()
                memory.write(t + 1, following)
                if t + 1 == steps or (episodes and not self.present.any()):
                    return actions, kept
            else:
                memory.write(t + 1, following)
            t += 1
            if t == memory.capacity:
                memory.grow()

    def _ends(
        self,
        memory: _Memory,
        t: int,
        steps: int | None,
        episodes: bool,
        following: Any,
        terminated: Any,
        truncated: Any,
        info: dict[str, Any],
    ) -> Any:
        """Write down which episodes are over after step t; the observations of the next row."""
        ended, present = terminated | truncated, self.present
        if episodes and t + 1 == steps:
            truncated = truncated | ~terminated
        memory.terminated[t], memory.truncated[t] = terminated & present, truncated & present
        done = memory.terminated[t] | memory.truncated[t]
        if episodes:
            self.present = present & ~done
        elif self.mode is AutoresetMode.NEXT_STEP:
            memory.starts[t + 1] = ~present
            self.present = ~done
        else:
            memory.starts[t + 1] = done
        if self.mode is AutoresetMode.NEXT_STEP or not ended.any():
            return following
        seen = (ended & present).nonzero()[0]  # whose next row is not what the step led to
        if self.mode is AutoresetMode.SAME_STEP:
            if len(seen):
                memory.finals.append((t, seen, self._final(info, seen, t)))
            return following
        before = [np.array(leaf) for leaf in leaves(self.space, following)]
        memory.finals.append((t, seen, [leaf[seen] for leaf in before]))
        if episodes and not self.present.any():
            return following
        following, _ = self.env.reset(options={"reset_mask": ended})
        for old, new in zip(before, leaves(self.space, following), strict=True):
            if not np.array_equal(old[~ended], new[~ended], equal_nan=old.dtype.kind == "f"):
                raise ScorefnError(
                    f"{type(self.env.unwrapped).__name__} declares autoreset mode DISABLED, but it also reset streams "
                    f"that options['reset_mask'] left out, in step {t}: their episodes would be cut unseen. Use an "
                    "environment that follows reset_mask, or another autoreset mode."
                )
        return following

    def _final(self, info: dict[str, Any], streams: Any, t: int) -> list[Any]:
        """What streams saw last before a reset within the step."""
        final, given = info.get("final_obs"), info.get("_final_obs")
        if final is None or (given is not None and not given[streams].all()):
            raise ScorefnError(
                f"{type(self.env.unwrapped).__name__} declares autoreset mode SAME_STEP, but its info has no "
                f"'final_obs' for streams {streams.tolist()} in step {t}: what the step led to would be lost, and the "
                "next episode's first observation taken for it. Give it, or use another autoreset mode."
            )
        rows = [leaves(self.space, final[i]) for i in streams]
        return [np.stack([np.asarray(row[k]) for row in rows]) for k in range(len(leaf_spaces(self.space)))]


def _renewed(state: PyTree, initial: PyTree, fresh: Any) -> PyTree:
    """The initial state in streams whose episode begins."""

    def chosen(old: Tensor, new: Tensor) -> Tensor:
        begins = torch.from_numpy(fresh).to(old.device)
        return torch.where(begins.reshape(-1, *[1] * (old.ndim - 1)), new, old)

    return pytree.tree_map(chosen, state, initial)


def _culprit(error: Exception) -> str:
    """Which stream raised, where the environment steps one after the other."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if isinstance(frame.f_locals.get("self"), SyncVectorEnv) and isinstance(frame.f_locals.get("i"), int):
            return f", and stream {frame.f_locals['i']} raised"
    return ""
