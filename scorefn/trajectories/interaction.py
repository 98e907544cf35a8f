"""The loop in which a policy and an environment meet: what whole episodes and segments are recorded by.

A step costs little more than the policy's forward pass and the environment: observations and rewards are written into
memory that grows, ends of episodes are dealt with only in steps that have one, and whether everything was finite is
asked once, of the whole record, before anybody learns from it.
"""

from __future__ import annotations

import traceback
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from scorefn.core import NonFiniteError, PyTree, ScorefnError, ShapeError
from scorefn.trajectories.actions import ActionGate, check_distribution, draws_within
from scorefn.trajectories.behaviour import Behaviour, Recorded
from scorefn.trajectories.listing import few
from scorefn.trajectories.memory import Memory, has_shape
from scorefn.trajectories.record import Trajectories
from scorefn.trajectories.spaces import (
    VectorEnvironment,
    action_distribution,
    autoreset_mode,
    is_envpool,
    is_recurrent,
    leaf_spaces,
    leaves,
    recurrent_step,
)

_BOOL = np.dtype(bool)


class Record(NamedTuple):
    """What was seen, and how likely the behaviour said it was.

    Args:
        trajectories: ``[N, T]``.
        behaviour: of each step that was looked at, in order; empty where none was.
    """

    trajectories: Trajectories
    behaviour: list[Behaviour]


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
        self.fits = False  # whether the policy's distribution was compared with the action space

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

        Raises:
            ScorefnError: a policy that does not fit the environment, an action that it does not have, or flags that
                are no arrays of bool.
            ShapeError: what the environment or the policy returns has not one entry per stream.
            NonFiniteError: an action, a reward or an observation is NaN or infinite, with stream and step named.
        """
        self.live = False
        memory = Memory(self.env, self.policy, None if episodes else steps)
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
        self, memory: Memory, steps: int | None, episodes: int, initial: PyTree, behaviour: Recorded
    ) -> list[Behaviour]:
        """Every step: act, execute, write down."""
        env, policy, shape, gate = self.env, self.policy, (self.env.num_envs,), ActionGate(self.env, self.policy)
        act, executed = getattr(policy, "act", None), getattr(policy, "executed", None)
        within = executed is None and draws_within(policy)
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
            memory.actions.append(action)
            if t == closer and not self.fits:
                check_distribution(distribution, env, action, given)
            if self.fits and within:
                array = action.cpu().numpy()
                if array.dtype != gate.dtype:
                    array = array.astype(gate.dtype)
            else:
                try:
                    array = gate(given, action, t)
                except NonFiniteError as error:
                    memory.blame_values(error)
                    raise
            if t == closer:
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
        memory: Memory,
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
                f"'final_obs' for the ends in step {t}, as if it had reset streams {_streams(ended)} "
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
            f"with reset_mask for streams {_streams(ended)}, which ended in step {t} of the record",
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
        final: Any = info.get("final_obs")
        given = info.get("_final_obs")
        missing = np.zeros(self.env.num_envs, bool)
        missing[streams] = True if final is None else False if given is None else ~given[streams]
        if missing.any():
            raise ScorefnError(
                f"{type(self.env.unwrapped).__name__} declares autoreset mode SAME_STEP, but its info has no "
                f"'final_obs' for streams {_streams(missing)} in step {t}: what the step led to would be lost, and the "
                "next episode's first observation taken for it. Give it, or use another autoreset mode."
            )
        rows = [leaves(self.space, final[i]) for i in streams]
        for i, row in zip(streams, rows, strict=True):
            for leaf, part in zip(row, leaf_spaces(self.space), strict=True):
                if not has_shape(leaf, wanted := tuple(part.shape or ())):
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
            if not has_shape(leaf, wanted := (self.env.num_envs, *(part.shape or ()))):
                raise ShapeError(
                    f"{source} returned observations of shape {np.shape(leaf)} in step {t}, but {wanted[0]} streams of "
                    f"{part} need {wanted}, one observation per stream: they are never repaired by broadcasting."
                )


def _renewed(state: PyTree, initial: PyTree, fresh: Any) -> PyTree:
    """The initial state in streams whose episode begins."""

    def chosen(old: Tensor, new: Tensor) -> Tensor:
        begins = torch.from_numpy(fresh).to(old.device)
        return torch.where(begins.reshape(-1, *[1] * (old.ndim - 1)), new, old)

    return pytree.tree_map(chosen, state, initial)


def _streams(which: Any) -> str:
    """Which streams, for a message: a few of them, and how many there are."""
    numbers = which.nonzero()[0]
    return few(numbers) + (f" ({len(numbers)} of {len(which)})" if len(numbers) > 5 else "")


def _culprit(error: Exception) -> str:
    """Which stream raised, where the environment steps one after the other or asks its workers."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    for frame, called in zip(frames, [*frames[1:], None], strict=True):
        here, seen = frame.f_locals.get("self"), frame.f_locals
        if isinstance(here, SyncVectorEnv) and called is not None and called.f_code.co_name in ("step", "reset"):
            if isinstance(seen.get("i"), int):  # of its loop over the streams
                return f", and stream {seen['i']} raised"
        elif (
            isinstance(here, SyncVectorEnv)
            and called is None
            and frame.f_code.co_name == "step"
            and isinstance(error, ValueError | TypeError)
        ):  # where it takes apart what a stream returned
            return (
                f", and what stream {seen.get('i')} returned has not the form (observation, reward, terminated, "
                "truncated, info) with a reward that is one number, such as float(reward), and two flags True or False"
            )
        elif isinstance(here, AsyncVectorEnv) and isinstance(seen.get("index"), int):  # of what its worker reported
            return f", and stream {seen['index']} raised"
    return ""
