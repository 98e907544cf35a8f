"""A deterministic environment whose episodes end early, late, or both at once; and policies for it.

Positions 0 to 5, from 2; action 1 goes up, 0 down. Reaching 0 or 5 terminates, four steps truncate, and reaching 0 in
the fourth step does both. Every later episode of the same stream is poisoned: its observations and rewards are NaN;
or, without poison, it begins at 3 and at 2 by turns. Rewards are dyadic, so that their sums are exact in any order.
"""

import itertools

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from torch import nn

import scorefn as sf

HORIZON, START = 4, 2
MODES = [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP, AutoresetMode.DISABLED]
SEQUENCES = torch.tensor(list(itertools.product([0, 1], repeat=HORIZON)))  # [16, 4]


def move(position, time, action):
    """What a step does: the next position, the reward, terminated, truncated."""
    following = position + (1 if action else -1)
    reward = (position + 1) * (1.0 if action else -0.5) + 0.25 * time
    return following, reward, following in (0, 5), time + 1 == HORIZON


class Corridor(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = gymnasium.spaces.Discrete(2)

    def __init__(self, poison=True):
        self.poison = poison

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.poisoned = self.poison and seed is None
        self.start = START if seed is not None or self.poison else 5 - self.start
        self.position, self.time = self.start, 0
        return self._observation(), {}

    def step(self, action):
        self.position, reward, terminated, truncated = move(self.position, self.time, action)
        self.time += 1
        return self._observation(), np.nan if self.poisoned else reward, terminated, truncated, {}

    def _observation(self):
        return np.full(2, np.nan) if self.poisoned else np.array([self.position, self.time], dtype=np.float64)


def corridors(num_envs, mode=AutoresetMode.NEXT_STEP, poison=True):
    return SyncVectorEnv([lambda: Corridor(poison)] * num_envs, autoreset_mode=mode)


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)).double()


class Scripted(sf.trajectories.CategoricalPolicy):
    """Scores with a network, but acts by a script `[num_envs, T]`."""

    def __init__(self, script, seed=0):
        super().__init__(network(seed))
        self.script, self.time = script, 0

    def act(self, observations):
        action = self.script[:, self.time % self.script.shape[1]]
        self.time += 1
        return action


def episode(actions):
    """By hand: positions, times, actions and rewards of the present steps, and the two flags of the last one."""
    position, rows = 2, []
    for time, action in enumerate(actions):
        following, reward, terminated, truncated = move(position, time, action)
        rows.append((position, time, action, reward))
        position = following
        if terminated or truncated:
            return rows, terminated, truncated
    raise AssertionError


def expected_return(logits, position=2, time=0):
    """By recursion, differentiable; `logits(position, time)` is `[2]`."""
    probability = logits(position, time).softmax(-1)
    total = 0.0
    for action in (0, 1):
        following, reward, terminated, truncated = move(position, time, action)
        rest = 0.0 if terminated or truncated else expected_return(logits, following, time + 1)
        total = total + probability[action] * (reward + rest)
    return total


def segment(actions, mode):
    """By hand, unpoisoned: rows (position, time, action, reward, terminated, truncated, next position and time, start).

    A row that is used up by a reset is None.
    """
    position = start = START
    time, filler, rows = 0, False, []
    for action in actions:
        if filler:
            rows.append(None)
            filler = False
            continue
        following, reward, terminated, truncated = move(position, time, action)
        rows.append((position, time, action, reward, terminated, truncated, following, time + 1, time == 0))
        position, time = following, time + 1
        if terminated or truncated:
            start = 5 - start
            position, time, filler = start, 0, mode is AutoresetMode.NEXT_STEP
    return rows
