"""Reverse scans and generalised advantage estimation: scorefn's, loops, TorchRL's and Stable-Baselines3's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from applications.benchmarks.side_by_side.work import Work, exactly

DISCOUNT, LAMBDA, ENDS = 0.99, 0.95, 0.01


def scan(length: int, width: int, how: str) -> Work:
    """A candidate of ``applications/benchmarks/scan.py``."""
    from applications.benchmarks.scan import candidates

    call = candidates(length, width, peers=how.startswith("TorchRL"))[how]
    return Work(lambda turn: _done(call()), lambda: exactly(_digest(call().numpy())))


def _done(result: Any) -> None:
    """What a call returns is of no use to the clock."""


def _digest(found: np.ndarray) -> np.ndarray:
    """Of ``[T, N]``: means over streams at six times, which all differ."""
    rows = np.linspace(0, len(found) - 1, min(6, len(found))).round().astype(int)
    digest: np.ndarray = found[rows].astype(np.float64).mean(1)
    return digest


def segment(length: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Rewards, values, those of the next step, and ends, ``[T, N]``, 1 % of the steps ending an episode."""
    draws = np.random.default_rng(0)
    rewards = draws.standard_normal((length, width), np.float32)
    values = draws.standard_normal((length + 1, width), np.float32)
    return rewards, values[:-1].copy(), values[1:].copy(), draws.random((length, width)) < ENDS


def gae(length: int, width: int, how: str) -> Work:
    """Advantages of a segment ``[T, N]``; ``how``: scorefn, loop, tensors, torchrl or sb3."""
    makers: dict[str, Callable[..., Callable[[], np.ndarray]]] = {
        "scorefn": _by_scorefn,
        "loop": _by_loop,
        "tensors": _by_tensors,
        "torchrl": _by_torchrl,
        "sb3": _by_sb3,
    }
    call = makers[how](*segment(length, width))
    return Work(lambda turn: _done(call()), lambda: exactly(_digest(np.asarray(call()))))


def _by_scorefn(rewards: Any, values: Any, next_values: Any, done: Any) -> Callable[[], Any]:
    import torch

    import scorefn as sf

    r, v, w, d = (torch.from_numpy(np.ascontiguousarray(part.T)) for part in (rewards, values, next_values, done))
    return lambda: sf.trajectories.gae(r, v, w, d, d, discount=DISCOUNT, lambda_=LAMBDA).T


def _by_loop(rewards: Any, values: Any, next_values: Any, done: Any) -> Callable[[], Any]:
    """As CleanRL and many others write it, in NumPy."""

    def call() -> Any:
        advantages, last = np.empty_like(rewards), np.zeros_like(rewards[0])
        for t in reversed(range(len(rewards))):
            going = 1.0 - done[t].astype(np.float32)
            delta = rewards[t] + DISCOUNT * next_values[t] * going - values[t]
            advantages[t] = last = delta + DISCOUNT * LAMBDA * going * last
        return advantages

    return call


def _by_tensors(rewards: Any, values: Any, next_values: Any, done: Any) -> Callable[[], Any]:
    """The same loop in torch."""
    import torch

    r, v, w, d = (torch.from_numpy(part) for part in (rewards, values, next_values, done))

    def call() -> Any:
        advantages, last = torch.empty_like(r), torch.zeros_like(r[0])
        for t in reversed(range(len(r))):
            going = 1.0 - d[t].float()
            delta = r[t] + DISCOUNT * w[t] * going - v[t]
            advantages[t] = last = delta + DISCOUNT * LAMBDA * going * last
        return advantages

    return call


def _by_torchrl(rewards: Any, values: Any, next_values: Any, done: Any) -> Callable[[], Any]:
    """The vectorised one, in the layout of its data, ``[N, T, 1]``."""
    import torch
    from torchrl.objectives.value.functional import vec_generalized_advantage_estimate as vectorised

    r, v, w, d = (
        torch.from_numpy(np.ascontiguousarray(part.T)).unsqueeze(-1) for part in (rewards, values, next_values, done)
    )
    return lambda: vectorised(DISCOUNT, LAMBDA, v, w, r, d, d)[0].squeeze(-1).T


def _by_sb3(rewards: Any, values: Any, next_values: Any, done: Any) -> Callable[[], Any]:
    """Its rollout buffer, which computes the returns as well."""
    import torch
    from gymnasium.spaces import Box, Discrete
    from stable_baselines3.common.buffers import RolloutBuffer

    length, width = rewards.shape
    space = Box(-1.0, 1.0, (1,), np.float32)
    buffer = RolloutBuffer(length, space, Discrete(2), "cpu", gae_lambda=LAMBDA, gamma=DISCOUNT, n_envs=width)
    buffer.rewards[:], buffer.values[:] = rewards, values
    buffer.episode_starts[1:] = done[:-1]
    last = torch.from_numpy(next_values[-1])

    def call() -> Any:
        buffer.compute_returns_and_advantage(last, done[-1])
        return buffer.advantages

    return call
