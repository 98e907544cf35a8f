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
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
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
    policy_fault,
    recorded_dtype,
    recurrent_step,
    reference,
)

_FIRST_CAPACITY = 128
_BOOL = np.dtype(bool)


class Recorded(Enum):
    """The steps of which the behaviour's log-probabilities are kept."""

    NOTHING = 0
    FIRST = 1
    MANY = 2  # the first sixteen, then about every eighth more: 16, 18, 20, 22, 24, 27, ...

    def after(self, step: int) -> int:
        """The next step to look at; -1: none."""
        if self is not Recorded.MANY:
            return -1
        return step + max(1, step // 8)


class Behaviour(NamedTuple):
    """Log-probabilities ``[num_envs]`` of one step's actions under the distribution that they were drawn from.

    With what the policy was called with, so that it can be asked again.
    """

    step: int
    log_prob: Tensor
    observations: PyTree
    state: PyTree
    actions: Tensor

    @torch.no_grad()
    def again(self, policy: nn.Module, stream: int) -> Tensor:
        """What the policy says now of one stream's action, a scalar.

        It is called with as many streams as then, all of them this one: what does not depend on the others is computed
        by the same operations in the same order, and so to the same bit.
        """

        def alone(leaf: Any) -> Any:
            return leaf[stream].expand_as(leaf).contiguous() if isinstance(leaf, Tensor) else leaf

        observations, state, actions = pytree.tree_map(alone, (self.observations, self.state, self.actions))
        if is_recurrent(policy):
            distribution, _ = recurrent_step(policy, observations, state)
        else:
            distribution = action_distribution(policy, observations)
        log_prob: Tensor = distribution.log_prob(actions)
        return log_prob[stream]


class Record(NamedTuple):
    """What was seen, and how likely the behaviour said it was."""

    trajectories: Trajectories
    behaviour: list[Behaviour]


class _Memory:
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
        return all(map(_has_shape, leaves(self.space, observation), self.shapes))

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
        if isinstance(error, ScorefnError):
            return
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
        first, _ = self._reset("to begin", seed=seed)
        self.current = [np.array(leaf) for leaf in leaves(self.space, first)]
        for leaf, part in zip(self.current, leaf_spaces(self.space), strict=True):
            if leaf.shape != (env.num_envs, *(part.shape or ())):
                raise ShapeError(
                    f"{type(env).__name__}.reset returned observations of shape {leaf.shape}, but {env.num_envs} "
                    f"streams of {part} need {(env.num_envs, *(part.shape or ()))}: one observation per stream."
                )
            if leaf.dtype.kind == "f" and np.dtype(part.dtype).kind != "f":
                raise ScorefnError(
                    f"{type(env).__name__}.reset returned observations of {leaf.dtype}, but the observation space says "
                    f"{part}: they would be cut off to integers. Declare a space of {leaf.dtype}."
                )
        self.fresh = np.ones(env.num_envs, bool)  # streams whose next row is the first of an episode
        self.present = np.ones(env.num_envs, bool)  # streams whose next row is a step, not used up by a reset
        self.state: PyTree = None

    def _reset(self, when: str, **arguments: Any) -> Any:
        """``env.reset``, whose errors say when it was called."""
        try:
            return self.env.reset(**arguments)
        except Exception as error:
            error.add_note(f"scorefn called env.reset {when}{_culprit(error)}; nothing was kept.")
            raise

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
        memory = _Memory(self.env, self.policy, None if episodes else steps)
        memory.begin(self.current, self.fresh)
        if episodes:
            self.present = np.arange(self.env.num_envs) < episodes
        initial = self._initial_state()
        state = self.state
        try:
            kept = self._loop(memory, steps, episodes, initial, behaviour)
        except Exception as error:
            memory.blame_observations(error)
            raise
        trajectories = memory.record(episodes or self.env.num_envs, state)
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
    ) -> list[Behaviour]:
        """Every step: act, execute, write down."""
        env, policy, shape, dtype = self.env, self.policy, (self.env.num_envs,), self.env.action_space.dtype
        act, executed = getattr(policy, "act", None), getattr(policy, "executed", None)
        recurrent = is_recurrent(policy)
        kept: list[Behaviour] = []
        closer = -1 if self.fits and behaviour is Recorded.NOTHING else 0  # the next step that is looked at closely
        waiting = not episodes and not self.present.all()
        several = memory.array is None
        t = 0
        while True:
            memory.mask[t] = self.present
            seen = memory.seen(t)
            if recurrent:
                if t and memory.starts[t].any():
                    self.state = _renewed(self.state, initial, memory.starts[t])
                before = self.state
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
            memory.actions.append(action)
            if t == closer and not self.fits:
                check_distribution(distribution, env, action, given)
            if array.dtype != dtype:
                array = array.astype(dtype)
            if t == closer:
                if not self.fits:
                    check_executed(array, env)
                    self.fits = True
                if behaviour is not Recorded.NOTHING:
                    log_prob = distribution.log_prob(action)
                    kept.append(Behaviour(t, log_prob, seen, before if recurrent else None, action))
                closer = behaviour.after(t)
            try:
                following, reward, terminated, truncated, info = env.step(array)
            except Exception as error:
                error.add_note(f"scorefn called env.step in step {t} of the record{_culprit(error)}; nothing was kept.")
                raise
            try:  # four comparisons of tuples; what is no array, or does not fit, is looked at one by one
                fits = (
                    reward.shape == terminated.shape == truncated.shape == shape
                    and terminated.dtype is truncated.dtype is _BOOL
                    and (memory.fits(following) if several else following.shape == memory.shapes[0])
                )
            except AttributeError:
                fits = False
            if not fits:
                self._check_answer(following, reward, terminated, truncated, t)
            memory.rewards[t] = reward
            ended = terminated | truncated
            memory.steps = t + 1
            if waiting or np.count_nonzero(ended) or t + 1 == steps:
                following = self._ends(memory, t, steps, bool(episodes), following, terminated, truncated, info)
                waiting = not episodes and not self.present.all()
                memory.write(t + 1, following)
                if t + 1 == steps or (episodes and not self.present.any()):
                    return kept
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
        if not ended.any():
            return following
        if self.mode is not AutoresetMode.SAME_STEP and "final_obs" in info:
            raise ScorefnError(
                f"{type(self.env.unwrapped).__name__} declares autoreset mode {self.mode.name}, but its info has "
                f"'final_obs' for the ends in step {t}, as if it had reset streams {ended.nonzero()[0].tolist()} "
                "within that step: the first observation of the next episode would be taken for the last of this one. "
                "Set env.metadata['autoreset_mode'] to what it does, AutoresetMode.SAME_STEP."
            )
        if self.mode is AutoresetMode.NEXT_STEP:
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
        following, _ = self._reset(
            f"with reset_mask for streams {ended.nonzero()[0].tolist()}, which ended in step {t} of the record",
            options={"reset_mask": ended},
        )
        self._check_observation("env.reset with options['reset_mask']", following, t)
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
        for i, row in zip(streams, rows, strict=True):
            for leaf, part in zip(row, leaf_spaces(self.space), strict=True):
                if not _has_shape(leaf, wanted := tuple(part.shape or ())):
                    raise ShapeError(
                        f"info['final_obs'] of stream {i} in step {t} has shape {np.shape(leaf)}, but {part} needs "
                        f"{wanted}: it is never repaired by broadcasting."
                    )
        return [np.stack([np.asarray(row[k]) for row in rows]) for k in range(len(leaf_spaces(self.space)))]

    def _check_answer(self, following: Any, reward: Any, terminated: Any, truncated: Any, t: int) -> None:
        """Refuse what ``env.step`` returned in step t where it is not one entry per stream."""
        wanted = (self.env.num_envs,)
        for noun, part in (("rewards", reward), ("flags of ends", terminated), ("flags of ends", truncated)):
            if np.shape(part) != wanted:
                raise ShapeError(
                    f"env.step returned {noun} of shape {np.shape(part)} in step {t}, but {wanted[0]} streams need "
                    f"{wanted}, one number per stream: they are never repaired by broadcasting."
                )
        for flags in (terminated, truncated):
            if getattr(flags, "dtype", None) != _BOOL:
                raise ScorefnError(
                    f"env.step returned flags of ends as {type(flags).__name__} of "
                    f"{getattr(flags, 'dtype', 'no dtype')} in step {t}, but terminated and truncated must be NumPy "
                    "arrays of bool: use np.asarray(flags, dtype=bool)."
                )
        self._check_observation("env.step", following, t)

    def _check_observation(self, source: str, observation: Any, t: int) -> None:
        """Refuse a leaf of another shape than one observation per stream."""
        for leaf, part in zip(leaves(self.space, observation), leaf_spaces(self.space), strict=True):
            if not _has_shape(leaf, wanted := (self.env.num_envs, *(part.shape or ()))):
                raise ShapeError(
                    f"{source} returned observations of shape {np.shape(leaf)} in step {t}, but {wanted[0]} streams of "
                    f"{part} need {wanted}, one observation per stream: they are never repaired by broadcasting."
                )


def _has_shape(array: Any, wanted: tuple[int, ...]) -> bool:
    return getattr(array, "shape", None) == wanted or np.shape(array) == wanted


def _renewed(state: PyTree, initial: PyTree, fresh: Any) -> PyTree:
    """The initial state in streams whose episode begins."""

    def chosen(old: Tensor, new: Tensor) -> Tensor:
        begins = torch.from_numpy(fresh).to(old.device)
        return torch.where(begins.reshape(-1, *[1] * (old.ndim - 1)), new, old)

    return pytree.tree_map(chosen, state, initial)


def _culprit(error: Exception) -> str:
    """Which stream raised, where the environment steps one after the other or asks its workers."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    for frame, called in zip(frames, [*frames[1:], None], strict=True):
        here, seen = frame.f_locals.get("self"), frame.f_locals
        if isinstance(here, SyncVectorEnv) and called is not None and called.f_code.co_name in ("step", "reset"):
            if isinstance(seen.get("i"), int):  # of its loop over the streams
                return f", and stream {seen['i']} raised"
        elif isinstance(here, AsyncVectorEnv) and isinstance(seen.get("index"), int):  # of what its worker reported
            return f", and stream {seen['index']} raised"
    return ""
