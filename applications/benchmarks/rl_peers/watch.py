"""The clocks of a training, and when a policy is good."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import torch
from torch import Tensor, nn

STREAMS, HIDDEN = 64, (64, 64)  # of the throughput runs
THRESHOLD, EPISODES = 475.0, 100
EVERY = 1000  # environment steps at least, between two evaluations

Act = Callable[[Tensor], Tensor]  # observations [N, 4] -> sampled actions [N], without gradient


def native(num_envs: int) -> Any:
    """All streams in one NumPy program."""
    return gymnasium.make_vec("CartPole-v1", num_envs=num_envs, vectorization_mode="vector_entry_point")


def tanh_network(hidden: tuple[int, ...], outputs: int = 2) -> nn.Sequential:
    """With torch's own initial weights."""
    sizes = (4, *hidden)
    layers = [part for i, j in itertools.pairwise(sizes) for part in (nn.Linear(i, j), nn.Tanh())]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], outputs))


def race(logits: Tensor) -> Tensor:
    """A draw from the softmax of the last dimension: whose exponential clock rings first."""
    return logits.sub(torch.empty_like(logits).exponential_().log_()).argmax(-1)


def evaluate(act: Act, episodes: int, seed: int) -> float:
    """Mean return of whole sampled episodes; torch's generator is left as it was."""
    env = native(episodes)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        observation, _ = env.reset(seed=seed)
        going, total = np.ones(episodes, bool), 0.0
        while going.any():
            observation, reward, terminated, truncated, _ = env.step(act(torch.from_numpy(observation)).numpy())
            total += float(reward[going].sum())
            going &= ~(terminated | truncated)
    return total / episodes


class Watch:
    """The clocks of one training: they stand still while the policy is judged.

    Training calls ``after`` once an update, with the environment steps so far and the policy, and stops where that says
    so: after ``max_steps``, after ``max_updates``, or when the policy is good. A policy is looked at whenever ``EVERY``
    steps have passed, and is good where 100 sampled episodes average 475 and 100 further ones confirm it.
    """

    def __init__(
        self, *, seed: int = 0, judged: bool = False, max_steps: int | None = None, max_updates: int | None = None
    ) -> None:
        self.seed, self.judged, self.max_steps, self.max_updates = seed, judged, max_steps, max_updates
        self.cpu = self.wall = 0.0
        self.env_steps = self.updates = self.looks = self._last = 0
        self.solved = False
        self.confirmed: float | None = None  # mean of the further episodes

    def start(self) -> Watch:
        """From here on, time is the training's."""
        self._started = time.process_time(), time.perf_counter()
        return self

    def after(self, env_steps: int, act: Act) -> bool:
        """Whether to stop."""
        self.cpu += time.process_time() - self._started[0]
        self.wall += time.perf_counter() - self._started[1]
        self.env_steps, self.updates = env_steps, self.updates + 1
        if self.judged and env_steps - self._last >= EVERY:
            self._last = env_steps
            self.solved = self._good(act)
        self.start()
        return (
            self.solved
            or (self.max_steps is not None and env_steps >= self.max_steps)
            or (self.max_updates is not None and self.updates >= self.max_updates)
        )

    def _good(self, act: Act) -> bool:
        self.looks += 1
        seed = 1_000_000 * (self.seed + 1) + self.looks
        if evaluate(act, EPISODES, seed) < THRESHOLD:
            return False
        self.confirmed = evaluate(act, EPISODES, seed + 500_000)
        return self.confirmed >= THRESHOLD

    def result(self) -> dict[str, Any]:
        """Plain numbers."""
        names = ("env_steps", "updates", "cpu", "wall", "looks", "solved", "confirmed")
        return {name: getattr(self, name) for name in names}
